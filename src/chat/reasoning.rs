//! Tells what a model thinks from what it answers: text in `<think>` tags is reasoning.

/// Opens the reasoning.
pub const OPEN_TAG: &str = "<think>";
/// Ends the reasoning.
pub const CLOSE_TAG: &str = "</think>";

/// Ends a reasoning, as templates write it.
pub const END: &str = "\n</think>\n\n";

/// Where a generated text begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReasoningStart {
    /// Before the reasoning: the model opens it, or does not reason.
    Before,
    /// In the reasoning: the prompt opened it.
    Inside,
}

impl ReasoningStart {
    /// Where the text behind a rendered prompt begins.
    pub fn after_prompt(prompt: &str) -> Self {
        if prompt.trim_end().ends_with(OPEN_TAG) { Self::Inside } else { Self::Before }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Before,
    Inside,
    /// Behind the reasoning, before the first character of the content.
    Behind,
    Content,
}

/// Divides one text, piece by piece. White space around the reasoning belongs to neither side.
#[derive(Clone, Debug)]
pub struct ReasoningParser {
    state: State,
    /// White space, and behind it what may become a tag.
    held: String,
    has_begun: bool,
}

impl ReasoningParser {
    /// A parser before any text.
    pub fn new(start: ReasoningStart) -> Self {
        let state = match start {
            ReasoningStart::Before => State::Before,
            ReasoningStart::Inside => State::Inside,
        };
        Self { state, held: String::new(), has_begun: false }
    }

    /// Whether the next text is reasoning, as far as is known.
    pub fn is_reasoning(&self) -> bool {
        self.state == State::Inside
    }

    /// Reads the next piece: appends what is reasoning, and returns what is content.
    pub fn push(&mut self, text: &str, reasoning: &mut String) -> String {
        let mut content = String::new();
        let mut rest = text.char_indices();
        while self.state != State::Content
            && let Some((_, c)) = rest.next()
        {
            self.push_char(c, reasoning, &mut content);
        }
        content.push_str(rest.as_str());
        content
    }

    fn push_char(&mut self, c: char, reasoning: &mut String, content: &mut String) {
        self.held.push(c);
        match self.state {
            State::Before => {
                let tag = self.held.trim_start();
                if tag == OPEN_TAG {
                    self.held.clear();
                    self.state = State::Inside;
                } else if !OPEN_TAG.starts_with(tag) {
                    self.state = State::Content;
                    content.push_str(&std::mem::take(&mut self.held));
                }
            }
            State::Inside => self.push_inside(reasoning),
            State::Behind if c.is_whitespace() => self.held.clear(),
            State::Behind | State::Content => {
                self.state = State::Content;
                content.push_str(&std::mem::take(&mut self.held));
            }
        }
    }

    fn push_inside(&mut self, reasoning: &mut String) {
        let tag_start = self.held.rfind('<').unwrap_or(self.held.len());
        let tag = &self.held[tag_start..];
        if tag == CLOSE_TAG {
            self.release(tag_start, reasoning);
            self.held.clear();
            self.state = State::Behind;
        } else {
            let end = if CLOSE_TAG.starts_with(tag) { tag_start } else { self.held.len() };
            self.release(end, reasoning);
        }
    }

    /// Passes on what is held before `end`, but for white space at either side.
    fn release(&mut self, end: usize, reasoning: &mut String) {
        let text = self.held[..end].trim_end();
        let text = if self.has_begun { text } else { text.trim_start() };
        if !text.is_empty() {
            reasoning.push_str(text);
            self.has_begun = true;
            let num_read = self.held[..end].trim_end().len();
            self.held.drain(..num_read);
        }
    }

    /// Ends the text.
    pub fn finish(&mut self, reasoning: &mut String) -> String {
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Before | State::Content => held,
            State::Inside => {
                let rest = held.trim_end();
                reasoning.push_str(if self.has_begun { rest } else { rest.trim_start() });
                String::new()
            }
            State::Behind => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(start: ReasoningStart, pieces: &[&str]) -> (String, String) {
        let mut parser = ReasoningParser::new(start);
        let (mut reasoning, mut content) = (String::new(), String::new());
        for piece in pieces {
            content.push_str(&parser.push(piece, &mut reasoning));
        }
        content.push_str(&parser.finish(&mut reasoning));
        (reasoning, content)
    }

    #[test]
    fn the_two_sides_come_apart_without_the_space_between() {
        let both = |reasoning: &str, content: &str| (reasoning.to_owned(), content.to_owned());
        let before = |text| read(ReasoningStart::Before, &[text]);
        let inside = |text| read(ReasoningStart::Inside, &[text]);
        let text = "<think>\na  b\n</think>\n\nc <think>d</think>";
        assert_eq!(before(text), both("a  b", "c <think>d</think>"));
        assert_eq!(inside("\na <b> </b>\n</think>\nc\n"), both("a <b> </b>", "c\n"));
        assert_eq!(inside("cut </thi"), both("cut </thi", ""));
        assert_eq!(inside("<think>"), both("<think>", ""));
        assert_eq!(before(" none <think>"), both("", " none <think>"));
        assert_eq!(before("<think>\n\n</think>\n\nx"), both("", "x"));
        assert_eq!(before("\n <thin"), both("", "\n <thin"));
    }

    #[test]
    fn the_prompt_says_where_the_text_begins() {
        use ReasoningStart::{Before, Inside};
        let cases = [
            ("<|im_start|>assistant\n<think>\n", Inside),
            ("<|im_start|>assistant\n", Before),
            ("<|im_start|>assistant\n<think>\n\n</think>\n\n", Before),
        ];
        for (prompt, start) in cases {
            assert_eq!(ReasoningStart::after_prompt(prompt), start, "{prompt}");
        }
    }

    // Goal: how the text is cut does not matter, and only tags and white space are lost.
    proptest! {
        #[test]
        fn any_split_reads_the_same(
            pieces in prop::collection::vec(
                prop_oneof![
                    Just("<think>".to_owned()),
                    Just("</think>".to_owned()),
                    "[<>/think \n中]{0,6}",
                ],
                0..10,
            ),
            is_inside in any::<bool>(),
        ) {
            let start = if is_inside { ReasoningStart::Inside } else { ReasoningStart::Before };
            let text = pieces.concat();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let chars: Vec<String> = text.chars().map(String::from).collect();
            let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
            let whole = read(start, &[&text]);
            prop_assert_eq!(&read(start, &pieces), &whole);
            prop_assert_eq!(&read(start, &chars), &whole);
            let letters = |text: &str| -> Vec<char> {
                text.chars().filter(|c| !c.is_whitespace()).collect()
            };
            let (reasoning, content) = &whole;
            let joined = letters(&format!("{reasoning}{content}"));
            let all = letters(&text);
            let num_tags = all.len() - joined.len();
            prop_assert!([0, 7, 8, 15].contains(&num_tags), "{num_tags}");
        }
    }
}
