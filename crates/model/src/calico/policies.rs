//! Tiers, policies and profiles of Calico.

use super::PROFILES_MAX;
use super::rules::{refuse_untracked, rule};
use super::selectors::{of_endpoints, of_namespaces, of_service_accounts};
use crate::document::{Decoder, Fields, Node, Value};
use crate::kind::Kind;
use crate::kubernetes;
use crate::labels::KIND_LABEL;
use crate::meaning::{Bequest, Meaning, Parent, profile_label};
use crate::policy::{
    CALICO_PROFILES_TIER, DEFAULT_TIER, DefaultAction, KUBERNETES_ADMIN_TIER, KUBERNETES_BASELINE_TIER, Mode,
    Order, PolicySpec, RULES_MAX, Rule, TierSpec, boolean, bounded_source_ports,
};
use crate::resource::ObjectKey;
use crate::selector::Selector;
use crate::verdict::Direction;

/// Calico's fixed tiers: name, order, default action, and what they are called here.
const FIXED_TIERS: [(&str, f64, DefaultAction, &str); 5] = [
    ("default", 1_000_000.0, DefaultAction::Deny, DEFAULT_TIER),
    ("kube-admin", 1_000.0, DefaultAction::Pass, KUBERNETES_ADMIN_TIER),
    ("kube-baseline", 10_000_000.0, DefaultAction::Pass, KUBERNETES_BASELINE_TIER),
    ("adminnetworkpolicy", 1_000.0, DefaultAction::Pass, KUBERNETES_ADMIN_TIER),
    ("baselineadminnetworkpolicy", 10_000_000.0, DefaultAction::Pass, KUBERNETES_BASELINE_TIER),
];

/// A tier without an order comes after those that have one, but before the profiles.
const LAST_ORDER: f64 = f64::MAX;

fn tier_name(name: &str) -> &str {
    FIXED_TIERS.iter().find(|(theirs, ..)| *theirs == name).map_or(name, |(.., ours)| ours)
}

pub(super) fn tier(decoder: &mut Decoder, node: &Node, key: &ObjectKey) -> Option<Meaning> {
    let (order, default_action) = kubernetes::spec(decoder, node, |decoder, node| {
        let mut fields = decoder.fields(node, "the tier")?;
        let order =
            fields.optional(decoder, "order", |decoder, node| decoder.number::<f64>(node, "a number"));
        let default_action = fields.optional(decoder, "defaultAction", |decoder, node| {
            decoder.word(node, &[("Deny", DefaultAction::Deny), ("Pass", DefaultAction::Pass)])
        });
        fields.finish(decoder);
        Some((order, default_action))
    })?;
    if let Some((_, fixed, action, _)) = FIXED_TIERS.iter().find(|(theirs, ..)| *theirs == key.name) {
        #[expect(clippy::float_cmp, reason = "the number must be this very one")]
        let same =
            order.is_none_or(|order| order == *fixed) && default_action.is_none_or(|given| given == *action);
        if !same {
            let message =
                format!("the tier {:?} is fixed: order {fixed}, default action {action:?}", key.name);
            decoder.problem(node.child("spec").unwrap_or(node), message);
            return None;
        }
        return Some(Meaning::default());
    }
    let order = Order::new(order.unwrap_or(LAST_ORDER));
    let spec = TierSpec { order, default_action: default_action.unwrap_or(DefaultAction::Deny) };
    Some(Meaning { tiers: vec![(key.name.clone(), spec)], ..Meaning::default() })
}

/// What is to become of a staged policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Staged {
    Set,
    Ignore,
}

pub(super) fn policy(decoder: &mut Decoder, node: &Node, key: &ObjectKey) -> Option<Meaning> {
    let is_staged = matches!(
        key.kind,
        Kind::StagedNetworkPolicy | Kind::StagedGlobalNetworkPolicy | Kind::StagedKubernetesNetworkPolicy
    );
    let (mut spec, staged) = kubernetes::spec(decoder, node, |decoder, node| {
        let mut fields = decoder.fields(node, "the policy")?;
        let staged = if is_staged { fields.optional(decoder, "stagedAction", staged_action) } else { None };
        let spec = if key.kind == Kind::StagedKubernetesNetworkPolicy {
            kubernetes::network_policy_spec(decoder, node, fields)
        } else {
            policy_spec(decoder, fields, key)
        };
        Some((spec?, staged))
    })?;
    if staged == Some(Staged::Ignore) {
        return Some(Meaning::default());
    }
    if is_staged {
        spec.mode = Mode::Audit;
    }
    Some(Meaning { policies: vec![(key.clone(), spec)], ..Meaning::default() })
}

fn staged_action(decoder: &mut Decoder, node: &Node) -> Option<Staged> {
    if node.as_str() == Some("Delete") {
        decoder.problem(node, "staging that a policy is deleted is not supported: it cannot be audited yet");
        return None;
    }
    decoder.word(node, &[("Set", Staged::Set), ("Learn", Staged::Set), ("Ignore", Staged::Ignore)])
}

