//! Nothing is lost and nothing leaks while tables change, agents come and go, and one dataplane hands over to another.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::net::Ipv4Addr;

use bulkhead_dataplane::{Dataplane, Handover};
use bulkhead_dataplane_testing::namespace::{enter_new_namespace, ifindex, run};
use bulkhead_dataplane_testing::traffic::{Running, change_often, world_policy};
use bulkhead_ebpf::EbpfDataplane;
use bulkhead_model::Prefix;
use bulkhead_model::flow::DropReason;
use bulkhead_model::host_policy::{Attachment, ClassId, HostDelta};
use bulkhead_model::verdict::Verdict::Allow;
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
