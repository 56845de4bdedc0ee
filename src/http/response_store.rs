//! Responses that later requests may refer to, in memory only.
//!
//! **Invariant:** what is kept is bounded in number, bytes and time. A conversation's turns are
//! shared by the responses that continue it and counted once.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

/// What a response costs beside its text.
const BYTES_PER_RESPONSE: usize = 1024;

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct StoreLimits {
    pub(super) max_responses: usize,
    pub(super) max_bytes: usize,
    pub(super) lifetime: Duration,
}

/// All stored responses.
pub(super) struct ResponseStore {
    limits: StoreLimits,
    num_bytes: Arc<AtomicUsize>,
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    by_id: HashMap<String, Arc<StoredResponse>>,
    /// The oldest first.
    order: VecDeque<(Instant, String)>,
}

/// A response and the conversation that led to it.
pub(super) struct StoredResponse {
    owner: Arc<str>,
    /// The response as JSON.
    pub(super) body: String,
    /// The turns of the conversation; this response's own is the last.
    turns: Vec<Arc<Turn>>,
    _space: Space,
}

/// What a request and its answer added to a conversation, as lists of items in JSON: text takes a
/// fraction of what trees take.
struct Turn {
    input: String,
    output: String,
    _space: Space,
}

/// Bytes that count until this is dropped.
struct Space {
    num_bytes: usize,
    total: Arc<AtomicUsize>,
}

impl Drop for Space {
    fn drop(&mut self) {
        self.total.fetch_sub(self.num_bytes, Ordering::Relaxed);
    }
}

/// What becomes a stored response.
pub(super) struct NewResponse<'a> {
    pub(super) id: &'a str,
    /// Who alone may refer to it.
    pub(super) owner: Arc<str>,
    pub(super) body: String,
    pub(super) input: String,
    pub(super) output: String,
    pub(super) previous: Option<&'a StoredResponse>,
}

impl ResponseStore {
    pub(super) fn new(limits: StoreLimits) -> Self {
        Self { limits, num_bytes: Arc::default(), entries: Mutex::default() }
    }

    /// Keeps a response, unless it alone would take the room of many.
    pub(super) fn insert(&self, new: NewResponse<'_>) {
        let num_bytes = new.input.len() + new.output.len() + new.body.len();
        if self.limits.max_bytes / 2 < num_bytes {
            tracing::warn!(num_bytes, "a response is too large to be stored");
            return;
        }
        let turn_space = self.space(new.input.len() + new.output.len());
        let turn = Turn { input: new.input, output: new.output, _space: turn_space };
        let mut turns = new.previous.map_or_else(Vec::new, |previous| previous.turns.clone());
        turns.push(Arc::new(turn));
        let own_bytes = BYTES_PER_RESPONSE + new.body.len() + size_of_val(turns.as_slice());
        let space = self.space(own_bytes);
        let stored = StoredResponse { owner: new.owner, body: new.body, turns, _space: space };
        let now = Instant::now();
        let mut entries = self.entries();
        entries.by_id.insert(new.id.to_owned(), Arc::new(stored));
        entries.order.push_back((now, new.id.to_owned()));
        self.drop_old(&mut entries, now);
    }

    /// The response, if it is `owner`'s.
    pub(super) fn get(&self, id: &str, owner: &str) -> Option<Arc<StoredResponse>> {
        let mut entries = self.entries();
        self.drop_old(&mut entries, Instant::now());
        entries.by_id.get(id).filter(|stored| *stored.owner == *owner).cloned()
    }

    /// Forgets a response of `owner`; whether there was one.
    pub(super) fn remove(&self, id: &str, owner: &str) -> bool {
        let mut entries = self.entries();
        self.drop_old(&mut entries, Instant::now());
        if entries.by_id.get(id).is_none_or(|stored| *stored.owner != *owner) {
            return false;
        }
        entries.order.retain(|(_, other)| other != id);
        entries.by_id.remove(id).is_some()
    }

