//! The file beneath an embedded store, and the lock beside it.

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use super::codec;
use super::levelling::Levelling;
use super::room::{Noted, Troubles};
use crate::random_id;
use crate::state::State;
use crate::types::{Change, Commit, Revision, StoreError, Stored};

/// Name of the store's file in its directory.
pub(super) const FILE_NAME: &str = "store.redb";
/// How its name ends while it is being made.
const NEW_EXTENSION: &str = "new";
/// Name of the lock file.
const LOCK_NAME: &str = "store.lock";
/// Memory for pages: reads are answered from our own memory, so little is needed.
const CACHE_BYTES: usize = 16 << 20;
/// Layout of the tables; a later number is refused.
const FORMAT: &str = "2";
/// The layout before, in which no object's row was behind the log.
const FORMAT_LEVEL: &str = "1";

const OBJECTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("objects");
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
/// Keys under leases, with the revision of their last write. Leases end with the process that granted them, so these are
/// removed by the next one.
const LEASED: TableDefinition<'_, &str, u64> = TableDefinition::new("leased");
const META: TableDefinition<'_, &str, &str> = TableDefinition::new("meta");
const META_EPOCH: &str = "epoch";
const META_FORMAT: &str = "format";
const META_REVISION: &str = "revision";
/// Up to this revision the rows of the objects say what the log says.
const META_LEVEL: &str = "level";

/// The lock on a store's directory, held until dropped.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    unclean_stop: bool,
}

