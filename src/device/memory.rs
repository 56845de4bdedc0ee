//! How the process treats the memory that it has freed.

/// Lets the allocator keep freed memory instead of giving it back to the system at once.
///
/// Operations allocate their results anew in every step. Given back and asked for again, each page
/// of them would cost a fault. The price is that memory once used stays with the process. Call once, before the first tensors; elsewhere than with the
/// GNU C library it does nothing.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// The largest threshold that the allocator accepts; larger blocks have mappings of their
        /// own.
        const MAX_MMAP_THRESHOLD: libc::c_int = 32 << 20;
        // SAFETY: sets two numbers of the allocator, which its own lock protects.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD);
            libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        }
    }
}
