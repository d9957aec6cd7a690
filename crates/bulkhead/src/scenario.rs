//! A fleet made of manifests alone, without controller or kernel: what `decide`, `test` and `lint` ask.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_engine::{Assembly, Endpoint, Explanation, FindError, Fleet, Flow, find_endpoint};
use bulkhead_model::ports::{Protocol, USUAL_SOURCE_PORT};
use bulkhead_model::resource::{Metadata, NameTable, nearest_name};
use bulkhead_model::settings::{NameTableSpec, domain};
use bulkhead_model::time::Timestamp;
use bulkhead_model::{Entity, ObjectKey, Resource};

/// Name of the table that holds names given beside the manifests.
const GIVEN_NAMES: &str = "given";

/// The second that it is now.
pub(crate) fn now() -> Timestamp {
    Timestamp::since_epoch(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// A question about one new connection.
#[derive(Debug, Clone)]
pub(crate) struct Question<'a> {
    /// `pod:NAMESPACE/NAME`, `workload:[NAMESPACE/]NAME`, `host:NAME` or `ip:ADDRESS`.
    pub(crate) from: &'a str,
    /// Likewise.
    pub(crate) to: &'a str,
    /// Destination port; of ICMP, type and code as in a packet's first two bytes.
    pub(crate) port: u16,
    /// Name or number.
    pub(crate) protocol: &'a str,
    /// Port of whoever begins; absent: [`USUAL_SOURCE_PORT`].
    pub(crate) source_port: Option<u16>,
}

/// Who is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Judge {
    /// The tables that an agent would load.
    Tables,
    /// The reference evaluator.
    Reference,
}

/// Everything that manifests say, ready to be asked.
#[derive(Debug, Default)]
pub(crate) struct Scenario {
    assembly: Assembly,
    fleet: Fleet,
    /// Endpoints by address: manifests may give one to several.
    holders: HashMap<IpAddr, BTreeSet<Arc<str>>>,
}

impl Scenario {
    /// An empty fleet at a point in time.
    pub(crate) fn at(now: Timestamp) -> Self {
        let mut scenario = Self::default();
        scenario.fleet.set_now(now);
        scenario
    }

    /// Makes these objects the whole state: what is not among them is gone, what is as before is not touched. Of an
    /// object that is given twice the later stands, as if they had been applied one after the other.
    ///
    /// # Errors
    /// With what is wrong with the objects together; then they are in place all the same.
    pub(crate) fn set(&mut self, resources: Vec<Resource>) -> Result<(), Vec<String>> {
        let wanted: BTreeMap<ObjectKey, Resource> =
            resources.into_iter().map(|resource| (resource.key(), resource)).collect();
        let gone: Vec<ObjectKey> =
            self.assembly.objects().keys().filter(|key| !wanted.contains_key(*key)).cloned().collect();
        for key in gone {
            self.change(&key, None);
        }
        for (key, resource) in wanted {
            if self.assembly.objects().get(&key) != Some(&resource) {
                self.change(&key, Some(resource));
            }
        }
        self.fleet.settle();
        let errors: Vec<String> = self.unknown_tiers().collect();
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    fn change(&mut self, key: &ObjectKey, resource: Option<Resource>) {
        let changes = self.assembly.set(key, resource);
        for (name, entity) in &changes.entities {
            if let Some(before) = self.fleet.world().entities.get(name) {
                for address in own_addresses(before) {
                    if let Some(holders) = self.holders.get_mut(&address) {
                        holders.remove(name);
                    }
                }
            }
            for address in entity.iter().flat_map(own_addresses) {
                self.holders.entry(address).or_default().insert(Arc::clone(name));
            }
        }
        self.fleet.change(&changes);
    }

    fn unknown_tiers(&self) -> impl Iterator<Item = String> {
        let world = self.fleet.world();
        let unknown = world.policies.iter().filter(|(_, policy)| !world.tiers.contains_key(&policy.tier));
        unknown.map(|(key, policy)| {
            let hint = nearest_name(&policy.tier, world.tiers.keys().map(String::as_str))
                .map_or_else(String::new, |name| format!("; did you mean {name}?"));
            format!("{key}: there is no tier {:?}{hint}", policy.tier)
        })
    }

    /// The fleet.
    pub(crate) fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// The connection that a question is about.
    ///
    /// # Errors
    /// If an end is unknown, or the ends have no family of addresses in common.
    pub(crate) fn flow(&self, question: &Question<'_>) -> Result<Flow, String> {
        let protocol = Protocol::NAMES
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(question.protocol))
            .map(|(_, protocol)| *protocol)
            .or_else(|| question.protocol.parse().ok().map(Protocol))
            .ok_or_else(|| format!("there is no protocol {:?}", question.protocol))?;
        let (from, to) = (self.end(question.from)?, self.end(question.to)?);
        // Each connection is of one family: the first that both ends have.
        let pair = from.1.iter().find_map(|source| {
            let same = to.1.iter().find(|destination| destination.is_ipv4() == source.is_ipv4());
            same.map(|destination| (*source, *destination))
        });
        let (source, destination) = pair.ok_or_else(|| {
            format!("{} and {} have no family of addresses in common", question.from, question.to)
        })?;
        let source_port = match question.source_port {
            Some(_) if !protocol.has_ports() => return Err(format!("{protocol} has no source ports")),
            given if protocol.has_ports() => given.unwrap_or(USUAL_SOURCE_PORT),
            _ => 0,
        };
        Ok(Flow {
            source: Endpoint { workload: from.0, address: source },
            destination: Endpoint { workload: to.0, address: destination },
            key: protocol.key(question.port),
            source_port,
        })
    }

