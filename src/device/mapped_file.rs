//! A file seen as memory.
//!
//! This is the one place that maps files. A mapping costs no memory of its own: the kernel loads
//! pages when they are read and may drop them again, because the file still holds them.
//!
//! **Invariant:** the bytes are only ever read. Whoever shortens a file while it is mapped makes
//! reads of the lost part fail with a signal; model files are replaced by renaming, never
//! rewritten in place, so this does not happen by itself.

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::Path;

use memmap2::{Mmap, UncheckedAdvice};

/// The bytes of a file, mapped read-only.
#[derive(Debug)]
pub struct MappedFile {
    mapping: Mmap,
}

impl MappedFile {
    /// Maps a whole regular file.
    pub fn open(path: &Path) -> io::Result<Self> {
        // Asked first, because opening a pipe would wait for its other end.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
        }
        let file = File::open(path)?;
        // SAFETY: the mapping is private and read-only; the module's invariant says why nobody
        // changes the file under it.
        let mapping = unsafe { Mmap::map(&file)? };
        Ok(Self { mapping })
    }

    /// Lets the kernel take back the memory of all pages; reading them again loads them again.
    pub fn release_pages(&self) {
        self.release_range(0..self.mapping.len());
    }

    /// The same for the pages of a range of bytes. Best effort: a refusal changes nothing.
    pub fn release_range(&self, range: Range<usize>) {
        let end = range.end.min(self.mapping.len());
        let len = end.saturating_sub(range.start);
        if len == 0 {
            return;
        }
        // SAFETY: the mapping is file-backed and never written, so a dropped page comes back with
        // the same content.
        let released = unsafe {
            self.mapping.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, len)
        };
        if let Err(error) = released {
            tracing::debug!(%error, "the kernel kept the pages of a mapped file");
        }
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.mapping
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.mapping
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes are those of the file, before and after its pages were released.
    #[test]
    fn released_pages_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bytes");
        let bytes: Vec<u8> = (0..100_000_u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let file = MappedFile::open(&path).unwrap();
        assert_eq!(&file[..], &bytes[..]);
        file.release_pages();
        file.release_range(5_000..70_001);
        file.release_range(99_000..usize::MAX);
        assert_eq!(&file[..], &bytes[..]);
    }

    /// An empty file is an empty slice, a directory an error.
    #[test]
    fn empty_files_and_directories() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("empty");
        std::fs::write(&path, b"").unwrap();
        let file = MappedFile::open(&path).unwrap();
        assert!(file.is_empty());
        file.release_pages();
        assert!(MappedFile::open(directory.path()).is_err());
    }
}
