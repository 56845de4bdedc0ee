//! What weights stored as floats become when they are quantised: as they are loaded, or into a GGUF
//! file.

use std::fmt;
use std::str::FromStr;

use candle_core::quantized::GgmlDType;

use super::gguf::dtype_name;

/// A type that floats can be quantised to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantization(GgmlDType);

/// A name that means no such type.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{0}` is no type to quantise to; there are q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k and q8_0 (which is \
     as small as fp8 and closer to the floats)"
)]
pub struct UnknownQuantization(String);

impl Quantization {
    const ALL: [GgmlDType; 10] = [
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q4K,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
        GgmlDType::Q8_0,
    ];

    /// The type for a parameter of a model with so many layers, by its Hugging Face name; `None`
    /// leaves it as it is.
    ///
    /// Projections get the type asked for, the output head and the embedding at least six bits,
    /// because every token goes through them. So do half of the projections that are the most
    /// sensitive, where the type has four or five: that is the mixture of the files called `Q4_K_M`
    /// and `Q5_K_M`. What is no projection, as the choice of experts, is small and stays exact.
    /// Rows that do not consist of blocks of 256 get the next larger type with blocks of 32.
    pub fn target(self, name: &str, num_cols: usize, num_layers: usize) -> Option<GgmlDType> {
        let module = name.strip_suffix(".weight")?;
        let is_mixture = matches!(self.0, GgmlDType::Q4K | GgmlDType::Q5K);
        let wanted = match module.rsplit('.').next()? {
            "lm_head" | "embed_tokens" if self.0 == GgmlDType::Q8_0 => GgmlDType::Q8_0,
            "lm_head" | "embed_tokens" => GgmlDType::Q6K,
            "v_proj" | "down_proj" if is_mixture && is_sensitive(module, num_layers) => {
                GgmlDType::Q6K
            }
            last if last.ends_with("_proj") => self.0,
            _ => return None,
        };
        let fits = |dtype: &GgmlDType| num_cols.is_multiple_of(dtype.block_size());
        let smaller_blocks = match wanted {
            GgmlDType::Q2K | GgmlDType::Q3K => GgmlDType::Q4_0,
            GgmlDType::Q4K => GgmlDType::Q5_0,
            GgmlDType::Q5K => GgmlDType::Q5_1,
            _ => GgmlDType::Q8_0,
        };
        [wanted, smaller_blocks].into_iter().find(fits)
    }

    /// The number that `general.file_type` has for files of this type.
    pub fn file_type(self) -> u32 {
        match self.0 {
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
        }
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
        let mut all = Self::ALL.into_iter();
        let found = all.find(|dtype| dtype_name(*dtype).eq_ignore_ascii_case(&known));
        found.map(Self).ok_or_else(|| UnknownQuantization(name.to_owned()))
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&dtype_name(self.0).to_lowercase())
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
            assert_eq!(target(quantization, name, num_cols), expected, "{quantization} {name}");
        }
        for (name, same) in [("q4_k_m", "q4_k"), ("Q5_K_M", "q5_k"), ("int8", "q8_0")] {
            assert_eq!(name.parse::<Quantization>().unwrap(), same.parse().unwrap());
        }
        assert!("f16".parse::<Quantization>().is_err());
        assert!(Quantization::ALL.iter().all(|dtype| {
            let name = Quantization(*dtype).to_string();
            name.parse::<Quantization>().is_ok_and(|parsed| parsed.0 == *dtype)
                && UnknownQuantization(String::new()).to_string().contains(&name)
        }));
    }
}
