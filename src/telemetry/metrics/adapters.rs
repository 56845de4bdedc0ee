//! Which adapters requests are using.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use metrics::gauge;

#[allow(clippy::wildcard_imports, reason = "all of them are names of metrics")]
use super::catalogue::*;

/// Requests by the adapter that they have.
struct InUse {
    max: Option<usize>,
    waiting: BTreeMap<Arc<str>, usize>,
    running: BTreeMap<Arc<str>, usize>,
}

static IN_USE: Mutex<InUse> =
    Mutex::new(InUse { max: None, waiting: BTreeMap::new(), running: BTreeMap::new() });

fn in_use() -> MutexGuard<'static, InUse> {
    IN_USE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The server may have adapters, at most so many.
pub fn adapter_limit(max: usize) {
    in_use().max = Some(max);
}

/// How many adapters are in memory, and how much of it they take.
pub fn adapters_held(count: usize, num_bytes: usize) {
    gauge!(ADAPTERS_HELD).set(count as f64);
    gauge!(ADAPTER_BYTES).set(num_bytes as f64);
}

/// A request with an adapter: counted as long as it is held, first as waiting.
#[derive(Debug)]
pub struct AdaptedRequest {
    name: Arc<str>,
    is_running: bool,
}

impl AdaptedRequest {
    /// A request comes into the queue.
    pub fn waiting(name: &Arc<str>) -> Self {
        *in_use().waiting.entry(Arc::clone(name)).or_default() += 1;
        Self { name: Arc::clone(name), is_running: false }
    }

    /// It leaves the queue.
    pub fn start(&mut self) {
        if !self.is_running {
            let mut in_use = in_use();
            take_one(&mut in_use.waiting, &self.name);
            *in_use.running.entry(Arc::clone(&self.name)).or_default() += 1;
            self.is_running = true;
        }
    }
}

impl Drop for AdaptedRequest {
    fn drop(&mut self) {
        let in_use = &mut *in_use();
        let counts = if self.is_running { &mut in_use.running } else { &mut in_use.waiting };
        take_one(counts, &self.name);
    }
}

fn take_one(counts: &mut BTreeMap<Arc<str>, usize>, name: &str) {
    if let Some(count) = counts.get_mut(name) {
        *count -= 1;
        if *count == 0 {
            counts.remove(name);
        }
    }
}

/// vLLM's gauge, whose labels say what is in use and whose value is the time. It is written here, as a
/// series of each set of names would stay for ever otherwise. Nothing if there can be no adapters.
pub(super) fn render(model_name: &str) -> String {
    let in_use = in_use();
    let Some(max) = in_use.max else { return String::new() };
    let names = |counts: &BTreeMap<Arc<str>, usize>| {
        let names: Vec<&str> = counts.keys().map(|name| &**name).collect();
        escaped(&names.join(","))
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let mut text = String::new();
    let _ = writeln!(text, "# HELP {LORA_REQUESTS} {LORA_REQUESTS_HELP}");
    let _ = writeln!(text, "# TYPE {LORA_REQUESTS} gauge");
    let _ = writeln!(
        text,
        "{LORA_REQUESTS}{{model_name=\"{}\",max_lora=\"{max}\",waiting_lora_adapters=\"{}\",\
         running_lora_adapters=\"{}\"}} {now}",
        escaped(model_name),
        names(&in_use.waiting),
        names(&in_use.running),
    );
    text
}

/// A value as it stands between quotation marks.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
