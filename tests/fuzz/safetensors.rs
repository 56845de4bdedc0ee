//! Repositories: whatever the header of a safetensors file or a `config.json` says, reading and
//! planning end with an error or a model, without a panic and without memory out of proportion to
//! the files.

use std::path::Path;

use qwen_server::runner::load::PlannedModel;
use qwen_server::weights::checkpoint::Checkpoint;
use qwen_server::weights::safetensors::Safetensors;

use crate::fuzzer::{fuzz, outcome};
use crate::gguf::options;

/// Inputs from here on are a whole file, below a header; the rest are a `config.json`.
const WHOLE_FILE: u8 = 192;
const HEADER: u8 = 64;

const WORDS: [&str; 24] = [
    r#"{"__metadata__":{"format":"pt"}}"#,
    r#"{"x":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}"#,
    r#","model.norm.weight":{"dtype":"F32","shape":[128],"data_offsets":[0,512]}"#,
    "\"dtype\":\"F8_E4M3\"",
    "\"shape\":[",
    "4294967296",
    "18446744073709551615",
    "\"data_offsets\":[",
    "{}",
    "[0,0]",
    r#"{"model_type":"qwen2","vocab_size":288,"hidden_size":128,"num_hidden_layers":1,"#,
    r#""num_attention_heads":2,"num_key_value_heads":1,"intermediate_size":64,"#,
    r#""max_position_embeddings":512,"rms_norm_eps":1e-06,"tie_word_embeddings":true}"#,
    "\"head_dim\":",
    r#""quantization_config":{"quant_method":"gptq","bits":4,"group_size":128}"#,
    r#""quantization_config":{"quant_method":"awq","bits":4,"group_size":-1}"#,
    r#""quantization_config":{"quant_method":"fp8","weight_block_size":[128,128]}"#,
    "\"rope_scaling\":{\"type\":\"yarn\"}",
    "null",
    "-1",
    "true",
    "\0\0\0\0\0\0\0\0",
    "\x20\0\0\0\0\0\0\0",
    "\\u001b",
];

/// Reads everything that serving reads before the weights. Tells how far it came.
fn read(directory: &Path) -> (usize, String) {
    let path = directory.join("model.safetensors");
    if let Ok(file) = Safetensors::open(&path) {
        for tensor in file.tensors() {
            assert_eq!(file.bytes(tensor).as_ref().len(), tensor.num_bytes());
        }
    }
    let checkpoint = match Checkpoint::open(directory) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return (0, error.to_string()),
    };
    let quantization = checkpoint.quantization();
    match PlannedModel::open(directory, options()) {
        Ok(planned) => {
            assert!(0 < planned.plan.num_blocks && 0 < planned.plan.max_model_len);
            (2, quantization)
        }
        Err(error) => (1, format!("{quantization} {error:#}")),
    }
}

#[test]
fn repositories_are_read_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny/hf-bf16");
    let sound = ["config.json", "model.safetensors"]
        .map(|name| (folder.path().join(name), std::fs::read(tiny.join(name)).unwrap()));
    let [(config_path, config), (weights_path, weights)] = &sound;
    let (_, data) = weights.split_at(8);
    let header_len = usize::from(u16::from_le_bytes([weights[0], weights[1]]));
    fuzz("safetensors", &WORDS, |input, _| {
        let Some((&kind, rest)) = input.split_first() else { return outcome(&"empty") };
        let (file, description) = if WHOLE_FILE <= kind {
            (rest.to_vec(), config.as_slice())
        } else if HEADER <= kind {
            let header = [&(rest.len() as u64).to_le_bytes()[..], rest].concat();
            ([&header, &data[header_len..]].concat(), config.as_slice())
        } else {
            (weights.clone(), rest)
        };
        std::fs::write(weights_path, file).unwrap();
        std::fs::write(config_path, description).unwrap();
        let (stage, told) = read(folder.path());
        assert!(!told.contains('\n'), "an error is one line: {told}");
        let told: String = told.chars().filter(char::is_ascii_alphabetic).take(60).collect();
        outcome(&(stage, told))
    });
}
