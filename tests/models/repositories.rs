//! Goal: a repository runs as what it says it is, or not at all. Method: copies of a sound one with
//! one thing changed.

use std::path::Path;

use candle_core::quantized::GgmlDType;
use qwen_server::cli::quantize::{self, QuantizeArgs};
use qwen_server::config::{Execution, RopeScalingChoice};
use qwen_server::device::gpu::Gpu;
use qwen_server::layers::content::rows;
use qwen_server::models::ModelConfig;
use qwen_server::ops::kv_cache::KvDtype;
use qwen_server::ops::row_format::RowFormat;
use qwen_server::runner::load::PlannedModel;
use qwen_server::text::{Tokenizer, TokenizerSpec};
use qwen_server::weights::checkpoint::{Checkpoint, Source};
use qwen_server::weights::gguf::Gguf;
use qwen_server::weights::safetensors::ElementType;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{
    Place, QUANTISED, REQUANTISED, REQUANTISED_TO_FP8, ROOMY, Setup, alone, assert_same,
    compare_engine, load_options, prompts, start, start_planned, tiny, tokenizer,
};

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
        (json!({"use_sliding_window": true, "sliding_window": 0}), "`sliding_window` of zero"),
        (
            json!({"use_sliding_window": true, "layer_types": ["linear_attention"]}),
            "a layer of the type \"linear_attention\"",
        ),
        (json!({"use_sliding_window": true, "layer_types": []}), "one of `layer_types` for each"),
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

const EXACT_CACHE: Setup = Setup { kv_cache_dtype: KvDtype::F32, ..ROOMY };

/// Goal: weights quantised while they are loaded compute about the same, in less memory.
#[tokio::test]
async fn floats_may_be_quantised_as_they_are_loaded() {
    // Rows of 128 are no blocks of 256, so that `q6_k` has eight bits here too.
    for (name, quantization) in [
        ("hf-f16", "q8_0"),
        ("hf-bf16", "q6_k"),
        ("hf-f32", "q8_0"),
        ("fp8-block", "q8_0"),
        ("hf-qwen3", "fp8"),
    ] {
        let open = || Checkpoint::open(&tiny(name)).unwrap();
        let checkpoint = open().quantized(quantization.parse().unwrap()).unwrap();
        assert!(checkpoint.quantization().ends_with(&format!("quantised to {quantization}")));
        let planned = PlannedModel::plan(checkpoint, load_options(EXACT_CACHE)).unwrap();
        assert!(planned.plan.weight_bytes < open().num_weight_bytes());
        let tolerance = if quantization == "fp8" { REQUANTISED_TO_FP8 } else { REQUANTISED };
        compare_engine(&start_planned(&planned, EXACT_CACHE), name, tolerance).await;
    }
    for name in ["gptq-int4", "awq", "q8_0.gguf"] {
        let checkpoint = Checkpoint::open(&tiny(name)).unwrap();
        let error = checkpoint.quantized("q8_0".parse().unwrap()).err().unwrap().to_string();
        assert!(error.contains("already"), "{name}: {error}");
    }
}

/// Goal: projections of one input may have their columns sorted differently. Method: two groups of
/// one projection change places, with all that belongs to them, so that its weights mean the same.
#[tokio::test]
async fn projections_of_one_input_may_be_sorted_differently() {
    let directory = copy("gptq-int4-act-order");
    let path = directory.path().join("model.safetensors");
    let mut file = std::fs::read(&path).unwrap();
    let header_len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&file[8..8 + header_len]).unwrap();
    let (_, data) = file.split_at_mut(8 + header_len);
    let range = |part: &str| {
        let offsets = &header[format!("model.layers.0.self_attn.k_proj.{part}")]["data_offsets"];
        offsets[0].as_u64().unwrap() as usize..offsets[1].as_u64().unwrap() as usize
    };
    let num_cols = range("g_idx").len() / 4;
    let num_rows = range("qweight").len() * 2 / num_cols;
    let groups = data[range("g_idx")].as_chunks_mut::<4>().0;
    let num_groups = groups.iter().map(|group| group[0]).max().unwrap() as usize + 1;
    for group in groups {
        group[0] = [1, 0].get(group[0] as usize).copied().unwrap_or(group[0]);
    }
    for part in ["scales", "qzeros"] {
        let rows = &mut data[range(part)];
        let row_bytes = rows.len() / num_groups;
        let (first, rest) = rows.split_at_mut(row_bytes);
        first.swap_with_slice(&mut rest[..row_bytes]);
    }
    std::fs::write(&path, file).unwrap();
    let k_proj = |directory: &Path| {
        let name = "model.layers.0.self_attn.k_proj.weight";
        let checkpoint = Checkpoint::open(directory).unwrap();
        let matrix = || checkpoint.matrix(name, num_rows, num_cols).unwrap();
        [matrix(), matrix().unsorted()].map(|matrix| rows(&matrix).unwrap().into_owned())
    };
    let original = k_proj(&tiny("gptq-int4-act-order"));
    let changed = k_proj(directory.path());
    assert!(original[0] != changed[0] && original[1] == changed[1]);
    for setup in [EXACT_CACHE, Setup { place: Place::Gpu(Execution::Recorded), ..ROOMY }] {
        if matches!(setup.place, Place::Cpu) || Gpu::for_tests().is_some() {
            let engine = start(directory.path(), setup);
            compare_engine(&engine, "gptq-int4-act-order", QUANTISED).await;
        }
    }
}

