//! What is served: a model's text side, its names and its habits.

use std::sync::Arc;

use anyhow::{Context, Result};

use super::draft;
use crate::chat::fim::FimTokens;
use crate::chat::model::{Conventions, NamePattern, Reasoning, ServedModel};
use crate::chat::reasoning;
use crate::chat::template::ChatTemplate;
use crate::chat::tool_call::{BareToolCalls, ToolCallFormat};
use crate::cli::Hinted;
use crate::cli::text_side::TextSide;
use crate::config::{
    Alias, BareCalls, DASHSCOPE_NAMES, EmbeddingPooling, HostedNames, ModelConfig,
};
use crate::engine::request::Pooling;
use crate::grammar::GrammarCompiler;
use crate::runner::load::PlannedModel;
use crate::sampling::params::GenerationDefaults;
use crate::weights::catalogue::ToolCallFormat as CatalogueFormat;
use crate::weights::resolve::ResolvedModel;

/// Builds tokenizer and chat template of a model that answers to these [`names`].
///
/// # Errors
/// If the files hold no usable tokenizer, or a template that cannot be parsed, or the draft model
/// has another tokenizer.
pub(super) fn build(
    config: &ModelConfig,
    resolved: &ResolvedModel,
    planned: &PlannedModel,
    (names, patterns): (Vec<String>, Vec<NamePattern>),
) -> Result<ServedModel> {
    let text = TextSide::read(planned.checkpoint.source(), planned.config.vocab_size)
        .with_context(|| format!("cannot serve `{}`", resolved.path.display()))?;
    draft::check_tokenizer(planned, &text.tokenizer)?;
    let fim = FimTokens::find(&text.tokenizer).filter(|_| is_coder(&text.names, resolved));
    let TextSide { tokenizer, template, template_tokens, eos_token_ids, generation, .. } = text;
    let conventions = conventions(config, resolved, template.as_deref().unwrap_or_default());
    let template = template
        .map(|source| ChatTemplate::new(&source, template_tokens))
        .transpose()
        .context("the chat template of the model is unusable")?;
    let tokenizer = Arc::new(tokenizer);
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
        embedding_size: planned.config.hidden_size,
        sampling_defaults: generation.unwrap_or_else(|| sampling_defaults(resolved)),
        conventions,
    })
}

/// The names that are listed, the one for answers first, and those with a `*`. A name for another
/// model than this one would be answered by the wrong model.
pub(super) fn names(
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
fn is_coder(stated: &[String], resolved: &ResolvedModel) -> bool {
    let known = resolved.entry.iter().map(|entry| entry.model.name.as_str());
    let mut names = stated.iter().map(String::as_str).chain(known).chain([resolved.name.as_str()]);
    names.any(|name| name.to_ascii_lowercase().contains("coder"))
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
