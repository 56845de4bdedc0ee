//! Finding added tokens (`<|im_start|>`, `<tool_call>`, …) in text, before all else.

use super::TokenId;

/// The added tokens of a vocabulary, searched leftmost first, the longest at a position winning.
#[derive(Debug, Default)]
pub(super) struct AddedTokens {
    /// Longest first, so that the first hit at a position is the longest.
    tokens: Vec<(String, TokenId)>,
    /// Indices into `tokens` by first byte; most bytes begin none.
    by_first_byte: Vec<Vec<usize>>,
}

/// A stretch of text between, or one of, the added tokens.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Segment<'a> {
    /// Text that holds no added token; never empty.
    Text(&'a str),
    /// An added token.
    Token(TokenId),
}

impl AddedTokens {
    /// A searcher for `tokens`, none of which may be empty.
    pub(super) fn new(mut tokens: Vec<(String, TokenId)>) -> Self {
        tokens.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
        let mut by_first_byte = vec![Vec::new(); 256];
        for (index, (text, _)) in tokens.iter().enumerate() {
            by_first_byte[usize::from(text.as_bytes()[0])].push(index);
        }
        Self { tokens, by_first_byte }
    }

    /// The id of the added token spelled `text`.
    pub(super) fn id_of(&self, text: &str) -> Option<TokenId> {
        self.tokens.iter().find(|(token, _)| token == text).map(|(_, id)| *id)
    }

    /// Splits `text` at its added tokens.
    pub(super) fn split<'a>(&self, text: &'a str) -> Vec<Segment<'a>> {
        let mut segments = Vec::new();
        let (mut text_start, mut pos) = (0, 0);
        while pos < text.len() {
            let Some((token, id)) = self.token_at(&text.as_bytes()[pos..]) else {
                pos += 1;
                continue;
            };
            if text_start < pos {
                segments.push(Segment::Text(&text[text_start..pos]));
            }
            segments.push(Segment::Token(id));
            pos += token.len();
            text_start = pos;
        }
        if text_start < text.len() {
            segments.push(Segment::Text(&text[text_start..]));
        }
        segments
    }

    fn token_at(&self, rest: &[u8]) -> Option<(&str, TokenId)> {
        let candidates = self.by_first_byte.get(usize::from(rest[0]))?;
        candidates
            .iter()
            .map(|&index| &self.tokens[index])
            .find(|(token, _)| rest.starts_with(token.as_bytes()))
            .map(|(token, id)| (token.as_str(), *id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: leftmost, then longest; text before, between and after is kept whole.
    #[test]
    fn splits_at_the_leftmost_longest_token() {
        let tokens =
            AddedTokens::new(vec![("<a>".into(), 1), ("<a><b>".into(), 2), ("<b>".into(), 3)]);
        let segments = tokens.split("é<a><b><<b>x<a>");
        assert_eq!(
            segments,
            [
                Segment::Text("é"),
                Segment::Token(2),
                Segment::Text("<"),
                Segment::Token(3),
                Segment::Text("x"),
                Segment::Token(1),
            ]
        );
    }

    #[test]
    fn no_tokens_and_no_text_are_fine() {
        assert_eq!(AddedTokens::default().split("<a>"), [Segment::Text("<a>")]);
        assert_eq!(AddedTokens::new(vec![("<a>".into(), 1)]).split(""), []);
    }
}
