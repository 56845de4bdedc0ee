//! Memory set aside for when the system gives no more.
//!
//! Rust ends the process when an allocation fails. So a part of the address space is held in reserve:
//! an allocation that fails gives it up and tries again. What runs goes on from that; new work is to
//! be refused while [`is_memory_short`], until some can be set aside again. The reserve is not written
//! to but for its size, so it takes no memory, only room below a limit of address space (`ulimit -v`)
//! or of what the kernel promises (`vm.overcommit_memory = 2`). Where such a limit is not, the kernel
//! grants everything and ends processes instead, before which nothing here helps.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

/// What a step and the bodies that are read at a time may need, generously.
pub const RESERVE_BYTES: usize = 512 << 20;
/// How often an allocation is tried again when there was none left to give up: another thread may be
/// about to give it up.
const MAX_TRIES: usize = 100;

/// The system's allocator with a reserve behind it; of use only as the global allocator.
#[derive(Debug)]
pub struct ReservingAllocator;

/// How often the reserve may be halved: what was freed need not be in one piece.
const MAX_HALVINGS: u32 = 3;

/// The memory that is held, if any. Its first word is its size.
static HELD: AtomicPtr<u8> = AtomicPtr::new(null_mut());
/// What should be held; nothing before [`hold_reserve`].
static WANTED_BYTES: AtomicUsize = AtomicUsize::new(0);

/// Sets memory aside from now on. True if there was enough. Call once.
pub fn hold_reserve(num_bytes: usize) -> bool {
    WANTED_BYTES.store(num_bytes, Ordering::Release);
    !is_memory_short()
}

/// Whether the reserve had to be given up, and not even an eighth of it can be set aside again yet.
pub fn is_memory_short() -> bool {
    let wanted = WANTED_BYTES.load(Ordering::Acquire);
    if wanted == 0 || !HELD.load(Ordering::Acquire).is_null() {
        return false;
    }
    let Some(fresh) = (0..=MAX_HALVINGS).find_map(|halvings| set_aside(wanted >> halvings)) else {
        return true;
    };
    let held = HELD.compare_exchange(null_mut(), fresh, Ordering::AcqRel, Ordering::Acquire);
    if held.is_err() {
        give_back(fresh);
    }
    false
}

fn give_up_reserve() {
    let held = HELD.swap(null_mut(), Ordering::AcqRel);
    if !held.is_null() {
        give_back(held);
    }
}

/// Memory that knows its size.
fn set_aside(num_bytes: usize) -> Option<*mut u8> {
    // SAFETY: the layout's size is not zero.
    let block = unsafe { System.alloc(layout(num_bytes)) };
    if block.is_null() {
        return None;
    }
    // SAFETY: the block is as large as a word, by its layout, and nobody else's.
    unsafe { block.cast::<usize>().write_unaligned(num_bytes) };
    Some(block)
}

/// Frees what [`set_aside`] gave. Whoever calls must be the only one to know of it.
fn give_back(block: *mut u8) {
    // SAFETY: `set_aside` wrote its size there, and allocated it with that layout.
    unsafe {
        let num_bytes = block.cast::<usize>().read_unaligned();
        System.dealloc(block, layout(num_bytes));
    }
}

fn layout(num_bytes: usize) -> Layout {
    let layout = Layout::from_size_align(num_bytes.max(size_of::<usize>()), align_of::<usize>());
    layout.expect("a reserve is smaller than the address space")
}

/// What `allocate` gives, if need be from the reserve.
fn with_reserve(allocate: impl Fn() -> *mut u8) -> *mut u8 {
    let mut block = allocate();
    for _ in 0..MAX_TRIES {
        if !block.is_null() || WANTED_BYTES.load(Ordering::Relaxed) == 0 {
            break;
        }
        give_up_reserve();
        std::thread::yield_now();
        block = allocate();
    }
    block
}

// SAFETY: every block comes from the system's allocator and goes back to it with its own layout;
// nothing here panics, and nothing but that allocator allocates.
unsafe impl GlobalAlloc for ReservingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: what the caller promises is passed on.
        with_reserve(|| unsafe { System.alloc(layout) })
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: what the caller promises is passed on.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: what the caller promises is passed on.
        with_reserve(|| unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: what the caller promises is passed on; a block that cannot grow stays as it is.
        with_reserve(|| unsafe { System.realloc(block, layout, new_size) })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Goal: an allocation that fails is tried again with the reserve given up, which then is set
    /// aside anew; without a reserve nothing is different. Method: an allocator that fails as long as
    /// something is held.
    #[test]
    fn a_reserve_is_given_up_and_comes_back() {
        let mut byte = 0_u8;
        let block: *mut u8 = &raw mut byte;
        let num_tries = Cell::new(0);
        let fails_at_first = || {
            num_tries.set(num_tries.get() + 1);
            if HELD.load(Ordering::Acquire).is_null() && 1 < num_tries.get() {
                block
            } else {
                null_mut()
            }
        };
        assert!(with_reserve(fails_at_first).is_null(), "there is none");
        assert_eq!(num_tries.replace(0), 1);
        assert!(hold_reserve(1 << 20));
        assert!(!HELD.load(Ordering::Acquire).is_null());
        assert_eq!(with_reserve(fails_at_first), block);
        assert!(HELD.load(Ordering::Acquire).is_null(), "it was given up");
        assert!(!is_memory_short(), "it can be had again");
        assert!(!HELD.load(Ordering::Acquire).is_null());
        assert!(with_reserve(null_mut).is_null(), "there is an end to trying");
        WANTED_BYTES.store(1 << 60, Ordering::Release);
        assert!(is_memory_short(), "nobody has so much");
        WANTED_BYTES.store(0, Ordering::Release);
        assert!(!is_memory_short(), "none is wanted");
    }
}
