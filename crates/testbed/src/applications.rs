//! The example of three applications: its components, who is meant to reach whom (written down independently
//! of the policies and of the product), and the whole of it running.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::{Bulkhead, Family, Lab, Matrix, Outcome, Protocol, Server, Workload, eventually, matrix};

/// The hosts of the example.
pub const HOSTS: [&str; 3] = ["host-1", "host-2", "host-3"];
/// A port on which every component serves and of which no policy speaks.
pub const OTHER_PORT: u16 = 9999;
/// How long a probe waits for an answer. All probes of a matrix wait at the same time.
pub const PROBE_WAIT: Duration = Duration::from_millis(400);

/// A component of an application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Component {
    /// Name of its workload.
    pub name: &'static str,
    /// Its host.
    pub host: &'static str,
    /// Label `application`.
    pub application: &'static str,
    /// Label `role`.
    pub role: &'static str,
    /// Label `region`, if it has one.
    pub region: Option<&'static str>,
    /// Label `zone`, if it has one.
    pub zone: Option<&'static str>,
    /// Where it serves.
    pub port: u16,
}

const fn component(
    name: &'static str,
    host: &'static str,
    application: &'static str,
    role: &'static str,
    port: u16,
) -> Component {
    Component { name, host, application, role, region: None, zone: None, port }
}

const fn region(component: Component, region: &'static str) -> Component {
    Component { region: Some(region), ..component }
}

const fn zone(component: Component, zone: &'static str) -> Component {
    Component { zone: Some(zone), ..component }
}

/// The components, spread so that every application has some on every host.
pub const EXAMPLE: [Component; 12] = [
    zone(component("order-web", "host-1", "orderInput", "web", 8080), "dmz"),
    region(component("credit-check-eu", "host-1", "orderInput", "creditCheck", 8081), "eu"),
    region(component("credit-check-us", "host-2", "orderInput", "creditCheck", 8081), "us"),
    component("geo-check", "host-2", "orderInput", "geolocationCheck", 8082),
    zone(component("order-db", "host-3", "orderInput", "orderDatabase", 5432), "restricted"),
    zone(component("customer-web", "host-2", "customerRecord", "web", 8080), "dmz"),
    component("customer-web-int", "host-1", "customerRecord", "web", 8080),
    component("credit-status", "host-3", "customerRecord", "creditStatus", 8083),
    zone(component("customer-db", "host-1", "customerRecord", "customerDatabase", 5432), "restricted"),
    zone(component("geo-web", "host-3", "geoLocation", "web", 8080), "dmz"),
    component("ip-map", "host-1", "geoLocation", "ipMap", 8084),
    zone(component("map-db", "host-2", "geoLocation", "mapDatabase", 5432), "restricted"),
];

impl Component {
    /// Its labels.
    pub fn labels(&self) -> Vec<(&'static str, &'static str)> {
        let mut labels = vec![("application", self.application), ("role", self.role)];
        labels.extend(self.region.map(|region| ("region", region)));
        labels.extend(self.zone.map(|zone| ("zone", zone)));
        labels
    }
}

/// Whether `from` is meant to reach `to` where it serves, once the policies of the example are in force.
pub fn expected(from: &Component, to: &Component) -> bool {
    if from.zone == Some("dmz") && to.zone == Some("restricted") {
        return false;
    }
    from.application == to.application
        || match (from.role, to.role) {
            ("creditCheck", "creditStatus") | ("geolocationCheck", "ipMap") => true,
            ("creditCheck", "ipMap") => from.region == Some("eu"),
            _ => false,
        }
}

/// A workload with a server in it.
#[derive(Debug)]
pub struct Member {
    /// Its namespace.
    pub workload: Workload,
    /// What answers in it.
    pub server: Server,
}

impl Member {
    /// A workload that serves on `ports`, in force with its labels when this answers.
    ///
    /// # Errors
    /// If it cannot be built or registered.
    pub fn start(
        bulkhead: &Bulkhead,
        host: &str,
        name: &str,
        labels: &[(&str, &str)],
        ports: &[u16],
    ) -> Result<Self> {
        let workload = bulkhead.lab.workload(host, name)?;
        let server = Server::start(&workload.netns, ports)?;
        bulkhead.register(&workload, labels)?;
        bulkhead.wait_endpoint(&workload)?;
        Ok(Self { workload, server })
    }
}

