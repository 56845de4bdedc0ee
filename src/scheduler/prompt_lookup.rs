//! Guesses the next tokens by what followed the last ones earlier in the same sequence ("prompt
//! lookup decoding", Saxena 2023). Answers often repeat: code that is edited, documents that are
//! quoted, names and numbers of a question. Pure.

use crate::text::TokenId;

/// Fewer tokens recur by chance.
const MIN_MATCH: usize = 2;
/// More tokens make a guess no better.
const MAX_MATCH: usize = 32;

/// An earlier occurrence of the last tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Match {
    /// How many tokens it has in common with the end, at most [`MAX_MATCH`].
    pub(super) len: usize,
    /// One past its last token.
    end: usize,
}

impl Match {
    /// The longest, and of equally long ones the latest.
    pub(super) fn find(tokens: &[TokenId]) -> Option<Self> {
        let mut best: Option<Self> = None;
        for end in (MIN_MATCH..tokens.len()).rev() {
            let pairs = tokens[..end].iter().rev().zip(tokens.iter().rev()).take(MAX_MATCH);
            let len = pairs.take_while(|(earlier, last)| earlier == last).count();
            if best.as_ref().map_or(MIN_MATCH - 1, |best| best.len) < len {
                best = Some(Self { len, end });
                if len == MAX_MATCH {
                    break;
                }
            }
        }
        best
    }

    /// What followed: so many tokens. What ends with the sequence goes on as it began.
    pub(super) fn continuation(&self, tokens: &[TokenId], num_tokens: usize) -> Vec<TokenId> {
        tokens[self.end..].iter().cycle().take(num_tokens).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guess(tokens: &[TokenId], num_tokens: usize) -> Option<(usize, Vec<TokenId>)> {
        Match::find(tokens).map(|found| (found.len, found.continuation(tokens, num_tokens)))
    }

    #[test]
    fn the_longest_match_wins_and_then_the_latest() {
        assert_eq!(guess(&[1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 2), Some((3, vec![4, 9])));
        assert_eq!(guess(&[2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 2), Some((2, vec![5, 1])));
        assert_eq!(guess(&[1, 2, 3, 9, 3], 2), None, "one token is no match");
        assert_eq!(guess(&[7, 7], 2), None);
        assert_eq!(guess(&[], 2), None);
    }

    #[test]
    fn a_repetition_goes_on() {
        assert_eq!(guess(&[7, 7, 7], 4), Some((2, vec![7, 7, 7, 7])));
        assert_eq!(guess(&[9, 1, 2, 3, 1, 2, 3, 1, 2, 3], 5), Some((6, vec![1, 2, 3, 1, 2])));
        let long: Vec<TokenId> = (0..100).chain(0..80).collect();
        assert_eq!(guess(&long, 3), Some((MAX_MATCH, vec![80, 81, 82])));
    }
}
