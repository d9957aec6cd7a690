//! `store`: copies of the repository's store, and moving it.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use bulkhead_store::{Backup, BackupError, Embedded, Location, Migration, Store, StoreError};
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{Common, EtcdArgs, StoreArgs, StoreCommand};
use crate::client::{API, whole};
use crate::failure::Failure;
use crate::output;

/// Stands for standard input or output in place of a file.
const STANDARD: &str = "-";

pub(crate) async fn run(common: &Common, args: &StoreArgs) -> Result<(), Failure> {
    match &args.command {
        StoreCommand::Backup { store, file, etcd } => backup(common, store.as_ref(), file, etcd).await,
        StoreCommand::Restore { store, file, replace, etcd } => {
            restore(common, store, file, *replace, etcd).await
        }
        StoreCommand::Migrate { from, to, follow, once: _, replace, etcd } => {
            migrate(common, from, to, *follow, *replace, etcd).await
        }
        StoreCommand::Compact { store } => compact(common, store).await,
        StoreCommand::Info { store, etcd } => info(common, store, etcd).await,
    }
}

async fn backup(
    common: &Common,
    store: Option<&Location>,
    file: &Path,
    etcd: &EtcdArgs,
) -> Result<(), Failure> {
    let lines: Vec<Bytes> = match store {
        Some(location) => {
            let store = existing(location, etcd).await?;
            Backup::take(&*store).await.map_err(failed)?.into_lines().collect()
        }
        None => vec![whole(common.controller(), &format!("{API}/backup")).await?],
    };
    // What came over the network is read as a restore would, before anybody relies on it.
    let text: Vec<u8> = lines.concat();
    let copy = Backup::read(&text[..]).map_err(refused)?;
    if file == Path::new(STANDARD) {
        let mut out = std::io::stdout().lock();
        out.write_all(&text).and_then(|()| out.flush()).context("cannot write the backup")?;
        return Ok(());
    }
    write_file(file, &text)?;
    let answer = json!({ "file": file, "revision": copy.revision.0, "epoch": copy.epoch, "objects": copy.objects.len() });
    output::show(common.output, &answer, || {
        Ok(format!(
            "{} objects as of revision {} are in {}\n",
            copy.objects.len(),
            copy.revision,
            file.display()
        ))
    })
}

/// Writes a file, whole or not at all.
fn write_file(file: &Path, text: &[u8]) -> Result<(), Failure> {
    let name = || format!("cannot write {}", file.display());
    let part = PathBuf::from(format!("{}.part", file.display()));
    let mut out = BufWriter::new(File::create(&part).with_context(name)?);
    out.write_all(text).with_context(name)?;
    let out = out.into_inner().map_err(std::io::IntoInnerError::into_error).with_context(name)?;
    out.sync_all().with_context(name)?;
    Ok(std::fs::rename(&part, file).with_context(name)?)
}

async fn restore(
    common: &Common,
    location: &Location,
    file: &Path,
    replace: bool,
    etcd: &EtcdArgs,
) -> Result<(), Failure> {
    let input: Box<dyn BufRead> = if file == Path::new(STANDARD) {
        Box::new(BufReader::new(std::io::stdin()))
    } else {
        Box::new(BufReader::new(File::open(file).with_context(|| format!("cannot read {}", file.display()))?))
    };
    // Read before the store is opened, which may make it.
    let copy = Backup::read(input).map_err(refused)?;
    let store = open(location, etcd).await?;
    let restored = copy.restore(&*store, replace).await.map_err(refused)?;
    let answer = json!({
        "store": location.to_string(),
        "objects": copy.objects.len(),
        "copiedRevision": copy.revision.0,
        "revision": restored.revision.0,
        "transactions": restored.transactions,
    });
    output::show(common.output, &answer, || {
        let objects = copy.objects.len();
        Ok(format!(
            "{objects} objects as of revision {} are in {location}, which is at revision {}{}\n",
            copy.revision,
            restored.revision,
            in_parts(restored.transactions)
        ))
    })
}

fn in_parts(transactions: usize) -> String {
    match transactions {
        1 => String::new(),
        several => format!(" (written in {several} transactions: its server takes no larger ones)"),
    }
}

