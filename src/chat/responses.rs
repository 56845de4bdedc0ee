//! `/v1/responses`: a conversation of items, as the chat request it amounts to; and the deltas of
//! an answer as the items and events of a response.

mod items;
mod request;
mod writer;

pub use items::own_items;
pub use request::{convert, echo};
pub use writer::{ResponseHead, ResponseWriter};
