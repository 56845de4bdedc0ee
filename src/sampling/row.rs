//! One row of logits with the maximum of each short chunk: enough to find the largest logits, and
//! to sum over any set of them, while reading little more than the chunks that hold them.

use std::cmp::Ordering;

use crate::scheduler::step::NonFiniteLogits;
use crate::text::TokenId;

/// Logits per chunk: small enough that a chunk holding one large logit is cheap to read, large
/// enough that the maxima of a row of 151,936 fit in 2.4 kB.
const CHUNK: usize = 256;

/// Independent accumulators, so that the compiler can use vector registers without changing the
/// order of additions.
const LANES: usize = 16;

/// A row of finite logits and where its large values are. `-inf` is allowed: such a token is never
/// drawn.
#[derive(Debug)]
pub(crate) struct Row<'a> {
    logits: &'a [f32],
    chunk_max: &'a [f32],
    max: f32,
}

/// A token and its logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) logit: f32,
    pub(crate) id: TokenId,
}

impl Candidate {
    /// Largest logit first, then lowest id: the one order of tokens, whatever found them.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the shape that sorting asks for")]
    pub(crate) fn order(&self, other: &Self) -> Ordering {
        // Rows hold no NaN.
        other.logit.partial_cmp(&self.logit).unwrap_or(Ordering::Equal).then(self.id.cmp(&other.id))
    }
}

/// The last token kept, in the order of [`Candidate::order`]: a filter is nothing but this.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cutoff(pub(crate) Candidate);

impl Cutoff {
    /// Keeps every token.
    pub(crate) const NONE: Self = Self::at(f32::NEG_INFINITY);

    /// Keeps tokens with at least this logit.
    pub(crate) const fn at(logit: f32) -> Self {
        Self(Candidate { logit, id: TokenId::MAX })
    }

    fn keeps(self, logit: f32, id: TokenId) -> bool {
        self.0.logit < logit || (logit == self.0.logit && id <= self.0.id)
    }

    /// Keeps what both keep.
    pub(crate) fn and(self, other: Self) -> Self {
        if self.0.order(&other.0) == Ordering::Less { self } else { other }
    }
}

impl<'a> Row<'a> {
    /// Reads the row once, into `chunk_max`.
    pub(crate) fn scan(
        logits: &'a [f32],
        chunk_max: &'a mut Vec<f32>,
    ) -> Result<Self, NonFiniteLogits> {
        chunk_max.clear();
        let mut max = f32::NEG_INFINITY;
        for chunk in logits.chunks(CHUNK) {
            let of_chunk = finite_max(chunk)?;
            chunk_max.push(of_chunk);
            max = if max < of_chunk { of_chunk } else { max };
        }
        if max == f32::NEG_INFINITY {
            return Err(NonFiniteLogits);
        }
        Ok(Self { logits, chunk_max, max })
    }

    /// The largest logit.
    pub(crate) fn max(&self) -> f32 {
        self.max
    }

    /// The token with the largest logit, the lowest id on a tie.
    pub(crate) fn argmax(&self) -> TokenId {
        let (_, start, chunk) = self
            .chunks_reaching(self.max)
            .next()
            .expect("the largest logit is in one of the chunks");
        let index = chunk.iter().position(|&logit| logit == self.max);
        (start + index.expect("the chunk's maximum is one of its logits")) as TokenId
    }

    /// Puts all tokens kept by `cutoff` into `found`, in order of their ids.
    pub(crate) fn collect(&self, cutoff: Cutoff, found: &mut Vec<Candidate>) {
        found.clear();
        for (_, start, chunk) in self.chunks_reaching(cutoff.0.logit) {
            for (id, &logit) in (start as TokenId..).zip(chunk) {
                if cutoff.keeps(logit, id) {
                    found.push(Candidate { logit, id });
                }
            }
        }
    }

    /// The cutoff that keeps exactly the `k` first tokens, or all if there are fewer. `k` is not
    /// zero. Leaves the kept tokens in `found`, in no particular order.
    pub(crate) fn top_k(&self, k: usize, found: &mut Vec<Candidate>) -> Cutoff {
        found.clear();
        let lower_bound = if k <= self.chunk_max.len() {
            // k chunks reach the k-th largest of their maxima, so at least k logits do.
            let maxima = self.chunk_max.iter().map(|&logit| Candidate { logit, id: 0 });
            found.extend(maxima);
            let (_, kth, _) = found.select_nth_unstable_by(k - 1, Candidate::order);
            Cutoff::at(kth.logit)
        } else {
            Cutoff::NONE
        };
        self.collect(lower_bound, found);
        if found.len() <= k {
            return Cutoff::NONE.and(lower_bound);
        }
        let (_, &mut kth, _) = found.select_nth_unstable_by(k - 1, Candidate::order);
        found.truncate(k);
        Cutoff(kth)
    }

