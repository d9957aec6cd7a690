//! What policies say about things that are not there. Only where an inventory is among the manifests.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bulkhead_model::labels::{
    DOMAIN_LABEL, NAMESPACE_LABEL, NAMESPACE_LABELS_PREFIX, RESERVED_PREFIX, SERVICE_LABEL,
};
use bulkhead_model::policy::{CALICO_PROFILES_TIER, Peer, PolicySpec, Rule};
use bulkhead_model::ports::PortMatch;
use bulkhead_model::selector::Restriction;
use bulkhead_model::suggest::edits;
use bulkhead_model::{Direction, Entity, Kind, ObjectKey, Resource, Selector, entity, facts};

use super::codes::Code;
use super::words::{compared, labels_of};
use super::{Found, object_of, rule_path};
use crate::decide::{account, in_namespace, is_name_of, is_selected_by_default, kind, selects};
use crate::world::World;

/// Most values of a label that are remembered; of one with more, any value is a likely one.
const VALUES_MAX: usize = 1_000;
/// Shortest word that can be a misspelling of another.
const WORD_MIN: usize = 3;

/// Labels in use and their values.
#[derive(Default)]
struct Vocabulary<'a>(BTreeMap<&'a str, BTreeSet<&'a str>>);

/// Who is there, by what selectors can mean.
struct Inventory<'a> {
    world: &'a World,
    endpoints: Vec<&'a Entity>,
    by_label: HashMap<(&'a str, &'a str), Vec<&'a Entity>>,
    has_sets: bool,
    has_hosts: bool,
    has_services: bool,
    has_domains: bool,
    /// Of endpoints and network sets.
    selected: Vocabulary<'a>,
    sets: Vocabulary<'a>,
    hosts: Vocabulary<'a>,
    namespaces: Vocabulary<'a>,
}

/// The place that something is said about.
struct Place<'a> {
    policy: &'a ObjectKey,
    path: String,
}

pub(super) fn check(world: &World, objects: &BTreeMap<ObjectKey, Resource>, found: &mut Found) {
    let inventory = Inventory::of(world, objects);
    for (key, policy) in &world.policies {
        // Most places in lists of profiles are not taken.
        if policy.tier != CALICO_PROFILES_TIER {
            inventory.subjects(key, policy, found);
        }
        for direction in Direction::BOTH {
            for (index, rule) in policy.rules(direction).unwrap_or_default().iter().enumerate() {
                inventory.rule(key, policy, direction, rule, &rule_path(direction, index), found);
            }
        }
    }
}

impl<'a> Vocabulary<'a> {
    fn take(&mut self, entity: &'a Entity, prefix: &str) {
        for (key, value) in entity.labels.iter() {
            if let Some(key) = key.strip_prefix(prefix) {
                let values = self.0.entry(key).or_default();
                if values.len() < VALUES_MAX {
                    values.insert(value);
                }
            }
        }
    }

    /// Notes what looks like a typing error; answers whether there is any.
    fn check(&self, place: &Place<'_>, selector: &Selector, found: &mut Found) -> bool {
        let mut misspelt = false;
        for (label, values) in compared(selector.expr()) {
            misspelt |= self.check_label(place, label, found);
            let Some(known) = self.0.get(label).filter(|known| known.len() < VALUES_MAX) else { continue };
            for value in values.iter().filter(|value| !known.contains(&***value)) {
                if let Some(near) = close(value, known.iter().copied()) {
                    let name = place.policy.policy_name();
                    let message = format!("{name}: nothing has {label} == {value:?}; did you mean {near:?}?");
                    found.add(Code::UnknownLabelValue, place.policy, &place.path, message);
                    misspelt = true;
                }
            }
        }
        misspelt
    }

    /// Notes a label that is not in use and looks like one that is; answers whether it does.
    fn check_label(&self, place: &Place<'_>, label: &str, found: &mut Found) -> bool {
        let ours = label.starts_with(RESERVED_PREFIX) || facts::find(label).is_some();
        if ours || self.0.contains_key(label) {
            return false;
        }
        let known = self.0.keys().copied().filter(|key| !key.starts_with(RESERVED_PREFIX));
        let Some(near) = close(label, known) else { return false };
        let name = place.policy.policy_name();
        let message = format!("{name}: nothing has a label {label:?}; did you mean {near}?");
        found.add(Code::UnknownLabel, place.policy, &place.path, message);
        true
    }
}

/// The word in use that another is most likely meant to be.
fn close<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let length = word.chars().count();
    let limit = (length / 4).max(1);
    // web1 and web2 are two things.
    let plain = |text: &str| text.replace(|c: char| c.is_ascii_digit(), "");
    known
        .filter(|one| length >= WORD_MIN && one.chars().count().abs_diff(length) <= limit)
        .filter(|one| plain(one) != plain(word))
        .map(|one| (edits(word, one), one))
        .filter(|(edits, _)| *edits <= limit)
        .min()
        .map(|(_, one)| one)
}

