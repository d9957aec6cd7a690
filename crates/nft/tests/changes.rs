//! Nothing is lost and nothing leaks while tables change, agents come and go, and one dataplane hands over to another.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::net::{Ipv4Addr, UdpSocket};
use std::process::Command;
use std::time::Duration;

use bulkhead_dataplane::{Dataplane, Handover};
use bulkhead_dataplane_testing::namespace::{enlarge, enter_new_namespace, ifindex, now_ns, run};
use bulkhead_dataplane_testing::policy::{Rule, policy};
use bulkhead_dataplane_testing::traffic::{Running, change_often, world_policy};
use bulkhead_ebpf::EbpfDataplane;
use bulkhead_model::Prefix;
use bulkhead_model::flow::DropReason;
use bulkhead_model::host_policy::{Attachment, ClassId, CompiledId, HostDelta, HostPolicy};
use bulkhead_model::verdict::Verdict::{self, Allow, Deny};
use bulkhead_nft::{Capacities, NftDataplane};
use common::{World, listing};

#[test]
fn nothing_is_lost_or_leaked_while_tables_and_agents_change() {
    let mut world = World::new();
    world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    let running = Running::start(&world.a, &world.b);
    change_often(&mut world.dataplane);
    for _ in 0..20 {
        let next = NftDataplane::open(Capacities::default()).unwrap();
        drop(std::mem::replace(&mut world.dataplane, next));
        running.goes_on();
        world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    }
    let [sent, received, tried, leaked] = running.end();
    println!("allowed {received} of {sent}, leaked {leaked} of {tried}");
    assert!(sent > 10_000);
    assert_eq!((received, leaked), (sent, 0), "{:?}", world.dataplane.stats());
}

