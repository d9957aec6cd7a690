//! A copy of a store as lines of JSON, which any store can take in.
//!
//! The first line says what it is: `{"bulkhead":"backup","format":1,"epoch":…,"revision":…,"objects":…}`. One line for each
//! object follows, by key: `{"key":…,"value":…,"created":…,"modified":…}`, with `"base64"` in place of `"value"` if the value is
//! no text. The last line, `{"end":true,"sha256":…}`, has the digest of all bytes before it: a copy that was cut off or altered
//! is refused before anything is written.
//!
//! Objects under a lease are left out: they stand for processes that are connected to this very store.
//! What takes a copy in has an epoch and revisions of its own, so nobody takes its revisions for those of the copied one.

use std::io::{self, BufRead, Read};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::Store;
use crate::types::{Precondition, Revision, StoreError, Stored, TRANSACTION_BYTES_MAX, Transaction};

/// The only layout there is.
const FORMAT: u32 = 1;
/// Longest line: the largest value there can be, each byte of which may need six as JSON.
const LINE_BYTES_MAX: u64 = 6 * TRANSACTION_BYTES_MAX as u64 + 65_536;
/// Operations written at once into a store that does not take all of them: what etcd takes unless told otherwise.
const BATCH_OPS: usize = 100;
/// Bytes in such a batch, likewise.
const BATCH_BYTES: usize = 1 << 20;

/// Why a copy was not taken in.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// It cannot be read.
    #[error("the backup cannot be read: {0}")]
    Read(#[from] io::Error),
    /// It is not what it should be.
    #[error("the backup is damaged, line {line}: {reason}; nothing was changed")]
    Damaged {
        /// Where.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// The store has objects.
    #[error("{0} objects are in the store already, and would be lost: nothing was changed")]
    NotEmpty(usize),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    bulkhead: String,
    format: u32,
    epoch: String,
    revision: u64,
    objects: usize,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    key: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base64: Option<String>,
    created: u64,
    modified: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct End {
    end: bool,
    sha256: String,
}

/// A store's objects as of one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    /// The store's epoch.
    pub epoch: String,
    /// The revision.
    pub revision: Revision,
    /// The objects, by key.
    pub objects: Vec<Stored>,
}

/// How a copy was taken in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    /// The revision after it.
    pub revision: Revision,
    /// In how many transactions. More than one only where the store's server takes no larger ones.
    pub transactions: usize,
}

