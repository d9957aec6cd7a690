//! What the host forwards, at the interface that it comes in by and then at the one that it goes out by: first the endpoint that
//! has the interface, else the one for all others, which is not about workloads.

use bulkhead_model::flow::DropReason;
use bulkhead_model::verdict::Direction;

use super::ask::{Outcome, Question, ask, refuse};
use super::host::{Hook, by_roles};
use super::{Chains, Roles, Shape, back, by_family, count_and_drop, edge, goto, joined, jump};
use crate::expression::{Expression as E, Meta};
use crate::schema::{ALLOW, FORWARDED, Family, Subject, Through};

/// Name of the chain that everything forwarded enters.
pub(super) const CHAIN: &str = "forwarded";

fn through(out: bool, any: bool) -> Subject {
    Subject::Forwarded(Through { out, any })
}

fn side(out: bool) -> &'static str {
    if out { "forwarded_out" } else { "forwarded_in" }
}

/// That chain.
pub(super) fn entry() -> Vec<Vec<E>> {
    [false, true].map(|out| jump(side(out))).into()
}

/// Leads both families on.
pub(super) fn by_families(chains: &mut Chains) {
    chains.extend([false, true].map(|out| (side(out).to_owned(), by_family(side(out)))));
}

/// Whether the other end is a workload's, which is judged by endpoints of its own.
fn about_workload(question: &Question) -> Vec<E> {
    let ours = E::Contains { set: question.family.ours.name, key: 0 };
    vec![question.address(question.peer_tuple(), 0), ours]
}

/// Every chain of one family.
pub(super) fn chains(family: &'static Family, log_group: u16, shape: Shape, chains: &mut Chains) {
    let workloads = Question::new(Subject::Workload, family, Direction::Egress, Roles::Reversed).trying();
    for out in [false, true] {
        for direction in Direction::BOTH {
            let question = |any, roles| Question::new(through(out, any), family, direction, roles);
            // The one for all first: what has none of its own leads there.
            for any in [true, false] {
                let tried = question(any, Roles::Reversed);
                let then = goto(workloads.clone());
                let next = if any { workloads.clone() } else { question(true, Roles::Reversed).trying() };
                let outcome = Outcome { bit: ALLOW, label: false, then, nobody: goto(next), refuse: None };
                let mut rules = Vec::new();
                if any {
                    rules.push(joined([about_workload(&tried), goto(workloads.clone())]));
                }
                rules.extend(ask(&tried, &outcome, shape.variants));
                chains.push((tried.trying(), rules));
                for roles in [Roles::Ports, Roles::Icmp, Roles::Reversed] {
                    let asked = question(any, roles);
                    refuse(&asked, log_group, shape, chains);
                    let nobody = if any { back() } else { goto(question(true, roles).name()) };
                    let (label, refuse) = (roles != Roles::Reversed, Some(asked.refusing()));
                    let outcome = Outcome { bit: ALLOW, label, then: back(), nobody, refuse };
                    let mut rules = Vec::new();
                    if any {
                        rules.push(joined([about_workload(&asked), back()]));
                    }
                    rules.extend(ask(&asked, &outcome, shape.variants));
                    chains.push((asked.name(), rules));
                }
            }
        }
    }
    let number = if family.v6 { 6 } else { 4 };
    for (out, hook) in [(false, Hook::Input), (true, Hook::Output)] {
        let mut rules = by_roles(family, hook, through(out, false));
        // Conntrack cannot tell what it belongs to, or was told not to look.
        let interface = if out { Meta::OutputInterface } else { Meta::InputInterface };
        let bound = E::Contains { set: FORWARDED.name, key: 0 };
        let named = vec![E::Meta(interface, 0), bound.clone()];
        let other = E::Lacks { set: family.ours.name, key: 0 };
        let any = vec![edge::address(family, !out, 0), other, E::Immediate(0, vec![0; 4]), bound];
        for ours in [named, any] {
            rules.push(joined([ours, count_and_drop(DropReason::Malformed)]));
        }
        chains.push((format!("{}{number}", side(out)), rules));
    }
}
