//! The audit log: every change that operators make or try, one JSON object per line, in a file that only grows.
//!
//! Each line carries the digest of the line before, so that a line that was changed or taken out is noticed by
//! [`verify`]. A full file is put aside under its number; nothing is ever deleted. The repository's own history has the same
//! changes in their transactions; this file has the refused ones too, and outlives it.
//!
//! It fails closed: operators' changes are refused ([`Audit::ready`]) while a line cannot be written or there is hardly any room
//! for one. Lines of what was under way when the disk failed wait in memory, [`WAITING_MAX`] at most, and are written first.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::http::Method;
use bulkhead_store::free_bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::access::Caller;
use crate::clock;
use crate::metrics::Metrics;

/// Name of the file that is written.
const FILE: &str = "audit.jsonl";
/// A file of this size is put aside.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// Lines that wait for a disk that cannot be written; later ones are lost, and counted. Nobody's changes go on meanwhile, but
/// refused ones have lines too.
const WAITING_MAX: usize = 1000;
/// Bytes that must be free for a change to begin: for its line, and those of changes under way.
const FREE_BYTES_MIN: u64 = 1 << 20;
/// What the first line of all has for a digest of the one before.
const BEGINNING: &str = "";

/// A line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    time: String,
    by: String,
    from: String,
    /// `POST /apis/…` or what was asked for.
    what: String,
    /// `done` or `refused`.
    outcome: String,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    detail: Value,
    /// SHA-256 of the line before, in hexadecimal.
    previous: String,
}

#[derive(Debug)]
struct Open {
    file: File,
    bytes: u64,
    previous: String,
}

/// Where lines go; nowhere if the repository is in memory.
#[derive(Debug)]
pub(crate) struct Audit {
    log: Option<Arc<Mutex<Log>>>,
}

#[derive(Debug)]
struct Log {
    directory: PathBuf,
    open: Option<Open>,
    /// Lines that could not be written yet, oldest first.
    waiting: VecDeque<Line>,
    metrics: Arc<Metrics>,
}

/// A log that cannot be written, or has been altered.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// A file cannot be used.
    #[error("{path}: {source}")]
    File {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// There is hardly any room left for a line.
    #[error("{0}: only {1} bytes are free: make room there")]
    NoRoom(PathBuf, u64),
    /// A line is not what it was.
    #[error("{path}:{line}: {what}")]
    Altered {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        what: &'static str,
    },
}

fn digest(line: &str) -> String {
    Sha256::digest(line).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Audit {
    /// Goes on with the file of a directory.
    pub(crate) fn open(directory: Option<PathBuf>, metrics: Arc<Metrics>) -> Result<Self, AuditError> {
        let log = |directory: PathBuf| {
            let open = Some(Open::at(&directory)?);
            let log = Log { directory, open, waiting: VecDeque::new(), metrics };
            Ok::<_, AuditError>(Arc::new(Mutex::new(log)))
        };
        Ok(Self { log: directory.map(log).transpose()? })
    }

    /// Whether a change may begin: there will be a line about it.
    pub(crate) async fn ready(&self) -> Result<(), AuditError> {
        self.with_log(Log::ready).await.unwrap_or(Ok(()))
    }

    /// Lines that wait for the disk.
    pub(crate) fn waiting(&self) -> usize {
        self.log.as_ref().map_or(0, |log| locked(log).waiting.len())
    }

    /// A change was made.
    pub(crate) async fn done(&self, by: &str, from: &str, what: &str, detail: Value) {
        self.write(by, from, what, "done", detail).await;
    }

    /// A change was tried and refused.
    pub(crate) async fn refused(&self, caller: &Caller, method: &Method, path: &str, why: &str) {
        let what = format!("{method} {path}");
        self.write(&caller.name(), &caller.from(), &what, "refused", json!({ "why": why })).await;
    }

    /// What was asked for was not done.
    pub(crate) async fn not_done(&self, by: &str, from: &str, what: &str, objects: &[String], why: &str) {
        self.write(by, from, what, "refused", json!({ "objects": objects, "why": why })).await;
    }

    /// Durable when this is done, unless the disk cannot be written: then it waits, and no change begins.
    async fn write(&self, by: &str, from: &str, what: &str, outcome: &str, detail: Value) {
        let line = Line {
            time: clock::rfc3339(clock::now_ms()),
            by: by.into(),
            from: from.into(),
            what: what.into(),
            outcome: outcome.into(),
            detail,
            previous: String::new(),
        };
        self.with_log(move |log| log.add(line)).await;
    }

    /// On a thread that may wait for the disk. `None`: there is no log.
    async fn with_log<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Log) -> T + Send + 'static,
    ) -> Option<T> {
        let log = Arc::clone(self.log.as_ref()?);
        match tokio::task::spawn_blocking(move || work(&mut locked(&log))).await {
            Ok(done) => Some(done),
            Err(error) => {
                tracing::error!(%error, "writing the audit log failed");
                None
            }
        }
    }
}

