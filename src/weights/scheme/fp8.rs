//! Floats of eight bits, four of exponent and three of mantissa, times a scale: of the matrix, of
//! each row, or of each block of rows and columns.
//!
//! Sources: the repositories that Qwen publishes (`weight_scale_inv`, blocks of 128 x 128) and
//! compressed-tensors' `float-quantized` format (`weight_scale`). Both scales multiply.
//!
//! Activations are computed in higher precision than these formats plan for, so what they say about
//! activations and their scales is not used.

use std::sync::Arc;

use candle_core::quantized::GgmlDType;

use super::{
    CheckpointError, Content, JsonFile, Repository, RepositoryError, StoredMatrix, TensorInfo,
    check_shape, floats,
};
use crate::ops::row_format::RowFormat;
use crate::weights::gguf::shown;

/// How weights of eight-bit floats are scaled.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::weights) struct Fp8 {
    /// Rows and columns of a block; `None` has a scale for the matrix or for each row.
    block: Option<(usize, usize)>,
}

/// The scales of a matrix.
#[derive(Clone, Debug)]
pub struct Fp8Scales {
    /// Rows and columns that share a scale.
    pub block: (usize, usize),
    /// `[blocks of rows][blocks of columns]`
    pub scales: Vec<f32>,
}

impl Fp8Scales {
    /// Whether products can be computed with the weights as they are.
    pub fn fit_rows(&self, num_cols: usize) -> bool {
        RowFormat::fits_fp8(self.block.1, num_cols)
    }
}

impl Fp8 {
    pub(super) fn fine_grained(settings: &JsonFile) -> Result<Self, RepositoryError> {
        if let Some(format) = settings.optional_str("fmt")?.filter(|format| *format != "e4m3") {
            return Err(settings.unsupported(format!("FP8 as `{}` (e4m3 is)", shown(format))));
        }
        Ok(Self { block: block(settings, "weight_block_size")? })
    }

    pub(super) fn compressed_tensors(settings: &JsonFile) -> Result<Self, RepositoryError> {
        let format = settings.optional_str("format")?.unwrap_or_default();
        let is_given = |key: &str| match &settings.value()[key] {
            serde_json::Value::Object(object) => !object.is_empty(),
            other => !other.is_null(),
        };
        let is_dense = settings.value()["sparsity_config"]["format"] == "dense";
        if is_given("transform_config") || is_given("sparsity_config") && !is_dense {
            return Err(settings.unsupported("compressed-tensors with transforms or sparsity"));
        }
        let groups = settings.object("config_groups")?;
        let names: Vec<String> = groups
            .iter()
            .filter_map(|groups| groups.value().as_object())
            .flat_map(|groups| groups.keys().cloned())
            .collect();
        let (Some(groups), [name], "float-quantized") = (&groups, &names[..], format) else {
            let format = shown(format);
            let what = format!("compressed-tensors of the format `{format}` (FP8 weights are)");
            return Err(settings.unsupported(what));
        };
        let group = groups.object(name)?;
        let weights = group.as_ref().map(|group| group.object("weights")).transpose()?.flatten();
        let Some(weights) = weights else { return Err(settings.complaint("quantises no weights")) };
        let strategy = weights.optional_str("strategy")?.unwrap_or_default();
        let is_fp8 = weights.optional_size("num_bits")? == Some(8)
            && weights.optional_str("type")? == Some("float")
            && weights.optional_bool("symmetric")? != Some(false)
            && ["tensor", "channel", "block"].contains(&strategy);
        if !is_fp8 {
            let strategy = shown(strategy);
            return Err(settings.unsupported(format!("FP8 with scales by `{strategy}`")));
        }
        Ok(Self { block: block(&weights, "block_structure")? })
    }

    pub(super) fn name(&self) -> String {
        match self.block {
            Some((rows, cols)) => format!("FP8 e4m3, blocks of {rows} x {cols}"),
            None => "FP8 e4m3".to_owned(),
        }
    }

    /// Bytes that the weights of a tensor take in memory.
    pub(super) fn num_bytes(&self, tensor: &TensorInfo) -> u64 {
        // Of a tensor without values a size may be anything.
        if tensor.num_values() == 0 {
            return 0;
        }
        let shape = &tensor.shape;
        let num_cols = shape.last().copied().unwrap_or(0);
        let num_rows: usize = shape.iter().rev().skip(1).product();
        let format = match self.block {
            // What is looked up, not multiplied, is kept as larger floats.
            _ if tensor.name.ends_with("embed_tokens.weight") => GgmlDType::F16.into(),
            Some((_, cols)) if !RowFormat::fits_fp8(cols, num_cols) => GgmlDType::F16.into(),
            _ => RowFormat::Fp8,
        };
        (num_rows * format.packed_bytes(num_cols).unwrap_or(0)) as u64
    }

    pub(super) fn matrix(
        &self,
        repository: &Repository,
        module: &str,
        (num_rows, num_cols): (usize, usize),
    ) -> Result<StoredMatrix, CheckpointError> {
        let (info, bytes) = repository.tensor(&format!("{module}.weight"))?;
        check_shape(info, &[num_rows, num_cols])?;
        let names = ["weight_scale_inv", "weight_scale"].map(|name| format!("{module}.{name}"));
        let name = names.iter().find(|name| repository.info(name).is_some()).unwrap_or(&names[1]);
        let (info, scales) = floats(repository, name)?;
        let blocks =
            |(rows, cols): (usize, usize)| [num_rows.div_ceil(rows), num_cols.div_ceil(cols)];
        let block = match self.block {
            Some(block) => {
                check_shape(&info, &blocks(block))?;
                block
            }
            None if scales.len() == 1 => (num_rows, num_cols),
            None if info.shape == [num_rows] => (1, num_cols),
            None => {
                check_shape(&info, &[num_rows, 1])?;
                (1, num_cols)
            }
        };
        Ok(StoredMatrix {
            dtype: GgmlDType::F16,
            quantize_to: None,
            num_rows,
            num_cols,
            bytes,
            content: Content::Fp8(Arc::new(Fp8Scales { block, scales })),
        })
    }
}

fn block(settings: &JsonFile, key: &str) -> Result<Option<(usize, usize)>, RepositoryError> {
    let value = &settings.value()[key];
    let size = |value: &serde_json::Value| {
        value.as_u64().filter(|size| (1..1 << 20).contains(size)).map(|size| size as usize)
    };
    match value.as_array().map(Vec::as_slice) {
        None if value.is_null() => Ok(None),
        Some([rows, cols]) if size(rows).is_some() && size(cols).is_some() => {
            Ok(size(rows).zip(size(cols)))
        }
        _ => Err(settings.unsupported(format!("`{key}` of {}", shown(&value.to_string())))),
    }
}
