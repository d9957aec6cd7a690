//! Tiers, policies and rules.

use serde_json::{Map, Value as Json, json};

use crate::address::Prefix;
use crate::document::{Decoder, Node, Position, Value};
use crate::labels::is_label_key;
use crate::ports::PortMatch;
use crate::selector::Selector;
use crate::time::Timestamp;
use crate::verdict::Direction;

mod order;
mod peer;
mod source_ports;
mod tier;

pub use order::Order;
pub(crate) use peer::domains;
use peer::peers;
pub use peer::{Own, Peer, ServiceName, ServiceNameError};
pub(crate) use source_ports::bounded as bounded_source_ports;
pub use source_ports::{SOURCE_PORT_PARTS_MAX, SOURCE_PORTS_MAX, SourcePorts, source_port_parts};
pub use tier::{
    CALICO_PROFILES_TIER, DEFAULT_TIER, DefaultAction, KUBERNETES_ADMIN_TIER, KUBERNETES_BASELINE_TIER,
    PREDEFINED_TIERS, TierSpec,
};

/// Most rules in one direction of one policy.
pub const RULES_MAX: usize = 200_000;
/// Most peers in one rule.
pub const PEERS_MAX: usize = 10_000;
/// Most entries in one list of ports, blocks or label keys.
pub const LIST_MAX: usize = 100_000;

/// Whether a policy acts or is only watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Mode {
    /// Its rules are in force.
    #[default]
    Enforce,
    /// Its rules count only in the audit verdict.
    Audit,
}

/// What a rule does with what it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Let it through; no later rule, policy or tier is asked.
    Allow,
    /// Refuse it; nothing later is asked.
    Deny,
    /// Ask the next tier.
    Pass,
    /// Note it and ask the next rule.
    Log,
}

/// A family of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum IpVersion {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpVersion {
    /// The block that holds the whole family.
    pub fn block(self) -> Prefix {
        match self {
            Self::V4 => Prefix::new([0, 0, 0, 0].into(), 0),
            Self::V6 => Prefix::new([0u16; 8].into(), 0),
        }
    }
}

/// `spec` of a Policy.
#[derive(Debug, Clone, PartialEq)]
pub struct PolicySpec {
    /// Name of its tier.
    pub tier: String,
    /// Lower is asked first within the tier; ties by kind, namespace and name.
    pub order: Order,
    /// Whether it acts.
    pub mode: Mode,
    /// From when on it exists, by the clock of the host that enforces it; absent: always did.
    pub valid_from: Option<Timestamp>,
    /// Until when it exists, that second excluded; absent: for good.
    pub valid_until: Option<Timestamp>,
    /// Whether it is also for what the host forwards through the interfaces of the host endpoints that it is for.
    pub apply_on_forward: bool,
    /// The endpoints it is for.
    pub applies_to: Selector,
    /// Rules for connections towards them. An empty list allows nothing; absent says nothing about ingress.
    pub ingress: Option<Vec<Rule>>,
    /// Rules for connections from them. An empty list allows nothing; absent says nothing about egress.
    pub egress: Option<Vec<Rule>>,
}

/// One match and an action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// What to do.
    pub action: Action,
    /// The other end must be one of these; empty means any.
    pub peers: Vec<Peer>,
    /// The destination port must be in one of these; empty means any.
    pub ports: Vec<PortMatch>,
    /// The destination port must be in none of these.
    pub not_ports: Vec<PortMatch>,
    /// What the port of whoever began must be; absent means any, or that there is none.
    pub source_ports: Option<Box<SourcePorts>>,
    /// Only connections of this family.
    pub ip_version: Option<IpVersion>,
    /// Only at endpoints of the policy that match this.
    pub own: Option<Box<Own>>,
    /// Whether a connection that this rule decides is always reported, however many there are.
    pub log: bool,
    /// Of a Deny rule: whoever is refused is told (TCP by a reset, others by an ICMP error) instead of waiting in vain.
    pub reject: bool,
}

