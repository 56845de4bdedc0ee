//! The rows of a matrix, whatever they are made of.

use std::borrow::Cow;

use candle_core::Result;

use crate::ops::fp8_weights::{Fp8Source, fp8_rows, half_rows};
use crate::ops::grouped_weights::{GroupedSource, WordOrder, grouped_rows};
use crate::ops::quantize_rows::quantize_rows;
use crate::ops::random_rows::random_rows;
use crate::weights::checkpoint::{Content, StoredMatrix};
use crate::weights::scheme::{Fp8Scales, GroupedWeights, Packing};

/// The rows of a matrix in the format that [`StoredMatrix::row_format`] says: those of the file as
/// they are, or made of what is there instead. Uses the current thread pool.
///
/// # Errors
/// If the parts of a quantised matrix do not fit together, or a weight is not finite.
pub fn rows(matrix: &StoredMatrix) -> Result<Cow<'_, [u8]>> {
    let shape = (matrix.num_rows, matrix.num_cols);
    if let Some(fp8) = matrix.kept_fp8() {
        return fp8_rows(&fp8_source(fp8, shape, matrix.bytes.as_ref())).map(Cow::Owned);
    }
    let stored = gguf_rows(matrix)?;
    match matrix.quantize_to {
        None => Ok(stored),
        Some(to) => quantize_rows(matrix.dtype, &stored, shape, to).map(Cow::Owned),
    }
}

/// The rows of a matrix in its [`StoredMatrix::dtype`], before it is quantised. Uses the current
/// thread pool.
///
/// # Errors
/// As [`rows`].
pub fn gguf_rows(matrix: &StoredMatrix) -> Result<Cow<'_, [u8]>> {
    let shape = (matrix.num_rows, matrix.num_cols);
    let bytes = matrix.bytes.as_ref();
    match &matrix.content {
        Content::Stored => Ok(Cow::Borrowed(bytes)),
        Content::Random { seed } | Content::RandomInPlace { seed } => {
            random_rows(matrix.dtype.into(), shape, *seed).map(Cow::Owned)
        }
        Content::Grouped(grouped) => {
            grouped_rows(&grouped_source(grouped, shape, bytes), matrix.dtype).map(Cow::Owned)
        }
        Content::Unsorted(grouped) => {
            let mut sorted = grouped_rows(&grouped_source(grouped, shape, bytes), matrix.dtype)?;
            if let Some(order) = &grouped.order {
                put_back(&mut sorted, order);
            }
            Ok(Cow::Owned(sorted))
        }
        Content::Fp8(fp8) => half_rows(&fp8_source(fp8, shape, bytes)).map(Cow::Owned),
    }
}

/// Puts the values of rows, of 16 bits each, where `order` says that they belong.
fn put_back(rows: &mut [u8], order: &[u32]) {
    let (values, _) = rows.as_chunks_mut::<2>();
    let mut row = vec![[0; 2]; order.len()];
    for sorted in values.chunks_exact_mut(order.len()) {
        for (&column, value) in order.iter().zip(&*sorted) {
            row[column as usize] = *value;
        }
        sorted.copy_from_slice(&row);
    }
}

fn fp8_source<'a>(fp8: &'a Fp8Scales, shape: (usize, usize), bytes: &'a [u8]) -> Fp8Source<'a> {
    Fp8Source { bytes, shape, block: fp8.block, scales: &fp8.scales }
}

fn grouped_source<'a>(
    grouped: &'a GroupedWeights,
    shape: (usize, usize),
    words: &'a [u8],
) -> GroupedSource<'a> {
    GroupedSource {
        shape,
        bits: grouped.bits,
        words,
        word_order: match grouped.packing {
            Packing::Columns => WordOrder::Columns,
            Packing::Rows(order) => WordOrder::Rows(order),
        },
        group_size: grouped.group_size,
        zeros: &grouped.zeros,
        scales: &grouped.scales,
        column_order: grouped.order.as_deref(),
    }
}
