//! Terms added to some rows and columns of a product, in place:
//! `y[rows[i], column(c)] += scale * added[i, c]`.

use candle_core::Tensor as CpuTensor;
use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result, bail};

use super::grid::over_rows;
use super::indices::Indices;
use super::operand::contiguous;
use super::rows::for_each_row_mut;
use super::silu_mul::GateUpOrder;
use super::tensor::{GpuTensor, Tensor};
use crate::device::gpu::{Arg, Kernel};

/// Values that a thread adds, where rows are multiples of it.
const PACK: usize = 4;
/// Gates that stand together, and ups, see [`GateUpOrder::ByEight`].
const EIGHT: usize = 8;

/// Where terms belong, and how much of them.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The rows of the product, ascending.
    pub rows: &'a Indices,
    /// The first of its columns, counted as if all gates stood before all ups.
    pub first_column: usize,
    /// How its columns stand; any product that is not of gates and ups has them in
    /// [`GateUpOrder::Halves`].
    pub order: GateUpOrder,
    /// What the terms are multiplied with.
    pub scale: f32,
}

/// Adds `added` `[rows.len(), num_columns]`, `f32`, to `y` `[num_tokens, width]`, which on a card may be
/// `bf16`: then a sum is rounded once.
///
/// # Errors
/// If there are no such rows or columns.
pub fn add_scaled(y: &Tensor, added: &Tensor, place: Place<'_>) -> Result<()> {
    let (num_tokens, width) = y.dims2()?;
    let (num_rows, num_columns) = added.dims2()?;
    let columns = place.first_column..place.first_column + num_columns;
    let is_inside = place.rows.last().is_none_or(|last| (*last as usize) < num_tokens);
    if num_rows != place.rows.len() || !is_inside || width < columns.end {
        bail!("columns {columns:?} of {num_rows} rows of {num_tokens} x {width}");
    }
    match y {
        Tensor::Cpu(y) if place.order == GateUpOrder::Halves => add_on_cpu(y, added.cpu()?, place),
        Tensor::Cpu(_) => bail!("gates and ups come in halves on the CPU"),
        Tensor::Gpu(y) => add_on_gpu(y, added.gpu()?, place),
    }
}

fn add_on_cpu(y: &CpuTensor, added: &CpuTensor, place: Place<'_>) -> Result<()> {
    y.inplace_op2(added, &AddScaled(place))
}

struct AddScaled<'a>(Place<'a>);

impl InplaceOp2 for AddScaled<'_> {
    fn name(&self) -> &'static str {
        "add_scaled"
    }

    fn cpu_fwd(
        &self,
        y: &mut CpuStorage,
        y_layout: &Layout,
        added: &CpuStorage,
        added_layout: &Layout,
    ) -> Result<()> {
        let Place { rows, first_column, scale, .. } = self.0;
        let (_, width) = y_layout.shape().dims2()?;
        let (_, num_columns) = added_layout.shape().dims2()?;
        let added = contiguous::<f32>("terms", added, added_layout)?;
        let Some((start, end)) = y_layout.contiguous_offsets() else {
            bail!("y must be contiguous, has strides {:?}", y_layout.stride())
        };
        let CpuStorage::F32(y) = y else { bail!("products must be F32") };
        for_each_row_mut(&mut y[start..end], width, |token, row| {
            let Ok(index) = rows.binary_search(&(token as u32)) else { return };
            let added = &added[index * num_columns..(index + 1) * num_columns];
            for (value, added) in row[first_column..].iter_mut().zip(added) {
                *value += scale * added;
            }
        });
        Ok(())
    }
}

