//! Threads in network namespaces of their own, joined by veths through a routing host.

use std::os::fd::AsRawFd;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use super::{enter_new_namespace, run};

type Job = Box<dyn FnOnce() + Send>;

/// A thread that stays in its namespace and runs what it is given.
#[derive(Debug)]
pub(crate) struct Namespace {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    pub(crate) tid: i32,
}

impl Namespace {
    pub(crate) fn new() -> Self {
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

    pub(crate) fn exec<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, receiver) = channel();
        self.jobs.as_ref().unwrap().send(Box::new(move || sender.send(job()).unwrap())).unwrap();
        receiver.recv().unwrap()
    }

    /// A workload: a veth whose host side is `name` in this thread's namespace.
    pub(crate) fn workload(name: &str, number: u8) -> Self {
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
pub(crate) fn enlarge(socket: &impl AsRawFd) {
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
