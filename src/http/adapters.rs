//! The adapters that requests can name.
//!
//! A request that was let in keeps its adapter in memory. So taking one off the list disturbs nobody,
//! and its memory is given back when the last request with it is over.

use std::any::Any;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use super::error::ApiError;
use super::state::unix_seconds;
use crate::config::lora::check_name;
use crate::engine::request::Adapter;
use crate::telemetry::metrics;

/// What is read of an adapter's directory.
const ADAPTER_FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// Weights that a runner can use.
pub struct LoadedAdapter {
    /// As the runner knows them.
    pub weights: Arc<dyn Any + Send + Sync>,
    /// Memory that they take.
    pub num_bytes: usize,
}

type Load = dyn Fn(&Path) -> Result<LoadedAdapter, String> + Send + Sync;
type IsTaken = dyn Fn(&str) -> bool + Send + Sync;

/// An adapter that requests can name.
#[derive(Clone)]
pub(super) struct Listed {
    pub(super) adapter: Adapter,
    /// Its directory.
    pub(super) path: PathBuf,
    /// When it was loaded, in seconds since the epoch.
    pub(super) created: u64,
}

/// What is in memory, listed or still in use.
struct Held {
    weights: Weak<dyn Any + Send + Sync>,
    num_bytes: usize,
}

/// All adapters of a server.
pub struct Adapters {
    load: Box<Load>,
    /// Most adapters in memory.
    max: usize,
    /// Whether the model itself answers to a name.
    is_taken: Box<IsTaken>,
    /// Where others may be loaded from while the server runs.
    root: Option<Root>,
    /// In the order of loading.
    listed: RwLock<Vec<Listed>>,
    held: Mutex<Vec<Held>>,
    /// Locked by whoever loads or unloads: one at a time. Nobody who answers requests waits for it.
    changing: Mutex<()>,
}

/// A directory below which adapters are.
struct Root {
    /// With its links followed.
    real: PathBuf,
    /// As clients may know it.
    given: PathBuf,
}

/// Why an adapter was not loaded or unloaded. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdapterError {
    /// Nothing may be loaded while the server runs.
    #[error("adapters are loaded only at the start: start with `--lora-root DIR` to load others")]
    Closed,
    /// No adapter can be called this.
    #[error("`lora_name`: {0}")]
    Name(String),
    /// An adapter of this name is there.
    #[error("`lora_name`: `{0}` is loaded; set `load_inplace` to replace it")]
    Taken(String),
    /// The model answers to this, and would do so when the adapter is gone.
    #[error(
        "`lora_name`: `{0}` is a name of the model, its own or by `--alias` or `--dashscope-names`; \
         call the adapter something else"
    )]
    Model(String),
    /// The directory is not where adapters may be loaded from.
    #[error("`lora_path`: must be a directory below the server's `--lora-root`")]
    Outside,
    /// There is no such directory.
    #[error("`lora_path`: there is no `{0}` below the server's `--lora-root`")]
    Missing(String),
    /// It cannot be used.
    #[error("`lora_path`: {0}")]
    Unusable(String),
    /// All places are taken by adapters that are listed.
    #[error("`lora_name`: `--max-loras {0}` adapters are loaded; unload one first")]
    Full(usize),
    /// All places are taken, some by adapters that are not listed any more.
    #[error(
        "adapters that were unloaded are still used by requests; try again when they have ended"
    )]
    InUse,
    /// There is none of this name.
    #[error("`lora_name`: there is no adapter `{0}`")]
    Unknown(String),
}

impl Default for Adapters {
    /// None, for ever.
    fn default() -> Self {
        Self::new(0, |_| Err("this server has no adapters".to_owned()))
    }
}

impl Adapters {
    /// No adapters yet, and how to load them.
    pub fn new(
        max: usize,
        load: impl Fn(&Path) -> Result<LoadedAdapter, String> + Send + Sync + 'static,
    ) -> Self {
        if 0 < max {
            metrics::adapter_limit(max);
        }
        Self {
            load: Box::new(load),
            max,
            is_taken: Box::new(|_| false),
            root: None,
            listed: RwLock::default(),
            held: Mutex::default(),
            changing: Mutex::default(),
        }
    }

    /// Keeps names that the model answers to from being given to adapters: a request for one that is
    /// gone would be answered by the model.
    #[must_use]
    pub fn beside(self, is_taken: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        Self { is_taken: Box::new(is_taken), ..self }
    }

    /// Lets adapters be loaded from below a directory while the server runs.
    ///
    /// # Errors
    /// If it is not there.
    pub fn below(self, root: &Path) -> std::io::Result<Self> {
        let root = Root { real: root.canonicalize()?, given: std::path::absolute(root)? };
        root.real.read_dir()?;
        Ok(Self { root: Some(root), ..self })
    }

    /// Loads an adapter from anywhere. Takes as long as reading it.
    ///
    /// # Errors
    /// If it cannot be used, its name is taken, or there are enough.
    pub fn add(&self, name: &str, path: &Path) -> Result<(), AdapterError> {
        self.load(name, path, false)
    }

    /// Loads an adapter that an administrator asks for; the path may begin at the root. Takes as long
    /// as reading it.
    pub(super) fn add_below_root(
        &self,
        name: &str,
        path: &str,
        replaces: bool,
    ) -> Result<(), AdapterError> {
        let root = self.root.as_ref().ok_or(AdapterError::Closed)?;
        let path = resolve(root, path)?;
        self.load(name, &path, replaces)
    }