impl<'a> Inventory<'a> {
    fn of(world: &'a World, objects: &BTreeMap<ObjectKey, Resource>) -> Self {
        let is = |entity: &Entity, wanted: Kind| kind(entity) == Some(wanted.as_str());
        let any = |condition: &dyn Fn(&Entity) -> bool| world.entities.values().any(condition);
        let mut inventory = Self {
            world,
            endpoints: world.entities.values().filter(|entity| entity.is_endpoint()).collect(),
            by_label: HashMap::new(),
            has_sets: any(&|entity| is(entity, Kind::NetworkSet)),
            has_hosts: any(&|entity| is(entity, Kind::Host)),
            has_services: objects
                .keys()
                .any(|key| matches!(key.kind, Kind::Service | Kind::EndpointSlice | Kind::Pod)),
            has_domains: objects.keys().any(|key| key.kind == Kind::NameTable),
            selected: Vocabulary::default(),
            sets: Vocabulary::default(),
            hosts: Vocabulary::default(),
            namespaces: Vocabulary::default(),
        };
        for entity in world.entities.values() {
            for label in entity.labels.iter() {
                inventory.by_label.entry(label).or_default().push(entity);
            }
            if is_selected_by_default(entity) {
                inventory.selected.take(entity, "");
                inventory.namespaces.take(entity, NAMESPACE_LABELS_PREFIX);
            }
            if is(entity, Kind::NetworkSet) {
                inventory.sets.take(entity, "");
            }
            if is(entity, Kind::Host) {
                inventory.hosts.take(entity, "");
            }
        }
        inventory
    }

    /// Whether a condition that includes this selector holds of anything.
    fn any_with(&self, selector: Option<&Selector>, condition: impl Fn(&Entity) -> bool) -> bool {
        match selector.map(Selector::restriction) {
            Some(Restriction::Nothing) => false,
            Some(Restriction::OneOf(label, values)) => {
                let of = |value| self.by_label.get(&(&*label, value)).into_iter().flatten();
                values.iter().flat_map(|value| of(&**value)).any(|entity| condition(entity))
            }
            Some(Restriction::None | Restriction::Present(_)) | None => self.any(&condition),
        }
    }

    fn subjects(&self, key: &ObjectKey, policy: &PolicySpec, found: &mut Found) {
        if self.endpoints.is_empty() {
            return;
        }
        let place = Place { policy: key, path: "spec.appliesTo".into() };
        let misspelt = self.selected.check(&place, &policy.applies_to, found);
        let selected = |entity: &Entity| entity.is_endpoint() && selects(key, policy, entity);
        let selected = self.any_with(Some(&policy.applies_to), selected);
        if !selected && !misspelt {
            let message = format!("{} selects no endpoint of the inventory", key.policy_name());
            found.add(Code::SelectsNothing, key, place.path, message);
        }
    }

    fn rule(
        &self,
        key: &ObjectKey,
        policy: &PolicySpec,
        direction: Direction,
        rule: &Rule,
        path: &str,
        found: &mut Found,
    ) {
        let field = match direction {
            Direction::Ingress => "from",
            Direction::Egress => "to",
        };
        for (index, peer) in rule.peers.iter().enumerate() {
            self.peer(key, peer, &format!("{path}.{field}[{index}]"), found);
        }
        if let Some(own) = rule.own.as_deref() {
            for (name, selector) in [("selector", &own.selector), ("notSelector", &own.not_selector)] {
                if let Some(selector) = selector {
                    let path = format!("{path}.endpoint.{name}");
                    self.selected.check(&Place { policy: key, path }, selector, found);
                }
            }
        }
        self.named_ports(key, policy, direction, rule, path, found);
    }

    fn peer(&self, key: &ObjectKey, peer: &Peer, path: &str, found: &mut Found) {
        let place = |name: &str| Place { policy: key, path: format!("{path}.{name}") };
        if !self.endpoints.is_empty() {
            self.workloads(key, peer, path, found);
        }
        if let Some(sets) = peer.network_sets.as_ref().filter(|_| self.has_sets || !self.endpoints.is_empty())
        {
            let fits = |entity: &Entity| {
                kind(entity) == Some(Kind::NetworkSet.as_str())
                    && in_namespace(key, entity)
                    && sets.matches(&entity.labels)
            };
            self.look(&place("networkSets"), sets, &self.sets, "no network set", &fits, found);
        }
        if let Some(hosts) = peer.hosts.as_ref().filter(|_| self.has_hosts) {
            let fits =
                |entity: &Entity| kind(entity) == Some(Kind::Host.as_str()) && hosts.matches(&entity.labels);
            self.look(&place("hosts"), hosts, &self.hosts, "no host", &fits, found);
        }
        for domain in peer.domains.iter().filter(|_| self.has_domains) {
            if !self
                .any(&|entity| entity.labels.get(DOMAIN_LABEL).is_some_and(|name| is_name_of(domain, name)))
            {
                let message = format!("{}: no address is known of {domain}", key.policy_name());
                found.add(Code::UnknownDomain, key, format!("{path}.domains"), message);
            }
        }
        for service in peer.services.iter().filter(|_| self.has_services) {
            let namespace = service.namespace.as_deref().or(key.namespace.as_deref());
            let serves = |entity: &Entity| {
                entity.labels.get(SERVICE_LABEL) == Some(&service.name)
                    && entity.labels.get(NAMESPACE_LABEL) == namespace
            };
            if !self.any(&serves) {
                let message = format!("{}: no EndpointSlice is of the service {service}", key.policy_name());
                found.add(Code::UnknownService, key, format!("{path}.services"), message);
            }
        }
    }

