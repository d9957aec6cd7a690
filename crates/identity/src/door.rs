//! How many may stand at a listener's door: bounds on connections in total, from one address and of one holder, before and after
//! it is known who they are.
//!
//! Whoever has shown no certificate is told apart by address only (IPv6: by network of 64 bits, which is what one subscriber has).
//! Many agents behind one address are no attack, so their handshakes wait for each other instead of being refused, and what
//! waits is a socket and little more. Once the handshake is done, those with a certificate count by its holder, and those without
//! one, strangers, by their address again.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Handshakes at once, of all and of one address; others wait for [`crate::tls::HANDSHAKE_TIME_MAX`].
const HANDSHAKES_MAX: usize = 1024;
const HANDSHAKES_PER_ADDRESS: usize = 128;
/// Connections before or in their handshake, of all and of one address; others are closed.
const PENDING_MAX: usize = 16_384;
const PENDING_PER_ADDRESS: usize = 8_192;

/// Bounds on connections that are through their handshake. What is beyond them is closed.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// With a certificate.
    pub known: usize,
    /// Of one holder of certificates.
    pub per_holder: usize,
    /// Without a certificate.
    pub strangers: usize,
    /// Of those from one address.
    pub strangers_per_address: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { known: 65_536, per_holder: 64, strangers: 1024, strangers_per_address: 64 }
    }
}

/// Who a connection counts for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Who {
    Pending(IpAddr),
    Stranger(IpAddr),
    Holder(String),
}

#[derive(Debug, Default)]
struct Counts {
    pending: usize,
    strangers: usize,
    known: usize,
    by: HashMap<Who, usize>,
    /// Handshakes of each address that has any.
    handshakes: HashMap<IpAddr, Arc<Semaphore>>,
}

impl Counts {
    fn total(&mut self, who: &Who) -> &mut usize {
        match who {
            Who::Pending(_) => &mut self.pending,
            Who::Stranger(_) => &mut self.strangers,
            Who::Holder(_) => &mut self.known,
        }
    }
}

/// A listener's door, with who is there.
#[derive(Debug)]
pub struct Door {
    name: &'static str,
    limits: Limits,
    counts: Mutex<Counts>,
    handshakes: Arc<Semaphore>,
    refused: AtomicU64,
    failed: AtomicU64,
    log: Seldom,
}

/// A connection's place, given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    door: Arc<Door>,
    who: Who,
}

/// Addresses that are taken for one.
pub fn network_of(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(six) => match six.to_ipv4_mapped() {
            Some(four) => four.into(),
            None => {
                let [a, b, c, d, ..] = six.segments();
                Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
            }
        },
    }
}

impl Door {
    /// `name` is for the log.
    pub(crate) fn new(name: &'static str, limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            name,
            limits,
            counts: Mutex::default(),
            handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
            refused: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            log: Seldom::default(),
        })
    }

    /// Connections that are there: before or in their handshake, without a certificate, with one.
    pub fn connections(&self) -> [usize; 3] {
        let counts = self.counts();
        [counts.pending, counts.strangers, counts.known]
    }

    /// Connections closed since a bound was reached, up to now.
    pub fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    /// Handshakes that failed or took too long, up to now.
    pub fn failed(&self) -> u64 {
        self.failed.load(Relaxed)
    }

    pub(crate) fn note_failed(&self) {
        self.failed.fetch_add(1, Relaxed);
    }

    fn counts(&self) -> std::sync::MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(self: &Arc<Self>, who: Who, (all, each): (usize, usize)) -> Option<Place> {
        let mut counts = self.counts();
        let of_who = counts.by.get(&who).copied().unwrap_or(0);
        let total = *counts.total(&who);
        if total >= all || of_who >= each {
            drop(counts);
            self.refused.fetch_add(1, Relaxed);
            if let Some(more) = self.log.now() {
                tracing::warn!(
                    port = self.name,
                    ?who,
                    total,
                    of_who,
                    more,
                    "too many connections: one was closed"
                );
            }
            return None;
        }
        *counts.total(&who) += 1;
        counts.by.insert(who.clone(), of_who + 1);
        Some(Place { door: Arc::clone(self), who })
    }

    /// For a connection that has just come in.
    pub(crate) fn pending(self: &Arc<Self>, from: IpAddr) -> Option<Place> {
        self.take(Who::Pending(network_of(from)), (PENDING_MAX, PENDING_PER_ADDRESS))
    }

    /// Waits until a handshake may be made. Of one address first, so that none takes the places of all.
    pub(crate) async fn handshake(&self, from: IpAddr) -> Option<[OwnedSemaphorePermit; 2]> {
        let of_address = {
            let mut counts = self.counts();
            let new = || Arc::new(Semaphore::new(HANDSHAKES_PER_ADDRESS));
            Arc::clone(counts.handshakes.entry(network_of(from)).or_insert_with(new))
        };
        let own = of_address.acquire_owned().await.ok()?;
        let one = Arc::clone(&self.handshakes).acquire_owned().await.ok()?;
        Some([own, one])
    }

    /// For a connection that is through its handshake, by the name of its holder if it has one.
    pub(crate) fn through(self: &Arc<Self>, from: IpAddr, holder: Option<String>) -> Option<Place> {
        let Limits { known, per_holder, strangers, strangers_per_address } = self.limits;
        match holder {
            Some(holder) => self.take(Who::Holder(holder), (known, per_holder)),
            None => self.take(Who::Stranger(network_of(from)), (strangers, strangers_per_address)),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.door.counts();
        *counts.total(&self.who) -= 1;
        if let Some(of_who) = counts.by.get_mut(&self.who) {
            *of_who -= 1;
            if *of_who == 0 {
                counts.by.remove(&self.who);
                if let Who::Pending(address) = &self.who {
                    counts.handshakes.remove(address);
                }
            }
        }
    }
}

