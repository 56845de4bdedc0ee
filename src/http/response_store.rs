//! Responses that later requests may refer to, in memory only.
//!
//! **Invariant:** what is kept is bounded in number, bytes and time, and nobody pushes out the
//! responses of others who keep less. A conversation's turns are shared by the responses that
//! continue it and counted once.

use std::collections::{BTreeMap, HashMap, VecDeque};
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
    /// Whoever has stored something.
    shares: BTreeMap<Arc<str>, Share>,
}

/// What one owner keeps.
#[derive(Default)]
struct Share {
    /// Ids, the oldest first.
    order: VecDeque<(Instant, String)>,
    num_bytes: Arc<AtomicUsize>,
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

/// Bytes that count until this is dropped: in all, and as their owner's.
struct Space {
    num_bytes: usize,
    sums: [Arc<AtomicUsize>; 2],
}

impl Space {
    fn new(num_bytes: usize, sums: [&Arc<AtomicUsize>; 2]) -> Self {
        for sum in sums {
            sum.fetch_add(num_bytes, Ordering::Relaxed);
        }
        Self { num_bytes, sums: sums.map(Arc::clone) }
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        for sum in &self.sums {
            sum.fetch_sub(self.num_bytes, Ordering::Relaxed);
        }
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
        let now = Instant::now();
        let mut entries = self.entries();
        let Entries { by_id, shares } = &mut *entries;
        let share = shares.entry(Arc::clone(&new.owner)).or_default();
        let space = |num_bytes| Space::new(num_bytes, [&self.num_bytes, &share.num_bytes]);
        let turn_space = space(new.input.len() + new.output.len());
        let turn = Turn { input: new.input, output: new.output, _space: turn_space };
        let mut turns = new.previous.map_or_else(Vec::new, |previous| previous.turns.clone());
        turns.push(Arc::new(turn));
        let space = space(BYTES_PER_RESPONSE + new.body.len() + size_of_val(turns.as_slice()));
        let stored = StoredResponse { owner: new.owner, body: new.body, turns, _space: space };
        by_id.insert(new.id.to_owned(), Arc::new(stored));
        share.order.push_back((now, new.id.to_owned()));
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
        if let Some(share) = entries.shares.get_mut(owner) {
            share.order.retain(|(_, other)| other != id);
        }
        entries.by_id.remove(id).is_some()
    }

    /// Drops what is too old, and while there is too much, the oldest of whoever keeps most.
    fn drop_old(&self, entries: &mut Entries, now: Instant) {
        let Entries { by_id, shares } = entries;
        for share in shares.values_mut() {
            while let Some((since, _)) = share.order.front()
                && self.limits.lifetime <= now.duration_since(*since)
            {
                share.drop_oldest(by_id);
            }
        }
        loop {
            let are_too_many = self.limits.max_responses < by_id.len();
            let are_too_large = self.limits.max_bytes < self.num_bytes.load(Ordering::Relaxed);
            if !are_too_many && !are_too_large {
                break;
            }
            let amount = |share: &&mut Share| {
                if are_too_large {
                    share.num_bytes.load(Ordering::Relaxed)
                } else {
                    share.order.len()
                }
            };
            let with_any = shares.values_mut().filter(|share| !share.order.is_empty());
            let Some(largest) = with_any.max_by_key(amount) else { break };
            largest.drop_oldest(by_id);
        }
        // What is in use elsewhere still counts as its owner's.
        shares.retain(|_, share| {
            !share.order.is_empty() || 0 < share.num_bytes.load(Ordering::Relaxed)
        });
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        // Nothing panics halfway through a change.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    fn drop_oldest(&mut self, by_id: &mut HashMap<String, Arc<StoredResponse>>) {
        if let Some((_, id)) = self.order.pop_front() {
            by_id.remove(&id);
        }
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
        insert_for(OWNER, store, (id, num_bytes), previous);
    }

    fn insert_for(
        owner: &str,
        store: &ResponseStore,
        (id, num_bytes): (&str, usize),
        previous: Option<&str>,
    ) {
        let previous = previous.map(|id| store.get(id, owner).unwrap());
        let input = format!("[\"{}\"]", "x".repeat(num_bytes));
        store.insert(NewResponse {
            id,
            owner: owner.into(),
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

    /// Goal: who stores much pushes out what is his own, by number and by size, and everybody's room
    /// comes back. Method: one stores a little, another more than there is room for.
    #[test]
    fn who_keeps_most_loses_first() {
        for (max_responses, max_bytes, size) in [(4, 1 << 20, 10), (100, 20_000, 3000)] {
            let store = store(max_responses, max_bytes, LONG);
            insert_for("ann", &store, ("a1", 10), None);
            insert_for("ann", &store, ("a2", 10), Some("a1"));
            for id in ["b1", "b2", "b3", "b4", "b5", "b6", "b7"] {
                insert_for("bob", &store, (id, size), None);
            }
            assert!(["a1", "a2"].iter().all(|id| store.get(id, "ann").is_some()));
            assert!(store.get("b1", "bob").is_none() && store.get("b7", "bob").is_some());
            // Ann may come to keep as much as Bob.
            for id in ["a3", "a4", "a5", "a6", "a7"] {
                insert_for("ann", &store, (id, size), None);
            }
            assert!(store.get("a1", "ann").is_none() && store.get("a7", "ann").is_some());
            assert!(store.get("b7", "bob").is_some());
            for (owner, ids) in [("ann", "a1 a2 a3 a4 a5 a6 a7"), ("bob", "b2 b3 b4 b5 b6 b7")] {
                for id in ids.split(' ') {
                    store.remove(id, owner);
                }
            }
            store.get("none", "ann");
            assert_eq!(store.num_bytes.load(Ordering::Relaxed), 0);
            assert!(store.entries().shares.is_empty(), "nobody is remembered");
        }
    }
}
