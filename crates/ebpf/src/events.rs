//! The ring buffer, and how kernel records become [`RawFlow`]s.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use bulkhead_model::flow::{ConnectionKey, Counters, DropReason, FlowEvent, RawFlow};
use bulkhead_model::host_policy::RuleId;
use bulkhead_model::ports::Protocol;
use bulkhead_model::verdict::{Direction, Verdict};

use crate::layout::{ConnKey, EVENT_REFUSE, Event, Refusal, attachment_of};

/// Events taken per call of [`Events::drain`] at most, so that it ends even under a flood.
const EVENTS_PER_DRAIN: usize = 65_536;

/// What was in the ring buffer.
#[derive(Debug, Default)]
struct Received {
    events: Vec<Event>,
    refusals: Vec<Refusal>,
}

/// The consumer's end of the ring buffer.
///
/// INVARIANT: `received` comes from a box; `ring` was made with it as its context and is freed before it.
#[derive(Debug)]
pub(crate) struct Events {
    ring: NonNull<libbpf_sys::ring_buffer>,
    received: NonNull<Received>,
    epoll: OwnedFd,
    _map: OwnedFd,
}

#[expect(unsafe_code, reason = "libbpf rings have no thread affinity")]
// SAFETY: both pointers are ours alone and are used through `&mut self` only.
unsafe impl Send for Events {}

impl Events {
    pub(crate) fn open(map: OwnedFd) -> io::Result<Self> {
        let received = NonNull::from(Box::leak(Box::<Received>::default()));
        #[expect(unsafe_code, reason = "libbpf call")]
        // SAFETY: the context is boxed, so its address stays valid until `Drop`, and the callback is
        // called only from `drain`.
        let ring = unsafe {
            libbpf_sys::ring_buffer__new(
                map.as_raw_fd(),
                Some(receive),
                received.as_ptr().cast(),
                std::ptr::null(),
            )
        };
        let Some(ring) = NonNull::new(ring) else {
            let error = io::Error::last_os_error();
            free_received(received);
            return Err(error);
        };
        #[expect(unsafe_code, reason = "libbpf call; borrows a descriptor to duplicate it")]
        // SAFETY: the ring is alive, and its descriptor with it.
        let epoll = unsafe { BorrowedFd::borrow_raw(libbpf_sys::ring_buffer__epoll_fd(ring.as_ptr())) };
        match epoll.try_clone_to_owned() {
            Ok(epoll) => Ok(Self { ring, received, epoll, _map: map }),
            Err(error) => {
                free(ring, received);
                Err(error)
            }
        }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Hands over what is there, without waiting.
    pub(crate) fn drain(
        &mut self,
        sink: &mut dyn FnMut(RawFlow),
        refuse: &mut dyn FnMut(&Refusal),
    ) -> io::Result<()> {
        #[expect(unsafe_code, reason = "libbpf call")]
        // SAFETY: the ring is alive; its callback writes to `received` while nobody else borrows it.
        let result = unsafe {
            libbpf_sys::ring_buffer__consume_n(self.ring.as_ptr(), EVENTS_PER_DRAIN as libbpf_sys::size_t)
        };
        #[expect(unsafe_code, reason = "takes what the callback left")]
        // SAFETY: from a box that lives as long as `self`; the ring is not consumed now.
        let received = std::mem::take(unsafe { self.received.as_mut() });
        // Somebody waits for these.
        received.refusals.iter().for_each(refuse);
        received.events.into_iter().filter_map(|event| event.flow()).for_each(sink);
        if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        free(self.ring, self.received);
    }
}

/// Frees a ring and then its context, neither of which is used again.
fn free(ring: NonNull<libbpf_sys::ring_buffer>, received: NonNull<Received>) {
    #[expect(unsafe_code, reason = "libbpf call")]
    // SAFETY: made by `Events::open` and given up by the caller.
    unsafe {
        libbpf_sys::ring_buffer__free(ring.as_ptr());
    }
    free_received(received);
}

fn free_received(received: NonNull<Received>) {
    #[expect(unsafe_code, reason = "takes back what was leaked")]
    // SAFETY: leaked from a box by `Events::open`, and no ring refers to it any more.
    drop(unsafe { Box::from_raw(received.as_ptr()) });
}

#[expect(unsafe_code, reason = "a C callback gets untyped pointers")]
unsafe extern "C" fn receive(context: *mut c_void, data: *mut c_void, size: libbpf_sys::size_t) -> c_int {
    // SAFETY: the context is the box given to `ring_buffer__new`; the data are `size` bytes, of which no more are read
    // than there are.
    unsafe {
        let received = &mut *context.cast::<Received>();
        if size as usize >= size_of::<Event>() {
            received.events.push(data.cast::<Event>().read_unaligned());
        } else if size as usize >= size_of::<Refusal>() {
            let refusal = data.cast::<Refusal>().read_unaligned();
            received.refusals.extend((refusal.kind == EVENT_REFUSE).then_some(refusal));
        }
    }
    0
}

pub(crate) fn verdict(number: u8) -> Verdict {
    if number == 1 { Verdict::Allow } else { Verdict::Deny }
}

pub(crate) fn direction(number: u8) -> Direction {
    if number == 0 { Direction::Ingress } else { Direction::Egress }
}

/// Counters as the model has them, from those of the side that began and the other's.
pub(crate) fn counters(packets: [u64; 2], bytes: [u64; 2]) -> Counters {
    Counters {
        packets_forward: packets[0],
        bytes_forward: bytes[0],
        packets_reverse: packets[1],
        bytes_reverse: bytes[1],
    }
}

impl ConnKey {
    pub(crate) fn connection(self) -> ConnectionKey {
        ConnectionKey {
            attachment: attachment_of(self.subject),
            protocol: Protocol(self.protocol),
            local: self.local.address(),
            local_port: self.local_port,
            peer: self.peer.address(),
            peer_port: self.peer_port,
        }
    }
}

impl Event {
    /// `None` for a kind that this version does not know.
    fn flow(self) -> Option<RawFlow> {
        let event = match self.kind {
            0 => FlowEvent::Open,
            2 => FlowEvent::Close,
            3 => FlowEvent::Change,
            4 => FlowEvent::Deny,
            _ => return None,
        };
        Some(RawFlow {
            event,
            key: self.key.connection(),
            peer: self.peer.address(),
            peer_port: self.peer_port,
            direction: direction(self.direction),
            verdict: verdict(self.verdict),
            rule: RuleId(self.rule),
            audit_verdict: verdict(self.audit),
            audit_rule: RuleId(self.audit_rule),
            reason: DropReason::from_number(self.reason)?,
            counters: counters(self.packets, self.bytes),
            opened_ns: self.opened_ns,
            last_ns: self.last_ns,
        })
    }
}
