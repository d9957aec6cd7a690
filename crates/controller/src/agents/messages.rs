//! Messages to agents, cut to a size that every agent accepts.

use std::sync::Arc;

use bulkhead_model::ObjectKey;
use bulkhead_wire::proto::controller_message::Body;
use bulkhead_wire::{pack, proto};
use bytes::{BufMut, Bytes, BytesMut};
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};

use super::stream::{Encode, Pieces};
use crate::members::Member;

/// Objects in a message are cut off at this size; far below [`bulkhead_wire::MESSAGE_BYTES_MAX`], so that
/// one message never holds up the stream for long.
const CHUNK_BYTES: usize = 1 << 20;
/// Objects that are packed together are cut off at this size before they are: a tenth of it and less afterwards.
const PACKED_TOGETHER_BYTES: usize = 1 << 18;
/// Members in one message.
const CHUNK_MEMBERS: usize = 4096;

/// Tiers and policies. A snapshot is the first message with the rest as changes to it.
pub(super) fn resources(
    snapshot: bool,
    revision: u64,
    upserts: Vec<Bytes>,
    removes: Vec<ObjectKey>,
) -> Vec<Message> {
    let removes = removes.into_iter().map(object_key).collect();
    let first = proto::Resources { snapshot, revision, removes, ..Default::default() };
    let mut messages = vec![first];
    let mut bytes = 0;
    for upsert in upserts {
        bytes += upsert.len();
        if bytes > CHUNK_BYTES {
            bytes = upsert.len();
            messages.push(proto::Resources { revision, ..Default::default() });
        }
        if let Some(last) = messages.last_mut() {
            last.upserts.push(upsert);
        }
    }
    messages.into_iter().map(|message| Body::Resources(message).into()).collect()
}

/// Objects that all agents are told alike, packed once for all of them.
pub(crate) fn packed(objects: impl IntoIterator<Item = Bytes>) -> Vec<Bytes> {
    let (mut parts, mut together, mut bytes) = (Vec::new(), Vec::new(), 0);
    for object in objects {
        bytes += object.len();
        together.push(object);
        if bytes >= PACKED_TOGETHER_BYTES {
            parts.push(pack(std::mem::take(&mut together)));
            bytes = 0;
        }
    }
    if !together.is_empty() {
        parts.push(pack(together));
    }
    parts
}

/// A snapshot of packed objects and such that this agent alone is told.
pub(super) fn packed_resources(revision: u64, parts: &[Bytes], own: Vec<Bytes>) -> Vec<Message> {
    let mut messages = resources(true, revision, own, Vec::new());
    let own = proto::Resources { revision, ..Default::default() };
    messages.extend(parts.iter().map(|part| Message::Packed { own: own.clone(), part: part.clone() }));
    messages
}

fn object_key(key: ObjectKey) -> proto::ObjectKey {
    proto::ObjectKey {
        kind: key.kind.as_str().into(),
        namespace: key.namespace.unwrap_or_default(),
        name: key.name,
    }
}

/// Members of a selector, cut likewise.
pub(super) fn members<'a>(
    handle: u32,
    snapshot: bool,
    revision: u64,
    joins: impl IntoIterator<Item = &'a Member>,
    leaves: Vec<Arc<str>>,
) -> Vec<Message> {
    let mut joins: Vec<_> = joins.into_iter().map(|member| member.join.clone()).collect();
    let rest = joins.split_off(joins.len().min(CHUNK_MEMBERS));
    let first = proto::Members { handle, snapshot, revision, ..Default::default() };
    let further = proto::Members { handle, revision, ..Default::default() };
    let mut messages = vec![Message::Members { own: first, joins, leaves }];
    messages.extend(rest.chunks(CHUNK_MEMBERS).map(|joins| Message::Members {
        own: further.clone(),
        joins: joins.to_vec(),
        leaves: Vec::new(),
    }));
    messages
}

/// How a member stands among the `joins` of a message.
pub(crate) fn joining(member: &proto::Member) -> Bytes {
    let bytes = member.encoded_len();
    let mut join = BytesMut::with_capacity(field_bytes(JOINS, bytes));
    begin_field(JOINS, bytes, &mut join);
    member.encode_raw(&mut join);
    join.freeze()
}

