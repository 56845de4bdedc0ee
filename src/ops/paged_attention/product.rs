//! Small matrix products whose sums have one order, whatever the shape of the rest.
#![expect(clippy::inline_always, reason = "inlining carries the enabled instructions inwards")]

use crate::ops::simd::{LANES, Simd};

/// The longest sum that a product adds at once.
pub(super) const MAX_DEPTH: usize = 64;
/// Columns of a product's right side: two vectors, so that loads do not limit the speed.
pub(super) const PANEL: usize = 2 * LANES;

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

impl<'a, E> Ahead<'a, E> {
    /// Takes the lines for a product of some depth.
    #[inline(always)]
    pub(super) fn split_off(&mut self, depth: usize) -> Ahead<'a, E> {
        let (now, later) = self.lines.split_at(depth.min(self.lines.len()));
        self.lines = later;
        Ahead { data: self.data, lines: now }
    }
}

/// `start + a * b`: each sum adds `a[i][k] * b[k][j]` in the order of `k`.
pub(super) struct Product<'a, E> {
    /// At most [`Simd::PRODUCT_ROWS`] rows; the first `b.len()` values of each count.
    pub(super) a: &'a [[f32; MAX_DEPTH]],
    /// At most [`MAX_DEPTH`] rows.
    pub(super) b: &'a [[f32; PANEL]],
    pub(super) start: Start<'a>,
    pub(super) ahead: Ahead<'a, E>,
}

impl<E> Product<'_, E> {
    /// Writes the result to `c`, a matrix of rows `stride` apart.
    #[inline(always)]
    pub(super) fn write<S: Simd>(&self, simd: S, c: &mut [f32], stride: usize) {
        match self.a.len() {
            1 => self.write_rows::<S, 1>(simd, c, stride),
            2 => self.write_rows::<S, 2>(simd, c, stride),
            3 => self.write_rows::<S, 3>(simd, c, stride),
            4 => self.write_rows::<S, 4>(simd, c, stride),
            5 => self.write_rows::<S, 5>(simd, c, stride),
            6 => self.write_rows::<S, 6>(simd, c, stride),
            7 => self.write_rows::<S, 7>(simd, c, stride),
            8 => self.write_rows::<S, 8>(simd, c, stride),
            num_rows => unreachable!("{num_rows} rows in a product"),
        }
    }

    #[inline(always)]
    fn write_rows<S: Simd, const ROWS: usize>(&self, simd: S, c: &mut [f32], stride: usize) {
        assert!(ROWS <= S::PRODUCT_ROWS, "{ROWS} rows in a product");
        let a = self.a.first_chunk::<ROWS>().expect("the caller matched the length");
        let mut sums = [[simd.splat(0.0); 2]; ROWS];
        if let Start::Scaled(factors) = self.start {
            for (i, sums) in sums.iter_mut().enumerate() {
                let (c, factor) = (&c[i * stride..][..PANEL], simd.splat(factors[i]));
                sums[0] = simd.mul(simd.load(c), factor);
                sums[1] = simd.mul(simd.load(&c[LANES..]), factor);
            }
        }
        for k in 0..self.b.len().min(MAX_DEPTH) {
            if let Some(line) = self.ahead.lines.get(k) {
                simd.prefetch(&self.ahead.data[*line..]);
            }
            let columns = [simd.load(&self.b[k]), simd.load(&self.b[k][LANES..])];
            for (sums, a) in sums.iter_mut().zip(a) {
                let factor = simd.splat(a[k]);
                sums[0] = simd.mul_add(factor, columns[0], sums[0]);
                sums[1] = simd.mul_add(factor, columns[1], sums[1]);
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            let c = &mut c[i * stride..][..PANEL];
            simd.store(c, sums[0]);
            simd.store(&mut c[LANES..], sums[1]);
        }
    }
}
