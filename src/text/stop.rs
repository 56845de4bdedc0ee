//! Stop strings: ending a text at the first of them without ever showing part of one.

use std::sync::Arc;

use crate::text::borders::Borders;

/// What may be shown after a piece of text came in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopOutcome {
    /// Text that is safe to send: no stop string can begin in it any more.
    pub text: String,
    /// The index of the stop string that ended the text.
    pub stopped: Option<usize>,
}

/// The stop strings of a request, compiled once for all its choices.
#[derive(Debug)]
pub struct StopStrings {
    patterns: Vec<Pattern>,
    include_stop: bool,
}

impl StopStrings {
    /// With `include_stop`, the stop string itself ends the text; otherwise the text ends before
    /// it. An empty stop string never matches.
    pub fn new(stops: Vec<String>, include_stop: bool) -> Self {
        Self { patterns: stops.into_iter().map(Pattern::new).collect(), include_stop }
    }

    /// The stop string at this index.
    pub fn get(&self, index: usize) -> &str {
        &self.patterns[index].text
    }
}

/// Searches a stream of text for stop strings.
///
/// The match that ends first wins; of several that end together, the longest. Text that may turn
/// out to be the beginning of a stop string is held back until that is decided.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Arc<StopStrings>,
    /// For each stop string, the length of its longest prefix that the text so far ends with.
    num_matched: Vec<u32>,
    /// The end of the text so far, as long as the longest stop string that may have begun in it.
    held: String,
    stopped: Option<usize>,
}

impl StopMatcher {
    /// A matcher for `stops` before any text.
    pub fn new(stops: Arc<StopStrings>) -> Self {
        let num_matched = vec![0; stops.patterns.len()];
        Self { stops, num_matched, held: String::new(), stopped: None }
    }

    /// Takes the next piece of text. After a match, everything that follows is dropped.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        if self.stopped.is_some() {
            return StopOutcome { text: String::new(), stopped: self.stopped };
        }
        let num_held = self.held.len();
        self.held.push_str(text);
        for (offset, byte) in text.bytes().enumerate() {
            if let Some(index) = self.advance(byte) {
                self.stopped = Some(index);
                let end = num_held + offset + 1;
                let num_hidden =
                    if self.stops.include_stop { 0 } else { self.stops.get(index).len() };
                let shown = end - num_hidden;
                let mut text = std::mem::take(&mut self.held);
                text.truncate(shown);
                return StopOutcome { text, stopped: self.stopped };
            }
        }
        let num_undecided = self.num_matched.iter().max().map_or(0, |num| *num as usize);
        let undecided = self.held.split_off(self.held.len() - num_undecided);
        let text = std::mem::replace(&mut self.held, undecided);
        StopOutcome { text, stopped: None }
    }

    /// Ends the text and returns what was held back, which cannot become a stop string any more.
    pub fn finish(&mut self) -> String {
        self.num_matched.fill(0);
        std::mem::take(&mut self.held)
    }

    /// Feeds one byte to every pattern; the longest that is complete, if any.
    fn advance(&mut self, byte: u8) -> Option<usize> {
        let mut longest: Option<usize> = None;
        let patterns = &self.stops.patterns;
        for (index, pattern) in patterns.iter().enumerate() {
            let is_complete = pattern.advance(&mut self.num_matched[index], byte);
            let is_longer =
                longest.is_none_or(|other| patterns[other].text.len() < pattern.text.len());
            if is_complete && is_longer {
                longest = Some(index);
            }
        }
        longest
    }
}

/// One stop string: constant time per byte, no look back.
#[derive(Debug)]
struct Pattern {
    text: String,
    borders: Borders,
}

impl Pattern {
    fn new(text: String) -> Self {
        let borders = Borders::new(text.as_bytes());
        Self { text, borders }
    }

