//! A continuous exchange of datagrams from changing ports, counted: what a change of tables loses or leaks shows.
//!
//! From 10.0.1.2 to 10.0.2.2: port 5001 is to be allowed, port 5002 not.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bulkhead_dataplane::Dataplane;
use bulkhead_model::host_policy::{ClassId, CompiledId, EndpointBinding, HostDelta, HostPolicy};
use bulkhead_model::verdict::Verdict::{self, Allow, Deny};

use crate::namespace::{Namespace, enlarge, ifindex, interface};
use crate::policy::{INGRESS, Rule, cell, compile, policy};

const SOCKETS: usize = 32;

/// Counts of a continuous exchange.
#[derive(Debug, Default)]
pub struct Traffic {
    pub stop: AtomicBool,
    pub stop_receiving: AtomicBool,
    pub sent: AtomicU64,
    pub denied_sent: AtomicU64,
    pub received: AtomicU64,
    pub leaked: AtomicU64,
}

/// Counts what comes to a socket.
pub fn receive(
    socket: UdpSocket,
    traffic: Arc<Traffic>,
    counter: fn(&Traffic) -> &AtomicU64,
) -> JoinHandle<()> {
    enlarge(&socket);
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while !traffic.stop_receiving.load(Relaxed) {
            if socket.recv(&mut buffer).is_ok() {
                counter(&traffic).fetch_add(1, Relaxed);
            }
        }
    })
}

/// Sends to both ports from changing source ports, so that old and new connections are on the way.
pub fn send(from: &Namespace, traffic: Arc<Traffic>) -> JoinHandle<()> {
    let open =
        || -> Vec<UdpSocket> { (0..SOCKETS).map(|_| UdpSocket::bind("10.0.1.2:0").unwrap()).collect() };
    let mut sockets = from.exec(open);
    let renew = {
        let (requests, inbox) = std::sync::mpsc::channel::<std::sync::mpsc::Sender<UdpSocket>>();
        let bind = move || {
            inbox.into_iter().for_each(|reply| reply.send(UdpSocket::bind("10.0.1.2:0").unwrap()).unwrap())
        };
        let tid = from.tid;
        std::thread::spawn(move || {
            let path = format!("/proc/self/task/{tid}/ns/net");
            let file = std::fs::File::open(path).unwrap();
            #[expect(unsafe_code, reason = "system call without a safe wrapper")]
            // SAFETY: affects this thread only.
            let result = unsafe { libc::setns(std::os::fd::AsRawFd::as_raw_fd(&file), libc::CLONE_NEWNET) };
            assert_eq!(result, 0);
            bind();
        });
        requests
    };
    std::thread::spawn(move || {
        let mut round = 0usize;
        while !traffic.stop.load(Relaxed) {
            let slot = round % SOCKETS;
            if round.is_multiple_of(7) {
                let (reply, answer) = std::sync::mpsc::channel();
                renew.send(reply).unwrap();
                sockets[slot] = answer.recv().unwrap();
            }
            sockets[slot].send_to(b"yes", "10.0.2.2:5001").unwrap();
            traffic.sent.fetch_add(1, Relaxed);
            sockets[slot].send_to(b"no", "10.0.2.2:5002").unwrap();
            traffic.denied_sent.fetch_add(1, Relaxed);
            round += 1;
            let behind = || traffic.sent.load(Relaxed).saturating_sub(traffic.received.load(Relaxed)) > 500;
            let started = Instant::now();
            while behind() && started.elapsed() < Duration::from_millis(100) {
                std::thread::yield_now();
            }
        }
    })
}

/// Waits for a condition; false at the deadline.
pub fn wait(condition: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if condition() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    false
}

/// Sockets of `to` on ports 5001 and 5002 of 10.0.2.2, once packets reach the first from 10.0.1.2 in `from`.
pub fn warm_up(from: &Namespace, to: &Namespace) -> (UdpSocket, UdpSocket) {
    let bind = |port: u16| to.exec(move || UdpSocket::bind(("10.0.2.2", port)).unwrap());
    let (allowed, denied) = (bind(5001), bind(5002));
    allowed.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let probe = from.exec(|| UdpSocket::bind("10.0.1.2:0").unwrap());
    let deadline = Instant::now() + Duration::from_secs(10);
    // Neighbours have to be resolved first.
    while Instant::now() < deadline {
        probe.send_to(b"hello", "10.0.2.2:5001").unwrap();
        if allowed.recv(&mut [0; 8]).is_ok() {
            while allowed.recv(&mut [0; 8]).is_ok() {}
            return (allowed, denied);
        }
    }
    panic!("no packet arrived");
}

