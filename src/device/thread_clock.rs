//! How long a thread has been computing, as others see it: on a busy machine that is less than the
//! time that has passed.

use std::time::Duration;

/// The processor time of the thread that made it.
#[derive(Clone, Copy, Debug)]
pub struct ThreadClock {
    #[cfg(target_os = "linux")]
    id: libc::clockid_t,
}

impl ThreadClock {
    /// This thread's clock. `None` if the system has none.
    #[cfg(target_os = "linux")]
    pub fn of_this_thread() -> Option<Self> {
        let mut id = 0;
        // SAFETY: the thread is this one, and `id` is written before it is read.
        let error = unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &raw mut id) };
        (error == 0).then_some(Self { id })
    }

    /// This system has none.
    #[cfg(not(target_os = "linux"))]
    pub fn of_this_thread() -> Option<Self> {
        None
    }

    /// How long the thread has computed. `None` if it has ended.
    #[cfg(target_os = "linux")]
    pub fn elapsed(&self) -> Option<Duration> {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the call writes one `timespec`; a clock that is no more is an error.
        let error = unsafe { libc::clock_gettime(self.id, &raw mut time) };
        let (seconds, nanos) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
        (error == 0).then_some(Duration::new(seconds.ok()?, nanos.ok()?))
    }

    /// Nothing: there is no such clock.
    #[cfg(not(target_os = "linux"))]
    pub fn elapsed(&self) -> Option<Duration> {
        None
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn who_waits_does_not_compute() {
        let (clock_sender, clocks) = channel();
        let (go, gone) = channel::<()>();
        let thread = std::thread::spawn(move || {
            let clock = ThreadClock::of_this_thread().expect("Linux has them");
            clock_sender.send(clock).expect("the test waits");
            let _ = gone.recv();
            while clock.elapsed() < Some(Duration::from_millis(60)) {}
            clock_sender.send(clock).expect("the test waits");
            let _ = gone.recv();
        });
        let clock = clocks.recv().expect("the thread has begun");
        std::thread::sleep(Duration::from_millis(60));
        assert!(clock.elapsed() < Some(Duration::from_millis(50)), "{:?}", clock.elapsed());
        go.send(()).expect("the thread waits");
        clocks.recv().expect("the thread has computed");
        assert!(Some(Duration::from_millis(60)) <= clock.elapsed(), "{:?}", clock.elapsed());
        go.send(()).expect("the thread waits");
        thread.join().expect("no panic");
    }
}
