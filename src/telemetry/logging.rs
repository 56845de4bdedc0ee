//! Where log lines go and what they look like. **Invariant:** no line carries a prompt, an answer
//! or a key. What libraries would say is not written at any level, because nobody here knows
//! whether they keep to that; only the exporter of traces, which never sees content, may complain.

mod json;

use std::io::{IsTerminal, stderr};

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt;
use tracing_subscriber::fmt::format::JsonFields;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry;
use tracing_subscriber::util::SubscriberInitExt;

/// Ours.
const OWN_TARGET: &str = "qwen_server";
/// The exporter of traces: its warnings say that a collector is away.
const EXPORTER_TARGET: &str = "opentelemetry";

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
    let lines = registry().with(filter(level));
    let _ = match format {
        LineFormat::Text => {
            let is_terminal = stderr().is_terminal();
            let layer = fmt::layer().with_target(false).with_ansi(is_terminal);
            lines.with(layer.with_writer(stderr)).try_init()
        }
        LineFormat::Json => {
            let layer = fmt::layer().fmt_fields(JsonFields::new()).event_format(json::JsonLines);
            lines.with(layer.with_writer(stderr)).try_init()
        }
    };
}

fn filter(level: LevelFilter) -> Targets {
    let complaints = level.min(LevelFilter::WARN);
    Targets::new().with_target(OWN_TARGET, level).with_target(EXPORTER_TARGET, complaints)
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn libraries_say_nothing_at_any_level() {
        let filter = filter(LevelFilter::TRACE);
        assert!(filter.would_enable("qwen_server::engine::thread", &Level::TRACE));
        for library in ["hyper::proto", "h2", "rustls", "tokenizers", "ureq", "llguidance", "log"] {
            assert!(!filter.would_enable(library, &Level::ERROR), "{library}");
        }
        assert!(filter.would_enable("opentelemetry_sdk", &Level::WARN));
        assert!(!filter.would_enable("opentelemetry_sdk", &Level::INFO));
    }
}
