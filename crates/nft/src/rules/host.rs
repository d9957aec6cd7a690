//! The host as an endpoint: what comes to it and what it sends, where both ends are who they really are.

use bulkhead_model::flow::DropReason;
use bulkhead_model::verdict::Direction;

use super::ask::{self, Outcome, Question, ask, refuse};
use super::{
    Chains, ICMP, ICMPV6, Roles, SCRATCH, Shape, back, by_family, count_and_drop, edge, entry, goto,
    handshake, joined, turned, way,
};
use crate::expression::{Ct, Expression as E, Meta, RELATED, Tuple};
use crate::schema::{ALLOW, Family, HOST_INTERFACES, Subject};

/// The loopback interface's index, in every network namespace.
const LOOPBACK: u32 = 1;

/// The two places where a host meets its packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hook {
    Input,
    Output,
}

impl Hook {
    pub(super) const BOTH: [Self; 2] = [Self::Input, Self::Output];

    /// Name of the chain that judges the host there.
    pub(super) fn chain(self) -> &'static str {
        match self {
            Self::Input => "host_input",
            Self::Output => "host_output",
        }
    }

    fn interface(self) -> Meta {
        match self {
            Self::Input => Meta::InputInterface,
            Self::Output => Meta::OutputInterface,
        }
    }

    /// Where a packet meets the endpoint that has sent it, or gets it.
    pub(super) fn direction(self, sent_by_caller: bool) -> Direction {
        if (self == Self::Output) == sent_by_caller { Direction::Egress } else { Direction::Ingress }
    }
}

/// What packets of the host enter: what it says to itself is its own business.
pub(super) fn entry(hook: Hook) -> Vec<Vec<E>> {
    let mut rules = vec![joined([loops(hook), back()])];
    rules.extend(by_family(hook.chain()));
    rules
}

/// Every chain of one family.
pub(super) fn chains(family: &'static Family, log_group: u16, shape: Shape, chains: &mut Chains) {
    let variants = shape.variants;
    for direction in Direction::BOTH {
        let question = |subject, roles| Question::new(subject, family, direction, roles);
        // Taken the other way round, the other end is asked as well.
        let both = question(Subject::Workload, Roles::Reversed);
        let both = Question { direction: Direction::Egress, ..both }.trying();
        let trying = |subject| question(subject, Roles::Reversed).trying();
        for (subject, nobody) in
            [(Subject::HostInterface, both.clone()), (Subject::HostAddress, trying(Subject::HostInterface))]
        {
            let (then, nobody) = (goto(both.clone()), goto(nobody));
            let outcome = Outcome { bit: ALLOW, label: false, then, nobody, refuse: None };
            chains.push((trying(subject), ask(&question(subject, Roles::Reversed), &outcome, variants)));
        }
        for roles in [Roles::Ports, Roles::Icmp, Roles::Reversed] {
            let by_interface = question(Subject::HostInterface, roles);
            let by_address = question(Subject::HostAddress, roles);
            for (asked, nobody) in [(&by_interface, back()), (&by_address, goto(by_interface.name()))] {
                refuse(asked, log_group, shape, chains);
                let (label, refuse) = (roles != Roles::Reversed, Some(asked.refusing()));
                let outcome = Outcome { bit: ALLOW, label, then: back(), nobody, refuse };
                chains.push((asked.name(), ask(asked, &outcome, variants)));
            }
        }
    }
    for hook in Hook::BOTH {
        let number = if family.v6 { 6 } else { 4 };
        chains.push((format!("{}{number}", hook.chain()), judge(family, hook)));
    }
}

/// Whose connection it is, and who began.
fn judge(family: &'static Family, hook: Hook) -> Vec<Vec<E>> {
    let output = hook == Hook::Output;
    let mut rules = infrastructure(family, hook);
    if output {
        // Errors about what it forwards, or refuses: nobody else tells how large a packet may be.
        let error = vec![
            E::Ct(Ct::State, None, SCRATCH),
            E::Equal(SCRATCH, RELATED.to_ne_bytes().to_vec()),
            E::Meta(Meta::Transport, SCRATCH),
            E::Equal(SCRATCH, vec![if family.v6 { ICMPV6 } else { ICMP }]),
        ];
        rules.push(joined([error, back()]));
    }
    rules.extend(by_roles(family, hook, Subject::HostAddress));
    // Conntrack cannot tell what it belongs to, or was told not to look.
    let address = vec![edge::address(family, output, 0), E::Contains { set: family.host_own.name, key: 0 }];
    let interface = joined([ask::interfaces(0), vec![E::Contains { set: HOST_INTERFACES.name, key: 0 }]]);
    for ours in [address, interface] {
        rules.push(joined([ours, count_and_drop(DropReason::Malformed)]));
    }
    rules
}

/// What no policy can take away: who asks for addresses, and looks for neighbours.
pub(super) fn infrastructure(family: &'static Family, hook: Hook) -> Vec<Vec<E>> {
    let output = hook == Hook::Output;
    let mut rules = vec![joined([edge::dhcp(family.v6, !output, output), back()])];
    if family.v6 {
        rules.extend(edge::discovery().into_iter().map(|rule| joined([rule, back()])));
    }
    rules
}

/// Leads to the question that a packet is, by who has begun its connection.
pub(super) fn by_roles(family: &'static Family, hook: Hook, subject: Subject) -> Vec<Vec<E>> {
    let name =
        |roles, sent_by_caller| Question::new(subject, family, hook.direction(sent_by_caller), roles).name();
    // Whoever sends a SYN begins, whatever was between the two before.
    let mut rules = vec![joined([handshake(true), way(Tuple::Reply), goto(name(Roles::Reversed, true))])];
    for (condition, roles) in
        [(turned(), Roles::Reversed), (entry::icmp(family), Roles::Icmp), (Vec::new(), Roles::Ports)]
    {
        for tuple in [Tuple::Original, Tuple::Reply] {
            let chain = name(roles, tuple == roles.caller());
            rules.push(joined([condition.clone(), way(tuple), goto(chain)]));
        }
    }
    rules
}

/// What goes through the loopback interface.
pub(super) fn loops(hook: Hook) -> Vec<E> {
    vec![E::Meta(hook.interface(), SCRATCH), E::Equal(SCRATCH, LOOPBACK.to_ne_bytes().to_vec())]
}
