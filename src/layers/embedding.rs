//! Token embedding: rows of a table, decoded one by one from the file's own encoding.

use std::borrow::Cow;

use candle_core::Result;

use super::content::gguf_rows;
use crate::ops::embedding::{EmbeddingTable, embedding};
use crate::ops::indices::Indices;
use crate::ops::tensor::{Device, Tensor};
use crate::weights::checkpoint::Checkpoint;

/// The token embedding.
pub struct Embedding {
    table: EmbeddingTable,
    num_bytes: usize,
}

impl Embedding {
    /// Loads `<name>.weight`; the rows stay in the mapped file.
    pub fn load(
        checkpoint: &Checkpoint,
        name: &str,
        vocab_size: usize,
        hidden_size: usize,
        device: &Device,
    ) -> anyhow::Result<Self> {
        let name = format!("{name}.weight");
        let matrix = checkpoint.matrix(&name, vocab_size, hidden_size)?.unsorted();
        let shape = (vocab_size, hidden_size);
        // Not quantised: rows that stay in the file take no memory, so there is nothing to save.
        let rows = gguf_rows(&matrix)?;
        let num_bytes = rows.len();
        let table = match rows {
            Cow::Borrowed(_) => EmbeddingTable::new(matrix.bytes, matrix.dtype, shape)?,
            Cow::Owned(rows) => EmbeddingTable::new(rows, matrix.dtype, shape)?,
        };
        Ok(Self { table: table.to_device(device)?, num_bytes })
    }

    /// `[num_tokens]` ids to `[num_tokens, hidden_size]`.
    pub fn forward(&self, ids: &Indices) -> Result<Tensor> {
        embedding(&self.table, ids)
    }

    /// Memory that the table takes.
    pub fn num_bytes(&self) -> usize {
        self.num_bytes
    }
}
