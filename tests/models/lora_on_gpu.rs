//! Goal: on a card adapters compute what they compute on the processor, and disturb nobody.
//!
//! Method: PEFT's numbers; decode steps, whose bits company does not change; and adapters that come and
//! go while others generate.

use super::gpu::{BF16_WEIGHTS, ON_GPU, compare_while_equal, has_gpu};
use super::lora::{MIXED, random_adapter};
use super::*;

/// A model on a card with an engine, and adapters in the same memory.
struct Served {
    planned: PlannedModel,
    engine: EngineHandle,
    gpu: Gpu,
}

impl Served {
    fn start(model: &Path, setup: Setup) -> Self {
        let options = load_options(setup);
        let Device::Gpu(gpu) = options.device.clone() else { panic!("it is to run on a card") };
        let planned = PlannedModel::open(model, options).unwrap();
        let engine = start_planned(&planned, setup);
        Self { planned, engine, gpu }
    }

    fn adapter(&self, directory: &Path) -> Adapter {
        Adapter::new("adapter", self.planned.load_adapter(directory).unwrap())
    }

    /// Lets a prompt be read for everybody, so that of a later request only the last token is left:
    /// alone it is multiplied by other kernels than a whole prompt.
    async fn prime(&self, prompt: &[u32], adapters: &[Option<Adapter>]) {
        for adapter in adapters {
            let adapter = adapter.clone();
            let asked = Request { adapter, ..request(prompt, 1, sampled(0)) };
            run(&self.engine, asked).await;
        }
    }

    async fn ask(&self, prompt: &[u32], index: usize, adapter: Option<&Adapter>) -> Said {
        let adapter = adapter.cloned();
        run(&self.engine, Request { adapter, ..request(prompt, 16, sampled(index)) }).await
    }

    fn free_bytes(&self) -> usize {
        self.gpu.memory_info().unwrap().0
    }

    /// Waits until so much is free again.
    async fn expect_free(&self, num_bytes: usize) {
        for _ in 0..1000 {
            if num_bytes <= self.free_bytes() {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        panic!("{num_bytes} bytes were free, and now {}", self.free_bytes());
    }
}

#[tokio::test]
async fn a_card_computes_what_peft_does() {
    if !has_gpu() {
        return;
    }
    let (base, names) = MIXED[0];
    let served = Served::start(&tiny(base), ON_GPU);
    for name in names {
        let adapter = served.adapter(&tiny(name));
        compare_adapted((&served.engine, Some(&adapter)), name, BF16_WEIGHTS).await;
    }
    // The same engine still computes the model itself.
    compare_engine(&served.engine, base, BF16_WEIGHTS).await;
}

/// Goal: the same of models and ranks that PEFT's files here are not for. Method: the processor's
/// log-probabilities of greedy answers, as long as the tokens are the same.
#[tokio::test]
async fn a_card_agrees_with_the_processor_about_adapters() {
    if !has_gpu() {
        return;
    }
    let greedy = || SamplingParams { temperature: 0.0, logprobs: Some(5), ..sampled(0) };
    for (base, rank) in [("qwen3-q8_0.gguf", 16), ("mixed.gguf", 5)] {
        let base = tiny(base);
        let made = random_adapter(&base, rank);
        let served = Served::start(&base, ON_GPU);
        let on_card = served.adapter(made.path());
        let processor = start(&base, ROOMY);
        let planned = PlannedModel::open(&base, load_options(ROOMY)).unwrap();
        let adapter = Adapter::new("adapter", planned.load_adapter(made.path()).unwrap());
        let mut num_compared = 0;
        for prompt in prompts().into_iter().skip(3).take(3) {
            let asked = |adapter: &Adapter| {
                let adapter = Some(adapter.clone());
                Request { adapter, ..request(&prompt, 16, greedy()) }
            };
            let found = run(&served.engine, asked(&on_card)).await;
            let expected = run(&processor, asked(&adapter)).await;
            num_compared += compare_while_equal(&found, &expected, 1.0);
        }
        assert!(15 < num_compared, "answers part after {num_compared} tokens");
    }
}

/// Goal: a decode step gives every sequence the bits that it has alone, with an adapter or none,
/// recorded or launched. Method: alone a plain sequence is computed by recordings, in company by
/// launches beside rows that have terms.
#[tokio::test]
async fn company_of_adapters_changes_no_bit_of_a_decode_step() {
    if !has_gpu() {
        return;
    }
    let quantised = ["mixed.gguf", "qwen3-q8_0.gguf"].map(tiny);
    let random: Vec<_> = quantised
        .iter()
        .map(|base| (base.clone(), [5, 16].map(|rank| random_adapter(base, rank))))
        .collect();
    let mut cases: Vec<(PathBuf, [PathBuf; 2])> =
        MIXED[..1].iter().map(|(base, names)| (tiny(base), names.map(tiny))).collect();
    let path = |directory: &tempfile::TempDir| directory.path().to_path_buf();
    cases
        .extend(random.iter().map(|(base, made)| (base.clone(), [path(&made[0]), path(&made[1])])));
    let eager = Setup { place: Place::Gpu(Execution::Eager), ..ON_GPU };
    let prompt = &prompts()[6];
    for (base, directories) in cases {
        let mut alone: Vec<Said> = Vec::new();
        for setup in [ON_GPU, eager] {
            let served = Served::start(&base, setup);
            let [one, other] = [0, 1].map(|i| Some(served.adapter(&directories[i])));
            let adapters = [None, one, other];
            served.prime(prompt, &adapters).await;
            for index in alone.len()..7 {
                alone.push(served.ask(prompt, index, adapters[index % 3].as_ref()).await);
            }
            let company =
                (0..7).map(|index| served.ask(prompt, index, adapters[index % 3].as_ref()));
            let together = futures_util::future::join_all(company).await;
            for (index, said) in together.iter().enumerate() {
                assert_eq!(said.num_cached_tokens, 96);
                assert_same("in company", index, said, &alone[index]);
            }
        }
        // The same draws from other numbers.
        for (one, other) in [(0, 1), (0, 2), (1, 2)] {
            assert_ne!(alone[one].logprob_bits, alone[other].logprob_bits);
        }
    }
}

/// Goal: who generates notices nothing of adapters that come and go, and their memory comes back.
/// Method: a thread that loads and drops one again and again, beside sequences whose steps are being
/// recorded and launched.
#[tokio::test(flavor = "multi_thread")]
async fn adapters_come_and_go_while_others_generate() {
    if !has_gpu() {
        return;
    }
    let (base, names) = MIXED[0];
    let prompt = &prompts()[6];
    let served = Served::start(&tiny(base), ON_GPU);
    let adapters = [None, Some(served.adapter(&tiny(names[0])))];
    served.prime(prompt, &adapters).await;
    let mut expected = Vec::new();
    for (index, adapter) in adapters.iter().enumerate() {
        expected.push(served.ask(prompt, index, adapter.as_ref()).await);
    }
    let other = random_adapter(&tiny(base), 16);
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let ordering = std::sync::atomic::Ordering::Relaxed;
    let num_loads = std::thread::scope(|scope| {
        let loader = scope.spawn(|| {
            let mut num_loads = 0;
            while !is_over.load(ordering) {
                drop(served.adapter(other.path()));
                num_loads += 1;
            }
            num_loads
        });
        tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(async {
                // In ever larger company, so that steps of new shapes are recorded.
                for num_plain in [1, 3, 6] {
                    let plain = (0..num_plain).map(|_| served.ask(prompt, 0, adapters[0].as_ref()));
                    let adapted = served.ask(prompt, 1, adapters[1].as_ref());
                    for said in futures_util::future::join_all(plain).await {
                        assert_same("beside loads", 0, &said, &expected[0]);
                    }
                    assert_same("beside loads", 1, &adapted.await, &expected[1]);
                }
            });
        });
        is_over.store(true, ordering);
        loader.join().unwrap()
    });
    assert!(1 < num_loads, "nothing was loaded meanwhile");
}

