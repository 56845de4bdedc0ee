//! Speaks HTTP: routes, limits, server-sent events, one error type. Holds no idea about models.
//!
//! Start at [`router`]. A handler parses, calls one function of `chat`, submits to the engine and
//! renders. **Invariant:** whatever goes wrong is answered in OpenAI's shape with a request id.

mod access_log;
mod adapters;
mod admin;
mod aliases;
mod anthropic_errors;
mod auth;
mod body;
mod caller;
mod chat;
mod completions;
mod connection;
mod cors;
mod dashscope;
mod dashscope_errors;
mod embeddings;
mod error;
mod extract;
mod fim;
mod generation;
mod health;
mod hosts;
mod key_ring;
mod messages;
mod meter;
mod models;
mod openapi;
mod rate_limit;
mod reload;
mod render;
mod request_id;
mod request_log;
mod response_store;
mod responses;
mod router;
mod serve;
mod sse;
mod state;
mod tls;
mod tokenize;

pub use adapters::{AdapterError, Adapters, LoadedAdapter};
pub use key_ring::KeyRing;
pub use reload::{Reload, reload_when_changed};
pub use router::router;
pub use serve::{Listeners, serve};
pub use state::{AdminRoutes, AppState, HttpLimits, PrefixSharing};
pub use tls::{Tls, TlsError, TlsFiles};
