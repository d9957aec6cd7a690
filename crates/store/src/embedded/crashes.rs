//! A power cut at every write.
//!
//! A workload (puts, deletes, keys under a lease, several commits in one write, a log that forgets, a compaction) runs over a backend that
//! records each write, change of length and sync. Then, for every prefix of what was recorded, the file is put together as a
//! disk could have it after a cut there, and opened again. Covered for each prefix:
//!
//! * everything before the cut has arrived;
//! * the last write is torn, with only its first or only its second half;
//! * nothing since the last sync has arrived;
//! * any one write since the last sync is missing, the others having arrived; or it is the only one that has.
//!
//! The making of the file is not among it: a new one is made beside and renamed when it is whole.
//! What is not covered: every subset of three or more unsynced writes, and a disk that loses what it has synced. After each cut the
//! file must open with its pages checked, at a commit that is not before the last one acknowledged nor after the one being
//! written, with exactly the objects and the log of that commit.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use redb::{Database, StorageBackend};

use super::file::StoreFile;
use crate::state::State;
use crate::types::{Change, Commit, LeaseId, Revision, Stored};

/// Changes that the log keeps: so few that it forgets on the way.
const LOG_CHANGES_MAX: usize = 6;
/// Writes of the workload, of one to three commits each.
const WRITES: u64 = 24;
/// The write after which the file is compacted.
const COMPACTED_AFTER: u64 = 11;
/// A value that needs more than one page.
const LARGE_BYTES: usize = 9000;

#[derive(Debug, Clone)]
enum Event {
    Write(u64, Vec<u8>),
    Length(u64),
    Sync,
}

/// A file in memory that notes what is done to it.
#[derive(Debug, Clone, Default)]
struct Disk {
    bytes: Arc<Mutex<Vec<u8>>>,
    events: Arc<Mutex<Vec<Event>>>,
}

fn do_to(bytes: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Write(offset, data) => {
            let offset = usize::try_from(*offset).unwrap();
            // A write may have arrived without the change of length before it.
            if bytes.len() < offset + data.len() {
                bytes.resize(offset + data.len(), 0);
            }
            bytes[offset..offset + data.len()].copy_from_slice(data);
        }
        Event::Length(length) => bytes.resize(usize::try_from(*length).unwrap(), 0),
        Event::Sync => {}
    }
}

impl Disk {
    fn with(bytes: Vec<u8>) -> Self {
        Self { bytes: Arc::new(Mutex::new(bytes)), events: Arc::default() }
    }

    fn note(&self, event: Event) {
        do_to(&mut self.bytes.lock().unwrap(), &event);
        self.events.lock().unwrap().push(event);
    }