/// Goal: floats of eight bits stay what they are, and take no more memory than their file.
#[test]
fn floats_of_eight_bits_are_kept() {
    for name in ["fp8-block", "fp8-tensor", "fp8-channel", "fp8-block-qwen3moe"] {
        let checkpoint = Checkpoint::open(&tiny(name)).unwrap();
        let Source::Repository(repository) = checkpoint.source() else { unreachable!() };
        let tensors = repository.tensors().filter(|tensor| tensor.dtype == ElementType::F8E4M3);
        let names: Vec<_> =
            tensors.map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect();
        assert!(!names.is_empty());
        let again = Checkpoint::open(&tiny(name)).unwrap().quantized("fp8".parse().unwrap());
        let again = again.unwrap();
        for (name, shape) in names {
            let matrix = checkpoint.matrix(&name, shape[0], shape[1]).unwrap();
            assert_eq!(matrix.row_format(), RowFormat::Fp8);
            let data = rows(&matrix).unwrap();
            assert_eq!(data.len(), shape[0] * (shape[1] + 4 * shape[1].div_ceil(128)));
            let kept = again.matrix(&name, shape[0], shape[1]).unwrap();
            assert_eq!(rows(&kept).unwrap(), data, "{name}");
        }
        let file_bytes = checkpoint.num_file_bytes() as f64;
        assert!((checkpoint.num_weight_bytes() as f64) < 1.05 * file_bytes);
    }
    let output = Path::new("not-written.gguf");
    let error = quantize_to(&tiny("hf-f16"), output, "fp8").unwrap_err().to_string();
    assert!(error.contains("serve --quantization fp8"), "{error}");
}

/// Goal: the matrices of a layer's experts are one tensor, which choose experts as exactly as before.
/// Method: goldens, and names, shapes and types of the tensors.
#[tokio::test]
async fn a_repository_with_experts_becomes_a_file() {
    let directory = tempfile::tempdir().unwrap();
    for (name, num_experts) in [("hf-qwen2moe", 6), ("hf-qwen3moe", 6), ("fp8-block-qwen3moe", 5)] {
        let path = directory.path().join(format!("{name}.gguf"));
        quantize(&tiny(name), &path).unwrap();
        compare_engine(&start(&path, EXACT_CACHE), name, REQUANTISED).await;
        let gguf = Gguf::open(&path).unwrap();
        let layer = usize::from(name == "hf-qwen3moe");
        let info = |part: &str| {
            let (info, _) = gguf.tensor(&format!("blk.{layer}.ffn_{part}.weight")).unwrap();
            (info.dtype, info.shape.clone())
        };
        let hidden = if name.starts_with("hf") { 64 } else { 128 };
        let width = hidden / 2;
        assert_eq!(info("up_exps"), (GgmlDType::Q8_0, vec![num_experts, width, hidden]));
        assert_eq!(info("down_exps"), (GgmlDType::Q8_0, vec![num_experts, hidden, width]));
        assert_eq!(info("gate_inp"), (GgmlDType::F32, vec![num_experts, hidden]));
        if name == "hf-qwen2moe" {
            assert_eq!(info("gate_inp_shexp"), (GgmlDType::F32, vec![hidden]));
            assert_eq!(info("up_shexp"), (GgmlDType::Q8_0, vec![64, hidden]));
        }
    }
}

