//! One named network namespace.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Where iproute2 keeps names of namespaces.
const NAMES: &str = "/run/netns";

/// A network namespace with a name; deleted when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
    keep: bool,
}

impl Netns {
    /// Makes it.
    ///
    /// # Errors
    /// If not root, or the name is taken.
    pub fn new(name: &str) -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "network namespaces need root: run this as root");
        ip(&[], &[format!("netns add {name}")])?;
        Ok(Self { name: name.into(), keep: false })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it.
    pub fn path(&self) -> PathBuf {
        Path::new(NAMES).join(&self.name)
    }

    /// Leaves it behind when dropped.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Runs lines for `ip -batch` in it; all must succeed.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn ip(&self, lines: &[String]) -> Result<()> {
        ip(&["-n", &self.name], lines).with_context(|| format!("in namespace {}", self.name))
    }

    /// Runs `work` on a thread of its own in this namespace. Sockets opened and processes started there stay
    /// there.
    ///
    /// # Errors
    /// If the namespace is gone, and whatever `work` answers.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let path = self.path();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                enter(&path)?;
                work()
            });
            thread.join().unwrap_or_else(|_| Err(anyhow!("a thread in namespace {} panicked", self.name)))
        })
    }

    /// Writes kernel settings, `net.…` as `/proc/sys` shows them in this namespace.
    ///
    /// # Errors
    /// If one cannot be written.
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.run(|| {
            for (name, value) in settings {
                let path = Path::new("/proc/sys").join(name.replace('.', "/"));
                std::fs::write(&path, value).with_context(|| format!("{}", path.display()))?;
            }
            Ok(())
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if !self.keep {
            delete(&self.name);
        }
    }
}

/// Moves the calling thread into the namespace at `path`, for good.
pub(crate) fn enter(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open namespace {}", path.display()))?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("cannot enter namespace {}", path.display()))
}

/// Deletes all namespaces whose names begin so.
pub(crate) fn delete_all(prefix: &str) {
    let entries = std::fs::read_dir(NAMES).into_iter().flatten().flatten();
    for name in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
        if name.starts_with(prefix) {
            delete(&name);
        }
    }
}

fn delete(name: &str) {
    // What cannot be deleted is reported by the next run that wants the name.
    let _ = ip(&[], &[format!("netns delete {name}")]);
}

fn ip(options: &[&str], lines: &[String]) -> Result<()> {
    let mut child = Command::new("ip")
        .args(options)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run ip: install iproute2")?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(lines.join("\n").as_bytes())?;
    }
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip: {}\n{}", said.trim(), lines.join("\n"));
    Ok(())
}
