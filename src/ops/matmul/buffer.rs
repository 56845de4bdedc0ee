//! Memory for packed weights: zeroed, aligned to huge pages, and backed by them where the system
//! has any.

use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::Arc;

const HUGE_PAGE: usize = 2 << 20;
/// Where parts begin.
const ALIGNMENT: usize = 64;

/// Bytes that nobody else has, in a mapping that parts may share.
pub(super) struct Buffer {
    mapping: Arc<Mapping>,
    range: Range<usize>,
}

/// Zeroed bytes at an address that is a multiple of two megabytes.
struct Mapping {
    data: NonNull<u8>,
    start: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: the mapping owns its memory; only buffers touch it, each its own part.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Buffer {
    /// One buffer of each length, side by side: a system has few mappings for thousands of experts.
    pub(super) fn zeroed_parts(lens: &[usize]) -> std::io::Result<Vec<Self>> {
        let too_much = || std::io::Error::from(std::io::ErrorKind::OutOfMemory);
        let mut ranges = Vec::with_capacity(lens.len());
        let mut end = 0_usize;
        for len in lens {
            let start = end.checked_next_multiple_of(ALIGNMENT).ok_or_else(too_much)?;
            end = start.checked_add(*len).ok_or_else(too_much)?;
            ranges.push(start..end);
        }
        let mapping = Arc::new(Mapping::zeroed(end)?);
        Ok(ranges.into_iter().map(|range| Self { mapping: Arc::clone(&mapping), range }).collect())
    }
}

impl Mapping {
    fn zeroed(len: usize) -> std::io::Result<Self> {
        let mapping_len =
            len.max(1).checked_add(HUGE_PAGE).ok_or(std::io::ErrorKind::OutOfMemory)?;
        // SAFETY: a private anonymous mapping at an address of the system's choice touches nothing
        // that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapping_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let start = NonNull::new(start).expect("a successful mapping is not at address zero");
        let bytes = start.cast::<u8>();
        // SAFETY: the offset is below two megabytes, which the mapping has beyond `len`.
        let data = unsafe { bytes.add(bytes.as_ptr().align_offset(HUGE_PAGE)) };
        // SAFETY: the range lies in the mapping. This is advice: failure changes the speed only.
        #[cfg(target_os = "linux")]
        unsafe {
            libc::madvise(data.as_ptr().cast(), len, libc::MADV_HUGEPAGE);
        }
        Ok(Self { data, start, len: mapping_len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `zeroed`, and no buffer has a part of it any more.
        unsafe { libc::munmap(self.start.as_ptr(), self.len) };
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let Range { start, end } = self.range;
        // SAFETY: zeroed bytes of the mapping, which no other buffer has.
        unsafe { std::slice::from_raw_parts(self.mapping.data.as_ptr().add(start), end - start) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let Range { start, end } = self.range;
        // SAFETY: as in `deref`, and borrowed exclusively.
        unsafe {
            std::slice::from_raw_parts_mut(self.mapping.data.as_ptr().add(start), end - start)
        }
    }
}
