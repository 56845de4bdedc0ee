//! `adapter_config.json`.

use std::path::Path;

use serde_json::Value;

use super::MERGE;
use crate::weights::gguf::shown;
use crate::weights::repository::{JsonFile, Problem, RepositoryError};

/// Ranks above this are not meant seriously.
const MAX_RANK: usize = 1 << 16;

/// Fields that would change the numbers if they were set, and what they ask for.
const REFUSED: [(&str, &str); 13] = [
    ("use_dora", "DoRA"),
    ("modules_to_save", "modules that were trained as a whole"),
    ("fan_in_fan_out", "transposed weights"),
    ("layer_replication", "layers used several times"),
    ("lora_bias", "biases of its own"),
    ("use_qalora", "QALoRA"),
    ("use_bdlora", "blocks on the diagonal (BD-LoRA)"),
    ("kasa_config", "KaSA"),
    ("monteclora_config", "MonteCLoRA"),
    ("trainable_token_indices", "tokens that were trained"),
    ("target_parameters", "parameters that are no modules"),
    ("alora_invocation_tokens", "activation by tokens (aLoRA)"),
    ("arrow_config", "a choice among adapters (Arrow)"),
];

/// Ways to begin a training that leave the model's own weights as they are. Others, such as `pissa`,
/// take out of them what they put into the adapter.
const HARMLESS_BEGINNINGS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// What an adapter's configuration says, apart from what was refused.
#[derive(Clone, Debug)]
pub struct LoraConfig {
    file: JsonFile,
    rank: usize,
    alpha: f64,
    /// Whether terms are scaled by the root of the rank (rsLoRA, arXiv 2312.03732).
    is_rank_stabilized: bool,
    ranks: Vec<(String, f64)>,
    alphas: Vec<(String, f64)>,
    /// `None` where the tensors alone say which modules are adapted.
    targets: Option<Vec<String>>,
    /// Layers that are adapted, if not all.
    layers: Option<Vec<usize>>,
}

impl LoraConfig {
    /// Reads the file.
    ///
    /// # Errors
    /// If it is no configuration of LoRA, or asks for what is not supported.
    pub(super) fn open(path: &Path) -> Result<Self, RepositoryError> {
        let file = JsonFile::open_small(path)?;
        let refuse = |text: String| Err(RepositoryError::new(path, Problem::Setting(text)));
        let kind = file.str("peft_type")?;
        if kind != "LORA" {
            return refuse(format!("`peft_type` is `{}`, only `LORA` is supported", shown(kind)));
        }
        let bias = file.optional_str("bias")?.unwrap_or("none");
        if bias != "none" {
            let bias = shown(bias);
            return refuse(format!("`bias` is `{bias}`: biases are not supported; {MERGE}"));
        }
        for (key, meaning) in REFUSED {
            if is_set(&file.value()[key]) {
                return refuse(format!(
                    "`{key}` asks for {meaning}, which is not supported; {MERGE}"
                ));
            }
        }
        if let Some(beginning) = file.value()["init_lora_weights"].as_str()
            && !HARMLESS_BEGINNINGS.contains(&beginning)
        {
            let beginning = shown(beginning);
            return refuse(format!(
                "`init_lora_weights` is `{beginning}`, which changes the model's own weights; convert \
                 the adapter as PEFT describes it there, or {MERGE}"
            ));
        }
        let rank = file.size("r")?;
        let alpha = file.optional_f64("lora_alpha")?;
        let Some(alpha) = alpha.filter(|_| (1..=MAX_RANK).contains(&rank)) else {
            return refuse(format!("`r` must be from 1 to {MAX_RANK}, and `lora_alpha` a number"));
        };
        Ok(Self {
            rank,
            alpha,
            is_rank_stabilized: file.optional_bool("use_rslora")?.unwrap_or(false),
            ranks: pattern(&file, "rank_pattern")?,
            alphas: pattern(&file, "alpha_pattern")?,
            targets: targets(&file)?,
            layers: layers(&file)?,
            file,
        })
    }

    /// The rank of a module, and what its product is multiplied with.
    ///
    /// # Errors
    /// If patterns contradict each other, or the result is no number.
    pub(super) fn rank_and_scale(&self, module: &str) -> Result<(usize, f32), RepositoryError> {
        let rank = self.of_module("rank_pattern", &self.ranks, module)?;
        let rank = rank.unwrap_or(self.rank as f64);
        let is_rank = rank.fract() == 0.0 && (1.0..=MAX_RANK as f64).contains(&rank);
        if !is_rank {
            return Err(self.complaint(&format!("`rank_pattern` has {rank}, which is no rank")));
        }
        let alpha = self.of_module("alpha_pattern", &self.alphas, module)?.unwrap_or(self.alpha);
        let divisor = if self.is_rank_stabilized { rank.sqrt() } else { rank };
        let scale = (alpha / divisor) as f32;
        if !scale.is_finite() {
            return Err(self.complaint(&format!("`lora_alpha` {alpha:?} is too large")));
        }
        Ok((rank as usize, scale))
    }

