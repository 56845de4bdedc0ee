//! The text side in the JSON files of a repository.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{TextSide, sorted, usual_end_tokens};
use crate::chat::template::TemplateTokens;
use crate::sampling::params::{GenerationDefaults, SamplingOptions, SamplingParams};
use crate::text::{TokenId, Tokenizer};
use crate::weights::gguf::shown;
use crate::weights::repository::{JsonFile, Repository};

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

pub(super) fn read(repository: &Repository, vocab_size: usize) -> Result<TextSide> {
    let settings = repository.json(TOKENIZER_CONFIG)?;
    let settings = settings.as_ref();
    let tokenizer = tokenizer(repository, settings, vocab_size)?;
    let generation = repository.json("generation_config.json")?;
    let generation = generation.as_ref();
    let special = |key: &str| settings.and_then(|settings| token_text(&settings.value()[key]));
    Ok(TextSide {
        template: template(repository, settings)?,
        template_tokens: TemplateTokens {
            bos_token: special("bos_token"),
            eos_token: special("eos_token"),
        },
        eos_token_ids: eos_token_ids(repository, generation, &tokenizer)?,
        names: Vec::from_iter(
            repository.config().optional_str("_name_or_path")?.map(str::to_owned),
        ),
        generation: generation.map(|file| generation_defaults(file, vocab_size)).transpose()?,
        tokenizer,
    })
}

/// Ids up to the model's vocabulary exist, as padding of its matrices, even if the tokenizer has no
/// text for them.
fn tokenizer(
    repository: &Repository,
    settings: Option<&JsonFile>,
    vocab_size: usize,
) -> Result<Tokenizer> {
    let path = repository.directory().join(TOKENIZER);
    let bytes = repository.file(TOKENIZER)?;
    let bytes = bytes.with_context(|| format!("the file {} is missing", path.display()))?;
    let mut tokenizer = Tokenizer::from_json(&bytes)
        .with_context(|| format!("the tokenizer in {} is unusable", path.display()))?;
    ensure!(
        tokenizer.vocab_size() <= vocab_size,
        "{} has {} tokens, more than the model's {vocab_size}",
        path.display(),
        tokenizer.vocab_size()
    );
    tokenizer.pad_to(vocab_size);
    if let Some(settings) = settings {
        check_settings(settings, &tokenizer)?;
    }
    Ok(tokenizer)
}

/// Refuses settings that would make other tokens of a text than `tokenizer.json` does.
fn check_settings(settings: &JsonFile, tokenizer: &Tokenizer) -> Result<()> {
    for key in ["add_bos_token", "add_eos_token", "add_prefix_space"] {
        if settings.optional_bool(key)? == Some(true) {
            return Err(settings.unsupported(format!("`{key}`")).into());
        }
    }
    let added = settings.value()["added_tokens_decoder"].as_object().into_iter().flatten();
    for (id, token) in added {
        let content = token["content"].as_str().unwrap_or_default();
        let known = tokenizer.id_of(content).filter(|id| tokenizer.is_added(*id));
        if known.map(|id| id.to_string()).as_ref() != Some(id) {
            let what = format!("the added token `{}`, which {TOKENIZER} lacks,", shown(content));
            return Err(settings.unsupported(what).into());
        }
    }
    Ok(())
}

/// A file of its own goes before the settings' template; of several templates the default counts.
fn template(repository: &Repository, settings: Option<&JsonFile>) -> Result<Option<String>> {
    if let Some(bytes) = repository.file("chat_template.jinja")? {
        let text = String::from_utf8(bytes).context("chat_template.jinja is not UTF-8")?;
        return Ok(Some(text));
    }
    let Some(settings) = settings else { return Ok(None) };
    match &settings.value()["chat_template"] {
        Value::Null => Ok(None),
        Value::String(template) => Ok(Some(template.clone())),
        Value::Array(named) => {
            let default = named.iter().find(|named| named["name"] == "default");
            match default.and_then(|named| named["template"].as_str()) {
                Some(template) => Ok(Some(template.to_owned())),
                None => {
                    Err(settings.unsupported("a list of chat templates without `default`").into())
                }
            }
        }
        _ => Err(settings.complaint("has a `chat_template` that is no text").into()),
    }
}

/// A token is a text, or an object that describes one.
fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
}

/// `generation_config.json` goes before `config.json`; without either, the usual ones.
fn eos_token_ids(
    repository: &Repository,
    generation: Option<&JsonFile>,
    tokenizer: &Tokenizer,
) -> Result<Vec<TokenId>> {
    for file in generation.into_iter().chain([repository.config()]) {
        let value = &file.value()["eos_token_id"];
        let values = match value {
            Value::Null => continue,
            Value::Array(values) => values.as_slice(),
            value => std::slice::from_ref(value),
        };
        let id = |value: &Value| {
            let id = value.as_u64().filter(|id| *id < tokenizer.vocab_size() as u64);
            id.map(|id| id as TokenId)
        };
        let ids: Option<Vec<TokenId>> = values.iter().map(id).collect();
        match ids {
            Some(ids) if !ids.is_empty() => return Ok(sorted(ids)),
            _ => {
                let shown = shown(&value.to_string());
                let what = format!("has an `eos_token_id` that is no token of the model: {shown}");
                return Err(file.complaint(&what).into());
            }
        }
    }
    let usual = sorted(usual_end_tokens(tokenizer).collect());
    if usual.is_empty() {
        bail!("no file says which token ends a text (`eos_token_id` in generation_config.json)");
    }
    Ok(usual)
}