    fn any(&self, condition: &dyn Fn(&Entity) -> bool) -> bool {
        self.world.entities.values().any(condition)
    }

    fn look(
        &self,
        place: &Place<'_>,
        selector: &Selector,
        words: &Vocabulary<'_>,
        nobody: &str,
        fits: &dyn Fn(&Entity) -> bool,
        found: &mut Found,
    ) {
        let misspelt = words.check(place, selector, found);
        if !misspelt && !self.any(fits) {
            let message = format!("{}: {nobody} matches {selector}", place.policy.policy_name());
            found.add(Code::PeerMatchesNothing, place.policy, &place.path, message);
        }
    }

    /// Selectors, namespaces, accounts and labels in common: all must hold of one workload or network set.
    fn workloads(&self, key: &ObjectKey, peer: &Peer, path: &str, found: &mut Found) {
        let place = |name: &str| Place { policy: key, path: format!("{path}.{name}") };
        let mut misspelt = false;
        let selectors = [
            ("selector", &peer.selector, &self.selected),
            ("notSelector", &peer.not_selector, &self.selected),
            ("namespaceSelector", &peer.namespace_selector, &self.namespaces),
        ];
        for (name, selector, words) in selectors {
            if let Some(selector) = selector {
                misspelt |= words.check(&place(name), selector, found);
            }
        }
        let lists = [("sameLabels", &peer.same_labels), ("notSameLabels", &peer.not_same_labels)];
        for (name, labels) in lists {
            for label in labels {
                misspelt |= self.selected.check_label(&place(name), label, found);
            }
        }
        let criteria = [
            ("selector", peer.selector.is_some()),
            ("namespaceSelector", peer.namespace_selector.is_some()),
            ("serviceAccounts", !peer.service_accounts.is_empty()),
            ("sameLabels", !peer.same_labels.is_empty()),
            ("notSameLabels", !peer.not_same_labels.is_empty()),
        ];
        let Some((first, _)) = criteria.iter().find(|(_, given)| *given) else { return };
        if misspelt || self.any_with(peer.selector.as_ref(), |entity| fits(key, peer, entity)) {
            return;
        }
        let given: Vec<&str> = criteria.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect();
        let what = match (&peer.selector, given.as_slice()) {
            (Some(selector), ["selector"]) => selector.to_string(),
            _ => format!("{} together", given.join(", ")),
        };
        let message = format!("{}: nobody in the inventory matches {what}", key.policy_name());
        found.add(Code::PeerMatchesNothing, key, place(first).path, message);
    }

    fn named_ports(
        &self,
        key: &ObjectKey,
        policy: &PolicySpec,
        direction: Direction,
        rule: &Rule,
        path: &str,
        found: &mut Found,
    ) {
        let subject = |entity: &Entity| entity.is_endpoint() && selects(key, policy, entity);
        let applies_to = Some(&policy.applies_to);
        for port in rule.ports.iter().filter(|port| matches!(port, PortMatch::Named { .. })) {
            // Of a policy for nobody that is said already.
            if !self.any_with(applies_to, subject) {
                return;
            }
            let gives = |entity: &Entity| entity.ports.iter().any(|named| port.names(named));
            let given = match direction {
                Direction::Ingress => self.any_with(applies_to, |entity| subject(entity) && gives(entity)),
                Direction::Egress => self.any(&gives),
            };
            if !given {
                let name = object_of(key).policy_name();
                let message = format!("{name}: no destination in the inventory names a port {port}");
                found.add(Code::UnknownNamedPort, key, format!("{path}.ports"), message);
            }
        }
    }
}

/// Whether an entity could be the other end, for some endpoint of the policy.
fn fits(key: &ObjectKey, peer: &Peer, entity: &Entity) -> bool {
    let namespaced = match &peer.namespace_selector {
        None => in_namespace(key, entity),
        Some(selector) => selector.of_namespaces().matches(&entity.labels),
    };
    let labelled = labels_of(peer).all(|label| entity.labels.get(label).is_some());
    let asked = peer.selector.as_ref().is_none_or(|selector| entity::matches(selector, &entity.labels));
    let sort = is_selected_by_default(entity)
        || peer.selector.as_ref().is_some_and(|s| s.reads(bulkhead_model::labels::KIND_LABEL));
    namespaced && asked && sort && labelled && account(&peer.service_accounts, entity)
}
