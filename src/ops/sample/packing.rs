//! What `kernels/sample/sample_row.cuh` declares: descriptions of rows and the lists they point
//! to, in one piece of memory, and results.

use std::num::NonZeroU32;

use bytemuck::{Pod, Zeroable};

use super::{MAX_TOP, Pick, RowLogprobs, SampleRow, SampledRow};
use crate::text::{TokenBitmask, TokenId};

const GREEDY: u32 = 0;
const DRAW: u32 = 1;
const SCORE: u32 = 2;
const IDLE: u32 = 3;
/// A row with a larger top-k needs its weights, as `sample_row.cuh` decides.
const SMALL_TOP_K: u32 = 128;
/// No mask, no log-probabilities.
const NONE: u32 = u32::MAX;

pub(super) const ROW_BYTES: usize = size_of::<RowWords>();
const ROW_WORDS: usize = ROW_BYTES / 4;

/// `SampleRow` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RowWords {
    mode: u32,
    logits_row: u32,
    scale: f32,
    min_p_offset: f32,
    top_k: u32,
    top_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    /// The low word first, as in `position`.
    seed: [u32; 2],
    choice: u32,
    position: [u32; 2],
    forbidden_start: u32,
    num_forbidden: u32,
    bias_start: u32,
    num_biases: u32,
    history_start: u32,
    num_history: u32,
    num_prompt: u32,
    mask_start: u32,
    num_top: u32,
    target: u32,
    unused: [u32; 8],
}

/// `SampleResult` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct ResultWords {
    token: u32,
    status: u32,
    logprob: f32,
    num_top: u32,
    top_ids: [TokenId; MAX_TOP as usize],
    top_logprobs: [f32; MAX_TOP as usize],
}

/// Which kernels any row needs, beside those that all need.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Needs {
    pub(super) weights: bool,
    pub(super) logprobs: bool,
}

/// Descriptions of rows, then their lists.
#[derive(Debug, Default)]
pub(super) struct Inputs {
    words: Vec<u32>,
    num_launched: usize,
    /// One more than the highest row of logits that is named.
    num_logits_rows: usize,
    needs: Needs,
    /// Of each described row.
    wants_logprobs: Vec<bool>,
}

impl Inputs {
    /// Describes `rows`, and nothing to do for further rows up to `num_launched`.
    pub(super) fn pack(&mut self, rows: &[SampleRow<'_>], num_launched: usize, num_cols: usize) {
        self.words.clear();
        self.words.resize(num_launched * ROW_WORDS, 0);
        self.num_launched = num_launched;
        self.num_logits_rows = rows.iter().map(|row| row.logits_row + 1).max().unwrap_or(0);
        self.needs = Needs::default();
        self.wants_logprobs.clear();
        self.wants_logprobs.extend(rows.iter().map(|row| row.num_top.is_some()));
        for index in 0..num_launched {
            let idle = RowWords { mode: IDLE, ..RowWords::zeroed() };
            let words = rows.get(index).map_or(idle, |row| self.pack_row(row, num_cols));
            self.needs.logprobs |= words.wants_logprobs();
            self.needs.weights |= words.wants_logprobs() || words.is_wide();
            let place = &mut self.words[index * ROW_WORDS..][..ROW_WORDS];
            place.copy_from_slice(bytemuck::cast_slice(&[words]));
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words)
    }

    pub(super) fn needs(&self) -> Needs {
        self.needs
    }

    pub(super) fn num_launched(&self) -> usize {
        self.num_launched
    }

    pub(super) fn num_logits_rows(&self) -> usize {
        self.num_logits_rows
    }

    /// Reads what the described rows yielded.
    pub(super) fn unpack(&self, results: &[ResultWords]) -> Vec<SampledRow> {
        let rows = results.iter().zip(&self.wants_logprobs);
        rows.map(|(words, wants_logprobs)| {
            let is_drawn = words.status == 0;
            let logprobs = (is_drawn && *wants_logprobs).then(|| words.logprobs());
            SampledRow { token: is_drawn.then_some(words.token), logprobs }
        })
        .collect()
    }

    /// Appends the row's lists and describes it.
    fn pack_row(&mut self, row: &SampleRow<'_>, num_cols: usize) -> RowWords {
        let words = RowWords {
            logits_row: row.logits_row as u32,
            repetition_penalty: 1.0,
            mask_start: NONE,
            num_top: row.num_top.map_or(NONE, |num_top| num_top.min(MAX_TOP)),
            ..RowWords::zeroed()
        };
        match &row.pick {
            Pick::Given(token) => RowWords { mode: SCORE, target: *token, ..words },
            Pick::Largest => RowWords { mode: GREEDY, ..self.pack_edits(words, row, num_cols) },
            Pick::Draw(draw) => RowWords {
                mode: DRAW,
                scale: 1.0 / draw.temperature,
                min_p_offset: if 0.0 < draw.min_p {
                    draw.temperature * draw.min_p.ln()
                } else {
                    f32::NEG_INFINITY
                },
                top_k: draw.top_k.map_or(0, NonZeroU32::get),
                top_p: draw.top_p,
                seed: halves(draw.seed),
                choice: draw.choice,
                position: halves(draw.position),
                ..self.pack_edits(words, row, num_cols)
            },
        }
    }

    fn pack_edits(&mut self, words: RowWords, row: &SampleRow<'_>, num_cols: usize) -> RowWords {
        let edits = &row.edits;
        let num_prompt = edits.num_prompt_tokens.min(edits.history.len());
        let penalises_generated = edits.presence_penalty != 0.0 || edits.frequency_penalty != 0.0;
        let (history, num_prompt) = match (edits.repetition_penalty != 1.0, penalises_generated) {
            (true, _) => (edits.history, num_prompt),
            (false, true) => (&edits.history[num_prompt..], 0),
            (false, false) => (&[][..], 0),
        };
        let forbidden_start = self.append(edits.forbidden.iter().copied());
        let biases = edits.biases.iter().flat_map(|(token, bias)| [*token, bias.to_bits()]);
        let bias_start = self.append(biases);
        let history_start = self.append(history.iter().copied());
        let mask_words = |mask: &TokenBitmask| {
            self.append((0..num_cols.div_ceil(u32::BITS as usize)).map(|index| mask.word(index)))
        };
        RowWords {
            repetition_penalty: edits.repetition_penalty,
            presence_penalty: edits.presence_penalty,
            frequency_penalty: edits.frequency_penalty,
            forbidden_start,
            num_forbidden: edits.forbidden.len() as u32,
            bias_start,
            num_biases: edits.biases.len() as u32,
            history_start,
            num_history: history.len() as u32,
            num_prompt: num_prompt as u32,
            mask_start: edits.mask.map_or(NONE, mask_words),
            ..words
        }
    }

    /// Appends a list and gives its start.
    fn append(&mut self, list: impl Iterator<Item = u32>) -> u32 {
        let start = self.words.len();
        self.words.extend(list);
        start as u32
    }
}

impl RowWords {
    fn wants_logprobs(&self) -> bool {
        self.mode != IDLE && self.num_top != NONE
    }

