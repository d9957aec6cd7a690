//! The `bpf(2)` calls that libbpf-rs has no typed form for, each behind a safe function.

use std::ffi::CString;
use std::io;
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::layout::Plain;

pub(crate) const BPF_ANY: u64 = 0;

/// libbpf answers `-errno`.
fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) }
}

fn own(result: i32) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    #[expect(unsafe_code, reason = "takes over a descriptor from libbpf")]
    // SAFETY: libbpf has just opened it for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn path_text(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

/// Opens a pinned object.
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = path_text(path)?;
    #[expect(unsafe_code, reason = "libbpf call")]
    // SAFETY: the path is a C string that outlives the call.
    own(unsafe { libbpf_sys::bpf_obj_get(path.as_ptr()) })
}

/// Pins an object.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = path_text(path)?;
    #[expect(unsafe_code, reason = "libbpf call")]
    // SAFETY: the path is a C string that outlives the call.
    check(unsafe { libbpf_sys::bpf_obj_pin(object.as_raw_fd(), path.as_ptr()) }).map(drop)
}

/// Attaches a program to an interface's tcx hook.
pub(crate) fn link_create(program: BorrowedFd<'_>, ifindex: u32, hook: u32) -> io::Result<OwnedFd> {
    let ifindex = i32::try_from(ifindex).map_err(|_too_large| io::Error::from_raw_os_error(libc::ENODEV))?;
    #[expect(unsafe_code, reason = "libbpf call")]
    // SAFETY: no options are passed; everything else is plain numbers.
    own(unsafe { libbpf_sys::bpf_link_create(program.as_raw_fd(), ifindex, hook, std::ptr::null()) })
}

/// Where in netfilter a program is to run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NetfilterHook {
    pub(crate) family: u32,
    pub(crate) hook: u32,
    pub(crate) priority: i32,
}

/// Attaches a program to a hook of netfilter in this thread's network namespace.
pub(crate) fn netfilter_link_create(program: BorrowedFd<'_>, at: NetfilterHook) -> io::Result<OwnedFd> {
    let mut options = libbpf_sys::bpf_link_create_opts {
        sz: size_of::<libbpf_sys::bpf_link_create_opts>() as libbpf_sys::size_t,
        ..Default::default()
    };
    options.__bindgen_anon_1.netfilter.pf = at.family;
    options.__bindgen_anon_1.netfilter.hooknum = at.hook;
    options.__bindgen_anon_1.netfilter.priority = at.priority;
    #[expect(unsafe_code, reason = "libbpf call")]
    // SAFETY: the options outlive the call, and `sz` tells how much of them there is.
    own(unsafe {
        libbpf_sys::bpf_link_create(program.as_raw_fd(), 0, libbpf_sys::BPF_NETFILTER, &raw const options)
    })
}

/// Attaches a program to a control group, beside what others have attached there and above.
pub(crate) fn cgroup_link_create(
    program: BorrowedFd<'_>,
    group: BorrowedFd<'_>,
    hook: u32,
) -> io::Result<OwnedFd> {
    #[expect(unsafe_code, reason = "libbpf call")]
    // SAFETY: no options are passed; everything else is plain numbers.
    own(unsafe {
        libbpf_sys::bpf_link_create(program.as_raw_fd(), group.as_raw_fd(), hook, std::ptr::null())
    })
}

/// Replaces the program of a link, atomically.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    #[expect(unsafe_code, reason = "libbpf call")]
    // SAFETY: no options are passed; everything else is plain numbers.
    check(unsafe { libbpf_sys::bpf_link_update(link.as_raw_fd(), program.as_raw_fd(), std::ptr::null()) })
        .map(drop)
}

/// Takes a link's program off its hook, at once.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    #[expect(unsafe_code, reason = "libbpf call")]
    // SAFETY: a plain descriptor.
    check(unsafe { libbpf_sys::bpf_link_detach(link.as_raw_fd()) }).map(drop)
}

/// Entries that a map holds at most.
pub(crate) fn max_entries(map: BorrowedFd<'_>) -> io::Result<u32> {
    let mut info = libbpf_sys::bpf_map_info::default();
    let mut len = size_of::<libbpf_sys::bpf_map_info>() as u32;
    #[expect(unsafe_code, reason = "libbpf call")]
    // SAFETY: `info` is a plain struct of `len` bytes that outlives the call.
    check(unsafe {
        libbpf_sys::bpf_obj_get_info_by_fd(map.as_raw_fd(), (&raw mut info).cast(), &raw mut len)
    })?;
    Ok(info.max_entries)
}

/// A map with typed keys and values.
#[derive(Debug)]
pub(crate) struct Table<K, V> {
    fd: OwnedFd,
    types: PhantomData<(K, V)>,
}

/// What to create; see `bpf_map_create`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TableSpec {
    pub(crate) name: &'static str,
    pub(crate) kind: u32,
    pub(crate) flags: u32,
    pub(crate) entries: u32,
}