/// Goal: an adapter's memory comes back with the last of its requests. Method: what the emulation says is
/// free; of a card others take some too.
#[tokio::test]
async fn unloading_gives_a_cards_memory_back() {
    if !has_gpu() {
        return;
    }
    let (base, names) = MIXED[0];
    let served = Served::start(&tiny(base), ON_GPU);
    if !served.gpu.is_emulated() {
        return;
    }
    let prompt = &prompts()[4];
    run(&served.engine, request(prompt, 2, sampled(0))).await;
    let free_before = served.free_bytes();
    let weights = served.planned.load_adapter(&tiny(names[0])).unwrap();
    let num_bytes = weights.num_bytes();
    assert!(served.free_bytes() + num_bytes <= free_before);
    let adapter = Adapter::new("adapter", weights);
    let asked = Request { adapter: Some(adapter), ..request(prompt, 40, sampled(4)) };
    let mut events = served.engine.generate(asked).unwrap();
    assert!(matches!(events.next().await, Some(Event::Started { .. })));
    assert!(served.free_bytes() + num_bytes <= free_before, "the request has it");
    while events.next().await.is_some() {}
    served.expect_free(free_before).await;
}

/// Goal: what is kept for adapters is what they take, and one that would take a step's memory is
/// refused in one line.
#[test]
fn an_adapter_that_does_not_fit_is_refused() {
    let model = tiny(MIXED[0].0);
    let full = random_adapter(&model, 16);
    let places = [Place::Cpu, Place::Gpu(Execution::Recorded)];
    for place in places.into_iter().take(1 + usize::from(has_gpu())) {
        let options = LoadOptions { adapters: (3, 16), ..load_options(Setup { place, ..ROOMY }) };
        let planned = PlannedModel::open(&model, options).unwrap();
        let weights = planned.load_adapter(full.path()).unwrap();
        assert_eq!(3 * weights.num_bytes() as u64, planned.plan.adapter_bytes);
    }
    if !has_gpu() {
        return;
    }
    let greedy = Setup { max_num_batched_tokens: 400_000_000, ..ON_GPU };
    let planned = PlannedModel::open(&model, load_options(greedy)).unwrap();
    let error = planned.load_adapter(full.path()).unwrap_err().to_string();
    assert!(error.contains("and the GPU has 0 left beside what steps need"), "{error}");
}
