//! What an agent remembers, so that a restart or a reboot without a controller enforces what was last known.
//!
//! One redb file. Every write is durable before it returns: an agent that is killed right after a
//! permission was revoked must not come back with the permission. It is a cache all the same: a file that
//! cannot be read is put aside and the agent starts empty (and thus closed) until the controller answers.
//!
//! A disk that is full is no damage: what is known stays in the file and in force, what is new waits in memory, and the file
//! is opened again, since redb does nothing more with one that could not be written once.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_discover::Found;
use bulkhead_engine::Member;
use bulkhead_model::host_policy::RuleId;
use bulkhead_model::ports::NamedPort;
use bulkhead_model::{ObjectKey, Prefix, Resource, RuleRef, Selector};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::session::Progress;

const FILE_NAME: &str = "agent.redb";
const META: TableDefinition<'_, &str, &str> = TableDefinition::new("meta");
/// `Kind/namespace/name` → JSON.
const RESOURCES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("resources");
/// Selectors whose members are known, complete up to `members` in `meta`.
const SELECTORS: TableDefinition<'_, &str, ()> = TableDefinition::new("selectors");
/// (selector, entity) → JSON.
const MEMBERS: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("members");
const RULES: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("rules");
/// Source → what it last found, JSON.
const FOUND: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("found");

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The directory cannot be made or written.
    #[error("{path}: {source}")]
    Directory {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another process has the file open.
    #[error("{0} is in use by another agent")]
    InUse(PathBuf),
    /// The file cannot be written.
    #[error("cannot write the agent's memory: {0}")]
    Write(#[from] Box<redb::Error>),
}

/// The members of one selector as last heard, by entity.
pub(crate) type KnownMembers = BTreeMap<Arc<str>, Member>;

/// What an earlier process left.
#[derive(Debug, Default)]
pub(crate) struct Remembered {
    /// What tells that run of the kernel from others.
    boot_id: String,
    pub(crate) progress: Progress,
    pub(crate) resources: Vec<Resource>,
    pub(crate) members: BTreeMap<Selector, KnownMembers>,
    pub(crate) rules: BTreeMap<RuleId, RuleRef>,
    pub(crate) found: BTreeMap<String, Found>,
}

/// What is new since the last write.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    pub(crate) progress: Option<Progress>,
    pub(crate) resources: BTreeMap<ObjectKey, Option<Resource>>,
    /// Selector → whole new state, or `None` when it is not wanted any more.
    pub(crate) selectors: BTreeMap<Selector, Option<KnownMembers>>,
    /// Single members of selectors that are otherwise as they were.
    pub(crate) members: BTreeMap<(Selector, Arc<str>), Option<Member>>,
    pub(crate) rules: BTreeMap<RuleId, RuleRef>,
    pub(crate) found: BTreeMap<String, Found>,
}

impl Changes {
    pub(crate) fn is_empty(&self) -> bool {
        let Self { progress, resources, selectors, members, rules, found } = self;
        progress.is_none()
            && resources.is_empty()
            && selectors.is_empty()
            && members.is_empty()
            && rules.is_empty()
            && found.is_empty()
    }
}

/// The open file.
#[derive(Debug)]
pub(crate) struct Disk {
    path: PathBuf,
    /// `None`: it could not be written, and is opened again with the next write.
    database: Option<Database>,
    /// Why the last write failed.
    failing: Option<String>,
}

fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

#[derive(Serialize, Deserialize)]
struct StoredMember {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    host: Option<Arc<str>>,
    prefixes: Vec<Prefix>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ports: Vec<NamedPort>,
}

/// Opens the directory's file and reads it. What was found under another `boot_id` is forgotten: interface indexes
/// mean something else now.
pub(crate) fn open(directory: &Path, boot_id: &str) -> Result<(Disk, Remembered), DiskError> {
    let io = |source| DiskError::Directory { path: directory.into(), source };
    fs::create_dir_all(directory).map_err(io)?;
    let path = directory.join(FILE_NAME);
    match try_open(&path, boot_id) {
        Ok(opened) => return Ok(opened),
        Err(redb::Error::DatabaseAlreadyOpen) => return Err(DiskError::InUse(path)),
        // Later it may be read.
        Err(redb::Error::Io(source)) if path.exists() && is_full(&source) => {
            return Err(DiskError::Directory { path, source });
        }
        Err(error) => {
            let aside = directory.join(format!("{FILE_NAME}.broken"));
            tracing::error!(path = %path.display(), aside = %aside.display(), %error,
                "the agent's memory cannot be read: put aside, starting empty");
            if path.exists() {
                fs::rename(&path, &aside).map_err(io)?;
            }
        }
    }
    try_open(&path, boot_id).map_err(|error| DiskError::Write(Box::new(error)))
}

