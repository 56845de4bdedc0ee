//! The bytes of a matrix, wherever they come from.

use std::borrow::Cow;

use candle_core::Result;

use crate::ops::random_rows::random_rows;
use crate::weights::checkpoint::{Content, StoredMatrix};

/// The file's rows, or random ones where the checkpoint is a dummy.
pub(super) fn rows(matrix: &StoredMatrix) -> Result<Cow<'_, [u8]>> {
    match matrix.content {
        Content::Stored => Ok(Cow::Borrowed(matrix.bytes.as_ref())),
        Content::Random { seed } | Content::RandomInPlace { seed } => {
            let shape = (matrix.num_rows, matrix.num_cols);
            random_rows(matrix.dtype, shape, seed).map(Cow::Owned)
        }
    }
}