/// Time in which nothing changes, so that connections that have been judged are not judged again; and events are read.
fn quiet(world: &mut World) {
    std::thread::sleep(Duration::from_millis(60));
    // The kernel's grace period takes its time where others work as well.
    for _ in 0..40 {
        world.dataplane.poll(&mut |_| ()).unwrap();
        if is_quick() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether judged connections pass unjudged.
fn is_quick() -> bool {
    let output = Command::new("nft").args(["list", "map", "inet", "bulkhead", "current"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().contains("elements")
}

#[test]
fn nothing_is_lost_or_leaked_while_connections_pass_unjudged_between_changes() {
    let mut world = World::new();
    world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    let running = Running::start(&world.a, &world.b);
    let mut quick = 0;
    for round in 1..40u32 {
        quiet(&mut world);
        quick += u32::from(is_quick());
        if round.is_multiple_of(3) {
            world.dataplane.sweep(now_ns(), &mut |_| ()).unwrap();
        }
        if round.is_multiple_of(10) {
            let next = NftDataplane::open(Capacities::default()).unwrap();
            drop(std::mem::replace(&mut world.dataplane, next));
        }
        world.dataplane.replace(&world_policy(Allow, round % 2)).unwrap();
    }
    let [sent, received, tried, leaked] = running.end();
    println!("allowed {received} of {sent}, leaked {leaked} of {tried}; {quick} of 39 times unjudged");
    assert!(quick > 30, "{quick}");
    assert_eq!((received, leaked), (sent, 0), "{:?}", world.dataplane.stats());
}

/// `wb` may be called by `wa`, or not.
fn yes_or_no(verdict: Verdict) -> HostPolicy {
    let world = world_policy(Allow, 0);
    let rules = [Rule("10.0.1.0/24", "udp/5001", verdict, 20)];
    let mut whole = policy(ifindex("wb"), &["10.0.2.2".parse().unwrap()], &rules, &[], Deny);
    whole.endpoints.insert("a".into(), world.endpoints["a"].clone());
    whole.policies.insert(CompiledId(5), world.policies[&CompiledId(5)].clone());
    whole
}

/// The same connections through changes of what is allowed, through agents, repairs and more epochs than there are bits:
/// every datagram after a change fares as the change says, in both directions.
#[test]
fn whoever_was_judged_before_a_change_is_judged_after_it() {
    let mut world = World::new();
    let called = world.b.exec(|| UdpSocket::bind("10.0.2.2:5001").unwrap());
    let callers = world.a.exec(|| [(); 8].map(|()| UdpSocket::bind("10.0.1.2:0").unwrap()));
    for socket in callers.iter().chain([&called]) {
        socket.set_nonblocking(true).unwrap();
        enlarge(socket);
    }
    let heard = |socket: &UdpSocket| {
        let mut buffer = [0; 8];
        std::iter::from_fn(|| socket.recv(&mut buffer).ok().map(|_| u64::from_be_bytes(buffer)))
            .collect::<Vec<_>>()
    };
    let (mut number, mut asked, mut quick, mut was_quick) = (0u64, [0; 2], 0, false);
    // Every caller and the called send some; they arrive, or do not, and nothing else does.
    let mut exchange = |passes: bool, when: &str| {
        for _ in 0..4 {
            let mut there = Vec::new();
            for caller in &callers {
                number += 1;
                there.push(number);
                let sent = caller.send_to(&number.to_be_bytes(), "10.0.2.2:5001");
                assert!(sent.is_ok());
            }
            asked[usize::from(passes)] += there.len();
            std::thread::sleep(Duration::from_millis(1));
            let heard_there = heard(&called);
            assert_eq!(heard_there, if passes { there } else { Vec::new() }, "{when}");
            for caller in &callers {
                number += 1;
                let to = caller.local_addr().unwrap();
                called.send_to(&number.to_be_bytes(), to).unwrap();
                std::thread::sleep(Duration::from_micros(200));
                assert_eq!(heard(caller), if passes { vec![number] } else { Vec::new() }, "{when}, back");
                asked[usize::from(passes)] += 1;
            }
        }
    };
    // Neighbours are resolved first.
    world.dataplane.replace(&yes_or_no(Allow)).unwrap();
    callers[0].send_to(&[0; 8], "10.0.2.2:5001").unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(heard(&called), [0]);
    called.send_to(&[0; 8], callers[0].local_addr().unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(heard(&callers[0]), [0]);
    for round in 0..60u32 {
        let passes = round % 2 == 0;
        let how = if passes { Allow } else { Deny };
        if round % 11 == 5 {
            world.dataplane = NftDataplane::open(Capacities::default()).unwrap();
        }
        world.dataplane.replace(&yes_or_no(how)).unwrap();
        exchange(passes, &format!("round {round}, at once"));
        quiet(&mut world);
        was_quick |= is_quick();
        quick += u32::from(is_quick());
        exchange(passes, &format!("round {round}, after a while"));
        if round % 13 == 6 {
            run("nft flush ruleset");
            world.dataplane.poll(&mut |_| ()).unwrap();
            exchange(passes, &format!("round {round}, repaired"));
        }
        if round % 7 == 3 {
            world.dataplane.sweep(now_ns(), &mut |_| ()).unwrap();
            exchange(passes, &format!("round {round}, swept"));
        }
    }
    println!("{} passed, {} did not; {quick} of 60 times unjudged", asked[1], asked[0]);
    assert!(was_quick && quick > 20, "{quick}");
}

/// That they do pass unjudged: what they were judged by is taken away behind the agent's back, and is missed by others only.
#[test]
fn a_judged_connection_passes_by_one_look_up_and_its_beginning_does_not() {
    let mut world = World::new();
    world.dataplane.replace(&yes_or_no(Allow)).unwrap();
    let called = world.b.exec(|| UdpSocket::bind("10.0.2.2:5001").unwrap());
    called.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let callers = world.a.exec(|| [(); 2].map(|()| UdpSocket::bind("10.0.1.2:0").unwrap()));
    let passes = |caller: usize| {
        callers[caller].send_to(b"?", "10.0.2.2:5001").unwrap();
        called.recv(&mut [0; 8]).is_ok()
    };
    quiet(&mut world);
    assert!(is_quick());
    for _ in 0..3 {
        assert!(passes(0));
    }
    run("nft flush map inet bulkhead rows");
    assert!(passes(0), "judged before");
    assert!(!passes(1), "not judged yet");
    world.dataplane.poll(&mut |_| ()).unwrap();
    assert!(passes(0) && passes(1), "repaired");
    // A change ends it, in one transaction with what it changes.
    world.dataplane.replace(&yes_or_no(Deny)).unwrap();
    assert!(!is_quick() && !passes(0) && !passes(1));
}

/// Blocks beside and around the caller's come and go; its own class stays. The default is the opposite of what the rules
/// say, so that a packet that met neither state would show.
#[test]
fn nothing_is_lost_or_leaked_while_blocks_are_cut_and_joined() {
    let mut world = World::new();
    let mut state = world_policy(Allow, 0);
    // Enough of them that writing takes its time.
    for number in 0..4000u32 {
        let address = Ipv4Addr::from(0x0b00_0000 + number * 512);
        state.addresses.insert(Prefix::new(address.into(), 24), ClassId(9));
    }
    world.dataplane.replace(&state).unwrap();
    let running = Running::start(&world.a, &world.b);
    let blocks: [Prefix; 4] =
        ["10.0.1.128/25", "10.0.1.4/30", "10.0.0.0/16", "10.0.2.0/24"].map(|block| block.parse().unwrap());
    for round in 0..2000usize {
        let block = blocks[round % blocks.len()];
        let class = (!state.addresses.contains_key(&block)).then_some(ClassId(9));
        let addresses = [(block, class)].into();
        let delta = HostDelta { revision: round as u64, addresses, ..HostDelta::default() };
        world.dataplane.apply(&delta).unwrap();
        state.apply(&delta);
    }
    let [sent, received, tried, leaked] = running.end();
    println!("allowed {received} of {sent}, leaked {leaked} of {tried}");
    assert_eq!(world.dataplane.read_back().unwrap().addresses, state.addresses);
    assert_eq!((received, leaked), (sent, 0), "{:?}", world.dataplane.stats());
}

#[test]
fn one_dataplane_hands_over_to_the_other_and_back() {
    enter_new_namespace();
    run("nft add table inet somebody");
    let before = listing();
    let world = World::here();
    let World { a, b, dataplane } = world;
    let pins = format!("/sys/fs/bpf/bulkhead-nft-test-{}", std::process::id());
    let pins = std::path::Path::new(&pins);
    let mut dataplane: Box<dyn Dataplane> = Box::new(dataplane);
    dataplane.replace(&world_policy(Allow, 0)).unwrap();
    let running = Running::start(&a, &b);
    let ebpf = || Box::new(EbpfDataplane::open(pins, bulkhead_ebpf::Capacities::default()).unwrap());
    let mut refused = 0;
    for round in 0..6 {
        let next: Box<dyn Dataplane> = if round % 2 == 0 {
            ebpf()
        } else {
            Box::new(NftDataplane::open(Capacities::default()).unwrap())
        };
        let mut handover = Handover::new(next, Some(dataplane), None);
        // What an agent does when it starts.
        for interface in ["wa", "wb"] {
            handover.attach(Attachment::Interface(ifindex(interface))).unwrap();
        }
        running.goes_on();
        handover.replace(&world_policy(Allow, round % 2)).unwrap();
        running.goes_on();
        let ours = listing().contains("bulkhead");
        assert_eq!((pins.exists(), ours), (round % 2 == 0, round % 2 == 1), "one of them, and only one");
        // eBPF's programs come one interface after another, and a packet between two of them is judged by neither.
        let between = handover.stats().unwrap().drops.get(&DropReason::Unprogrammed).copied().unwrap_or(0);
        refused += if round % 2 == 0 { between } else { 0 };
        dataplane = Box::new(handover);
    }
    let [sent, received, tried, leaked] = running.end();
    println!("allowed {received} of {sent}, {refused} refused on the way, leaked {leaked} of {tried}");
    dataplane.cleanup().unwrap();
    assert!(!pins.exists());
    assert_eq!(listing(), before, "nothing of either is left");
    assert_eq!(leaked, 0);
    assert!(sent - received <= refused && refused <= 6, "{received} of {sent}, {refused} refused");
}
