//! What the server is about to do, on one screen.

use std::fmt::Write as _;

use indicatif::HumanBytes;

use super::device::Opened;
use crate::config::{Config, HostedNames, PrefixCaching, Source};
use crate::device::Device;
use crate::ops::matmul::instruction_set;
use crate::runner::load::PlannedModel;
use crate::weights::resolve::ResolvedModel;

/// The plan as lines of a label and what it means.
pub(super) fn describe(
    config: &Config,
    resolved: &ResolvedModel,
    planned: &PlannedModel,
    (names, opened): (&[String], &Opened),
) -> String {
    let (plan, engine) = (&planned.plan, &config.engine);
    let num_slots = u64::from(plan.num_blocks) * engine.block_size as u64;
    let full_length = num_slots / plan.max_model_len as u64;
    let why_shorter = if plan.limited_by_cache {
        format!(" (the model's {} do not fit in the cache)", planned.config.max_position_embeddings)
    } else {
        String::new()
    };
    let shares = engine.prefix_caching == PrefixCaching::Enabled;
    let sharing = if shares { "equal prefixes shared" } else { "nothing shared" };
    let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
    if config.model.hosted_names == HostedNames::Answered {
        names.push("the names of DashScope's text models");
    }
    let mut file = resolved.path.display().to_string();
    let mut weight_bytes = HumanBytes(plan.weight_bytes).to_string();
    if planned.checkpoint.is_dummy() {
        "none".clone_into(&mut file);
        weight_bytes.push_str(" OF RANDOM NUMBERS: every answer is noise");
    }
    let lines = [
        (
            "model",
            format!("{}, {}", planned.config.architecture, planned.checkpoint.quantization()),
        ),
        ("file", file),
        ("answers to", names.join(", ")),
        ("device", device(config, opened)),
        ("weights", weight_bytes),
        ("adapters", adapters(config, plan.adapter_bytes)),
        ("workspace", format!("about {}", HumanBytes(plan.workspace_bytes))),
        (
            "KV cache",
            format!(
                "{} as {}, {} blocks of {} tokens, {sharing}",
                HumanBytes(plan.kv_cache_bytes()),
                setting(config, "kv-cache-dtype"),
                plan.num_blocks,
                engine.block_size,
            ),
        ),
        (
            "sequences",
            format!(
                "up to {} tokens{why_shorter}; {full_length} of full length fit at once",
                plan.max_model_len
            ),
        ),
        (
            "scheduling",
            format!(
                "{} sequences at once, {} tokens a step, {} requests may wait",
                engine.max_num_seqs, engine.max_num_batched_tokens, engine.max_queue
            ),
        ),
        ("set by you", chosen(config)),
    ];
    let mut text = String::new();
    for (label, meaning) in lines {
        let _ = writeln!(text, "{label:>12}  {meaning}");
    }
    text
}

fn adapters(config: &Config, reserved_bytes: u64) -> String {
    let lora = &config.lora;
    if !lora.is_on() {
        return "none".to_owned();
    }
    let names: Vec<&str> = lora.modules.iter().map(|module| module.name.as_str()).collect();
    let names = if names.is_empty() { "none yet".to_owned() } else { names.join(", ") };
    format!("{names}; {} kept for rank {} at most", HumanBytes(reserved_bytes), lora.max_rank)
}

fn device(config: &Config, opened: &Opened) -> String {
    match &opened.device {
        Device::Cpu => {
            let why =
                opened.why_not_gpu.as_ref().map_or_else(String::new, |why| format!(" ({why})"));
            format!("cpu, {} threads, {}{why}", config.engine.num_threads, instruction_set())
        }
        Device::Gpu(gpu) => {
            let properties = gpu.properties();
            let (major, minor) = properties.capability;
            let utilization = config.engine.gpu_memory_utilization * 100.0;
            format!(
                "{}, compute capability {major}.{minor}, {utilization:.0} % of its memory",
                properties.name
            )
        }
    }
}

fn setting(config: &Config, key: &str) -> String {
    let found = config.settings.iter().find(|setting| setting.key == key);
    let value = found.and_then(|setting| setting.value.as_deref()).unwrap_or_default();
    value.trim_matches('"').to_owned()
}

/// Everything that is not a default, with what set it.
fn chosen(config: &Config) -> String {
    let chosen: Vec<String> = config
        .settings
        .iter()
        .filter(|setting| setting.source != Source::Default)
        .filter_map(|setting| {
            let value = setting.value.as_deref()?;
            Some(format!("{} = {value} ({})", setting.key, setting.source))
        })
        .collect();
    if chosen.is_empty() { "nothing, all defaults".to_owned() } else { chosen.join(", ") }
}
