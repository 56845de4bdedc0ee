//! The machine this process runs on: its memory and what its processor can do.

use std::fs;

/// Memory of the machine or of the container this process lives in, whichever is smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// All of it.
    pub total_bytes: u64,
    /// What can be used without pushing others out.
    pub available_bytes: u64,
}

/// Reads the memory figures; without `/proc` (not Linux) both are 8 GiB.
pub fn memory() -> HostMemory {
    let unknown = 8 << 30;
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let mut memory = HostMemory {
        total_bytes: meminfo_bytes(&meminfo, "MemTotal:").unwrap_or(unknown),
        available_bytes: meminfo_bytes(&meminfo, "MemAvailable:").unwrap_or(unknown),
    };
    let number = |path: &str| -> Option<u64> { fs::read_to_string(path).ok()?.trim().parse().ok() };
    if let Some(limit) = number("/sys/fs/cgroup/memory.max") {
        let used = number("/sys/fs/cgroup/memory.current").unwrap_or(0);
        memory.total_bytes = memory.total_bytes.min(limit);
        memory.available_bytes = memory.available_bytes.min(limit.saturating_sub(used));
    }
    memory
}

fn meminfo_bytes(meminfo: &str, key: &str) -> Option<u64> {
    let line = meminfo.lines().find(|line| line.starts_with(key))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    kib.checked_mul(1024)
}

/// Number of cores this process may use.
pub fn num_cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

#[cfg(test)]
mod tests {
    use super::meminfo_bytes;

    #[test]
    fn memory_figures_are_read_in_kibibytes() {
        let meminfo = "MemTotal:       24576000 kB\nMemAvailable:   23000000 kB\n";
        assert_eq!(meminfo_bytes(meminfo, "MemTotal:"), Some(24_576_000 * 1024));
        assert_eq!(meminfo_bytes(meminfo, "SwapTotal:"), None);
    }
}