    fn load(&self, name: &str, path: &Path, replaces: bool) -> Result<(), AdapterError> {
        check_name(name).map_err(AdapterError::Name)?;
        if (self.is_taken)(name) {
            return Err(AdapterError::Model(name.to_owned()));
        }
        let changing = self.changing();
        let is_listed = self.find(name).is_some();
        if is_listed && !replaces {
            return Err(AdapterError::Taken(name.to_owned()));
        }
        // The old one of a name is gone when the new one is there, unless requests have it.
        let num_listed = self.all().len() - usize::from(is_listed);
        let num_held = self.held().len() - usize::from(is_listed);
        if self.max <= num_listed {
            return Err(AdapterError::Full(self.max));
        }
        if self.max <= num_held {
            return Err(AdapterError::InUse);
        }
        let LoadedAdapter { weights, num_bytes } =
            (self.load)(path).map_err(AdapterError::Unusable)?;
        self.held().push(Held { weights: Arc::downgrade(&weights), num_bytes });
        let adapter = Adapter::new(name, weights);
        let new = Listed { adapter, path: path.to_path_buf(), created: unix_seconds() };
        let replaced = {
            let mut listed = self.listed.write().unwrap_or_else(PoisonError::into_inner);
            let old = listed.iter().position(|listed| **listed.adapter.name() == *name);
            let replaced = old.map(|index| listed.remove(index));
            listed.push(new);
            replaced
        };
        // Its memory is given back where nobody waits.
        drop(replaced);
        tracing::info!(name, path = %path.display(), num_bytes, "adapter loaded");
        drop(changing);
        self.observe();
        Ok(())
    }

    /// Takes an adapter off the list. Requests that have it finish.
    pub(super) fn remove(&self, name: &str) -> Result<(), AdapterError> {
        if self.root.is_none() {
            return Err(AdapterError::Closed);
        }
        // Not while one of the same name is being loaded.
        let changing = self.changing();
        let removed = {
            let mut listed = self.listed.write().unwrap_or_else(PoisonError::into_inner);
            let index = listed.iter().position(|listed| **listed.adapter.name() == *name);
            index.map(|index| listed.remove(index))
        };
        drop(removed.ok_or_else(|| AdapterError::Unknown(name.to_owned()))?);
        tracing::info!(name, "adapter unloaded");
        drop(changing);
        self.observe();
        Ok(())
    }

    /// The adapter of a name.
    pub(super) fn find(&self, name: &str) -> Option<Listed> {
        let listed = self.listed.read().unwrap_or_else(PoisonError::into_inner);
        listed.iter().find(|listed| **listed.adapter.name() == *name).cloned()
    }

    /// All of them, in the order of loading.
    pub(super) fn all(&self) -> Vec<Listed> {
        self.listed.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is in memory now.
    fn held(&self) -> MutexGuard<'_, Vec<Held>> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|held| 0 < held.weights.strong_count());
        held
    }

    /// Tells the metrics what is in memory.
    pub fn observe(&self) {
        if 0 < self.max {
            let held = self.held();
            let num_bytes = held.iter().map(|held| held.num_bytes).sum();
            metrics::adapters_held(held.len(), num_bytes);
        }
    }
}

/// A directory below the root, links followed. What lies elsewhere is refused before anybody looks
/// whether it is there.
fn resolve(root: &Root, path: &str) -> Result<PathBuf, AdapterError> {
    let Root { real: root, given } = root;
    let below = Path::new(path).strip_prefix(given).unwrap_or(Path::new(path));
    let joined = root.join(below);
    let is_plain = |part: Component<'_>| !matches!(part, Component::ParentDir | Component::CurDir);
    if !joined.starts_with(root) || !joined.components().all(is_plain) || joined == *root {
        return Err(AdapterError::Outside);
    }
    let missing = || AdapterError::Missing(path.to_owned());
    let inside = |path: &Path| match path.canonicalize() {
        Ok(real) if real.starts_with(root) => Ok(Some(real)),
        Ok(_) => Err(AdapterError::Outside),
        Err(_) => Ok(None),
    };
    let directory = inside(&joined)?.filter(|path| path.is_dir()).ok_or_else(missing)?;
    // Its files may be links themselves, as in the hub's cache. Of one that is not there the loader
    // speaks.
    for file in ADAPTER_FILES {
        inside(&directory.join(file))?;
    }
    Ok(directory)
}

impl From<AdapterError> for ApiError {
    fn from(error: AdapterError) -> Self {
        let message = error.to_string();
        let param = |name: &str| Some(name.to_owned());
        match error {
            AdapterError::Closed => Self::Unsupported(
                "adapters cannot be changed while the server runs: start with --lora-root DIR",
            ),
            AdapterError::Unknown(_) => Self::AdapterNotFound { message, param: "lora_name" },
            AdapterError::Missing(_) => Self::AdapterNotFound { message, param: "lora_path" },
            AdapterError::InUse => Self::AdaptersInUse(message),
            AdapterError::Outside | AdapterError::Unusable(_) => {
                Self::Invalid { message, param: param("lora_path") }
            }
            AdapterError::Name(_)
            | AdapterError::Taken(_)
            | AdapterError::Model(_)
            | AdapterError::Full(_) => Self::Invalid { message, param: param("lora_name") },
        }
    }
}