impl PolicySpec {
    /// A policy without rules for these endpoints, of the default tier, that comes last in it.
    pub fn new(applies_to: Selector) -> Self {
        Self {
            tier: DEFAULT_TIER.into(),
            order: Order::LAST,
            mode: Mode::Enforce,
            valid_from: None,
            valid_until: None,
            apply_on_forward: false,
            applies_to,
            ingress: None,
            egress: None,
        }
    }

    /// Whether it exists at this time.
    pub fn is_valid_at(&self, now: Timestamp) -> bool {
        self.valid_from.is_none_or(|from| from <= now) && self.valid_until.is_none_or(|until| now < until)
    }

    /// Every service that a rule names.
    pub(crate) fn services(&self) -> impl Iterator<Item = &ServiceName> {
        let rules = self.ingress.iter().chain(&self.egress).flatten();
        rules.flat_map(|rule| &rule.peers).flat_map(|peer| &peer.services)
    }

    /// The rules for one direction, if the policy speaks of it.
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }

    pub(crate) fn decode(decoder: &mut Decoder, node: &Node) -> Option<Self> {
        let mut fields = decoder.fields(node, "the policy")?;
        let tier = fields.optional(decoder, "tier", crate::resource::name);
        let order = fields.optional(decoder, "order", order).unwrap_or(Order::LAST);
        let mode = fields.optional(decoder, "mode", |decoder, node| {
            decoder.word(node, &[("Enforce", Mode::Enforce), ("Audit", Mode::Audit)])
        });
        let valid_from = fields.optional(decoder, "validFrom", Decoder::parsed::<Timestamp>);
        let valid_until = fields.optional(decoder, "validUntil", |decoder, node| {
            let until = decoder.parsed::<Timestamp>(node)?;
            if valid_from.is_some_and(|from| until <= from) {
                decoder.problem(node, "it ends before it begins: validUntil must be after validFrom");
                return None;
            }
            Some(until)
        });
        let apply_on_forward = fields.optional(decoder, "applyOnForward", boolean).unwrap_or_default();
        let applies_to = fields.required(decoder, "appliesTo", selector);
        let ingress = fields.optional(decoder, "ingress", |decoder, node| {
            let rules = decoder
                .list(node, RULES_MAX, |decoder, node| Rule::decode(decoder, node, Direction::Ingress));
            source_ports::bounded(decoder, node, rules)
        });
        let egress = fields.optional(decoder, "egress", |decoder, node| {
            let rules =
                decoder.list(node, RULES_MAX, |decoder, node| Rule::decode(decoder, node, Direction::Egress));
            source_ports::bounded(decoder, node, rules)
        });
        let why = "the default posture is set in Settings, in a Namespace or in a HostEndpoint";
        fields.refuse(decoder, "defaultPosture", why);
        let absent = |name| node.child(name).is_none_or(|node| node.value == Value::Null);
        if absent("ingress") && absent("egress") {
            decoder.problem(node, "a policy needs \"ingress\", \"egress\" or both; [] allows nothing");
        }
        let at = fields.position();
        fields.finish(decoder);
        let spec = Self {
            tier: tier.unwrap_or_else(|| DEFAULT_TIER.into()),
            order,
            mode: mode.unwrap_or_default(),
            valid_from,
            valid_until,
            apply_on_forward,
            applies_to: applies_to?,
            ingress,
            egress,
        };
        spec.can_be_forwarded(decoder, at)?;
        Some(spec)
    }

    /// What is forwarded has no end that is the endpoint's own, so no rule may ask for one.
    pub(crate) fn can_be_forwarded(&self, decoder: &mut Decoder, at: Position) -> Option<()> {
        let mut rules = self.ingress.iter().chain(&self.egress).flatten();
        if self.apply_on_forward && rules.any(|rule| rule.own.is_some()) {
            let why = "applyOnForward: what a host forwards comes from elsewhere and goes elsewhere, so no rule may ask \
                       about the endpoint's own side; use two policies";
            decoder.problem_at(at, why, None);
            return None;
        }
        Some(())
    }

    pub(crate) fn to_json(&self) -> Json {
        let Self {
            tier,
            order,
            mode,
            valid_from,
            valid_until,
            apply_on_forward,
            applies_to,
            ingress,
            egress,
        } = self;
        let mut spec = Map::new();
        spec.insert("tier".into(), json!(tier));
        if order.number().is_some() {
            spec.insert("order".into(), order.to_json());
        }
        if *mode == Mode::Audit {
            spec.insert("mode".into(), json!("Audit"));
        }
        for (name, time) in [("validFrom", valid_from), ("validUntil", valid_until)] {
            if let Some(time) = time {
                spec.insert(name.into(), json!(time.to_string()));
            }
        }
        if *apply_on_forward {
            spec.insert("applyOnForward".into(), json!(true));
        }
        spec.insert("appliesTo".into(), json!(applies_to));
        for (name, rules) in [("ingress", ingress), ("egress", egress)] {
            if let Some(rules) = rules {
                let peers = if name == "ingress" { "from" } else { "to" };
                let rules: Vec<_> = rules.iter().map(|rule| rule.to_json(peers)).collect();
                spec.insert(name.into(), Json::Array(rules));
            }
        }
        Json::Object(spec)
    }
}

