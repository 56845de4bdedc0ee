//! Goal: keep the shape of the code base without a reviewer having to remember it.
//!
//! Method: read every file under `src/` once and collect all complaints. Comments, string literals
//! and unit tests do not count. Rules that the compiler or clippy can check are not repeated here.

use std::fs;
use std::path::{Path, PathBuf};

/// Every module and what of ours it may use, beside itself and what [`FOR_EVERYONE`] names. An
/// entry with `::` allows only what is below it. The first entry that fits a file counts.
const LAYERS: &[(&str, &[&str])] = &[
    ("lib", &["*"]),
    ("main", &["*"]),
    ("cli", &["*"]),
    ("http", &["openai", "anthropic", "dashscope", "chat", "engine", "access", "ledger"]),
    (
        "chat",
        &[
            "openai",
            "anthropic",
            "dashscope",
            "text",
            "grammar",
            "engine::request",
            "engine::event",
        ],
    ),
    ("grammar", &["text", "device::thread_clock"]),
    (
        "engine",
        &[
            "scheduler",
            "grammar",
            "kv",
            "sampling::params",
            "sampling::SamplingParams",
            "device::threads",
        ],
    ),
    (
        "runner",
        &[
            "scheduler::step",
            "scheduler::SeqId",
            "kv::BlockTable",
            "kv::BlockId",
            "models",
            "weights",
            "sampling",
            "ops",
            "device",
        ],
    ),
    ("models", &["layers", "weights"]),
    ("layers", &["ops", "weights"]),
    ("weights", &["device", "ops::row_format"]),
    ("sampling::params", &[]),
    ("sampling", &["ops", "scheduler::step"]),
    ("scheduler", &["kv", "sampling::params", "sampling::SamplingParams"]),
    ("ops", &["device"]),
    ("bundle", &[]),
    ("kv", &[]),
    ("text", &[]),
    ("openai", &[]),
    ("anthropic", &[]),
    ("dashscope", &["openai"]),
    ("device", &[]),
    ("access", &[]),
    ("ledger", &[]),
    ("config", &[]),
    ("telemetry", &[]),
];

/// Plain data and names that any module may use.
const FOR_EVERYONE: &[&str] =
    &["text::TokenId", "text::token", "text::TokenBitmask", "text::bitmask", "telemetry", "config"];

/// One rule about words in code.
struct Ban {
    /// The words; any of them is a complaint.
    words: &'static [&'static str],
    /// Where it applies; empty means everywhere. A module covers what is below it.
    within: &'static [&'static str],
    /// Modules that are exempt.
    except: &'static [&'static str],
    instead: &'static str,
}

const PURE: &[&str] = &["scheduler", "kv", "sampling::params", "runner::batch", "access"];

const BANS: &[Ban] = &[
    Ban {
        words: &["candle*", "tokio", "Instant", "SystemTime", "rand", "std::thread"],
        within: PURE,
        except: &[],
        instead: "this module is pure: pass the value in",
    },
    Ban {
        words: &["candle*"],
        within: &["http", "openai", "chat", "engine", "ledger", "telemetry", "config"],
        except: &[],
        instead: "tensors live below the runner",
    },
    Ban {
        words: &["cfg(feature"],
        within: &["models", "layers"],
        except: &[],
        instead: "hide the device behind an op",
    },
    Ban {
        words: &["cudarc", "cfg(feature = \"cuda\""],
        within: &[],
        except: &["ops", "device"],
        instead: "hide the device behind an op",
    },
    Ban {
        words: &["unsafe"],
        within: &[],
        except: &["ops", "device"],
        instead: "only ops and devices need it",
    },
    Ban {
        words: &["std::env"],
        within: &[],
        except: &["config"],
        instead: "read the environment in `config` only",
    },
    Ban {
        words: &["println!", "print!", "eprintln!", "eprint!"],
        within: &[],
        except: &["cli", "main"],
        instead: "use `tracing`, or return the text",
    },
    Ban {
        words: &["Instant::now", "SystemTime::now"],
        within: &["engine"],
        except: &["engine::thread"],
        instead: "the engine thread reads the clock",
    },
    Ban {
        words: &["Instant::now"],
        within: &[],
        except: &["engine", "http", "telemetry", "cli"],
        instead: "pass the time in",
    },
    Ban {
        words: &["clippy::too_many_arguments", "clippy::too_many_lines", "dbg!", "todo!"],
        within: &[],
        except: &[],
        instead: "simplify, or finish it",
    },
    Ban {
        words: &["mod utils", "mod common", "mod helpers", "mod misc", "mod types", "mod util"],
        within: &[],
        except: &[],
        instead: "name the module after what it does",
    },
];

