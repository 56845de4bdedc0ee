//! Text outside of calls: passes it on up to an opening tag.

use crate::chat::answer::Pieces;

/// What a character did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing.
    Nothing,
    /// It ended the tag with this index.
    Tag(usize),
}

/// Looks for opening tags. White space before a tag, and what may be a tag, is held back.
#[derive(Clone, Debug)]
pub(super) struct TagFinder {
    tags: &'static [&'static str],
    /// White space that has not been passed on.
    space: String,
    /// What may become a tag: a beginning of one of them.
    partial: String,
}

impl TagFinder {
    /// A finder of `tags`, each of which holds `<` at its beginning only.
    pub(super) fn new(tags: &'static [&'static str]) -> Self {
        Self { tags, space: String::new(), partial: String::new() }
    }

    /// Reads a character. At the end of a tag, white space before it is still held.
    pub(super) fn push(&mut self, c: char, out: &mut Pieces) -> Found {
        self.partial.push(c);
        if let Some(index) = self.tags.iter().position(|tag| *tag == self.partial) {
            self.partial.clear();
            return Found::Tag(index);
        }
        if self.tags.iter().any(|tag| tag.starts_with(self.partial.as_str())) {
            return Found::Nothing;
        }
        // Tags begin with `<` and have no other: only the last character may begin one.
        self.partial.pop();
        if !self.partial.is_empty() {
            let text = std::mem::take(&mut self.partial);
            self.pass(&text, out);
        }
        if c == '<' {
            self.partial.push(c);
        } else if c.is_whitespace() {
            self.space.push(c);
        } else {
            self.pass(c.encode_utf8(&mut [0; 4]), out);
        }
        Found::Nothing
    }

    /// Passes on `text`, after the white space before it.
    pub(super) fn pass(&mut self, text: &str, out: &mut Pieces) {
        out.content.push_str(&std::mem::take(&mut self.space));
        out.content.push_str(text);
    }

    /// Forgets white space that only set a call apart.
    pub(super) fn drop_space(&mut self) {
        self.space.clear();
    }

    /// Ends the text.
    pub(super) fn finish(&mut self, has_calls: bool, out: &mut Pieces) {
        let partial = std::mem::take(&mut self.partial);
        if has_calls && partial.is_empty() {
            self.drop_space();
        }
        self.pass(&partial, out);
    }
}
