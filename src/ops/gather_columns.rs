//! The columns of a matrix in another order: `out[t, i] = x[t, columns[i]]`.

use candle_core::{Result, bail};

use super::tensor::Tensor;

/// Copies the columns of `x` `[num_tokens, num_cols]` into `[num_tokens, columns.len()]`.
///
/// # Errors
/// If there is no such column, or `x` is on a card.
pub fn gather_columns(x: &Tensor, columns: &[u32]) -> Result<Tensor> {
    match x {
        Tensor::Cpu(x) => {
            let columns = candle_core::Tensor::new(columns, x.device())?;
            x.index_select(&columns, 1).map(Tensor::Cpu)
        }
        Tensor::Gpu(_) => bail!("reordered columns are not supported on the GPU"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    #[test]
    fn columns_come_in_the_order_of_their_indices() {
        let x = Tensor::from_vec((0..6).map(|i| i as f32).collect(), (2, 3), &Device::Cpu).unwrap();
        let found = gather_columns(&x, &[2, 0, 1]).unwrap();
        assert_eq!(found.to_vec().unwrap(), [2.0, 0.0, 1.0, 5.0, 3.0, 4.0]);
        assert!(gather_columns(&x, &[3]).is_err());
    }
}