    /// See [`Borders::advance`].
    fn advance(&self, num_matched: &mut u32, byte: u8) -> bool {
        self.borders.advance(self.text.as_bytes(), num_matched, &byte)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matcher(stops: &[&str], include_stop: bool) -> StopMatcher {
        let stops = stops.iter().map(ToString::to_string).collect();
        StopMatcher::new(Arc::new(StopStrings::new(stops, include_stop)))
    }

    fn outcome(text: &str, stopped: Option<usize>) -> StopOutcome {
        StopOutcome { text: text.to_owned(), stopped }
    }

    #[test]
    fn a_partial_match_is_held_and_released() {
        let mut matcher = matcher(&["\n\nUser:"], false);
        assert_eq!(matcher.push("Hi\n"), outcome("Hi", None));
        assert_eq!(matcher.push("\nUs"), outcome("", None));
        assert_eq!(matcher.push("e it\n"), outcome("\n\nUse it", None));
        assert_eq!(matcher.finish(), "\n");
    }

    #[test]
    fn a_match_over_several_pieces_ends_the_text() {
        for (include_stop, expected) in [(false, ["a", ""]), (true, ["a", "STOP"])] {
            let mut matcher = matcher(&["STOP"], include_stop);
            assert_eq!(matcher.push("aST"), outcome(expected[0], None));
            assert_eq!(matcher.push("OP and more"), outcome(expected[1], Some(0)));
            assert_eq!(matcher.push("more"), outcome("", Some(0)));
            assert_eq!(matcher.finish(), "");
        }
    }

    #[test]
    fn the_earliest_end_wins_and_then_the_longest() {
        assert_eq!(matcher(&["bcd", "c"], false).push("abcd"), outcome("ab", Some(1)));
        assert_eq!(matcher(&["c", "bc", "abcx"], false).push("abc"), outcome("a", Some(1)));
    }

    #[test]
    fn choices_share_stop_strings_and_nothing_else() {
        let mut first = matcher(&["STOP"], false);
        let mut second = StopMatcher::new(Arc::clone(&first.stops));
        assert_eq!(Arc::strong_count(&first.stops), 2);
        assert_eq!(first.push("ST"), outcome("", None));
        assert_eq!(second.push("OP"), outcome("OP", None));
        assert_eq!(first.push("OP"), outcome("", Some(0)));
    }

    #[test]
    fn overlapping_beginnings_are_found() {
        let mut matcher = matcher(&["aab"], false);
        assert_eq!(matcher.push("aaa"), outcome("a", None));
        assert_eq!(matcher.push("b"), outcome("", Some(0)));
    }

    #[test]
    fn nothing_to_match_holds_nothing() {
        assert_eq!(matcher(&[], false).push("é"), outcome("é", None));
        assert_eq!(matcher(&[""], true).push("é"), outcome("é", None));
    }

    /// What a search of the whole text says: the text to show and the stop string.
    fn whole_text_search(text: &str, stops: &[String], include_stop: bool) -> StopOutcome {
        for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let matching = stops
                .iter()
                .enumerate()
                .filter(|(_, stop)| !stop.is_empty() && text[..end].ends_with(stop.as_str()));
            let Some((index, stop)) = matching.rev().max_by_key(|(_, stop)| stop.len()) else {
                continue;
            };
            let shown = if include_stop { end } else { end - stop.len() };
            return outcome(&text[..shown], Some(index));
        }
        outcome(text, None)
    }

    // Goal: whatever the split, the same text and stop string as a search of the whole text, and
    // nothing shown that a stop string may still begin in.
    // Method: a tiny alphabet, so that partial and overlapping matches are the rule.
    proptest! {
        #[test]
        fn any_split_equals_a_search_of_the_whole(
            pieces in prop::collection::vec("[ab中é]{0,4}", 0..12),
            stops in prop::collection::vec("[ab中é]{0,5}", 0..4),
            include_stop in any::<bool>(),
        ) {
            let text = pieces.concat();
            let expected = whole_text_search(&text, &stops, include_stop);
            let mut matcher = StopMatcher::new(Arc::new(StopStrings::new(stops, include_stop)));
            let mut shown = String::new();
            let mut stopped = None;
            for piece in &pieces {
                let outcome = matcher.push(piece);
                shown.push_str(&outcome.text);
                stopped = outcome.stopped;
                prop_assert!(expected.text.starts_with(&shown));
            }
            shown.push_str(&matcher.finish());
            prop_assert_eq!(StopOutcome { text: shown, stopped }, expected);
        }
    }
}
