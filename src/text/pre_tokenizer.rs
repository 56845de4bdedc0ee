//! Qwen's pre-tokenisation: normalising text and cutting it into pieces that merges never cross.

use std::borrow::Cow;

use tokenizers::NormalizedString;
use tokenizers::utils::SysRegex;

/// The pattern as the model families publish it.
pub(super) const PUBLISHED_PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// The published pattern without its lookahead `\s+(?!\S)|`, which `visit_pieces` applies by hand.
/// Free of it, the pattern runs on a finite automaton: linear time, no backtracking limit.
const PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+",
);

/// Cuts text into pieces.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    pattern: SysRegex,
}

impl PreTokenizer {
    pub(super) fn new() -> Self {
        Self { pattern: SysRegex::new(PATTERN).expect("the constant pattern compiles") }
    }

    /// Calls `visit` with every piece of `text` in order, until it fails.
    pub(super) fn visit_pieces<E>(
        &self,
        text: &str,
        mut visit: impl FnMut(&str) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut pos = 0;
        'rescan: while pos < text.len() {
            let rest_start = pos;
            for (start, end) in self.pattern.find_iter(&text[rest_start..]) {
                debug_assert_eq!(rest_start + start, pos, "every character belongs to a piece");
                let end = rest_start + end;
                let piece = &text[pos..end];
                let kept = if end < text.len() { before_given_back_space(piece) } else { piece };
                visit(kept)?;
                pos += kept.len();
                if pos < end {
                    continue 'rescan;
                }
            }
            assert_eq!(pos, text.len(), "every character belongs to a piece");
        }
        Ok(())
    }
}

/// The part of `piece` before its last space, which belongs to the word that follows. Only a run of
/// several spaces gives one back; a run that ends a line is a piece of its own.
fn before_given_back_space(piece: &str) -> &str {
    let Some(last) = piece.chars().next_back() else { return piece };
    let kept = &piece[..piece.len() - last.len_utf8()];
    let is_space_run = last.is_whitespace() && !matches!(last, '\r' | '\n') && !kept.is_empty();
    if is_space_run { kept } else { piece }
}

/// `text` in Unicode normal form C.
///
/// Only the stretches that may change take the exact way, which needs many times their memory. A
/// stretch begins with the character before it, which its marks may join, and ends before the next
/// character that joins nothing on its left.
pub(super) fn normalize(text: &str) -> Cow<'_, str> {
    let mut normalized = String::new();
    let mut num_done = 0;
    while let Some(offset) = text[num_done..].find(|character| !is_always_nfc(character)) {
        let unchanged = &text[num_done..num_done + offset];
        let base_len = unchanged.chars().next_back().map_or(0, char::len_utf8);
        let start = num_done + offset - base_len;
        let end = text[num_done + offset..]
            .find(is_always_nfc)
            .map_or(text.len(), |len| num_done + offset + len);
        let mut stretch = NormalizedString::from(&text[start..end]);
        stretch.nfc();
        normalized.push_str(&text[num_done..start]);
        normalized.push_str(stretch.get());
        num_done = end;
    }
    if num_done == 0 {
        return Cow::Borrowed(text);
    }
    normalized.push_str(&text[num_done..]);
    Cow::Owned(normalized)
}

/// Whether `character` is unchanged by normal form C whatever stands around it, as long as all its
/// neighbours are of this kind too. Blocks without combining marks and singletons that cover most
/// text; the rest takes the exact way.
fn is_always_nfc(character: char) -> bool {
    matches!(
        u32::from(character),
        0..=0x2ff
            | 0x400..=0x482
            | 0x48a..=0x52f
            | 0x5d0..=0x5ea
            | 0x621..=0x64a
            | 0x660..=0x66f
            | 0xe01..=0xe30
            | 0xe32..=0xe33
            | 0xe3f..=0xe46
            | 0x1e00..=0x1eff
            | 0x2002..=0x206f
            | 0x2190..=0x2328
            | 0x232b..=0x23ff
            | 0x2500..=0x2775
            | 0x3000..=0x3029
            | 0x3041..=0x3096
            | 0x30a1..=0x30ff
            | 0x4e00..=0x9fff
            | 0xac00..=0xd7a3
            | 0xff00..=0xffef
            | 0x1f300..=0x1faff
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(text: &str) -> Vec<String> {
        let mut pieces = Vec::new();
        let visited: Result<(), ()> = PreTokenizer::new().visit_pieces(text, |piece| {
            pieces.push(piece.to_owned());
            Ok(())
        });
        visited.unwrap();
        pieces
    }

    fn published_pieces(text: &str) -> Vec<String> {
        let pattern = SysRegex::new(PUBLISHED_PATTERN).unwrap();
        pattern.find_iter(text).map(|(start, end)| text[start..end].to_owned()).collect()
    }

    #[test]
    fn spaces_go_with_the_next_word() {
        assert_eq!(pieces("a   b"), ["a", "  ", " b"]);
        assert_eq!(pieces("a  7"), ["a", " ", " ", "7"]);
        assert_eq!(pieces("a \n  "), ["a", " \n", "  "]);
        assert_eq!(pieces("x\u{3000}\u{3000}y!\r\n"), ["x", "\u{3000}", "\u{3000}y", "!\r\n"]);
    }

    // Goal: the pattern without lookahead cuts exactly where the published one does.
    // Method: random text dense in the characters the pattern distinguishes.
    proptest! {
        #[test]
        fn pieces_equal_those_of_the_published_pattern(
            text in concat!(
                "([ \\t\\r\\n\u{a0}\u{3000}\u{85}]{0,4}(['’](s|T|ſ|ll|RE)|",
                "[a-cé中\u{301}]{0,3}|[0-9Ⅷ²]{0,2}|[!?<_🎉]{0,3})){0,12}",
            )
        ) {
            prop_assert_eq!(pieces(&text), published_pieces(&text));
        }

        #[test]
        fn pieces_of_any_text_equal_those_of_the_published_pattern(text in "\\PC{0,40}") {
            prop_assert_eq!(pieces(&text), published_pieces(&text));
        }
    }

    // Goal: the quick way never disagrees with the exact one.
    // Method: every pair (character, neighbour) that could compose is covered by normalising each
    // character between two others of its kind, and the whole set in sequence.
    #[test]
    fn quick_characters_are_unchanged_by_normalisation() {
        let quick: String =
            ('\0'..=char::MAX).filter(|character| is_always_nfc(*character)).collect();
        let mut normalized = NormalizedString::from(quick.as_str());
        normalized.nfc();
        assert_eq!(normalized.get(), quick);
    }

    #[test]
    fn decomposed_text_is_composed() {
        assert_eq!(normalize("cafe\u{301} ti\u{1ebf}ng"), "café tiếng");
        assert!(matches!(normalize("tiếng Việt 中文 🎉"), Cow::Borrowed(_)));
    }

    // Goal: normalising stretches equals normalising the whole. Method: text dense in characters
    // that compose, reorder, or are excluded from composition.
    proptest! {
        #[test]
        fn stretches_equal_the_whole(
            text in concat!(
                "[a-eqかハ\u{1112}\u{1161}\u{11ab}가क\u{93c}",
                "\u{928}\u{9c7}\u{9be}\u{301}\u{323}\u{302}\u{31b}\u{344}\u{3099}\u{653}",
                "ا\u{212b}\u{2000}ﬁ\u{fb2a} \u{1d15e}]{0,20}",
            )
        ) {
            let mut whole = NormalizedString::from(text.as_str());
            whole.nfc();
            prop_assert_eq!(normalize(&text), whole.get());
        }
    }
}
