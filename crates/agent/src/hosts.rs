//! Which of this host's interfaces its host endpoints are about: pure, but for [`Here::read`].

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use bulkhead_discover::{NotManaged, links};
use bulkhead_engine::LocalEndpoint;
use bulkhead_model::Entity;
use bulkhead_model::host_policy::Attachment;

/// A name that stands for all interfaces (Calico's HostEndpoint).
const ALL_INTERFACES: &str = "*";

/// Interfaces and addresses of this host.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Here {
    /// By name.
    pub(crate) interfaces: BTreeMap<String, u32>,
    /// With the interface that has it.
    pub(crate) addresses: Vec<(u32, IpAddr)>,
}

impl Here {
    pub(crate) fn read() -> io::Result<Self> {
        let interfaces = links::links()?.into_iter().map(|link| (link.name, link.index)).collect();
        Ok(Self { interfaces, addresses: links::addresses()? })
    }
}

/// Host endpoints, each with the name of the interface that it is about, if it has one. An interface that two claim stays
/// with the first by name.
pub(crate) fn resolve<'a>(
    endpoints: impl IntoIterator<Item = (&'a Entity, Option<&'a str>)>,
    here: &Here,
) -> (Vec<LocalEndpoint>, Vec<NotManaged>) {
    let (mut found, mut not_managed) = (Vec::new(), Vec::new());
    let mut taken: BTreeMap<Attachment, &str> = BTreeMap::new();
    for (entity, interface) in endpoints {
        let attachment = match attachment(entity, interface, here) {
            Ok(attachment) => attachment,
            Err(reason) => {
                not_managed.push(NotManaged { subject: entity.name.to_string(), reason });
                continue;
            }
        };
        if let Some(other) = taken.get(&attachment) {
            let reason = format!("{attachment} belongs to {other}");
            not_managed.push(NotManaged { subject: entity.name.to_string(), reason });
            continue;
        }
        taken.insert(attachment, &entity.name);
        found.push(LocalEndpoint { entity: entity.clone(), attachment });
        if let Attachment::Host(index) = attachment {
            found.push(LocalEndpoint::forwarding(entity, index));
        }
    }
    (found, not_managed)
}

fn attachment(entity: &Entity, interface: Option<&str>, here: &Here) -> Result<Attachment, String> {
    match interface {
        Some(ALL_INTERFACES) => Ok(Attachment::Host(0)),
        Some(name) => match here.interfaces.get(name) {
            Some(index) => Ok(Attachment::Host(*index)),
            None => Err(format!("there is no interface {name} on this host")),
        },
        None => {
            let own = |address: IpAddr| entity.prefixes.iter().any(|prefix| prefix.contains_address(address));
            let holder = here.addresses.iter().find(|(_, address)| own(*address));
            holder
                .map(|(index, _)| Attachment::Host(*index))
                .ok_or_else(|| "no interface of this host has one of its addresses".into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(name: &str, address: &str) -> Entity {
        Entity { name: name.into(), prefixes: vec![address.parse().unwrap()], ..Entity::default() }
    }

    #[test]
    fn an_endpoint_is_about_its_interface_or_the_one_with_its_address() {
        let here = Here {
            interfaces: [("eth0".to_owned(), 2), ("eth1".to_owned(), 3)].into(),
            addresses: vec![(2, "10.0.0.1".parse().unwrap()), (3, "10.0.1.1".parse().unwrap())],
        };
        let (named, by_address, all, gone, twice) = (
            endpoint("a", "10.9.9.9/32"),
            endpoint("b", "10.0.1.1/32"),
            endpoint("c", "10.9.9.9/32"),
            endpoint("d", "10.9.9.9/32"),
            endpoint("e", "10.0.0.1/32"),
        );
        let (found, not_managed) = resolve(
            [
                (&named, Some("eth0")),
                (&by_address, None),
                (&all, Some("*")),
                (&gone, Some("eth7")),
                (&gone, None),
                (&twice, None),
            ],
            &here,
        );
        let attachments: Vec<_> = found.iter().map(|local| local.attachment).collect();
        let expected = [2, 3, 0].map(|index| [Attachment::Host(index), Attachment::Forwarded(index)]);
        assert_eq!(attachments, expected.concat());
        assert_eq!((&*found[1].entity.name, found[1].entity.prefixes.len()), ("a#forwarded", 0));
        let reasons: Vec<_> = not_managed.iter().map(|entry| entry.reason.as_str()).collect();
        assert_eq!(
            reasons,
            [
                "there is no interface eth7 on this host",
                "no interface of this host has one of its addresses",
                "the host behind interface 2 belongs to a"
            ]
        );
    }
}