impl Rule {
    /// A rule that matches everything.
    pub fn new(action: Action) -> Self {
        Self {
            action,
            peers: Vec::new(),
            ports: Vec::new(),
            not_ports: Vec::new(),
            source_ports: None,
            ip_version: None,
            own: None,
            log: false,
            reject: false,
        }
    }

    fn decode(decoder: &mut Decoder, node: &Node, direction: Direction) -> Option<Self> {
        let mut fields = decoder.fields(node, "a rule")?;
        let action = fields.required(decoder, "action", |decoder, node| {
            decoder.word(
                node,
                &[
                    ("Allow", Action::Allow),
                    ("Deny", Action::Deny),
                    ("Pass", Action::Pass),
                    ("Log", Action::Log),
                ],
            )
        });
        let (name, other) = match direction {
            Direction::Ingress => ("from", "to"),
            Direction::Egress => ("to", "from"),
        };
        fields.refuse(
            decoder,
            other,
            &format!("{direction} rules have {name:?} (the other end), not {other:?}"),
        );
        let before = decoder.problems.len();
        let peers = fields.optional(decoder, name, |decoder, node| {
            let peers = peers(decoder, node)?;
            if direction == Direction::Ingress && peers.iter().any(|peer| !peer.domains.is_empty()) {
                decoder.problem(node, "domains are for egress: whoever calls has an address and no name");
                return None;
            }
            Some(peers)
        });
        let ports = fields.optional(decoder, "ports", ports);
        let not_ports = fields.optional(decoder, "notPorts", self::ports);
        let source_ports = SourcePorts::decode(decoder, &mut fields);
        let ip_version = fields.optional(decoder, "ipVersion", |decoder, node| {
            match decoder.number::<u8>(node, "4 or 6")? {
                4 => Some(IpVersion::V4),
                6 => Some(IpVersion::V6),
                _ => decoder.expected(node, "4 or 6"),
            }
        });
        let own = fields.optional(decoder, "endpoint", Own::decode);
        let log = fields.optional(decoder, "log", boolean);
        let reject = fields.optional(decoder, "reject", |decoder, node| {
            let reject = boolean(decoder, node)?;
            if reject && action.is_some_and(|action| action != Action::Deny) {
                decoder.problem(node, "only what a rule denies can be rejected: use it with `action: Deny`");
            }
            Some(reject)
        });
        for unsupported in ["http", "tls"] {
            fields.refuse(decoder, unsupported, "this field is not supported yet");
        }
        fields.finish(decoder);
        // A peer or port list that was written but could not be read must not turn into "any".
        if decoder.problems.len() > before {
            return None;
        }
        let rule = Self {
            action: action?,
            peers: peers.unwrap_or_default(),
            ports: ports.unwrap_or_default(),
            not_ports: not_ports.unwrap_or_default(),
            source_ports,
            ip_version,
            own: own.map(Box::new),
            log: log.unwrap_or_default(),
            reject: reject.unwrap_or_default(),
        };
        source_ports::possible(decoder, node, &rule)?;
        Some(rule)
    }

