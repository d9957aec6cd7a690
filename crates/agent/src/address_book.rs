//! Who has an address, as far as this host knows: names for flow records.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use bulkhead_model::Prefix;

/// A name, and the host if it is a workload's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Owner {
    pub(crate) entity: Arc<str>,
    pub(crate) host: Option<Arc<str>>,
}

/// Single addresses only: blocks are named by the controller, which knows all network sets.
#[derive(Debug, Default)]
pub(crate) struct AddressBook {
    owners: HashMap<IpAddr, HashMap<Owner, u32>>,
}

impl std::hash::Hash for Owner {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.entity.hash(state);
    }
}

impl AddressBook {
    pub(crate) fn add(&mut self, owner: &Owner, prefixes: &[Prefix]) {
        for prefix in prefixes.iter().filter(|prefix| prefix.is_host()) {
            *self.owners.entry(prefix.address()).or_default().entry(owner.clone()).or_default() += 1;
        }
    }

    pub(crate) fn remove(&mut self, owner: &Owner, prefixes: &[Prefix]) {
        for prefix in prefixes.iter().filter(|prefix| prefix.is_host()) {
            let Some(owners) = self.owners.get_mut(&prefix.address()) else { continue };
            if let Some(count) = owners.get_mut(owner) {
                *count -= 1;
                if *count == 0 {
                    owners.remove(owner);
                }
            }
            if owners.is_empty() {
                self.owners.remove(&prefix.address());
            }
        }
    }

    /// An address of an entity, the lowest if it has several. Looks at every address: for questions of people.
    pub(crate) fn address_of(&self, entity: &str) -> Option<IpAddr> {
        let owned =
            self.owners.iter().filter(|(_, owners)| owners.keys().any(|owner| &*owner.entity == entity));
        owned.map(|(address, _)| *address).min()
    }

    /// The owner of an address; with several, the first by name, so that records do not flap.
    pub(crate) fn owner(&self, address: IpAddr) -> Option<&Owner> {
        let owners: BTreeSet<&Owner> = self.owners.get(&address)?.keys().collect();
        owners.into_iter().next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_forgotten_with_its_last_owner() {
        let mut book = AddressBook::default();
        let owner = Owner { entity: "Workload/a.h".into(), host: None };
        let prefixes = ["10.0.0.1/32".parse().unwrap(), "10.0.0.0/8".parse().unwrap()];
        book.add(&owner, &prefixes);
        book.add(&owner, &prefixes);
        book.remove(&owner, &prefixes);
        let address = "10.0.0.1".parse().unwrap();
        assert_eq!(book.owner(address), Some(&owner));
        book.remove(&owner, &prefixes);
        assert_eq!(book.owner(address), None);
    }
}
