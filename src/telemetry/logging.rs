//! Where log lines go and what they look like. **Invariant:** no line carries a prompt, an answer
//! or a key.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::filter::LevelFilter;

/// What a log line looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Writes lines of at least `level` to standard error, once per process; later calls change
/// nothing.
pub fn install(level: LevelFilter, format: LineFormat) {
    let lines = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal());
    let _ = match format {
        LineFormat::Text => lines.with_target(false).try_init(),
        LineFormat::Json => lines.json().flatten_event(true).try_init(),
    };
}
