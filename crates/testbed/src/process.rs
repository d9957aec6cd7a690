//! Processes in namespaces, with logs in files and a ledger, so that a later run can end what this one left.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use crate::Netns;

/// How long a process may take to end itself before it is killed.
const STOP_TIME: Duration = Duration::from_secs(5);

/// A running process; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
    keep: bool,
}

impl Process {
    /// Starts `command` in `namespace`. Both outputs are appended to `log`; the process is noted in `ledger`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(namespace: &Netns, mut command: Command, log: &Path, ledger: &Path) -> Result<Self> {
        let out = OpenOptions::new().create(true).append(true).open(log)?;
        let shown = format!("{command:?}");
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let child = namespace.run(|| command.spawn().with_context(|| format!("cannot start {shown}")))?;
        let mut file: File = OpenOptions::new().create(true).append(true).open(ledger)?;
        writeln!(file, "{} {}", child.id(), start_time(child.id()).unwrap_or_default())?;
        Ok(Self { child, log: log.into(), keep: false })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All it has written so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Leaves it running when dropped.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// SIGKILL, and waits for its end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// A signal, and nothing waited for.
    pub(crate) fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, signal);
        }
    }

    /// SIGTERM, and waits for its end; SIGKILL if it takes longer than [`STOP_TIME`].
    pub fn stop(&mut self) -> Option<ExitStatus> {
        self.signal(Signal::TERM);
        let deadline = Instant::now() + STOP_TIME;
        while Instant::now() < deadline {
            if let Some(status) = self.ended() {
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.kill();
        None
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.keep {
            self.kill();
        }
    }
}

/// Kills what is still running of a ledger. A process id that was given to another process meanwhile is told
/// by its start time.
pub(crate) fn kill_ledger(ledger: &Path) {
    for line in fs::read_to_string(ledger).unwrap_or_default().lines() {
        let Some((id, started)) = line.split_once(' ') else { continue };
        let Ok(id) = id.parse::<u32>() else { continue };
        if start_time(id).as_deref() == Some(started)
            && let Some(pid) = i32::try_from(id).ok().and_then(Pid::from_raw)
        {
            let _ = kill_process(pid, Signal::KILL);
            let deadline = Instant::now() + STOP_TIME;
            while start_time(id).as_deref() == Some(started) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// Field 22 of `/proc/PID/stat`; nothing for a process that has ended.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, so fields count from behind it: state is the third.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if state == "Z" { None } else { fields.nth(18).map(Into::into) }
}
