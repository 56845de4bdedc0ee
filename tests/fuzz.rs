//! Fuzzing of what reads untrusted bytes: heads and bodies of requests, constraints, conversations
//! and templates, answers of models; model files, vocabularies, config files and
//! key files.
//!
//! Method: a loop that mutates the inputs of `tests/fuzz/corpus`, and keeps those whose outcome was
//! not seen before. Each target runs for `QWEN_SERVER_FUZZ_SECONDS`, three if that is not set, from
//! the seed `QWEN_SERVER_FUZZ_SEED`. An input that fails is printed and kept beside the binaries;
//! as a file of the corpus it is tried first from then on.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[allow(dead_code, reason = "the other tests use the rest")]
#[path = "support/api_fake.rs"]
mod api_fake;

#[path = "fuzz/answers.rs"]
mod answers;
#[path = "fuzz/bodies.rs"]
mod bodies;
#[path = "fuzz/configs.rs"]
mod configs;
#[path = "fuzz/fuzzer.rs"]
mod fuzzer;
#[path = "fuzz/gguf.rs"]
mod gguf;
#[path = "fuzz/grammars.rs"]
mod grammars;
#[path = "fuzz/heads.rs"]
mod heads;
#[path = "fuzz/keys.rs"]
mod keys;
#[path = "fuzz/native.rs"]
mod native;
#[path = "fuzz/safetensors.rs"]
mod safetensors;
#[path = "fuzz/templates.rs"]
mod templates;
#[path = "fuzz/tokenizers.rs"]
mod tokenizers;