/// The barrier.
pub(super) fn synced(revision: u64) -> Message {
    Message::from(Body::Synced(proto::Synced { revision }))
}

// Numbers of fields in `proto/distribution.proto`.
const RESOURCES: u32 = 2;
const MEMBERS: u32 = 3;
const PACKED: u32 = 5;
const JOINS: u32 = 4;
const LEAVES: u32 = 5;

/// A field of so many bytes, with what stands before it.
fn field_bytes(number: u32, bytes: usize) -> usize {
    key_len(number) + encoded_len_varint(bytes as u64) + bytes
}

fn begin_field(number: u32, bytes: usize, buffer: &mut impl BufMut) {
    encode_key(number, WireType::LengthDelimited, buffer);
    encode_varint(bytes as u64, buffer);
}

/// A message to an agent: of what others hear as well, what all do stands in it ready to be written.
#[derive(Debug)]
pub(crate) enum Message {
    Own(proto::ControllerMessage),
    /// Objects that all agents are told alike.
    Packed {
        own: proto::Resources,
        part: Bytes,
    },
    /// Members as [`joining`] has them, and names of such as have left.
    Members {
        own: proto::Members,
        joins: Vec<Bytes>,
        leaves: Vec<Arc<str>>,
    },
}

impl From<Body> for Message {
    fn from(body: Body) -> Self {
        Self::Own(proto::ControllerMessage { body: Some(body) })
    }
}

impl Message {
    /// Bytes inside the outermost field.
    fn inside(&self) -> usize {
        match self {
            Self::Own(message) => message.encoded_len(),
            Self::Packed { own, part } => own.encoded_len() + field_bytes(PACKED, part.len()),
            Self::Members { own, joins, leaves } => {
                let leaves = leaves.iter().map(|name| field_bytes(LEAVES, name.len()));
                own.encoded_len() + joins.iter().map(Bytes::len).sum::<usize>() + leaves.sum::<usize>()
            }
        }
    }
}

impl Encode for Message {
    fn bytes(&self) -> usize {
        match self {
            Self::Own(_) => self.inside(),
            Self::Packed { .. } => field_bytes(RESOURCES, self.inside()),
            Self::Members { .. } => field_bytes(MEMBERS, self.inside()),
        }
    }

    fn shared_bytes(&self) -> usize {
        if let Self::Packed { part, .. } = self { part.len() } else { 0 }
    }

    fn write(&self, pieces: &mut Pieces) {
        match self {
            Self::Own(message) => message.encode_raw(pieces.open()),
            Self::Packed { own, part } => {
                begin_field(RESOURCES, self.inside(), pieces.open());
                own.encode_raw(pieces.open());
                begin_field(PACKED, part.len(), pieces.open());
                pieces.shared(part);
            }
            Self::Members { own, joins, leaves } => {
                begin_field(MEMBERS, self.inside(), pieces.open());
                own.encode_raw(pieces.open());
                joins.iter().for_each(|join| pieces.open().put_slice(join));
                for leave in leaves {
                    begin_field(LEAVES, leave.len(), pieces.open());
                    pieces.open().put_slice(leave.as_bytes());
                }
            }
        }
    }
}

#[cfg(test)]
impl Message {
    /// As whoever it is sent to reads it.
    pub(crate) fn body(&self) -> Body {
        let bytes: Vec<u8> = Pieces::of(std::slice::from_ref(self)).concat();
        let (head, message) = bytes.split_at(5);
        assert_eq!(
            (head[0], head[1..].iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte))),
            (0, self.bytes())
        );
        proto::ControllerMessage::decode(message).unwrap().body.unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_snapshot_is_cut_and_only_its_first_part_says_so() {
        let upserts = vec![Bytes::from(vec![b' '; CHUNK_BYTES / 2]); 5];
        let messages = resources(true, 7, upserts, Vec::new());
        let parts: Vec<_> = messages
            .iter()
            .map(|message| match message.body() {
                Body::Resources(resources) => (resources.snapshot, resources.upserts.len()),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(parts, [(true, 2), (false, 2), (false, 1)]);
    }
}
