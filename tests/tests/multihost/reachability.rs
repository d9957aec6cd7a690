//! Who reaches whom, before and after policies.

use bulkhead_testbed::{Component, Family, OTHER_PORT, Protocol, expected};

use crate::common::example;

#[test]
fn the_example_is_enforced_over_every_protocol() {
    let example = example("bt-reach");
    let everything = |_: &_, _: &_| true;
    for family in [Family::V4, Family::V6] {
        example.check(family, |component| Protocol::Tcp(component.port), everything).unwrap();
        example.check(family, |component| Protocol::Udp(component.port), everything).unwrap();
        example.check(family, |_| Protocol::Icmp, everything).unwrap();
    }
    example.apply().unwrap();
    example.wait_expected().unwrap();
    // Between applications only one port of TCP is allowed.
    let inside = |from: &_, to: &_| expected_inside(from, to);
    for family in [Family::V4, Family::V6] {
        example.check(family, |component| Protocol::Tcp(component.port), expected).unwrap();
        example.check(family, |_| Protocol::Tcp(OTHER_PORT), inside).unwrap();
        example.check(family, |component| Protocol::Udp(component.port), inside).unwrap();
        example.check(family, |_| Protocol::Icmp, inside).unwrap();
    }
}

fn expected_inside(from: &Component, to: &Component) -> bool {
    from.application == to.application && expected(from, to)
}
