//! Some of the rows of a matrix: `out[i] = x[rows[i]]`.

use candle_core::{Result, bail};

use super::indices::Indices;
use super::tensor::Tensor;

/// Copies rows of `x` `[num_tokens, num_cols]` into `[rows.len(), num_cols]`.
///
/// # Errors
/// If there is no such row.
pub fn gather_rows(x: &Tensor, rows: &Indices) -> Result<Tensor> {
    let (num_tokens, _) = x.dims2()?;
    if let Some(row) = rows.iter().find(|row| num_tokens <= **row as usize) {
        bail!("row {row} of {num_tokens}");
    }
    match x {
        Tensor::Cpu(x) => {
            let rows = candle_core::Tensor::new(rows.as_slice(), x.device())?;
            x.index_select(&rows, 0).map(Tensor::Cpu)
        }
        Tensor::Gpu(_) => bail!("gather_rows has no kernel"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    #[test]
    fn rows_come_in_the_order_of_their_indices() {
        let x = Tensor::from_vec((0..6).map(|i| i as f32).collect(), (3, 2), &Device::Cpu).unwrap();
        let found = gather_rows(&x, &vec![2, 0, 2].into()).unwrap();
        assert_eq!(found.to_vec().unwrap(), [4.0, 5.0, 0.0, 1.0, 4.0, 5.0]);
        assert_eq!(gather_rows(&x, &Indices::default()).unwrap().dims2().unwrap(), (0, 2));
        assert!(gather_rows(&x, &vec![3].into()).is_err());
    }
}
