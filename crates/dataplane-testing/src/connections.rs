//! What the kernel remembers of connections.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE`: with nothing that says which, all of them.
const DELETE: u16 = 1 << 8 | 2;

/// Makes the kernel forget every connection of this thread's network namespace, so that the same ports ask anew.
///
/// # Panics
/// If the kernel refuses.
pub fn forget_connections() {
    let mut message = Vec::new();
    message.extend(20u32.to_ne_bytes());
    message.extend(DELETE.to_ne_bytes());
    message.extend(((libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
    message.extend([0; 8]);
    // Any family, version 0, no resource.
    message.extend([0; 4]);
    let mut answer = [0u8; 1024];
    #[expect(unsafe_code, reason = "system calls without a safe wrapper")]
    // SAFETY: the new descriptor is owned by nobody else, and both buffers have the lengths that are given.
    let len = unsafe {
        let fd = libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_NETFILTER);
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        let socket = OwnedFd::from_raw_fd(fd);
        let sent = libc::send(socket.as_raw_fd(), message.as_ptr().cast(), message.len(), 0);
        assert_eq!(sent, 20, "{}", io::Error::last_os_error());
        libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0)
    };
    assert!(len >= 20, "{}", io::Error::last_os_error());
    let code = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    assert_eq!(code, 0, "{}", io::Error::from_raw_os_error(-code));
}
