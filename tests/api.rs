//! The HTTP boundary, from bytes to bytes, with an engine whose runner needs no model.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "support/api_fake.rs"]
mod api_fake;

#[path = "api/adapters.rs"]
mod adapters;
#[path = "api/chat.rs"]
mod chat;
#[path = "api/completions.rs"]
mod completions;
#[path = "api/connections.rs"]
mod connections;
#[path = "api/constraints.rs"]
mod constraints;
#[path = "api/dashscope.rs"]
mod dashscope;
#[path = "api/described.rs"]
mod described;
#[path = "api/embeddings.rs"]
mod embeddings;
#[path = "api/errors.rs"]
mod errors;
#[path = "api/examples.rs"]
mod examples;
#[path = "api/exposure.rs"]
mod exposure;
#[path = "api/extras.rs"]
mod extras;
#[path = "api/fuzz.rs"]
mod fuzz;
#[path = "api/keys.rs"]
mod keys;
#[path = "api/malformed.rs"]
mod malformed;
#[path = "api/messages.rs"]
mod messages;
#[path = "api/metrics.rs"]
mod metrics;
#[path = "api/other_routes.rs"]
mod other_routes;
#[path = "api/quotas.rs"]
mod quotas;
#[path = "api/responses.rs"]
mod responses;
#[path = "api/socket.rs"]
mod socket;
#[path = "api/state.rs"]
mod state;
#[path = "api/thinking.rs"]
mod thinking;
#[path = "api/tls.rs"]
mod tls;
#[path = "api/tools.rs"]
mod tools;
#[path = "api/usage.rs"]
mod usage;
