//! Model files: whatever a file says, reading and planning end with an error or a model, without a
//! panic and without memory out of proportion to the file.

use std::path::{Path, PathBuf};

use qwen_server::config::Execution;
use qwen_server::device::Device;
use qwen_server::ops::kv_cache::KvDtype;
use qwen_server::runner::load::{LoadOptions, PlannedModel};
use qwen_server::text::{Tokenizer, TokenizerSpec};
use qwen_server::weights::gguf::{Gguf, Metadata};

use crate::fuzzer::{fuzz, outcome};

/// Where the header of the sound model ends, about: what is changed lies before.
const HEADER_BYTES: usize = 16 << 10;
/// From here on an input is changes to a sound model instead of a file.
const PATCHES: u8 = 128;

const WORDS: [&str; 22] = [
    "GGUF",
    "general.architecture",
    "general.alignment",
    "qwen2.block_count",
    "qwen2.attention.head_count",
    "qwen2.embedding_length",
    "qwen2.context_length",
    "split.count",
    "tokenizer.ggml.tokens",
    "token_embd.weight",
    "\0\0\0\0",
    "\0\0\0\0\0\0\0\0",
    "\x01\0\0\0\0\0\0\0",
    "\x20\0\0\0\0\0\0\0",
    "\0\0\0\0\0\0\0\x01",
    "\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f",
    "\0\0\0\0\x01\0\0\0",
    "\x04\0\0\0",
    "\x08\0\0\0",
    "\x09\0\0\0",
    "\x0c\0\0\0",
    "\0\0\x10\0",
];

pub(crate) fn options() -> LoadOptions {
    LoadOptions {
        device: Device::Cpu,
        gpu_memory_utilization: 0.9,
        execution: Execution::Eager,
        kv_cache_bytes: Some(1 << 20),
        kv_cache_dtype: KvDtype::F16,
        max_model_len: None,
        rope_scaling: qwen_server::config::RopeScalingChoice::Auto,
        block_size: 16,
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        num_threads: 1,
        adapters: (0, 16),
    }
}

/// The sound model with numbers of eight bytes written over it: offset, number, offset, number.
fn patched(sound: &[u8], patches: &[u8]) -> Vec<u8> {
    let mut file = sound.to_vec();
    for patch in patches.chunks_exact(10) {
        let (offset, value) = patch.split_at(2);
        let offset = usize::from(u16::from_le_bytes([offset[0], offset[1]])) % HEADER_BYTES;
        file[offset..offset + 8].copy_from_slice(value);
    }
    file
}

/// Reads everything that serving reads before the weights. Tells how far it came.
fn read(path: &Path) -> (usize, String) {
    let gguf = match Gguf::open(path) {
        Ok(gguf) => gguf,
        Err(error) => return (0, error.to_string()),
    };
    let names: Vec<String> = gguf.tensors().map(|tensor| tensor.name.clone()).collect();
    for name in &names {
        let (info, bytes) = gguf.tensor(name).unwrap();
        assert_eq!(info.num_bytes, bytes.len());
    }
    let metadata = gguf.metadata();
    let spec = TokenizerSpec {
        tokens: metadata.strings("tokenizer.ggml.tokens").unwrap_or_default(),
        merges: metadata.strings("tokenizer.ggml.merges").unwrap_or_default(),
        token_types: metadata.i32s("tokenizer.ggml.token_type").unwrap_or_default(),
        pre: metadata
            .optional("tokenizer.ggml.pre", Metadata::str)
            .ok()
            .flatten()
            .unwrap_or_default()
            .to_owned(),
    };
    let has_tokenizer = Tokenizer::from_spec(spec).is_ok();
    match PlannedModel::open(path, options()) {
        Ok(planned) => {
            assert!(0 < planned.plan.num_blocks && 0 < planned.plan.max_model_len);
            (2, format!("{has_tokenizer} {}", names.len()))
        }
        Err(error) => (1, format!("{has_tokenizer} {error:#}")),
    }
}

#[test]
fn model_files_are_read_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("fuzzed.gguf");
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny/q4_0.gguf");
    let sound = std::fs::read(tiny).unwrap();
    fuzz("gguf", &WORDS, |input, _| {
        let Some((&kind, rest)) = input.split_first() else { return outcome(&"empty") };
        let file = if kind < PATCHES { rest.to_vec() } else { patched(&sound, rest) };
        std::fs::write(&path, file).unwrap();
        let (stage, told) = read(&path);
        assert!(!told.contains('\n'), "an error is one line: {told}");
        // What differs in numbers and names only is the same outcome.
        let told: String = told.chars().filter(char::is_ascii_alphabetic).take(60).collect();
        outcome(&(stage, told))
    });
}
