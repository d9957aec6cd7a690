//! Netlink sockets: a transaction, a dump, a stream of notifications.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use crate::message::{self, Message, Request};

/// What the kernel may answer at once: one acknowledgement, or an error for each request of a batch.
const RECEIVE_BYTES: usize = 8 << 20;
/// Room for events until they are read.
const EVENT_BYTES: usize = 16 << 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_DUMP_INTR: u16 = 0x10;
/// A dump that was disturbed is begun again this often.
const DUMP_TRIES: usize = 8;

/// A request that the kernel refused: which of the batch (from 0), and why.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) index: usize,
    pub(crate) error: io::Error,
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self { index: usize::MAX, error }
    }
}

/// For requests and their answers.
pub(crate) struct Talker {
    socket: Socket,
    sequence: u32,
    send_bytes: usize,
}

impl std::fmt::Debug for Talker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Talker").field("fd", &self.socket.as_raw_fd()).finish_non_exhaustive()
    }
}

impl Talker {
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Only the header of what was refused comes back.
        socket.set_cap_ack(true)?;
        force_size(&socket, libc::SO_RCVBUFFORCE, RECEIVE_BYTES)?;
        Ok(Self { socket, sequence: 0, send_bytes: 0 })
    }

    /// Applies all of it or, if one request is refused, nothing.
    pub(crate) fn transact(&mut self, requests: &[Request]) -> Result<(), Refused> {
        if requests.is_empty() {
            return Ok(());
        }
        let bytes = message::batch(requests);
        // A batch is one datagram, and has to fit into the socket's buffer whole.
        if bytes.len() > self.send_bytes {
            force_size(&self.socket, libc::SO_SNDBUFFORCE, bytes.len() * 2)?;
            self.send_bytes = bytes.len();
        }
        self.socket.send(&bytes, 0)?;
        let last = u32::try_from(requests.len()).unwrap_or(u32::MAX);
        let mut refused = None;
        loop {
            let (answer, _) = self.socket.recv_from_full()?;
            for message in message::messages(&answer) {
                let Some(result) = result_of(&message) else { continue };
                if let Err(error) = result
                    && refused.is_none()
                {
                    let index = (message.sequence as usize).wrapping_sub(1);
                    refused = Some(Refused { index, error });
                }
                // Sequence 0 is the batch itself, which ends everything at once.
                if message.sequence == last || message.sequence == 0 {
                    self.drain()?;
                    return refused.map_or(Ok(()), Err);
                }
            }
        }
    }

    /// One question with one answer. `None` if there is no such thing.
    pub(crate) fn one<T>(
        &mut self,
        request: &Request,
        mut read: impl FnMut(&Message<'_>) -> Option<T>,
    ) -> io::Result<Option<T>> {
        let mut answer = None;
        let asked = self.ask(request, true, &mut |message| answer = read(message).or_else(|| answer.take()));
        match asked {
            Ok(()) => Ok(answer),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Everything of a kind. Empty if what it is in does not exist. `read` may see the same thing twice, after `begin`.
    pub(crate) fn dump<T>(
        &mut self,
        request: &Request,
        mut read: impl FnMut(&Message<'_>, &mut Vec<T>),
    ) -> io::Result<Vec<T>> {
        for _ in 0..DUMP_TRIES {
            let mut all = Vec::new();
            let mut disturbed = false;
            let asked = self.ask(request, false, &mut |message| {
                disturbed |= message.flags & NLM_F_DUMP_INTR != 0;
                read(message, &mut all);
            });
            match asked {
                Ok(()) if !disturbed => return Ok(all),
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Vec::new()),
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other("the tables changed under every attempt to read them"))
    }

    fn ask(
        &mut self,
        request: &Request,
        acknowledge: bool,
        read: &mut dyn FnMut(&Message<'_>),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        let mut bytes = Vec::new();
        request.encode(self.sequence, acknowledge, &mut bytes);
        self.socket.send(&bytes, 0)?;
        loop {
            let (answer, _) = self.socket.recv_from_full()?;
            for message in message::messages(&answer) {
                if message.sequence != self.sequence {
                    continue;
                }
                match result_of(&message) {
                    Some(result) => return result,
                    None => read(&message),
                }
            }
        }
    }

    /// What is left of a batch that failed.
    fn drain(&self) -> io::Result<()> {
        self.socket.set_non_blocking(true)?;
        while self.socket.recv_from_full().is_ok() {}
        self.socket.set_non_blocking(false)
    }
}

/// `Some` if the message ends an exchange.
fn result_of(message: &Message<'_>) -> Option<io::Result<()>> {
    match message.kind {
        NLMSG_ERROR | NLMSG_DONE => {
            let code = message.body.get(..4).and_then(|code| code.try_into().ok());
            let code = code.map_or(0, i32::from_ne_bytes);
            Some(if code < 0 { Err(io::Error::from_raw_os_error(-code)) } else { Ok(()) })
        }
        _ => None,
    }
}

/// For notifications of some groups.
pub(crate) struct Listener {
    socket: Socket,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").field("fd", &self.socket.as_raw_fd()).finish()
    }
}

impl Listener {
    pub(crate) fn open(groups: &[u32]) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        force_size(&socket, libc::SO_RCVBUFFORCE, EVENT_BYTES)?;
        socket.set_non_blocking(true)?;
        groups.iter().try_for_each(|group| socket.add_membership(*group))?;
        Ok(Self { socket })
    }

    pub(crate) fn join(&self, group: u32) -> io::Result<()> {
        self.socket.add_membership(group)
    }

    pub(crate) fn leave(&self, group: u32) -> io::Result<()> {
        self.socket.drop_membership(group)
    }

    /// A request on this socket. Only before anything is heard on it: what comes first is taken for the answer.
    pub(crate) fn ask(&self, request: &Request) -> io::Result<()> {
        let mut bytes = Vec::new();
        request.encode(1, true, &mut bytes);
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        // The kernel has answered before the call above returned.
        while let Some(answer) = self.next()? {
            if let Some(result) = message::messages(&answer).find_map(|message| result_of(&message)) {
                return result;
            }
        }
        Err(io::Error::other("the kernel did not answer"))
    }

    /// The next datagram; `None` if there is none. An overrun is an error of kind [`libc::ENOBUFS`].
    pub(crate) fn next(&self) -> io::Result<Option<Vec<u8>>> {
        match self.socket.recv_from_full() {
            Ok((bytes, _)) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Listener {
    #[expect(unsafe_code, reason = "the socket type offers its number only")]
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the socket keeps the descriptor open for as long as self is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }
}

fn force_size(socket: &Socket, option: libc::c_int, bytes: usize) -> io::Result<()> {
    let size = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX / 2);
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: the option is an int that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const size).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
