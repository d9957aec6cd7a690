//! Processes of one host, and so of one address, with policies of their own.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::process::Command;

use bulkhead_dataplane::{Dataplane, DataplaneError};
use bulkhead_dataplane_testing::processes::{CLIENT, Group, answered, python};
use bulkhead_model::flow::{DropReason, FlowEvent};
use bulkhead_model::host_policy::Attachment;
use bulkhead_model::verdict::Verdict::{Allow, Deny};
use common::Rule;
use common::live::Namespace;
use common::world::{EVERYTHING, End, World, opened, serve, services_of_the_host, some, tcp, udp};

#[test]
fn two_services_of_one_address_have_policies_of_their_own() {
    let mut world = World::new();
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
    assert!(!world.root_exists());
}

#[test]
fn processes_of_one_host_know_each_other() {
    let mut world = World::new();
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
    let mut world = World::new();
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

/// Says how a connection and a datagram end.
const TRIES: &str = "
import errno, socket, sys
to = (sys.argv[1], int(sys.argv[2]))
def one(kind):
    s = socket.socket(socket.AF_INET, kind); s.settimeout(0.4)
    try:
        s.connect(to)
        if kind == socket.SOCK_DGRAM: s.send(b'?')
        s.recv(64)
        return 'answered'
    except TimeoutError: return 'silent'
    except OSError as e: return errno.errorcode[e.errno]
print(one(socket.SOCK_STREAM), one(socket.SOCK_DGRAM))
";

#[test]
fn a_process_is_told_and_tells() {
    let mut world = World::new();
    let outside = Namespace::workload("eth0", 1);
    let (p, mut q) = (Group::new("p"), Group::new("q"));
    q.serve(9001);
    let own = [&p, &q].map(|group| group.attachment().own_address().unwrap().to_string());
    let (own_p, own_q) = ([own[0].as_str()], [own[1].as_str()]);
    let tries = |mut command: Command| String::from_utf8(command.output().unwrap().stdout).unwrap();
    let ends =
        |egress| [End(p.attachment(), &own_p, &[], egress), End(q.attachment(), &own_q, &[], EVERYTHING)];
    let calls = |to: &str| tries(p.command(TRIES, &[to, "9001"]));
    // The kernel answers a refused datagram of one's own by itself.
    world.put_rejecting(&ends(&[]));
    assert_eq!(world.polled(|| calls("10.0.1.2")), "ECONNREFUSED EPERM\n");
    assert_eq!(world.polled(|| calls("10.0.1.1")), "ECONNREFUSED EPERM\n");
    // Refused by the other one.
    world.put_rejecting(&ends(EVERYTHING));
    for to in ["10.0.1.1", "127.0.0.1"] {
        assert_eq!(world.polled(|| calls(to)), "ECONNREFUSED EHOSTUNREACH\n", "{to}");
    }
    let from_outside = || outside.exec(move || tries(python(None, TRIES, &["10.0.1.1", "9001"])));
    assert_eq!(world.polled(from_outside), "ECONNREFUSED EHOSTUNREACH\n");
    world.put(&ends(EVERYTHING));
    assert_eq!(world.polled(|| calls("10.0.1.1")), "silent silent\n");
}
