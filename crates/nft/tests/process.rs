//! Processes of one host, and so of one address, with policies of their own.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use bulkhead_dataplane::{Dataplane, DataplaneError};
use bulkhead_dataplane_testing::namespace::Namespace;
use bulkhead_dataplane_testing::policy::Rule;
use bulkhead_dataplane_testing::processes::{CLIENT, Group, answered, python};
use bulkhead_dataplane_testing::world::{
    EVERYTHING, End, opened, serve, services_of_the_host, some, tcp, udp,
};
use bulkhead_model::flow::{DropReason, FlowEvent};
use bulkhead_model::host_policy::Attachment;
use bulkhead_model::verdict::Verdict::{Allow, Deny};
use common::Host;

#[test]
fn two_services_of_one_address_have_policies_of_their_own() {
    let mut world = Host::new();
    let outside = Namespace::workload("eth0", 1);
    serve(&outside, "o", 8080);
    let (mut p, mut q) = (Group::new("p"), Group::new("q"));
    p.serve(9000);
    q.serve(9001);
    let host = "10.0.1.1";
    let attached = [p.attachment(), q.attachment()];
    // Before anything is known of them they are closed.
    for one in attached {
        world.dataplane.attach(one).unwrap();
    }
    assert_eq!((tcp(&outside, "10.0.1.1:9000"), tcp(&outside, "10.0.1.1:9001")), (None, None));
    let from_outside = [Rule("10.0.1.2/32", "any", Allow, 20)];
    let own = |one: Attachment| one.own_address().unwrap().to_string();
    let (own_p, own_q) = (own(attached[0]), own(attached[1]));
    world.put(&[
        End(attached[0], &[&own_p], &from_outside, &from_outside),
        End(attached[1], &[&own_q], &[], &[]),
    ]);
    assert_eq!(world.dataplane.attached().unwrap(), attached.into());
    let check = || {
        assert_eq!(
            (tcp(&outside, "10.0.1.1:9000"), udp(&outside, "10.0.1.1:9000")),
            (some("here"), some("here"))
        );
        assert_eq!((tcp(&outside, "10.0.1.1:9001"), udp(&outside, "10.0.1.1:9001")), (None, None));
        assert_eq!((p.calls("10.0.1.2", 8080), q.calls("10.0.1.2", 8080)), (true, false));
        assert!(answered(python(None, CLIENT, &["10.0.1.2", "8080"])), "who is no workload is not judged");
    };
    check();
    let events = world.events();
    let calls = opened(&events, attached[0]);
    assert_eq!(calls.len(), 4, "{events:?}");
    assert!(calls.iter().all(|call| call.2 == 20));
    assert!(events.iter().any(|flow| flow.event == FlowEvent::Deny && flow.key.attachment == attached[1]));
    assert!(
        events
            .iter()
            .filter(|flow| flow.event == FlowEvent::Open)
            .all(|flow| flow.key.local.to_string() == host)
    );
    world.reopen();
    check();
    let stats = world.dataplane.stats().unwrap();
    assert!(stats.drops[&DropReason::Policy] > 0);
    world.dataplane.detach(attached[1]).unwrap();
    assert!(q.calls("10.0.1.2", 8080));
    drop(p);
    assert!(matches!(world.dataplane.attach(attached[0]), Err(DataplaneError::Gone { .. })));
    world.dataplane.cleanup().unwrap();
    assert!(!common::listing().contains("bulkhead"));
}

#[test]
fn processes_of_one_host_know_each_other() {
    let mut world = Host::new();
    let _outside = Namespace::workload("eth0", 1);
    let (p, mut q, r) = (Group::new("p"), Group::new("q"), Group::new("r"));
    q.serve(9001);
    let own = |group: &Group| group.attachment().own_address().unwrap().to_string();
    let (own_p, own_q, own_r) = (own(&p), own(&q), own(&r));
    let name_p: &'static str = Box::leak(format!("{own_p}/128").into_boxed_str());
    let from_p = [Rule(name_p, "any", Allow, 20)];
    let nobody_else =
        [Rule(name_p, "any", Allow, 20), Rule("::/0", "any", Deny, 21), Rule("0.0.0.0/0", "any", Deny, 21)];
    for (ingress, others) in [(&from_p[..], true), (&nobody_else[..], false)] {
        world.put(&[
            End(p.attachment(), &[&own_p], &[], EVERYTHING),
            End(q.attachment(), &[&own_q], ingress, &[]),
            End(r.attachment(), &[&own_r], &[], EVERYTHING),
        ]);
        for address in ["127.0.0.1", "10.0.1.1"] {
            assert!(p.calls(address, 9001), "{address}");
            assert!(!r.calls(address, 9001), "{address}");
            // The host reaches what runs on it unless a written rule forbids that (DESIGN 4.10).
            assert_eq!(answered(python(None, CLIENT, &[address, "9001"])), others, "{address}");
        }
    }
    let events = world.events();
    let at_q = opened(&events, q.attachment());
    assert!(at_q.iter().any(|(real, seen, _)| real.starts_with(&format!("[{own_p}]:")) && seen.starts_with("127.0.0.1:")));
}

#[test]
fn a_process_that_calls_a_service_is_judged_by_the_backend() {
    let mut world = Host::new();
    let _backends = services_of_the_host();
    let p = Group::new("p");
    let egress = [Rule("10.0.1.2/32", "any", Allow, 20)];
    let own = p.attachment().own_address().unwrap().to_string();
    world.put(&[End(p.attachment(), &[&own], &[], &egress)]);
    assert!(p.calls("10.96.0.1", 80));
    assert!(!p.calls("10.96.0.2", 80));
    let calls = opened(&world.events(), p.attachment());
    assert!(
        calls.iter().all(|(real, seen, _)| real == "10.0.1.2:8080" && seen == "10.96.0.1:80"),
        "{calls:?}"
    );
    assert_eq!(calls.len(), 2);
}

