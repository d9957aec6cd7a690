//! Traffic that goes on while something happens, allowed and forbidden, UDP and TCP, with every packet counted.

use std::net::SocketAddr;

use anyhow::ensure;
use bulkhead_testbed::{Knocks, PingPong, UdpStream, Workload, eventually};

/// Ports of the receiver, where nobody else may listen.
const ALLOWED_V4: u16 = 7001;
const ALLOWED_V6: u16 = 7002;
const FORBIDDEN_V4: u16 = 7003;
const FORBIDDEN_V6: u16 = 7004;
const KNOCKED: u16 = 7005;

/// Datagrams a second in each stream.
const RATE: u32 = 500;

/// From one that may do everything to one that may do nothing.
pub(crate) struct Traffic<'a> {
    to: &'a Workload,
    allowed: [UdpStream; 2],
    talk: PingPong,
    forbidden: [UdpStream; 2],
    knocks: Knocks,
}

impl<'a> Traffic<'a> {
    /// Datagrams over both families and a TCP connection to `served` from the one, datagrams and attempts to connect
    /// from the other. All flow when this answers.
    pub(crate) fn start(from: &Workload, stranger: &Workload, to: &'a Workload, served: u16) -> Self {
        let stream = |from, address, port| UdpStream::start(from, to, address, port, RATE, 8).unwrap();
        let (v4, v6) = (to.v4.into(), to.v6.into());
        let traffic = Self {
            to,
            allowed: [stream(from, v4, ALLOWED_V4), stream(from, v6, ALLOWED_V6)],
            talk: PingPong::start(from, SocketAddr::new(v4, served)).unwrap(),
            forbidden: [stream(stranger, v4, FORBIDDEN_V4), stream(stranger, v6, FORBIDDEN_V6)],
            knocks: Knocks::start(stranger, to, KNOCKED).unwrap(),
        };
        traffic.goes_on();
        traffic
    }

    /// Waits until much more of everything has been sent, and of what is allowed, received.
    pub(crate) fn goes_on(&self) {
        let allowed = self.allowed.each_ref().map(|stream| stream.so_far().received);
        let forbidden = self.forbidden.each_ref().map(|stream| stream.so_far().sent);
        let (talked, knocked) = (self.talk.round_trips(), self.knocks.tried());
        eventually("traffic goes on", || {
            for (stream, before) in self.allowed.iter().zip(allowed) {
                ensure!(stream.so_far().received > before + 150, "allowed: {:?}", stream.so_far());
            }
            for (stream, before) in self.forbidden.iter().zip(forbidden) {
                ensure!(stream.so_far().sent > before + 150, "forbidden: {:?}", stream.so_far());
            }
            ensure!(self.talk.round_trips() > talked + 30, "TCP: {} round trips", self.talk.round_trips());
            ensure!(self.knocks.tried() > knocked + 8, "attempts: {}", self.knocks.tried());
            Ok(())
        })
        .unwrap();
    }

    /// Nothing of what is forbidden has arrived, whatever became of the rest.
    pub(crate) fn assert_nothing_leaked(&self) {
        for stream in &self.forbidden {
            assert_eq!(stream.so_far().received, 0, "leaked: {:?}", stream.so_far());
        }
    }

    /// Ends it: not a packet is lost, none has leaked, and the TCP connection has carried every message both ways, in
    /// order.
    pub(crate) fn end(self, what: &str) {
        // Before anything of what is allowed may be reset.
        let knocks = self.knocks.finish(self.to).unwrap();
        let talk = self.talk.finish();
        let allowed = self.allowed.map(UdpStream::finish);
        let forbidden = self.forbidden.map(UdpStream::finish);
        let (sent, lost) = allowed.iter().fold((0, 0), |sum, it| (sum.0 + it.sent, sum.1 + it.lost()));
        let (tried, leaked) = forbidden.iter().fold((0, 0), |sum, it| (sum.0 + it.sent, sum.1 + it.received));
        println!(
            "{what}: allowed: {lost} of {sent} datagrams lost, {} TCP round trips; forbidden: {leaked} of {tried} \
             datagrams leaked, {} of {} TCP connections ({} answered)",
            talk.round_trips, knocks.arrived, knocks.tried, knocks.answered
        );
        assert_eq!((lost, leaked), (0, 0), "{what}: lost, leaked: {allowed:?} {forbidden:?}");
        assert_eq!(talk.broken, None, "{what}");
        assert_eq!((knocks.arrived, knocks.answered), (0, 0), "{what}: leaked {knocks:?}");
    }
}
