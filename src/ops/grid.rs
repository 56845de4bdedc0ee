//! How element-wise kernels are spread over a card.

use crate::device::gpu::LaunchConfig;

/// The most blocks that a grid has in its second direction.
const MAX_ROWS: usize = 65_535;
const NUM_THREADS: usize = 256;

/// Threads for each of `num_rows` rows: the threads of a row in the first direction, rows in the
/// second. Kernels loop over the rows that do not fit.
pub(super) fn over_rows(num_rows: usize, threads_per_row: usize) -> LaunchConfig {
    let num_threads = threads_per_row.next_multiple_of(32).clamp(32, NUM_THREADS);
    let grid = [threads_per_row.div_ceil(num_threads) as u32, num_rows.min(MAX_ROWS) as u32, 1];
    LaunchConfig { grid, block: [num_threads as u32, 1, 1], shared_bytes: 0 }
}