    fn open(&self, check: bool) -> (StoreFile, super::file::Loaded) {
        let open = || {
            let mut builder = Database::builder();
            builder.set_cache_size(1 << 20).set_check_integrity_on_open(check);
            Ok(builder.create_with_backend(self.clone())?)
        };
        StoreFile::open_with(Path::new("recorded"), LOG_CHANGES_MAX, open).unwrap()
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes.lock().unwrap();
        let offset = usize::try_from(offset).unwrap();
        let found = bytes.get(offset..offset + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(found);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.note(Event::Length(length));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.note(Event::Sync);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.note(Event::Write(offset, data.to_vec()));
        Ok(())
    }
}

/// What stands in a store: objects without their leases, which the file does not keep, and the revisions of its log.
type Content = (BTreeMap<String, (Bytes, u64, u64)>, Vec<u64>);

fn content(state: &State) -> Content {
    let objects = state.list("").into_iter();
    let objects =
        objects.map(|object| (object.key.to_string(), (object.value, object.created.0, object.modified.0)));
    (objects.collect(), (state.compacted().0 + 1..=state.revision().0).collect())
}

/// The commits of the workload's next write.
fn commits(state: &State, write: u64) -> Vec<Commit> {
    let count = 1 + write % 3;
    let commit = |number: u64| {
        let revision = Revision(state.revision().0 + 1 + number);
        let put = |key: String, value: Vec<u8>, lease| {
            let created = state.get(&key).map_or(revision, |object| object.created);
            let key: Arc<str> = key.into();
            let object =
                Stored { key: Arc::clone(&key), value: value.into(), created, modified: revision, lease };
            Change { key, object: Some(object) }
        };
        let text = revision.to_string().into_bytes();
        let mut changes = vec![put(format!("/new/{revision}"), text.clone(), None)];
        // One key per commit of a write, so that `created` is known from the state before it.
        changes.push(put(
            format!("/same/{number}"),
            text.repeat(if write.is_multiple_of(5) { LARGE_BYTES } else { 1 }),
            None,
        ));
        if number == 1 {
            changes.push(put("/leased".into(), text, Some(LeaseId(7))));
        }
        let oldest = state.list("/new/").into_iter().next();
        if let Some(oldest) = oldest.filter(|_| number == 0 && write > 2) {
            changes.push(Change { key: oldest.key, object: None });
        }
        Commit { revision, changes }
    };
    (0..count).map(commit).collect()
}

#[test]
fn a_cut_at_any_write_loses_nothing_acknowledged_and_tears_nothing() {
    let disk = Disk::default();
    let (mut file, mut loaded) = disk.open(false);
    let epoch = loaded.epoch;
    let state = &mut loaded.state;
    // What is there after each revision; and the revision that is acknowledged, or under way, from an event on.
    let mut contents = vec![content(state)];
    let begin = disk.events.lock().unwrap().len();
    let mut acknowledged = vec![(begin, 0)];
    for write in 0..WRITES {
        let commits = commits(state, write);
        file.write(&commits, state).unwrap();
        for commit in commits {
            if let Some(dropped) = state.commit(commit) {
                file.forget(dropped);
            }
            contents.push(content(state));
        }
        if write == COMPACTED_AFTER {
            acknowledged.push((disk.events.lock().unwrap().len(), state.revision().0));
            file.compact().unwrap();
        }
        acknowledged.push((disk.events.lock().unwrap().len(), state.revision().0));
    }
    file.close().unwrap();
    let events = disk.events.lock().unwrap().clone();

    let mut synced = Vec::new();
    let mut last_sync = 0;
    let mut cuts = 0;
    for cut in 0..=events.len() {
        if cut >= begin {
            let at_least = acknowledged.iter().rev().find(|(from, _)| *from <= cut).unwrap().1;
            let under_way = acknowledged.iter().find(|(from, _)| *from >= cut);
            let at_most = under_way.unwrap_or_else(|| acknowledged.last().unwrap()).1;
            for (what, bytes) in disks(&synced, &events[last_sync..cut]) {
                let (_file, loaded) = Disk::with(bytes).open(true);
                let revision = loaded.state.revision().0;
                assert!((at_least..=at_most).contains(&revision), "event {cut}, {what}: at {revision}");
                let expected = &contents[usize::try_from(revision).unwrap()];
                assert_eq!(&content(&loaded.state), expected, "event {cut}, {what}");
                assert_eq!(loaded.epoch, epoch);
                let leased = loaded.state.get("/leased").is_some();
                assert_eq!(loaded.orphans.len(), usize::from(leased), "event {cut}, {what}");
                cuts += 1;
            }
        }
        if let Some(Event::Sync) = events.get(cut) {
            events[last_sync..cut].iter().for_each(|event| do_to(&mut synced, event));
            last_sync = cut + 1;
        }
    }
    assert!(contents.last().unwrap().1[0] > 1, "the log has forgotten on the way");
    println!("{cuts} cuts in {} events", events.len());
    assert!(cuts > events.len());
}

/// What the disk may hold after a cut, `unsynced` being what was done since the last sync.
fn disks(synced: &[u8], unsynced: &[Event]) -> Vec<(String, Vec<u8>)> {
    let after = |events: &mut dyn Iterator<Item = &Event>| {
        let mut bytes = synced.to_vec();
        events.for_each(|event| do_to(&mut bytes, event));
        bytes
    };
    let mut disks = vec![("all".to_owned(), after(&mut unsynced.iter()))];
    let Some((last, before)) = unsynced.split_last() else { return disks };
    disks.push(("nothing unsynced".into(), synced.to_vec()));
    if let Event::Write(offset, data) = last {
        let (first, second) = data.split_at(data.len() / 2);
        for half in [
            Event::Write(*offset, first.to_vec()),
            Event::Write(offset + first.len() as u64, second.to_vec()),
        ] {
            disks.push(("torn".into(), after(&mut before.iter().chain([&half]))));
        }
    }
    // Shorter prefixes have had the others' turn.
    for missing in 0..before.len() {
        let others = unsynced.iter().enumerate().filter(|(number, _)| *number != missing);
        disks.push((format!("without {missing}"), after(&mut others.map(|(_, event)| event))));
    }
    disks.push(("only the last".into(), after(&mut [last].into_iter())));
    disks
}
