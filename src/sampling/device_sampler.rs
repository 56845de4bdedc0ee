//! Draws tokens on a card: what [`Sampler`](super::Sampler) does, for rows that never leave it.
//!
//! This module only translates requests and results; the work is in [`crate::ops::sample`].

use candle_core::Result;

use crate::ops::sample::{Draw, Edits, Pick, RowSampler, SampleRow, SampledRow};
use crate::ops::tensor::GpuTensor;
use crate::scheduler::step::{NonFiniteLogits, SampleRequest, SampledToken, TokenLogprobs};
use crate::text::{TokenBitmask, TokenId};

/// What is wanted of one row of logits.
#[derive(Clone, Copy, Debug)]
pub enum Wanted<'a> {
    /// A token, out of the mask if there is one.
    Token(&'a SampleRequest, Option<&'a TokenBitmask>),
    /// The log-probability of a given token, and so many of the most likely ones.
    Logprobs(TokenId, u32),
}

/// What a row yielded.
#[derive(Clone, Debug, PartialEq)]
pub enum Yielded {
    /// For [`Wanted::Token`].
    Token(std::result::Result<SampledToken, NonFiniteLogits>),
    /// For [`Wanted::Logprobs`]; as [`token_logprobs`](super::logprobs::token_logprobs) has it.
    Logprobs(TokenLogprobs),
}

/// Draws tokens from rows of logits in a card's memory. Holds nothing of a request between steps.
#[derive(Debug)]
pub struct DeviceSampler {
    rows: RowSampler,
}

impl DeviceSampler {
    /// A sampler that uses these buffers, which bound how many things can be wanted in one step.
    pub fn new(rows: RowSampler) -> Self {
        Self { rows }
    }