fn locked(log: &Mutex<Log>) -> MutexGuard<'_, Log> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Log {
    fn ready(&mut self) -> Result<(), AuditError> {
        self.flush()?;
        match free_bytes(&self.directory) {
            Some(free) if free < FREE_BYTES_MIN => Err(AuditError::NoRoom(self.directory.clone(), free)),
            Some(_) | None => Ok(()),
        }
    }

    fn add(&mut self, line: Line) {
        let was_waiting = !self.waiting.is_empty();
        if self.waiting.len() >= WAITING_MAX {
            self.metrics.audit_lost.add(1);
            let Line { by, from, what, outcome, .. } = line;
            tracing::error!(by, from, what, outcome, "a line of the audit log is lost");
            return;
        }
        self.waiting.push_back(line);
        match self.flush() {
            Err(error) if !was_waiting => {
                tracing::error!(%error, "the audit log cannot be written: changes are refused until it can");
            }
            Ok(()) if was_waiting => tracing::warn!("the audit log is written again"),
            Ok(()) | Err(_) => {}
        }
    }

    /// Writes what waits.
    fn flush(&mut self) -> Result<(), AuditError> {
        while let Some(mut line) = self.waiting.pop_front() {
            if let Err(error) = self.append(&mut line) {
                self.waiting.push_front(line);
                return Err(error);
            }
        }
        Ok(())
    }

    fn append(&mut self, line: &mut Line) -> Result<(), AuditError> {
        let path = self.directory.join(FILE);
        let fail = |source| AuditError::File { path: path.clone(), source };
        let mut current = match self.open.take() {
            Some(current) => current,
            None => Open::at(&self.directory)?,
        };
        if current.bytes > FILE_BYTES_MAX {
            put_aside(&self.directory).map_err(fail)?;
            current = Open { previous: current.previous, ..Open::at(&self.directory)? };
        }
        line.previous.clone_from(&current.previous);
        let text = serde_json::to_string(line).map_err(|error| fail(error.into()))?;
        // One write: after a crash there is a whole line, or a torn one at the end, which the next start cuts off.
        let written = current.file.write_all(format!("{text}\n").as_bytes());
        if let Err(error) = written.and_then(|()| current.file.sync_data()) {
            // Part of it may be there. If that cannot be taken back, all of the file is read again to find its end.
            if current.file.set_len(current.bytes).is_ok() {
                self.open = Some(current);
            }
            return Err(fail(error));
        }
        current.bytes += text.len() as u64 + 1;
        current.previous = digest(&text);
        self.open = Some(current);
        Ok(())
    }
}

fn put_aside(directory: &Path) -> std::io::Result<()> {
    let numbers = (1_u32..).map(|number| directory.join(format!("audit-{number:06}.jsonl")));
    let free = numbers.into_iter().find(|path| !path.exists());
    std::fs::rename(directory.join(FILE), free.unwrap_or_default())
}

/// Files of a directory, oldest first.
fn files(directory: &Path) -> Vec<PathBuf> {
    let aside = (1_u32..).map(|number| directory.join(format!("audit-{number:06}.jsonl")));
    let mut all: Vec<PathBuf> = aside.take_while(|path| path.exists()).collect();
    all.push(directory.join(FILE));
    all
}

