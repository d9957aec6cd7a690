//! The two directions of a Sync call, framed as gRPC does over HTTP/2
//! (<https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>): each message behind a byte that says whether it is
//! compressed, never here, and its length.
//!
//! The library's own framing keeps, for each call in each direction, a buffer as large as the most that was ever in it: with
//! thousands of agents that are told everything once and little from then on, a quarter of a controller's memory
//! (`docs/benchmarks.md`). Here nothing is kept between messages, and what many are told alike is shared and not copied.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context as Poller, Poll, ready};

use bulkhead_wire::MESSAGE_BYTES_MAX;
use bulkhead_wire::proto::AgentMessage;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::{Stream, StreamExt};
use http_body::{Body as _, Frame};
use prost::Message as _;
use tokio::sync::mpsc;
use tonic::body::Body;
use tonic::codegen::http::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use tonic::codegen::http::{Request, Response};
use tonic::{Code, Status};

/// What goes before each message.
const HEAD_BYTES: usize = 5;
/// Messages are written together until they are as large as this: what TLS encrypts at once.
const TOGETHER_BYTES: usize = 16 << 10;

/// What an agent says.
#[derive(Debug)]
pub(crate) struct Incoming {
    body: Body,
    /// What has come and is not taken yet, as it came.
    came: Bytes,
    /// The same, put together of several parts. One of the two is empty.
    together: BytesMut,
    ended: bool,
}

impl Incoming {
    pub(super) fn new(request: Request<Body>) -> Self {
        Self { body: request.into_body(), came: Bytes::new(), together: BytesMut::new(), ended: false }
    }

    /// The next message; `None` when the agent has ended the stream.
    ///
    /// # Errors
    /// If the connection breaks, or it is no message.
    pub(super) async fn message(&mut self) -> Result<Option<AgentMessage>, Status> {
        self.next().await.transpose()
    }

    fn waiting(&self) -> &[u8] {
        if self.together.is_empty() { &self.came } else { &self.together }
    }

    /// Takes in what has come. Copied if there is something before it: a message may come byte by byte.
    fn add(&mut self, part: Bytes) {
        if self.waiting().is_empty() {
            self.came = part;
        } else {
            let before = std::mem::take(&mut self.came);
            self.together.extend_from_slice(&before);
            self.together.extend_from_slice(&part);
        }
    }

    /// Takes that much out, which there must be.
    fn take(&mut self, bytes: usize) -> Bytes {
        if !self.together.is_empty() {
            self.came = std::mem::take(&mut self.together).freeze();
        }
        self.came.split_to(bytes)
    }

    /// The first message, if it is there whole.
    fn first(&mut self) -> Result<Option<AgentMessage>, Status> {
        let Some((head, rest)) = self.waiting().split_at_checked(HEAD_BYTES) else { return Ok(None) };
        let length = (&head[1..]).get_u32() as usize;
        if head[0] != 0 {
            return Err(Status::unimplemented("compressed messages are not read here"));
        }
        if length > MESSAGE_BYTES_MAX {
            let message = format!("a message of {length} bytes: {MESSAGE_BYTES_MAX} are read");
            return Err(Status::out_of_range(message));
        }
        if rest.len() < length {
            return Ok(None);
        }
        let mut message = self.take(HEAD_BYTES + length);
        message.advance(HEAD_BYTES);
        let message = AgentMessage::decode(message);
        message.map(Some).map_err(|error| Status::internal(format!("no message: {error}")))
    }
}

impl Stream for Incoming {
    type Item = Result<AgentMessage, Status>;

    fn poll_next(mut self: Pin<&mut Self>, poller: &mut Poller<'_>) -> Poll<Option<Self::Item>> {
        while !self.ended {
            match self.first() {
                Ok(None) => {}
                first => {
                    self.ended = first.is_err();
                    return Poll::Ready(first.transpose());
                }
            }
            match ready!(Pin::new(&mut self.body).poll_frame(poller)) {
                Some(Ok(frame)) => {
                    if let Ok(part) = frame.into_data() {
                        self.add(part);
                    }
                }
                Some(Err(status)) => {
                    self.ended = true;
                    return Poll::Ready(Some(Err(status)));
                }
                None => {
                    self.ended = true;
                    if !self.waiting().is_empty() {
                        return Poll::Ready(Some(Err(Status::internal("the stream ends inside a message"))));
                    }
                }
            }
        }
        Poll::Ready(None)
    }
}

/// A message that can be written behind others.
pub(crate) trait Encode {
    /// Bytes without the head.
    fn bytes(&self) -> usize;

    /// Those of them that are shared with others.
    fn shared_bytes(&self) -> usize;

    /// Writes just as many.
    fn write(&self, pieces: &mut Pieces);
}

/// Messages as they are sent.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    whole: Vec<Bytes>,
    open: BytesMut,
}

