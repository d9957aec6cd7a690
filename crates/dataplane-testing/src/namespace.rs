//! Threads in network namespaces of their own, joined by veths through a routing host.

use std::ffi::CString;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use bulkhead_model::host_policy::Attachment;

type Job = Box<dyn FnOnce() + Send>;

/// A thread that stays in its namespace and runs what it is given.
#[derive(Debug)]
pub struct Namespace {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    pub tid: i32,
}

impl Default for Namespace {
    fn default() -> Self {
        Self::new()
    }
}

impl Namespace {
    /// A thread in a fresh one.
    pub fn new() -> Self {
        let (jobs, inbox) = channel::<Job>();
        let (tid_sender, tid) = channel();
        let thread = std::thread::spawn(move || {
            enter_new_namespace();
            #[expect(unsafe_code, reason = "system call without a safe wrapper")]
            // SAFETY: takes nothing.
            tid_sender.send(unsafe { libc::gettid() }).unwrap();
            inbox.into_iter().for_each(|job| job());
        });
        let tid = tid.recv().unwrap();
        Self { jobs: Some(jobs), thread: Some(thread), tid }
    }

    pub fn exec<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, receiver) = channel();
        self.jobs.as_ref().unwrap().send(Box::new(move || sender.send(job()).unwrap())).unwrap();
        receiver.recv().unwrap()
    }

    /// A workload: a veth whose host side is `name` in this thread's namespace.
    pub fn workload(name: &str, number: u8) -> Self {
        let namespace = Self::new();
        run(&format!("ip link add {name} type veth peer name {name}p"));
        run(&format!("ip link set {name}p netns {}", namespace.tid));
        run(&format!("ip addr add 10.0.{number}.1/24 dev {name}"));
        run(&format!("ip link set {name} up"));
        let name = name.to_owned();
        namespace.exec(move || {
            run("ip link set lo up");
            run(&format!("ip addr add 10.0.{number}.2/24 dev {name}p"));
            run(&format!("ip link set {name}p up"));
            run(&format!("ip route add default via 10.0.{number}.1"));
        });
        namespace
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

/// A large receive buffer, so that only the dataplane can lose packets.
pub fn enlarge(socket: &impl AsRawFd) {
    let size: libc::c_int = 64 << 20;
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: the option is an int that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const size).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    assert_eq!(result, 0);
}

/// Moves this thread into a namespace of its own.
pub fn enter_new_namespace() {
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: affects the calling thread only.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "these tests need root: {}", std::io::Error::last_os_error());
}

pub fn run(command: &str) {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs many commands of `ip` at once, in the namespace of this thread.
///
/// # Panics
/// If one of them fails.
pub fn ip(commands: &[String]) {
    let mut ip = Command::new("ip");
    let ip = ip.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut ip = ip.spawn().unwrap();
    ip.stdin.take().unwrap().write_all(commands.join("\n").as_bytes()).unwrap();
    let output = ip.wait_with_output().unwrap();
    assert!(output.status.success(), "{commands:?}: {}", String::from_utf8_lossy(&output.stderr));
}

pub fn ifindex(name: &str) -> u32 {
    let name = CString::new(name).unwrap();
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: a C string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    assert_ne!(index, 0, "{name:?}");
    index
}

pub fn interface(name: &str) -> Attachment {
    Attachment::Interface(ifindex(name))
}

pub fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: the struct outlives the call.
    unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time);
    }
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
