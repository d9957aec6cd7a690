//! Where packets enter: what passes whatever policy says, whose connection it is, and who began.

use bulkhead_model::flow::DropReason;
use bulkhead_model::verdict::Direction;

use super::{
    ICMP, ICMPV6, LABEL, Question, Roles, SCRATCH, accept, count_and_drop, edge, goto, handshake, joined,
};
use crate::expression::{Ct, Expression as E, Tuple};
use crate::schema::{Family, REVERSED};

/// The chain that every packet of a family enters.
pub(super) fn packet(family: &'static Family) -> Vec<Vec<E>> {
    let question = Question { family, direction: Direction::Egress, roles: Roles::Ports };
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
        rules.push(joined([edge::dhcp(family.v6, from, to), other.to_vec(), accept()]));
    }
    if family.v6 {
        rules.extend(edge::discovery().into_iter().map(|rule| joined([rule, accept()])));
    }
    rules
}

/// What is left: packets of connections that one of ours is in.
pub(super) fn judge(family: &'static Family) -> Vec<Vec<E>> {
    let question = Question { family, direction: Direction::Egress, roles: Roles::Ports };
    let name = |roles| Question { roles, ..question }.name("egress");
    let second = if family.v6 { 4 } else { 1 };
    let own = vec![
        question.address(Tuple::Original, 0),
        question.address(Tuple::Reply, second),
        E::Contains { set: family.selves.name, key: 0 },
    ];
    let reply = vec![E::Ct(Ct::Direction, None, SCRATCH), E::Equal(SCRATCH, vec![Tuple::Reply as u8])];
    let mut mask = vec![0; 4];
    mask.extend(REVERSED.to_be_bytes());
    mask.resize(16, 0);
    let turned = vec![
        E::Ct(Ct::Labels, None, LABEL),
        E::Mask { from: LABEL, to: LABEL, mask },
        E::NotEqual(LABEL, vec![0; 16]),
    ];
    let icmp = vec![
        E::Ct(Ct::Protocol, Some(Tuple::Original), SCRATCH),
        E::Equal(SCRATCH, vec![if family.v6 { ICMPV6 } else { ICMP }]),
    ];
    vec![
        joined([own, accept()]),
        // Whoever sends a SYN begins, whatever was between the two before.
        joined([handshake(true), reply, goto(name(Roles::Reversed))]),
        joined([turned, goto(name(Roles::Reversed))]),
        joined([icmp, goto(name(Roles::Icmp))]),
        goto(name(Roles::Ports)),
    ]
}