impl Pieces {
    /// All of these messages, in order.
    pub(super) fn of<M: Encode>(messages: &[M]) -> Vec<Bytes> {
        let mut pieces = Self::default();
        let sizes: Vec<_> = messages.iter().map(Size::of).collect();
        for (index, (message, size)) in messages.iter().zip(&sizes).enumerate() {
            if pieces.open.len() + size.own > TOGETHER_BYTES {
                pieces.close();
            }
            if pieces.open.is_empty() {
                pieces.open.reserve(room(&sizes[index..]));
            }
            pieces.open.put_u8(0);
            pieces.open.put_u32(u32::try_from(size.message).unwrap_or(u32::MAX));
            message.write(&mut pieces);
        }
        pieces.close();
        pieces.whole
    }

    /// Where to write.
    pub(super) fn open(&mut self) -> &mut BytesMut {
        &mut self.open
    }

    /// Writes what others are sent as well, without a copy.
    pub(super) fn shared(&mut self, shared: &Bytes) {
        self.close();
        self.whole.push(shared.clone());
    }

    fn close(&mut self) {
        if !self.open.is_empty() {
            self.whole.push(std::mem::take(&mut self.open).freeze());
        }
    }
}

/// Bytes of a message.
#[derive(Debug, Clone, Copy)]
struct Size {
    message: usize,
    /// With the head, and without what is shared.
    own: usize,
    shares: bool,
}

impl Size {
    fn of(message: &impl Encode) -> Self {
        let (bytes, shared) = (message.bytes(), message.shared_bytes());
        Self { message: bytes, own: HEAD_BYTES + bytes - shared, shares: shared > 0 }
    }
}

/// Bytes of as many of the first of these messages as are written together.
fn room(sizes: &[Size]) -> usize {
    let mut room = 0;
    for size in sizes {
        if room > 0 && room + size.own > TOGETHER_BYTES {
            break;
        }
        room += size.own;
        if size.shares {
            break;
        }
    }
    room
}

/// What an agent is told: pieces, and at last how it ended.
#[derive(Debug)]
struct Outgoing {
    pieces: mpsc::Receiver<Result<Bytes, Status>>,
    ended: bool,
}

impl http_body::Body for Outgoing {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        poller: &mut Poller<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let status = match ready!(self.pieces.poll_recv(poller)) {
            Some(Ok(piece)) => return Poll::Ready(Some(Ok(Frame::data(piece)))),
            Some(Err(status)) => status,
            None => Status::new(Code::Ok, ""),
        };
        self.ended = true;
        let mut trailers = HeaderMap::new();
        if status.add_header(&mut trailers).is_err() {
            trailers.clear();
            // Words that no header can hold: the code goes without them.
            let _ = Status::new(status.code(), "").add_header(&mut trailers);
        }
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}