fn try_open(path: &Path, boot_id: &str) -> Result<(Disk, Remembered), redb::Error> {
    // redb panics on some damage (seen with garbage in mid-file on 4.5).
    let opened = catch_unwind(AssertUnwindSafe(|| -> Result<_, redb::Error> {
        let database = Database::create(path)?;
        // Nothing is written where nothing has to be: the disk may be full.
        if let Ok(remembered) = read(&database)
            && remembered.boot_id == boot_id
        {
            return Ok((Disk { path: path.to_owned(), database: Some(database), failing: None }, remembered));
        }
        let transaction = database.begin_write()?;
        let mut meta = transaction.open_table(META)?;
        let same_boot = meta.get("boot_id")?.is_some_and(|known| known.value() == boot_id);
        meta.insert("boot_id", boot_id)?;
        drop(meta);
        transaction.open_table(RESOURCES)?;
        transaction.open_table(SELECTORS)?;
        transaction.open_table(MEMBERS)?;
        transaction.open_table(RULES)?;
        let mut found = transaction.open_table(FOUND)?;
        if !same_boot {
            found.retain(|_, _| false)?;
        }
        drop(found);
        transaction.commit()?;
        let remembered = read(&database)?;
        Ok((Disk { path: path.to_owned(), database: Some(database), failing: None }, remembered))
    }));
    opened.unwrap_or_else(|_| Err(redb::Error::Corrupted("reading panicked".into())))
}

fn damaged(what: &str) -> redb::Error {
    redb::Error::Corrupted(format!("unreadable {what}"))
}

fn read(database: &Database) -> Result<Remembered, redb::Error> {
    let transaction = database.begin_read()?;
    let mut remembered = Remembered::default();
    let meta = transaction.open_table(META)?;
    if let Some(boot_id) = meta.get("boot_id")? {
        remembered.boot_id = boot_id.value().into();
    }
    if let Some(epoch) = meta.get("epoch")? {
        remembered.progress.epoch = epoch.value().into();
    }
    let progress = &mut remembered.progress;
    for (name, number) in [("revision", &mut progress.revision), ("members", &mut progress.members)] {
        if let Some(text) = meta.get(name)? {
            *number = text.value().parse().map_err(|_| damaged("revision"))?;
        }
    }
    for row in transaction.open_table(RESOURCES)?.iter()? {
        let (_, value) = row?;
        let resource = Resource::from_json_text(value.value());
        remembered.resources.push(resource.map_err(|_| damaged("resource"))?);
    }
    for row in transaction.open_table(SELECTORS)?.iter()? {
        let (selector, ()) = row.map(|(selector, _)| (selector, ()))?;
        let selector = Selector::parse_canonical(selector.value()).map_err(|_| damaged("selector"))?;
        remembered.members.entry(selector).or_default();
    }
    for row in transaction.open_table(MEMBERS)?.iter()? {
        let (key, value) = row?;
        let (selector, entity) = key.value();
        let selector = Selector::parse_canonical(selector).map_err(|_| damaged("selector"))?;
        let stored: StoredMember = serde_json::from_slice(value.value()).map_err(|_| damaged("member"))?;
        let entity: Arc<str> = entity.into();
        let StoredMember { host, prefixes, ports } = stored;
        let member = Member { entity: Arc::clone(&entity), host, prefixes, ports };
        remembered.members.entry(selector).or_default().insert(entity, member);
    }
    for row in transaction.open_table(RULES)?.iter()? {
        let (id, rule) = row?;
        let rule = serde_json::from_slice(rule.value()).map_err(|_| damaged("rule"))?;
        remembered.rules.insert(RuleId(id.value()), rule);
    }
    for row in transaction.open_table(FOUND)?.iter()? {
        let (source, found) = row?;
        let found = serde_json::from_slice(found.value()).map_err(|_| damaged("inventory"))?;
        remembered.found.insert(source.value().into(), found);
    }
    Ok(remembered)
}

