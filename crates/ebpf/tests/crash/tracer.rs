//! Kills a process at any step of what it does to the kernel's tables, from outside: by ptrace.
//!
//! A step is a system call that changes something (a map, a link, a pin), met before it happens; or a store into the
//! memory that the tables share, met right after it, by single steps of the processor.

use std::io;
use std::mem::size_of;

use libc::{c_int, c_void, pid_t};

/// What a traced process does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// It is about to make, or has made, a system call.
    Call,
    /// It has executed one instruction.
    Step,
    /// It has ended well.
    Ended,
}

/// Where to kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    /// Changing system calls that are let through.
    pub(crate) calls: usize,
    /// Stores after the last of those that are let through.
    pub(crate) stores: usize,
}

/// What somebody saw who let a process run to its end.
#[derive(Debug, Default)]
pub(crate) struct Course {
    /// Changing system calls, by name, and whether each has changed anything.
    pub(crate) calls: Vec<(String, bool)>,
    /// Those (by number) behind which words of shared memory have changed before the next, and how many.
    stores_behind: Vec<(usize, usize)>,
}

fn check(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn ptrace(request: u32, pid: pid_t, address: usize, data: usize) -> io::Result<i64> {
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: `address` and `data` are numbers, or name memory of ours that outlives the call.
    check(unsafe { libc::ptrace(request, pid, address as *mut c_void, data as *mut c_void) })
}

/// A forked process that does `work` and is traced by us.
struct Traced {
    pid: pid_t,
    ended: bool,
}

impl Traced {
    fn start(work: &mut dyn FnMut()) -> io::Result<Self> {
        #[expect(unsafe_code, reason = "system call without a safe wrapper")]
        // SAFETY: this process has one thread, so that the child may do what the parent may.
        let pid = unsafe { libc::fork() };
        check(pid.into())?;
        if pid == 0 {
            let ready = ptrace(libc::PTRACE_TRACEME, 0, 0, 0).is_ok();
            #[expect(unsafe_code, reason = "system call without a safe wrapper")]
            // SAFETY: a number; stops this process until its tracer goes on.
            unsafe {
                libc::raise(libc::SIGSTOP);
            }
            let well = ready && std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_ok();
            #[expect(unsafe_code, reason = "leaves without the parent's destructors")]
            // SAFETY: ends the process.
            unsafe {
                libc::_exit(i32::from(!well));
            }
        }
        let traced = Self { pid, ended: false };
        let status = traced.wait()?;
        assert!(libc::WIFSTOPPED(status), "{status:#x}");
        let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL;
        ptrace(libc::PTRACE_SETOPTIONS, pid, 0, options as usize)?;
        Ok(traced)
    }

    fn wait(&self) -> io::Result<c_int> {
        let mut status = 0;
        #[expect(unsafe_code, reason = "system call without a safe wrapper")]
        // SAFETY: the status outlives the call.
        check(unsafe { libc::waitpid(self.pid, &raw mut status, libc::__WALL) }.into())?;
        Ok(status)
    }

    fn go_on(&mut self, request: u32) -> io::Result<Stop> {
        let mut signal = 0;
        loop {
            ptrace(request, self.pid, 0, signal)?;
            let status = self.wait()?;
            if libc::WIFEXITED(status) {
                self.ended = true;
                assert_eq!(libc::WEXITSTATUS(status), 0, "the work itself failed");
                return Ok(Stop::Ended);
            }
            assert!(libc::WIFSTOPPED(status), "ended by a signal: {status:#x}");
            match libc::WSTOPSIG(status) {
                stop if stop == libc::SIGTRAP | 0x80 => return Ok(Stop::Call),
                libc::SIGTRAP => return Ok(Stop::Step),
                // Of a debugger's; others are the process's own.
                other => signal = other as usize,
            }
        }
    }

    /// Whether the system call that has just been made has failed.
    fn has_failed(&self) -> io::Result<bool> {
        const EXIT: u8 = 2;
        let info = self.call()?;
        Ok(info[0].to_ne_bytes()[0] == EXIT && info[3].cast_signed() < 0)
    }

    fn call(&self) -> io::Result<[u64; 11]> {
        let mut info = [0u64; 11];
        let request = 0x420e; // PTRACE_GET_SYSCALL_INFO
        ptrace(request, self.pid, size_of::<[u64; 11]>(), info.as_mut_ptr() as usize)?;
        Ok(info)
    }

    /// The name of the changing system call that is about to be made. Maps that are made belong to nobody else until they
    /// are put somewhere, so making one changes nothing.
    fn change(&self) -> io::Result<Option<String>> {
        const ENTRY: u8 = 1;
        let info = self.call()?;
        if info[0].to_ne_bytes()[0] != ENTRY {
            return Ok(None);
        }
        let (number, first) = (info[3] as i64, info[4]);
        let bpf = |command| {
            Some(match command {
                2 => "write an element",
                3 => "delete an element",
                6 => "pin",
                21 => "take an element",
                26 => "write elements",
                27 => "delete elements",
                28 => "create a link",
                29 => "update a link",
                34 => "detach a link",
                _ => return None,
            })
        };
        let name = match number {
            libc::SYS_bpf => bpf(first),
            libc::SYS_mkdir | libc::SYS_mkdirat => Some("make a directory"),
            libc::SYS_unlink | libc::SYS_unlinkat | libc::SYS_rmdir => Some("remove a pin"),
            _ => None,
        };
        Ok(name.map(ToOwned::to_owned))
    }

    /// To the next changing system call, before it is made.
    fn next_change(&mut self) -> io::Result<Option<String>> {
        loop {
            match self.go_on(libc::PTRACE_SYSCALL)? {
                Stop::Ended => return Ok(None),
                Stop::Call => {
                    if let Some(name) = self.change()? {
                        return Ok(Some(name));
                    }
                }
                Stop::Step => {}
            }
        }
    }

    fn kill(&mut self) {
        #[expect(unsafe_code, reason = "system calls without a safe wrapper")]
        // SAFETY: numbers only; the process is our child and not waited for yet.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), libc::__WALL);
        }
        self.ended = true;
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        if !self.ended {
            self.kill();
        }
    }
}

