//! One subject class and direction: its rules bound to atoms, and the rows that come of them.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use bulkhead_model::Verdict;
use bulkhead_model::host_policy::{Cell, Column, Row, RuleId, Variant, merged};
use bulkhead_model::policy::{Action, DefaultAction};
use bulkhead_model::ports::PortKey;

use crate::classes::AtomId;
use crate::intervals::Intervals;

/// A rule as one subject class sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BoundRule {
    pub(crate) id: RuleId,
    pub(crate) action: Action,
    pub(crate) audit: bool,
    pub(crate) log: bool,
    pub(crate) reject: bool,
    /// Port key intervals.
    pub(crate) ports: Vec<(PortKey, PortKey)>,
    /// Intervals of source ports; `None` means any, or that there is none.
    pub(crate) source_ports: Option<Arc<[(u16, u16)]>>,
    /// Any of these; `None` means any address.
    pub(crate) peers: Option<Vec<BoundPeer>>,
}

/// A peer as a condition on the atoms that an address matches.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct BoundPeer {
    /// Each of these must be matched.
    pub(crate) all: Vec<AtomId>,
    /// None of these may be.
    pub(crate) none: Vec<AtomId>,
}

/// The rules of one tier that apply, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BoundTier {
    pub(crate) default_rule: RuleId,
    pub(crate) default_action: DefaultAction,
    /// Whether an enforcing policy is among them, so that the tier ends in its default action.
    pub(crate) enforced: bool,
    pub(crate) rules: Vec<BoundRule>,
}

/// All that applies, in order.
#[derive(Debug)]
pub(crate) struct Program {
    tiers: Vec<BoundTier>,
    posture: (Verdict, RuleId),
    /// Positions (tier, rule) of all rules, in order of evaluation.
    positions: Vec<(u32, u32)>,
    /// Rules that must be looked at for every address: no positive atom to find them by.
    always: Vec<u32>,
    /// Rules that need this atom.
    by_atom: HashMap<AtomId, Vec<u32>>,
    /// Rows by the list of rules whose peer matches.
    rows: HashMap<Box<[u32]>, Arc<Row>>,
}

#[derive(Clone, Copy)]
struct Paint {
    verdict: Verdict,
    rule: RuleId,
    log: bool,
    reject: bool,
    written: bool,
}

impl Paint {
    /// Of what no rule decides: the end of a tier, or the posture.
    fn unwritten(verdict: Verdict, rule: RuleId) -> Self {
        Self { verdict, rule, log: false, reject: false, written: false }
    }
}

impl Program {
    pub(crate) fn new(tiers: Vec<BoundTier>, posture: (Verdict, RuleId)) -> Self {
        let mut program = Self {
            positions: Vec::new(),
            always: Vec::new(),
            by_atom: HashMap::new(),
            rows: HashMap::new(),
            tiers,
            posture,
        };
        for (tier_index, tier) in program.tiers.iter().enumerate() {
            for (rule_index, rule) in tier.rules.iter().enumerate() {
                let position = count(program.positions.len());
                program.positions.push((count(tier_index), count(rule_index)));
                match &rule.peers {
                    None => program.always.push(position),
                    Some(peers) => {
                        for peer in peers {
                            match peer.all.first() {
                                None => program.always.push(position),
                                Some(atom) => program.by_atom.entry(*atom).or_default().push(position),
                            }
                        }
                    }
                }
            }
        }
        program
    }

    /// Every atom that a rule reads.
    pub(crate) fn atoms(&self) -> impl Iterator<Item = AtomId> {
        self.tiers
            .iter()
            .flat_map(|tier| &tier.rules)
            .flat_map(|rule| rule.peers.as_deref().unwrap_or_default())
            .flat_map(|peer| peer.all.iter().chain(&peer.none))
            .copied()
    }