/// Stops the sender, lets the last packets arrive, then stops the receivers.
pub fn finish(traffic: &Arc<Traffic>, sender: JoinHandle<()>, receivers: &mut Vec<JoinHandle<()>>) {
    traffic.stop.store(true, Relaxed);
    sender.join().unwrap();
    let _arrived = wait(|| traffic.received.load(Relaxed) >= traffic.sent.load(Relaxed));
    traffic.stop_receiving.store(true, Relaxed);
    for receiver in receivers.drain(..) {
        receiver.join().unwrap();
    }
}

/// `wb` may be called on port 5001 by 10.0.1.0/24, and not on 5002. The shift makes ids and classes differ
/// between two policies of the same meaning.
pub fn world_policy(tcp: Verdict, shift: u32) -> HostPolicy {
    let rules = [
        Rule("10.0.1.0/24", "udp/5001", Allow, 20 + shift),
        Rule("10.0.1.0/24", "tcp/5001", tcp, 21 + shift),
        Rule("10.0.1.0/24", "udp/5002", Deny, 22 + shift),
    ];
    let mut whole = policy(ifindex("wb"), &["10.0.2.2".parse().unwrap()], &rules, &[], Deny);
    if shift > 0 {
        // Another class for the same peers, and a longer prefix that says the same.
        let host = "10.0.1.2/32".parse().unwrap();
        whole.addresses.insert(host, ClassId(7));
        for compiled in whole.policies.values_mut() {
            let row = Arc::clone(&compiled.rows[&ClassId(1)]);
            compiled.rows.insert(ClassId(7), row);
        }
    }
    let free = compile(CompiledId(5), &[], &[], cell(Allow, 60, false));
    whole.policies.insert(CompiledId(5), free);
    let binding = EndpointBinding {
        attachment: interface("wa"),
        addresses: vec!["10.0.1.2".parse().unwrap()],
        ingress: CompiledId(5),
        egress: CompiledId(5),
    };
    whole.endpoints.insert("a".into(), binding);
    whole
}

/// Binds `wb` to a copy of its policy under another id, and removes the one before.
pub fn rebinding(round: u32) -> HostDelta {
    let whole = world_policy(Allow, 0);
    let old = if round == 0 { INGRESS } else { CompiledId(100 + round - 1) };
    let new = CompiledId(100 + round);
    let mut compiled = whole.policies[&INGRESS].clone();
    compiled.id = new;
    // The class of the peer changes with it: a new row first, then the address.
    let class = ClassId(1000 + round);
    let row = Arc::clone(&compiled.rows[&ClassId(1)]);
    compiled.rows.insert(class, row);
    let mut binding = whole.endpoints["w"].clone();
    binding.ingress = new;
    HostDelta {
        rows: vec![(old, class, Arc::clone(&compiled.rows[&class]))],
        policies: vec![compiled],
        addresses: [("10.0.1.2/32".parse().unwrap(), Some(class))].into(),
        endpoints: [("w".into(), Some(binding))].into(),
        removed_policies: vec![old],
        ..HostDelta::default()
    }
}

/// A continuous exchange.
#[derive(Debug)]
pub struct Running {
    traffic: Arc<Traffic>,
    sender: JoinHandle<()>,
    receivers: Vec<JoinHandle<()>>,
}

impl Running {
    /// Begins between two workloads, as [`world_policy`] has them.
    pub fn start(a: &Namespace, b: &Namespace) -> Self {
        let (allowed, denied) = warm_up(a, b);
        let traffic = Arc::new(Traffic::default());
        let receivers = vec![
            receive(allowed, Arc::clone(&traffic), |traffic| &traffic.received),
            receive(denied, Arc::clone(&traffic), |traffic| &traffic.leaked),
        ];
        let sender = send(a, Arc::clone(&traffic));
        Self { traffic, sender, receivers }
    }

    /// Waits for a hundred more datagrams.
    ///
    /// # Panics
    /// If they do not arrive.
    pub fn goes_on(&self) {
        let before = self.traffic.received.load(Relaxed);
        assert!(wait(|| self.traffic.received.load(Relaxed) > before + 100), "nothing arrives any more");
    }

    /// Sent, received; sent in vain, leaked.
    pub fn end(mut self) -> [u64; 4] {
        finish(&self.traffic, self.sender, &mut self.receivers);
        let Traffic { sent, received, denied_sent, leaked, .. } = &*self.traffic;
        [sent, received, denied_sent, leaked].map(|counter| counter.load(Relaxed))
    }
}

/// Two hundred replacements of the policy by one of the same meaning, and as many differences.
///
/// # Panics
/// If the dataplane refuses one.
pub fn change_often(dataplane: &mut dyn Dataplane) {
    let mut longest = Duration::ZERO;
    for round in 0..200 {
        let applied = dataplane.replace(&world_policy(Allow, (round + 1) % 2)).unwrap();
        longest = longest.max(applied.duration);
    }
    println!("replace: longest {longest:?}");
    for round in 0..200 {
        dataplane.apply(&rebinding(round)).unwrap();
        dataplane.poll(&mut |_flow| ()).unwrap();
    }
}