/// Lets `work` run to its end in a process of its own, and writes down its steps. `look` reads the shared memory.
pub(crate) fn watch(work: &mut dyn FnMut(), look: &dyn Fn() -> Vec<u64>) -> io::Result<Course> {
    let mut course = Course::default();
    let mut seen = look();
    let mut traced = Traced::start(work)?;
    loop {
        let next = traced.next_change()?;
        let now = look();
        let stores = now.iter().zip(&seen).filter(|(now, seen)| now != seen).count();
        if stores > 0 {
            course.stores_behind.push((course.calls.len(), stores));
        }
        let Some(name) = next else { return Ok(course) };
        traced.go_on(libc::PTRACE_SYSCALL)?;
        course.calls.push((name, !traced.has_failed()?));
        seen = look();
    }
}

impl Course {
    /// Where there is something to be seen: before each call, if anything has changed since the one before it, and after
    /// each store but the last before a call.
    pub(crate) fn places(&self) -> Vec<Place> {
        let fresh = |calls: &usize| *calls == 0 || self.calls[calls - 1].1 || self.has_stores_behind(*calls);
        let calls = (0..self.calls.len()).filter(fresh);
        let before_calls = calls.map(|calls| Place { calls, stores: 0 });
        let after_stores = self.stores_behind.iter().flat_map(|(calls, stores)| {
            let last = self.calls.len() == *calls;
            // After the last store of all nothing more comes; before a call, that place is the call's.
            (1..*stores + usize::from(last)).map(|stores| Place { calls: *calls, stores })
        });
        before_calls.chain(after_stores).collect()
    }

    fn has_stores_behind(&self, calls: usize) -> bool {
        self.stores_behind.iter().any(|(behind, _)| *behind == calls)
    }
}

impl Traced {
    /// Lets changing system calls through, and stops where the last of them has been made.
    fn through(&mut self, calls: usize) -> io::Result<()> {
        for _ in 0..calls {
            let name = self.next_change()?;
            assert!(name.is_some(), "it did not come so far");
            self.go_on(libc::PTRACE_SYSCALL)?;
        }
        Ok(())
    }

    fn next_store(&mut self, seen: &mut Vec<u64>, look: &dyn Fn() -> Vec<u64>) -> io::Result<()> {
        loop {
            assert_ne!(self.go_on(libc::PTRACE_SINGLESTEP)?, Stop::Ended, "no further store");
            let now = look();
            if now != *seen {
                *seen = now;
                return Ok(());
            }
        }
    }
}

/// Lets `work` run in a process of its own up to a place, and kills it there.
pub(crate) fn kill_at(work: &mut dyn FnMut(), place: Place, look: &dyn Fn() -> Vec<u64>) -> io::Result<()> {
    let mut traced = Traced::start(work)?;
    traced.through(place.calls)?;
    if place.stores == 0 {
        assert!(traced.next_change()?.is_some(), "it did not come so far");
    }
    let mut seen = look();
    for _ in 0..place.stores {
        traced.next_store(&mut seen, look)?;
    }
    traced.kill();
    Ok(())
}