impl Disk {
    /// Writes what changed, durably, all or nothing; whether it did. What it did not write is to be given again.
    pub(crate) fn write(&mut self, changes: &Changes) -> bool {
        let written = self.open_and_write(changes);
        match (&written, &self.failing) {
            (Err(error), None) => {
                tracing::error!(%error, "what is enforced cannot be remembered: trying again")
            }
            (Ok(()), Some(_)) => tracing::warn!("what is enforced is remembered again"),
            (Ok(()), None) | (Err(_), Some(_)) => {}
        }
        self.failing = written.err().map(|error| {
            format!(
                "what is new is in force, but a restart would lose it: it cannot be kept on disk: {error}"
            )
        });
        self.failing.is_none()
    }

    /// Why what is new is not remembered, if that is so.
    pub(crate) fn failing(&self) -> Option<&str> {
        self.failing.as_deref()
    }

    fn open_and_write(&mut self, changes: &Changes) -> Result<(), redb::Error> {
        let database = match self.database.take() {
            Some(database) => database,
            None => Database::open(&self.path)?,
        };
        try_write(&database, changes)?;
        self.database = Some(database);
        Ok(())
    }
}

fn try_write(database: &Database, changes: &Changes) -> Result<(), redb::Error> {
    let Changes { progress, resources, selectors, members, rules, found } = changes;
    let transaction = database.begin_write()?;
    {
        let mut table = transaction.open_table(META)?;
        if let Some(Progress { epoch, revision, members }) = progress {
            table.insert("epoch", epoch.as_str())?;
            table.insert("revision", revision.to_string().as_str())?;
            table.insert("members", members.to_string().as_str())?;
        }
        let mut table = transaction.open_table(RESOURCES)?;
        for (key, resource) in resources {
            let key = key.to_string();
            match resource {
                Some(resource) => {
                    table.insert(key.as_str(), resource.to_json_text().as_bytes())?;
                }
                None => {
                    table.remove(key.as_str())?;
                }
            }
        }
        let mut by_selector = transaction.open_table(SELECTORS)?;
        let mut by_member = transaction.open_table(MEMBERS)?;
        for (selector, state) in selectors {
            let text: &str = selector.canonical();
            // The smallest string that is greater than every entity name under this selector does not
            // exist as a key, so the range is cut by the selector itself.
            by_member.retain_in((text, "")..(format!("{text}\0").as_str(), ""), |_, _| false)?;
            by_selector.remove(text)?;
            if let Some(state) = state {
                by_selector.insert(text, ())?;
                for member in state.values() {
                    by_member.insert((text, &*member.entity), stored(member)?.as_slice())?;
                }
            }
        }
        for ((selector, entity), member) in members {
            let key: (&str, &str) = (selector.canonical(), entity);
            match member {
                Some(member) => by_member.insert(key, stored(member)?.as_slice())?,
                None => by_member.remove(key)?,
            };
        }
        let mut table = transaction.open_table(RULES)?;
        for (id, rule) in rules {
            table.insert(id.0, json(rule)?.as_slice())?;
        }
        let mut table = transaction.open_table(FOUND)?;
        for (source, found) in found {
            table.insert(source.as_str(), json(found)?.as_slice())?;
        }
    }
    transaction.commit()?;
    Ok(())
}