    /// Copies to the card what is wanted, each with its row of logits. The launch that follows is
    /// of `num_launched` rows, some of which may have nothing to do.
    ///
    /// # Errors
    /// If there are too many, or the copy fails.
    pub fn upload(&mut self, wanted: &[(usize, Wanted<'_>)], num_launched: usize) -> Result<()> {
        let rows: Vec<SampleRow<'_>> =
            wanted.iter().map(|&(logits_row, wanted)| sample_row(logits_row, wanted)).collect();
        self.rows.upload(&rows, num_launched)
    }

    /// Starts what was uploaded.
    ///
    /// # Errors
    /// If the logits are not those of the vocabulary, or the launch fails.
    pub fn launch(&self, logits: &GpuTensor) -> Result<()> {
        self.rows.launch(logits)
    }

    /// The same for a recording, which may be replayed after other uploads that are launched with
    /// as many rows, until [`RowSampler::num_moves`] changes.
    ///
    /// # Errors
    /// As [`DeviceSampler::launch`].
    pub fn launch_for_recording(&self, logits: &GpuTensor) -> Result<()> {
        self.rows.launch_for_recording(logits)
    }

    /// The kernels' side: their results on the card, and whether a recording is still good.
    pub fn rows(&self) -> &RowSampler {
        &self.rows
    }

    /// Waits for the results of what was uploaded.
    ///
    /// # Errors
    /// If computing them failed.
    pub fn download(&self, wanted: &[(usize, Wanted<'_>)]) -> Result<Vec<Yielded>> {
        self.rows.begin_download()?;
        self.end_download(wanted)
    }

    /// [`DeviceSampler::download`] of what was begun with [`RowSampler::begin_download`].
    ///
    /// # Errors
    /// If computing it failed.
    pub fn end_download(&self, wanted: &[(usize, Wanted<'_>)]) -> Result<Vec<Yielded>> {
        let rows = self.rows.end_download()?;
        Ok(wanted.iter().zip(rows).map(|(&(_, wanted), row)| yielded(wanted, row)).collect())
    }

    /// All three steps.
    ///
    /// # Errors
    /// As they have.
    pub fn sample(
        &mut self,
        logits: &GpuTensor,
        wanted: &[(usize, Wanted<'_>)],
    ) -> Result<Vec<Yielded>> {
        self.upload(wanted, wanted.len())?;
        self.launch(logits)?;
        self.download(wanted)
    }
}

fn sample_row(logits_row: usize, wanted: Wanted<'_>) -> SampleRow<'_> {
    let (request, mask) = match wanted {
        Wanted::Token(request, mask) => (request, mask),
        Wanted::Logprobs(token, num_top) => {
            let pick = Pick::Given(token);
            return SampleRow { logits_row, pick, edits: Edits::default(), num_top: Some(num_top) };
        }
    };
    let params = &*request.params;
    let pick = if params.temperature == 0.0 {
        Pick::Largest
    } else {
        Pick::Draw(Draw {
            temperature: params.temperature,
            min_p: params.min_p,
            top_k: params.top_k,
            top_p: params.top_p,
            seed: params.seed,
            choice: request.choice,
            position: request.num_output_tokens as u64,
        })
    };
    SampleRow { logits_row, pick, edits: edits(request, mask), num_top: params.logprobs }
}

fn edits<'a>(request: &'a SampleRequest, mask: Option<&'a TokenBitmask>) -> Edits<'a> {
    let params = &*request.params;
    // Where a grammar leaves nothing else, its end comes before `min_tokens`.
    let forbidden = match mask {
        Some(mask) if !mask.allows_beside(&request.forbidden) => &[],
        _ => request.forbidden.as_slice(),
    };
    let edits = Edits { forbidden, biases: &params.logit_bias, mask, ..Edits::default() };
    match &request.history {
        None => edits,
        Some(history) => Edits {
            history: &history.tokens,
            num_prompt_tokens: history.num_prompt_tokens,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            ..edits
        },
    }
}

fn yielded(wanted: Wanted<'_>, row: SampledRow) -> Yielded {
    let logprobs = |token| {
        row.logprobs.map(|found| TokenLogprobs { token, logprob: found.logprob, top: found.top })
    };
    match (wanted, row.token) {
        (Wanted::Token(..), None) => Yielded::Token(Err(NonFiniteLogits)),
        (Wanted::Token(..), Some(id)) => {
            Yielded::Token(Ok(SampledToken { id, logprobs: logprobs(id) }))
        }
        (Wanted::Logprobs(token, _), _) => {
            Yielded::Logprobs(logprobs(token).unwrap_or(TokenLogprobs {
                token,
                logprob: f32::NAN,
                top: Vec::new(),
            }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::gpu::{Gpu, GpuError};
    use crate::sampling::logprobs::token_logprobs;
    use crate::sampling::{Sampler, SamplingParams, rng};
    use crate::scheduler::step::TokenHistory;
    use candle_core::DType;
    use std::num::NonZeroU32;
    use std::sync::Arc;

    /// Rows of equal length and what is asked of them.
    struct Case {
        logits: Vec<Vec<f32>>,
        requests: Vec<(usize, SampleRequest, Option<TokenBitmask>)>,
    }

    impl Case {
        /// Each request asks for the row of its own number, or the last one.
        fn new(logits: Vec<Vec<f32>>, requests: Vec<SampleRequest>) -> Self {
            let last = logits.len() - 1;
            let requests = requests.into_iter().enumerate();
            let requests = requests.map(|(index, request)| (index.min(last), request, None));
            Self { logits, requests: requests.collect() }
        }

        fn wanted(&self) -> Vec<(usize, Wanted<'_>)> {
            let wanted = |(row, request, mask)| (row, Wanted::Token(request, mask));
            self.requests
                .iter()
                .map(|(row, request, mask)| wanted((*row, request, mask.as_ref())))
                .collect()
        }

        fn on_device(&self, gpu: &Gpu) -> Vec<Result<SampledToken, NonFiniteLogits>> {
            let wanted = self.wanted();
            let yielded = sampler(gpu, wanted.len(), self.logits[0].len())
                .sample(&upload(gpu, &self.logits), &wanted)
                .unwrap();
            yielded.into_iter().map(token).collect()
        }

        fn on_cpu(&self) -> Vec<Result<SampledToken, NonFiniteLogits>> {
            let mut sampler = Sampler::new();
            let draw = |(row, request, mask): &(usize, SampleRequest, Option<TokenBitmask>)| {
                sampler.sample(&mut self.logits[*row].clone(), request, mask.as_ref())
            };
            self.requests.iter().map(draw).collect()
        }

        /// Asserts that both yield the same and gives how many rows there were.
        fn compare(&self, gpu: &Gpu, name: &str) -> usize {
            let (found, expected) = (self.on_device(gpu), self.on_cpu());
            for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                match (found, expected) {
                    (Ok(found), Ok(expected)) => {
                        assert_eq!(found.id, expected.id, "{name}, row {index}");
                        assert_eq!(found.logprobs.is_some(), expected.logprobs.is_some());
                        if let (Some(found), Some(expected)) = (&found.logprobs, &expected.logprobs)
                        {
                            assert_near(found, expected, name);
                        }
                    }
                    _ => assert_eq!(found, expected, "{name}, row {index}"),
                }
            }
            found.len()
        }
    }

    type Result<T, E> = std::result::Result<T, E>;

    fn sampler(gpu: &Gpu, max_rows: usize, vocab_size: usize) -> DeviceSampler {
        DeviceSampler::new(RowSampler::new(gpu, max_rows, vocab_size).unwrap())
    }

    fn upload(gpu: &Gpu, logits: &[Vec<f32>]) -> GpuTensor {
        let shape = (logits.len(), logits[0].len());
        GpuTensor::from_slice(gpu, &logits.concat(), DType::F32, shape).unwrap()
    }

    fn token(yielded: Yielded) -> Result<SampledToken, NonFiniteLogits> {
        match yielded {
            Yielded::Token(token) => token,
            Yielded::Logprobs(found) => panic!("{found:?} where a token is wanted"),
        }
    }

    fn assert_near(found: &TokenLogprobs, expected: &TokenLogprobs, name: &str) {
        let near = |a: f32, b: f32| a == b || (a - b).abs() < 2e-6 || (a.is_nan() && b.is_nan());
        assert_eq!(found.token, expected.token, "{name}");
        assert!(near(found.logprob, expected.logprob), "{name}: {found:?} {expected:?}");
        assert_eq!(found.top.len(), expected.top.len(), "{name}: {found:?} {expected:?}");
        for (found, expected) in found.top.iter().zip(&expected.top) {
            assert_eq!(found.0, expected.0, "{name}");
            assert!(near(found.1, expected.1), "{name}: {found:?} {expected:?}");
        }
    }

    fn request(params: SamplingParams, position: usize) -> SampleRequest {
        SampleRequest {
            params: Arc::new(params),
            choice: (position % 3) as u32,
            num_output_tokens: position,
            forbidden: Vec::new(),
            history: None,
        }
    }

    fn params(temperature: f32, top_k: u32, top_p: f32, min_p: f32) -> SamplingParams {
        let top_k = NonZeroU32::new(top_k);
        SamplingParams {
            temperature,
            top_k,
            top_p,
            min_p,
            seed: 5 << 32 | 7,
            ..SamplingParams::default()
        }
    }

    /// Logits like a model's: a few large ones, a long tail, ties.
    fn model_like(len: usize, seed: u64) -> Vec<f32> {
        let exponential = |i| -(1.0 - rng::uniform(seed, 9, i)).ln();
        (0..len).map(|i| (exponential(i) * 1.2 * 32.0).round() as f32 / 32.0 - 3.0).collect()
    }

    /// One of `0..end` for each seed and position.
    fn pick(seed: u64, position: usize, end: usize) -> usize {
        (rng::uniform(seed, 77, position) * end as f64) as usize
    }

    fn parameter_sets() -> Vec<SamplingParams> {
        [
            (0.0, 0, 1.0, 0.0),
            (1.0, 0, 1.0, 0.0),
            (0.7, 20, 0.8, 0.0),
            (1.0, 1, 1.0, 0.0),
            (1.0, 128, 1.0, 0.0),
            (2.0, 0, 0.99, 0.0),
            (1.0, 0, 0.9, 0.0),
            (0.3, 0, 0.5, 0.05),
            (1.5, 600, 0.95, 0.01),
            (1.0, 0, 1.0, 0.2),
            (0.01, 5, 0.999, 0.0),
            (2.0, 1_000_000, 1e-6, 0.0),
        ]
        .map(|(temperature, top_k, top_p, min_p)| params(temperature, top_k, top_p, min_p))
        .to_vec()
    }

    #[test]
    fn draws_equal_the_processors() {
        let Some(gpu) = Gpu::for_tests() else { return };
        for (len, num_rows) in
            [(1, 1), (5, 5), (255, 3), (300, 5), (2048, 5), (4097, 4), (20_000, 3)]
        {
            let mut logits: Vec<_> = (0..num_rows).map(|row| model_like(len, row)).collect();
            // One of them without ties.
            for (position, logit) in logits[0].iter_mut().enumerate() {
                *logit += rng::uniform(8, 8, position) as f32;
            }
            let sets = parameter_sets();
            let requests = sets.into_iter().enumerate().flat_map(|(number, params)| {
                (0..num_rows as usize)
                    .map(move |row| (row, request(params.clone(), number * 100 + row), None))
            });
            Case { logits, requests: requests.collect() }.compare(&gpu, &format!("{len} columns"));
        }
    }

    #[test]
    fn draws_from_a_real_vocabulary_equal_the_processors() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let logits = vec![model_like(151_936, 3)];
        let requests: Vec<_> = parameter_sets()
            .into_iter()
            .enumerate()
            .map(|(number, params)| request(SamplingParams { logprobs: Some(5), ..params }, number))
            .collect();
        Case::new(logits, requests).compare(&gpu, "a vocabulary");
    }

    /// Goal: every change of single logits, alone and with the others, on the device as on the
    /// processor. Method: random lists for random rows, with every filter.
    #[test]
    fn edits_equal_the_processors() {
        let Some(gpu) = Gpu::for_tests() else { return };
        for len in [7, 3000, 9001] {
            let mut case = Case {
                logits: (0..4).map(|row| model_like(len, 40 + row)).collect(),
                requests: Vec::new(),
            };
            for index in 0..48 {
                let some = |what: u64| pick(what, index, 2) == 1;
                let tokens = |what: u64, num: usize, end: usize| -> Vec<TokenId> {
                    (0..num).map(|i| pick(what + 100 * index as u64, i, end) as TokenId).collect()
                };
                // The best tokens are what edits matter for.
                let mut best: Vec<TokenId> = (0..len as TokenId).collect();
                best.sort_by(|a, b| {
                    case.logits[index % 4][*b as usize]
                        .total_cmp(&case.logits[index % 4][*a as usize])
                });
                best.truncate(30);
                let of_best = |what: u64, num: usize| -> Vec<TokenId> {
                    tokens(what, num, best.len()).into_iter().map(|i| best[i as usize]).collect()
                };
                let mut biases = if some(1) { of_best(11, 9) } else { Vec::new() };
                biases.extend(tokens(12, biases.len(), len));
                biases.sort_unstable();
                biases.dedup();
                let sets = parameter_sets();
                let params = SamplingParams {
                    logit_bias: biases.iter().map(|id| (*id, (*id % 7) as f32 - 3.5)).collect(),
                    repetition_penalty: if some(2) { 1.3 } else { 1.0 },
                    presence_penalty: if some(3) { 0.7 } else { 0.0 },
                    frequency_penalty: if some(4) { -0.3 } else { 0.0 },
                    logprobs: some(5).then_some(pick(6, index, 21) as u32),
                    ..sets[index % sets.len()].clone()
                };
                let mut request = request(params, index);
                if some(7) {
                    // Ids beyond the row are ignored.
                    request.forbidden = of_best(13, 3);
                    request.forbidden.push(len as TokenId + 5);
                }
                if request.params.needs_history() {
                    let mut seen = of_best(14, 40);
                    seen.extend(tokens(15, 1500, len + 10));
                    seen.extend(of_best(16, 60));
                    let num_prompt_tokens = pick(17, index, seen.len() + 1);
                    request.history = Some(TokenHistory { tokens: seen, num_prompt_tokens });
                }
                let mask = some(8).then(|| {
                    let words =
                        (0..len.div_ceil(32) - pick(18, index, 2)).map(|i| match pick(19, i, 4) {
                            0 => 0,
                            1 => u32::MAX,
                            _ => 0x5a5a_0ff0 ^ (i as u32).wrapping_mul(0x9e37_79b9),
                        });
                    TokenBitmask::from_words(words.collect())
                });
                case.requests.push((index % 4, request, mask));
            }
            case.compare(&gpu, &format!("{len} columns"));
        }
    }

    /// Where many logits are equal, the lowest tokens are kept.
    #[test]
    fn ties_are_kept_in_order_of_tokens() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let flat = vec![-2.0; 1000];
        let steps: Vec<f32> = (0..1000).map(|i| (i % 10) as f32 * 1e-3).collect();
        let zeros: Vec<f32> = (0..1000).map(|i| if i % 3 == 0 { 0.0 } else { -0.0 }).collect();
        let mut holes = vec![f32::NEG_INFINITY; 1000];
        holes[700..730].fill(3.0);
        let sets = [
            params(0.0, 0, 1.0, 0.0),
            params(1.0, 0, 0.25, 0.0),
            params(1.0, 20, 1.0, 0.0),
            params(1.0, 20, 0.5, 0.0),
            params(1.0, 300, 0.5, 0.0),
            params(1.0, 300, 1.0, 1.0),
            params(2.0, 0, 1e-6, 0.0),
            params(1.0, 0, 1.0, 1.0),
            params(0.5, 29, 0.999, 0.1),
        ];
        let logits = vec![flat, steps, zeros, holes];
        let requests = sets.iter().enumerate().flat_map(|(number, params)| {
            (0..12)
                .map(move |index| (index % 4, request(params.clone(), number * 50 + index), None))
        });
        let case = Case { logits, requests: requests.collect() };
        assert_eq!(case.compare(&gpu, "ties"), 108);
    }

    /// Goal: a small top-k, which is bounded by the best token of each chunk, keeps exactly k.
    /// Method: chunks with one good token each, all about as likely.
    #[test]
    fn top_k_takes_one_token_of_each_chunk() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let mut row = vec![-20.0; 256 * 40];
        for chunk in 0..40 {
            row[256 * chunk + 7 * chunk % 256] = (chunk * 17 % 40) as f32 * 0.05;
        }
        let requests = [1, 2, 5, 20, 39, 40, 41].into_iter().flat_map(|top_k| {
            (0..10).map(move |i| request(params(2.0, top_k, 1.0, 0.0), top_k as usize * 10 + i))
        });
        Case::new(vec![row], requests.collect()).compare(&gpu, "chunks");
    }

    #[test]
    fn broken_rows_fail_alone() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let mut case = Case { logits: Vec::new(), requests: Vec::new() };
        let sets = [
            params(0.0, 0, 1.0, 0.0),
            params(1.0, 0, 1.0, 0.0),
            params(1.0, 20, 0.9, 0.0),
            params(1.0, 0, 0.9, 0.0),
        ];
        let edits: [fn(&mut SampleRequest) -> Option<TokenBitmask>; 4] = [
            |_| None,
            |request| {
                request.forbidden = vec![600];
                None
            },
            |_| Some(TokenBitmask::all_but(601, &[600])),
            |_| Some(TokenBitmask::only(600)),
        ];
        for (number, params) in sets.iter().enumerate() {
            for edit in edits {
                for bad in [f32::NAN, f32::INFINITY, -f32::NAN, f32::NEG_INFINITY, 1.0] {
                    let mut row = model_like(601, number as u64);
                    row[600] = bad;
                    let params = SamplingParams { logprobs: Some(2), ..params.clone() };
                    let mut request = request(params, number);
                    let mask = edit(&mut request);
                    case.requests.push((case.logits.len(), request, mask));
                    case.logits.push(row);
                }
            }
        }
        let impossible = case.logits.len();
        case.logits.push(vec![f32::NEG_INFINITY; 601]);
        // Divided by its penalty, a logit is infinite: also outside of the mask.
        case.logits.push(vec![50.0; 601]);
        for params in sets {
            case.requests.push((impossible, request(params.clone(), 0), None));
            let params = SamplingParams { repetition_penalty: 1e-37, ..params };
            let mut request = request(params, 0);
            request.history = Some(TokenHistory { tokens: vec![3], num_prompt_tokens: 1 });
            case.requests.push((impossible + 1, request, Some(TokenBitmask::only(500))));
        }
        case.compare(&gpu, "broken rows");
        let num_failed = case.on_device(&gpu).iter().filter(|token| token.is_err()).count();
        assert_eq!(num_failed, 4 * (4 * 3 + 1) + 4 + 4);
    }

    /// Goal: a row's bits do not depend on the batch. Method: the same rows alone, in order,
    /// backwards, and in a larger launch.
    #[test]
    fn results_do_not_depend_on_the_batch() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let logits: Vec<_> = (0..6).map(|row| model_like(5000, row)).collect();
        let requests: Vec<_> = parameter_sets()
            .into_iter()
            .enumerate()
            .map(|(index, params)| {
                let logprobs = index.is_multiple_of(3).then_some(3);
                request(SamplingParams { logprobs, ..params }, index)
            })
            .collect();
        let tensor = upload(&gpu, &logits);
        let wanted: Vec<_> = requests
            .iter()
            .enumerate()
            .map(|(index, request)| (index % 6, Wanted::Token(request, None)))
            .collect();
        let mut sampler = sampler(&gpu, 16, 5000);
        let together = sampler.sample(&tensor, &wanted).unwrap();
        for (wanted, expected) in wanted.iter().zip(&together) {
            let alone = sampler.sample(&tensor, &[*wanted]).unwrap();
            assert_eq!(alone[0], *expected);
        }
        let backwards: Vec<_> = wanted.iter().rev().copied().collect();
        sampler.upload(&backwards, 16).unwrap();
        sampler.launch(&tensor).unwrap();
        let mut found = sampler.download(&backwards).unwrap();
        found.reverse();
        assert_eq!(found, together);
    }

    /// A recorded launch serves later steps of as many rows.
    #[test]
    fn recordings_read_what_was_uploaded_since() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let tensor = upload(&gpu, &[model_like(3000, 1), model_like(3000, 2)]);
        let steps: Vec<SampleRequest> = parameter_sets()
            .into_iter()
            .enumerate()
            .map(|(i, params)| request(params, i))
            .collect();
        let (mut recorded, mut plain) = (sampler(&gpu, 2, 3000), sampler(&gpu, 2, 3000));
        recorded.upload(&[(0, Wanted::Token(&steps[0], None))], 2).unwrap();
        recorded.launch_for_recording(&tensor).unwrap();
        let ((), graph) = gpu
            .capture(|| recorded.launch_for_recording(&tensor).map_err(|_| GpuError::NotBuilt))
            .unwrap();
        for pair in steps.windows(2) {
            let wanted = [(1, Wanted::Token(&pair[0], None)), (0, Wanted::Token(&pair[1], None))];
            recorded.upload(&wanted, 2).unwrap();
            gpu.replay(&graph).unwrap();
            let found = recorded.download(&wanted).unwrap();
            assert_eq!(found, plain.sample(&tensor, &wanted).unwrap());
        }
        assert_eq!(recorded.rows().num_moves(), 0);
    }

    #[test]
    fn given_tokens_are_scored() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let mut rows: Vec<Vec<f32>> =
            vec![model_like(700, 1), vec![-1e4; 700], model_like(700, 2), model_like(700, 3)];
        rows[2][650] = f32::NAN;
        rows[3][20..690].fill(f32::NEG_INFINITY);
        let wanted: Vec<_> = (0..4)
            .flat_map(|row| {
                [(0, 0), (699, 20), (123, 5), (9000, 1)]
                    .map(|(token, num_top)| (row, Wanted::Logprobs(token, num_top)))
            })
            .collect();
        let found = sampler(&gpu, 16, 700).sample(&upload(&gpu, &rows), &wanted).unwrap();
        for ((row, wanted), found) in wanted.iter().zip(&found) {
            let (Wanted::Logprobs(token, num_top), Yielded::Logprobs(found)) = (wanted, found)
            else {
                panic!("{found:?}")
            };
            assert_near(found, &token_logprobs(&rows[*row], *token, *num_top), "scored");
        }
        let few = sampler(&gpu, 1, 3)
            .sample(&upload(&gpu, &[vec![1.0, 3.0, 2.0]]), &[(0, Wanted::Logprobs(0, 20))])
            .unwrap();
        let Yielded::Logprobs(few) = &few[0] else { panic!("{few:?}") };
        assert_near(few, &token_logprobs(&[1.0, 3.0, 2.0], 0, 20), "few");
    }
}
