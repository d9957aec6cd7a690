//! Where packets enter: what passes whatever policy says, whose connection it is, and who began.

use bulkhead_model::flow::DropReason;
use bulkhead_model::verdict::Direction;

use super::{
    ICMP, ICMPV6, Question, Roles, SCRATCH, back, count_and_drop, edge, goto, handshake, joined, turned, way,
};
use crate::expression::{Ct, Expression as E, Tuple};
use crate::schema::{Family, Subject};

fn caller(family: &'static Family, roles: Roles) -> Question {
    Question::new(Subject::Workload, family, Direction::Egress, roles)
}

/// A connection of the family's own ICMP.
pub(super) fn icmp(family: &Family) -> Vec<E> {
    vec![
        E::Ct(Ct::Protocol, Some(Tuple::Original), SCRATCH),
        E::Equal(SCRATCH, vec![if family.v6 { ICMPV6 } else { ICMP }]),
    ]
}

/// The chain that every packet of a family enters.
pub(super) fn packet(family: &'static Family) -> Vec<Vec<E>> {
    let question = caller(family, Roles::Ports);
    let mut rules = infrastructure(family);
    let judge = if family.v6 { "judge6" } else { "judge4" };
    for tuple in [Tuple::Original, Tuple::Reply] {
        let ours = E::Contains { set: family.ours.name, key: 0 };
        rules.push(joined([vec![question.address(tuple, 0), ours], goto(judge)]));
    }
    // Conntrack cannot tell what it belongs to, or was told not to look: nothing that a policy could be asked about.
    for source in [true, false] {
        let ours = E::Contains { set: family.ours.name, key: 0 };
        let ends = vec![edge::address(family, source, 0), ours];
        rules.push(joined([ends, count_and_drop(DropReason::Malformed)]));
    }
    rules
}

/// What no policy can take away. Its source has been looked at where it came from.
fn infrastructure(family: &'static Family) -> Vec<Vec<E>> {
    let mut rules = Vec::new();
    for (from, to, source) in [(false, true, false), (true, false, true)] {
        // From or to whoever is not a workload of ours: what they say to each other is judged.
        let other = [edge::address(family, source, 0), E::Lacks { set: family.ours.name, key: 0 }];
        rules.push(joined([edge::dhcp(family.v6, from, to), other.to_vec(), back()]));
    }
    if family.v6 {
        rules.extend(edge::discovery().into_iter().map(|rule| joined([rule, back()])));
    }
    rules
}

/// What is left: packets of connections that one of ours is in.
pub(super) fn judge(family: &'static Family) -> Vec<Vec<E>> {
    let question = caller(family, Roles::Ports);
    let name = |roles| caller(family, roles).name();
    let second = if family.v6 { 4 } else { 1 };
    let own = vec![
        question.address(Tuple::Original, 0),
        question.address(Tuple::Reply, second),
        E::Contains { set: family.selves.name, key: 0 },
    ];
    vec![
        joined([own, back()]),
        // Whoever sends a SYN begins, whatever was between the two before.
        joined([handshake(true), way(Tuple::Reply), goto(name(Roles::Reversed))]),
        joined([turned(), goto(name(Roles::Reversed))]),
        joined([icmp(family), goto(name(Roles::Icmp))]),
        goto(name(Roles::Ports)),
    ]
}
