//! Goal: positions are exact up to 131,072 tokens.
//!
//! Method: a small model with YaRN whose attention is so sharp that a text one position off says
//! something else (`scripts/gen_long_context.py` saw to that), beside Hugging Face's log-probabilities
//! at the end of texts of several lengths. They share their beginnings, so one reading is enough.

use super::*;

/// Of log-probabilities, where a position off means one and more. Hugging Face multiplies positions
/// with frequencies in `f32`, which at 131,072 rounds by up to 0.008 of a radian.
const TOLERANCE: f32 = 0.05;

#[derive(Deserialize)]
struct LongGolden {
    lengths: Vec<usize>,
    /// For each length those of all tokens.
    logprobs: Vec<Vec<f32>>,
}

#[tokio::test]
async fn positions_are_exact_up_to_131072_tokens() {
    let golden = std::fs::read_to_string(tiny("hf-128k.json")).unwrap();
    let golden: LongGolden = serde_json::from_str(&golden).unwrap();
    let setup = Setup {
        kv_cache_bytes: 96 << 20,
        max_num_batched_tokens: 2048,
        num_threads: 2,
        kv_cache_dtype: KvDtype::F32,
        ..ROOMY
    };
    let engine = start(&tiny("hf-128k"), setup);
    for (&length, expected) in golden.lengths.iter().zip(&golden.logprobs) {
        let prompt: Vec<u32> =
            (0..length as u64).map(|i| ((i * i / 7 + i * 31) % 250) as u32).collect();
        let params = SamplingParams { temperature: 0.0, logprobs: Some(20), ..sampled(0) };
        let mut events = engine.generate(request(&prompt, 1, params)).unwrap();
        let mut num_compared = 0;
        while let Some(event) = events.next().await {
            if let Event::Failed(why) = &event {
                panic!("{why}");
            }
            let Event::Token { token, .. } = event else { continue };
            for (id, logprob) in token.logprobs.unwrap().top {
                let expected = expected[id as usize];
                let error = (logprob - expected).abs();
                assert!(error < TOLERANCE, "{length}: {id} {logprob}, not {expected}");
                num_compared += 1;
            }
        }
        assert_eq!(num_compared, 20);
    }
}