fn policy_spec(decoder: &mut Decoder, mut fields: Fields<'_>, key: &ObjectKey) -> Option<PolicySpec> {
    let global = key.namespace.is_none();
    let tier = fields.optional(decoder, "tier", crate::resource::name);
    let order = fields.optional(decoder, "order", |decoder, node| decoder.number::<f64>(node, "a number"));
    let selector = fields.optional(decoder, "selector", of_endpoints);
    let accounts = fields.optional(decoder, "serviceAccountSelector", of_service_accounts);
    let (mut namespaces, mut forward) = (None, None);
    if global {
        forward = fields.optional(decoder, "applyOnForward", boolean);
        namespaces = fields.optional(decoder, "namespaceSelector", of_namespaces);
        refuse_untracked(decoder, &mut fields);
    }
    let types = fields.optional(decoder, "types", |decoder, node| {
        decoder.list(node, 2, |decoder, node| {
            decoder.word(node, &[("Ingress", Direction::Ingress), ("Egress", Direction::Egress)])
        })
    });
    let mut rules = |decoder: &mut Decoder, name, direction| {
        fields.optional(decoder, name, |decoder, node| {
            let rules =
                decoder.list(node, RULES_MAX, |decoder, node| rule(decoder, node, direction, !global));
            bounded_source_ports(decoder, node, rules)
        })
    };
    let ingress = rules(decoder, "ingress", Direction::Ingress);
    let egress = rules(decoder, "egress", Direction::Egress);
    // Where a policy is rendered before it matches anything; it changes no verdict.
    fields.optional(decoder, "performanceHints", |decoder, node| {
        decoder.list(node, 1, |decoder, node| decoder.word(node, &[("AssumeNeededOnEveryNode", ())]))
    });
    let fields_at = fields.position();
    fields.finish(decoder);
    // Rules present decide what it speaks of, if it does not say: none means ingress.
    let types = types.filter(|types| !types.is_empty()).unwrap_or_else(|| {
        let has = |rules: &Option<Vec<Rule>>| rules.as_ref().is_some_and(|rules| !rules.is_empty());
        match (has(&ingress), has(&egress)) {
            (_, false) => vec![Direction::Ingress],
            (false, true) => vec![Direction::Egress],
            (true, true) => vec![Direction::Ingress, Direction::Egress],
        }
    });
    let spoken =
        |direction, rules: Option<Vec<Rule>>| types.contains(&direction).then(|| rules.unwrap_or_default());
    let named =
        ingress.iter().chain(&egress).flatten().flat_map(|rule| &rule.peers).flat_map(|peer| &peer.services);
    if let Some(service) = named.into_iter().find(|service| global && service.namespace.is_none()) {
        let message = format!("the service {:?} needs its namespace: this policy is in none", service.name);
        decoder.problem_at(fields_at, message, None);
        return None;
    }
    // In a namespace are workloads; host endpoints are in none.
    let workloads = (!global).then(|| Selector::equals(KIND_LABEL, Kind::Workload.as_str()));
    let parts = workloads.into_iter().chain(namespaces).chain(accounts).chain(selector);
    let spec = PolicySpec {
        tier: tier_name(tier.as_deref().unwrap_or("default")).into(),
        order: order.map_or(Order::LAST, Order::new),
        apply_on_forward: forward.unwrap_or_default(),
        ingress: spoken(Direction::Ingress, ingress),
        egress: spoken(Direction::Egress, egress),
        ..PolicySpec::new(Selector::all_of(parts))
    };
    spec.can_be_forwarded(decoder, fields_at)?;
    Some(spec)
}

/// A profile is asked after all tiers, in the order of the endpoint's list: one policy for each place in it.
pub(super) fn profile(decoder: &mut Decoder, node: &Node, key: &ObjectKey) -> Option<Meaning> {
    let (labels, ingress, egress) = kubernetes::spec(decoder, node, |decoder, node| {
        if node.value == Value::Null {
            return Some(Default::default());
        }
        let mut fields = decoder.fields(node, "the profile")?;
        let labels = fields.optional(decoder, "labelsToApply", crate::resource::decode_labels);
        let mut rules = |decoder: &mut Decoder, name, direction| {
            fields.optional(decoder, name, |decoder, node| {
                let rules =
                    decoder.list(node, RULES_MAX, |decoder, node| rule(decoder, node, direction, false));
                bounded_source_ports(decoder, node, rules)
            })
        };
        let ingress = rules(decoder, "ingress", Direction::Ingress).unwrap_or_default();
        let egress = rules(decoder, "egress", Direction::Egress).unwrap_or_default();
        fields.finish(decoder);
        Some((labels.unwrap_or_default(), ingress, egress))
    })?;
    let at_place = |place: usize| {
        let order = u32::try_from(place).map_or(Order::LAST, |place| Order::new(place.into()));
        let spec = PolicySpec {
            tier: CALICO_PROFILES_TIER.into(),
            order,
            ingress: Some(ingress.clone()),
            egress: Some(egress.clone()),
            ..PolicySpec::new(Selector::equals(&profile_label(place), &key.name))
        };
        (ObjectKey { name: format!("{}#{place}", key.name), ..key.clone() }, spec)
    };
    Some(Meaning {
        policies: (0..PROFILES_MAX).map(at_place).collect(),
        bequests: vec![Bequest { from: Parent::Profile(key.name.clone()), labels, posture: None }],
        ..Meaning::default()
    })
}