impl Lock {
    /// Takes it.
    pub(super) fn take(directory: &Path) -> Result<Self, StoreError> {
        let path = directory.join(LOCK_NAME);
        let failed =
            |source: std::io::Error| StoreError::Io { path: path.clone(), reason: source.to_string() };
        std::fs::create_dir_all(directory).map_err(failed)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        let locked = file.try_lock();
        let mut holder = String::new();
        file.read_to_string(&mut holder).map_err(failed)?;
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(StoreError::Locked {
                    path: directory.to_owned(),
                    holder: holder.trim().to_owned(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let mut lock = Self { file, unclean_stop: !holder.is_empty() };
        lock.rewrite(&format!("process {}\n", std::process::id())).map_err(failed)?;
        Ok(lock)
    }

    /// Whether the holder before never said that it was done.
    pub(super) fn unclean_stop(&self) -> bool {
        self.unclean_stop
    }

    /// Says that we are done. If this fails, the next start checks the file once more than it need.
    pub(super) fn mark_clean(&mut self) {
        if let Err(error) = self.rewrite("") {
            tracing::warn!(%error, "the store could not be marked as cleanly closed");
        }
    }

    fn rewrite(&mut self, text: &str) -> std::io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(text.as_bytes())?;
        self.file.sync_data()
    }
}

/// What stood in the file.
pub(super) struct Loaded {
    pub(super) epoch: String,
    pub(super) state: State,
    /// Keys under leases of an earlier process.
    pub(super) orphans: Vec<Arc<str>>,
    /// Up to this revision the rows of the objects say what the log says.
    level: Revision,
    /// Keys that changed after it.
    ahead: Vec<Arc<str>>,
}

/// The file itself.
#[derive(Debug)]
pub(super) struct StoreFile {
    path: PathBuf,
    database: Database,
    levelling: Levelling,
    /// Log rows that readers no longer need, to be removed as soon as the rows of the objects say what they say.
    forgotten: Option<RangeInclusive<u64>>,
    troubles: Arc<Troubles>,
}

impl StoreFile {
    /// Opens or makes it and reads all of it.
    pub(super) fn open(
        path: &Path,
        check: bool,
        log_changes_max: usize,
    ) -> Result<(Self, Loaded), StoreError> {
        if !path.exists() {
            Self::make(path)?;
        }
        let troubles = Arc::default();
        let (file, loaded) = Self::open_with(path, log_changes_max, || {
            let database = Database::builder()
                .set_cache_size(CACHE_BYTES)
                .set_check_integrity_on_open(check)
                .create_with_backend(Noted::open(path, &troubles)?)?;
            Ok(database)
        })
        .map_err(|error| match error {
            StoreError::Io { path, .. } if troubles.only_full() => StoreError::Full { path },
            error => error,
        })?;
        Ok((Self { troubles, ..file }, loaded))
    }

    /// Makes an empty one, whole or not at all: redb does not open a file whose making was cut short.
    fn make(path: &Path) -> Result<(), StoreError> {
        let new = path.with_extension(NEW_EXTENSION);
        let failed = |error: redb::Error| StoreError::Io { path: new.clone(), reason: error.to_string() };
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error.into())),
            _ => {}
        }
        let make = || -> Result<(), redb::Error> {
            let database = Database::builder().set_cache_size(CACHE_BYTES).create(&new)?;
            initialise(&database)?;
            database.close()?;
            File::open(&new)?.sync_all()?;
            std::fs::rename(&new, path)?;
            // The file's name must be as durable as what stands in it.
            if let Some(directory) = path.parent() {
                File::open(directory)?.sync_all()?;
            }
            Ok(())
        };
        make().map_err(failed)
    }

    /// The same with a database from elsewhere.
    pub(super) fn open_with(
        path: &Path,
        log_changes_max: usize,
        open: impl FnOnce() -> Result<Database, redb::Error>,
    ) -> Result<(Self, Loaded), StoreError> {
        let corrupt = |reason: String| StoreError::Corrupt { path: path.to_owned(), reason };
        // redb panics on some kinds of damage instead of reporting them (seen with 4.5).
        let opened = catch_unwind(AssertUnwindSafe(|| -> Result<(Database, Loaded), redb::Error> {
            let database = open()?;
            initialise(&database)?;
            let loaded = load(&database, log_changes_max)?;
            Ok((database, loaded))
        }));
        match opened {
            Ok(Ok((database, loaded))) => {
                // Rows that were due to be forgotten when the store stopped, or that a smaller bound drops.
                let forgotten = Some(0..=loaded.state.compacted().0);
                let levelling = Levelling::new(log_changes_max, loaded.level, loaded.ahead.iter().cloned());
                let (path, troubles) = (path.to_owned(), Arc::default());
                Ok((Self { path, database, levelling, forgotten, troubles }, loaded))
            }
            Ok(Err(redb::Error::DatabaseAlreadyOpen)) => Err(StoreError::Locked {
                path: path.to_owned(),
                holder: "unknown: it does not use the lock file".to_owned(),
            }),
            Ok(Err(redb::Error::Corrupted(reason))) => Err(corrupt(reason)),
            Ok(Err(error)) => Err(StoreError::Io { path: path.to_owned(), reason: error.to_string() }),
            Err(_panic) => Err(corrupt("reading it panicked".to_owned())),
        }
    }

    /// Bytes of keys and values that writing these commits takes: those in the log, and those of the rows that go along.
    pub(super) fn bytes(&self, commits: &[Commit], state: &State) -> u64 {
        let of =
            |key: &str, object: Option<&Stored>| key.len() + object.map_or(0, |object| object.value.len());
        let changes = || commits.iter().flat_map(|commit| &commit.changes);
        let logged: usize = changes().map(|change| of(&change.key, change.object.as_ref())).sum();
        let rows: usize = self.levelling.rows(changes().count()).map(|key| of(key, state.get(key))).sum();
        (logged + rows) as u64
    }

    /// Writes commits durably, all or none. `state` is what stands in the file before them. After an error it must be opened
    /// again.
    pub(super) fn write(&mut self, commits: &[Commit], state: &State) -> Result<(), StoreError> {
        self.write_inner(commits, state).map_err(|error| {
            let path = self.path.clone();
            if self.troubles.only_full() {
                return StoreError::Full { path };
            }
            StoreError::Io { path, reason: error.to_string() }
        })
    }

    fn write_inner(&mut self, commits: &[Commit], state: &State) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        {
            let mut log = transaction.open_table(LOG)?;
            let mut meta = transaction.open_table(META)?;
            let changes = commits.iter().map(|commit| commit.changes.len()).sum();
            let level_before = self.levelling.level();
            let rows = self.levelling.next(changes, state.revision());
            if !rows.is_empty() {
                let mut objects = transaction.open_table(OBJECTS)?;
                for key in rows {
                    match state.get(&key) {
                        Some(object) => objects.insert(&*key, codec::object_to_row(object).as_slice())?,
                        None => objects.remove(&*key)?,
                    };
                }
            }
            let level = self.levelling.level();
            if level != level_before {
                meta.insert(META_LEVEL, level.to_string().as_str())?;
            }
            if let Some(range) = self.forgotten.take() {
                let (first, last) = range.into_inner();
                // What is there to be read again after a crash stays a little longer.
                let reached = last.min(level.0);
                if first <= reached {
                    log.retain_in(first..=reached, |_, _| false)?;
                }
                self.forgotten = (reached < last).then(|| first.max(reached + 1)..=last);
            }
            write_leased(&transaction, commits, state)?;
            for commit in commits {
                log.insert(commit.revision.0, codec::commit_to_row(commit).as_slice())?;
                self.levelling.changed(commit);
            }
            if let Some(last) = commits.last() {
                meta.insert(META_REVISION, last.revision.to_string().as_str())?;
            }
        }
        transaction.commit()?;
        Ok(())
    }

    /// Notes log rows that nobody needs any more; those that are noted one after the other follow each other. They go
    /// with one of the next writes: it is no harm if they stay.
    pub(super) fn forget(&mut self, revisions: RangeInclusive<u64>) {
        let first = self.forgotten.as_ref().map_or(*revisions.start(), |before| *before.start());
        self.forgotten = Some(first..=*revisions.end());
    }

    /// Gives back the room of what is no longer there.
    pub(super) fn compact(&mut self) -> Result<(), StoreError> {
        let compacted = self.database.compact();
        compacted
            .map(drop)
            .map_err(|error| StoreError::Io { path: self.path.clone(), reason: error.to_string() })
    }

    /// Closes it.
    pub(super) fn close(self) -> Result<(), StoreError> {
        let path = self.path;
        self.database.close().map_err(|error| StoreError::Io { path, reason: error.to_string() })
    }
}

