//! Tables for several endpoints, servers in namespaces, and calls between them.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_model::Prefix;
use bulkhead_model::flow::{FlowEvent, RawFlow};
use bulkhead_model::host_policy::{Attachment, ClassId, CompiledId, EndpointBinding, HostPolicy};
use bulkhead_model::verdict::Verdict::{Allow, Deny};

use crate::namespace::{Namespace, run};
use crate::policy::{DEFAULT_RULE, Rule, cell, compile};

/// Long enough for an answer on a busy machine; what is refused costs this time.
pub const PATIENCE: Duration = Duration::from_millis(400);

/// Rules that allow everything.
pub const EVERYTHING: &[Rule] = &[Rule("0.0.0.0/0", "any", Allow, 30), Rule("::/0", "any", Allow, 31)];
/// An endpoint under test: where, its address, its ingress and egress rules.
#[derive(Debug)]
pub struct End<'a>(pub Attachment, pub &'a [&'a str], pub &'a [Rule], pub &'a [Rule]);

/// Default deny everywhere; what no rule speaks of is decided by rule 99.
pub fn tables(ends: &[End<'_>]) -> HostPolicy {
    let rules = ends.iter().flat_map(|end| end.2.iter().chain(end.3));
    let mut prefixes: Vec<Prefix> = rules.map(|rule| rule.0.parse().unwrap()).collect();
    prefixes.sort_unstable();
    prefixes.dedup();
    let default = cell(Deny, DEFAULT_RULE, false);
    let mut policy = HostPolicy { revision: 1, ..HostPolicy::default() };
    policy.addresses = prefixes.iter().copied().zip((1..).map(ClassId)).collect();
    for (number, end) in (0..).zip(ends) {
        let [ingress, egress] = [CompiledId(2 * number + 1), CompiledId(2 * number + 2)];
        policy.policies.insert(ingress, compile(ingress, &prefixes, end.2, default));
        policy.policies.insert(egress, compile(egress, &prefixes, end.3, default));
        let addresses = end.1.iter().map(|address| address.parse().unwrap()).collect();
        let binding = EndpointBinding { attachment: end.0, addresses, ingress, egress };
        policy.endpoints.insert(Arc::from(number.to_string()), binding);
    }
    policy
}

/// Answers every datagram and connection on `port` with `name`, and who it believes to speak to.
pub fn serve(at: &Namespace, name: &'static str, port: u16) {
    at.exec(move || {
        for address in ["0.0.0.0", "::"] {
            let address: IpAddr = address.parse().unwrap();
            if address.is_ipv6() {
                std::fs::write("/proc/sys/net/ipv6/bindv6only", "1").unwrap();
            }
            let datagrams = UdpSocket::bind((address, port)).unwrap();
            std::thread::spawn(move || {
                let mut buffer = [0; 64];
                while let Ok((_, from)) = datagrams.recv_from(&mut buffer) {
                    let _ = datagrams.send_to(format!("{name} {}", from.ip()).as_bytes(), from);
                }
            });
            let listener = TcpListener::bind((address, port)).unwrap();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let Ok(mut stream) = stream else { return };
                    let from = stream.peer_addr().unwrap();
                    let _ = stream.write_all(format!("{name} {}", from.ip()).as_bytes());
                }
            });
        }
    });
}

pub fn udp(from: &Namespace, to: &str) -> Option<String> {
    let to: SocketAddr = to.parse().unwrap();
    from.exec(move || {
        let any: IpAddr = if to.is_ipv4() { "0.0.0.0" } else { "::" }.parse().unwrap();
        ask(&UdpSocket::bind((any, 0)).unwrap(), to)
    })
}

pub fn ask(socket: &UdpSocket, to: SocketAddr) -> Option<String> {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.send_to(b"?", to).unwrap();
    let mut buffer = [0; 64];
    let (len, from) = socket.recv_from(&mut buffer).ok()?;
    // Whoever answers, the caller must not see through the translation.
    assert_eq!(from, to);
    Some(String::from_utf8_lossy(&buffer[..len]).into_owned())
}

pub fn tcp(from: &Namespace, to: &str) -> Option<String> {
    let to: SocketAddr = to.parse().unwrap();
    from.exec(move || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    })
}

/// Both protocols, which must agree.
pub fn call(from: &Namespace, to: &str) -> Option<String> {
    let (datagram, stream) = (udp(from, to), tcp(from, to));
    assert_eq!(datagram, stream, "{to}");
    datagram
}

pub fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

/// Opened connections: endpoint, who it is with, as what the endpoint sees them, and the rule.
pub fn opened(events: &[RawFlow], at: Attachment) -> Vec<(String, String, u32)> {
    let of = |flow: &&RawFlow| flow.event == FlowEvent::Open && flow.key.attachment == at;
    let seen = |flow: &RawFlow| SocketAddr::new(flow.key.peer, flow.key.peer_port).to_string();
    let real = |flow: &RawFlow| SocketAddr::new(flow.peer, flow.peer_port).to_string();
    events.iter().filter(of).map(|flow| (real(flow), seen(flow), flow.rule.0)).collect()
}

/// Services that the host itself may call: 10.96.0.1:80 is 10.0.1.2:8080, 10.96.0.2:80 is 10.0.2.2:8080.
pub fn services_of_the_host() -> [Namespace; 2] {
    let backends = [Namespace::workload("eth0", 1), Namespace::workload("eth1", 2)];
    serve(&backends[0], "b", 8080);
    serve(&backends[1], "c", 8080);
    for (service, backend) in [("10.96.0.1", "10.0.1.2:8080"), ("10.96.0.2", "10.0.2.2:8080")] {
        for protocol in ["tcp", "udp"] {
            run(&format!(
                "iptables -t nat -A OUTPUT -d {service} -p {protocol} --dport 80 -j DNAT --to {backend}"
            ));
        }
    }
    run("iptables -t nat -A POSTROUTING -j MASQUERADE");
    // A route by which the service's address leaves at all.
    run("ip route add default via 10.0.1.2 dev eth0");
    backends
}
