//! What rules ask of the endpoint that they are evaluated at.

use std::collections::BTreeMap;

use bulkhead_model::entity::matches;
use bulkhead_model::policy::{Action, Own, Rule};
use bulkhead_model::{Entity, Prefix, Selector};

/// Families of addresses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(super) struct Families {
    pub(super) v4: bool,
    pub(super) v6: bool,
}

/// For what each rule asks of the endpoint itself (and whether the rule denies), the families in which it is so.
pub(super) fn own_families<'a>(
    rules: impl Iterator<Item = &'a Rule>,
    endpoint: &Entity,
) -> BTreeMap<(Own, bool), Families> {
    let asking = rules.filter_map(|rule| Some((rule.own.as_deref()?, rule.action == Action::Deny)));
    asking.map(|(own, denies)| ((own.clone(), denies), families_of(own, denies, endpoint))).collect()
}

fn families_of(own: &Own, denies: bool, endpoint: &Entity) -> Families {
    let holds = |selector: &Option<Selector>| selector.as_ref().map(|s| matches(s, &endpoint.labels));
    if holds(&own.selector) == Some(false) || holds(&own.not_selector) == Some(true) {
        return Families::default();
    }
    if own.cidrs.is_empty() && own.not_cidrs.is_empty() {
        return Families { v4: true, v6: true };
    }
    let inside = |prefix: &Prefix| {
        let within = |blocks: &[Prefix]| blocks.iter().any(|block| block.contains(*prefix));
        (own.cidrs.is_empty() || within(&own.cidrs)) && !within(&own.not_cidrs)
    };
    let family = |v4: bool| {
        let mut addresses = endpoint.prefixes.iter().filter(|prefix| prefix.address().is_ipv4() == v4);
        if denies { addresses.any(inside) } else { addresses.all(inside) }
    };
    Families { v4: family(true), v6: family(false) }
}
