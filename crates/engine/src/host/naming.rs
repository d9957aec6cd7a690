//! Names in rules that mean other ports at other destinations.

use std::collections::BTreeSet;

use bulkhead_model::entity::port_label;
use bulkhead_model::labels::{KIND_LABEL, NAMESPACE_LABEL, SERVICE_LABEL};
use bulkhead_model::policy::{Rule, ServiceName};
use bulkhead_model::ports::{NamedPort, PortMatch, Protocol};
use bulkhead_model::selector::Expr;
use bulkhead_model::{Direction, Kind, ObjectKey, Selector};

/// A name whose meaning depends on who is there.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Naming {
    /// The name of a port.
    Port(PortMatch),
    /// The service of this namespace and name: its backends' ports.
    Service(Option<String>, String),
}

impl Naming {
    pub(super) fn service(policy: &ObjectKey, service: &ServiceName) -> Self {
        let namespace = service.namespace.as_ref().or(policy.namespace.as_ref());
        Self::Service(namespace.cloned(), service.name.clone())
    }

    /// Whether a port of somebody whom [`Naming::selectors`] select is meant.
    pub(super) fn names(&self, port: &NamedPort) -> bool {
        match self {
            Self::Port(ports) => ports.names(port),
            Self::Service(..) => true,
        }
    }

    /// The selectors of everybody who gives it a meaning; of a port's name, one for each protocol that it can have.
    pub(super) fn selectors(&self) -> Vec<Selector> {
        match self {
            Self::Port(PortMatch::Named { protocol, name }) => {
                let all =
                    Protocol::NAMES.into_iter().map(|(_, protocol)| protocol).filter(|one| one.has_ports());
                let protocols: Vec<Protocol> = protocol.map_or_else(|| all.collect(), |one| vec![one]);
                let has = |protocol| Selector::from_expr(Expr::Has(port_label(protocol, name).into()));
                protocols.into_iter().map(has).collect()
            }
            Self::Port(_) => Vec::new(),
            Self::Service(namespace, name) => {
                let namespace = match namespace {
                    Some(name) => Selector::equals(NAMESPACE_LABEL, name),
                    // A policy in no namespace that names none means what is in none.
                    None => Selector::from_expr(Expr::Not(Box::new(Expr::Has(NAMESPACE_LABEL.into())))),
                };
                vec![Selector::all_of([
                    namespace,
                    Selector::equals(KIND_LABEL, Kind::EndpointSlice.as_str()),
                    Selector::equals(SERVICE_LABEL, name),
                ])]
            }
        }
    }
}

/// Every name in rules whose meaning depends on who is there.
pub(super) fn namings<'a>(
    rules: impl Iterator<Item = (&'a ObjectKey, &'a Rule)>,
    direction: Direction,
) -> BTreeSet<Naming> {
    let mut namings = BTreeSet::new();
    for (key, rule) in rules {
        let named = rule.ports.iter().chain(&rule.not_ports);
        let named = named.filter(|ports| matches!(ports, PortMatch::Named { .. }));
        namings.extend(named.map(|ports| Naming::Port(ports.clone())));
        if direction == Direction::Egress {
            let services = rule.peers.iter().flat_map(|peer| &peer.services);
            namings.extend(services.map(|service| Naming::service(key, service)));
        }
    }
    namings
}
