//! Small matrix products whose sums have one order, whatever the shape of the rest.
#![expect(clippy::inline_always, reason = "inlining carries the enabled instructions inwards")]

use crate::ops::simd::{Element, LANES, Simd};

/// Rows of a matrix.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
    /// Length of the rows.
    pub(super) len: usize,
}

/// The part of a matrix to add to; a multiple of 16 columns.
pub(super) struct RowsMut<'a> {
    pub(super) data: &'a mut [f32],
    pub(super) stride: usize,
    /// At most [`Simd::PRODUCT_ROWS`].
    pub(super) num_rows: usize,
    pub(super) num_columns: usize,
}

/// What sums start from.
#[derive(Clone, Copy)]
pub(super) enum Start<'a> {
    Zero,
    /// What is in the place, times a factor per row.
    Scaled(&'a [f32]),
}

/// Cache lines to fetch during a product, one per step, for what comes after it.
#[derive(Clone, Copy)]
pub(super) struct Ahead<'a, E> {
    pub(super) data: &'a [E],
    /// Where in `data` the lines start.
    pub(super) lines: &'a [usize],
}

/// `start + a * b`: each sum runs over `a`'s columns in order.
#[derive(Clone, Copy)]
pub(super) struct Product<'a, E> {
    pub(super) a: Rows<'a>,
    pub(super) b: Rows<'a>,
    pub(super) start: Start<'a>,
    pub(super) ahead: Ahead<'a, E>,
}

/// Computes the product into `c`.
#[inline(always)]
pub(super) fn multiply<S: Simd, E: Element>(
    simd: S,
    product: &Product<'_, E>,
    c: &mut RowsMut<'_>,
) {
    match c.num_rows {
        1 => multiply_rows::<S, E, 1>(simd, product, c),
        2 => multiply_rows::<S, E, 2>(simd, product, c),
        3 => multiply_rows::<S, E, 3>(simd, product, c),
        4 => multiply_rows::<S, E, 4>(simd, product, c),
        5 => multiply_rows::<S, E, 5>(simd, product, c),
        6 => multiply_rows::<S, E, 6>(simd, product, c),
        7 => multiply_rows::<S, E, 7>(simd, product, c),
        8 => multiply_rows::<S, E, 8>(simd, product, c),
        num_rows => unreachable!("{num_rows} rows in a block"),
    }
}

#[inline(always)]
fn multiply_rows<S: Simd, E: Element, const ROWS: usize>(
    simd: S,
    product: &Product<'_, E>,
    c: &mut RowsMut<'_>,
) {
    assert!(ROWS <= S::PRODUCT_ROWS, "{ROWS} rows in a block");
    let a = product.a;
    let a: [&[f32]; ROWS] = std::array::from_fn(|i| &a.data[i * a.stride..][..a.len]);
    let mut product = *product;
    let mut column = 0;
    while column < c.num_columns {
        if S::PRODUCT_VECTORS == 2 && column + 2 * LANES <= c.num_columns {
            multiply_block::<S, E, ROWS, 2>(simd, &a, &product, c, column);
            column += 2 * LANES;
        } else {
            multiply_block::<S, E, ROWS, 1>(simd, &a, &product, c, column);
            column += LANES;
        }
        let lines = product.ahead.lines;
        product.ahead.lines = &lines[product.a.len.min(lines.len())..];
    }
}

#[inline(always)]
fn multiply_block<S: Simd, E: Element, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    a: &[&[f32]; ROWS],
    product: &Product<'_, E>,
    c: &mut RowsMut<'_>,
    first_column: usize,
) {
    let Product { b, ahead, start, .. } = *product;
    let mut sums = [[simd.splat(0.0); VECTORS]; ROWS];
    if let Start::Scaled(factors) = start {
        for (i, sums) in sums.iter_mut().enumerate() {
            let factor = simd.splat(factors[i]);
            for (j, sum) in sums.iter_mut().enumerate() {
                let before = simd.load(&c.data[i * c.stride + first_column + j * LANES..]);
                *sum = simd.mul(before, factor);
            }
        }
    }
    for k in 0..a[0].len() {
        if let Some(line) = ahead.lines.get(k) {
            simd.prefetch(&ahead.data[*line..]);
        }
        let b = &b.data[k * b.stride + first_column..][..VECTORS * LANES];
        let mut columns = [simd.splat(0.0); VECTORS];
        for (j, column) in columns.iter_mut().enumerate() {
            *column = simd.load(&b[j * LANES..]);
        }
        for (sums, a) in sums.iter_mut().zip(a) {
            let factor = simd.splat(a[k]);
            for (sum, column) in sums.iter_mut().zip(&columns) {
                *sum = simd.mul_add(factor, *column, *sum);
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        for (j, sum) in sums.iter().enumerate() {
            simd.store(&mut c.data[i * c.stride + first_column + j * LANES..], *sum);
        }
    }
}
