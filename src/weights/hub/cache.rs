//! The cache on disk, in the layout of other Hugging Face tools.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};

use super::{Progress, REVISION, Reason, RemoteFile, transfer};

fn repo(id: &str) -> Repo {
    Repo::with_revision(id.to_owned(), RepoType::Model, REVISION.to_owned())
}

fn repo_dir(cache: &Cache, id: &str) -> PathBuf {
    cache.path().join(repo(id).folder_name())
}

/// Where the bytes of an etag are or will be.
pub(super) fn blob_path(cache: &Cache, id: &str, etag: &str) -> PathBuf {
    cache.repo(repo(id)).blob_path(etag)
}

/// A file of the current snapshot, or of any other one.
pub(super) fn find(cache: &Cache, id: &str, file_name: &str) -> Option<PathBuf> {
    cache.repo(repo(id)).get(file_name).or_else(|| {
        snapshots(cache, id).into_iter().map(|dir| dir.join(file_name)).find(|path| path.is_file())
    })
}

/// The snapshots of a repository, the current one first.
pub(super) fn snapshots(cache: &Cache, id: &str) -> Vec<PathBuf> {
    let dir = repo_dir(cache, id);
    let current = fs::read_to_string(dir.join("refs").join(REVISION)).unwrap_or_default();
    let entries = fs::read_dir(dir.join("snapshots")).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> =
        entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    paths.sort_by_key(|path| {
        let is_current = path.file_name().is_some_and(|name| name == current.trim());
        (!is_current, path.clone())
    });
    paths
}

/// Keeps others from fetching the same bytes until it is dropped.
pub(super) fn lock(
    cache: &Cache,
    id: &str,
    etag: &str,
    progress: &mut dyn Progress,
) -> Result<File, Reason> {
    let dir = cache.path().join(".locks").join(repo(id).folder_name());
    fs::create_dir_all(&dir).map_err(Reason::write(&dir))?;
    let path = dir.join(format!("{etag}.lock"));
    let file = File::create(&path).map_err(Reason::write(&path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            progress.note("another program is fetching this file, waiting for it");
            file.lock().map_err(Reason::write(&path))?;
        }
        // Some network file systems have no locks; the worst case is fetching twice.
        Err(TryLockError::Error(error)) => {
            tracing::debug!(%error, path = %path.display(), "no lock on the cache");
        }
    }
    Ok(file)
}

/// Makes a blob appear as a file of a commit, and the commit as the current one.
pub(super) fn link(
    cache: &Cache,
    file: RemoteFile<'_>,
    commit: &str,
    blob: &Path,
) -> Result<PathBuf, Reason> {
    let handle = cache.repo(repo(file.repo));
    let pointer = handle.pointer_path(commit).join(file.name);
    if !pointer.is_file() {
        let dir = pointer.parent().expect("a file in a snapshot has a directory");
        fs::create_dir_all(dir).map_err(Reason::write(dir))?;
        // A link that points nowhere is left over from a cleaned cache.
        match fs::remove_file(&pointer) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Reason::write(&pointer)(error));
            }
            _ => {}
        }
        // From snapshots/<commit>/<file> up to the repository, then down to the blob.
        let depth = 2 + file.name.matches('/').count();
        let mut target = std::iter::repeat_n("..", depth).collect::<PathBuf>();
        target.push("blobs");
        target.push(blob.file_name().expect("a blob has a name"));
        let linked = std::os::unix::fs::symlink(&target, &pointer);
        linked.or_else(|_| fs::rename(blob, &pointer)).map_err(Reason::write(&pointer))?;
    }
    handle.create_ref(commit).map_err(Reason::write(&repo_dir(cache, file.repo)))?;
    Ok(pointer)
}

/// Copies a file from elsewhere to its place.
pub(super) fn install(
    cache: &Cache,
    file: RemoteFile<'_>,
    revision: &str,
    source: &Path,
) -> Result<PathBuf, Reason> {
    let mut reader = File::open(source).map_err(Reason::read(source))?;
    let mut hasher = Sha256::new();
    io::copy(&mut reader, &mut hasher).map_err(Reason::read(source))?;
    let digest = transfer::hex(&hasher.finalize());
    if let Some(expected) = file.sha256
        && expected != digest
    {
        return Err(Reason::Digest { expected: expected.to_owned(), found: digest });
    }
    let blob = blob_path(cache, file.repo, &digest);
    let dir = blob.parent().expect("a blob has a directory");
    fs::create_dir_all(dir).map_err(Reason::write(dir))?;
    if !blob.is_file() {
        let partial = blob.with_extension("incomplete");
        fs::copy(source, &partial).map_err(Reason::write(&partial))?;
        fs::rename(&partial, &blob).map_err(Reason::write(&blob))?;
    }
    link(cache, file, revision, &blob)
}
