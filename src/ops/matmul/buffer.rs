//! Memory for packed weights: zeroed, aligned to huge pages, and backed by them where the system
//! has any.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

const HUGE_PAGE: usize = 2 << 20;

/// Zeroed bytes at an address that is a multiple of two megabytes.
pub(super) struct Buffer {
    data: NonNull<u8>,
    len: usize,
    mapping: NonNull<libc::c_void>,
    mapping_len: usize,
}

// SAFETY: the buffer owns its mapping, and hands out references by the usual rules.
unsafe impl Send for Buffer {}
// SAFETY: as above; a shared buffer is only read.
unsafe impl Sync for Buffer {}

impl Buffer {
    pub(super) fn zeroed(len: usize) -> std::io::Result<Self> {
        let mapping_len =
            len.max(1).checked_add(HUGE_PAGE).ok_or(std::io::ErrorKind::OutOfMemory)?;
        // SAFETY: a private anonymous mapping at an address of the system's choice touches nothing
        // that exists.
        let mapping = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapping_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if mapping == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let mapping = NonNull::new(mapping).expect("a successful mapping is not at address zero");
        let bytes = mapping.cast::<u8>();
        // SAFETY: the offset is below two megabytes, which the mapping has beyond `len`.
        let data = unsafe { bytes.add(bytes.as_ptr().align_offset(HUGE_PAGE)) };
        // SAFETY: the range lies in the mapping. This is advice: failure changes the speed only.
        #[cfg(target_os = "linux")]
        unsafe {
            libc::madvise(data.as_ptr().cast(), len, libc::MADV_HUGEPAGE);
        }
        Ok(Self { data, len, mapping, mapping_len })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `zeroed`, and nobody borrows it any more.
        unsafe { libc::munmap(self.mapping.as_ptr(), self.mapping_len) };
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` zeroed bytes of the mapping, owned by the buffer.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}