async fn migrate(
    common: &Common,
    from: &Location,
    to: &Location,
    follow: bool,
    replace: bool,
    etcd: &EtcdArgs,
) -> Result<(), Failure> {
    if from == to {
        return Err(Failure::Usage("a store cannot be moved onto itself".into()));
    }
    let (source, target) = (existing(from, etcd).await?, open(to, etcd).await?);
    let mut migration = Migration::begin(&*source, &*target, replace).await.map_err(refused)?;
    let objects = migration.objects;
    if follow {
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
        let parts = in_parts(migration.copied.transactions);
        output::note(&format!(
            "{objects} objects are copied{parts}; changes follow until this is interrupted\n"
        ));
        loop {
            tokio::select! {
                // A change that this interrupts is copied again at the end.
                step = migration.step() => step.map_err(failed)?,
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
            }
        }
    }
    let complete = migration.finish().await.map_err(failed)?;
    let answer = json!({ "from": from.to_string(), "to": to.to_string(), "objects": objects, "completeTo": complete.0 });
    output::show(common.output, &answer, || {
        Ok(format!("{to} is complete up to revision {complete} of {from}\n"))
    })
}

async fn compact(common: &Common, location: &Location) -> Result<(), Failure> {
    let Location::Embedded(directory) = location else {
        let message = "only an embedded store has a file of ours; etcd does so itself (--auto-compaction-retention, etcdctl defrag)";
        return Err(Failure::Usage(message.into()));
    };
    let directory = directory.clone();
    let done = tokio::task::spawn_blocking(move || Embedded::compact(directory)).await;
    let (before, after) =
        done.context("the compaction broke off")?.map_err(|error| closed(location, error))?;
    let answer = json!({ "store": location.to_string(), "bytesBefore": before, "bytesAfter": after });
    output::show(common.output, &answer, || Ok(format!("{before} bytes before, {after} bytes now\n")))
}

async fn info(common: &Common, location: &Location, etcd: &EtcdArgs) -> Result<(), Failure> {
    let store = existing(location, etcd).await?;
    let (objects, revision) = store.list("").await.map_err(failed)?;
    let bytes: usize = objects.iter().map(|object| object.key.len() + object.value.len()).sum();
    let leased = objects.iter().filter(|object| object.lease.is_some()).count();
    let answer = json!({
        "store": location.to_string(),
        "epoch": store.epoch(),
        "revision": revision.0,
        "objects": objects.len(),
        "bytes": bytes,
        "underLeases": leased,
    });
    output::show(common.output, &answer, || {
        let row = |name: &str| vec![name.to_owned(), plain(&answer[name])];
        let rows: Vec<_> =
            ["store", "epoch", "revision", "objects", "bytes", "underLeases"].map(row).into_iter().collect();
        Ok(output::table(&["WHAT", "VALUE"], &rows))
    })
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned)
}

/// Opens a store, or makes one.
async fn open(location: &Location, etcd: &EtcdArgs) -> Result<Arc<dyn Store>, Failure> {
    if *location == Location::Memory {
        return Err(Failure::Usage("memory: ends with the command, so there is no use in it here".into()));
    }
    etcd.complete(location.clone()).open().await.map_err(|error| closed(location, error))
}

/// Opens a store that is there.
async fn existing(location: &Location, etcd: &EtcdArgs) -> Result<Arc<dyn Store>, Failure> {
    let complete = etcd.complete(location.clone());
    match complete.exists().await {
        Ok(true) => open(location, etcd).await,
        Ok(false) => Err(Failure::no(format!("there is no store at {location}"))),
        Err(error) => Err(closed(location, error)),
    }
}

/// Says what to do about a store that somebody has open.
fn closed(location: &Location, error: StoreError) -> Failure {
    match error {
        StoreError::Locked { .. } => Failure::no(format!(
            "{error}: stop it first. A copy of a running controller's store is made by \"bulkhead store backup\" \
             without naming {location}"
        )),
        error => failed(error),
    }
}

fn failed(error: StoreError) -> Failure {
    match error {
        StoreError::Unavailable { .. } => Failure::Unreachable(error.to_string()),
        error => Failure::Other(error.to_string()),
    }
}

fn refused(error: BackupError) -> Failure {
    match error {
        BackupError::Store(error) => failed(error),
        BackupError::NotEmpty(_) => Failure::no(format!("{error}; --replace does it all the same")),
        error => Failure::no(error.to_string()),
    }
}
