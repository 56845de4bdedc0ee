//! Low-rank terms beside a product: `y[t, c] += scale * sum_j b[c, j] * (sum_k a[j, k] * x[t, k])`
//! for some of the tokens and some of the columns (Hu et al. 2021, arXiv 2106.09685).
//!
//! On a card matrices and the inner product are `bf16`, the outer product is `f32`.
//!
//! Both products are those of [`super::matmul`], so a token's result is the same bits whatever other
//! tokens there are, with or without terms of their own.

use std::borrow::Cow;

use candle_core::quantized::GgmlDType;
use candle_core::{Result, bail};

use super::add_scaled::{Place, add_scaled};
use super::gather_rows::gather_rows;
use super::indices::Indices;
use super::matmul::{MatrixSource, Stacking, Weights, matmul, matmul_f32};
use super::row_format::RowFormat;
use super::silu_mul::GateUpOrder;
use super::tensor::{Device, Tensor};

/// Columns of a card's matrices are multiples of it, and so is the rank of a term there.
const GPU_RANK: usize = 8;
/// The tallest panel or tile that a packed matrix is rounded up to.
const PANEL_ROWS: usize = 16;

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
    /// The column of the product that it begins at, counted as if all gates stood before all ups.
    pub first_column: usize,
}

impl LowRank {
    /// Packs terms, those of one shape side by side. Uses the current thread pool.
    ///
    /// # Errors
    /// If a matrix is not of floats or has not the bytes that its shape needs, or there is no memory.
    pub fn pack_each(sources: &[LowRankSource<'_>], device: &Device) -> Result<Vec<Self>> {
        let padded: Vec<_> =
            sources.iter().map(|source| Padded::new(source, device)).collect::<Result<_>>()?;
        let all_a = sources.iter().zip(&padded).map(|(source, padded)| {
            let rows = MatrixSource { data: &padded.a, num_rows: padded.rank, ..source.a };
            Matrix { rows, num_cols: source.num_inputs }
        });
        let all_b = sources.iter().zip(&padded).map(|(source, padded)| {
            let rows = MatrixSource { data: &padded.b, ..source.b };
            Matrix { rows, num_cols: padded.rank }
        });
        let mut all_a = pack_side_by_side(&all_a.chain(all_b).collect::<Vec<_>>(), device)?;
        let all_b = all_a.split_off(sources.len());
        let terms = sources.iter().zip(all_a).zip(all_b).map(|((source, a), b)| {
            let LowRankSource { scale, first_column, .. } = *source;
            Self { a, b, scale, first_column }
        });
        Ok(terms.collect())
    }

    /// Memory that it takes.
    pub fn num_bytes(&self) -> usize {
        self.a.num_bytes() + self.b.num_bytes()
    }

    /// Most memory that a term of a rank takes beside a projection of so many features.
    pub fn max_bytes(rank: usize, num_inputs: usize, num_columns: usize, device: &Device) -> u64 {
        let (rank, value_bytes) = match device {
            Device::Cpu => (rank, size_of::<f32>()),
            Device::Gpu(_) => (rank.next_multiple_of(GPU_RANK), size_of::<u16>()),
        };
        let a = rank.next_multiple_of(PANEL_ROWS) * num_inputs;
        let b = num_columns.next_multiple_of(PANEL_ROWS) * rank;
        ((a + b) * value_bytes) as u64
    }
}

/// The matrices of a term, of a rank that the device can have.
struct Padded<'a> {
    rank: usize,
    a: Cow<'a, [u8]>,
    b: Cow<'a, [u8]>,
}

impl<'a> Padded<'a> {
    /// Ranks that are added are rows and columns of zeros, which change no sum.
    fn new(source: &LowRankSource<'a>, device: &Device) -> Result<Self> {
        let LowRankSource { a, b, num_inputs, .. } = *source;
        if [a, b].iter().any(|rows| !is_float(rows.format)) {
            bail!("low-rank terms of {} and {} are not supported", a.format, b.format);
        }
        let rank = a.num_rows;
        let padded = match device {
            Device::Cpu => rank,
            Device::Gpu(_) => rank.next_multiple_of(GPU_RANK),
        };
        if padded == rank {
            return Ok(Self { rank, a: a.data.into(), b: b.data.into() });
        }
        let mut all_a = a.data.to_vec();
        all_a.resize(a.data.len() + (padded - rank) * a.format.row_bytes(num_inputs)?, 0);
        let (row_bytes, padded_bytes) = (b.format.row_bytes(rank)?, b.format.row_bytes(padded)?);
        if b.data.len() != b.num_rows * row_bytes {
            bail!("{} rows of {rank} values are not {} bytes", b.num_rows, b.data.len());
        }
        let mut all_b = vec![0; b.num_rows * padded_bytes];
        for (row, to) in b.data.chunks(row_bytes).zip(all_b.chunks_mut(padded_bytes)) {
            to[..row_bytes].copy_from_slice(row);
        }
        Ok(Self { rank: padded, a: all_a.into(), b: all_b.into() })
    }
}

