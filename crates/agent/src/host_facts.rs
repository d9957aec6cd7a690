//! What an agent observes about its own host.

use std::fs;
use std::net::IpAddr;

use bulkhead_discover::links;
use bulkhead_model::entity::ADDRESSES_MAX;
use bulkhead_model::facts::{self, Facts};

/// Where a distribution says what it is, in the order in which it is looked for (os-release(5)).
const OS_RELEASE: [&str; 2] = ["/etc/os-release", "/usr/lib/os-release"];

/// The facts of this host. They are looked at once: the kernel's hold until the next boot, the distribution's until the
/// agent is started again. What cannot be found out is left out.
pub(crate) fn observe() -> Facts {
    let uname = rustix::system::uname();
    let (kernel, architecture) = (uname.release().to_string_lossy(), uname.machine().to_string_lossy());
    let os_release = OS_RELEASE.iter().find_map(|path| fs::read_to_string(path).ok()).unwrap_or_default();
    let observed = [
        (facts::HOST_KERNEL, Some(kernel.as_ref())),
        (facts::HOST_ARCHITECTURE, Some(architecture.as_ref())),
        (facts::OS_ID, value(&os_release, "ID")),
        (facts::OS_VERSION, value(&os_release, "VERSION_ID")),
    ];
    let (facts, refused) =
        Facts::from_observed(observed.into_iter().filter_map(|(key, value)| Some((key, value?))));
    for error in refused {
        tracing::warn!(%error, "something about this host cannot be a fact");
    }
    facts
}

/// Interfaces whose addresses are for the workloads behind them, and the same on every host.
const INNER_INTERFACES: [&str; 6] = ["docker", "br-", "veth", "cni", "virbr", "lxc"];

/// The addresses by which others reach this host, sorted. None if the kernel does not say.
pub(crate) fn addresses() -> Vec<IpAddr> {
    let found = links::links().and_then(|links| Ok((links, links::addresses()?)));
    let (links, addresses) = match found {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(%error, "the addresses of this host are not known: rules about hosts do not match it");
            return Vec::new();
        }
    };
    let inner = |index: u32| {
        let name = links.iter().find(|link| link.index == index).map_or("", |link| link.name.as_str());
        INNER_INTERFACES.iter().any(|prefix| name.starts_with(prefix))
    };
    let outer = addresses.into_iter().filter(|(index, _)| !inner(*index));
    let mut addresses: Vec<IpAddr> = outer.map(|(_, address)| address).collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses.truncate(ADDRESSES_MAX);
    addresses
}

/// Value of a name in the format of os-release: `NAME=value`, in quotes or not. Of two the later counts.
fn value<'a>(os_release: &'a str, name: &str) -> Option<&'a str> {
    let mut values = os_release.lines().filter_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='));
    let value = values.next_back()?;
    let unquoted = ['"', '\''].iter().find_map(|quote| value.strip_prefix(*quote)?.strip_suffix(*quote));
    Some(unquoted.unwrap_or(value)).filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_kernel_is_a_version() {
        let facts = observe();
        assert!(facts.get(facts::HOST_KERNEL).is_some() && facts.get(facts::HOST_ARCHITECTURE).is_some());
    }

    #[test]
    fn os_release_is_read_with_and_without_quotes() {
        let text = "NAME=\"Debian GNU/Linux\"\nVERSION_ID=\"12\"\nID=debian\n#ID=x\nEMPTY=\nQUOTED='a b'\n";
        assert_eq!((value(text, "ID"), value(text, "VERSION_ID")), (Some("debian"), Some("12")));
        assert_eq!(
            (value(text, "QUOTED"), value(text, "EMPTY"), value(text, "VERSION")),
            (Some("a b"), None, None)
        );
    }
}