impl Open {
    fn at(directory: &Path) -> Result<Self, AuditError> {
        let path = directory.join(FILE);
        let fail = |source| AuditError::File { path: path.clone(), source };
        std::fs::create_dir_all(directory).map_err(fail)?;
        let file =
            OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&path).map_err(fail)?;
        let mut previous = BEGINNING.to_owned();
        let mut whole = 0;
        let mut reader = BufReader::new(&file);
        let mut line = String::new();
        while reader.read_line(&mut line).map_err(fail)? > 0 {
            let Some(text) = line.strip_suffix('\n') else { break };
            previous = digest(text);
            whole += line.len() as u64;
            line.clear();
        }
        // What a crash left of a line was never acknowledged.
        file.set_len(whole).map_err(fail)?;
        if whole == 0
            && let Some(last) = files(directory).iter().rev().nth(1)
        {
            let text = std::fs::read_to_string(last).map_err(fail)?;
            previous = text.lines().last().map_or_else(|| BEGINNING.to_owned(), digest);
        }
        Ok(Self { file, bytes: whole, previous })
    }
}

/// Whether all lines of a directory's log are what they were; answers how many there are.
///
/// # Errors
/// With the first that is not, or a file that cannot be read.
pub fn verify(directory: &Path) -> Result<usize, AuditError> {
    let mut previous = BEGINNING.to_owned();
    let mut count = 0;
    for path in files(directory) {
        let text = std::fs::read_to_string(&path)
            .map_err(|source| AuditError::File { path: path.clone(), source })?;
        for (number, text) in text.lines().enumerate() {
            let altered = |what| AuditError::Altered { path: path.clone(), line: number + 1, what };
            let line: Line =
                serde_json::from_str(text).map_err(|_not_one| altered("not a line of the log"))?;
            if line.previous != previous {
                return Err(altered("the line before it is not the one that was there when it was written"));
            }
            previous = digest(text);
            count += 1;
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(directory: &Path) -> Audit {
        Audit::open(Some(directory.to_owned()), Arc::default()).unwrap()
    }

    #[tokio::test]
    async fn lines_are_chained_over_restarts_and_a_torn_end() {
        let directory = tempfile::tempdir().unwrap();
        for number in 0..3 {
            let audit = log(directory.path());
            audit.done("ann", "socket", "apply", json!({ "number": number })).await;
            audit.done("bob", "socket", "apply", Value::Null).await;
            let mut file = OpenOptions::new().append(true).open(directory.path().join(FILE)).unwrap();
            file.write_all(b"{\"time\": \"torn").unwrap();
        }
        drop(log(directory.path()));
        assert_eq!(verify(directory.path()).unwrap(), 6);
    }

    #[tokio::test]
    async fn a_line_that_is_changed_or_gone_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let audit = log(directory.path());
        for number in 0..4 {
            audit.done("ann", "socket", "apply", json!({ "number": number })).await;
        }
        let path = directory.path().join(FILE);
        let good = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = good.lines().collect();
        std::fs::write(&path, good.replace("\"number\":1", "\"number\":7")).unwrap();
        assert!(matches!(verify(directory.path()), Err(AuditError::Altered { line: 3, .. })));
        std::fs::write(&path, [lines[0], lines[2], lines[3], ""].join("\n")).unwrap();
        assert!(matches!(verify(directory.path()), Err(AuditError::Altered { line: 2, .. })));
        std::fs::write(&path, &good).unwrap();
        assert_eq!(verify(directory.path()).unwrap(), 4);
    }

    #[tokio::test]
    async fn a_full_file_is_put_aside_and_the_chain_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let audit = log(directory.path());
        audit.done("ann", "socket", "apply", Value::Null).await;
        locked(audit.log.as_ref().unwrap()).open.as_mut().unwrap().bytes = FILE_BYTES_MAX + 1;
        audit.done("ann", "socket", "apply", Value::Null).await;
        assert_eq!(files(directory.path()).len(), 2);
        // Found again by a process that starts with an empty file, too.
        drop(audit);
        put_aside(directory.path()).unwrap();
        log(directory.path()).done("ann", "socket", "apply", Value::Null).await;
        assert_eq!(verify(directory.path()).unwrap(), 3);
    }
}
