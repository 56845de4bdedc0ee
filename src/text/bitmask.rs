//! A set of tokens, one bit each.

use super::TokenId;

const BITS: usize = u32::BITS as usize;

/// The tokens that may come next. Ids beyond its end are not in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBitmask {
    words: Vec<u32>,
}

impl TokenBitmask {
    /// Takes 32 tokens from every word, the lowest id from its lowest bit.
    pub fn from_words(words: Vec<u32>) -> Self {
        Self { words }
    }

    /// One token.
    pub fn only(id: TokenId) -> Self {
        let index = id as usize / BITS;
        let mut words = vec![0; index + 1];
        words[index] = 1 << (id as usize % BITS);
        Self { words }
    }

    /// All ids below `vocab_size` apart from `excluded`.
    pub fn all_but(vocab_size: usize, excluded: &[TokenId]) -> Self {
        let mut words = vec![u32::MAX; vocab_size.div_ceil(BITS)];
        if let Some(last) = words.last_mut()
            && !vocab_size.is_multiple_of(BITS)
        {
            *last = (1 << (vocab_size % BITS)) - 1;
        }
        for &id in excluded {
            if let Some(word) = words.get_mut(id as usize / BITS) {
                *word &= !(1 << (id as usize % BITS));
            }
        }
        Self { words }
    }

    /// Whether it holds `id`.
    pub fn allows(&self, id: TokenId) -> bool {
        let word = self.words.get(id as usize / BITS);
        word.is_some_and(|word| word >> (id as usize % BITS) & 1 == 1)
    }

    /// Whether it holds any token that `others` do not.
    pub fn allows_beside(&self, others: &[TokenId]) -> bool {
        let excluded = |word: usize, bit: usize| others.contains(&((word * BITS + bit) as TokenId));
        self.words.iter().enumerate().any(|(index, &word)| {
            word != 0 && (0..BITS).any(|bit| word >> bit & 1 == 1 && !excluded(index, bit))
        })
    }

    /// The bits of the ids `32 * index ..`.
    pub fn word(&self, index: usize) -> u32 {
        self.words.get(index).copied().unwrap_or(0)
    }

    /// How many tokens it holds.
    pub fn num_allowed(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_it_was_given() {
        let mask = TokenBitmask::from_words(vec![0b101, 1 << 31]);
        let allowed: Vec<TokenId> = (0..100).filter(|&id| mask.allows(id)).collect();
        assert_eq!(allowed, [0, 2, 63]);
        assert_eq!(mask.num_allowed(), 3);
        assert!(mask.allows_beside(&[0, 2]));
        assert!(!mask.allows_beside(&[63, 2, 0, 9]));
        assert_eq!(mask.word(0), 5);
        assert_eq!(mask.word(2), 0);
    }

    #[test]
    fn one_token_is_alone() {
        for id in [0, 31, 32, 151_645] {
            let mask = TokenBitmask::only(id);
            assert!(mask.allows(id) && !mask.allows(id + 1) && !mask.allows(id ^ 1));
            assert_eq!(mask.num_allowed(), 1);
        }
    }

    #[test]
    fn all_but_some_end_with_the_vocabulary() {
        for vocab_size in [1, 31, 32, 33, 64, 100] {
            let mask = TokenBitmask::all_but(vocab_size, &[0, 40, 1000]);
            let num_excluded = 1 + usize::from(40 < vocab_size);
            assert_eq!(mask.num_allowed(), vocab_size - num_excluded);
            assert!(!mask.allows(0) && !mask.allows(40));
            assert!(!mask.allows(vocab_size as TokenId));
        }
    }
}