    /// Sum of `exp((logit - max) * scale)` over the kept tokens, in order of their ids. The sum of
    /// each chunk goes to `chunk_sums`, zero for those without a kept token.
    pub(crate) fn sum_exp(
        &self,
        scale: f32,
        cutoff: Cutoff,
        chunk_sums: &mut Vec<(u32, f32)>,
    ) -> f64 {
        chunk_sums.clear();
        let mut total = 0.0f64;
        for (index, start, chunk) in self.chunks_reaching(cutoff.0.logit) {
            let sum = if cutoff.0.logit == f32::NEG_INFINITY {
                sum_exp_all(chunk, self.max, scale)
            } else {
                self.kept_weights(start, chunk, scale, cutoff).map(|(_, weight)| weight).sum()
            };
            chunk_sums.push((index as u32, sum));
            total += f64::from(sum);
        }
        total
    }

    /// The token at `share` (in `[0, 1)`) of the kept tokens' total weight, as summed by
    /// [`Row::sum_exp`] with the same arguments.
    pub(crate) fn token_at(
        &self,
        share: f64,
        scale: f32,
        cutoff: Cutoff,
        chunk_sums: &[(u32, f32)],
    ) -> TokenId {
        let total: f64 = chunk_sums.iter().map(|&(_, sum)| f64::from(sum)).sum();
        let mut left = share * total;
        // Rounding may leave a sliver beyond the end; the last token with any weight takes it.
        let mut last = None;
        for &(index, sum) in chunk_sums {
            if sum <= 0.0 {
                continue;
            }
            last = Some(index);
            if left < f64::from(sum) {
                break;
            }
            left -= f64::from(sum);
        }
        let start = last.expect("the largest logit has weight one") as usize * CHUNK;
        let chunk = &self.logits[start..self.logits.len().min(start + CHUNK)];
        let mut drawn = 0;
        for (id, weight) in self.kept_weights(start, chunk, scale, cutoff) {
            if weight <= 0.0 {
                continue;
            }
            drawn = id;
            if left < f64::from(weight) {
                break;
            }
            left -= f64::from(weight);
        }
        drawn
    }

    fn kept_weights(
        &self,
        start: usize,
        chunk: &'a [f32],
        scale: f32,
        cutoff: Cutoff,
    ) -> impl Iterator<Item = (TokenId, f32)> {
        let max = self.max;
        (start as TokenId..)
            .zip(chunk)
            .filter(move |&(id, &logit)| cutoff.keeps(logit, id))
            .map(move |(id, &logit)| (id, exp((logit - max) * scale)))
    }

    /// The chunks with a logit of at least `bound`: index, first id and logits.
    fn chunks_reaching(&self, bound: f32) -> impl Iterator<Item = (usize, usize, &'a [f32])> {
        self.chunk_max
            .iter()
            .zip(self.logits.chunks(CHUNK))
            .enumerate()
            .filter(move |(_, (max, _))| bound <= **max)
            .map(|(index, (_, chunk))| (index, index * CHUNK, chunk))
    }
}

