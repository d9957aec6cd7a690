//! Agents that are killed, restarted and rebooted under traffic.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::ensure;
use bulkhead_testbed::{Family, HOSTS, PingPong, Protocol, UdpStream, eventually, expected};

use crate::common::example;

#[test]
fn an_agent_killed_and_restarted_under_traffic_loses_and_leaks_nothing() {
    let mut example = example("bt-kill");
    example.apply().unwrap();
    example.wait_expected().unwrap();
    let of = |name: &str| example.workload(name);
    // Both ends on hosts whose agents die; inside an application every port is allowed.
    let (from, to, stranger) = (of("order-web"), of("geo-check"), of("ip-map"));
    let v6 = UdpStream::start(from, to, to.v6.into(), 7001, 1000, 8).unwrap();
    let v4 = UdpStream::start(from, to, to.v4.into(), 7002, 1000, 8).unwrap();
    let forbidden = UdpStream::start(stranger, to, to.v4.into(), 7003, 1000, 8).unwrap();
    let tcp = PingPong::start(of("credit-check-eu"), SocketAddr::new(of("ip-map").v4.into(), 8084)).unwrap();
    let wait_sent = |count: u64| {
        eventually("traffic flows", || {
            ensure!(v4.so_far().sent > count && tcp.round_trips() > 100);
            Ok(())
        })
        .unwrap();
    };
    wait_sent(500);
    for _ in 0..2 {
        for host in ["host-1", "host-2"] {
            example.bulkhead.kill_agent(host);
            wait_sent(v4.so_far().sent + 300);
            example.bulkhead.start_agent(host).unwrap();
            example.bulkhead.wait_connected().unwrap();
            wait_sent(v4.so_far().sent + 300);
        }
    }
    let talked = tcp.round_trips();
    eventually("the TCP connection lives", || {
        ensure!(tcp.round_trips() > talked + 20);
        Ok(())
    })
    .unwrap();
    let (v4, v6, forbidden) = (v4.finish(), v6.finish(), forbidden.finish());
    assert_eq!((v4.lost(), v6.lost(), forbidden.received), (0, 0, 0), "{v4:?} {v6:?} {forbidden:?}");
    assert!(v4.sent > 2_000 && forbidden.sent > 2_000, "{v4:?} {forbidden:?}");
    assert!(v4.longest_gap < Duration::from_secs(1), "{v4:?}");
    assert_eq!(tcp.finish().broken, None);
    example.check(Family::V4, |component| Protocol::Tcp(component.port), expected).unwrap();
}

#[test]
fn an_agent_that_is_told_to_stop_leaves_its_tables_in_force() {
    let mut example = example("bt-stop");
    example.apply().unwrap();
    example.wait_expected().unwrap();
    assert!(example.bulkhead.stop_agent("host-2"), "it ends well");
    example.check(Family::V4, |component| Protocol::Tcp(component.port), expected).unwrap();
    example.bulkhead.start_agent("host-2").unwrap();
    example.bulkhead.wait_connected().unwrap();
    example.check(Family::V4, |component| Protocol::Tcp(component.port), expected).unwrap();
}

#[test]
fn a_host_that_reboots_without_a_controller_enforces_what_it_remembers() {
    let mut example = example("bt-boot");
    example.apply().unwrap();
    example.wait_expected().unwrap();
    example.bulkhead.kill_controller();
    for host in HOSTS {
        example.bulkhead.kill_agent(host);
        example.bulkhead.clean_kernel(host).unwrap();
    }
    example
        .check(Family::V4, |component| Protocol::Tcp(component.port), |_, _| true)
        .expect("after the clean-up nothing is judged");
    for host in HOSTS {
        example.bulkhead.start_agent(host).unwrap();
    }
    eventually("everything is enforced again", || {
        example.check(Family::V4, |component| Protocol::Tcp(component.port), expected)
    })
    .unwrap();
    example.check(Family::V6, |component| Protocol::Tcp(component.port), expected).unwrap();
    example
        .check(
            Family::V6,
            |_| Protocol::Icmp,
            |from, to| from.application == to.application && expected(from, to),
        )
        .unwrap();
}