    /// The one value of a pattern that fits a module, if any does.
    fn of_module(
        &self,
        key: &str,
        pattern: &[(String, f64)],
        module: &str,
    ) -> Result<Option<f64>, RepositoryError> {
        let mut fitting = pattern.iter().filter(|(name, _)| is_named(module, name));
        let Some((_, value)) = fitting.next() else { return Ok(None) };
        if fitting.any(|(_, other)| other != value) {
            let module = shown(module);
            return Err(self.complaint(&format!("`{key}` has several values for `{module}`")));
        }
        Ok(Some(*value))
    }

    /// Whether a module of a layer must have tensors; `None` where only the tensors say it.
    pub fn targets(&self, layer: usize, module: &str) -> Option<bool> {
        let targets = self.targets.as_ref()?;
        let is_in_layer = self.layers.as_ref().is_none_or(|layers| layers.contains(&layer));
        Some(is_in_layer && targets.iter().any(|target| is_named(module, target)))
    }

    /// An error about this file.
    pub fn complaint(&self, what: &str) -> RepositoryError {
        RepositoryError::new(self.file.path(), Problem::Setting(what.to_owned()))
    }
}

/// Whether a setting says anything.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(values) => !values.is_empty(),
        Value::Object(values) => !values.is_empty(),
        Value::String(text) => !text.is_empty(),
        Value::Bool(true) | Value::Number(_) => true,
    }
}

/// As PEFT compares: the whole name, or its last parts.
fn is_named(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// A map from modules to numbers. PEFT takes its keys for regular expressions; those that are not
/// just names are refused.
fn pattern(file: &JsonFile, key: &str) -> Result<Vec<(String, f64)>, RepositoryError> {
    let Some(object) = file.object(key)? else { return Ok(Vec::new()) };
    let entries = object.value().as_object().into_iter().flatten();
    let entry = |(name, value): (&String, &Value)| {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        if name.is_empty() || !name.chars().all(is_name) {
            let text = format!(
                "`{key}` has the key `{}`: regular expressions are not supported there, only names of \
                 modules",
                shown(name)
            );
            return Err(RepositoryError::new(file.path(), Problem::Setting(text)));
        }
        match value.as_f64() {
            Some(number) => Ok((name.clone(), number)),
            None => Err(file.complaint(&format!("has no number for `{}` in `{key}`", shown(name)))),
        }
    };
    entries.map(entry).collect()
}

/// The modules that are adapted, where they are a list and nothing is taken out of it.
fn targets(file: &JsonFile) -> Result<Option<Vec<String>>, RepositoryError> {
    let names = match &file.value()["target_modules"] {
        Value::Null | Value::String(_) => return Ok(None),
        Value::Array(names) => names,
        _ => return Err(file.complaint("has a `target_modules` that is neither list nor text")),
    };
    let mut targets = Vec::new();
    for name in names {
        let Some(name) = name.as_str() else {
            return Err(file.complaint("has something else than names in `target_modules`"));
        };
        if let Some(part) =
            ["lm_head", "embed_tokens"].into_iter().find(|part| is_named(name, part))
        {
            let text = format!(
                "`target_modules` has `{part}`: adapters of the embedding and of the output head are \
                 not supported; {MERGE}"
            );
            return Err(RepositoryError::new(file.path(), Problem::Setting(text)));
        }
        targets.push(name.to_owned());
    }
    Ok(Some(targets).filter(|_| !is_set(&file.value()["exclude_modules"])))
}

/// A layer, or a list of layers.
fn layers(file: &JsonFile) -> Result<Option<Vec<usize>>, RepositoryError> {
    let number = |value: &Value| value.as_u64().map(|number| number as usize);
    let layers = match &file.value()["layers_to_transform"] {
        Value::Null => return Ok(None),
        Value::Array(layers) => layers.iter().map(number).collect(),
        layer => number(layer).map(|layer| vec![layer]),
    };
    match layers {
        Some(layers) => Ok(Some(layers).filter(|layers| !layers.is_empty())),
        None => Err(file.complaint("has a `layers_to_transform` that is no list of layers")),
    }
}