/// Notes which keys are under leases, and which are no longer.
fn write_leased(
    transaction: &redb::WriteTransaction,
    commits: &[Commit],
    state: &State,
) -> Result<(), redb::Error> {
    let is_leased = |change: &Change| change.object.as_ref().is_some_and(|object| object.lease.is_some());
    let was_leased = |key: &str| state.get(key).is_some_and(|before| before.lease.is_some());
    let mut leased = transaction.open_table(LEASED)?;
    let mut here: HashSet<&str> = HashSet::new();
    for commit in commits {
        for change in &commit.changes {
            if is_leased(change) {
                leased.insert(&*change.key, commit.revision.0)?;
                here.insert(&change.key);
            } else if here.contains(&*change.key) || was_leased(&change.key) {
                leased.remove(&*change.key)?;
            }
        }
    }
    Ok(())
}

/// Makes the tables, and the epoch of a new store.
fn initialise(database: &Database) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        transaction.open_table(OBJECTS)?;
        transaction.open_table(LOG)?;
        let mut meta = transaction.open_table(META)?;
        let known = meta.get(META_FORMAT)?.map(|format| format.value().to_owned());
        match known.as_deref() {
            Some(FORMAT) => {
                drop(meta);
                transaction.abort()?;
                return Ok(());
            }
            Some(FORMAT_LEVEL) => {
                let revision = meta.get(META_REVISION)?.map(|revision| revision.value().to_owned());
                meta.insert(META_LEVEL, revision.unwrap_or_default().as_str())?;
                meta.insert(META_FORMAT, FORMAT)?;
            }
            Some(other) => {
                return Err(redb::Error::Corrupted(format!(
                    "its format is {other:?}, this program reads {FORMAT:?}"
                )));
            }
            None => {
                meta.insert(META_FORMAT, FORMAT)?;
                meta.insert(META_EPOCH, random_id().as_str())?;
                meta.insert(META_REVISION, "0")?;
                meta.insert(META_LEVEL, "0")?;
            }
        }
    }
    transaction.commit()?;
    Ok(())
}

