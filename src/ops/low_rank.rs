//! Low-rank terms beside a product: `y[t, c] += scale * sum_j b[c, j] * (sum_k a[j, k] * x[t, k])`
//! for some of the tokens and some of the columns (Hu et al. 2021, arXiv 2106.09685).
//!
//! Both products are those of [`super::matmul`], so a token's result is the same bits whatever other
//! tokens there are, with or without terms of their own.

use candle_core::Tensor as CpuTensor;
use candle_core::{CpuStorage, InplaceOp2, Layout, Result, bail};

use super::gather_rows::gather_rows;
use super::indices::Indices;
use super::matmul::{MatrixSource, Stacking, Weights, matmul};
use super::operand::contiguous;
use super::rows::for_each_row_mut;
use super::tensor::{Device, Tensor};

/// One term.
pub struct LowRank {
    /// `[rank, num_inputs]`
    a: Weights,
    /// `[num_columns, rank]`
    b: Weights,
    scale: f32,
    /// The column of the product that it begins at.
    first_column: usize,
}

/// What a term is made of.
#[derive(Clone, Copy)]
pub struct LowRankSource<'a> {
    /// `[rank, num_inputs]`
    pub a: MatrixSource<'a>,
    /// `[num_columns, rank]`
    pub b: MatrixSource<'a>,
    /// Columns of `a`.
    pub num_inputs: usize,
    /// What the term is multiplied with.
    pub scale: f32,
    /// The column of the product that it begins at.
    pub first_column: usize,
}

impl LowRank {
    /// Packs a term. Uses the current thread pool.
    ///
    /// # Errors
    /// If a matrix has not the bytes that its shape needs, there is no memory, or the device is a
    /// card.
    pub fn pack(source: &LowRankSource<'_>, device: &Device) -> Result<Self> {
        let LowRankSource { a, b, num_inputs, scale, first_column } = *source;
        if matches!(device, Device::Gpu(_)) {
            bail!("low-rank terms are computed on the CPU only");
        }
        Ok(Self {
            a: Weights::pack(&[a], num_inputs, Stacking::Below, device)?,
            b: Weights::pack(&[b], a.num_rows, Stacking::Below, device)?,
            scale,
            first_column,
        })
    }

    /// Memory that it takes.
    pub fn num_bytes(&self) -> usize {
        self.a.num_bytes() + self.b.num_bytes()
    }
}

/// Adds terms of `x` `[num_tokens, num_inputs]` to `y` `[num_tokens, num_columns]`, in place, for the
/// tokens in `rows`, which ascend.
///
/// # Errors
/// If shapes do not fit, or a tensor is not the processor's.
pub fn add_low_rank(y: &Tensor, x: &Tensor, rows: &Indices, terms: &[LowRank]) -> Result<()> {
    let (num_tokens, _) = x.dims2()?;
    if y.dims2()?.0 != num_tokens {
        bail!("{num_tokens} tokens, but results for {}", y.dims2()?.0);
    }
    let some;
    let x = if rows.len() == num_tokens {
        x
    } else {
        some = gather_rows(x, rows)?; // [rows.len(), num_inputs]
        &some
    };
    for term in terms {
        let inner = matmul(x, &term.a, None)?; // [rows.len(), rank]
        let outer = matmul(&inner, &term.b, None)?; // [rows.len(), term's columns]
        add_scaled(y.cpu()?, outer.cpu()?, rows, term)?;
    }
    Ok(())
}

fn add_scaled(y: &CpuTensor, outer: &CpuTensor, rows: &[u32], term: &LowRank) -> Result<()> {
    let LowRank { scale, first_column, .. } = *term;
    y.inplace_op2(outer, &AddScaled { rows, scale, first_column })
}

/// `y[rows[i], first_column + c] += scale * outer[i, c]`
struct AddScaled<'a> {
    rows: &'a [u32],
    scale: f32,
    first_column: usize,
}