/// `kernels/low_rank/add_scaled.cu`
fn add_on_gpu(y: &GpuTensor, added: &GpuTensor, place: Place<'_>) -> Result<()> {
    let Place { rows, first_column, order, scale } = place;
    let (num_columns, half) = (added.num_cols, y.num_cols / 2);
    // Columns come in runs, each so many columns behind the one before it.
    let (first, run, stride) = match order {
        GateUpOrder::Halves => (first_column, num_columns, 0),
        GateUpOrder::ByEight => {
            let is_half = first_column.is_multiple_of(half.max(1)) && num_columns == half;
            if !is_half || !half.is_multiple_of(EIGHT) {
                bail!("{num_columns} columns from {first_column} on are neither gates nor ups");
            }
            (if first_column == 0 { 0 } else { EIGHT }, EIGHT, 2 * EIGHT)
        }
    };
    let is_packed = [num_columns, y.num_cols, first].iter().all(|n| n.is_multiple_of(PACK));
    let function = match (y.dtype, is_packed) {
        (DType::BF16, true) => "add_scaled_bf16_4",
        (DType::BF16, false) => "add_scaled_bf16_1",
        (DType::F32, true) => "add_scaled_f32_4",
        (DType::F32, false) => "add_scaled_f32_1",
        (dtype, _) => bail!("products of {dtype:?} are not supported on the GPU"),
    };
    if added.dtype != DType::F32 {
        bail!("terms are {:?}, not F32", added.dtype);
    }
    let int = |value: usize| Arg::I32(value as i32);
    let args = [
        Arg::Buffer(&y.buffer),
        Arg::Buffer(&added.buffer),
        Arg::Buffer(rows.on_gpu()?),
        int(rows.len()),
        int(num_columns),
        int(y.num_cols),
        int(first),
        int(run),
        int(stride),
        Arg::F32(scale),
    ];
    let threads_per_row = if is_packed { num_columns / PACK } else { num_columns };
    let kernel = Kernel { module: "add_scaled", function };
    y.gpu.launch(kernel, over_rows(rows.len(), threads_per_row), &args)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::device::Device;
    use crate::device::gpu::Gpu;

    const NUM_TOKENS: usize = 9;

    fn values(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| (((i + 1) * (seed + 7919)) % 401) as f32 * 0.005 - 1.0).collect()
    }

    /// The formula, one value at a time.
    fn expected(y: &[f32], added: &[f32], (width, place): (usize, Place<'_>)) -> Vec<f32> {
        let mut y = y.to_vec();
        let num_columns = added.len() / place.rows.len().max(1);
        for (i, row) in place.rows.iter().enumerate() {
            for c in 0..num_columns {
                let column = place.first_column + c;
                let (half, feature) = (column / (width / 2), column % (width / 2));
                let column = match place.order {
                    GateUpOrder::Halves => column,
                    GateUpOrder::ByEight => feature / 8 * 16 + half * 8 + feature % 8,
                };
                y[*row as usize * width + column] += place.scale * added[i * num_columns + c];
            }
        }
        y
    }

    /// Widths, numbers of columns, first columns and orders.
    const SHAPES: [(usize, usize, usize, GateUpOrder); 7] = [
        (50, 50, 0, GateUpOrder::Halves),
        (50, 17, 20, GateUpOrder::Halves),
        (1152, 128, 1024, GateUpOrder::Halves),
        (40, 20, 17, GateUpOrder::Halves),
        (48, 24, 0, GateUpOrder::ByEight),
        (48, 24, 24, GateUpOrder::ByEight),
        (9728, 4864, 4864, GateUpOrder::ByEight),
    ];

    fn some_rows() -> [Vec<u32>; 4] {
        [vec![], vec![8], vec![1, 4, 5], (0..NUM_TOKENS as u32).collect()]
    }

    #[test]
    fn terms_are_added_where_they_belong() {
        for (width, num_columns, first_column, order) in SHAPES {
            for rows in some_rows().map(Indices::from) {
                let place = Place { rows: &rows, first_column, order, scale: -0.75 };
                let (y, added) =
                    (values(NUM_TOKENS * width, 1), values(rows.len() * num_columns, 2));
                let tensor = |values: &[f32], shape| {
                    Tensor::from_vec(values.to_vec(), shape, &Device::Cpu).unwrap()
                };
                let found = tensor(&y, (NUM_TOKENS, width));
                let terms = tensor(&added, (rows.len(), num_columns));
                let result = add_scaled(&found, &terms, place);
                if order == GateUpOrder::ByEight {
                    assert!(result.is_err(), "the processor's products have no such order");
                    continue;
                }
                result.unwrap();
                assert_eq!(found.to_vec().unwrap(), expected(&y, &added, (width, place)));
            }
        }
    }

    /// Goal: a card adds the same, and touches nothing else. Method: the formula; in `f32` within the
    /// rounding of a fused product, in `bf16` within one more rounding of the sum.
    #[test]
    fn a_card_adds_the_same() {
        let Some(gpu) = Gpu::for_tests() else { return };
        for (width, num_columns, first_column, order) in SHAPES {
            for (mut rows, dtype) in some_rows()
                .map(Indices::from)
                .into_iter()
                .flat_map(|rows| [(rows.clone(), DType::F32), (rows, DType::BF16)])
            {
                rows.upload_to(gpu.alloc(4 * rows.len()).unwrap()).unwrap();
                let place = Place { rows: &rows, first_column, order, scale: -0.75 };
                let y = values(NUM_TOKENS * width, 1);
                let added = values(rows.len() * num_columns, 2);
                let found = GpuTensor::from_slice(&gpu, &y, dtype, (NUM_TOKENS, width)).unwrap();
                let y = found.to_vec().unwrap();
                let shape = (rows.len(), num_columns);
                let terms = GpuTensor::from_slice(&gpu, &added, DType::F32, shape).unwrap();
                add_scaled(&Tensor::Gpu(found.clone()), &Tensor::Gpu(terms), place).unwrap();
                let expected = expected(&y, &added, (width, place));
                for (i, found) in found.to_vec().unwrap().into_iter().enumerate() {
                    let (expected, before) = (expected[i], y[i]);
                    if expected.to_bits() == before.to_bits() {
                        assert_eq!(found.to_bits(), before.to_bits(), "{i} was not to be touched");
                        continue;
                    }
                    let rounded = match dtype {
                        DType::BF16 => bf16::from_f32(expected).to_f32(),
                        _ => expected,
                    };
                    let unit = if dtype == DType::BF16 { 0.0079 } else { 0.0 };
                    let limit = unit * expected.abs() + 2e-7;
                    assert!((found - rounded).abs() <= limit, "{i}: {found}, not {expected}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let tensor = |rows: usize, columns: usize| {
            Tensor::from_vec(vec![0.0; rows * columns], (rows, columns), &Device::Cpu).unwrap()
        };
        let add = |y: &Tensor, added: &Tensor, rows: &[u32], first_column| {
            let rows = Indices::from(rows.to_vec());
            let order = GateUpOrder::Halves;
            add_scaled(y, added, Place { rows: &rows, first_column, order, scale: 1.0 }).is_ok()
        };
        let y = tensor(2, 4);
        assert!(add(&y, &tensor(1, 3), &[1], 1));
        assert!(!add(&y, &tensor(1, 3), &[2], 1), "a row that is not there");
        assert!(!add(&y, &tensor(1, 3), &[1], 2), "too few columns");
        assert!(!add(&y, &tensor(2, 3), &[1], 1), "more terms than rows");
        let Some(gpu) = Gpu::for_tests() else { return };
        let on_card = |columns, dtype| {
            let values = vec![0.0; 2 * columns];
            Tensor::Gpu(GpuTensor::from_slice(&gpu, &values, dtype, (2, columns)).unwrap())
        };
        let mut rows = Indices::from(vec![0, 1]);
        rows.upload_to(gpu.alloc(8).unwrap()).unwrap();
        let (y, eight) = (on_card(32, DType::F32), on_card(16, DType::F32));
        let add = |added: &Tensor, first_column, order| {
            add_scaled(&y, added, Place { rows: &rows, first_column, order, scale: 1.0 }).is_ok()
        };
        assert!(add(&eight, 16, GateUpOrder::ByEight));
        assert!(!add(&eight, 8, GateUpOrder::ByEight), "half gates, half ups");
        assert!(!add(&on_card(8, DType::F32), 0, GateUpOrder::ByEight), "only some of the gates");
        assert!(!add(&on_card(16, DType::BF16), 0, GateUpOrder::Halves), "terms that were rounded");
    }
}
