//! The example of three applications: its components, and who is meant to reach whom, written down
//! independently of the policies and of the product.

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
