//! Rules that no connection can reach.
//!
//! Only what is certain is said, whatever workloads there are: removing such a rule changes no verdict and no audit
//! verdict. The parts of a rule (each of its peers, in each of its blocks) are held against earlier rules one by one;
//! each takes away the ports that it matches. What only several selectors or several blocks together would cover, or
//! what depends on which workloads there are, is not seen.

use std::collections::BTreeMap;

use bulkhead_model::policy::{Action, DefaultAction, Mode, PolicySpec, Rule};
use bulkhead_model::{Direction, ObjectKey};

use super::cover::{covers, matches_everything, parts};
use super::implies::{implies, namespace_within};
use super::ports::PortSet;
use crate::world::World;

/// Most comparisons of peers that are made; beyond them rules are not looked at any more.
const STEPS_MAX: usize = 20_000_000;
/// Most earlier rules that are named.
const AUTHORS_MAX: usize = 3;

/// A rule that is never reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Dead<'a> {
    pub(super) policy: &'a ObjectKey,
    pub(super) direction: Direction,
    pub(super) index: usize,
    pub(super) why: Why<'a>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Why<'a> {
    /// An earlier rule of the same list says the same.
    Duplicate(usize),
    /// An earlier rule of the same list decides everything.
    AfterEverything(usize),
    /// Earlier rules decide all that it matches.
    Shadowed(Vec<(&'a ObjectKey, usize)>),
    /// An earlier tier ends in Deny for all endpoints of the policy, and nothing in it passes.
    TierEnds(&'a str, &'a ObjectKey),
}

/// All of them, and whether everything was looked at.
pub(super) fn rules(world: &World) -> (Vec<Dead<'_>>, bool) {
    let mut dead = Vec::new();
    let mut steps = 0;
    for direction in Direction::BOTH {
        let order = Order::of(world, direction);
        for place in 0..order.policies.len() {
            order.dead_of(place, &mut dead, &mut steps);
        }
    }
    (dead, steps < STEPS_MAX)
}

/// The policies of one direction in the order in which they are asked.
struct Order<'a> {
    direction: Direction,
    policies: Vec<Placed<'a>>,
    /// The first rule of each tier that passes: what comes after it may not be asked.
    first_pass: BTreeMap<&'a str, (usize, usize)>,
}

struct Placed<'a> {
    tier: &'a str,
    ends_in_deny: bool,
    key: &'a ObjectKey,
    spec: &'a PolicySpec,
    rules: &'a [Rule],
}

impl<'a> Order<'a> {
    fn of(world: &'a World, direction: Direction) -> Self {
        let placed = world.policies.iter().filter_map(|(key, spec)| {
            let (tier, tier_spec) = world.tiers.get_key_value(&spec.tier)?;
            let ends_in_deny = tier_spec.default_action == DefaultAction::Deny;
            let rules = spec.rules(direction)?;
            Some((tier_spec.order, Placed { tier, ends_in_deny, key, spec, rules }))
        });
        let mut policies: Vec<_> = placed.collect();
        policies.sort_by_key(|(order, placed)| (*order, placed.tier, placed.spec.order, placed.key));
        let policies: Vec<Placed<'a>> = policies.into_iter().map(|(_, placed)| placed).collect();
        let mut first_pass = BTreeMap::new();
        for (place, policy) in policies.iter().enumerate() {
            let pass = policy.rules.iter().position(|rule| rule.action == Action::Pass);
            if let Some(index) = pass {
                first_pass.entry(policy.tier).or_insert((place, index));
            }
        }
        Self { direction, policies, first_pass }
    }

