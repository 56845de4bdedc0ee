//! A fork-join pool for the CPU operations.
//!
//! The caller and `num_threads - 1` workers take task numbers from one counter until none are left.
//! A region never waits for a worker that did not join it, so a descheduled worker costs its help
//! and nothing else.
//!
//! **Invariant:** nobody spins without bound. Idle workers and a caller at the end of a region spin
//! for some tens of microseconds and then park: an idle server uses no processor, and a shared
//! machine loses no more than that.

use std::any::Any;
use std::cell::{RefCell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};

/// Stack of a thread that computes. Grammars are followed by recursion, as deep as clients nest them;
/// only what is used becomes memory.
pub const STACK_BYTES: usize = 64 << 20;

/// Pause instructions before parking: 20 to 60 microseconds on current processors.
const SPIN_ROUNDS: u32 = 1500;

/// The region accepts workers.
const OPEN: u64 = 1 << 31;
/// Low bits of the state: how many workers are inside the region.
const JOINED_MASK: u64 = OPEN - 1;
/// High bits of the state: the number of the region.
const EPOCH: u64 = 1 << 32;

thread_local! {
    static CURRENT: RefCell<Option<Arc<Shared>>> = const { RefCell::new(None) };
}

/// Threads that share the iterations of [`parallel_for`].
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
}

struct Worker {
    handle: Option<JoinHandle<()>>,
}

impl ThreadPool {
    /// A pool of `num_threads` threads, the calling one included; zero counts as one.
    pub fn new(num_threads: usize) -> Self {
        let num_workers = num_threads.max(1) - 1;
        let shared = Arc::new(Shared {
            state: Padded(AtomicU64::new(0)),
            next: Padded(AtomicUsize::new(0)),
            job: UnsafeCell::new(Job { call: call_nothing, data: std::ptr::null(), num_tasks: 0 }),
            busy: AtomicBool::new(false),
            shutdown: AtomicBool::new(false),
            panic: Mutex::new(None),
            caller: Sleeper::default(),
            sleepers: (0..num_workers).map(|_| Sleeper::default()).collect(),
        });
        let workers = (0..num_workers)
            .map(|index| {
                let shared = Arc::clone(&shared);
                let handle = std::thread::Builder::new()
                    .name(format!("ops-{index}"))
                    .stack_size(STACK_BYTES)
                    .spawn(move || shared.work(index))
                    .ok();
                Worker { handle }
            })
            .collect();
        Self { shared, workers }
    }

    /// Runs `f` with this pool as the calling thread's current pool.
    pub fn install<R>(&self, f: impl FnOnce() -> R) -> R {
        let _restore = Restore(CURRENT.replace(Some(Arc::clone(&self.shared))));
        f()
    }

    /// How many threads share the work, the caller included.
    pub fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.shutdown.store(true, Ordering::SeqCst);
        self.shared.state.0.fetch_add(EPOCH, Ordering::SeqCst);
        self.shared.sleepers.iter().for_each(Sleeper::wake);
        for worker in &mut self.workers {
            if let Some(handle) = worker.handle.take() {
                // A worker catches the panics of its tasks; there is nothing left to report.
                let _ = handle.join();
            }
        }
    }
}

/// Puts a thread's former pool back, also while unwinding.
struct Restore(Option<Arc<Shared>>);

impl Drop for Restore {
    fn drop(&mut self) {
        let former = self.0.take();
        CURRENT.with(|current| *current.borrow_mut() = former);
    }
}

/// Calls `f` once for each number below `num_tasks`, shared among the threads of the current pool.
///
/// Without a pool, and inside of a task, the calls are made one after the other. A panic in `f`
/// reaches the caller after all threads have left the region.
pub fn parallel_for(num_tasks: usize, f: impl Fn(usize) + Sync) {
    let pool = CURRENT.with(|current| current.borrow_mut().take());
    let Some(pool) = pool else {
        (0..num_tasks).for_each(f);
        return;
    };
    let restore = Restore(Some(pool));
    let pool = restore.0.as_ref().expect("set in the line above");
    if num_tasks < 2 || pool.sleepers.is_empty() || pool.busy.swap(true, Ordering::Acquire) {
        (0..num_tasks).for_each(f);
    } else {
        pool.run(num_tasks, &f);
    }
}

/// How many threads [`parallel_for`] would use here.
pub fn current_num_threads() -> usize {
    CURRENT.with(|current| current.borrow().as_ref().map_or(1, |pool| pool.sleepers.len() + 1))
}

