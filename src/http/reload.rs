//! Takes over changed files without a restart.

use std::error::Error;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::Signal;
use tokio::time::sleep;

use super::key_ring::KeyRing;
use super::tls::Tls;

/// How often files are looked at.
const INTERVAL: Duration = Duration::from_secs(1);

/// Files, and what to do when one of them has changed.
pub struct Reload {
    /// What they hold.
    what: &'static str,
    files: Vec<PathBuf>,
    /// Absent before the first look: the files may have changed since they were opened.
    seen: Option<Vec<Option<Version>>>,
    read: Box<dyn Fn() -> Result<(), Box<dyn Error>> + Send>,
}

/// What tells one content of a file from the next without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    modified: Option<SystemTime>,
    num_bytes: u64,
    inode: u64,
}

impl Reload {
    /// Takes over keys, if they are in a file.
    pub fn keys(keys: &Arc<KeyRing>) -> Self {
        let files = keys.file().map(PathBuf::from).into_iter().collect();
        let keys = Arc::clone(keys);
        Self::new("API keys", files, move || Ok(keys.reload()?))
    }

    /// Takes over certificates.
    pub fn certificates(tls: &Arc<Tls>) -> Self {
        let (files, tls) = (tls.paths(), Arc::clone(tls));
        Self::new("certificates", files, move || Ok(tls.reload()?))
    }

    fn new(
        what: &'static str,
        files: Vec<PathBuf>,
        read: impl Fn() -> Result<(), Box<dyn Error>> + Send + 'static,
    ) -> Self {
        Self { what, files, seen: None, read: Box::new(read) }
    }

    fn look(&mut self) {
        let versions = Some(versions(&self.files));
        if !self.files.is_empty() && versions != self.seen {
            self.seen = versions;
            self.take_over();
        }
    }

    /// Whatever is wrong with the files, the server goes on with what it has.
    fn take_over(&self) {
        match (self.read)() {
            Ok(()) => tracing::info!(what = self.what, "read again"),
            Err(error) => {
                let reason = chain(error.as_ref());
                tracing::error!(what = self.what, reason, "cannot be read again; unchanged");
            }
        }
    }
}

/// Looks at files every second, and takes over all of them at every `hangup`, for ever.
pub async fn reload_when_changed(mut reloads: Vec<Reload>, mut hangup: Signal) {
    loop {
        let is_asked = tokio::select! {
            () = sleep(INTERVAL) => false,
            _ = hangup.recv() => true,
        };
        // Files may be slow, and nobody's answer should wait for them.
        let looked = tokio::task::spawn_blocking(move || {
            for reload in &mut reloads {
                if is_asked { reload.take_over() } else { reload.look() }
            }
            reloads
        });
        match looked.await {
            Ok(same) => reloads = same,
            Err(error) => return tracing::error!(%error, "files are not looked at any more"),
        }
    }
}

fn versions(files: &[PathBuf]) -> Vec<Option<Version>> {
    let version = |file: &PathBuf| {
        let metadata = fs::metadata(file).ok()?;
        let (modified, num_bytes) = (metadata.modified().ok(), metadata.len());
        Some(Version { modified, num_bytes, inode: metadata.ino() })
    };
    files.iter().map(version).collect()
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_change_is_seen_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "1").unwrap();
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        let mut reload = Reload::new("test", vec![path.clone()], move || {
            counted.fetch_add(1, Ordering::Relaxed);
            Err("broken".into())
        });
        // It may have changed since whoever asks has read it.
        reload.look();
        assert_eq!(count.load(Ordering::Relaxed), 1);
        fs::write(&path, "22").unwrap();
        reload.look();
        reload.look();
        assert_eq!(count.load(Ordering::Relaxed), 2);
        // Replaced by a file of the same size and time, as a linked secret is.
        let other = folder.path().join("other");
        fs::write(&other, "33").unwrap();
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        fs::File::options().append(true).open(&other).unwrap().set_modified(modified).unwrap();
        fs::rename(&other, &path).unwrap();
        reload.look();
        assert_eq!(count.load(Ordering::Relaxed), 3);
        fs::remove_file(&path).unwrap();
        reload.look();
        assert_eq!(count.load(Ordering::Relaxed), 4);
    }
}
