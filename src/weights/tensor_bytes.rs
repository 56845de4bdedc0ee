//! The bytes of a tensor, for whoever keeps using them from the mapping.

use std::ops::Range;
use std::sync::Arc;

use crate::device::MappedFile;

/// Bytes in a mapped file, which stays mapped as long as they are held.
#[derive(Clone, Debug)]
pub struct TensorBytes {
    file: Arc<MappedFile>,
    range: Range<usize>,
}

impl TensorBytes {
    /// A range that lies in the file.
    pub(super) fn mapped(file: Arc<MappedFile>, range: Range<usize>) -> Self {
        Self { file, range }
    }

    /// Part `index` of as many equal ones.
    #[must_use]
    pub fn part(&self, index: usize, count: usize) -> Self {
        let len = self.range.len() / count;
        let start = self.range.start + index * len;
        Self { file: Arc::clone(&self.file), range: start..start + len }
    }

    /// Gives back the memory of their pages, as soon as they have been copied elsewhere; reading on
    /// is possible, from the disk.
    pub fn release(&self) {
        self.file.release_range(self.range.clone());
    }
}

impl AsRef<[u8]> for TensorBytes {
    fn as_ref(&self) -> &[u8] {
        &self.file[self.range.clone()]
    }
}
