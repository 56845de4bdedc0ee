//! Small matrix products whose sums have one order, whatever the shape of the rest.
#![expect(clippy::inline_always, reason = "inlining carries the enabled instructions inwards")]

use crate::ops::simd::{LANES, Simd};

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

/// `c[i][j] = start + sum of a[i][k] * b[k][j]` over `k` from 0 to `a`'s row length, in this order.
#[inline(always)]
pub(super) fn accumulate_rows<S: Simd>(
    simd: S,
    a: Rows<'_>,
    b: Rows<'_>,
    c: &mut RowsMut<'_>,
    start: Start<'_>,
) {
    match c.num_rows {
        1 => accumulate_columns::<S, 1>(simd, a, b, c, start),
        2 => accumulate_columns::<S, 2>(simd, a, b, c, start),
        3 => accumulate_columns::<S, 3>(simd, a, b, c, start),
        4 => accumulate_columns::<S, 4>(simd, a, b, c, start),
        5 => accumulate_columns::<S, 5>(simd, a, b, c, start),
        6 => accumulate_columns::<S, 6>(simd, a, b, c, start),
        7 => accumulate_columns::<S, 7>(simd, a, b, c, start),
        8 => accumulate_columns::<S, 8>(simd, a, b, c, start),
        num_rows => unreachable!("{num_rows} rows in a block"),
    }
}

#[inline(always)]
fn accumulate_columns<S: Simd, const ROWS: usize>(
    simd: S,
    a: Rows<'_>,
    b: Rows<'_>,
    c: &mut RowsMut<'_>,
    start: Start<'_>,
) {
    assert!(ROWS <= S::PRODUCT_ROWS, "{ROWS} rows in a block");
    let a: [&[f32]; ROWS] = std::array::from_fn(|i| &a.data[i * a.stride..][..a.len]);
    let mut column = 0;
    while column < c.num_columns {
        let place = Place { column, stride: c.stride, start };
        if S::PRODUCT_VECTORS == 2 && column + 2 * LANES <= c.num_columns {
            accumulate::<S, ROWS, 2>(simd, &a, b, c.data, place);
            column += 2 * LANES;
        } else {
            accumulate::<S, ROWS, 1>(simd, &a, b, c.data, place);
            column += LANES;
        }
    }
}

/// Where in the result a block lies.
#[derive(Clone, Copy)]
struct Place<'a> {
    column: usize,
    stride: usize,
    start: Start<'a>,
}

#[inline(always)]
fn accumulate<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    a: &[&[f32]; ROWS],
    b: Rows<'_>,
    c: &mut [f32],
    place: Place<'_>,
) {
    let mut sums = [[simd.splat(0.0); VECTORS]; ROWS];
    if let Start::Scaled(factors) = place.start {
        for (i, sums) in sums.iter_mut().enumerate() {
            let factor = simd.splat(factors[i]);
            for (j, sum) in sums.iter_mut().enumerate() {
                let before = simd.load(&c[i * place.stride + place.column + j * LANES..]);
                *sum = simd.mul(before, factor);
            }
        }
    }
    for k in 0..a[0].len() {
        let b = &b.data[k * b.stride + place.column..][..VECTORS * LANES];
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
            simd.store(&mut c[i * place.stride + place.column + j * LANES..], *sum);
        }
    }
}
