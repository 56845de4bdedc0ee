//! The text side of a model, out of its file's metadata.

use std::sync::Arc;

use anyhow::{Context, Result};

use crate::chat::fim::FimTokens;
use crate::chat::model::{Conventions, NamePattern, Reasoning, ServedModel};
use crate::chat::reasoning;
use crate::chat::template::{ChatTemplate, TemplateTokens};
use crate::chat::tool_call::{BareToolCalls, ToolCallFormat};
use crate::cli::Hinted;
use crate::config::{
    Alias, BareCalls, DASHSCOPE_NAMES, EmbeddingPooling, HostedNames, ModelConfig,
};
use crate::engine::request::Pooling;
use crate::grammar::GrammarCompiler;
use crate::sampling::params::GenerationDefaults;
use crate::text::{TokenId, Tokenizer, TokenizerSpec};
use crate::weights::catalogue::ToolCallFormat as CatalogueFormat;
use crate::weights::gguf::Metadata;
use crate::weights::gguf::{Gguf, GgufError};
use crate::weights::resolve::ResolvedModel;

/// Tokens with which Qwen's models end a turn or a document. Files name only one of them as their
/// end of sequence, the releases' `generation_config.json` names both.
const END_TOKENS: [&str; 2] = ["<|im_end|>", "<|endoftext|>"];

/// Builds tokenizer and chat template, and settles what the model is called.
///
/// # Errors
/// If the file's metadata holds no usable tokenizer, or a template that cannot be parsed.
pub(super) fn build(
    config: &ModelConfig,
    resolved: &ResolvedModel,
    gguf: &Gguf,
) -> Result<ServedModel> {
    let metadata = gguf.metadata();
    let tokenizer = Tokenizer::from_spec(tokenizer_spec(metadata)?)
        .with_context(|| format!("the tokenizer in `{}` is unusable", resolved.gguf.display()))?;
    let eos_token_ids = eos_token_ids(metadata, &tokenizer);
    let template = metadata.optional("tokenizer.chat_template", Metadata::str)?;
    let conventions = conventions(config, resolved, template.unwrap_or_default());
    let tokens = TemplateTokens {
        bos_token: special_text(metadata, &tokenizer, "tokenizer.ggml.bos_token_id"),
        eos_token: special_text(metadata, &tokenizer, "tokenizer.ggml.eos_token_id"),
    };
    let template = template
        .map(|source| ChatTemplate::new(source, tokens))
        .transpose()
        .context("the chat template in the model file is unusable")?;
    let fim = FimTokens::find(&tokenizer).filter(|_| is_coder(metadata, resolved));
    let tokenizer = Arc::new(tokenizer);
    let (names, patterns) = names(config, resolved)?;
    let mut names = names.into_iter();
    Ok(ServedModel {
        name: names.next().unwrap_or_else(|| resolved.name.clone()),
        aliases: names.collect(),
        patterns,
        root: config.model.clone(),
        grammars: GrammarCompiler::new(Arc::clone(&tokenizer), &eos_token_ids),
        tokenizer,
        template,
        eos_token_ids,
        fim,
        pooling: match config.embedding_pooling {
            EmbeddingPooling::Mean => Pooling::Mean,
            EmbeddingPooling::Last => Pooling::Last,
        },
        embedding_size: embedding_size(metadata)?,
        sampling_defaults: sampling_defaults(resolved),
        conventions,
    })
}

/// The names that are listed, the one for answers first, and those with a `*`. A name for another
/// model than this one would be answered by the wrong model.
fn names(
    config: &ModelConfig,
    resolved: &ResolvedModel,
) -> Result<(Vec<String>, Vec<NamePattern>)> {
    let mut names = config.names(&resolved.name);
    let is_this_one =
        |model: &String| names.contains(model) || [&resolved.name, &config.model].contains(&model);
    if let Some(alias) = config.aliases.iter().find(|alias| !is_this_one(&alias.model)) {
        let message = format!("`--alias {alias}`: this server has no model `{}`", alias.model);
        let hint = format!("it has `{}`", names.join("`, `"));
        return Err(Hinted { message, hint }.into());
    }
    let (with_star, plain): (Vec<&Alias>, Vec<&Alias>) =
        config.aliases.iter().partition(|alias| alias.name.contains('*'));
    for alias in plain {
        if !names.contains(&alias.name) {
            names.push(alias.name.clone());
        }
    }
    let mut patterns: Vec<NamePattern> =
        with_star.into_iter().map(|alias| NamePattern::new(&alias.name)).collect();
    if config.hosted_names == HostedNames::Answered {
        patterns.extend(DASHSCOPE_NAMES.map(NamePattern::new));
    }
    Ok((names, patterns))
}

