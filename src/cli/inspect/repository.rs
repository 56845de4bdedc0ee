//! What the JSON files of a repository say.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;

use super::{Report, SpecialToken, TensorLine, TokenizerSummary};
use crate::weights::checkpoint::Checkpoint;
use crate::weights::gguf::printable;
use crate::weights::repository::{JsonFile, Repository, RepositoryError};
use crate::weights::safetensors::TensorInfo;

pub(super) fn report(
    checkpoint: &Checkpoint,
    repository: &Repository,
) -> Result<Report, RepositoryError> {
    let config = repository.config();
    let number = |key: &str| {
        Ok::<_, RepositoryError>(config.optional_size(key)?.map(|number| number as u32))
    };
    let map = config.value().as_object().cloned().unwrap_or_default();
    Ok(Report {
        files: repository.paths().map(PathBuf::from).collect(),
        format: "safetensors".to_owned(),
        architecture: config.str("model_type")?.to_owned(),
        name: config.optional_str("_name_or_path")?.map(str::to_owned),
        num_layers: number("num_hidden_layers")?,
        hidden_size: number("hidden_size")?,
        num_attention_heads: number("num_attention_heads")?,
        num_key_value_heads: number("num_key_value_heads")?,
        head_dim: number("head_dim")?,
        context_length: number("max_position_embeddings")?,
        tokenizer: tokenizer(repository)?,
        metadata_lines: map
            .iter()
            .map(|(key, value)| (key.clone(), printable(&value.to_string())))
            .collect(),
        metadata: map,
        tensors: repository.tensors().map(|tensor| line(checkpoint, tensor)).collect(),
        ..Report::default()
    })
}

fn line(checkpoint: &Checkpoint, tensor: &TensorInfo) -> TensorLine {
    TensorLine {
        name: tensor.name.clone(),
        dtype: tensor.dtype.name(),
        shape: tensor.shape.clone(),
        num_bytes: tensor.num_bytes(),
        num_parameters: checkpoint.num_parameters(tensor),
    }
}

fn tokenizer(repository: &Repository) -> Result<TokenizerSummary, RepositoryError> {
    let settings = repository.json("tokenizer_config.json")?;
    let template = settings.as_ref().map(|settings| &settings.value()["chat_template"]);
    let has_template = repository.file("chat_template.jinja")?.is_some()
        || template.is_some_and(|template| !template.is_null());
    let file = repository.json("tokenizer.json")?;
    let texts = file.as_ref().map(texts).unwrap_or_default();
    let kind = file.as_ref().and_then(|file| file.value()["model"]["type"].as_str());
    let generation = repository.json("generation_config.json")?;
    let mut special_tokens = BTreeMap::new();
    for name in ["bos", "eos", "pad"] {
        let files = generation.iter().chain([repository.config()]);
        let mut values = files.map(|file| &file.value()[&format!("{name}_token_id")]);
        let value = values.find(|value| !value.is_null()).unwrap_or(&Value::Null);
        let ids = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        for (number, id) in ids.iter().filter_map(Value::as_u64).enumerate() {
            let Ok(id) = u32::try_from(id) else { continue };
            let name = if number == 0 { name.to_owned() } else { format!("{name} {}", number + 1) };
            special_tokens.insert(name, SpecialToken { id, text: texts.get(&id).cloned() });
        }
    }
    Ok(TokenizerSummary {
        kind: kind.map(str::to_owned),
        pre_tokenizer: None,
        vocab_size: file.is_some().then_some(texts.len()),
        has_chat_template: has_template,
        special_tokens,
    })
}

/// The tokens of a `tokenizer.json` by their ids.
fn texts(file: &JsonFile) -> BTreeMap<u32, String> {
    let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
    let vocab = file.value()["model"]["vocab"].as_object().into_iter().flatten();
    let vocab = vocab.filter_map(|(text, value)| Some((id(value)?, text.clone())));
    let added = file.value()["added_tokens"].as_array().into_iter().flatten();
    let added =
        added.filter_map(|token| Some((id(&token["id"])?, token["content"].as_str()?.to_owned())));
    vocab.chain(added).collect()
}