    /// The endpoint behind an end, if it is one, and its addresses.
    fn end(&self, text: &str) -> Result<(Option<Arc<str>>, Vec<IpAddr>), String> {
        let address = match text.strip_prefix("ip:") {
            Some(address) => Some(address.parse().map_err(|_| format!("{text:?}: not an IP address"))?),
            None => text.parse().ok(),
        };
        if let Some(address) = address {
            let holder = self.holders.get(&address).and_then(BTreeSet::first);
            return Ok((holder.cloned(), vec![address]));
        }
        let world = self.fleet.world();
        let entity = match text.split_once(':') {
            None => find_endpoint(world, text).map_err(|error| error.to_string())?,
            Some((kind, name)) => {
                let kinds: &[&str] = match kind {
                    "pod" => &["Pod", "WorkloadEndpoint", "Workload"],
                    "workload" => &["Workload", "WorkloadEndpoint", "Pod"],
                    "host" => &["HostEndpoint", "HostEndpoint.projectcalico.org"],
                    _ => {
                        return Err(format!(
                            "{text:?}: expected pod:NAMESPACE/NAME, workload:NAME, host:NAME or ip:ADDRESS"
                        ));
                    }
                };
                let exact =
                    kinds.iter().find_map(|kind| world.entities.get(format!("{kind}/{name}").as_str()));
                match exact {
                    Some(entity) => entity,
                    // Its host need not be told, if only one is called so.
                    None if kind == "workload" => match find_endpoint(world, name) {
                        Ok(entity) => entity,
                        Err(FindError::Unknown(_)) => return Err(self.unknown_end(text, kind, kinds)),
                        Err(FindError::Ambiguous(message)) => return Err(message),
                    },
                    None => return Err(self.unknown_end(text, kind, kinds)),
                }
            }
        };
        let addresses = entity.prefixes.iter().map(|prefix| prefix.address()).collect();
        // A pod on its node's network has the node's address and no policy of its own.
        Ok((entity.is_endpoint().then(|| Arc::clone(&entity.name)), addresses))
    }

    fn unknown_end(&self, text: &str, kind: &str, kinds: &[&str]) -> String {
        let names = self.fleet.world().entities.keys().filter_map(|name| name.split_once('/'));
        let names: Vec<String> =
            names.filter(|(of, _)| kinds.contains(of)).map(|(_, name)| format!("{kind}:{name}")).collect();
        let hint = nearest_name(text, names.iter().map(String::as_str))
            .map_or_else(String::new, |name| format!("; did you mean {name}?"));
        format!("{text:?} is not among the manifests{hint}")
    }

    /// What becomes of a connection.
    pub(crate) fn decide(&mut self, flow: &Flow, judge: Judge) -> Explanation {
        // An address is one endpoint's at a time. Where manifests give it to several, a question that names one of
        // them is about that one having it.
        let rivals = self.rivals(flow);
        for rival in &rivals {
            self.fleet.set_entity(&rival.name, Some(&without_addresses(rival, flow)));
        }
        if !rivals.is_empty() {
            self.fleet.settle();
        }
        let explanation = match judge {
            Judge::Tables => self.fleet.decide_by_tables(flow),
            Judge::Reference => self.fleet.decide_by_reference(flow),
        };
        for rival in &rivals {
            self.fleet.set_entity(&rival.name, Some(rival));
        }
        if !rivals.is_empty() {
            self.fleet.settle();
        }
        explanation
    }

    /// Other endpoints with the address of one that the flow names.
    fn rivals(&self, flow: &Flow) -> Vec<Entity> {
        let ends = [&flow.source, &flow.destination];
        let named = |name: &Arc<str>| ends.iter().any(|end| end.workload.as_ref() == Some(name));
        let taken = ends.iter().filter(|end| end.workload.is_some()).map(|end| end.address);
        let holders: BTreeSet<&Arc<str>> = taken
            .filter_map(|address| self.holders.get(&address))
            .flatten()
            .filter(|name| !named(name))
            .collect();
        holders.into_iter().filter_map(|name| self.fleet.world().entities.get(name).cloned()).collect()
    }
}

fn own_addresses(entity: &Entity) -> impl Iterator<Item = IpAddr> {
    let prefixes = entity.prefixes.iter().filter(|prefix| prefix.is_host());
    prefixes.filter(|_| entity.is_endpoint()).map(|prefix| prefix.address())
}

fn without_addresses(entity: &Entity, flow: &Flow) -> Entity {
    let taken = [flow.source.address, flow.destination.address];
    let mut entity = entity.clone();
    entity.prefixes.retain(|prefix| !taken.iter().any(|address| prefix.contains_address(*address)));
    entity
}

/// The addresses of names, given beside manifests, as an object; none if there are none.
///
/// # Errors
/// If a name is none.
pub(crate) fn names(given: &BTreeMap<String, Vec<IpAddr>>) -> Result<Option<Resource>, String> {
    let mut names: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
    for (text, addresses) in given {
        let name = domain(text, false).ok_or_else(|| format!("{text:?} is no DNS name"))?;
        names.entry(name).or_default().extend(addresses);
    }
    if names.is_empty() {
        return Ok(None);
    }
    let metadata = Metadata { name: GIVEN_NAMES.into(), ..Metadata::default() };
    Ok(Some(Resource::NameTable(NameTable { metadata, spec: NameTableSpec { names } })))
}
