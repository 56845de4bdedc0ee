//! What a sequence is computed with beside the model's own weights.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::kv::AdapterId;

/// One load of an adapter. Whoever holds it keeps its weights in memory: the list of adapters,
/// requests, sequences, and steps under way. So it can be taken off the list at any time, and its
/// memory is given back when the last of them is over.
#[derive(Clone)]
pub struct Adapter {
    id: AdapterId,
    name: Arc<str>,
    /// Only the runner knows their type.
    weights: Arc<dyn Any + Send + Sync>,
}

impl Adapter {
    /// Weights by the name that clients call them; another load of the same is another adapter.
    pub fn new(name: impl Into<Arc<str>>, weights: Arc<dyn Any + Send + Sync>) -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let id = AdapterId(NEXT_ID.fetch_add(1, Ordering::Relaxed));
        Self { id, name: name.into(), weights }
    }

    /// Tells loads apart.
    pub fn id(&self) -> AdapterId {
        self.id
    }

    /// What clients call it.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The weights, if they are a `T`.
    pub fn weights<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        Arc::clone(&self.weights).downcast().ok()
    }
}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Adapter({} {})", self.id.0, self.name)
    }
}
