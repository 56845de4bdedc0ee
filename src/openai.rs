//! The wire schema, exactly as clients know it: types and nothing else.
//!
//! Requests are tolerant: unknown fields are kept in `other`, so that the answer can name what it
//! ignored. Responses have the fields of OpenAI's schema plus vLLM's extensions that Qwen clients
//! read. What the fields mean is decided in `chat` and `http`.
#![allow(missing_docs, reason = "the names are OpenAI's and documented there")]

pub mod adapter;
pub mod chat;
pub mod completion;
pub mod embedding;
pub mod error;
pub mod generation;
pub mod message;
pub mod model;
pub mod render;
pub mod responses;
pub mod stream;
pub mod tokenize;
pub mod tool;
