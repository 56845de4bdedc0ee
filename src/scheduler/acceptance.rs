//! How likely it is that a guess comes true. Pure.

/// How much an old observation counts after a new one, and after a step without any.
const FADING: f64 = 0.9;
const FADING_UNTRIED: f64 = 0.98;
/// How many observations the expectation is worth.
const EXPECTATION_WEIGHT: f64 = 2.0;
/// Nothing is certain.
const HIGHEST: f64 = 0.98;

/// Where a guess comes from: some sources are better than others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Source {
    /// What followed an earlier occurrence of the last few tokens.
    #[default]
    ShortMatch,
    /// Of several tokens.
    Match,
    /// Of many tokens.
    LongMatch,
    /// A smaller model.
    Model,
}

impl Source {
    /// Before anything is known.
    fn expectation(self) -> f64 {
        match self {
            Self::ShortMatch => 0.4,
            Self::Match => 0.6,
            Self::LongMatch => 0.85,
            Self::Model => 0.7,
        }
    }
}

/// What one sequence has seen of its guesses. What is long ago counts less; a source that is not
/// tried any more is forgotten, and tried again.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Acceptance {
    tallies: [Tally; 4],
    source: Source,
}

#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    num_tried: f64,
    num_true: f64,
}

impl Acceptance {
    /// How likely a guess of this source is true, if all guesses before it are.
    pub(super) fn rate(&self, source: Source) -> f64 {
        let Tally { num_tried, num_true } = self.tallies[source as usize];
        let expected = source.expectation() * EXPECTATION_WEIGHT;
        ((num_true + expected) / (num_tried + EXPECTATION_WEIGHT)).min(HIGHEST)
    }

    /// A step tries guesses of this source; what comes of them is told by [`Acceptance::observe`].
    pub(super) fn begin(&mut self, source: Source) {
        self.source = source;
    }

    /// So many of the guesses came true, from the first. Behind one that did not nothing was tried.
    pub(super) fn observe(&mut self, num_drafts: usize, num_accepted: usize) {
        let tally = &mut self.tallies[self.source as usize];
        let num_tried = num_drafts.min(num_accepted + 1);
        tally.num_tried = tally.num_tried * FADING + num_tried as f64;
        tally.num_true = tally.num_true * FADING + num_accepted as f64;
    }

    /// A guess of this source was not worth trying.
    pub(super) fn skip(&mut self, source: Source) {
        let tally = &mut self.tallies[source as usize];
        tally.num_tried *= FADING_UNTRIED;
        tally.num_true *= FADING_UNTRIED;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_follows_what_happens_and_comes_back_when_nothing_does() {
        let mut acceptance = Acceptance::default();
        let expectation = acceptance.rate(Source::Match);
        assert_eq!(expectation, 0.6);
        acceptance.begin(Source::Match);
        for _ in 0..20 {
            acceptance.observe(4, 0);
        }
        assert!(acceptance.rate(Source::Match) < 0.15, "{}", acceptance.rate(Source::Match));
        assert_eq!(acceptance.rate(Source::ShortMatch), 0.4, "sources are apart");
        for _ in 0..300 {
            acceptance.skip(Source::Match);
        }
        assert!((acceptance.rate(Source::Match) - expectation).abs() < 0.05);
        for _ in 0..30 {
            acceptance.observe(8, 8);
        }
        assert!(0.97 < acceptance.rate(Source::Match));
        // Two of three: the third failed, the fourth was never tried.
        for _ in 0..100 {
            acceptance.observe(4, 2);
        }
        assert!((acceptance.rate(Source::Match) - 2.0 / 3.0).abs() < 0.02);
    }
}