impl InplaceOp2 for AddScaled<'_> {
    fn name(&self) -> &'static str {
        "add_scaled"
    }

    fn cpu_fwd(
        &self,
        y: &mut CpuStorage,
        y_layout: &Layout,
        outer: &CpuStorage,
        outer_layout: &Layout,
    ) -> Result<()> {
        let (num_tokens, width) = y_layout.shape().dims2()?;
        let (num_rows, num_columns) = outer_layout.shape().dims2()?;
        let columns = self.first_column..self.first_column + num_columns;
        let is_inside = self.rows.last().is_none_or(|last| (*last as usize) < num_tokens);
        if num_rows != self.rows.len() || !is_inside || width < columns.end {
            bail!("columns {columns:?} of {num_rows} rows of {num_tokens} x {width}");
        }
        let outer = contiguous::<f32>("outer", outer, outer_layout)?;
        let Some((start, end)) = y_layout.contiguous_offsets() else {
            bail!("y must be contiguous, has strides {:?}", y_layout.stride())
        };
        let CpuStorage::F32(y) = y else { bail!("products must be F32") };
        for_each_row_mut(&mut y[start..end], width, |token, row| {
            let Ok(index) = self.rows.binary_search(&(token as u32)) else { return };
            let added = &outer[index * num_columns..(index + 1) * num_columns];
            for (value, added) in row[columns.clone()].iter_mut().zip(added) {
                *value += self.scale * added;
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::GgmlDType;
    use half::bf16;

    use super::*;

    fn values(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| (((i + 1) * (seed + 7919)) % 401) as f32 * 0.005 - 1.0).collect()
    }

    /// A term in `bf16` and its matrices in `f32`.
    fn term(rank: usize, shape: (usize, usize), first_column: usize) -> (LowRank, [Vec<f32>; 2]) {
        let (num_inputs, num_columns) = shape;
        let rounded = |values: Vec<f32>| values.into_iter().map(bf16::from_f32).collect();
        let [a, b]: [Vec<bf16>; 2] =
            [values(rank * num_inputs, rank), values(num_columns * rank, 3)].map(rounded);
        let format = GgmlDType::BF16.into();
        let source = LowRankSource {
            a: MatrixSource { format, data: bytemuck::cast_slice(&a), num_rows: rank },
            b: MatrixSource { format, data: bytemuck::cast_slice(&b), num_rows: num_columns },
            num_inputs,
            scale: 0.5,
            first_column,
        };
        let packed = LowRank::pack(&source, &Device::Cpu).unwrap();
        (packed, [a, b].map(|values| values.into_iter().map(bf16::to_f32).collect()))
    }

    fn tensor(values: Vec<f32>, shape: (usize, usize)) -> Tensor {
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// Goal: the formula, in the given rows and columns and nowhere else. Method: `f64` loops over
    /// odd ranks and widths.
    #[test]
    fn terms_are_added_where_they_belong() {
        let (num_tokens, num_inputs, width) = (7, 40, 50);
        for (rank, num_columns, first_column, rows) in [
            (1, 50, 0, vec![0, 1, 2, 3, 4, 5, 6]),
            (3, 17, 20, vec![1, 5]),
            (8, 16, 34, vec![6]),
            (17, 33, 1, vec![0, 2, 3]),
            (8, 16, 0, vec![]),
        ] {
            let (low_rank, [a, b]) = term(rank, (num_inputs, num_columns), first_column);
            let (x, before) = (values(num_tokens * num_inputs, 1), values(num_tokens * width, 2));
            let y = tensor(before.clone(), (num_tokens, width));
            let rows = Indices::from(rows);
            let x_tensor = tensor(x.clone(), (num_tokens, num_inputs));
            add_low_rank(&y, &x_tensor, &rows, &[low_rank]).unwrap();
            for (i, found) in y.to_vec().unwrap().into_iter().enumerate() {
                let (token, column) = (i / width, i % width);
                let is_touched = rows.contains(&(token as u32))
                    && (first_column..first_column + num_columns).contains(&column);
                if !is_touched {
                    assert_eq!(found, before[i], "{token} {column}");
                    continue;
                }
                let x = &x[token * num_inputs..][..num_inputs];
                let dot = |row: &[f32]| -> f64 {
                    row.iter().zip(x).map(|(a, x)| f64::from(*a) * f64::from(*x)).sum()
                };
                let inner = a.chunks(num_inputs).map(dot);
                let b = &b[(column - first_column) * rank..][..rank];
                let sum: f64 = inner.zip(b).map(|(inner, b)| inner * f64::from(*b)).sum();
                let expected = f64::from(before[i]) + 0.5 * sum;
                assert!((f64::from(found) - expected).abs() < 1e-4, "{found}, not {expected}");
            }
        }
    }

    #[test]
    fn a_token_alone_and_in_company_is_the_same_bits() {
        let (num_tokens, num_inputs, width) = (29, 48, 37);
        let (low_rank, _) = term(6, (num_inputs, width), 0);
        let (x, y) = (values(num_tokens * num_inputs, 1), values(num_tokens * width, 2));
        let run = |tokens: std::ops::Range<usize>, rows: Vec<u32>| {
            let count = tokens.len();
            let x = x[tokens.start * num_inputs..tokens.end * num_inputs].to_vec();
            let y = y[tokens.start * width..tokens.end * width].to_vec();
            let y = tensor(y, (count, width));
            let x = tensor(x, (count, num_inputs));
            add_low_rank(&y, &x, &rows.into(), std::slice::from_ref(&low_rank)).unwrap();
            y.to_vec().unwrap()
        };
        let all = run(0..num_tokens, (0..num_tokens as u32).collect());
        let some = run(0..num_tokens, vec![3, 4, 20]);
        for token in 0..num_tokens {
            let alone = run(token..token + 1, vec![0]);
            assert_eq!(alone, all[token * width..][..width]);
            if [3, 4, 20].contains(&token) {
                assert_eq!(alone, some[token * width..][..width]);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let (low_rank, _) = term(2, (8, 4), 0);
        let terms = std::slice::from_ref(&low_rank);
        let (x, y) = (tensor(values(16, 1), (2, 8)), tensor(values(8, 1), (2, 4)));
        let add = |y: &Tensor, x: &Tensor, rows: Vec<u32>| {
            add_low_rank(y, x, &rows.into(), terms).is_ok()
        };
        assert!(add(&y, &x, vec![1]));
        assert!(!add(&y, &x, vec![2]), "a row that is not there");
        assert!(!add(&tensor(values(4, 1), (1, 4)), &x, vec![0]), "fewer results than tokens");
        assert!(!add(&tensor(values(6, 1), (2, 3)), &x, vec![0]), "too few columns");
        assert!(!add(&y, &tensor(values(18, 1), (2, 9)), vec![0]), "too many inputs");
    }
}