    fn dead_of(&self, place: usize, dead: &mut Vec<Dead<'a>>, steps: &mut usize) {
        let policy = &self.policies[place];
        let before: Vec<usize> =
            (0..place).filter(|earlier| self.always_with(*earlier, place, steps)).collect();
        let add = |index, why| Dead { policy: policy.key, direction: self.direction, index, why };
        let ending = before.iter().map(|earlier| &self.policies[*earlier]).find(|earlier| {
            earlier.tier != policy.tier && earlier.ends_in_deny && !self.first_pass.contains_key(earlier.tier)
        });
        if let Some(earlier) = ending {
            let why = |_| Why::TierEnds(earlier.tier, earlier.key);
            dead.extend((0..policy.rules.len()).map(|index| add(index, why(index))));
            return;
        }
        let everything =
            policy.rules.iter().position(|rule| rule.action != Action::Log && matches_everything(rule));
        for (index, rule) in policy.rules.iter().enumerate() {
            if *steps >= STEPS_MAX {
                return;
            }
            *steps = steps.saturating_add(index);
            let same = policy.rules[..index].iter().position(|earlier| earlier == rule);
            let why = match (same, everything) {
                (Some(same), _) => Some(Why::Duplicate(same)),
                (None, Some(everything)) if everything < index => Some(Why::AfterEverything(everything)),
                _ => self.shadow(place, index, &before, steps).map(Why::Shadowed),
            };
            dead.extend(why.map(|why| add(index, why)));
        }
    }

    /// Whether an earlier policy counts whenever and wherever a later one does.
    fn always_with(&self, earlier: usize, later: usize, steps: &mut usize) -> bool {
        if *steps >= STEPS_MAX {
            return false;
        }
        *steps += 1;
        let (earlier, later) = (&self.policies[earlier], &self.policies[later]);
        let counts = earlier.spec.mode == Mode::Enforce || later.spec.mode == Mode::Audit;
        let (wide, narrow) = (earlier.spec, later.spec);
        let begins = wide.valid_from.is_none_or(|from| narrow.valid_from.is_some_and(|other| from <= other));
        let ends =
            wide.valid_until.is_none_or(|until| narrow.valid_until.is_some_and(|other| other <= until));
        counts
            && (wide.apply_on_forward || !narrow.apply_on_forward)
            && begins
            && ends
            && namespace_within(later.key, earlier.key)
            && implies(&narrow.applies_to, &wide.applies_to)
    }

    /// The earlier rules that leave nothing of this one, if they do.
    fn shadow(
        &self,
        place: usize,
        index: usize,
        before: &[usize],
        steps: &mut usize,
    ) -> Option<Vec<(&'a ObjectKey, usize)>> {
        let policy = &self.policies[place];
        let rule = &policy.rules[index];
        let whole = PortSet::of(rule);
        if whole.is_empty() {
            return None;
        }
        let mut authors = Vec::new();
        let mut any = false;
        for part in parts(policy.key, rule) {
            any = true;
            let mut left = whole.clone();
            for (earlier, number) in self.deciding_before(place, index, before) {
                if *steps >= STEPS_MAX {
                    return None;
                }
                let by = &self.policies[earlier];
                let candidate = &by.rules[number];
                if !covers(by.key, candidate, &part, steps) {
                    continue;
                }
                let before = left.clone();
                left.take(candidate, rule);
                if left != before && authors.len() < AUTHORS_MAX && !authors.contains(&(by.key, number)) {
                    authors.push((by.key, number));
                }
                if left.is_empty() {
                    break;
                }
            }
            if !left.is_empty() {
                return None;
            }
        }
        any.then_some(authors)
    }

    /// Rules that, where they match, keep a later one from being asked. The same list first: that is the nearest.
    fn deciding_before(
        &self,
        place: usize,
        index: usize,
        before: &[usize],
    ) -> impl Iterator<Item = (usize, usize)> {
        let tier = self.policies[place].tier;
        let own = (0..index).map(move |number| (place, number));
        let others = before.iter().rev();
        let others =
            others.flat_map(|earlier| (0..self.policies[*earlier].rules.len()).map(|n| (*earlier, n)));
        own.chain(others).filter(move |(earlier, number)| {
            let by = &self.policies[*earlier];
            match by.rules[*number].action {
                Action::Log => false,
                Action::Pass => by.tier == tier,
                Action::Allow | Action::Deny => {
                    // In another tier a connection may have been passed on before it came here.
                    let asked = self.first_pass.get(by.tier).is_none_or(|pass| (*earlier, *number) < *pass);
                    by.tier == tier || asked
                }
            }
        })
    }
}
