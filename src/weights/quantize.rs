//! What weights stored as floats become when they are quantised: as they are loaded, or into a GGUF
//! file.

use std::fmt;
use std::str::FromStr;

use candle_core::quantized::GgmlDType;

use super::gguf::dtype_name;
use crate::ops::row_format::RowFormat;

/// A type that floats can be quantised to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantization(RowFormat);

/// A name that means no such type.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{0}` is no type to quantise to; there are q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0 and fp8"
)]
pub struct UnknownQuantization(String);

impl Quantization {
    const ALL: [RowFormat; 11] = [
        RowFormat::Gguf(GgmlDType::Q2K),
        RowFormat::Gguf(GgmlDType::Q3K),
        RowFormat::Gguf(GgmlDType::Q4_0),
        RowFormat::Gguf(GgmlDType::Q4_1),
        RowFormat::Gguf(GgmlDType::Q4K),
        RowFormat::Gguf(GgmlDType::Q5_0),
        RowFormat::Gguf(GgmlDType::Q5_1),
        RowFormat::Gguf(GgmlDType::Q5K),
        RowFormat::Gguf(GgmlDType::Q6K),
        RowFormat::Gguf(GgmlDType::Q8_0),
        RowFormat::Fp8,
    ];

    /// The type for a parameter of a model with so many layers, by its Hugging Face name; `None`
    /// leaves it as it is.
    ///
    /// Projections get the type asked for, the output head and the embedding at least six bits,
    /// because every token goes through them. So do half of the projections that are the most
    /// sensitive, where the type has four or five: that is the mixture of the files called `Q4_K_M`
    /// and `Q5_K_M`. What is no projection, as the choice of experts, is small and stays exact.
    /// Rows that do not consist of blocks of 256 get the next larger type with blocks of 32. Of
    /// types with eight bits the integers are the closer ones: output head and embedding get those.
    pub fn target(self, name: &str, num_cols: usize, num_layers: usize) -> Option<RowFormat> {
        let module = name.strip_suffix(".weight")?;
        let of_projections = self.0.gguf();
        let is_mixture = matches!(of_projections, Some(GgmlDType::Q4K | GgmlDType::Q5K));
        let wanted = match (module.rsplit('.').next()?, of_projections) {
            ("lm_head" | "embed_tokens", None | Some(GgmlDType::Q8_0)) => GgmlDType::Q8_0,
            ("lm_head" | "embed_tokens", _) => GgmlDType::Q6K,
            ("v_proj" | "down_proj", _) if is_mixture && is_sensitive(module, num_layers) => {
                GgmlDType::Q6K
            }
            (last, _) if !last.ends_with("_proj") => return None,
            (_, None) => return Some(self.0),
            (_, Some(dtype)) => dtype,
        };
        let fits = |dtype: &GgmlDType| num_cols.is_multiple_of(dtype.block_size());
        let smaller_blocks = match wanted {
            GgmlDType::Q2K | GgmlDType::Q3K => GgmlDType::Q4_0,
            GgmlDType::Q4K => GgmlDType::Q5_0,
            GgmlDType::Q5K => GgmlDType::Q5_1,
            _ => GgmlDType::Q8_0,
        };
        [wanted, smaller_blocks].into_iter().find(fits).map(RowFormat::from)
    }

    /// The number that `general.file_type` has for files of this type, if there are any.
    pub fn file_type(self) -> Option<u32> {
        Some(match self.0.gguf()? {
            GgmlDType::Q4_0 => 2,
            GgmlDType::Q4_1 => 3,
            GgmlDType::Q5_0 => 8,
            GgmlDType::Q5_1 => 9,
            GgmlDType::Q2K => 10,
            GgmlDType::Q3K => 11,
            // Those of the mixtures.
            GgmlDType::Q4K => 15,
            GgmlDType::Q5K => 17,
            GgmlDType::Q6K => 18,
            _ => 7,
        })
    }
}

/// Whether a parameter is in one of the layers whose errors matter most: the first and the last
/// eighth, and a third of the others.
fn is_sensitive(module: &str, num_layers: usize) -> bool {
    let layer = module.split('.').find_map(|part| part.parse::<usize>().ok());
    let eighth = num_layers / 8;
    layer.is_some_and(|layer| {
        layer < eighth || 7 * num_layers / 8 <= layer || (layer - eighth) % 3 == 2
    })
}