/// The example, running.
#[derive(Debug)]
pub struct Example {
    /// All components, in the order of [`EXAMPLE`].
    pub members: Vec<(Component, Member)>,
    /// The product.
    pub bulkhead: Bulkhead,
}

impl Example {
    /// Three hosts and all components, with no policy.
    ///
    /// # Errors
    /// If anything does not start.
    pub fn start(prefix: &str, binary: &Path) -> Result<Self> {
        let lab = Lab::new(prefix, &HOSTS)?;
        let bulkhead = Bulkhead::start(lab, binary, &BTreeMap::new())?;
        let members = EXAMPLE.iter().map(|component| {
            let Component { host, name, port, .. } = *component;
            let member = Member::start(&bulkhead, host, name, &component.labels(), &[port, OTHER_PORT])?;
            Ok((*component, member))
        });
        let members = members.collect::<Result<_>>()?;
        Ok(Self { members, bulkhead })
    }

    /// Where the policies are.
    ///
    /// # Errors
    /// If they are not in the source tree that this was built from.
    pub fn policies() -> Result<PathBuf> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/applications");
        path.canonicalize().with_context(|| format!("{}", path.display()))
    }

    /// Applies the policies and waits until every agent enforces them.
    ///
    /// # Errors
    /// If they are refused, or an agent does not follow.
    pub fn apply(&self) -> Result<()> {
        self.bulkhead.apply(&[&Self::policies()?])
    }

    /// A component's workload.
    ///
    /// # Panics
    /// If there is none of that name: a mistake in the test.
    pub fn workload(&self, name: &str) -> &Workload {
        match self.members.iter().find(|(component, _)| component.name == name) {
            Some((_, member)) => &member.workload,
            None => panic!("the example has no component {name}"),
        }
    }

    /// Probes everything from everywhere.
    ///
    /// # Errors
    /// If sockets cannot be opened.
    pub fn observe(
        &self,
        family: Family,
        protocol: impl Fn(&Component) -> Protocol + Sync,
    ) -> Result<Matrix> {
        let all: Vec<&Workload> = self.members.iter().map(|(_, member)| &member.workload).collect();
        let protocols: BTreeMap<&str, Protocol> =
            self.members.iter().map(|(component, _)| (component.name, protocol(component))).collect();
        matrix(&all, &all, family, |workload| protocols[workload.name.as_str()], PROBE_WAIT)
    }

    /// What in a matrix is not as it should be: reached if `expect` says so, silence otherwise.
    pub fn differences(
        &self,
        observed: &Matrix,
        expect: impl Fn(&Component, &Component) -> bool,
    ) -> Vec<String> {
        let mut differences = Vec::new();
        for ((from, _), row) in self.members.iter().zip(&observed.rows) {
            for ((to, _), outcome) in self.members.iter().zip(row) {
                let Some(outcome) = outcome else { continue };
                let wanted = if expect(from, to) { Outcome::Reached } else { Outcome::Silent };
                if *outcome != wanted {
                    differences.push(format!("{} → {}: {outcome:?}, not {wanted:?}", from.name, to.name));
                }
            }
        }
        differences
    }

    /// Probes everything from everywhere and compares.
    ///
    /// # Errors
    /// With every difference.
    pub fn check(
        &self,
        family: Family,
        protocol: impl Fn(&Component) -> Protocol + Sync,
        expect: impl Fn(&Component, &Component) -> bool,
    ) -> Result<()> {
        let differences = self.differences(&self.observe(family, protocol)?, expect);
        ensure!(differences.is_empty(), "{family:?}: {}", differences.join("\n"));
        Ok(())
    }

    /// Waits until everybody reaches, where the others serve, exactly those that the example means.
    ///
    /// # Errors
    /// At the deadline, with every difference.
    pub fn wait_expected(&self) -> Result<()> {
        eventually("everything is as the example expects", || {
            self.check(Family::V4, |component| Protocol::Tcp(component.port), expected)
        })
    }
}