    fn to_json(&self, peers_name: &str) -> Json {
        let Self { action, peers, ports, not_ports, source_ports, ip_version, own, log, reject } = self;
        let mut rule = Map::new();
        let action = match action {
            Action::Allow => "Allow",
            Action::Deny => "Deny",
            Action::Pass => "Pass",
            Action::Log => "Log",
        };
        rule.insert("action".into(), json!(action));
        match peers.as_slice() {
            [] => {}
            [peer] => {
                rule.insert(peers_name.into(), peer.to_json());
            }
            peers => {
                rule.insert(peers_name.into(), peers.iter().map(Peer::to_json).collect());
            }
        }
        for (name, ports) in [("ports", ports), ("notPorts", not_ports)] {
            if !ports.is_empty() {
                rule.insert(name.into(), json!(ports));
            }
        }
        if let Some(source_ports) = source_ports {
            source_ports.write(&mut rule);
        }
        if let Some(version) = ip_version {
            rule.insert("ipVersion".into(), json!(if *version == IpVersion::V4 { 4 } else { 6 }));
        }
        if let Some(own) = own {
            rule.insert("endpoint".into(), own.to_json());
        }
        for (name, set) in [("log", log), ("reject", reject)] {
            if *set {
                rule.insert(name.into(), json!(true));
            }
        }
        Json::Object(rule)
    }
}

pub(crate) fn ports(decoder: &mut Decoder, node: &Node) -> Option<Vec<PortMatch>> {
    match &node.value {
        Value::Sequence(_) => decoder.list(node, LIST_MAX, Decoder::parsed),
        _ => decoder.parsed(node).map(|port| vec![port]),
    }
}

fn names(decoder: &mut Decoder, node: &Node) -> Option<Vec<String>> {
    let names = decoder.list(node, LIST_MAX, crate::resource::name)?;
    non_empty(decoder, node, names)
}

fn order(decoder: &mut Decoder, node: &Node) -> Option<Order> {
    decoder.number::<f64>(node, "a number").map(Order::new)
}

pub(crate) fn boolean(decoder: &mut Decoder, node: &Node) -> Option<bool> {
    match node.value {
        Value::Bool(value) => Some(value),
        _ => decoder.expected(node, "true or false"),
    }
}

/// A selector; a mistake is reported at its own place inside the text.
pub(crate) fn selector(decoder: &mut Decoder, node: &Node) -> Option<Selector> {
    let text = decoder.string(node)?;
    match Selector::parse(&text) {
        Ok(selector) => Some(selector),
        Err(error) => {
            let mut position = node.position;
            if position.line > 0 {
                let characters = text.get(..error.offset).map_or(0, |before| before.chars().count());
                position.column = position.column.saturating_add(u32::try_from(characters).unwrap_or(0));
            }
            let message =
                format!("in the selector {text:?}: expected {}, found {}", error.expected, error.found);
            decoder.problem_at(position, message, error.suggestion);
            None
        }
    }
}

fn label_keys(decoder: &mut Decoder, node: &Node) -> Option<Vec<String>> {
    let keys = decoder.list(node, LIST_MAX, |decoder, node| {
        let key = decoder.string(node)?;
        if is_label_key(&key) {
            return Some(key);
        }
        decoder.expected(node, "a label key")
    })?;
    non_empty(decoder, node, keys)
}

pub(crate) fn blocks(decoder: &mut Decoder, node: &Node) -> Option<Vec<Prefix>> {
    let blocks = decoder.list(node, LIST_MAX, Decoder::parsed)?;
    non_empty(decoder, node, blocks)
}

fn non_empty<T>(decoder: &mut Decoder, node: &Node, items: Vec<T>) -> Option<Vec<T>> {
    if items.is_empty() {
        return decoder.expected(node, "at least one item; leave the field out otherwise");
    }
    Some(items)
}