/// The largest logit of a chunk, which must hold neither NaN nor `+inf`.
fn finite_max(chunk: &[f32]) -> Result<f32, NonFiniteLogits> {
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut bad = [0u32; LANES];
    let (whole, rest) = chunk.as_chunks::<LANES>();
    for values in whole {
        for lane in 0..LANES {
            let value = values[lane];
            max[lane] = if max[lane] < value { value } else { max[lane] };
            bad[lane] |= u32::from(is_bad(value));
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        max[lane] = if max[lane] < value { value } else { max[lane] };
        bad[lane] |= u32::from(is_bad(value));
    }
    if bad.iter().any(|&bad| bad != 0) {
        return Err(NonFiniteLogits);
    }
    Ok(max.into_iter().fold(f32::NEG_INFINITY, f32::max))
}

/// NaN or `+inf`.
fn is_bad(logit: f32) -> bool {
    logit.is_nan() || logit == f32::INFINITY
}

fn sum_exp_all(chunk: &[f32], max: f32, scale: f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (whole, rest) = chunk.as_chunks::<LANES>();
    for values in whole {
        for lane in 0..LANES {
            sums[lane] += exp((values[lane] - max) * scale);
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        sums[lane] += exp((value - max) * scale);
    }
    sums.into_iter().sum()
}

/// `e^x` for `x <= 0`, within 2 units in the last place. Without branches and calls, so that loops
/// over it become vector code, and made of operations that round alike on every machine.
pub(crate) fn exp(x: f32) -> f32 {
    // Below this the result is not a normal number; such tokens weigh nothing.
    const LOWEST: f32 = -87.0;
    // ln(2) in two parts: the first has few bits, so that multiples of it are exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Adding this rounds to an integer, left in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if LOWEST < x { x } else { LOWEST };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let power = shifted - ROUND;
    let r = (clamped - power * LN_2_HIGH) - power * LN_2_LOW;
    // Minimax polynomial of e^r on [-ln(2)/2, ln(2)/2].
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let mantissa = p * r * r + r + 1.0;
    let exponent = shifted.to_bits().wrapping_shl(23);
    let value = f32::from_bits(mantissa.to_bits().wrapping_add(exponent));
    if LOWEST < x { value } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::rng::uniform;

    fn random_row(len: usize, seed: u64, step: f32) -> Vec<f32> {
        let value = |i| (uniform(seed, 0, i) * 40.0 - 20.0) as f32;
        // Rounding to `step` makes ties.
        (0..len).map(|i| (value(i) / step).round() * step).collect()
    }

    fn sorted(logits: &[f32]) -> Vec<Candidate> {
        let mut all: Vec<Candidate> =
            (0..).zip(logits).map(|(id, &logit)| Candidate { logit, id }).collect();
        all.sort_by(Candidate::order);
        all
    }

    #[test]
    fn exp_is_accurate() {
        assert_eq!(exp(0.0), 1.0);
        for x in [f32::NEG_INFINITY, -1e30, -88.0, f32::MIN] {
            assert_eq!(exp(x), 0.0);
        }
        let worst = (0..1_000_000)
            .map(|i| -86.9 * i as f32 / 1e6)
            .map(|x| (f64::from(exp(x)) / f64::from(x).exp() - 1.0).abs())
            .fold(0.0, f64::max);
        assert!(worst < 2.5e-7, "{worst}");
    }

    #[test]
    fn argmax_is_the_lowest_id_of_the_largest() {
        for (len, step) in [(1, 1.0), (255, 5.0), (256, 5.0), (257, 5.0), (5000, 1.0), (5000, 1e-3)]
        {
            for seed in 0..20 {
                let logits = random_row(len, seed, step);
                let mut maxima = Vec::new();
                let row = Row::scan(&logits, &mut maxima).unwrap();
                assert_eq!(row.argmax(), sorted(&logits)[0].id);
                assert_eq!(row.max(), sorted(&logits)[0].logit);
            }
        }
    }

    #[test]
    fn top_k_keeps_the_same_as_a_full_sort() {
        for (len, step) in [(7, 1.0), (256, 10.0), (1000, 0.5), (4097, 1e-3)] {
            let mut logits = random_row(len, len as u64, step);
            logits[len / 2] = f32::NEG_INFINITY;
            let expected = sorted(&logits);
            let (mut maxima, mut found) = (Vec::new(), Vec::new());
            let row = Row::scan(&logits, &mut maxima).unwrap();
            for k in [1, 2, 3, 5, 15, 16, 17, 200, 999, 4096, 10_000] {
                let cutoff = row.top_k(k, &mut found);
                let k = k.min(len);
                found.sort_by(Candidate::order);
                assert_eq!(found, expected[..k], "{len} {k}");
                row.collect(cutoff, &mut found);
                found.sort_by(Candidate::order);
                assert_eq!(found, expected[..k], "{len} {k}");
            }
        }
    }

    #[test]
    fn non_finite_values_are_found_anywhere() {
        for bad in [f32::NAN, f32::INFINITY, -f32::NAN] {
            for position in [0, 15, 16, 255, 256, 599, 600] {
                let mut logits = random_row(601, 1, 1.0);
                logits[position] = bad;
                assert!(Row::scan(&logits, &mut Vec::new()).is_err(), "{bad} {position}");
            }
        }
        assert!(Row::scan(&[f32::NEG_INFINITY; 300], &mut Vec::new()).is_err());
        assert!(Row::scan(&[], &mut Vec::new()).is_err());
    }

    #[test]
    fn sums_equal_those_in_f64() {
        let logits = random_row(3000, 9, 0.1);
        let (mut maxima, mut found, mut sums) = (Vec::new(), Vec::new(), Vec::new());
        let row = Row::scan(&logits, &mut maxima).unwrap();
        for cutoff in [Cutoff::NONE, Cutoff::at(10.0), row.top_k(100, &mut found)] {
            row.collect(cutoff, &mut found);
            let weight = |c: &Candidate| (f64::from(c.logit - row.max()) * 0.7).exp();
            let expected: f64 = found.iter().map(weight).sum();
            let sum = row.sum_exp(0.7, cutoff, &mut sums);
            assert!((sum / expected - 1.0).abs() < 1e-6, "{sum} {expected}");
        }
    }
}