fn is_float(format: RowFormat) -> bool {
    matches!(format.gguf(), Some(GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16))
}

/// Rows before they are packed.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    rows: MatrixSource<'a>,
    num_cols: usize,
}

impl Matrix<'_> {
    /// Matrices that agree in it can lie side by side.
    fn kind(&self) -> (RowFormat, usize, usize) {
        (self.rows.format, self.rows.num_rows, self.num_cols)
    }
}

/// Packs matrices, those of one kind in one piece of memory: an adapter has hundreds of them in few
/// kinds, and a system has too few mappings for one each.
fn pack_side_by_side(matrices: &[Matrix<'_>], device: &Device) -> Result<Vec<Weights>> {
    let mut packed: Vec<Option<Weights>> = vec![None; matrices.len()];
    while let Some(first) = packed.iter().position(Option::is_none) {
        let kind = matrices[first].kind();
        let alike: Vec<usize> =
            (first..matrices.len()).filter(|&index| matrices[index].kind() == kind).collect();
        let sources: Vec<_> = alike.iter().map(|&index| vec![matrices[index].rows]).collect();
        let weights = Weights::pack_each(&sources, kind.2, Stacking::Below, device)?;
        for (index, weights) in alike.into_iter().zip(weights) {
            packed[index] = Some(weights);
        }
    }
    Ok(packed.into_iter().flatten().collect())
}

/// Adds terms of `x` `[num_tokens, num_inputs]` to `y` `[num_tokens, num_columns]`, in place, for the
/// tokens in `rows`, which ascend. `order` is that of `y`'s columns, see [`Place::order`].
///
/// # Errors
/// If shapes or devices do not fit.
pub fn add_low_rank(
    (y, order): (&Tensor, GateUpOrder),
    x: &Tensor,
    rows: &Indices,
    terms: &[LowRank],
) -> Result<()> {
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
        let LowRank { a, b, scale, first_column } = term;
        let inner = matmul(x, a, None)?; // [rows.len(), rank]
        let outer = matmul_f32(&inner, b, None)?; // [rows.len(), term's columns]
        let place = Place { rows, first_column: *first_column, order, scale: *scale };
        add_scaled(y, &outer, place)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use half::bf16;

    use super::*;
    use crate::device::gpu::Gpu;
    use crate::ops::tensor::GpuTensor;

    fn values(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| (((i + 1) * (seed + 7919)) % 401) as f32 * 0.005 - 1.0).collect()
    }

    /// The matrices of a term, in `bf16`.
    fn matrices(rank: usize, (num_inputs, num_columns): (usize, usize)) -> [Vec<bf16>; 2] {
        let rounded = |values: Vec<f32>| values.into_iter().map(bf16::from_f32).collect();
        [values(rank * num_inputs, rank), values(num_columns * rank, 3)].map(rounded)
    }

    fn source(
        [a, b]: &[Vec<bf16>; 2],
        rank: usize,
        (num_inputs, num_columns): (usize, usize),
        first_column: usize,
    ) -> LowRankSource<'_> {
        let format = GgmlDType::BF16.into();
        LowRankSource {
            a: MatrixSource { format, data: bytemuck::cast_slice(a), num_rows: rank },
            b: MatrixSource { format, data: bytemuck::cast_slice(b), num_rows: num_columns },
            num_inputs,
            scale: 0.5,
            first_column,
        }
    }

    /// A term and its matrices in `f32`.
    fn term(
        device: &Device,
        rank: usize,
        shape: (usize, usize),
        first_column: usize,
    ) -> (LowRank, [Vec<f32>; 2]) {
        let matrices = matrices(rank, shape);
        let source = source(&matrices, rank, shape, first_column);
        let packed = LowRank::pack_each(&[source], device).unwrap().remove(0);
        (packed, matrices.map(|values| values.into_iter().map(bf16::to_f32).collect()))
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
            let shape = (num_inputs, num_columns);
            let (low_rank, [a, b]) = term(&Device::Cpu, rank, shape, first_column);
            let (x, before) = (values(num_tokens * num_inputs, 1), values(num_tokens * width, 2));
            let y = tensor(before.clone(), (num_tokens, width));
            let rows = Indices::from(rows);
            let x_tensor = tensor(x.clone(), (num_tokens, num_inputs));
            add_low_rank((&y, GateUpOrder::Halves), &x_tensor, &rows, &[low_rank]).unwrap();
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
        let (low_rank, _) = term(&Device::Cpu, 6, (num_inputs, width), 0);
        let (x, y) = (values(num_tokens * num_inputs, 1), values(num_tokens * width, 2));
        let run = |tokens: std::ops::Range<usize>, rows: Vec<u32>| {
            let count = tokens.len();
            let x = x[tokens.start * num_inputs..tokens.end * num_inputs].to_vec();
            let y = y[tokens.start * width..tokens.end * width].to_vec();
            let y = tensor(y, (count, width));
            let x = tensor(x, (count, num_inputs));
            let terms = std::slice::from_ref(&low_rank);
            add_low_rank((&y, GateUpOrder::Halves), &x, &rows.into(), terms).unwrap();
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
        let (low_rank, _) = term(&Device::Cpu, 2, (8, 4), 0);
        let terms = std::slice::from_ref(&low_rank);
        let (x, y) = (tensor(values(16, 1), (2, 8)), tensor(values(8, 1), (2, 4)));
        let add = |y: &Tensor, x: &Tensor, rows: Vec<u32>| {
            add_low_rank((y, GateUpOrder::Halves), x, &rows.into(), terms).is_ok()
        };
        assert!(add(&y, &x, vec![1]));
        assert!(!add(&y, &x, vec![2]), "a row that is not there");
        assert!(!add(&tensor(values(4, 1), (1, 4)), &x, vec![0]), "fewer results than tokens");
        assert!(!add(&tensor(values(6, 1), (2, 3)), &x, vec![0]), "too few columns");
        assert!(!add(&y, &tensor(values(18, 1), (2, 9)), vec![0]), "too many inputs");
    }

    /// Goal: packing terms together is packing each. Method: of several shapes and twice the same,
    /// each alone and all at once, on both devices.
    #[test]
    fn terms_packed_together_give_the_bits_of_each() {
        let shapes = [(3, (40, 24)), (8, (40, 24)), (3, (16, 40)), (3, (40, 24)), (16, (16, 8))];
        let all: Vec<_> = shapes.iter().map(|&(rank, shape)| matrices(rank, shape)).collect();
        let sources: Vec<_> = shapes
            .iter()
            .zip(&all)
            .map(|(&(rank, shape), matrices)| source(matrices, rank, shape, 0))
            .collect();
        for device in [Some(Device::Cpu), Gpu::for_tests().map(Device::Gpu)].into_iter().flatten() {
            let together = LowRank::pack_each(&sources, &device).unwrap();
            for (source, together) in sources.iter().zip(&together) {
                let alone = LowRank::pack_each(&[*source], &device).unwrap().remove(0);
                assert_eq!(alone.num_bytes(), together.num_bytes());
                let (rank, num_columns) = (source.a.num_rows, source.b.num_rows);
                let most = LowRank::max_bytes(rank, source.num_inputs, num_columns, &device);
                assert!(together.num_bytes() as u64 <= most);
                let run = |term: &LowRank| {
                    let x = activations(&device, values(5 * source.num_inputs, 1), 5);
                    let y = activations(&device, vec![0.25; 5 * num_columns], 5);
                    let rows = rows_on(&device, vec![0, 2, 3]);
                    let y_in_order = (&y, GateUpOrder::Halves);
                    add_low_rank(y_in_order, &x, &rows, std::slice::from_ref(term)).unwrap();
                    y.to_vec().unwrap()
                };
                assert_eq!(run(together), run(&alone));
            }
        }
    }

    /// Goal: an adapter of many layers takes few of a system's mappings. Method: count them.
    #[test]
    #[cfg(target_os = "linux")]
    fn hundreds_of_terms_take_few_mappings() {
        let count = || std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
        let (rank, shape) = (4, (32, 16));
        let matrices = matrices(rank, shape);
        let sources = vec![source(&matrices, rank, shape, 0); 300];
        let before = count();
        let together = LowRank::pack_each(&sources, &Device::Cpu).unwrap();
        let of_all = count() - before;
        let alone: Vec<_> = sources
            .iter()
            .map(|source| LowRank::pack_each(&[*source], &Device::Cpu).unwrap())
            .collect();
        let of_each = count() - before - of_all;
        // Other tests of this process may have mapped something.
        assert!(of_all < 60 && 300 <= of_each, "{of_all} mappings, {of_each} one by one");
        drop((together, alone));
    }

    /// Rows as a card has them in its memory, or the processor.
    fn rows_on(device: &Device, rows: Vec<u32>) -> Indices {
        let mut rows = Indices::from(rows);
        if let Device::Gpu(gpu) = device {
            rows.upload_to(gpu.alloc(4 * rows.len()).unwrap()).unwrap();
        }
        rows
    }

    /// Activations of the type that a device has.
    fn activations(device: &Device, values: Vec<f32>, num_rows: usize) -> Tensor {
        let shape = (num_rows, values.len() / num_rows);
        match device {
            Device::Cpu => tensor(values, shape),
            Device::Gpu(gpu) => {
                Tensor::Gpu(GpuTensor::from_slice(gpu, &values, DType::BF16, shape).unwrap())
            }
        }
    }

    /// Goal: a card computes the formula, also of ranks that it has to pad. Method: `f64` loops over
    /// what it has rounded to `bf16`; the inner product is rounded once more.
    #[test]
    fn a_card_adds_the_same_terms() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let device = Device::Gpu(gpu.clone());
        let (num_tokens, num_inputs, width) = (21, 72, 96);
        for (rank, order, first_column, rows) in [
            (1, GateUpOrder::Halves, 40, vec![0, 7]),
            (8, GateUpOrder::ByEight, 0, vec![3]),
            (13, GateUpOrder::ByEight, 48, (0..21).collect()),
            (64, GateUpOrder::Halves, 48, (2..20).collect()),
        ] {
            let (low_rank, [a, b]) = term(&device, rank, (num_inputs, 48), first_column);
            let x = activations(&device, values(num_tokens * num_inputs, 1), num_tokens);
            let before = values(num_tokens * width, 2);
            let shape = (num_tokens, width);
            let y = GpuTensor::from_slice(&gpu, &before, DType::F32, shape).unwrap();
            let y = Tensor::Gpu(y);
            let rows = rows_on(&device, rows);
            add_low_rank((&y, order), &x, &rows, std::slice::from_ref(&low_rank)).unwrap();
            let (x, found) = (x.to_vec().unwrap(), y.to_vec().unwrap());
            let mut expected: Vec<f64> = before.iter().map(|value| f64::from(*value)).collect();
            for &row in rows.iter() {
                let x = &x[row as usize * num_inputs..][..num_inputs];
                let dot = |a: &[f32]| -> f64 {
                    a.iter().zip(x).map(|(a, x)| f64::from(*a) * f64::from(*x)).sum()
                };
                let inner: Vec<f64> = a.chunks(num_inputs).map(dot).collect();
                for (c, b) in b.chunks(rank).enumerate() {
                    let sum: f64 =
                        inner.iter().zip(b).map(|(inner, b)| inner * f64::from(*b)).sum();
                    let column = match order {
                        GateUpOrder::Halves => first_column + c,
                        GateUpOrder::ByEight => c / 8 * 16 + c % 8 + first_column / 48 * 8,
                    };
                    expected[row as usize * width + column] += 0.5 * sum;
                }
            }
            let pairs = found.iter().zip(&expected);
            let worst =
                pairs.map(|(ours, theirs)| (f64::from(*ours) - theirs).abs()).fold(0.0, f64::max);
            assert!(worst < 0.02 * (rank as f64).sqrt(), "{rank} {order:?}: {worst}");
        }
    }

    /// Goal: on a card, too, nobody's terms depend on other rows that have them.
    #[test]
    fn a_cards_token_alone_and_in_company_is_the_same_bits() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let device = Device::Gpu(gpu);
        let (num_tokens, num_inputs, width) = (16, 200, 40);
        let (low_rank, _) = term(&device, 9, (num_inputs, width), 0);
        let (x, y) = (values(num_tokens * num_inputs, 1), values(num_tokens * width, 2));
        let run = |tokens: std::ops::Range<usize>, rows: Vec<u32>| {
            let x = x[tokens.start * num_inputs..tokens.end * num_inputs].to_vec();
            let y = y[tokens.start * width..tokens.end * width].to_vec();
            let (x, y) =
                (activations(&device, x, tokens.len()), activations(&device, y, tokens.len()));
            let terms = std::slice::from_ref(&low_rank);
            let rows = rows_on(&device, rows);
            add_low_rank((&y, GateUpOrder::Halves), &x, &rows, terms).unwrap();
            y.to_vec().unwrap()
        };
        let all = run(0..num_tokens, (0..num_tokens as u32).collect());
        let some = run(0..num_tokens, vec![1, 7, 15]);
        for token in 0..num_tokens {
            let alone = run(token..token + 1, vec![0]);
            assert_eq!(alone, all[token * width..][..width]);
            if [1, 7, 15].contains(&token) {
                assert_eq!(alone, some[token * width..][..width]);
            }
        }
    }
}
