//! Anthropic's `/v1/messages`: its requests as the chat requests they amount to, and the deltas of
//! an answer as content blocks and events.

mod blocks;
mod request;
mod writer;

pub use request::convert;
pub use writer::MessageWriter;