/// Keeps what one thread writes out of the cache lines of the others.
#[repr(align(128))]
struct Padded<T>(T);

/// A type-erased borrow of the closure of one region.
#[derive(Clone, Copy)]
struct Job {
    call: unsafe fn(*const (), usize),
    data: *const (),
    num_tasks: usize,
}

/// A thread that may be parked, and the flag that says so.
#[derive(Default)]
struct Sleeper {
    is_waiting: AtomicBool,
    thread: Mutex<Option<Thread>>,
}

impl Sleeper {
    fn set_current_thread(&self) {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        *thread = Some(std::thread::current());
    }

    /// Returns once `is_ready` holds: spins first, parks afterwards.
    fn wait_until(&self, is_ready: impl Fn() -> bool) {
        for _ in 0..SPIN_ROUNDS {
            if is_ready() {
                return;
            }
            std::hint::spin_loop();
        }
        loop {
            // The flag goes up before the last look: whoever changes the state afterwards sees it.
            self.is_waiting.store(true, Ordering::SeqCst);
            if is_ready() {
                self.is_waiting.store(false, Ordering::SeqCst);
                return;
            }
            std::thread::park();
        }
    }

    /// Call after the change that makes the condition of [`Sleeper::wait_until`] hold.
    fn wake(&self) {
        if self.is_waiting.load(Ordering::SeqCst) && self.is_waiting.swap(false, Ordering::SeqCst) {
            let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(thread) = thread.as_ref() {
                thread.unpark();
            }
        }
    }
}

struct Shared {
    /// Number of the region, whether it is open, how many workers are inside.
    state: Padded<AtomicU64>,
    /// The next task to hand out.
    next: Padded<AtomicUsize>,
    /// Written by the caller while no worker is inside, read by workers inside.
    job: UnsafeCell<Job>,
    /// One region at a time; others run their tasks themselves.
    busy: AtomicBool,
    shutdown: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    caller: Sleeper,
    sleepers: Vec<Sleeper>,
}

// SAFETY: `job` is the only field that is not `Sync`. `run` writes it while it holds `busy` and no
// worker is inside the region; workers read it only after joining, which the open bit allows only
// after the write.
unsafe impl Sync for Shared {}
// SAFETY: the pointers in `job` are followed only while `run` borrows what they point to; that is
// `Sync`.
unsafe impl Send for Shared {}

impl Shared {
    /// One region. The caller has set `busy`.
    fn run<F: Fn(usize) + Sync>(&self, num_tasks: usize, f: &F) {
        // SAFETY: `busy` is held and the former region has closed and emptied, so nobody reads the
        // job.
        unsafe {
            *self.job.get() =
                Job { call: call_task::<F>, data: std::ptr::from_ref(f).cast(), num_tasks };
        }
        self.next.0.store(0, Ordering::Relaxed);
        self.caller.set_current_thread();
        let state = self.state.0.load(Ordering::Relaxed);
        assert_eq!(state & (OPEN | JOINED_MASK), 0, "the former region has ended");
        self.state.0.store((state + EPOCH) | OPEN, Ordering::SeqCst);
        self.sleepers.iter().take(num_tasks - 1).for_each(Sleeper::wake);

        self.run_tasks(Job { call: call_task::<F>, data: std::ptr::from_ref(f).cast(), num_tasks });

        self.state.0.fetch_and(!OPEN, Ordering::SeqCst);
        self.caller.wait_until(|| self.state.0.load(Ordering::SeqCst) & JOINED_MASK == 0);
        let panic = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.busy.store(false, Ordering::Release);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    fn run_tasks(&self, job: Job) {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = self.next.0.fetch_add(1, Ordering::Relaxed);
                if job.num_tasks <= task {
                    break;
                }
                // SAFETY: `run` keeps the closure borrowed until everybody inside the region has
                // left.
                unsafe { (job.call)(job.data, task) };
            }
        }));
        if let Err(panic) = outcome {
            self.next.0.store(job.num_tasks, Ordering::Relaxed);
            let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(panic);
        }
    }

    fn work(&self, index: usize) {
        let sleeper = &self.sleepers[index];
        sleeper.set_current_thread();
        let mut seen_epoch = 0;
        loop {
            sleeper.wait_until(|| self.state.0.load(Ordering::SeqCst) / EPOCH != seen_epoch);
            if self.shutdown.load(Ordering::SeqCst) {
                return;
            }
            let mut state = self.state.0.load(Ordering::SeqCst);
            seen_epoch = state / EPOCH;
            while state & OPEN != 0 {
                match self.state.0.compare_exchange(
                    state,
                    state + 1,
                    Ordering::SeqCst,
                    Ordering::SeqCst,
                ) {
                    Ok(_) => {
                        seen_epoch = state / EPOCH;
                        // SAFETY: inside the region; the caller does not write the job before this
                        // worker leaves.
                        let job = unsafe { *self.job.get() };
                        self.run_tasks(job);
                        self.leave();
                        break;
                    }
                    Err(actual) => state = actual,
                }
            }
        }
    }

    fn leave(&self) {
        let before = self.state.0.fetch_sub(1, Ordering::SeqCst);
        if before & (OPEN | JOINED_MASK) == 1 {
            self.caller.wake();
        }
    }
}