    fn is_wide(&self) -> bool {
        self.mode == DRAW && !(1..=SMALL_TOP_K).contains(&self.top_k)
    }
}

impl ResultWords {
    fn logprobs(&self) -> RowLogprobs {
        let top = self.top_ids.into_iter().zip(self.top_logprobs);
        RowLogprobs { logprob: self.logprob, top: top.take(self.num_top as usize).collect() }
    }
}

/// The low word, then the high one.
fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::sample::{Draw, Edits};

    /// Goal: no word is uploaded that changes nothing. Method: the lengths of one row's inputs.
    #[test]
    fn histories_without_a_penalty_stay_here() {
        let num_words = |repetition_penalty, frequency_penalty| {
            let edits = Edits {
                history: &[5, 6, 7],
                num_prompt_tokens: 2,
                repetition_penalty,
                frequency_penalty,
                ..Edits::default()
            };
            let row = SampleRow { logits_row: 0, pick: Pick::Largest, edits, num_top: None };
            let mut inputs = Inputs::default();
            inputs.pack(&[row], 1, 100);
            inputs.words.len() - ROW_WORDS
        };
        assert_eq!(num_words(1.0, 0.0), 0);
        assert_eq!(num_words(1.0, 0.5), 1);
        assert_eq!(num_words(1.1, 0.5), 3);
    }

    /// Goal: rows with the usual parameters cost two launches. Method: what single rows need.
    #[test]
    fn kernels_that_no_row_needs_are_not_launched() {
        let needs = |pick, num_top| {
            let row = SampleRow { logits_row: 0, pick, edits: Edits::default(), num_top };
            let mut inputs = Inputs::default();
            inputs.pack(&[row], 4, 100);
            (inputs.needs().weights, inputs.needs().logprobs)
        };
        let draw = |top_k| {
            let top_k = NonZeroU32::new(top_k);
            let (temperature, min_p, top_p) = (0.7, 0.0, 0.8);
            Pick::Draw(Draw { temperature, min_p, top_k, top_p, seed: 0, choice: 0, position: 0 })
        };
        assert_eq!(needs(Pick::Largest, None), (false, false));
        assert_eq!(needs(draw(SMALL_TOP_K), None), (false, false));
        assert_eq!(needs(draw(SMALL_TOP_K + 1), None), (true, false));
        assert_eq!(needs(draw(0), None), (true, false));
        assert_eq!(needs(Pick::Largest, Some(0)), (true, true));
        assert_eq!(needs(Pick::Given(3), Some(5)), (true, true));
    }

    #[test]
    fn sizes_are_those_of_the_kernels() {
        assert_eq!(ROW_BYTES, 128);
        assert_eq!(size_of::<ResultWords>(), 176);
    }
}
