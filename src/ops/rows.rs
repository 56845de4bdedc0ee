//! Loops over rows of plain memory, split over the threads of the current pool.

use crate::device::threads::parallel_for;

/// Below this many elements a thread's start costs more than its work saves.
const MIN_ELEMENTS_PER_TASK: usize = 16 * 1024;

/// Calls `f` once with every chunk of `chunk_len` items and its index; the last may be shorter.
pub(super) fn parallel_chunks_mut<T: Send>(
    items: &mut [T],
    chunk_len: usize,
    f: impl Fn(usize, &mut [T]) + Sync,
) {
    let num_chunks = items.len().div_ceil(chunk_len);
    if num_chunks <= 1 {
        if num_chunks == 1 {
            f(0, items);
        }
        return;
    }
    let len = items.len();
    let base = BasePointer(items.as_mut_ptr());
    parallel_for(num_chunks, |index| {
        let start = index * chunk_len;
        assert!(start < len, "task {index} of {num_chunks}");
        // SAFETY: chunks of different indices do not overlap and lie inside `items`, which this
        // function borrows mutably; `parallel_for` runs each index once and returns after the last.
        let chunk = unsafe {
            std::slice::from_raw_parts_mut(base.get().add(start), chunk_len.min(len - start))
        };
        f(index, chunk);
    });
}

/// Calls `f` once with every row and its index, in parallel when there is enough to do.
pub(super) fn for_each_row_mut<T: Send>(
    rows: &mut [T],
    row_len: usize,
    f: impl Fn(usize, &mut [T]) + Sync,
) {
    let rows_per_task = (MIN_ELEMENTS_PER_TASK / row_len.max(1)).max(1);
    parallel_chunks_mut(rows, rows_per_task * row_len, |task, chunk| {
        for (index, row) in chunk.chunks_mut(row_len).enumerate() {
            f(task * rows_per_task + index, row);
        }
    });
}

/// A pointer that threads share; what each may touch is the user's duty.
struct BasePointer<T>(*mut T);

impl<T> BasePointer<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: `parallel_chunks_mut` hands every element to one thread only, and elements are `Send`.
unsafe impl<T: Send> Sync for BasePointer<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_visited_once_with_its_index() {
        for (num_rows, row_len) in [(0, 4), (1, 4), (7, 3), (500, 100)] {
            let mut data = vec![0_usize; num_rows * row_len];
            for_each_row_mut(&mut data, row_len, |index, row| {
                assert_eq!(row.len(), row_len);
                for value in row {
                    *value += index + 1;
                }
            });
            for (index, row) in data.chunks(row_len).enumerate() {
                assert!(row.iter().all(|&value| value == index + 1), "row {index}");
            }
        }
    }
}
