//! How positions beyond the trained ones are made usable, as users write it.

use std::fmt;
use std::str::FromStr;

use serde_json::{Map, Value};

/// What `--rope-scaling` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum RopeScalingChoice {
    /// What the model's file says.
    #[default]
    Auto,
    /// Positions as trained.
    None,
    /// YaRN as the file or else the catalogue has it.
    Yarn,
    /// YaRN with these parameters.
    YarnWith(Yarn),
}

/// Parameters of YaRN (arXiv 2309.00071), as in Hugging Face's `config.json`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// How many times longer contexts get.
    pub factor: f64,
    /// Positions the model was trained on; `None` for those of the model.
    pub original: Option<usize>,
    /// Frequencies that turn at least this often over the trained positions are kept.
    pub beta_fast: Option<f64>,
    /// Frequencies that turn at most this often are divided by `factor`.
    pub beta_slow: Option<f64>,
    /// What queries and keys are multiplied by.
    pub attention_factor: Option<f64>,
}

const EXPECTED: &str = "expected `auto`, `none`, `yarn`, `yarn:factor=4,original=32768`, or the JSON \
                        of `rope_scaling` in a config.json";

impl Yarn {
    fn new(factor: f64) -> Self {
        Self { factor, original: None, beta_fast: None, beta_slow: None, attention_factor: None }
    }

    fn set(&mut self, key: &str, value: f64) -> Result<(), String> {
        let is_positive = 0.0 < value && value.is_finite();
        let is_whole = value.fract() == 0.0 && value <= f64::from(u32::MAX);
        match key {
            _ if !is_positive => return Err(format!("`{key}` must be a positive number")),
            "factor" => self.factor = value,
            "original" | "original_max_position_embeddings" if is_whole => {
                self.original = Some(value as usize);
            }
            "original" | "original_max_position_embeddings" => {
                return Err(format!("`{key}` must be a whole number"));
            }
            "beta_fast" => self.beta_fast = Some(value),
            "beta_slow" => self.beta_slow = Some(value),
            "attention_factor" => self.attention_factor = Some(value),
            _ => return Err(format!("`{key}` is not supported")),
        }
        Ok(())
    }

    fn checked(self) -> Result<Self, String> {
        if self.factor < 1.0 {
            return Err("`factor` must be given, and at least 1".to_owned());
        }
        Ok(self)
    }
}

impl RopeScalingChoice {
    /// Reads `rope_scaling` of a `config.json`: `rope_type`, or `type` as it was called before, and
    /// the parameters beside it; `None` if positions are as trained.
    ///
    /// # Errors
    /// If the type or a parameter is unknown, in a sentence that names it.
    pub fn from_json(scaling: &Map<String, Value>) -> Result<Option<Yarn>, String> {
        let kind = scaling.get("rope_type").or_else(|| scaling.get("type"));
        match kind.and_then(Value::as_str) {
            Some("default") => return Ok(None),
            Some("yarn") => {}
            Some(other) => return Err(format!("RoPE scaling of type `{other}` is not supported")),
            None => return Err("`rope_type` is missing".to_owned()),
        }
        let mut yarn = Yarn::new(0.0);
        for (key, value) in scaling {
            // The base stands here in newer files; it belongs to the model.
            if value.is_null() || ["rope_type", "type", "rope_theta"].contains(&key.as_str()) {
                continue;
            }
            yarn.set(key, value.as_f64().unwrap_or(f64::NAN))?;
        }
        yarn.checked().map(Some)
    }
}

impl FromStr for RopeScalingChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        match text {
            "auto" => return Ok(Self::Auto),
            "none" => return Ok(Self::None),
            "yarn" => return Ok(Self::Yarn),
            _ => {}
        }
        if text.starts_with('{') {
            let json = serde_json::from_str(text).map_err(|error| error.to_string())?;
            return Ok(Self::from_json(&json)?.map_or(Self::None, Self::YarnWith));
        }
        let parameters = text.strip_prefix("yarn:").ok_or(EXPECTED)?;
        let mut yarn = Yarn::new(0.0);
        for parameter in parameters.split(',') {
            let (key, value) = parameter.split_once('=').ok_or(EXPECTED)?;
            yarn.set(key.trim(), value.trim().parse().unwrap_or(f64::NAN))?;
        }
        yarn.checked().map(Self::YarnWith)
    }
}

impl fmt::Display for RopeScalingChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let yarn = match self {
            Self::Auto => return f.write_str("auto"),
            Self::None => return f.write_str("none"),
            Self::Yarn => return f.write_str("yarn"),
            Self::YarnWith(yarn) => yarn,
        };
        write!(f, "yarn:factor={}", yarn.factor)?;
        for (key, value) in [
            ("original", yarn.original.map(|original| original as f64)),
            ("beta_fast", yarn.beta_fast),
            ("beta_slow", yarn.beta_slow),
            ("attention_factor", yarn.attention_factor),
        ] {
            if let Some(value) = value {
                write!(f, ",{key}={value}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_write_yarn_means_the_same() {
        let expected =
            RopeScalingChoice::YarnWith(Yarn { original: Some(32_768), ..Yarn::new(4.0) });
        for text in [
            "yarn:factor=4,original=32768",
            " yarn: original=32768, factor=4.0",
            r#"{"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}"#,
            r#"{"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32768,
                "rope_theta": 1000000.0, "attention_factor": null}"#,
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        assert_eq!(expected.to_string(), "yarn:factor=4,original=32768");
    }

    #[test]
    fn what_is_displayed_is_read_back() {
        for text in ["auto", "none", "yarn", "yarn:factor=2,beta_fast=16,attention_factor=1.5"] {
            let choice: RopeScalingChoice = text.parse().unwrap();
            assert_eq!(choice.to_string(), text);
        }
        assert_eq!(r#"{"rope_type": "default"}"#.parse(), Ok(RopeScalingChoice::None));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, expected) in [
            ("linear", "expected `auto`"),
            ("yarn:4", "expected `auto`"),
            ("yarn:original=64", "`factor` must be given"),
            ("yarn:factor=0.5", "`factor` must be given, and at least 1"),
            ("yarn:factor=x", "`factor` must be a positive number"),
            ("yarn:factor=4,original=0.5", "`original` must be a whole number"),
            ("yarn:factor=4,mscale=1", "`mscale` is not supported"),
            (r#"{"type": "linear", "factor": 4}"#, "RoPE scaling of type `linear`"),
            (r#"{"factor": 4}"#, "`rope_type` is missing"),
            ("{", "EOF"),
        ] {
            let error = text.parse::<RopeScalingChoice>().unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
