//! What the kernel must have, each missing thing named before anything is tried.

use std::fs;

use bulkhead_dataplane::DataplaneError;

use crate::object::NETDEV;
use crate::object::Table;
use crate::socket::Talker;

/// First kernel whose nftables sees packets that leave through an interface.
const EGRESS_SINCE: (u32, u32) = (5, 16);
const CAP_NET_ADMIN: u32 = 12;

/// Checks that this kernel, and this process's rights in it, suffice. Answers the first thing that is missing, as a
/// sentence.
///
/// # Errors
/// [`DataplaneError::Requirement`].
pub fn check() -> Result<(), DataplaneError> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    if kernel_version(&release).is_none_or(|version| version < EGRESS_SINCE) {
        return Err(missing(
            "nftables egress hook",
            format!(
                "packets to a workload are looked at there, which needs Linux {}.{} or later, and this is {}",
                EGRESS_SINCE.0,
                EGRESS_SINCE.1,
                release.trim()
            ),
        ));
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    if effective_capabilities(&status) >> CAP_NET_ADMIN & 1 == 0 {
        return Err(missing("CAP_NET_ADMIN", "changing tables needs it: run as root, or grant it".into()));
    }
    probe()
}

/// Asks for a table that nobody has: whoever knows no tables at all answers otherwise.
fn probe() -> Result<(), DataplaneError> {
    let unknown = Table { family: NETDEV, name: "bulkhead-probe" };
    let asked = Talker::open().and_then(|mut talker| talker.one(&unknown.get(), |_| Some(())));
    match asked {
        Ok(_) => Ok(()),
        Err(error) => Err(missing("nf_tables", format!("the kernel needs CONFIG_NF_TABLES ({error})"))),
    }
}

pub(crate) fn missing(feature: &'static str, advice: String) -> DataplaneError {
    DataplaneError::Requirement { feature, advice }
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.trim().split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn effective_capabilities(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
}
