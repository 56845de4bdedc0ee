//! Guessing what comes next changes when tokens come, and never which.
//!
//! Method: the same requests with guesses and without, greedy, sampled and with penalties, alone and
//! together; tokens and the bits of their log-probabilities. A draft model that is the model itself
//! is always right, another one hardly ever.

use super::*;

const ROOM: usize = 40;

fn by(drafter: Drafter) -> SpeculationConfig {
    SpeculationConfig { drafter, max_drafts: 5 }
}

fn params(index: usize) -> SamplingParams {
    let sampled = sampled(index);
    match index % 4 {
        0 => SamplingParams { temperature: 0.0, ..sampled },
        1 => SamplingParams { temperature: 0.3, top_p: 0.9, ..sampled },
        2 => SamplingParams { temperature: 0.2, repetition_penalty: 1.2, ..sampled },
        _ => SamplingParams { temperature: 0.0, min_tokens: 12, presence_penalty: 0.5, ..sampled },
    }
}

/// Tokens that no small random model gets tired of.
fn asked(index: usize, prompt: &[u32]) -> Request {
    let stop_token_ids: Arc<[u32]> =
        if index % 4 == 3 { Arc::from([7, 9, 11]) } else { Arc::from([]) };
    let stop = StopConditions { max_tokens: ROOM, stop_token_ids };
    Request { stop, ..request(prompt, ROOM, params(index)) }
}

async fn alone_and_together(engine: &EngineHandle) -> (Vec<Said>, u64) {
    let prompts = prompts();
    let mut said = Vec::new();
    let first = engine.stats().num_steps;
    for (index, prompt) in prompts.iter().enumerate() {
        said.push(run(engine, asked(index, prompt)).await);
    }
    let num_steps = engine.stats().num_steps - first;
    let together = prompts.iter().enumerate().map(|(i, prompt)| run(engine, asked(i, prompt)));
    said.extend(futures_util::future::join_all(together).await);
    (said, num_steps)
}

fn planned(model: &str, draft: Option<&str>, setup: Setup) -> PlannedModel {
    let open = |name: &str| Checkpoint::open(&tiny(name)).unwrap();
    PlannedModel::plan_with_draft(open(model), draft.map(open), load_options(setup)).unwrap()
}

#[tokio::test]
async fn guesses_change_no_bit_of_what_is_said() {
    for model in ["mixed.gguf", "qwen3-q8_0.gguf", "qwen3moe-mixed.gguf"] {
        let plain = start_planned(&planned(model, None, ROOMY), ROOMY);
        let (expected, num_plain_steps) = alone_and_together(&plain).await;
        let cramped = Setup { max_num_batched_tokens: 7, num_threads: 2, ..ROOMY };
        for (context, setup, drafter, draft) in [
            ("looked up", ROOMY, Drafter::PromptLookup, None),
            ("looked up in small steps", cramped, Drafter::PromptLookup, None),
            ("the model itself", ROOMY, Drafter::Model, Some(model)),
            ("the model itself in small steps", cramped, Drafter::Model, Some(model)),
            ("another model", ROOMY, Drafter::Model, Some("f32-tied.gguf")),
        ] {
            let planned = planned(model, draft, setup);
            let engine = start_speculating(&planned, setup, Some(by(drafter)));
            let (said, num_steps) = alone_and_together(&engine).await;
            for (index, said) in said.iter().enumerate() {
                assert_same(&format!("{model}, {context}"), index, said, &expected[index]);
            }
            if draft == Some(model) {
                assert!(num_steps < num_plain_steps, "{context}: {num_steps} steps");
            }
        }
    }
}

/// Goal: guesses are worth nothing if they cost the cache. Method: so few blocks that sequences are
/// preempted, with guesses all the time.
#[tokio::test]
async fn guesses_and_preemption_go_together() {
    let model = "k-quants.gguf";
    let (expected, _) =
        alone_and_together(&start_planned(&planned(model, None, ROOMY), ROOMY)).await;
    for (drafter, draft, num_models) in
        [(Drafter::PromptLookup, None, 1), (Drafter::Model, Some(model), 2)]
    {
        let kv_cache_bytes = 45 * num_models * block_bytes(&tiny(model), 4);
        let setup = Setup { block_size: 4, kv_cache_bytes, ..ROOMY };
        let engine = start_speculating(&planned(model, draft, setup), setup, Some(by(drafter)));
        let (said, _) = alone_and_together(&engine).await;
        for (index, said) in said.iter().enumerate() {
            assert_same("preempted", index, said, &expected[index]);
        }
        assert!(0 < engine.stats().num_preemptions, "the setup preempts nothing");
    }
}

/// Goal: the same on a card, where more tokens at once are added up in another order. Method: the
/// model's own guesses, greedy; so few tokens that no rounding decides.
#[tokio::test]
async fn a_card_verifies_guesses() {
    if Gpu::for_tests().is_none() {
        return;
    }
    let setup = Setup { place: Place::Gpu(Execution::Recorded), ..ROOMY };
    let greedy = SamplingParams { temperature: 0.0, ..sampled(0) };
    let ask = |prompt: &[u32]| request(prompt, 12, greedy.clone());
    for (drafter, draft) in
        [(Drafter::PromptLookup, None), (Drafter::Model, Some("q8_0-hd128.gguf"))]
    {
        let plain = start_planned(&planned("q8_0-hd128.gguf", None, setup), setup);
        let guessing = planned("q8_0-hd128.gguf", draft, setup);
        let guessing = start_speculating(&guessing, setup, Some(by(drafter)));
        for prompt in &prompts()[3..6] {
            let expected = run(&plain, ask(prompt)).await.tokens;
            assert_eq!(run(&guessing, ask(prompt)).await.tokens, expected);
        }
        if draft.is_some() {
            assert!(guessing.stats().num_steps < plain.stats().num_steps);
        }
    }
}

/// Goal: a token that only the model has, among the padding of its vocabulary, harms nobody. Method: a
/// draft model with a smaller one.
#[tokio::test]
async fn a_draft_model_may_have_less_padding() {
    let (model, draft) = ("f32-tied.gguf", "mixed.gguf");
    let checkpoint = |name: &str| planned(name, None, ROOMY).config.vocab_size;
    assert!(checkpoint(draft) < checkpoint(model));
    let mut prompt = prompts()[4].clone();
    prompt[7] = checkpoint(model) as u32 - 1;
    *prompt.last_mut().unwrap() = checkpoint(draft) as u32;
    let plain = start_planned(&planned(model, None, ROOMY), ROOMY);
    let planned = planned(model, Some(draft), ROOMY);
    let guessing = start_speculating(&planned, ROOMY, Some(by(Drafter::Model)));
    for index in 0..4 {
        let expected = run(&plain, asked(index, &prompt)).await;
        assert_same("padding", index, &run(&guessing, asked(index, &prompt)).await, &expected);
    }
    assert_eq!(guessing.stats().num_failed_steps, 0);
}

/// Goal: what cannot work is said before anything is loaded.
#[test]
fn a_draft_model_that_cannot_follow_is_refused() {
    let open = |name: &str| Checkpoint::open(&tiny(name)).unwrap();
    let refused = |model, draft| {
        let planned =
            PlannedModel::plan_with_draft(open(model), Some(open(draft)), load_options(ROOMY));
        planned.err().expect("it cannot").to_string()
    };
    let error = refused("yarn.gguf", "mixed.gguf");
    assert!(error.contains("--max-model-len") || error.contains("--rope-scaling"), "{error}");
}