impl Backup {
    /// Copies a store, which may be in use.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn take(store: &dyn Store) -> Result<Self, StoreError> {
        let (mut objects, revision) = store.list("").await?;
        objects.retain(|object| object.lease.is_none());
        Ok(Self { epoch: store.epoch().to_owned(), revision, objects })
    }

    /// The copy's lines, each with its end.
    pub fn into_lines(self) -> impl Iterator<Item = Bytes> + Send {
        let header = Header {
            bulkhead: "backup".into(),
            format: FORMAT,
            epoch: self.epoch,
            revision: self.revision.0,
            objects: self.objects.len(),
        };
        let mut digest = Sha256::new();
        let first = line(&header);
        digest.update(&first);
        let mut objects = self.objects.into_iter();
        let mut ended = false;
        std::iter::once(first).chain(std::iter::from_fn(move || {
            if let Some(object) = objects.next() {
                let line = row(&object);
                digest.update(&line);
                return Some(line);
            }
            let sha256 = hex(&digest.finalize_reset());
            (!std::mem::replace(&mut ended, true)).then(|| line(&End { end: true, sha256 }))
        }))
    }

    /// Reads a copy, all of it, and checks it.
    ///
    /// # Errors
    /// If it cannot be read, or is damaged.
    pub fn read(mut from: impl BufRead) -> Result<Self, BackupError> {
        let mut number = 0;
        let mut next = |buffer: &mut Vec<u8>| -> Result<usize, BackupError> {
            buffer.clear();
            number += 1;
            let count = from.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', buffer)?;
            let damaged = |reason: &str| BackupError::Damaged { line: number, reason: reason.to_owned() };
            match buffer.last() {
                None => Err(damaged("it ends before its end")),
                Some(b'\n') => Ok(number),
                Some(_) if count as u64 == LINE_BYTES_MAX => Err(damaged("the line is too long")),
                Some(_) => Err(damaged("it ends in the midst of a line")),
            }
        };
        let mut digest = Sha256::new();
        let mut buffer = Vec::new();
        let at = next(&mut buffer)?;
        let header: Header = parse(&buffer, at)?;
        let damaged = |line: usize, reason: &str| BackupError::Damaged { line, reason: reason.to_owned() };
        if header.bulkhead != "backup" || header.format != FORMAT {
            return Err(damaged(at, "it is of another format"));
        }
        digest.update(&buffer);
        let mut objects: Vec<Stored> = Vec::new();
        for _ in 0..header.objects {
            let at = next(&mut buffer)?;
            let row: Row = parse(&buffer, at)?;
            digest.update(&buffer);
            let value = match (row.value, row.base64) {
                (Some(text), None) => text.into_bytes(),
                (None, Some(text)) => {
                    BASE64.decode(text).map_err(|_wrong| damaged(at, "its base64 is none"))?
                }
                _ => return Err(damaged(at, "it needs either value or base64")),
            };
            if objects.last().is_some_and(|last| *last.key >= *row.key) {
                return Err(damaged(at, "the keys must rise"));
            }
            objects.push(Stored {
                key: row.key.into(),
                value: value.into(),
                created: Revision(row.created),
                modified: Revision(row.modified),
                lease: None,
            });
        }
        let at = next(&mut buffer)?;
        let end: End = parse(&buffer, at)?;
        if !end.end || end.sha256 != hex(&digest.finalize()) {
            return Err(damaged(at, "its digest is another: it was altered"));
        }
        if from.read(&mut [0])? > 0 {
            return Err(damaged(at + 1, "there is something behind its end"));
        }
        Ok(Self { epoch: header.epoch, revision: Revision(header.revision), objects })
    }

    /// Takes the copy into a store, which must be empty, or is made equal to it with `replace`. One transaction, unless the
    /// store's server takes none so large: then in several, and nobody may use the store before this is done.
    ///
    /// # Errors
    /// [`BackupError::NotEmpty`], or if the store fails.
    pub async fn restore(&self, store: &dyn Store, replace: bool) -> Result<Restored, BackupError> {
        let (before, _) = store.list("").await?;
        if !before.is_empty() && !replace {
            return Err(BackupError::NotEmpty(before.len()));
        }
        let whole = self.transaction(&before);
        match store.apply(whole.clone()).await {
            Ok(applied) => Ok(Restored { revision: applied.revision, transactions: 1 }),
            Err(StoreError::ServerLimit { .. }) => in_batches(store, whole).await,
            Err(error) => Err(error.into()),
        }
    }

    /// What makes a store that holds `before` equal to the copy. Nothing may have changed meanwhile.
    fn transaction(&self, before: &[Stored]) -> Transaction {
        let known = |key: &str| before.binary_search_by(|other| (*other.key).cmp(key)).map(|at| &before[at]);
        let mut all = Transaction::new();
        for object in &self.objects {
            let when = known(&object.key)
                .map_or(Precondition::Absent, |other| Precondition::AtRevision(other.modified));
            all = all.put(object.key.clone(), object.value.clone(), when);
        }
        let ours = |key: &str| self.objects.binary_search_by(|other| (*other.key).cmp(key)).is_ok();
        for gone in before.iter().filter(|object| !ours(&object.key)) {
            all = all.delete(gone.key.clone(), Precondition::AtRevision(gone.modified));
        }
        all
    }
}

async fn in_batches(store: &dyn Store, whole: Transaction) -> Result<Restored, BackupError> {
    let mut transactions = 0;
    let mut revision = Revision(0);
    let mut batch = Transaction::new();
    let mut ops = whole.ops.into_iter().peekable();
    while let Some(op) = ops.next() {
        batch.ops.push(op);
        let next = ops.peek().map(|next| Transaction { ops: vec![next.clone()] }.bytes());
        let full = batch.ops.len() == BATCH_OPS || next.is_none_or(|next| batch.bytes() + next > BATCH_BYTES);
        if full {
            revision = store.apply(std::mem::take(&mut batch)).await?.revision;
            transactions += 1;
        }
    }
    Ok(Restored { revision, transactions })
}

fn parse<'a, T: Deserialize<'a>>(line: &'a [u8], number: usize) -> Result<T, BackupError> {
    serde_json::from_slice(line)
        .map_err(|error| BackupError::Damaged { line: number, reason: error.to_string() })
}

fn row(object: &Stored) -> Bytes {
    let text = std::str::from_utf8(&object.value).ok().map(ToOwned::to_owned);
    let base64 = text.is_none().then(|| BASE64.encode(&object.value));
    line(&Row {
        key: object.key.to_string(),
        value: text,
        base64,
        created: object.created.0,
        modified: object.modified.0,
    })
}

fn line(value: &impl Serialize) -> Bytes {
    // Texts and numbers under fixed names: there is nothing in them that JSON could not say.
    let mut text = serde_json::to_vec(value).unwrap_or_default();
    text.push(b'\n');
    text.into()
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