#[test]
fn a_group_within_a_group_is_bound_by_both() {
    let mut world = Host::new();
    let outside = Namespace::workload("eth0", 1);
    for port in [8080, 8081, 8082] {
        serve(&outside, "o", port);
    }
    let outer = Group::new("outer");
    let mut inner = outer.inner("inner");
    for port in [9000, 9001, 9002] {
        inner.serve(port);
    }
    let rules = |ports: [&'static str; 4]| ports.map(|ports| Rule("10.0.1.2/32", ports, Allow, 20));
    let outer_rules = rules(["tcp/8080-8081", "udp/8080-8081", "tcp/9000-9001", "udp/9000-9001"]);
    let inner_rules = rules(["tcp/8081-8082", "udp/8081-8082", "tcp/9001-9002", "udp/9001-9002"]);
    let own = |group: &Group| group.attachment().own_address().unwrap().to_string();
    let (own_outer, own_inner) = (own(&outer), own(&inner));
    world.put(&[
        End(outer.attachment(), &[&own_outer], &outer_rules, &outer_rules),
        End(inner.attachment(), &[&own_inner], &inner_rules, &inner_rules),
    ]);
    assert!(common::listing().contains("chain process_output"), "nft can print it");
    for again in [false, true] {
        for (number, both) in [(0, false), (1, true), (2, false)] {
            assert_eq!(inner.calls("10.0.1.2", 8080 + number), both, "{number} {again}");
            let to = format!("10.0.1.1:{}", 9000 + number);
            assert_eq!((tcp(&outside, &to).is_some(), udp(&outside, &to).is_some()), (both, both), "{to}");
        }
        assert!(outer.calls("10.0.1.2", 8080) && !outer.calls("10.0.1.2", 8082));
        let events = world.events();
        if !again {
            for group in [&outer, &inner] {
                assert!(opened(&events, group.attachment()).len() >= 4, "{events:?}");
                let refused = |flow: &&bulkhead_model::flow::RawFlow| {
                    flow.event == FlowEvent::Deny && flow.key.attachment == group.attachment()
                };
                assert!(events.iter().any(|flow| refused(&flow)), "{events:?}");
            }
        }
        world.reopen();
    }
}

/// The packets of an established connection in either direction, over the network and between two processes.
#[test]
fn a_live_connection_of_a_process_is_cut_both_ways_and_goes_on_when_allowed_again() {
    let mut world = Host::new();
    let outside = Namespace::workload("eth0", 1);
    let (p, mut q) = (Group::new("p"), Group::new("q"));
    // Says back what it is told, and something by itself every 50 ms.
    let talker = "
import socket, sys, threading, time
t = socket.socket(); t.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
t.bind(('0.0.0.0', 9000)); t.listen()
print('ready', flush=True)
def talk(c):
    while True:
        c.sendall(b'.'); time.sleep(0.05)
while True:
    threading.Thread(target=talk, args=t.accept()[:1], daemon=True).start()
";
    q.run(talker, &[]);
    // Counts what it hears in 300 ms when asked.
    let counter = "
import socket, sys, time
c = socket.create_connection((sys.argv[1], 9000)); c.settimeout(0.02)
print('ready', flush=True)
for line in sys.stdin:
    end = time.time() + 0.5; n = 0
    while time.time() < end:
        try: n += len(c.recv(64))
        except TimeoutError: pass
    print(n, flush=True)
";
    let own = |group: &Group| group.attachment().own_address().unwrap().to_string();
    let (own_p, own_q) = (own(&p), own(&q));
    let name_p: &'static str = Box::leak(format!("{own_p}/128").into_boxed_str());
    let open = [Rule(name_p, "any", Allow, 20), Rule("10.0.1.2/32", "any", Allow, 20)];
    let shut = [Rule(name_p, "any", Deny, 21), Rule("10.0.1.2/32", "any", Deny, 21)];
    let mut put = |ingress: &[Rule]| {
        world.put(&[
            End(p.attachment(), &[&own_p], &[], EVERYTHING),
            End(q.attachment(), &[&own_q], ingress, &[]),
        ]);
    };
    put(&open);
    let mut near = p.talk(counter, &["127.0.0.1"]);
    let mut near_by_address = p.talk(counter, &["10.0.1.1"]);
    let far = outside.exec(|| std::net::TcpStream::connect("10.0.1.1:9000").unwrap());
    let heard = |far: &std::net::TcpStream| {
        far.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
        let end = std::time::Instant::now() + std::time::Duration::from_millis(300);
        let mut count = 0;
        while std::time::Instant::now() < end {
            count += std::io::Read::read(&mut &*far, &mut [0; 64]).unwrap_or(0);
        }
        count
    };
    let mut counts = |when: &str, some: bool| {
        // What was on its way.
        let _ = (near.ask(), near_by_address.ask(), heard(&far));
        let counts = [near.ask(), near_by_address.ask(), heard(&far)];
        assert!(counts.iter().all(|count| (*count > 0) == some), "{when}: {counts:?}");
    };
    counts("open", true);
    put(&shut);
    counts("shut", false);
    put(&open);
    // TCP tries again after a while.
    std::thread::sleep(std::time::Duration::from_secs(2));
    counts("open again", true);
}
