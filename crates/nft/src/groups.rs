//! Control groups in charge.

use std::collections::BTreeMap;
use std::io;

use bulkhead_dataplane::{ControlGroup, DataplaneError};
use bulkhead_model::host_policy::Attachment;

use crate::schema::group_number;

/// By inode.
pub(crate) type Groups = BTreeMap<u32, Group>;

/// Where one is in the hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Group {
    /// Below the root: 1 and more.
    pub(crate) level: u32,
    /// Inodes of the groups around it, from the inside out. Not of one that has gone.
    pub(crate) around: Vec<u32>,
}

/// Rules name levels by bits of a word.
const LEVEL_MAX: usize = 31;

impl Group {
    /// Looks for one.
    pub(crate) fn find(inode: u32) -> io::Result<Self> {
        let line = ControlGroup::open(inode)?.line()?;
        let level = u32::try_from(line.len()).unwrap_or(u32::MAX);
        let around = line.into_iter().skip(1).filter_map(|inode| u32::try_from(inode).ok()).collect();
        Ok(Self { level, around })
    }

    /// Takes charge of one more.
    pub(crate) fn add(inode: u32, groups: &Groups) -> Result<Groups, DataplaneError> {
        let attachment = Attachment::Cgroup(inode);
        let group = Self::find(inode).map_err(|error| match error.raw_os_error() {
            Some(libc::ESTALE | libc::ENOENT) => DataplaneError::Gone { attachment },
            _ => DataplaneError::io(format!("look at {attachment}"), error),
        })?;
        if group.level == 0 || group.level as usize > LEVEL_MAX {
            let why = format!("{attachment} is the root, or more than {LEVEL_MAX} levels below it");
            return Err(DataplaneError::Inconsistent(why));
        }
        // Whatever has gone makes room.
        let mut all = groups.clone();
        all.retain(|other, _| *other != inode && Self::find(*other).is_ok());
        if let Some(other) = all.keys().find(|other| group_number(**other) == group_number(inode)) {
            let why = format!("{attachment} cannot be told from {}", Attachment::Cgroup(*other));
            return Err(DataplaneError::Inconsistent(why));
        }
        all.insert(inode, group);
        Ok(all)
    }

    /// Itself and the groups around it that are in charge, from the inside out.
    pub(crate) fn line(inode: u32, groups: &Groups) -> Vec<u32> {
        let around = groups.get(&inode).into_iter().flat_map(|group| &group.around);
        std::iter::once(&inode).chain(around).filter(|one| groups.contains_key(one)).copied().collect()
    }
}
