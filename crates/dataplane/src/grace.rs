//! Waiting until nobody in the kernel is in the middle of something.

use std::io;

/// Waits until every packet that is being judged now has been: programs that run, rules that are evaluated. Milliseconds.
///
/// # Errors
/// If the kernel has no `membarrier(2)`.
pub fn grace_period() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: i32 = 1;
    #[expect(unsafe_code, reason = "system call without a wrapper")]
    // SAFETY: the call takes numbers only. Its implementation is one RCU grace period.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
