//! Network namespaces of our own: each is a thread that lives in it, and ends with that thread.

use std::process::{Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use anyhow::{Context, anyhow, bail};

type Job = Box<dyn FnOnce() + Send>;

/// A thread that stays in a network namespace of its own and runs what it is given. Threads that it starts
/// are in the same namespace.
#[derive(Debug)]
pub(crate) struct Namespace {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    tid: i32,
}

impl Namespace {
    /// A namespace with nothing but a loopback interface.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let (jobs, inbox) = channel::<Job>();
        let (ready, tid) = channel();
        let thread = std::thread::Builder::new().name("netns".into()).spawn(move || {
            let entered = enter_new().map(|()| rustix::thread::gettid().as_raw_nonzero().get());
            let failed = entered.is_err();
            // Who made us waits for this answer.
            let _ = ready.send(entered);
            if !failed {
                inbox.into_iter().for_each(|job| job());
            }
        })?;
        let tid = tid.recv().context("the namespace's thread has died")??;
        let namespace = Self { jobs: Some(jobs), thread: Some(thread), tid };
        namespace.exec(|| run("ip link set lo up"))??;
        Ok(namespace)
    }

    /// Runs something inside and waits for its answer.
    pub(crate) fn exec<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> anyhow::Result<T> {
        let (sender, receiver) = channel();
        let job = Box::new(move || {
            // Nobody waits if the caller has given up.
            let _ = sender.send(job());
        });
        let jobs = self.jobs.as_ref().ok_or_else(|| anyhow!("the namespace is gone"))?;
        jobs.send(job).map_err(|_closed| anyhow!("the namespace's thread has died"))?;
        receiver.recv().context("a job in a namespace has panicked")
    }

    /// Where the kernel shows it.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/task/{}/ns/net", std::process::id(), self.tid)
    }

    /// A workload at 10.0.`number`.2: a veth whose host side is `name` in this thread's namespace.
    pub(crate) fn workload(name: &str, number: u8) -> anyhow::Result<Self> {
        let namespace = Self::new()?;
        run(&format!("ip link add {name} type veth peer name {name}p"))?;
        run(&format!("ip link set {name}p netns {}", namespace.tid))?;
        run(&format!("ip addr add 10.0.{number}.1/24 dev {name}"))?;
        run(&format!("ip link set {name} up"))?;
        let inside = format!("{name}p");
        namespace.exec(move || {
            run(&format!("ip addr add 10.0.{number}.2/24 dev {inside}"))?;
            run(&format!("ip link set {inside} up"))?;
            run(&format!("ip route add default via 10.0.{number}.1"))?;
            // Connections of one sample must not starve the next one of ports.
            set("net/ipv4/ip_local_port_range", "1024 65535")?;
            set("net/ipv4/tcp_tw_reuse", "1")
        })??;
        Ok(namespace)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// A namespace that forwards, like a host with workloads.
pub(crate) fn host() -> anyhow::Result<Namespace> {
    let host = Namespace::new()?;
    host.exec(|| set("net/ipv4/ip_forward", "1"))??;
    Ok(host)
}

#[expect(unsafe_code, reason = "system call without a safe wrapper")]
fn enter_new() -> anyhow::Result<()> {
    // SAFETY: it affects the calling thread only, which was started for it.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(std::io::Error::last_os_error()).context("cannot make a network namespace");
    }
    Ok(())
}

/// Sets a kernel parameter of this thread's namespace.
fn set(name: &str, value: &str) -> anyhow::Result<()> {
    std::fs::write(format!("/proc/sys/{name}"), value).with_context(|| format!("cannot set {name}"))
}

/// Runs a command in this thread's namespace.
pub(crate) fn run(command: &str) -> anyhow::Result<()> {
    let mut words = command.split_whitespace();
    let program = words.next().ok_or_else(|| anyhow!("an empty command"))?;
    let output =
        Command::new(program).args(words).output().with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        bail!("{command}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Runs a command in this thread's namespace and feeds it a text.
pub(crate) fn feed(command: &str, text: &str) -> anyhow::Result<()> {
    use std::io::Write;
    let mut words = command.split_whitespace();
    let program = words.next().ok_or_else(|| anyhow!("an empty command"))?;
    let mut child = Command::new(program)
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes()).with_context(|| format!("{command} does not listen"))?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{command}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