    /// The answers for addresses that match just these atoms (sorted).
    pub(crate) fn row(&mut self, matched: &[AtomId]) -> Arc<Row> {
        let candidates = self.candidates(matched);
        if let Some(row) = self.rows.get(candidates.as_slice()) {
            return Arc::clone(row);
        }
        let row = Arc::new(self.compile(&candidates));
        self.rows.insert(candidates.into(), Arc::clone(&row));
        row
    }

    /// Forgets rows that nobody else holds.
    pub(crate) fn shrink(&mut self) {
        self.rows.retain(|_, row| Arc::strong_count(row) > 1);
    }

    fn candidates(&self, matched: &[AtomId]) -> Vec<u32> {
        let mut candidates = self.always.clone();
        for atom in matched {
            candidates.extend(self.by_atom.get(atom).into_iter().flatten());
        }
        candidates.sort_unstable();
        candidates.dedup();
        candidates.retain(|position| {
            let peers = self.rule(*position).peers.as_deref();
            peers.is_none_or(|peers| {
                peers.iter().any(|peer| {
                    let matches = |atom: &AtomId| matched.binary_search(atom).is_ok();
                    peer.all.iter().all(matches) && !peer.none.iter().any(matches)
                })
            })
        });
        candidates
    }

    fn rule(&self, position: u32) -> &BoundRule {
        let (tier, rule) = self.positions[position as usize];
        &self.tiers[tier as usize].rules[rule as usize]
    }

    /// The source ports fall into parts that no candidate tells apart. Each part is painted with the rules that cover
    /// it; parts that the same rules cover share the result. Nearly always there is one part and nothing to leave out.
    fn compile(&self, candidates: &[u32]) -> Row {
        let intervals = |position: u32| self.rule(position).source_ports.as_deref();
        let mut starts = BTreeSet::from([0u16]);
        for (first, last) in candidates.iter().filter_map(|position| intervals(*position)).flatten() {
            starts.insert(*first);
            starts.extend(last.checked_add(1));
        }
        if starts.len() == 1 {
            // Whoever asks for the source port here asks for every one.
            return Row::by_source_port([Variant { first: 0, columns: self.columns(candidates) }]);
        }
        let mut painted: HashMap<Vec<u32>, Arc<[Column]>> = HashMap::new();
        let variants = starts.into_iter().map(|first| {
            let covers = |intervals: &[(u16, u16)]| intervals.iter().any(|(a, b)| *a <= first && first <= *b);
            let out = |position: &u32| intervals(*position).is_some_and(|intervals| !covers(intervals));
            let left_out: Vec<u32> = candidates.iter().copied().filter(out).collect();
            let columns = painted.entry(left_out).or_insert_with_key(|left_out| {
                let stays = |position: &u32| left_out.binary_search(position).is_err();
                self.columns(&candidates.iter().copied().filter(stays).collect::<Vec<_>>())
            });
            Variant { first, columns: Arc::clone(columns) }
        });
        Row::by_source_port(variants)
    }

    fn columns(&self, candidates: &[u32]) -> Arc<[Column]> {
        let enforced = self.paint(candidates, false);
        let audit = self.paint(candidates, true);
        let mut audit = audit.into_iter().peekable();
        let mut steps: Vec<(PortKey, Option<Paint>, Option<Paint>)> = Vec::new();
        let (mut current, mut shadow) = (None, None);
        let mut enforced = enforced.into_iter().peekable();
        loop {
            let next = match (enforced.peek(), audit.peek()) {
                (Some((a, _)), Some((b, _))) => (*a).min(*b),
                (Some((a, _)), None) => *a,
                (None, Some((b, _))) => *b,
                (None, None) => break,
            };
            if let Some((_, paint)) = enforced.next_if(|(first, _)| *first == next) {
                current = Some(paint);
            }
            if let Some((_, paint)) = audit.next_if(|(first, _)| *first == next) {
                shadow = Some(paint);
            }
            steps.push((next, current, shadow));
        }
        merged(steps.into_iter().filter_map(|(first, enforced, audit)| {
            let (enforced, audit) = (enforced?, audit?);
            let cell = Cell {
                verdict: enforced.verdict,
                rule: enforced.rule,
                audit_verdict: audit.verdict,
                audit_rule: audit.rule,
                log: enforced.log || audit.log,
                reject: enforced.reject,
                written: enforced.written,
            };
            Some(Column { first, cell })
        }))
    }