fn stored(member: &Member) -> Result<Vec<u8>, redb::Error> {
    let Member { entity: _, host, prefixes, ports } = member.clone();
    json(&StoredMember { host, prefixes, ports })
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, redb::Error> {
    serde_json::to_vec(value).map_err(|error| redb::Error::Io(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str) -> Member {
        Member {
            entity: name.into(),
            host: Some("h".into()),
            prefixes: vec!["10.0.0.1/32".parse().unwrap()],
            ports: vec![],
        }
    }

    #[test]
    fn what_was_written_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let selector = Selector::parse("role == 'a'").unwrap();
        let progress = Progress { epoch: "e".into(), revision: 7, members: 5 };
        let longer = Selector::parse("role == 'a' || has(b)").unwrap();
        {
            let (mut disk, remembered) = open(directory.path(), "boot").unwrap();
            assert!(remembered.progress.epoch.is_empty());
            let known = |name: &str| KnownMembers::from([(name.into(), member(name))]);
            let mut changes = Changes { progress: Some(progress.clone()), ..Changes::default() };
            changes.selectors.insert(selector.clone(), Some(known("Workload/x")));
            changes.selectors.insert(longer.clone(), Some(known("Workload/y")));
            assert!(disk.write(&changes));
            let mut changes = Changes::default();
            changes.members.insert((selector.clone(), "Workload/z".into()), Some(member("Workload/z")));
            changes.selectors.insert(longer, None);
            assert!(disk.write(&changes));
            assert!(matches!(open(directory.path(), "boot"), Err(DiskError::InUse(_))));
        }
        let (_, remembered) = open(directory.path(), "boot").unwrap();
        assert_eq!(remembered.progress, progress);
        assert_eq!(remembered.members.len(), 1);
        assert_eq!(remembered.members[&selector].len(), 2);
    }

    #[test]
    fn interfaces_of_another_boot_are_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let (mut disk, _) = open(directory.path(), "first").unwrap();
        let changes =
            Changes { found: BTreeMap::from([("docker".into(), Found::default())]), ..Changes::default() };
        assert!(disk.write(&changes));
        drop(disk);
        assert_eq!(open(directory.path(), "first").unwrap().1.found.len(), 1);
        assert!(open(directory.path(), "second").unwrap().1.found.is_empty());
    }

    #[test]
    fn a_broken_file_is_put_aside() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(FILE_NAME), b"this is no database at all").unwrap();
        let (_, remembered) = open(directory.path(), "boot").unwrap();
        assert!(remembered.resources.is_empty());
        assert!(directory.path().join("agent.redb.broken").exists());
    }

    /// A small file system, mounted until dropped.
    struct SmallDisk(tempfile::TempDir);

    impl SmallDisk {
        fn new() -> Self {
            let disk = Self(tempfile::tempdir().unwrap());
            let mount = std::process::Command::new("mount")
                .args(["-t", "tmpfs", "-o", "size=4m", "bulkhead-small-disk"])
                .arg(disk.0.path())
                .status();
            assert!(mount.unwrap().success(), "mounting takes root");
            disk
        }

        fn fill(&self) {
            use std::io::Write;
            let mut ballast = fs::File::create(self.0.path().join("ballast")).unwrap();
            while ballast.write_all(&[1; 4096]).is_ok() {}
        }

        fn make_room(&self) {
            fs::remove_file(self.0.path().join("ballast")).unwrap();
        }
    }

    impl Drop for SmallDisk {
        fn drop(&mut self) {
            // Lazily: what a test that failed has open must not keep it.
            let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
        }
    }

    #[test]
    fn a_full_disk_is_waited_for_and_nothing_known_is_put_aside() {
        let small = SmallDisk::new();
        let directory = small.0.path().join("agent");
        let selector = Selector::parse("role == 'a'").unwrap();
        let members = |count: u32| {
            let name = |number| format!("Workload/{number:0200}");
            let known: KnownMembers =
                (0..count).map(|number| (name(number).as_str().into(), member(&name(number)))).collect();
            let mut changes = Changes::default();
            changes.selectors.insert(selector.clone(), Some(known));
            changes
        };
        let (mut disk, _) = open(&directory, "boot").unwrap();
        assert!(disk.write(&members(2)) && disk.failing().is_none());
        small.fill();
        let more = members(2000);
        for _ in 0..3 {
            assert!(!disk.write(&more));
            assert!(disk.failing().is_some());
        }
        // A restart finds what was known, with no more room than before.
        drop(disk);
        let (mut disk, remembered) = open(&directory, "boot").unwrap();
        assert_eq!(remembered.members[&selector].len(), 2);
        assert!(!directory.join("agent.redb.broken").exists());
        assert!(!disk.write(&more));
        small.make_room();
        assert!(disk.write(&more), "{:?}", disk.failing());
        assert!(disk.failing().is_none());
        drop(disk);
        assert_eq!(open(&directory, "boot").unwrap().1.members[&selector].len(), 2000);
    }
}
