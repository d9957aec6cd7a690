//! Whether an earlier rule matches everything that a part of a later one does. "No" means "not certain".

use bulkhead_model::labels::KIND_LABEL;
use bulkhead_model::policy::{Action, IpVersion, Peer, Rule, ServiceName};
use bulkhead_model::{ObjectKey, Prefix};

use super::implies::{implies, implies_of_entities, namespace_within};
use super::ports::source_ports_within;

/// A part of a rule: one of its peers, within one block of addresses.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part<'a> {
    /// The rule's policy.
    pub(super) policy: &'a ObjectKey,
    pub(super) rule: &'a Rule,
    /// `None`: any.
    pub(super) peer: Option<&'a Peer>,
    /// Within one family.
    pub(super) block: Prefix,
}

/// The parts that a rule consists of.
pub(super) fn parts<'a>(policy: &'a ObjectKey, rule: &'a Rule) -> impl Iterator<Item = Part<'a>> {
    let any = rule.peers.is_empty().then_some(None);
    let peers = rule.peers.iter().map(Some).chain(any);
    peers.flat_map(move |peer| {
        let families = [IpVersion::V4, IpVersion::V6].into_iter();
        let families = families.filter(|family| rule.ip_version.is_none_or(|version| version == *family));
        families.flat_map(move |family| {
            let cidrs = peer.map(|peer| peer.cidrs.as_slice()).unwrap_or_default();
            let whole = cidrs.is_empty().then_some(family.block());
            let blocks = cidrs.iter().copied().filter(move |block| family.block().contains(*block));
            blocks.chain(whole).map(move |block| Part { policy, rule, peer, block })
        })
    })
}

/// Whether a rule of another policy, or of the same, matches all addresses of a part, at all endpoints that the part's
/// policy selects and from all source ports. Destination ports are another matter.
pub(super) fn covers(policy: &ObjectKey, rule: &Rule, part: &Part<'_>, steps: &mut usize) -> bool {
    let family = rule.ip_version.is_none_or(|version| version.block().contains(part.block));
    *steps = steps.saturating_add(1 + rule.peers.len());
    family
        && own_covers(rule, part.rule)
        && source_ports_within(part.rule, rule)
        && (rule.peers.is_empty() || rule.peers.iter().any(|wide| peer_covers(policy, wide, part)))
}

/// What is asked of the endpoint's addresses means something else to a rule that denies.
fn own_covers(wide: &Rule, narrow: &Rule) -> bool {
    let Some(own) = wide.own.as_deref() else { return true };
    let same_reading = (wide.action == Action::Deny) == (narrow.action == Action::Deny);
    let addressed = !own.cidrs.is_empty() || !own.not_cidrs.is_empty();
    narrow.own.as_deref() == Some(own) && (same_reading || !addressed)
}

fn peer_covers(policy: &ObjectKey, wide: &Peer, part: &Part<'_>) -> bool {
    let any = Peer::default();
    let narrow = part.peer.unwrap_or(&any);
    blocks_cover(wide, narrow, part.block)
        && workload_covers(policy, wide, narrow, part.policy)
        && excluded_covers(wide, narrow)
        && kept_in(wide.network_sets.as_ref(), narrow.network_sets.as_ref(), |wide, narrow| {
            implies(narrow, wide) && namespace_within(part.policy, policy)
        })
        && kept_in(wide.hosts.as_ref(), narrow.hosts.as_ref(), |wide, narrow| implies(narrow, wide))
        && domains_cover(&wide.domains, &narrow.domains)
        && services_cover(policy, &wide.services, part.policy, &narrow.services)
}

/// A criterion of the wide peer needs one of the narrow peer that implies it.
fn kept_in<T>(wide: Option<T>, narrow: Option<T>, implied: impl Fn(T, T) -> bool) -> bool {
    match (wide, narrow) {
        (None, _) => true,
        (Some(wide), Some(narrow)) => implied(wide, narrow),
        (Some(_), None) => false,
    }
}