/// The answer to a call, of which the pieces are to come.
pub(super) fn answer(pieces: mpsc::Receiver<Result<Bytes, Status>>) -> Response<Body> {
    let mut response = Response::new(Body::new(Outgoing { pieces, ended: false }));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

#[cfg(test)]
mod tests {
    use bulkhead_wire::proto::Inventory;
    use bulkhead_wire::proto::agent_message::Body as Said;
    use futures::FutureExt;
    use http_body_util::{BodyExt, StreamBody};
    use proptest::prelude::*;

    use super::*;

    /// Of what never waits.
    fn at_once<T>(future: impl Future<Output = T>) -> T {
        future.now_or_never().unwrap()
    }

    fn said(generation: u64, bytes: usize) -> AgentMessage {
        let upserts = vec![Bytes::from(vec![b'x'; bytes])];
        let inventory = Inventory { generation, complete: false, upserts, removes: Vec::new() };
        AgentMessage { body: Some(Said::Inventory(inventory)) }
    }

    fn framed(message: &AgentMessage) -> Vec<u8> {
        let length = u32::try_from(message.encoded_len()).unwrap();
        [&[0], &length.to_be_bytes()[..], &message.encode_to_vec()].concat()
    }

    fn incoming(parts: Vec<Bytes>) -> Incoming {
        let frames = parts.into_iter().map(|part| Ok::<_, Infallible>(Frame::data(part)));
        Incoming::new(Request::new(Body::new(StreamBody::new(futures::stream::iter(frames)))))
    }

    fn heard(parts: Vec<Bytes>) -> (Vec<AgentMessage>, Option<Status>) {
        let mut incoming = incoming(parts);
        let mut messages = Vec::new();
        loop {
            match at_once(incoming.message()) {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => return (messages, None),
                Err(status) => {
                    assert!(at_once(incoming.next()).is_none(), "nothing comes after an error");
                    return (messages, Some(status));
                }
            }
        }
    }

    proptest! {
        /// However the network cuts it, the same comes out of it.
        #[test]
        fn messages_are_read_however_they_come(
            sizes in prop::collection::vec(0_usize..300, 0..8),
            cuts in prop::collection::vec(1_usize..400, 0..20),
            cut_short in any::<bool>(),
        ) {
            let messages: Vec<_> = (0..).zip(&sizes).map(|(number, bytes)| said(number, *bytes)).collect();
            let mut all: Vec<u8> = messages.iter().flat_map(framed).collect();
            let cut_short = cut_short && all.pop().is_some();
            let mut parts = Vec::new();
            let mut rest = Bytes::from(all);
            for cut in cuts {
                parts.push(rest.split_to(cut.min(rest.len())));
            }
            parts.push(rest);
            let (found, status) = heard(parts);
            let whole = messages.len() - usize::from(cut_short);
            prop_assert_eq!(&found[..], &messages[..whole]);
            prop_assert_eq!(status.map(|status| status.code()), cut_short.then_some(Code::Internal));
        }
    }

    #[test]
    fn a_message_that_comes_byte_by_byte_is_kept_once() {
        let message = said(1, 100_000);
        let all = Bytes::from([framed(&message), framed(&said(2, 3))].concat());
        let mut incoming = incoming(Vec::new());
        for byte in 0..all.len() {
            assert!(byte == 0 || incoming.waiting().len() == byte);
            incoming.add(all.slice(byte..=byte));
        }
        assert!(incoming.together.capacity() < 4 * all.len(), "{}", incoming.together.capacity());
        assert_eq!(incoming.first().unwrap(), Some(message));
        assert_eq!((incoming.first().unwrap(), incoming.first().unwrap()), (Some(said(2, 3)), None));
        assert_eq!(incoming.together.capacity(), 0, "nothing is kept");
    }

    #[test]
    fn what_is_no_message_ends_the_call_and_is_not_waited_for() {
        let code = |bytes: &[u8]| heard(vec![Bytes::copy_from_slice(bytes)]).1.unwrap().code();
        assert_eq!(code(&[1, 0, 0, 0, 0]), Code::Unimplemented);
        let too_long = u32::try_from(MESSAGE_BYTES_MAX + 1).unwrap().to_be_bytes();
        assert_eq!(code(&[&[0], &too_long[..]].concat()), Code::OutOfRange);
        assert_eq!(code(&[0, 0, 0, 0, 1, 0xff]), Code::Internal);
    }

    struct Text(Bytes, Option<Bytes>);

    impl Encode for Text {
        fn bytes(&self) -> usize {
            self.0.len() + self.1.as_ref().map_or(0, Bytes::len)
        }

        fn shared_bytes(&self) -> usize {
            self.1.as_ref().map_or(0, Bytes::len)
        }

        fn write(&self, pieces: &mut Pieces) {
            pieces.open().put_slice(&self.0);
            self.1.iter().for_each(|shared| pieces.shared(shared));
        }
    }

    #[test]
    fn messages_go_together_and_what_is_shared_is_not_copied() {
        let small = |byte: u8| Text(Bytes::from(vec![byte; 100]), None);
        let shared = Bytes::from(vec![b's'; 40_000]);
        let messages =
            [small(b'a'), small(b'b'), Text(Bytes::from_static(b"own"), Some(shared.clone())), small(b'c')];
        let pieces = Pieces::of(&messages);
        assert_eq!(pieces.iter().map(Bytes::len).collect::<Vec<_>>(), [2 * 105 + 8, 40_000, 105]);
        assert_eq!(pieces[1].as_ptr(), shared.as_ptr());
        let large = [(); 3].map(|()| Text(Bytes::from(vec![b'l'; TOGETHER_BYTES]), None));
        assert_eq!(Pieces::of(&large).len(), 3);
        assert!(Pieces::of::<Text>(&[]).is_empty());
    }

    #[test]
    fn an_answer_ends_with_its_status() {
        let (sender, pieces) = mpsc::channel(4);
        sender.try_send(Ok(Bytes::from_static(b"one"))).unwrap();
        sender.try_send(Err(Status::unavailable("the controller stops"))).unwrap();
        sender.try_send(Ok(Bytes::from_static(b"never"))).unwrap();
        let response = answer(pieces);
        assert_eq!(response.headers()[CONTENT_TYPE], "application/grpc");
        let collected = at_once(response.into_body().collect()).unwrap();
        let trailers = collected.trailers().unwrap().clone();
        assert_eq!(collected.to_bytes(), "one");
        assert_eq!(
            (&trailers["grpc-status"], &trailers["grpc-message"]),
            (&HeaderValue::from(14), &HeaderValue::from_static("the%20controller%20stops"))
        );
        let (sender, pieces) = mpsc::channel(1);
        drop(sender);
        let collected = at_once(answer(pieces).into_body().collect()).unwrap();
        assert_eq!(collected.trailers().unwrap()["grpc-status"], "0");
    }
}
