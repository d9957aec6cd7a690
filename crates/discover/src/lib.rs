//! Finds the workloads of this host.
//!
//! Every source answers the same question in full: *which workloads are there now?* A [`Found`] replaces what
//! the source said before, so a missed event can never leave a stale workload behind for longer than the
//! source's next look. Edges only: nothing here decides.
//!
//! * [`docker`] watches a Docker engine's events,
//! * [`directory`] watches a directory of registrations ([`bulkhead_model::registration`]),
//! * [`groups`] finds control groups,
//! * [`links`] reads and watches interfaces, here and in other network namespaces.

use std::net::IpAddr;

use bulkhead_model::registration::Identity;
use bulkhead_model::{Facts, Labels};
use serde::{Deserialize, Serialize};

pub mod directory;
pub mod docker;
pub mod groups;
pub mod links;

/// A workload on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FoundWorkload {
    /// Its name, unique within this host.
    pub name: String,
    /// Its labels.
    pub labels: Labels,
    /// Its addresses, sorted.
    pub addresses: Vec<IpAddr>,
    /// Its host-side interfaces: index and name.
    pub interfaces: Vec<(u32, String)>,
    /// Its control group, if it is made of processes: inode and path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<(u32, String)>,
    /// What was observed about it.
    #[serde(default, skip_serializing_if = "Facts::is_empty")]
    pub facts: Facts,
    /// What rules can ask of it besides.
    #[serde(flatten)]
    pub identity: Identity,
}

/// Something that looks like a workload and cannot be enforced, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NotManaged {
    /// What it is.
    pub subject: String,
    /// Why not.
    pub reason: String,
}

/// Everything that one source sees now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Found {
    /// Workloads, by name.
    pub workloads: Vec<FoundWorkload>,
    /// What could not be taken in.
    pub not_managed: Vec<NotManaged>,
    /// Names of workloads that could not be looked at (a kernel that refused): they may still be there.
    #[serde(skip)]
    pub unseen: Vec<String>,
}

impl Found {
    /// Takes over from an earlier answer the workloads that could not be looked at: nothing is let go for that.
    pub fn keep_from(&mut self, earlier: &Self) {
        let kept = earlier.workloads.iter().filter(|one| self.unseen.contains(&one.name));
        self.workloads.extend(kept.cloned());
    }
}