impl<K: Plain, V: Plain> Table<K, V> {
    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self { fd, types: PhantomData }
    }

    pub(crate) fn create(spec: TableSpec) -> io::Result<Self> {
        let name = CString::new(spec.name).unwrap_or_default();
        let options = libbpf_sys::bpf_map_create_opts {
            sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
            map_flags: spec.flags,
            ..Default::default()
        };
        #[expect(unsafe_code, reason = "libbpf call")]
        // SAFETY: name and options outlive the call; `sz` tells how much of the options there is.
        let fd = own(unsafe {
            libbpf_sys::bpf_map_create(
                spec.kind,
                name.as_ptr(),
                size_of::<K>() as u32,
                size_of::<V>() as u32,
                spec.entries,
                &raw const options,
            )
        })?;
        Ok(Self::from_fd(fd))
    }

    /// The map whose id is the value of a map of maps.
    pub(crate) fn from_id(id: u32) -> io::Result<Self> {
        #[expect(unsafe_code, reason = "libbpf call")]
        // SAFETY: takes a number only.
        own(unsafe { libbpf_sys::bpf_map_get_fd_by_id(id) }).map(Self::from_fd)
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(crate) fn put(&self, key: &K, value: &V) -> io::Result<()> {
        #[expect(unsafe_code, reason = "libbpf call")]
        // SAFETY: the map was made with exactly these key and value sizes.
        check(unsafe {
            libbpf_sys::bpf_map_update_elem(
                self.fd.as_raw_fd(),
                (&raw const *key).cast(),
                (&raw const *value).cast(),
                BPF_ANY,
            )
        })
        .map(drop)
    }

    /// Writes many entries in few calls.
    pub(crate) fn put_all(&self, keys: &[K], values: &[V]) -> io::Result<()> {
        const BATCH: usize = 8192;
        for (keys, values) in keys.chunks(BATCH).zip(values.chunks(BATCH)) {
            let mut count = keys.len().min(values.len()) as u32;
            #[expect(unsafe_code, reason = "libbpf call")]
            // SAFETY: both slices hold at least `count` elements of the map's key and value size.
            check(unsafe {
                libbpf_sys::bpf_map_update_batch(
                    self.fd.as_raw_fd(),
                    keys.as_ptr().cast(),
                    values.as_ptr().cast(),
                    &raw mut count,
                    std::ptr::null(),
                )
            })?;
        }
        Ok(())
    }

    pub(crate) fn get(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = V::default();
        #[expect(unsafe_code, reason = "libbpf call")]
        // SAFETY: the map was made with exactly these key and value sizes, and is not per CPU.
        let result = unsafe {
            libbpf_sys::bpf_map_lookup_elem(
                self.fd.as_raw_fd(),
                (&raw const *key).cast(),
                (&raw mut value).cast(),
            )
        };
        absent_is_none(check(result).map(|_| value))
    }

    /// The value that it had, at the moment of its removal.
    pub(crate) fn take(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = V::default();
        #[expect(unsafe_code, reason = "libbpf call")]
        // SAFETY: the map was made with exactly these key and value sizes, and is not per CPU.
        let result = unsafe {
            libbpf_sys::bpf_map_lookup_and_delete_elem(
                self.fd.as_raw_fd(),
                (&raw const *key).cast(),
                (&raw mut value).cast(),
            )
        };
        absent_is_none(check(result).map(|_| value))
    }

    /// Whether there was something to delete.
    pub(crate) fn delete(&self, key: &K) -> io::Result<bool> {
        #[expect(unsafe_code, reason = "libbpf call")]
        // SAFETY: the map was made with exactly this key size.
        let result =
            unsafe { libbpf_sys::bpf_map_delete_elem(self.fd.as_raw_fd(), (&raw const *key).cast()) };
        absent_is_none(check(result)).map(|deleted| deleted.is_some())
    }

    /// Every entry of a hash table. Entries that come or go meanwhile may or may not be among them.
    pub(crate) fn entries(&self) -> io::Result<Vec<(K, V)>> {
        let (mut keys, mut values) = (Vec::<K>::new(), Vec::<V>::new());
        let mut batch = 4096usize;
        // The kernel keeps its position in 4 bytes for hash tables, whatever the key.
        let mut position = [0u32; 4];
        let mut first = true;
        loop {
            let done = keys.len();
            keys.resize(done + batch, K::default());
            values.resize(done + batch, V::default());
            let mut count = batch as u32;
            let mut next = [0u32; 4];
            #[expect(unsafe_code, reason = "libbpf call")]
            // SAFETY: both vectors have room for `count` more elements; a position takes 4 bytes.
            let result = check(unsafe {
                libbpf_sys::bpf_map_lookup_batch(
                    self.fd.as_raw_fd(),
                    if first { std::ptr::null_mut() } else { position.as_mut_ptr().cast() },
                    next.as_mut_ptr().cast(),
                    keys[done..].as_mut_ptr().cast(),
                    values[done..].as_mut_ptr().cast(),
                    &raw mut count,
                    std::ptr::null(),
                )
            });
            let error = result.err().and_then(|error| error.raw_os_error());
            let kept = if error == Some(libc::ENOSPC) { 0 } else { count as usize };
            keys.truncate(done + kept);
            values.truncate(done + kept);
            match error {
                None => (position, first) = (next, false),
                Some(libc::ENOENT) => break,
                // One bucket holds more than a batch: again from the same position with more room.
                Some(libc::ENOSPC) => batch *= 2,
                Some(code) => return Err(io::Error::from_raw_os_error(code)),
            }
        }
        Ok(keys.into_iter().zip(values).collect())
    }
}

/// A per-CPU array's element, summed.
pub(crate) fn sum_per_cpu(map: BorrowedFd<'_>, index: u32, cpus: usize) -> io::Result<u64> {
    let mut values = vec![0u64; cpus];
    #[expect(unsafe_code, reason = "libbpf call")]
    // SAFETY: the values are 8 bytes each and there is one for every possible CPU.
    check(unsafe {
        libbpf_sys::bpf_map_lookup_elem(
            map.as_raw_fd(),
            (&raw const index).cast(),
            values.as_mut_ptr().cast(),
        )
    })?;
    Ok(values.iter().sum())
}

fn absent_is_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}