    /// First match for every port key at once: each rule paints what is still blank.
    fn paint(&self, candidates: &[u32], with_audit: bool) -> Vec<(PortKey, Paint)> {
        let mut painted: Vec<(PortKey, Paint)> = Vec::new();
        let mut logged: Vec<(PortKey, PortKey)> = Vec::new();
        let mut blank = Intervals::full();
        let mut candidates = candidates.iter().peekable();
        for (tier_index, tier) in self.tiers.iter().enumerate() {
            let in_tier = |position: &&u32| self.positions[**position as usize].0 == count(tier_index);
            let mut rules = Vec::new();
            while let Some(position) = candidates.next_if(in_tier) {
                rules.push(self.rule(*position));
            }
            if blank.is_empty() || !(tier.enforced || with_audit) {
                continue;
            }
            let mut open = blank.clone();
            for rule in rules.into_iter().filter(|rule| with_audit || !rule.audit) {
                if open.is_empty() {
                    break;
                }
                apply(rule, &mut open, &mut blank, &mut painted, &mut logged);
            }
            if tier.default_action == DefaultAction::Deny {
                let paint = Paint::unwritten(Verdict::Deny, tier.default_rule);
                for (first, last) in open.iter() {
                    blank.take(first, last);
                    painted.push((first, paint));
                }
            }
        }
        let (verdict, rule) = self.posture;
        let paint = Paint::unwritten(verdict, rule);
        painted.extend(blank.iter().map(|(first, _)| (first, paint)));
        painted.sort_unstable_by_key(|(first, _)| *first);
        mark_logged(painted, &logged)
    }
}

fn apply(
    rule: &BoundRule,
    open: &mut Intervals,
    blank: &mut Intervals,
    painted: &mut Vec<(PortKey, Paint)>,
    logged: &mut Vec<(PortKey, PortKey)>,
) {
    for (first, last) in &rule.ports {
        let verdict = match rule.action {
            Action::Allow => Verdict::Allow,
            Action::Deny => Verdict::Deny,
            Action::Pass => {
                open.take(*first, *last);
                continue;
            }
            Action::Log => {
                logged.extend(open.within(*first, *last));
                continue;
            }
        };
        for (first, last) in open.take(*first, *last) {
            blank.take(first, last);
            let paint = Paint { verdict, rule: rule.id, log: rule.log, reject: rule.reject, written: true };
            painted.push((first, paint));
        }
    }
}

/// Splits the steps at the borders of what is to be logged. `steps` begins at 0 and ascends.
fn mark_logged(steps: Vec<(PortKey, Paint)>, logged: &[(PortKey, PortKey)]) -> Vec<(PortKey, Paint)> {
    if logged.is_empty() {
        return steps;
    }
    let mut borders: Vec<PortKey> = steps.iter().map(|(first, _)| *first).collect();
    borders.extend(logged.iter().flat_map(|(first, last)| [*first, last.saturating_add(1)]));
    borders.retain(|border| *border < bulkhead_model::ports::PORT_KEY_END);
    borders.sort_unstable();
    borders.dedup();
    borders
        .into_iter()
        .filter_map(|border| {
            let after = steps.partition_point(|(first, _)| *first <= border);
            let (_, mut paint) = *steps.get(after.checked_sub(1)?)?;
            paint.log |= logged.iter().any(|(first, last)| *first <= border && border <= *last);
            Some((border, paint))
        })
        .collect()
}

fn count(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}
