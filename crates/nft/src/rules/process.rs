//! Processes, by the control groups of their sockets: what they send where it leaves the host, and what they get where it
//! has come in. Each group above a socket that is in charge is asked.
//!
//! Between two processes of a host (on the loopback interface) the sender's number is in the packet's priority, which nothing
//! else reads there; of answers, the connection's label says to whom they go.

use bulkhead_model::flow::DropReason;
use bulkhead_model::verdict::{Builtin, Direction, Verdict as Answer};

use super::ask::{Outcome, Peer, Question, ask, called_group, caller_group, group_number, refuse, undecided};
use super::host::{Hook, by_roles, infrastructure, loops};
use super::{
    Chains, LABEL, Roles, SCRATCH, Shape, back, by_family, count_and_drop, first_packet, goto, joined, jump,
    way,
};
use crate::expression::{Ct, Expression as E, Meta, Tuple};
use crate::schema::{ALLOW, Family, GROUPS, HOST_MAY, NAMED, Subject, Words};

/// Name of the chain that asks the groups of a socket that gets something.
const SOCKETS: &str = "process_sockets";

/// Who is asked where: groups at their levels, the deepest first.
fn subjects(levels: u32) -> impl Iterator<Item = Subject> {
    (1..u32::BITS).rev().filter(move |level| levels >> level & 1 == 1).map(Subject::Group)
}

fn chain(hook: Hook, subject: Subject) -> String {
    let hook = if hook == Hook::Input { "input" } else { "output" };
    match subject {
        Subject::Group(level) => format!("group{level}_{hook}"),
        _ => format!("labelled_{hook}"),
    }
}

/// Name of the chain that all packets of the host enter.
pub(super) fn entry_name(hook: Hook) -> &'static str {
    if hook == Hook::Input { "process_input" } else { "process_output" }
}

/// That chain.
pub(super) fn entry(hook: Hook, levels: u32) -> Vec<Vec<E>> {
    let mut rules = Vec::new();
    if hook == Hook::Output {
        // Who sends this, for whoever gets it: the deepest last. A process may have chosen a priority itself.
        rules.push(joined([loops(hook), vec![E::Immediate(0, vec![0; 4]), E::SetMeta(Meta::Priority, 0)]]));
        for subject in subjects(levels).collect::<Vec<_>>().into_iter().rev() {
            let Subject::Group(level) = subject else { continue };
            rules.push(joined([loops(hook), group_number(level, 0), vec![E::SetMeta(Meta::Priority, 0)]]));
        }
    } else {
        // Until a handshake has ended there is no whole socket: who was called, the first packet has said.
        let member = E::Contains { set: NAMED.name, key: 0 };
        let whole = chain(hook, Subject::Labelled);
        rules.push(joined([vec![E::HasSocket(SCRATCH)], jump(SOCKETS)]));
        rules.push(joined([vec![E::HasSocket(SCRATCH)], back()]));
        rules.push(joined([called_group(0), vec![member], goto(whole)]));
        return rules;
    }
    rules.extend(sockets(hook, levels));
    rules
}

/// Asks every group above a socket.
pub(super) fn sockets(hook: Hook, levels: u32) -> Vec<Vec<E>> {
    let rule = |subject| {
        let Subject::Group(level) = subject else { return back() };
        let member = E::Contains { set: GROUPS.name, key: 0 };
        joined([vec![E::Group { level, to: 0 }, member], jump(&chain(hook, subject))])
    };
    subjects(levels).map(rule).collect()
}

/// Every chain of one family.
pub(super) fn chains(family: &'static Family, log_group: u16, shape: Shape, chains: &mut Chains) {
    let (variants, levels) = (shape.variants, shape.levels);
    for subject in subjects(levels) {
        for direction in Direction::BOTH {
            let question = |roles| Question::new(subject, family, direction, roles);
            let workloads = Question::new(Subject::Workload, family, Direction::Egress, Roles::Reversed);
            let (then, nobody) = (goto(workloads.trying()), goto(workloads.trying()));
            let outcome = Outcome { bit: ALLOW, label: false, then, nobody, refuse: None };
            let reversed = question(Roles::Reversed);
            chains.push((reversed.trying(), ask(&reversed, &outcome, variants)));
        }
    }
    for subject in subjects(levels).chain([Subject::Labelled]) {
        for roles in [Roles::Ports, Roles::Icmp, Roles::Reversed] {
            let called = Question::new(subject, family, Direction::Ingress, roles);
            for peer in [Peer::Priority, Peer::Label, Peer::Host, Peer::Address] {
                let called = Question { peer, ..called };
                let bit = if peer == Peer::Host { HOST_MAY } else { ALLOW };
                let own = if peer == Peer::Address { from_neighbours(&called) } else { Vec::new() };
                put(&called, bit, own, log_group, shape, chains);
            }
            let calls = Question::new(subject, family, Direction::Egress, roles);
            if subject != Subject::Labelled {
                put(&calls, ALLOW, to_loopback(&calls), log_group, shape, chains);
            }
        }
    }
    let number = if family.v6 { 6 } else { 4 };
    for hook in Hook::BOTH {
        for subject in subjects(levels) {
            chains.push((format!("{}{number}", chain(hook, subject)), judge(family, hook, subject)));
        }
    }
    let labelled = Question::new(Subject::Labelled, family, Direction::Ingress, Roles::Ports);
    // Only of who was called the label tells.
    let rule = joined([way(Tuple::Original), goto(labelled.name())]);
    chains.push((format!("{}{number}", chain(Hook::Input, Subject::Labelled)), vec![rule]));
}

