//! Stop sequences of tokens: ending an output at the first of them without ever showing part of
//! one. What stop strings are to text, these are to token ids.

use std::sync::Arc;

use crate::text::TokenId;
use crate::text::borders::Borders;

/// What may be decoded after a token came in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SequenceOutcome {
    /// Tokens, in order, that belong to no stop sequence any more.
    pub released: Vec<TokenId>,
    /// Whether a stop sequence is complete.
    pub is_stopped: bool,
}

/// The stop sequences of a request, compiled once for all its choices.
#[derive(Debug, Default)]
pub struct StopSequences {
    patterns: Vec<(Vec<TokenId>, Borders)>,
    include_stop: bool,
}

impl StopSequences {
    /// With `include_stop`, the sequence itself ends the output; otherwise the output ends before
    /// it. An empty sequence never matches.
    pub fn new(sequences: Vec<Vec<TokenId>>, include_stop: bool) -> Self {
        let pattern = |tokens: Vec<TokenId>| {
            let borders = Borders::new(&tokens);
            (tokens, borders)
        };
        Self { patterns: sequences.into_iter().map(pattern).collect(), include_stop }
    }
}

/// Searches a stream of tokens for stop sequences.
///
/// The match that ends first wins; of several that end together, the longest. Tokens that may turn
/// out to begin a stop sequence are held back until that is decided.
#[derive(Clone, Debug)]
pub struct SequenceMatcher {
    stops: Arc<StopSequences>,
    /// For each sequence, the length of its longest prefix that the tokens so far end with.
    num_matched: Vec<u32>,
    held: Vec<TokenId>,
}

impl SequenceMatcher {
    /// A matcher before any token.
    pub fn new(stops: Arc<StopSequences>) -> Self {
        let num_matched = vec![0; stops.patterns.len()];
        Self { stops, num_matched, held: Vec::new() }
    }

    /// Takes the next token. Nothing may follow a match.
    pub fn push(&mut self, token: TokenId) -> SequenceOutcome {
        if self.num_matched.is_empty() {
            return SequenceOutcome { released: vec![token], is_stopped: false };
        }
        self.held.push(token);
        let mut longest = None;
        for ((tokens, borders), num) in self.stops.patterns.iter().zip(&mut self.num_matched) {
            if borders.advance(tokens, num, &token) {
                longest = longest.max(Some(tokens.len()));
            }
        }
        let is_stopped = longest.is_some();
        let num_kept = match longest {
            Some(_) if self.stops.include_stop => 0,
            Some(num_hidden) => num_hidden,
            None => self.num_matched.iter().max().map_or(0, |num| *num as usize),
        };
        let kept = self.held.split_off(self.held.len() - num_kept);
        let released = std::mem::replace(&mut self.held, kept);
        if is_stopped {
            self.held.clear();
        }
        SequenceOutcome { released, is_stopped }
    }

    /// The tokens that were held back, when no more will come.
    pub fn finish(&mut self) -> Vec<TokenId> {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matcher(stops: &[&[TokenId]], include_stop: bool) -> SequenceMatcher {
        let stops = stops.iter().map(|tokens| tokens.to_vec()).collect();
        SequenceMatcher::new(Arc::new(StopSequences::new(stops, include_stop)))
    }

    fn outcome(released: &[TokenId], is_stopped: bool) -> SequenceOutcome {
        SequenceOutcome { released: released.to_vec(), is_stopped }
    }

    #[test]
    fn a_beginning_is_held_and_released() {
        let mut matcher = matcher(&[&[1, 2, 3]], false);
        assert_eq!(matcher.push(7), outcome(&[7], false));
        assert_eq!(matcher.push(1), outcome(&[], false));
        assert_eq!(matcher.push(2), outcome(&[], false));
        assert_eq!(matcher.push(1), outcome(&[1, 2], false));
        assert_eq!(matcher.finish(), [1]);
        assert!(matcher.finish().is_empty());
    }

    #[test]
    fn a_whole_sequence_is_hidden_unless_it_is_included() {
        for (include_stop, expected) in [(false, &[][..]), (true, &[1, 2][..])] {
            let mut matcher = matcher(&[&[1, 2], &[5]], include_stop);
            assert_eq!(matcher.push(1), outcome(&[], false));
            assert_eq!(matcher.push(2), outcome(expected, true));
            assert!(matcher.finish().is_empty());
        }
    }

    #[test]
    fn without_sequences_nothing_is_held() {
        assert_eq!(matcher(&[], false).push(3), outcome(&[3], false));
        assert_eq!(matcher(&[&[]], true).push(3), outcome(&[3], false));
    }

    // Goal: the tokens shown are those before the first place where a sequence ends.
    // Method: a tiny vocabulary, so that partial and overlapping matches are the rule.
    proptest! {
        #[test]
        fn the_first_end_counts(
            tokens in prop::collection::vec(0u32..3, 0..24),
            stops in prop::collection::vec(prop::collection::vec(0u32..3, 0..4), 0..4),
        ) {
            let ends = |end: usize, stop: &Vec<TokenId>| {
                !stop.is_empty() && tokens[..end].ends_with(stop)
            };
            let expected = (1..=tokens.len()).find_map(|end| {
                let hidden = stops.iter().filter(|stop| ends(end, stop)).map(Vec::len).max()?;
                Some(end - hidden)
            });
            let mut matcher = SequenceMatcher::new(Arc::new(StopSequences::new(stops.clone(), false)));
            let mut shown = Vec::new();
            let mut is_stopped = false;
            for token in &tokens {
                let outcome = matcher.push(*token);
                shown.extend(outcome.released);
                is_stopped = outcome.is_stopped;
                if is_stopped {
                    break;
                }
            }
            shown.extend(matcher.finish());
            prop_assert_eq!(is_stopped, expected.is_some());
            prop_assert_eq!(&shown[..], &tokens[..expected.unwrap_or(tokens.len())]);
        }
    }
}
