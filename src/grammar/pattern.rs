//! Regular expressions as terminals of Lark.

use std::fmt::Write as _;

use llguidance::regex_to_lark;

/// Classes such as `\d` mean ASCII, because that is what every engine that may check the output
/// agrees on.
pub(super) const ASCII_CLASSES: &str = "dws";

/// Any text with `text` in it.
pub fn text_pattern(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        let _ = write!(escaped, "\\u{{{:X}}}", u32::from(c));
    }
    format!("/(?s:.*){escaped}(?s:.*)/")
}

/// Any text in which `pattern` is found, as the `pattern` of a JSON schema means it.
///
/// # Errors
/// If it is anchored in a way that is not clear without parsing it.
pub fn search_pattern(pattern: &str) -> Result<String, String> {
    let inner = pattern.strip_prefix('^').unwrap_or(pattern);
    let at_end = inner.strip_suffix('$').filter(|rest| !ends_with_escape(rest));
    let (is_begun, is_ended) = (inner.len() < pattern.len(), at_end.is_some());
    let inner = at_end.unwrap_or(inner);
    if (is_begun || is_ended) && has_alternatives(inner) {
        return Err("anchors beside alternatives are not supported: use a group".to_owned());
    }
    let (before, after) =
        (if is_begun { "" } else { "(?s:.*)" }, if is_ended { "" } else { "(?s:.*)" });
    Ok(format!("/{before}(?:{}){after}/", regex_to_lark(inner, ASCII_CLASSES)))
}

/// Whether what follows `text` is escaped.
pub(super) fn ends_with_escape(text: &str) -> bool {
    text.chars().rev().take_while(|c| *c == '\\').count() % 2 == 1
}

/// Whether there is a `|` outside of groups and classes.
fn has_alternatives(regex: &str) -> bool {
    let (mut depth, mut is_in_class, mut is_escaped) = (0_usize, false, false);
    for c in regex.chars() {
        if std::mem::take(&mut is_escaped) {
            continue;
        }
        match c {
            '\\' => is_escaped = true,
            '[' => is_in_class = true,
            ']' => is_in_class = false,
            '(' if !is_in_class => depth += 1,
            ')' if !is_in_class => depth = depth.saturating_sub(1),
            '|' if !is_in_class && depth == 0 => return true,
            _ => {}
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anchors_say_where_more_may_come() {
        for (pattern, expected) in [
            ("a", "/(?s:.*)(?:a)(?s:.*)/"),
            ("^a", "/(?:a)(?s:.*)/"),
            ("a$", "/(?s:.*)(?:a)/"),
            ("^a$", "/(?:a)/"),
            (r"a\$", r"/(?s:.*)(?:a\$)(?s:.*)/"),
            ("a|b", "/(?s:.*)(?:a|b)(?s:.*)/"),
            (r"^(a|[|\]]|\|)$", r"/(?:(a|[|\]]|\|))/"),
        ] {
            assert_eq!(search_pattern(pattern).unwrap(), expected, "{pattern}");
        }
        assert!(search_pattern("^a|b$").is_err());
    }
}
