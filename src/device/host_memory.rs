//! How much memory this machine gives the program.

use std::fs;

/// Bytes of memory the program may use: the machine's, or less in a container with a limit.
/// `None` where the system does not say.
pub fn total_bytes() -> Option<u64> {
    let machine = meminfo_bytes("MemTotal");
    match (machine, container_limit()) {
        (Some(machine), Some(limit)) => Some(machine.min(limit)),
        (machine, limit) => machine.or(limit),
    }
}

/// Bytes of memory that can be used without swapping, as the machine's kernel estimates it, or what
/// is left below a container's limit.
pub fn available_bytes() -> Option<u64> {
    let used = number_in("/sys/fs/cgroup/memory.current").unwrap_or(0);
    let container = container_limit().map(|limit| limit.saturating_sub(used));
    match (meminfo_bytes("MemAvailable"), container) {
        (Some(machine), Some(container)) => Some(machine.min(container)),
        (machine, container) => machine.or(container),
    }
}

fn meminfo_bytes(key: &str) -> Option<u64> {
    parse_meminfo(&fs::read_to_string("/proc/meminfo").ok()?, key)
}

fn parse_meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

fn container_limit() -> Option<u64> {
    // `max`, which is no number, means none.
    number_in("/sys/fs/cgroup/memory.max")
}

fn number_in(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:       16305664 kB\nMemFree:  1 kB\nMemAvailable:   12000000 kB\n";
        assert_eq!(parse_meminfo(text, "MemTotal"), Some(16_305_664 * 1024));
        assert_eq!(parse_meminfo(text, "MemAvailable"), Some(12_000_000 * 1024));
        assert_eq!(parse_meminfo(text, "Mem"), None);
        assert_eq!(parse_meminfo("MemTotal: x kB", "MemTotal"), None);
        assert!(total_bytes().is_none_or(|bytes| 1 << 20 < bytes));
    }
}
