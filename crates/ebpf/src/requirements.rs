//! What the kernel must have, each missing thing named before anything is tried.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use bulkhead_dataplane::DataplaneError;

/// First kernel with tcx.
const TCX_SINCE: (u32, u32) = (6, 6);
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_BPF: u32 = 39;
/// Where the BPF file system is by convention.
const BPF_FS: &str = "/sys/fs/bpf";
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// Checks that this kernel, and this process's rights in it, suffice to enforce with pins under
/// `pin_root`. Answers the first thing that is missing, as a sentence.
pub fn check(pin_root: &Path) -> Result<(), DataplaneError> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    if kernel_version(&release).is_none_or(|version| version < TCX_SINCE) {
        return Err(missing(
            "tcx",
            format!(
                "the programs attach through tcx, which needs Linux {}.{} or later, and this is {}",
                TCX_SINCE.0,
                TCX_SINCE.1,
                release.trim()
            ),
        ));
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Err(missing("BTF", "the kernel needs CONFIG_DEBUG_INFO_BTF=y".into()));
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let capabilities = effective_capabilities(&status);
    let has = |bit: u32| capabilities >> bit & 1 == 1;
    if !has(CAP_SYS_ADMIN) && !has(CAP_BPF) {
        return Err(missing(
            "CAP_BPF",
            "run as root, or grant CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON".into(),
        ));
    }
    if !has(CAP_NET_ADMIN) {
        return Err(missing(
            "CAP_NET_ADMIN",
            "attaching to interfaces needs it: run as root, or grant it".into(),
        ));
    }
    check_connection_tracking()?;
    check_bpffs(pin_root)
}

/// The programs read where the kernel's own connection tracking sends a packet, by its BTF: the module must be there
/// before they are loaded, whoever uses it later.
fn check_connection_tracking() -> Result<(), DataplaneError> {
    let is_there = || Path::new("/proc/sys/net/netfilter/nf_conntrack_max").exists();
    if is_there() || (request_connection_tracking().is_ok() && is_there()) {
        return Ok(());
    }
    Err(missing("nf_conntrack", "load it: modprobe nf_conntrack_netlink".into()))
}

/// Asks its netlink side for statistics, which makes the kernel load the module.
fn request_connection_tracking() -> io::Result<()> {
    /// `struct nlmsghdr` and `struct nfgenmsg`: length, type (`NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET_STATS`),
    /// flags (`NLM_F_REQUEST`), sequence, port; family, version, resource.
    const REQUEST: [u16; 10] = [20, 0, 0x0105, 0x0001, 0, 0, 0, 0, 0, 0];
    #[expect(unsafe_code, reason = "system calls without a safe wrapper")]
    // SAFETY: plain numbers; the message outlives the call; the descriptor is closed once, by its owner.
    unsafe {
        let socket =
            libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_NETFILTER);
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = std::os::fd::OwnedFd::from_raw_fd(socket);
        let sent = libc::send(socket.as_raw_fd(), REQUEST.as_ptr().cast(), size_of_val(&REQUEST), 0);
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

fn check_bpffs(pin_root: &Path) -> Result<(), DataplaneError> {
    // The directory itself may have to be made yet: what counts is the file system of what exists.
    let existing = || pin_root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let magic = |path: &Path| {
        file_system_magic(path).map_err(|error| {
            DataplaneError::io(format!("look at the file system of {}", path.display()), error)
        })
    };
    if magic(existing())? == BPF_FS_MAGIC {
        return Ok(());
    }
    // systemd mounts it at boot; where it is not the init system nobody does.
    if pin_root.starts_with(BPF_FS) && mount_bpffs().is_ok() && magic(existing())? == BPF_FS_MAGIC {
        return Ok(());
    }
    Err(missing(
        "bpffs",
        format!(
            "{} is on no BPF file system, so links would not outlive this process: \
             mount -t bpf bpf /sys/fs/bpf (in a container, mount the host's)",
            pin_root.display()
        ),
    ))
}

fn mount_bpffs() -> io::Result<()> {
    let path = CString::new(BPF_FS)?;
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: two C strings that outlive the call; the file system takes no data.
    let result = unsafe { libc::mount(c"bpf".as_ptr(), path.as_ptr(), c"bpf".as_ptr(), 0, std::ptr::null()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn missing(feature: &'static str, advice: String) -> DataplaneError {
    DataplaneError::Requirement { feature, advice }
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.trim().split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn effective_capabilities(status: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0)
}

fn file_system_magic(path: &Path) -> io::Result<i64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut info = std::mem::MaybeUninit::<libc::statfs>::uninit();
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: the path is a C string, and the kernel fills the whole struct when it answers 0.
    let kind = unsafe {
        if libc::statfs(path.as_ptr(), info.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        info.assume_init().f_type
    };
    #[expect(clippy::useless_conversion, reason = "the type of f_type differs between architectures")]
    Ok(i64::from(kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_says_about_itself() {
        assert_eq!(kernel_version("6.18.44-fc-v669\n"), Some((6, 18)));
        assert_eq!(kernel_version("6.6-rc1"), Some((6, 6)));
        assert_eq!(kernel_version("Linux"), None);
        assert_eq!(effective_capabilities("Name:\tx\nCapEff:\t0000008000001000\n"), 1 << 39 | 1 << 12);
    }

    #[test]
    fn a_directory_elsewhere_is_refused_by_name() {
        let error = check_bpffs(Path::new("/tmp/bulkhead")).unwrap_err().to_string();
        assert!(error.starts_with("bpffs is missing"), "{error}");
    }
}
