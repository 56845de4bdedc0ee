//! DashScope's native generation: its requests as the chat requests they amount to, and the deltas
//! of an answer as frames or as one whole.

mod hosted;
mod request;
mod writer;

pub use hosted::is_ignored_parameter;
pub use request::{Endpoint, PreparedAnswer, ResultFormat, prepare, tokenize};
pub use writer::{AnswerWriter, Progress, native_usage};