/// Leads both families on.
pub(super) fn by_families(levels: u32, chains: &mut Chains) {
    for hook in Hook::BOTH {
        for subject in subjects(levels) {
            let name = chain(hook, subject);
            let rules = by_family(&name);
            chains.push((name, rules));
        }
    }
    let name = chain(Hook::Input, Subject::Labelled);
    let rules = by_family(&name);
    chains.push((name, rules));
    chains.push((SOCKETS.to_owned(), sockets(Hook::Input, levels)));
}

fn put(question: &Question, bit: u32, own: Vec<Vec<E>>, log_group: u16, shape: Shape, chains: &mut Chains) {
    let label = question.roles != Roles::Reversed && question.subject != Subject::Labelled;
    let outcome = Outcome { bit, label, then: back(), nobody: back(), refuse: Some(question.refusing()) };
    refuse(question, log_group, shape, chains);
    let mut rules = own;
    rules.extend(ask(question, &outcome, shape.variants));
    chains.push((question.name(), rules));
}

/// What comes from another process of this host, and the answers to it.
fn from_neighbours(called: &Question) -> Vec<Vec<E>> {
    let name = |peer| goto(Question { peer, ..*called }.name());
    let named = |number: Vec<E>| joined([number, vec![E::Contains { set: NAMED.name, key: 0 }]]);
    let by_sender = named(vec![E::Meta(Meta::Priority, 0)]);
    let (there, back) = (way(called.roles.caller()), way(called.roles.called()));
    vec![
        joined([loops(Hook::Input), there.clone(), by_sender, name(Peer::Priority)]),
        joined([loops(Hook::Input), there, name(Peer::Host)]),
        joined([loops(Hook::Output), back.clone(), named(caller_group(0)), name(Peer::Label)]),
        joined([loops(Hook::Output), back, name(Peer::Host)]),
    ]
}

/// What a process asks of the loopback addresses is decided by who receives it.
fn to_loopback(calls: &Question) -> Vec<Vec<E>> {
    let mut loopback = vec![calls.address(calls.roles.called(), 0)];
    if calls.family.v6 {
        loopback.push(E::Equal(0, std::net::Ipv6Addr::LOCALHOST.octets().to_vec()));
    } else {
        loopback.push(E::Mask { from: 0, to: 0, mask: vec![0xff, 0, 0, 0] });
        loopback.push(E::Equal(0, vec![127, 0, 0, 0]));
    }
    let Words(first, _) = Words::builtin(Builtin::SelfTraffic, Answer::Allow);
    let mut rules = Vec::new();
    if let (Subject::Group(level), true) = (calls.subject, calls.roles != Roles::Reversed) {
        rules.push(joined([
            loopback.clone(),
            first_packet(true),
            undecided(Direction::Egress),
            group_number(level, LABEL + 1),
            vec![
                E::Immediate(LABEL, first.to_be_bytes().to_vec()),
                E::Immediate(LABEL + 2, vec![0; 8]),
                E::SetCt(Ct::Labels, LABEL),
            ],
            back(),
        ]));
    }
    rules.push(joined([loopback, back()]));
    rules
}

/// What packets of one group enter.
fn judge(family: &'static Family, hook: Hook, subject: Subject) -> Vec<Vec<E>> {
    let mut rules = infrastructure(family, hook);
    rules.extend(by_roles(family, hook, subject));
    // Conntrack cannot tell what it belongs to, or was told not to look.
    rules.push(count_and_drop(DropReason::Malformed));
    rules
}