/// The defaults of requests, checked as if a request had asked for them.
fn generation_defaults(file: &JsonFile, vocab_size: usize) -> Result<GenerationDefaults> {
    let defaults = GenerationDefaults {
        temperature: file.optional_f64("temperature")?,
        top_p: file.optional_f64("top_p")?,
        top_k: file.optional_i64("top_k")?,
        min_p: file.optional_f64("min_p")?,
        repetition_penalty: file.optional_f64("repetition_penalty")?,
        ..GenerationDefaults::default()
    };
    match SamplingParams::validate(SamplingOptions::default(), &defaults, vocab_size) {
        Ok(_) => Ok(defaults),
        Err(error) => bail!("{}: {}", file.path().display(), error.message),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;
    use tempfile::TempDir;

    use super::*;
    use crate::text::SpecialTokens;

    const VOCAB_SIZE: usize = 290;

    /// A tiny repository with one of its JSON files changed.
    fn changed(file: &str, key: &str, value: &Value) -> TempDir {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny/hf-bf16");
        let directory = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(tiny).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, directory.path().join(path.file_name().unwrap())).unwrap();
        }
        let path = directory.path().join(file);
        if key.is_empty() {
            std::fs::remove_file(&path).unwrap();
        } else {
            let mut content: Value =
                serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            content[key] = value.clone();
            std::fs::write(&path, content.to_string()).unwrap();
        }
        directory
    }

    fn read_changed(file: &str, key: &str, value: &Value) -> Result<TextSide> {
        let directory = changed(file, key, value);
        read(&Repository::open(directory.path()).unwrap(), VOCAB_SIZE)
    }

    #[test]
    fn a_repository_says_how_to_read_and_write() {
        let text = read_changed("config.json", "x", &Value::Null).unwrap();
        // Ten merges behind the bytes, then the added tokens, in the order of their list.
        assert_eq!(text.eos_token_ids, [266, 268]);
        assert_eq!(text.template_tokens.eos_token.as_deref(), Some("<|im_end|>"));
        assert_eq!(text.template_tokens.bos_token, None);
        assert_eq!(text.names, ["tiny hf-bf16"]);
        assert!(text.template.unwrap().contains("add_generation_prompt"));
        let generation = text.generation.unwrap();
        assert_eq!((generation.temperature, generation.top_k), (Some(0.7), Some(20)));
        assert_eq!(generation.min_p, None);
        assert_eq!(text.tokenizer.vocab_size(), VOCAB_SIZE);
        let ids = text.tokenizer.encode("the rain<|im_end|>").unwrap();
        assert_eq!(text.tokenizer.decode(&ids, SpecialTokens::Skip), "the rain");
        assert_eq!(ids.last(), Some(&268));
    }

    #[test]
    fn what_is_not_said_has_a_default() {
        let eos = |file: &str, key: &str, value: Value| {
            read_changed(file, key, &value).unwrap().eos_token_ids
        };
        assert_eq!(eos("generation_config.json", "eos_token_id", json!(7)), [7]);
        assert_eq!(eos("generation_config.json", "eos_token_id", Value::Null), [266, 268]);
        let text = read_changed("generation_config.json", "", &Value::Null).unwrap();
        assert!(text.generation.is_none());
        let named =
            json!([{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]);
        let text = read_changed("tokenizer_config.json", "chat_template", &named).unwrap();
        assert_eq!(text.template.as_deref(), Some("D"));
        let text =
            read_changed("tokenizer_config.json", "eos_token", &json!({"content": "X"})).unwrap();
        assert_eq!(text.template_tokens.eos_token.as_deref(), Some("X"));
        let text = read_changed("tokenizer_config.json", "", &Value::Null).unwrap();
        assert_eq!((text.template, text.template_tokens.eos_token), (None, None));
    }

    #[test]
    fn what_cannot_be_followed_is_refused_by_name() {
        const CONFIG: &str = "tokenizer_config.json";
        const GENERATION: &str = "generation_config.json";
        for (file, key, value, part) in [
            (TOKENIZER, "", json!(0), "tokenizer.json is missing"),
            (TOKENIZER, "model", json!({"type": "WordPiece", "vocab": {}, "merges": []}), "BPE"),
            (TOKENIZER, "normalizer", json!({"type": "Lowercase"}), "a normalizer other than NFC"),
            (TOKENIZER, "decoder", json!({"type": "WordPiece"}), "a decoder other than ByteLevel"),
            (TOKENIZER, "post_processor", json!({"type": "TemplateProcessing"}), "post-processor"),
            (TOKENIZER, "pre_tokenizer", json!({"type": "Whitespace"}), "pre-tokenizer other than"),
            (CONFIG, "add_bos_token", json!(true), "`add_bos_token` is not supported"),
            (CONFIG, "added_tokens_decoder", json!({"289": {"content": "<|new|>"}}), "<|new|>"),
            (
                CONFIG,
                "chat_template",
                json!([{"name": "rag", "template": ""}]),
                "without `default`",
            ),
            (CONFIG, "chat_template", json!(3), "`chat_template` that is no text"),
            (GENERATION, "eos_token_id", json!([268, 290]), "no token of the model: [268,290]"),
            (GENERATION, "eos_token_id", json!([]), "no token of the model: []"),
            (GENERATION, "temperature", json!("hot"), "`temperature` is \"hot\""),
            (GENERATION, "temperature", json!(-1), "`temperature`"),
            (GENERATION, "top_p", json!(1.5), "`top_p`"),
        ] {
            let error = read_changed(file, key, &value).err();
            let message = format!("{:#}", error.unwrap_or_else(|| panic!("{part} is accepted")));
            assert!(message.contains(part) && !message.contains('\n'), "{part}: {message}");
        }
        let directory = changed("config.json", "x", &Value::Null);
        let repository = Repository::open(directory.path()).unwrap();
        let message = format!("{:#}", read(&repository, 287).err().unwrap());
        assert!(message.contains("288 tokens, more than the model's 287"), "{message}");
    }
}