/// The layers of a model, by the names of its parameters in either kind of files.
pub(super) fn num_layers<'a>(names: impl Iterator<Item = &'a str>) -> usize {
    let layer = |name: &str| name.split('.').find_map(|part| part.parse::<usize>().ok());
    names.filter_map(layer).max().map_or(0, |last| last.saturating_add(1))
}

impl FromStr for Quantization {
    type Err = UnknownQuantization;

    fn from_str(name: &str) -> Result<Self, UnknownQuantization> {
        // Other names of the same.
        let known = match name.to_ascii_lowercase().as_str() {
            "q4_k_m" => "q4_k".to_owned(),
            "q5_k_m" => "q5_k".to_owned(),
            "int8" => "q8_0".to_owned(),
            name => name.to_owned(),
        };
        let mut all = Self::ALL.into_iter().map(Self);
        let found = all.find(|quantization| quantization.to_string() == known);
        found.ok_or_else(|| UnknownQuantization(name.to_owned()))
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            RowFormat::Gguf(dtype) => formatter.write_str(&dtype_name(dtype).to_lowercase()),
            RowFormat::Fp8 => formatter.write_str("fp8"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_suit_what_a_matrix_is_for_and_how_wide_it_is() {
        let target = |quantization: &str, name: &str, num_cols| {
            quantization.parse::<Quantization>().unwrap().target(name, num_cols, 24)
        };
        let up = "model.layers.0.mlp.up_proj.weight";
        for (quantization, name, num_cols, expected) in [
            ("q4_k", up, 512, Some(GgmlDType::Q4K)),
            ("Q4_K", up, 896, Some(GgmlDType::Q5_0)),
            ("q5_k", up, 896, Some(GgmlDType::Q5_1)),
            ("q6_k", up, 896, Some(GgmlDType::Q8_0)),
            ("q2_k", up, 896, Some(GgmlDType::Q4_0)),
            ("q4_0", up, 896, Some(GgmlDType::Q4_0)),
            ("q8_0", up, 40, None),
            ("q4_0", "lm_head.weight", 512, Some(GgmlDType::Q6K)),
            ("q4_k", "lm_head.weight", 896, Some(GgmlDType::Q8_0)),
            ("q8_0", "model.embed_tokens.weight", 512, Some(GgmlDType::Q8_0)),
            ("q4_k", "model.layers.0.mlp.gate.weight", 512, None),
            ("q4_k", "model.norm.weight", 512, None),
            ("q4_k", "model.layers.2.mlp.down_proj.weight", 512, Some(GgmlDType::Q6K)),
            ("q4_k", "model.layers.3.mlp.down_proj.weight", 512, Some(GgmlDType::Q4K)),
            ("q5_k", "model.layers.5.self_attn.v_proj.weight", 512, Some(GgmlDType::Q6K)),
            ("q4_k", "model.layers.5.self_attn.v_proj.weight", 896, Some(GgmlDType::Q8_0)),
            ("q5_k", "model.layers.5.self_attn.k_proj.weight", 512, Some(GgmlDType::Q5K)),
            ("q4_k", "model.layers.21.mlp.experts.1.down_proj.weight", 512, Some(GgmlDType::Q6K)),
            ("q4_0", "model.layers.21.mlp.down_proj.weight", 512, Some(GgmlDType::Q4_0)),
            ("q4_k", "model.layers.0.self_attn.q_proj.bias", 512, None),
        ] {
            let expected = expected.map(RowFormat::from);
            assert_eq!(target(quantization, name, num_cols), expected, "{quantization} {name}");
        }
        assert_eq!(target("fp8", up, 40), Some(RowFormat::Fp8));
        assert_eq!(target("fp8", "lm_head.weight", 896), Some(GgmlDType::Q8_0.into()));
        assert_eq!(target("fp8", "model.layers.0.mlp.gate.weight", 512), None);
        for (name, same) in [("q4_k_m", "q4_k"), ("Q5_K_M", "q5_k"), ("int8", "q8_0")] {
            assert_eq!(name.parse::<Quantization>().unwrap(), same.parse().unwrap());
        }
        assert!("f16".parse::<Quantization>().is_err());
        assert!(Quantization::ALL.iter().all(|format| {
            let name = Quantization(*format).to_string();
            name.parse::<Quantization>().is_ok_and(|parsed| parsed.0 == *format)
                && UnknownQuantization(String::new()).to_string().contains(&name)
        }));
    }
}
