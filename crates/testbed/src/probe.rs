//! Single attempts to reach something, many at once.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, ipproto, recv, send, socket_with,
    sockopt,
};

use crate::workload::Workload;

/// IPv4 or IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// What a probe speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// A connection to this port.
    Tcp(u16),
    /// A datagram to this port, answered.
    Udp(u16),
    /// An echo request.
    Icmp,
}

/// How a probe ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The other side answered.
    Reached,
    /// Nothing came back: what a dropped packet looks like.
    Silent,
    /// The other side refused: nothing listens there.
    Refused,
    /// The network said no, or the socket could not even send.
    Failed(Errno),
}

/// Whom to reach, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// The other side.
    pub address: IpAddr,
    /// What to speak.
    pub protocol: Protocol,
}

struct Attempt {
    socket: OwnedFd,
    protocol: Protocol,
    outcome: Option<Outcome>,
}

/// Outcomes by source and destination, in the order of the lists given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matrix {
    /// One row per source; `None` on the diagonal.
    pub rows: Vec<Vec<Option<Outcome>>>,
}

/// Tries everything at once from `from`; whoever has not answered after `wait` is [`Outcome::Silent`].
///
/// # Errors
/// If the namespace is gone or sockets cannot be opened.
pub fn probe(from: &Workload, probes: &[Probe], wait: Duration) -> Result<Vec<Outcome>> {
    from.netns.run(|| probe_here(probes, wait))
}

/// Every source to every destination but itself, all at once.
///
/// # Errors
/// If a namespace is gone or sockets cannot be opened.
pub fn matrix(
    sources: &[&Workload],
    destinations: &[&Workload],
    family: Family,
    protocol: impl Fn(&Workload) -> Protocol + Sync,
    wait: Duration,
) -> Result<Matrix> {
    let row = |source: &&Workload| -> Result<Vec<Option<Outcome>>> {
        let others = || destinations.iter().filter(|other| other.netns.name() != source.netns.name());
        let probes: Vec<_> = others()
            .map(|other| Probe { address: other.address(family), protocol: protocol(other) })
            .collect();
        let mut outcomes = probe(source, &probes, wait)?.into_iter();
        let row = destinations
            .iter()
            .map(|other| if other.netns.name() == source.netns.name() { None } else { outcomes.next() });
        Ok(row.collect())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = sources.iter().map(|source| scope.spawn(move || row(source))).collect();
        let rows = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a probing thread panicked"))));
        Ok(Matrix { rows: rows.collect::<Result<_>>()? })
    })
}

/// In the namespace of this thread.
pub(crate) fn probe_here(probes: &[Probe], wait: Duration) -> Result<Vec<Outcome>> {
    let mut attempts = Vec::with_capacity(probes.len());
    for probe in probes {
        attempts.push(begin(*probe)?);
    }
    let deadline = Instant::now() + wait;
    loop {
        let open: Vec<usize> =
            (0..attempts.len()).filter(|index| attempts[*index].outcome.is_none()).collect();
        let left = deadline.saturating_duration_since(Instant::now());
        if open.is_empty() || left.is_zero() {
            break;
        }
        let ready: Vec<bool> = {
            let mut waiting: Vec<PollFd<'_>> = open
                .iter()
                .map(|index| {
                    let attempt = &attempts[*index];
                    let flags = match attempt.protocol {
                        Protocol::Tcp(_) => PollFlags::OUT,
                        Protocol::Udp(_) | Protocol::Icmp => PollFlags::IN,
                    };
                    PollFd::new(&attempt.socket, flags)
                })
                .collect();
            poll(&mut waiting, Some(&timespec(left)))?;
            waiting.iter().map(|fd| !fd.revents().is_empty()).collect()
        };
        for (index, _) in open.into_iter().zip(ready).filter(|(_, ready)| *ready) {
            attempts[index].outcome = look(&attempts[index]);
        }
    }
    Ok(attempts.into_iter().map(|attempt| attempt.outcome.unwrap_or(Outcome::Silent)).collect())
}

pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

fn begin(probe: Probe) -> Result<Attempt> {
    let Probe { address, protocol } = probe;
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let (kind, ip, port) = match protocol {
        Protocol::Tcp(port) => (SocketType::STREAM, ipproto::TCP, port),
        Protocol::Udp(port) => (SocketType::DGRAM, ipproto::UDP, port),
        Protocol::Icmp if address.is_ipv4() => (SocketType::DGRAM, ipproto::ICMP, 0),
        Protocol::Icmp => (SocketType::DGRAM, ipproto::ICMPV6, 0),
    };
    let socket = socket_with(family, kind, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, Some(ip))?;
    let mut outcome = match connect(&socket, &SocketAddr::new(address, port)) {
        Ok(()) | Err(Errno::INPROGRESS) => None,
        Err(errno) => Some(failure(errno)),
    };
    if outcome.is_none() {
        let message: &[u8] = match protocol {
            Protocol::Tcp(_) => &[],
            Protocol::Udp(_) => b"probe",
            // Echo request; the kernel fills in checksum and identifier.
            Protocol::Icmp => &[if address.is_ipv4() { 8 } else { 128 }, 0, 0, 0, 0, 0, 0, 1, b'?'],
        };
        if !message.is_empty()
            && let Err(errno) = send(&socket, message, SendFlags::empty())
        {
            outcome = Some(failure(errno));
        }
    }
    Ok(Attempt { socket, protocol, outcome })
}

/// What a socket that is ready says; nothing if it was ready for no reason.
fn look(attempt: &Attempt) -> Option<Outcome> {
    match sockopt::socket_error(&attempt.socket) {
        Ok(Err(errno)) | Err(errno) => return Some(failure(errno)),
        Ok(Ok(())) => {}
    }
    if let Protocol::Tcp(_) = attempt.protocol {
        return Some(Outcome::Reached);
    }
    let mut buffer = [0u8; 64];
    match recv(&attempt.socket, &mut buffer, RecvFlags::empty()) {
        Ok(_) => Some(Outcome::Reached),
        Err(Errno::AGAIN) => None,
        Err(errno) => Some(failure(errno)),
    }
}

fn failure(errno: Errno) -> Outcome {
    match errno {
        Errno::CONNREFUSED => Outcome::Refused,
        Errno::TIMEDOUT => Outcome::Silent,
        other => Outcome::Failed(other),
    }
}
