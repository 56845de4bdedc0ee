//! Puts a bundle's files into a directory: all of them, or none.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Advance, BundleError, Unpacked, unpack};

/// Unpacks a bundle into a directory that does not exist yet, or is empty. The files are written
/// and checked beside it, and get there in one step at the end.
///
/// # Errors
/// If the directory cannot be used or the bundle is not whole; nothing is left then.
pub fn install(
    archive: &mut impl Read,
    directory: &Path,
    advance: Advance<'_>,
) -> Result<Unpacked, BundleError> {
    let directory = usable(directory)?;
    let mut staging = directory.clone().into_os_string();
    staging.push(".partial");
    let staging = PathBuf::from(staging);
    fs::create_dir(&staging).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => BundleError::Leftover(staging.clone()),
        _ => BundleError::io("make", &staging)(error),
    })?;
    let result = unpack(archive, Some(&staging), advance).and_then(|unpacked| {
        move_into_place(&staging, &directory).map_err(BundleError::io("make", &directory))?;
        Ok(unpacked)
    });
    if result.is_err() {
        // Best effort: what is left is named as incomplete.
        let _ = fs::remove_dir_all(&staging);
    }
    result
}

/// The directory's own path, if it can be replaced by another one.
fn usable(directory: &Path) -> Result<PathBuf, BundleError> {
    let cannot_read = || BundleError::io("read", directory);
    let not_usable = |problem| BundleError::Directory { path: directory.to_path_buf(), problem };
    let path = match directory.canonicalize() {
        Ok(path) => path,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return new_path(directory);
        }
        Err(error) => return Err(cannot_read()(error)),
    };
    if fs::read_dir(&path).map_err(cannot_read())?.next().is_some() {
        return Err(BundleError::NotEmpty(directory.to_path_buf()));
    }
    let Some(parent) = path.parent() else {
        return Err(not_usable("is the root of the file system"));
    };
    // A rename does not lead from one file system to another.
    if device(&path).map_err(cannot_read())? != device(parent).map_err(cannot_read())? {
        return Err(not_usable("is a mount point"));
    }
    if Path::new(".").canonicalize().is_ok_and(|current| current == path) {
        return Err(not_usable("is the current directory"));
    }
    Ok(path)
}

/// The path of a directory that does not exist, but whose parent does.
fn new_path(directory: &Path) -> Result<PathBuf, BundleError> {
    let parent = directory.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    let name = directory.file_name().ok_or_else(|| BundleError::Directory {
        path: directory.to_path_buf(),
        problem: "is no name of a directory",
    })?;
    let parent = parent.canonicalize().map_err(BundleError::io("find the directory", parent))?;
    Ok(parent.join(name))
}

fn device(path: &Path) -> io::Result<u64> {
    Ok(fs::metadata(path)?.dev())
}

fn move_into_place(staging: &Path, directory: &Path) -> io::Result<()> {
    if let Ok(replaced) = fs::metadata(directory) {
        fs::set_permissions(staging, replaced.permissions())?;
    }
    sync_directories(staging)?;
    fs::rename(staging, directory)?;
    // What is in place stays there: that this is not yet on the disk is no reason to take it back.
    let _ = directory.parent().map(|parent| File::open(parent).and_then(|file| file.sync_all()));
    Ok(())
}

fn sync_directories(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_directories(&entry.path())?;
        }
    }
    File::open(directory)?.sync_all()
}