    fn drop_old(&self, entries: &mut Entries, now: Instant) {
        while let Some((since, id)) = entries.order.front() {
            let is_over = self.limits.lifetime <= now.duration_since(*since);
            let is_full = self.limits.max_responses < entries.by_id.len()
                || self.limits.max_bytes < self.num_bytes.load(Ordering::Relaxed);
            if !is_over && !is_full {
                break;
            }
            entries.by_id.remove(id);
            entries.order.pop_front();
        }
    }

    fn space(&self, num_bytes: usize) -> Space {
        self.num_bytes.fetch_add(num_bytes, Ordering::Relaxed);
        Space { num_bytes, total: Arc::clone(&self.num_bytes) }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        // Nothing panics halfway through a change.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StoredResponse {
    /// Bytes of the conversation.
    pub(super) fn num_bytes(&self) -> usize {
        self.turns.iter().map(|turn| turn.input.len() + turn.output.len()).sum()
    }

    /// All items of the conversation, the answer included.
    pub(super) fn items(&self) -> Vec<Value> {
        let texts = self.turns.iter().flat_map(|turn| [&turn.input, &turn.output]);
        texts.flat_map(|text| parse(text)).collect()
    }

    /// The items that the answer was made from.
    pub(super) fn input_items(&self) -> Vec<Value> {
        let mut texts: Vec<&String> =
            self.turns.iter().flat_map(|turn| [&turn.input, &turn.output]).collect();
        texts.pop();
        texts.into_iter().flat_map(|text| parse(text)).collect()
    }
}

fn parse(items: &str) -> Vec<Value> {
    serde_json::from_str(items).expect("it was written by this server")
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: &str = "ann";

    fn store(max_responses: usize, max_bytes: usize, lifetime: Duration) -> ResponseStore {
        ResponseStore::new(StoreLimits { max_responses, max_bytes, lifetime })
    }

    fn insert(store: &ResponseStore, id: &str, num_bytes: usize, previous: Option<&str>) {
        let previous = previous.map(|id| store.get(id, OWNER).unwrap());
        let input = format!("[\"{}\"]", "x".repeat(num_bytes));
        store.insert(NewResponse {
            id,
            owner: OWNER.into(),
            body: String::new(),
            input,
            output: "[\"answer\"]".into(),
            previous: previous.as_deref(),
        });
    }

    const LONG: Duration = Duration::from_secs(3600);

    #[test]
    fn the_oldest_go_when_there_are_too_many_or_too_large_ones() {
        let few = store(2, 1 << 20, LONG);
        for id in ["a", "b", "c"] {
            insert(&few, id, 10, None);
        }
        assert!(
            few.get("a", OWNER).is_none()
                && few.get("b", OWNER).is_some()
                && few.get("c", OWNER).is_some()
        );
        let small = store(100, 10_000, LONG);
        for id in ["a", "b", "c"] {
            insert(&small, id, 3000, None);
        }
        assert!(small.get("a", OWNER).is_none() && small.get("c", OWNER).is_some());
        insert(&small, "huge", 6000, None);
        assert!(small.get("huge", OWNER).is_none() && small.get("c", OWNER).is_some());
    }

    #[test]
    fn time_ends_a_response_and_all_bytes_come_back() {
        let store = store(100, 1 << 20, Duration::ZERO);
        insert(&store, "a", 10, None);
        assert!(store.get("a", OWNER).is_none());
        assert_eq!(store.num_bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_conversation_outlives_the_response_it_began_with() {
        let store = store(100, 1 << 20, LONG);
        insert(&store, "a", 1, None);
        insert(&store, "b", 2, Some("a"));
        assert!(store.remove("a", OWNER) && !store.remove("a", OWNER));
        let stored = store.get("b", OWNER).unwrap();
        assert_eq!(stored.items(), ["x", "answer", "xx", "answer"]);
        assert_eq!(stored.input_items(), ["x", "answer", "xx"]);
        assert!(store.remove("b", OWNER));
        drop(stored);
        assert_eq!(store.num_bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_response_is_its_owners_alone() {
        let store = store(100, 1 << 20, LONG);
        insert(&store, "a", 10, None);
        assert!(store.get("a", "bob").is_none() && !store.remove("a", "bob"));
        assert!(store.get("a", OWNER).is_some() && store.remove("a", OWNER));
    }
}