/// Says a thing once a second at most, however often it happens.
#[derive(Debug, Default)]
pub struct Seldom {
    /// When it was said, and how often it happened since.
    said: Mutex<(Option<Instant>, u64)>,
}

impl Seldom {
    /// It happened. If it is to be said now: how often it has happened since it was said, besides.
    pub fn now(&self) -> Option<u64> {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.0.is_some_and(|before| before.elapsed().as_secs() == 0) {
            said.1 += 1;
            return None;
        }
        said.0 = Some(Instant::now());
        Some(std::mem::take(&mut said.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn door(strangers: usize, strangers_per_address: usize, per_holder: usize) -> Arc<Door> {
        Door::new("test", Limits { strangers, strangers_per_address, per_holder, ..Limits::default() })
    }

    #[test]
    fn each_address_and_each_holder_has_its_share() {
        let door = door(4, 2, 1);
        let [one, other]: [IpAddr; 2] = ["10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap()];
        let first = door.through(one, None).unwrap();
        let _second = door.through(one, None).unwrap();
        assert!(door.through(one, None).is_none(), "two of one address");
        let _others = [door.through(other, None).unwrap(), door.through(other, None).unwrap()];
        assert!(door.through("10.0.0.3".parse().unwrap(), None).is_none(), "four of all");
        // Whoever is known is another matter.
        let known = door.through(one, Some("agent/h1".into())).unwrap();
        assert!(door.through(one, Some("agent/h1".into())).is_none());
        assert!(door.through(one, Some("agent/h2".into())).is_some());
        assert_eq!((door.connections(), door.refused()), ([0, 4, 1], 3));
        drop((first, known));
        assert!(door.through(one, None).is_some() && door.through(one, Some("agent/h1".into())).is_some());
    }

    #[test]
    fn an_address_that_says_nothing_leaves_room_for_others() {
        let door = door(1, 1, 1);
        let network = |host: u16| -> IpAddr { format!("2001:db8::{host:x}").parse().unwrap() };
        let mut places = Vec::new();
        while let Some(place) = door.pending(network(u16::try_from(places.len()).unwrap())) {
            places.push(place);
        }
        assert_eq!(places.len(), PENDING_PER_ADDRESS, "a network of 64 bits is one");
        assert!(door.pending("2001:db8:0:1::1".parse().unwrap()).is_some());
        places.clear();
        assert_eq!(door.connections(), [0; 3]);
        assert!(door.counts().by.is_empty() && door.counts().handshakes.is_empty());
    }

    #[test]
    fn a_thing_is_said_once_a_second() {
        let seldom = Seldom::default();
        assert_eq!(seldom.now(), Some(0));
        seldom.said.lock().unwrap().0 = Some(Instant::now() + std::time::Duration::from_secs(60));
        assert_eq!([seldom.now(), seldom.now()], [None, None]);
        seldom.said.lock().unwrap().0 = None;
        assert_eq!(seldom.now(), Some(2));
    }
}