/// # Safety
/// `data` points to an `F` that outlives the call.
unsafe fn call_task<F: Fn(usize) + Sync>(data: *const (), task: usize) {
    // SAFETY: the caller's promise.
    let f = unsafe { &*data.cast::<F>() };
    f(task);
}

/// The job of a pool that has not run anything.
unsafe fn call_nothing(_data: *const (), _task: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(num_tasks: usize) -> Vec<AtomicUsize> {
        (0..num_tasks).map(|_| AtomicUsize::new(0)).collect()
    }

    #[test]
    fn every_task_runs_once_for_any_number_of_threads() {
        for num_threads in [0, 1, 2, 3, 8] {
            let pool = ThreadPool::new(num_threads);
            assert_eq!(pool.num_threads(), num_threads.max(1));
            for num_tasks in [0, 1, 2, 7, 1000] {
                let runs = counts(num_tasks);
                pool.install(|| {
                    parallel_for(num_tasks, |task| {
                        runs[task].fetch_add(1, Ordering::Relaxed);
                    });
                });
                assert!(runs.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn many_short_regions_and_parked_workers_lose_no_task() {
        let pool = ThreadPool::new(4);
        let total = AtomicUsize::new(0);
        pool.install(|| {
            for round in 0..3000 {
                parallel_for(5, |_| {
                    total.fetch_add(1, Ordering::Relaxed);
                });
                if round % 100 == 0 {
                    // Long enough for the workers to give up spinning.
                    (0..200_000).for_each(|_| std::hint::spin_loop());
                }
            }
        });
        assert_eq!(total.into_inner(), 15_000);
    }

    #[test]
    fn without_a_pool_and_inside_a_task_the_calls_are_serial() {
        let order = Mutex::new(Vec::new());
        parallel_for(4, |task| order.lock().unwrap().push(task));
        assert_eq!(order.into_inner().unwrap(), [0, 1, 2, 3]);

        let pool = ThreadPool::new(2);
        let runs = counts(30);
        pool.install(|| {
            assert_eq!(current_num_threads(), 2);
            parallel_for(3, |outer| {
                assert_eq!(current_num_threads(), 1);
                parallel_for(10, |inner| {
                    runs[outer * 10 + inner].fetch_add(1, Ordering::Relaxed);
                });
            });
            assert_eq!(current_num_threads(), 2);
        });
        assert_eq!(current_num_threads(), 1);
        assert!(runs.iter().all(|count| count.load(Ordering::Relaxed) == 1));
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_pool_usable() {
        let pool = ThreadPool::new(3);
        for bad_task in [0, 1, 63] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.install(|| {
                    parallel_for(64, |task| assert!(task != bad_task, "task {task} fails"));
                });
            }));
            let message = outcome.unwrap_err();
            let message = message.downcast_ref::<String>().unwrap();
            assert!(message.contains(&format!("task {bad_task} fails")), "{message}");
            assert_eq!(current_num_threads(), 1);
            let total = AtomicUsize::new(0);
            pool.install(|| {
                parallel_for(64, |_| {
                    total.fetch_add(1, Ordering::Relaxed);
                });
            });
            assert_eq!(total.into_inner(), 64);
        }
    }

    #[test]
    fn two_callers_may_share_a_pool() {
        let pool = ThreadPool::new(2);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    pool.install(|| {
                        for _ in 0..200 {
                            parallel_for(10, |_| {
                                total.fetch_add(1, Ordering::Relaxed);
                            });
                        }
                    });
                });
            }
        });
        assert_eq!(total.into_inner(), 6000);
    }
}