/// Every Qwen2.5 has the tokens to fill in the middle in its vocabulary; only Coders learned them.
fn is_coder(metadata: &Metadata, resolved: &ResolvedModel) -> bool {
    let stated = ["general.name", "general.basename"];
    let stated = stated.iter().filter_map(|key| metadata.str(key).ok());
    let known = resolved.entry.iter().map(|entry| entry.model.name.as_str());
    let mut names = stated.chain(known).chain([resolved.name.as_str()]);
    names.any(|name| name.to_ascii_lowercase().contains("coder"))
}

fn embedding_size(metadata: &Metadata) -> Result<usize, GgufError> {
    let architecture = metadata.str("general.architecture")?;
    Ok(metadata.u32(&format!("{architecture}.embedding_length"))? as usize)
}

/// The catalogue says how a model answers; of others, the chat template shows it.
fn conventions(config: &ModelConfig, resolved: &ResolvedModel, template: &str) -> Conventions {
    let (tool_calls, reasons) = match &resolved.entry {
        Some(entry) => (entry.prompt.tool_calls, entry.prompt.reasoning),
        None if template.contains("<function=") => {
            (CatalogueFormat::Qwen3Coder, template.contains(reasoning::OPEN_TAG))
        }
        None => (CatalogueFormat::Hermes, template.contains(reasoning::OPEN_TAG)),
    };
    Conventions {
        tool_calls: match tool_calls {
            CatalogueFormat::Hermes => ToolCallFormat::Hermes,
            CatalogueFormat::Qwen3Coder => ToolCallFormat::QwenCoder,
        },
        bare_tool_calls: match config.bare_tool_calls {
            BareCalls::Accepted => BareToolCalls::Accepted,
            BareCalls::Text => BareToolCalls::Text,
        },
        reasoning: if reasons { Reasoning::InTags } else { Reasoning::No },
    }
}

fn tokenizer_spec(metadata: &Metadata) -> Result<TokenizerSpec, GgufError> {
    Ok(TokenizerSpec {
        tokens: metadata.strings("tokenizer.ggml.tokens")?,
        merges: metadata.strings("tokenizer.ggml.merges")?,
        token_types: metadata.i32s("tokenizer.ggml.token_type")?,
        pre: metadata.str("tokenizer.ggml.pre")?.to_owned(),
    })
}

fn eos_token_ids(metadata: &Metadata, tokenizer: &Tokenizer) -> Vec<TokenId> {
    let stated = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];
    let stated = stated.iter().filter_map(|key| metadata.u32(key).ok());
    let usual = END_TOKENS.iter().filter_map(|token| tokenizer.id_of(token));
    let mut ids: Vec<TokenId> = stated.chain(usual).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn special_text(metadata: &Metadata, tokenizer: &Tokenizer, key: &str) -> Option<String> {
    tokenizer.token_text(metadata.u32(key).ok()?)
}

fn sampling_defaults(resolved: &ResolvedModel) -> GenerationDefaults {
    let Some(entry) = &resolved.entry else { return GenerationDefaults::default() };
    let generation = &entry.model.generation;
    // Through the shortest decimal form, so that 0.7 stays 0.7.
    let number = |value: f32| value.to_string().parse().ok();
    GenerationDefaults {
        temperature: number(generation.temperature),
        top_p: number(generation.top_p),
        top_k: Some(i64::from(generation.top_k)),
        repetition_penalty: number(generation.repetition_penalty),
        ..GenerationDefaults::default()
    }
}
