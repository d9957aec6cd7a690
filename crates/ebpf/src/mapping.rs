//! Arrays shared with the kernel through memory: a write is a store, not a system call.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use crate::layout::Plain;

/// A writable mapping of an array map.
///
/// INVARIANT: `base` points to `len` elements for as long as the value lives.
#[derive(Debug)]
pub(crate) struct Mapping<T> {
    base: NonNull<T>,
    len: usize,
    bytes: usize,
}

#[expect(unsafe_code, reason = "shared memory has no thread affinity")]
// SAFETY: the mapping belongs to this value alone on our side, and `T` is plain bytes.
unsafe impl<T: Plain> Send for Mapping<T> {}

impl<T: Plain> Mapping<T> {
    pub(crate) fn new(map: BorrowedFd<'_>, len: u32) -> io::Result<Self> {
        const { assert!(size_of::<T>().is_multiple_of(8), "array elements are 8 bytes apart") };
        let len = len as usize;
        let bytes = len * size_of::<T>();
        #[expect(unsafe_code, reason = "mmap")]
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        Ok(Self { base, len, bytes })
    }

    /// Writes an element that no program looks at yet.
    ///
    /// # Panics
    /// If `index` is out of range.
    pub(crate) fn set(&mut self, index: u32, value: T) {
        assert!((index as usize) < self.len, "element {index} of {}", self.len);
        #[expect(unsafe_code, reason = "shared memory")]
        // SAFETY: in range by the assertion. Volatile, since the kernel reads it too.
        unsafe {
            self.base.add(index as usize).write_volatile(value);
        }
    }
}

impl Mapping<u64> {
    /// An element as an atomic.
    ///
    /// # Panics
    /// If `index` is out of range.
    pub(crate) fn word(&self, index: u32) -> &AtomicU64 {
        assert!((index as usize) < self.len, "element {index} of {}", self.len);
        #[expect(unsafe_code, reason = "shared memory")]
        // SAFETY: in range, aligned to 8 (the mapping starts at a page), and alive as long as `self`.
        unsafe {
            AtomicU64::from_ptr(self.base.add(index as usize).as_ptr())
        }
    }

    /// The low or high half of an element as an atomic, by its offset in 4-byte words.
    ///
    /// # Panics
    /// If `index` is out of range.
    pub(crate) fn half(&self, index: u32) -> &AtomicU32 {
        assert!((index as usize) < 2 * self.len, "half {index} of {}", self.len);
        #[expect(unsafe_code, reason = "shared memory")]
        // SAFETY: in range, aligned to 4, alive as long as `self`; it is never also used as a whole word.
        unsafe {
            AtomicU32::from_ptr(self.base.as_ptr().cast::<u32>().add(index as usize))
        }
    }
}

impl<T> Drop for Mapping<T> {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "munmap")]
        // SAFETY: exactly what `new` mapped; no reference into it outlives `self`.
        unsafe {
            libc::munmap(self.base.as_ptr().cast(), self.bytes);
        }
    }
}