fn blocks_cover(wide: &Peer, narrow: &Peer, block: Prefix) -> bool {
    let inside = wide.cidrs.is_empty() || wide.cidrs.iter().any(|cidr| cidr.contains(block));
    let outside = wide.not_cidrs.iter().all(|cidr| {
        let apart = !cidr.contains(block) && !block.contains(*cidr);
        apart || narrow.not_cidrs.iter().any(|excluded| excluded.contains(*cidr))
    });
    inside && outside
}

/// What is asked of one and the same workload.
fn workload_covers(policy: &ObjectKey, wide: &Peer, narrow: &Peer, of: &ObjectKey) -> bool {
    if !asks_of_workload(wide) {
        return true;
    }
    if !asks_of_workload(narrow) {
        return false;
    }
    let selected = match (&wide.selector, &narrow.selector) {
        (Some(wide), Some(narrow)) => implies_of_entities(narrow, wide),
        (Some(_), None) => false,
        // Without a selector endpoints and network sets are meant, and nothing of another kind.
        (None, narrow) => !narrow.as_ref().is_some_and(|selector| selector.reads(KIND_LABEL)),
    };
    let namespaced = match (&wide.namespace_selector, &narrow.namespace_selector) {
        (None, None) => namespace_within(of, policy),
        (None, Some(_)) => policy.namespace.is_none(),
        (Some(wide), narrow) => narrow.as_ref() == Some(wide),
    };
    let among = |few: &[String], many: &[String]| few.iter().all(|one| many.contains(one));
    let accounts = wide.service_accounts.is_empty()
        || (!narrow.service_accounts.is_empty() && among(&narrow.service_accounts, &wide.service_accounts));
    let differing = wide.not_same_labels.is_empty()
        || (among(&wide.not_same_labels, &narrow.not_same_labels)
            && among(&narrow.not_same_labels, &wide.not_same_labels));
    selected && namespaced && accounts && among(&wide.same_labels, &narrow.same_labels) && differing
}

fn asks_of_workload(peer: &Peer) -> bool {
    peer.selector.is_some()
        || peer.namespace_selector.is_some()
        || !peer.service_accounts.is_empty()
        || !peer.same_labels.is_empty()
        || !peer.not_same_labels.is_empty()
}

/// Whatever the wide peer excludes, the narrow one excludes as well.
fn excluded_covers(wide: &Peer, narrow: &Peer) -> bool {
    kept_in(wide.not_selector.as_ref(), narrow.not_selector.as_ref(), |wide, narrow| {
        implies_of_entities(wide, narrow)
    })
}

fn domains_cover(wide: &[String], narrow: &[String]) -> bool {
    let covered = |name: &String| {
        wide.iter().any(|pattern| {
            let below = pattern
                .strip_prefix('*')
                .is_some_and(|parent| name.strip_suffix(parent).is_some_and(|rest| !rest.is_empty()));
            pattern == name || below
        })
    };
    wide.is_empty() || (!narrow.is_empty() && narrow.iter().all(covered))
}

fn services_cover(policy: &ObjectKey, wide: &[ServiceName], of: &ObjectKey, narrow: &[ServiceName]) -> bool {
    let whole = |policy: &ObjectKey, service: &ServiceName| {
        (service.namespace.clone().or_else(|| policy.namespace.clone()), service.name.clone())
    };
    let covered = |service: &ServiceName| wide.iter().any(|one| whole(policy, one) == whole(of, service));
    wide.is_empty() || (!narrow.is_empty() && narrow.iter().all(covered))
}

/// Whether a rule matches every connection of every endpoint.
pub(super) fn matches_everything(rule: &Rule) -> bool {
    any_peer(rule) && super::ports::any_port(rule) && rule.ip_version.is_none() && rule.own.is_none()
}

/// Whether a rule matches every other end.
pub(super) fn any_peer(rule: &Rule) -> bool {
    let families = [IpVersion::V4, IpVersion::V6];
    let whole = |family: IpVersion| {
        let alone = |peer: &&Peer| Peer { cidrs: vec![], ..(*peer).clone() }.is_any();
        rule.peers
            .iter()
            .filter(alone)
            .any(|peer| peer.cidrs.is_empty() || peer.cidrs.contains(&family.block()))
    };
    rule.peers.is_empty() || families.into_iter().all(whole)
}
