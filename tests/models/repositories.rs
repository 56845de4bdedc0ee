//! Goal: a repository runs as what it says it is, or not at all. Method: copies of a sound one with
//! one thing changed.

use std::path::Path;

use qwen_server::runner::load::PlannedModel;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{ROOMY, load_options, tiny};

fn copy(name: &str) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(tiny(name)).unwrap() {
        let path = file.unwrap().path();
        std::fs::copy(&path, directory.path().join(path.file_name().unwrap())).unwrap();
    }
    directory
}

/// Sets values of `config.json`; null takes one away.
fn set(directory: &Path, changes: &Value) {
    let path = directory.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(path, config.to_string()).unwrap();
}

/// What planning or loading says against a repository after a change of its configuration.
fn refusal(name: &str, changes: &Value) -> String {
    let directory = copy(name);
    set(directory.path(), changes);
    let options = load_options(ROOMY);
    let error = match PlannedModel::open(directory.path(), options) {
        Err(error) => error,
        Ok(planned) => match planned.load(|_| {}) {
            Err(error) => error,
            Ok(_) => panic!("{changes} is accepted"),
        },
    };
    let message = format!("{error:#}");
    assert!(!message.contains('\n') && message.len() < 600, "{message}");
    message
}

#[test]
fn a_configuration_that_is_not_followed_is_refused_by_name() {
    for (changes, part) in [
        (json!({"model_type": "llama"}), "architecture `llama` is not supported"),
        (json!({"model_type": null}), "`model_type` is missing"),
        (json!({"architectures": ["Qwen2ForRewardModel"]}), "Qwen2ForRewardModel"),
        (json!({"hidden_act": "gelu"}), "the activation `gelu`"),
        (json!({"use_sliding_window": true}), "use_sliding_window"),
        (json!({"rope_scaling": {"type": "linear", "factor": 2.0}}), "type `linear`"),
        (json!({"rope_scaling": 3}), "`rope_scaling` is 3"),
        (json!({"hidden_size": -1}), "`hidden_size` is -1"),
        (json!({"hidden_size": 64}), "has shape [288, 128]"),
        (json!({"num_attention_heads": 0}), "is zero"),
        (json!({"num_hidden_layers": 2}), "`model.layers.1.input_layernorm.weight` is missing"),
        (json!({"vocab_size": 289}), "has shape [288, 128]"),
        (json!({"rms_norm_eps": "small"}), "`rms_norm_eps` is \"small\""),
        (json!({"tie_word_embeddings": false}), "`lm_head.weight` is missing"),
        (json!({"quantization_config": {"quant_method": "bitsandbytes"}}), "`bitsandbytes`"),
    ] {
        let message = refusal("hf-bf16", &changes);
        assert!(message.contains(part), "{part}: {message}");
    }
}

/// A default of transformers may be written out or left out.
#[test]
fn defaults_may_be_left_out() {
    let directory = copy("hf-bf16");
    set(
        directory.path(),
        &json!({
            "rope_scaling": {"rope_type": "default"}, "architectures": null, "hidden_act": null,
            "head_dim": 64, "use_sliding_window": null, "quantization_config": null,
        }),
    );
    let planned = PlannedModel::open(directory.path(), load_options(ROOMY)).unwrap();
    let plain = PlannedModel::open(&tiny("hf-bf16"), load_options(ROOMY)).unwrap();
    assert_eq!(planned.config, plain.config);
}