/// What `openai` may name outside of itself: a wire schema has no logic.
const WIRE_CRATES: &[&str] = &["serde", "serde_json", "std", "crate", "super", "self"];

const MAX_FILE_LINES: usize = 600;
const MAX_FUNCTION_LINES: usize = 70;
const MAX_PARAMETERS: usize = 5;
/// Functions whose parameters a trait of another crate decides.
const FOREIGN_SIGNATURES: &[&str] = &["cpu_fwd", "cuda_fwd"];

/// A source file, ready to be judged.
struct Source {
    name: String,
    /// `engine::thread` for `src/engine/thread.rs`.
    module: String,
    /// The text as written.
    text: String,
    /// The lines before the unit tests, without comments and without what literals contain.
    code: Vec<String>,
}

#[test]
fn tidy() {
    let mut complaints = Vec::new();
    for source in sources() {
        check_layers(&source, &mut complaints);
        check_bans(&source, &mut complaints);
        check_wire_crates(&source, &mut complaints);
        check_sizes(&source, &mut complaints);
        check_signatures(&source, &mut complaints);
        check_open_ends(&source, &mut complaints);
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

fn check_layers(source: &Source, complaints: &mut Vec<String>) {
    let Some((_, allowed)) = LAYERS.iter().find(|(module, _)| is_within(&source.module, module))
    else {
        complaints.push(format!("{}: a module that the layers do not know", source.name));
        return;
    };
    if allowed.contains(&"*") {
        return;
    }
    let own = top(&source.module);
    for used in used_paths(&source.code.join("\n")) {
        let is_allowed = top(&used) == own
            || allowed.iter().chain(FOR_EVERYONE).any(|module| is_within(&used, module));
        if !is_allowed {
            complaints.push(format!("{}: must not use `{used}`", source.name));
        }
    }
    // `sampling::params` may not even use its own module.
    if source.module == "sampling::params" {
        let others = used_paths(&source.code.join("\n")).into_iter();
        let others = others.filter(|used| top(used) == "sampling" && !is_within(used, own));
        complaints.extend(others.map(|used| format!("{}: must not use `{used}`", source.name)));
    }
}

fn check_bans(source: &Source, complaints: &mut Vec<String>) {
    let covers = |modules: &[&str]| modules.iter().any(|module| is_within(&source.module, module));
    for ban in BANS {
        if (!ban.within.is_empty() && !covers(ban.within)) || covers(ban.except) {
            continue;
        }
        for (number, line) in (1..).zip(&source.code) {
            for word in ban.words.iter().filter(|word| names(line, word)) {
                let instead = ban.instead;
                complaints.push(format!("{}:{number}: `{word}`: {instead}", source.name));
            }
        }
    }
}

fn check_wire_crates(source: &Source, complaints: &mut Vec<String>) {
    if !is_within(&source.module, "openai") {
        return;
    }
    for (number, line) in (1..).zip(&source.code) {
        if let Some(path) = line.trim_start().strip_prefix("use ") {
            let used = first_word(path);
            if !WIRE_CRATES.contains(&used) {
                complaints.push(format!("{}:{number}: `{used}` in wire types", source.name));
            }
        }
    }
}

fn check_sizes(source: &Source, complaints: &mut Vec<String>) {
    if MAX_FILE_LINES < source.code.len() {
        complaints.push(format!("{}: {} lines; split it", source.name, source.code.len()));
    }
    let mut open: Option<(usize, usize, &str)> = None;
    for (number, line) in (1..).zip(&source.code) {
        let indent = line.len() - line.trim_start().len();
        if open.is_none()
            && let Some(name) = function_name(line)
        {
            open = Some((number, indent, name));
        }
        if let Some((start, own_indent, name)) = open
            && (line.trim_end() == format!("{}}}", " ".repeat(own_indent))
                || (line.trim_end().ends_with(['}', ';']) && number == start))
        {
            let length = number - start + 1;
            if MAX_FUNCTION_LINES < length {
                complaints.push(format!("{}:{start}: `{name}` has {length} lines", source.name));
            }
            open = None;
        }
    }
}

fn check_signatures(source: &Source, complaints: &mut Vec<String>) {
    let code = source.code.join("\n");
    for (index, _) in code.match_indices("fn ") {
        let signature = &code[index..];
        let Some(parameters) = signature.find('(').map(|open| inside(&signature[open..])) else {
            continue;
        };
        let name = first_word(&signature[3..]);
        // `fn(u32)` types and `Fn` bounds have no name.
        if name.is_empty() || signature[3 + name.len()..].starts_with(|c| c != '(' && c != '<') {
            continue;
        }
        let names = split_outside_brackets(parameters);
        let count = names.iter().filter(|name| !name.trim_end().ends_with("self")).count();
        if MAX_PARAMETERS < count && !FOREIGN_SIGNATURES.contains(&name) {
            complaints.push(format!("{}: `{name}` has {count} parameters", source.name));
        }
    }
}

fn check_open_ends(source: &Source, complaints: &mut Vec<String>) {
    for (number, line) in (1..).zip(source.text.lines()) {
        if ["TODO", "FIXME", "XXX"].iter().any(|word| names(line, word)) {
            complaints.push(format!("{}:{number}: an open end; open an issue", source.name));
        }
    }
}

/// Whether `path` is `module` or below it.
fn is_within(path: &str, module: &str) -> bool {
    path.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

fn top(path: &str) -> &str {
    path.split("::").next().unwrap_or_default()
}

fn first_word(text: &str) -> &str {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default()
}

/// Whether `line` has `word` as a whole; a trailing `*` also matches longer words.
fn names(line: &str, word: &str) -> bool {
    let (word, is_prefix) = word.strip_suffix('*').map_or((word, false), |stem| (stem, true));
    let is_inner = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(index, _)| {
        let starts = !line[..index].ends_with(is_inner);
        let ends = is_prefix
            || !word.ends_with(is_inner)
            || !line[index + word.len()..].starts_with(is_inner);
        starts && ends
    })
}

fn function_name(line: &str) -> Option<&str> {
    let (before, after) = line.split_once("fn ")?;
    let is_declaration = before.split_whitespace().all(|word| {
        ["pub", "async", "unsafe", "const", "extern", "in"].contains(&first_word(word))
            || word.starts_with('"')
    });
    is_declaration.then(|| first_word(after))
}

/// Every path of ours that the code names, with groups written out: `crate::a::{b, c::d}` is
/// `a::b` and `a::c::d`.
fn used_paths(code: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for (index, _) in code.match_indices("crate::") {
        if !code[..index].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            expand("", &code[index + "crate::".len()..], &mut paths);
        }
    }
    paths
}

/// Writes out the path at the beginning of `text`.
fn expand(prefix: &str, text: &str, paths: &mut Vec<String>) {
    let text = text.trim_start();
    if text.starts_with('{') {
        for part in split_outside_brackets(inside(text)) {
            expand(prefix, part, paths);
        }
        return;
    }
    let word = first_word(text);
    let path = match prefix {
        "" => word.to_owned(),
        _ if word.is_empty() || word == "self" => prefix.to_owned(),
        _ => format!("{prefix}::{word}"),
    };
    match text[word.len()..].strip_prefix("::") {
        Some(rest) if !rest.starts_with('<') => expand(&path, rest, paths),
        _ => paths.push(path),
    }
}

/// What stands between the bracket at the beginning of `text` and its partner.
fn inside(text: &str) -> &str {
    let mut depth = 0;
    for (index, character) in text.char_indices() {
        match character {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return &text[1..index];
        }
    }
    &text[1..]
}

/// The parts between commas that are outside of all brackets, without empty ones.
fn split_outside_brackets(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0, 0, Vec::new());
    let mut previous = ' ';
    for (index, character) in text.char_indices() {
        match character {
            '(' | '[' | '{' | '<' => depth += 1,
            '>' if previous == '-' || previous == '=' => {}
            ')' | ']' | '}' | '>' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
        previous = character;
    }
    parts.push(&text[start..]);
    parts.retain(|part| !part.trim().is_empty());
    parts
}

fn sources() -> Vec<Source> {
    let mut files = Vec::new();
    collect_rust_files(Path::new("src"), &mut files);
    files.sort();
    assert!(!files.is_empty(), "run from the package's directory");
    files.iter().map(|path| Source::read(path)).collect()
}

fn collect_rust_files(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("readable directory") {
        let path = entry.expect("directory entry").path();
        if path.is_dir() {
            collect_rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs")
            // Unit tests that outgrew their file.
            && path.file_name().is_none_or(|name| name != "tests.rs")
        {
            files.push(path);
        }
    }
}

impl Source {
    fn read(path: &Path) -> Self {
        let name = path.to_string_lossy().replace('\\', "/");
        let text = fs::read_to_string(path).expect("readable source file");
        let module = name.trim_start_matches("src/").trim_end_matches(".rs").replace('/', "::");
        let code = production_lines(&text);
        Self { name, module, text, code }
    }
}

/// Everything before the unit tests at the end of the file, without comments; literals keep their
/// quotes and what `cfg(feature = "…")` says.
fn production_lines(text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    // A test module in a file of its own is declared at the top, where nothing ends.
    let begins_tests =
        |pair: &[&str]| pair[0] == "#[cfg(test)]" && pair[1].starts_with("mod tests {");
    let end = lines.windows(2).position(begins_tests).unwrap_or(lines.len());
    lines[..end]
        .iter()
        .map(|&line| {
            let code = strip_comment(line);
            if code.trim_start().starts_with("#[") || code.contains("cfg(") {
                code.to_owned()
            } else {
                blank_literals(code)
            }
        })
        .collect()
}

fn strip_comment(line: &str) -> &str {
    let mut is_literal = false;
    let bytes = line.as_bytes();
    for (index, &byte) in bytes.iter().enumerate() {
        let is_escaped = index != 0 && bytes[index - 1] == b'\\';
        // A quote in single quotes is a character.
        let is_character = index != 0 && bytes[index - 1] == b'\'';
        if byte == b'"' && !is_escaped && !is_character {
            is_literal = !is_literal;
        }
        if !is_literal && line[index..].starts_with("//") {
            return &line[..index];
        }
        if !line.is_char_boundary(index + 1) {
            return line;
        }
    }
    line
}

/// Empties string literals that begin and end on this line.
fn blank_literals(line: &str) -> String {
    let parts: Vec<_> = line.split('"').collect();
    if parts.len() % 2 == 0 {
        return line.to_owned();
    }
    let keep = |(index, part): (usize, &&str)| {
        if index % 2 == 0 { (*part).to_owned() } else { String::new() }
    };
    parts.iter().enumerate().map(keep).collect::<Vec<_>>().join("\"")
}

#[test]
fn paths_are_written_out() {
    let code = "use crate::kv::{BlockId, manager::{self, OutOfBlocks}};\nlet x = crate::text::f();";
    let expected = ["kv::BlockId", "kv::manager", "kv::manager::OutOfBlocks", "text::f"];
    assert_eq!(used_paths(code), expected);
}

#[test]
fn words_are_whole() {
    assert!(names("use rand::Rng;", "rand"));
    assert!(!names("let operand = random();", "rand"));
    assert!(names("use candle_core::Tensor;", "candle*"));
    assert!(!names("eprintln!(", "println!"));
    assert!(names("    unsafe { f() }", "unsafe"));
    assert!(!names("unsafe_op_in_unsafe_fn", "unsafe"));
}

#[test]
fn comments_and_literals_do_not_count() {
    assert_eq!(strip_comment("let url = \"http://x\"; // crate::http"), "let url = \"http://x\"; ");
    assert_eq!(blank_literals("f(\"println!\", x)"), "f(\"\", x)");
    assert_eq!(
        split_outside_brackets("a: F<A, B>, b: fn(u8, u8) -> u8"),
        ["a: F<A, B>", " b: fn(u8, u8) -> u8"]
    );
}