/// Goal: stretched positions and windows get into a file, and nothing of them is lost. Method: rows
/// that no quantised type fits stay as they are, so that answers must have the same bits.
#[tokio::test]
async fn stretched_positions_and_windows_become_keys_of_a_file() {
    let plain = json!({"rope_type": "default", "rope_theta": 1e6});
    let unusual = json!({
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 2.5,
        "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0,
    });
    let mut bits = Vec::new();
    for changes in [
        json!({}),
        json!({"rope_parameters": plain}),
        json!({"rope_parameters": unusual, "max_position_embeddings": 64}),
        json!({"use_sliding_window": false}),
        json!({"layer_types": null, "max_window_layers": 0, "sliding_window": 9}),
        json!({"layer_types": null, "max_window_layers": 1}),
    ] {
        let directory = copy("hf-narrow");
        set(directory.path(), &changes);
        let file = directory.path().join("model.gguf");
        quantize(directory.path(), &file).unwrap();
        let prompt = &prompts()[6];
        let said = alone(&file, 6, prompt).await;
        assert_same(&changes.to_string(), 6, &said, &alone(directory.path(), 6, prompt).await);
        let read = |path: &Path, choice| {
            ModelConfig::from_checkpoint(&Checkpoint::open(path).unwrap(), choice).unwrap()
        };
        for choice in ["auto", "none", "yarn:factor=8,original=32"] {
            let choice: RopeScalingChoice = choice.parse().unwrap();
            assert_eq!(read(&file, choice), read(directory.path(), choice), "{changes}");
        }
        assert!(!bits.contains(&said.logprob_bits), "{changes} changes nothing");
        bits.push(said.logprob_bits);
    }
}

#[test]
fn what_a_file_cannot_say_is_not_written() {
    for (more, part) in [
        (json!({"factor": 3.3}), "3.3 in `rope_scaling` has more digits"),
        (json!({"attention_factor": 1.2}), "`attention_factor`"),
    ] {
        let directory = copy("hf-narrow");
        let mut yarn = json!({
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
        });
        yarn.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        set(directory.path(), &json!({"rope_parameters": yarn}));
        let file = directory.path().join("model.gguf");
        let error = quantize(directory.path(), &file).unwrap_err().to_string();
        assert!(error.contains(part) && !error.contains('\n'), "{error}");
        assert!(!file.exists());
    }
}

fn quantize(input: &Path, output: &Path) -> anyhow::Result<()> {
    quantize_to(input, output, "q8_0")
}

fn quantize_to(input: &Path, output: &Path, quantization: &str) -> anyhow::Result<()> {
    quantize::run(QuantizeArgs {
        input: input.to_path_buf(),
        output: output.to_path_buf(),
        quantization: quantization.parse().unwrap(),
        num_threads: Some(1),
    })
}

/// Goal: the file that is written is the model, with its tokenizer. Method: the goldens of the
/// repository, and texts through both tokenizers.
#[tokio::test]
async fn a_repository_becomes_a_file() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["hf-f16", "hf-sharded", "hf-f32", "fp8-channel"] {
        let path = directory.path().join(format!("{name}.gguf"));
        quantize(&tiny(name), &path).unwrap();
        compare_engine(&start(&path, EXACT_CACHE), name, REQUANTISED).await;
        let gguf = Gguf::open(&path).unwrap();
        assert_eq!(gguf.quantization(), "Q8_0");
        let metadata = gguf.metadata();
        assert_eq!(metadata.u32("tokenizer.ggml.eos_token_id").unwrap(), 268);
        assert!(metadata.str("tokenizer.chat_template").unwrap().contains("add_generation_prompt"));
        let ours = tokenizer(&path);
        let json = std::fs::read(tiny(name).join("tokenizer.json")).unwrap();
        let theirs = Tokenizer::from_json(&json).unwrap();
        let spec = TokenizerSpec::from_json(&json, 300).unwrap();
        assert_eq!((spec.tokens.len(), spec.token_types[299]), (300, 5));
        for text in ["the rain", "<|im_start|>user\n{}<tool_call>", "你好 🦀"] {
            assert_eq!(ours.encode(text).unwrap(), theirs.encode(text).unwrap());
        }
        assert_eq!(ours.is_special(268), theirs.is_special(268));
    }
    let path = directory.path().join("hf-f16.gguf");
    let error = quantize(&tiny("hf-f16"), &path).unwrap_err().to_string();
    assert!(error.contains("exists already"), "{error}");
    let path = directory.path().join("other.gguf");
    for (name, part) in [("gptq-int4", "already"), ("q8_0.gguf", "no directory")] {
        let error = quantize(&tiny(name), &path).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 4);
}
