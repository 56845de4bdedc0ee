//! The process as its operating system sees it, under the names that Prometheus' own client
//! libraries use. Read from `/proc`; where there is none, nothing is said.

use std::fs;

use metrics::{counter, describe_counter, describe_gauge, gauge};

const CPU_SECONDS: &str = "process_cpu_seconds_total";
const RESIDENT: &str = "process_resident_memory_bytes";
const VIRTUAL: &str = "process_virtual_memory_bytes";
const THREADS: &str = "process_threads";
const OPEN_FDS: &str = "process_open_fds";
const MAX_FDS: &str = "process_max_fds";
const START_TIME: &str = "process_start_time_seconds";

/// Ticks of Linux' clock for processes per second, the same on every architecture.
const TICKS_PER_SECOND: f64 = 100.0;

pub(super) fn describe(start_time: f64) {
    describe_counter!(CPU_SECONDS, "Time that all threads have computed.");
    describe_gauge!(RESIDENT, "Memory in use, with mapped files.");
    describe_gauge!(VIRTUAL, "Addresses in use.");
    describe_gauge!(THREADS, "Threads.");
    describe_gauge!(OPEN_FDS, "Open files and connections.");
    describe_gauge!(MAX_FDS, "Most files and connections that may be open.");
    describe_gauge!(START_TIME, "When the server started, in seconds since 1970.");
    gauge!(START_TIME).set(start_time);
}

/// Records what the operating system says now.
pub(super) fn observe() {
    if let Some(seconds) = read("stat").as_deref().and_then(cpu_seconds) {
        // Whole seconds, because counters here count in whole numbers.
        counter!(CPU_SECONDS).absolute(seconds as u64);
    }
    if let Some(status) = read("status") {
        for (name, field, unit) in
            [(RESIDENT, "VmRSS:", 1024.0), (VIRTUAL, "VmSize:", 1024.0), (THREADS, "Threads:", 1.0)]
        {
            if let Some(value) = number_after(&status, field) {
                gauge!(name).set(value * unit);
            }
        }
    }
    if let Some(max) = read("limits").and_then(|text| number_after(&text, "Max open files")) {
        gauge!(MAX_FDS).set(max);
    }
    if let Ok(entries) = fs::read_dir("/proc/self/fd") {
        // Looking opens one more.
        gauge!(OPEN_FDS).set(entries.count().saturating_sub(1) as f64);
    }
}

fn read(name: &str) -> Option<String> {
    fs::read_to_string(format!("/proc/self/{name}")).ok()
}

/// The first number behind `label`.
fn number_after(text: &str, label: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(label))?;
    line.split_whitespace().next()?.parse().ok()
}

/// User and system time. The name of the program may hold blanks and brackets.
fn cpu_seconds(stat: &str) -> Option<f64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Some((ticks()? + ticks()?) / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_linux_writes() {
        let stat = "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 250 150 0 0 20 0 4 0 99 1 1";
        assert_eq!(cpu_seconds(stat), Some(4.0));
        assert_eq!(cpu_seconds("nothing"), None);
        let status = "Name:\tx\nVmSize:\t  200 kB\nVmRSS:\t  100 kB\nThreads:\t4\n";
        assert_eq!(number_after(status, "VmRSS:"), Some(100.0));
        assert_eq!(number_after(status, "VmSwap:"), None);
        let limits = "Max open files            1024                 4096                 files";
        assert_eq!(number_after(limits, "Max open files"), Some(1024.0));
        assert_eq!(number_after("Max open files   unlimited", "Max open files"), None);
    }
}