fn load(database: &Database, log_changes_max: usize) -> Result<Loaded, redb::Error> {
    let malformed = |what: &str| redb::Error::Corrupted(format!("{what} is malformed"));
    let transaction = database.begin_read()?;
    let meta = transaction.open_table(META)?;
    let text = |key: &str| -> Result<String, redb::Error> {
        let value = meta.get(key)?.ok_or_else(|| malformed(key))?;
        Ok(value.value().to_owned())
    };
    let epoch = text(META_EPOCH)?;
    let number = |key: &str| -> Result<Revision, redb::Error> {
        Ok(Revision(text(key)?.parse().map_err(|_digits| malformed(key))?))
    };
    let (revision, level) = (number(META_REVISION)?, number(META_LEVEL)?);

    let mut objects = BTreeMap::new();
    for row in transaction.open_table(OBJECTS)?.iter()? {
        let (key, value) = row?;
        let object = codec::object_from_row(key.value(), value.value());
        let object = object.map_err(|_short| malformed(key.value()))?;
        objects.insert(Arc::clone(&object.key), object);
    }
    let ahead = replay(&transaction, &mut objects, level, revision)?;
    let mut orphans = Vec::new();
    match transaction.open_table(LEASED) {
        Ok(leased) => {
            for row in leased.iter()? {
                let (key, modified) = row?;
                orphans.push((Arc::from(key.value()), Revision(modified.value())));
            }
        }
        // Made with the first write.
        Err(redb::TableError::TableDoesNotExist(_)) => {}
        Err(error) => return Err(error.into()),
    }
    // Newest first, as far as it is contiguous and within the bound, which may be smaller than before.
    let mut log = Vec::new();
    let mut changes = 0;
    for row in transaction.open_table(LOG)?.iter()?.rev() {
        let (number, value) = row?;
        let number = Revision(number.value());
        if number.0 + log.len() as u64 != revision.0 {
            return Err(malformed("the log"));
        }
        let commit = codec::commit_from_row(number, value.value()).map_err(|_short| malformed("the log"))?;
        changes += commit.changes.len();
        if changes > log_changes_max {
            break;
        }
        log.push(commit);
    }
    log.reverse();
    let state = State::restore(objects.into_values(), log, revision, log_changes_max);
    let same = |(key, modified): &(Arc<str>, Revision)| {
        state.get(key).is_some_and(|object| object.modified == *modified)
    };
    let orphans = orphans.into_iter().filter(same).map(|(key, _)| key).collect();
    Ok(Loaded { epoch, state, orphans, level, ahead })
}

/// Does to the objects what the log says after `level`, and answers which keys that concerned. Some of it has been done
/// already: by the last of a key's changes it is as it was.
fn replay(
    transaction: &redb::ReadTransaction,
    objects: &mut BTreeMap<Arc<str>, Stored>,
    level: Revision,
    revision: Revision,
) -> Result<Vec<Arc<str>>, redb::Error> {
    let malformed = || redb::Error::Corrupted("the log is malformed".to_owned());
    let mut ahead = Vec::new();
    let mut last = level.0;
    for row in transaction.open_table(LOG)?.range(level.0 + 1..)? {
        let (number, value) = row?;
        last += 1;
        if number.value() != last {
            return Err(malformed());
        }
        let commit = codec::commit_from_row(Revision(last), value.value()).map_err(|_short| malformed())?;
        for Change { key, object } in commit.changes {
            match object {
                Some(object) => objects.insert(Arc::clone(&key), object),
                None => objects.remove(&key),
            };
            ahead.push(key);
        }
    }
    if last != revision.0 {
        return Err(malformed());
    }
    Ok(ahead)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_the_layout_before_is_read_and_written_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE_NAME);
        let stored = |revision: u64| Stored {
            key: format!("/{revision}").into(),
            value: revision.to_string().into(),
            created: Revision(revision),
            modified: Revision(revision),
            lease: None,
        };
        let commit = |revision: u64| {
            let object = stored(revision);
            let changes = vec![Change { key: Arc::clone(&object.key), object: Some(object) }];
            Commit { revision: Revision(revision), changes }
        };
        let database = Database::create(&path).unwrap();
        let transaction = database.begin_write().unwrap();
        {
            let mut meta = transaction.open_table(META).unwrap();
            for (key, value) in [(META_FORMAT, FORMAT_LEVEL), (META_EPOCH, "before"), (META_REVISION, "2")] {
                meta.insert(key, value).unwrap();
            }
            let mut objects = transaction.open_table(OBJECTS).unwrap();
            let mut log = transaction.open_table(LOG).unwrap();
            for revision in 1..=2 {
                let row = codec::object_to_row(&stored(revision));
                objects.insert(&*stored(revision).key, row.as_slice()).unwrap();
            }
            // The first commit was forgotten.
            log.insert(2, codec::commit_to_row(&commit(2)).as_slice()).unwrap();
        }
        transaction.commit().unwrap();
        drop(database);

        let (mut file, mut loaded) = StoreFile::open(&path, false, 100).unwrap();
        assert_eq!((loaded.epoch.as_str(), loaded.level, loaded.ahead.len()), ("before", Revision(2), 0));
        assert_eq!(loaded.state.list("/"), [stored(1), stored(2)]);
        file.write(&[commit(3)], &loaded.state).unwrap();
        loaded.state.commit(commit(3));
        file.close().unwrap();
        let (_file, again) = StoreFile::open(&path, true, 100).unwrap();
        assert_eq!((again.level, again.ahead.len()), (Revision(2), 1));
        assert_eq!(again.state.list("/"), loaded.state.list("/"));
    }
}
