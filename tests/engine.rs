//! Goal: the engine thread answers everybody, frees what nobody needs any more within a step, and
//! survives its runner.
//!
//! Method: a fake runner behind the real thread and handle. Where order matters, a gate lets the
//! runner's steps pass one by one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt};
use qwen_server::engine::request::Priority;
use qwen_server::engine::{
    EngineConfig, EngineHandle, EngineStats, Event, EventStream, FinishReason, Health, Request,
    StopConditions, SubmitError, spawn,
};
use qwen_server::sampling::SamplingParams;
use qwen_server::scheduler::step::{Runner, SchedulerOutput, SeqOutput, TokenMasks};
use qwen_server::text::TokenId;

#[path = "support/fake_runner.rs"]
mod fake_runner;
use fake_runner::{ERROR_TOKEN, FakeRunner, NAN_TOKEN, PANIC_TOKEN, once};

fn config() -> EngineConfig {
    EngineConfig {
        max_num_seqs: 4,
        max_num_batched_tokens: 16,
        block_size: 4,
        num_blocks: 64,
        max_model_len: 200,
        max_queue: 8,
        ..EngineConfig::default()
    }
}

fn start(runner: FakeRunner) -> EngineHandle {
    spawn(config(), once(runner)).0
}

fn request(prompt: &[TokenId], max_tokens: usize) -> Request {
    Request {
        id: "test".into(),
        prompt: prompt.into(),
        params: Arc::new(SamplingParams::default()),
        stop: StopConditions { max_tokens, stop_token_ids: Arc::new([]) },
        n: 1,
        grammar: None,
        thinking: None,
        cache_salt: None,
        priority: Priority::default(),
        fairness_id: None,
        deadline: None,
        pins: Arc::new([]),
        pooling: None,
        adapter: None,
    }
}

async fn collect(stream: impl Stream<Item = Event>) -> Vec<Event> {
    stream.collect().await
}

fn tokens_of(events: &[Event], wanted: u32) -> Vec<TokenId> {
    let token = |event: &Event| match event {
        Event::Token { choice, token } if *choice == wanted => Some(token.id),
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

async fn next_token(stream: &mut EventStream) {
    while let Some(event) = stream.next().await {
        if matches!(event, Event::Token { .. }) {
            return;
        }
    }
    panic!("the stream ended");
}

/// Waits, without sleeping, until the engine says what is expected of it.
async fn until(handle: &EngineHandle, is_reached: impl Fn(&EngineStats) -> bool) {
    let reached = async {
        while !is_reached(&handle.stats()) {
            tokio::task::yield_now().await;
        }
    };
    let stats = tokio::time::timeout(Duration::from_secs(20), reached).await;
    assert!(stats.is_ok(), "never reached: {:?}", handle.stats());
}

fn is_empty(stats: &EngineStats) -> bool {
    stats.num_running + stats.num_waiting == 0 && stats.num_free_blocks == stats.num_blocks
}

#[tokio::test]
async fn answers_in_order_and_frees_everything() {
    let handle = start(FakeRunner::default());
    handle.ready().await.expect("a runner");
    let params =
        SamplingParams { logprobs: Some(2), prompt_logprobs: Some(1), ..Default::default() };
    let asked = Request { n: 3, params: Arc::new(params), ..request(&[1, 2, 3, 4, 5, 6], 5) };
    let events = collect(handle.generate(asked).expect("accepted")).await;
    assert_eq!(events[0], Event::Started { num_cached_tokens: 0 });
    let scored = events.iter().filter_map(|event| match event {
        Event::PromptLogprobs(scored) => Some(scored),
        _ => None,
    });
    let scored: Vec<_> = scored.flatten().map(|entry| (entry.token, entry.top.len())).collect();
    assert_eq!(scored, [(2, 1), (3, 1), (4, 1), (5, 1), (6, 1)]);
    for wanted in 0..3 {
        assert_eq!(tokens_of(&events, wanted).len(), 5);
        let finished = Event::Finished { choice: wanted, reason: FinishReason::Length };
        assert_eq!(events.iter().filter(|event| **event == finished).count(), 1);
    }
    assert_ne!(tokens_of(&events, 0), tokens_of(&events, 1));
    assert!(matches!(events.last(), Some(Event::Finished { .. })));
    // The end of a stream is told after its blocks are free.
    assert!(is_empty(&handle.stats()));
    assert_eq!(handle.health(), Health::Alive);
}

#[tokio::test]
async fn what_others_ask_changes_nothing() {
    let alone = start(FakeRunner::default());
    let alone = collect(alone.generate(request(&[1, 2, 3], 20)).expect("accepted")).await;
    let crowd = start(FakeRunner::default());
    let streams = (0..12).map(|i| {
        let prompt: &[_] = if i % 2 == 0 { &[1, 2, 3] } else { &[1, 2, 3, 4, 5, 6, 7, 8, 9] };
        crowd.generate(request(prompt, 20)).expect("accepted")
    });
    let answers = futures_util::future::join_all(streams.map(collect).collect::<Vec<_>>()).await;
    for answer in answers.iter().step_by(2) {
        assert_eq!(tokens_of(answer, 0), tokens_of(&alone, 0));
    }
    assert!(is_empty(&crowd.stats()));
}

#[tokio::test]
async fn stop_tokens_end_a_choice() {
    let runner = FakeRunner { script: vec![10, 11, 12, 13], ..FakeRunner::default() };
    let handle = start(runner);
    let mut asked = request(&[1, 2], 50);
    asked.stop.stop_token_ids = Arc::new([12]);
    let events = collect(handle.generate(asked).expect("accepted")).await;
    assert_eq!(tokens_of(&events, 0), [10, 11, 12]);
    let finished = Event::Finished { choice: 0, reason: FinishReason::Stop };
    assert_eq!(events.last(), Some(&finished));
}

#[tokio::test]
async fn a_dropped_stream_frees_its_blocks() {
    let (runner, gate) = FakeRunner::default().gated();
    let handle = start(runner);
    let mut decoding = handle.generate(request(&[1; 10], 100)).expect("accepted");
    gate.let_pass(1);
    next_token(&mut decoding).await;
    let prefilling = handle.generate(request(&[2; 150], 10)).expect("accepted");
    gate.let_pass(2);
    until(&handle, |stats| stats.num_running == 2).await;
    let waiting: Vec<_> =
        (0..4).map(|i| handle.generate(request(&[3 + i; 150], 10)).expect("accepted")).collect();
    gate.let_pass(1);
    until(&handle, |stats| 0 < stats.num_waiting).await;
    drop((decoding, prefilling, waiting));
    // The step that waits at the gate must end; no other may begin.
    gate.let_pass(1);
    until(&handle, is_empty).await;
}

#[tokio::test]
async fn a_cancelled_choice_is_silent() {
    let (runner, gate) = FakeRunner::default().gated();
    let handle = start(runner);
    let mut stream =
        handle.generate(Request { n: 2, ..request(&[1, 2, 3], 10) }).expect("accepted");
    gate.let_pass(1);
    next_token(&mut stream).await;
    stream.cancel_choice(1);
    stream.cancel_choice(1);
    drop(gate);
    let events = collect(&mut stream).await;
    assert!(tokens_of(&events, 1).is_empty());
    assert!(!events.iter().any(|event| matches!(event, Event::Finished { choice: 1, .. })));
    let finished = Event::Finished { choice: 0, reason: FinishReason::Length };
    assert_eq!(events.last(), Some(&finished));
    until(&handle, is_empty).await;
}

#[tokio::test]
async fn refuses_instead_of_waiting() {
    let (runner, gate) = FakeRunner::default().gated();
    let handle = start(runner);
    let too_long = handle.generate(request(&[1; 200], 1)).expect_err("too long");
    assert_eq!(too_long, SubmitError::TooLong { needed_tokens: 201, max_model_len: 200 });
    assert!(handle.generate(request(&[1; 200], 0)).is_ok(), "only the prompt fits");
    let accepted: Vec<_> =
        (0..20).filter_map(|_| handle.generate(request(&[1, 2, 3], 5)).ok()).collect();
    assert!((11..=12).contains(&accepted.len()), "four run and eight wait: {}", accepted.len());
    let busy = handle.generate(request(&[1], 1)).expect_err("full");
    assert!(matches!(busy, SubmitError::Busy { .. }));
    drop(gate);
    for stream in accepted {
        assert_eq!(tokens_of(&collect(stream).await, 0).len(), 5);
    }
    // There is room again.
    assert_eq!(collect(handle.generate(request(&[1], 1)).expect("accepted")).await.len(), 3);
}

#[tokio::test]
async fn drains() {
    let (runner, gate) = FakeRunner::default().gated();
    let (handle, thread) = spawn(config(), once(runner));
    let streams: Vec<_> =
        (0..6).map(|_| handle.generate(request(&[1, 2, 3], 5)).expect("accepted")).collect();
    handle.drain();
    assert_eq!(handle.generate(request(&[1], 1)).expect_err("closed"), SubmitError::Stopping);
    assert!(!handle.is_ready());
    drop(gate);
    for stream in streams {
        assert_eq!(tokens_of(&collect(stream).await, 0).len(), 5);
    }
    handle.stopped().await;
    thread.join().expect("a clean end");
    assert_eq!(handle.health(), Health::Alive);
    assert_eq!(handle.generate(request(&[1], 1)).expect_err("over"), SubmitError::Stopping);
}

#[tokio::test]
async fn an_idle_engine_drains_at_once() {
    let handle = start(FakeRunner::default());
    handle.ready().await.expect("a runner");
    handle.drain();
    handle.stopped().await;
}

#[tokio::test]
async fn ends_everything_when_told_to() {
    let (runner, gate) = FakeRunner::default().gated();
    let handle = start(runner);
    let streams: Vec<_> =
        (0..6).map(|_| handle.generate(request(&[1, 2, 3], 100)).expect("accepted")).collect();
    handle.drain();
    handle.abort_all();
    gate.let_pass(1);
    for stream in streams {
        let finished = Event::Finished { choice: 0, reason: FinishReason::Abort };
        assert_eq!(collect(stream).await.last(), Some(&finished));
    }
    handle.stopped().await;
}

#[tokio::test]
async fn infinite_logits_fail_only_their_request() {
    let handle = start(FakeRunner::default());
    let good = handle.generate(request(&[1, 2, 3], 30)).expect("accepted");
    let bad = Request { n: 2, ..request(&[1, 2, NAN_TOKEN], 30) };
    let bad = handle.generate(bad).expect("accepted");
    let (good, bad) = tokio::join!(collect(good), collect(bad));
    assert!(matches!(bad.last(), Some(Event::Failed(reason)) if reason.contains("finite")));
    assert_eq!(tokens_of(&good, 0).len(), 30);
    until(&handle, is_empty).await;
    assert_eq!(handle.stats().num_failed_steps, 0);
}

/// A failing step costs the requests of that step; those behind them do not notice.
async fn survives(marker: TokenId, words: &str) {
    let (runner, gate) = FakeRunner::default().gated();
    let (handle, _) = spawn(EngineConfig { max_num_seqs: 1, ..config() }, once(runner));
    let before = handle.generate(request(&[1, 2, 3, 4, 5], 10)).expect("accepted");
    let bad = Request { n: 2, ..request(&[1, 2, 3, 4, marker], 30) };
    let bad = handle.generate(bad).expect("accepted");
    let after = handle.generate(request(&[1, 2, 3, 4, 5], 10)).expect("accepted");
    drop(gate);
    let (before, bad, after) = tokio::join!(collect(before), collect(bad), collect(after));
    assert_eq!(before[0], Event::Started { num_cached_tokens: 0 });
    assert_eq!(bad[0], Event::Started { num_cached_tokens: 4 });
    assert!(matches!(bad.last(), Some(Event::Failed(reason)) if reason.contains(words)), "{bad:?}");
    assert_eq!(after[0], Event::Started { num_cached_tokens: 0 }, "the cache is in doubt");
    assert_eq!(tokens_of(&before, 0).len(), 10);
    assert_eq!(tokens_of(&before, 0), tokens_of(&after, 0));
    assert_eq!(handle.stats().num_failed_steps, 2, "it is tried once more, alone");
    assert_eq!(handle.health(), Health::Alive);
    until(&handle, is_empty).await;
}

#[tokio::test]
async fn survives_an_error() {
    survives(ERROR_TOKEN, "asked for an error").await;
}

#[tokio::test]
async fn survives_a_panic() {
    survives(PANIC_TOKEN, "asked for a panic").await;
}

#[tokio::test]
async fn others_in_a_failing_step_do_not_notice() {
    let alone = start(FakeRunner::default());
    let alone = collect(alone.generate(request(&[1, 2, 3], 40)).expect("accepted")).await;
    let handle = start(FakeRunner::default());
    let good: Vec<_> =
        (0..3).map(|_| handle.generate(request(&[1, 2, 3], 40)).expect("accepted")).collect();
    let bad = handle.generate(request(&[5, PANIC_TOKEN], 3)).expect("accepted");
    assert!(matches!(collect(bad).await.last(), Some(Event::Failed(_))));
    for stream in good {
        assert_eq!(tokens_of(&collect(stream).await, 0), tokens_of(&alone, 0));
    }
    until(&handle, is_empty).await;
}

#[tokio::test]
async fn no_number_of_poisoned_requests_ends_it() {
    let (handle, _) = spawn(config(), || Ok(FakeRunner::default()));
    for _ in 0..40 {
        let bad = handle.generate(request(&[PANIC_TOKEN], 3)).expect("accepted");
        assert!(matches!(collect(bad).await.last(), Some(Event::Failed(_))));
    }
    let good = collect(handle.generate(request(&[1], 5)).expect("accepted")).await;
    assert_eq!(tokens_of(&good, 0).len(), 5);
    assert_eq!(handle.health(), Health::Alive);
    assert_eq!(handle.stats().num_failed_steps, 80);
}

/// A runner with faults of its own.
struct Faulty {
    inner: FakeRunner,
    /// After so many steps it computes nothing any more.
    num_good_steps: usize,
    num_blocks: Option<u32>,
    is_broken: fn() -> bool,
}

impl Default for Faulty {
    fn default() -> Self {
        let (inner, num_good_steps) = (FakeRunner::default(), usize::MAX);
        Self { inner, num_good_steps, num_blocks: None, is_broken: || false }
    }
}

impl Runner for Faulty {
    type Error = String;

    fn launch(&mut self, step: &SchedulerOutput) -> Result<(), String> {
        let blocks = step.scheduled.iter().flat_map(|scheduled| scheduled.blocks.blocks());
        let num_blocks = self.num_blocks.unwrap_or(u32::MAX);
        assert!(blocks.into_iter().all(|block| block.0 < num_blocks), "no such block");
        let rest = self.num_good_steps.checked_sub(1);
        self.num_good_steps = rest.ok_or("worn out")?;
        self.inner.launch(step)
    }

    fn sample(
        &mut self,
        step: &SchedulerOutput,
        masks: &TokenMasks,
    ) -> Result<Vec<SeqOutput>, String> {
        self.inner.sample(step, masks)
    }

    fn num_blocks(&self) -> Option<u32> {
        self.num_blocks
    }

    fn is_broken(&self) -> bool {
        (self.is_broken)()
    }
}

/// The engine gets one of these runners after the other.
fn wearing(mut num_good_steps: Vec<usize>) -> (EngineHandle, std::thread::JoinHandle<()>) {
    num_good_steps.reverse();
    spawn(config(), move || {
        let num_good_steps = num_good_steps.pop().ok_or("no other runner")?;
        Ok(Faulty { num_good_steps, ..Faulty::default() })
    })
}

#[tokio::test]
async fn a_runner_that_breaks_is_built_anew_unnoticed() {
    let alone = start(FakeRunner::default());
    let alone = collect(alone.generate(request(&[1, 2, 3], 60)).expect("accepted")).await;
    let (handle, _) = wearing(vec![20, 15, 500]);
    let streams: Vec<_> =
        (0..6).map(|_| handle.generate(request(&[1, 2, 3], 60)).expect("accepted")).collect();
    for stream in streams {
        assert_eq!(tokens_of(&collect(stream).await, 0), tokens_of(&alone, 0));
    }
    assert_eq!(handle.health(), Health::Alive);
    until(&handle, is_empty).await;
}

#[tokio::test]
async fn a_panic_of_its_own_ends_what_runs_and_nothing_else() {
    let (runner, gate) = FakeRunner::default().gated();
    // The engine asks when a step has failed.
    let is_broken: fn() -> bool = || panic!("nobody expects this");
    let runner = Faulty { inner: runner, is_broken, ..Faulty::default() };
    let (handle, thread) = spawn(config(), once(runner));
    let bad = handle.generate(request(&[ERROR_TOKEN], 3)).expect("accepted");
    until(&handle, |stats| 0 < stats.num_running + stats.num_waiting).await;
    // They arrive while the step is under way, and the engine has not looked at them when it fails.
    let unread: Vec<_> =
        (0..5).map(|_| handle.generate(request(&[1, 2], 3)).expect("accepted")).collect();
    drop(gate);
    assert!(matches!(collect(bad).await.last(), Some(Event::Failed(_))));
    for stream in unread {
        assert_eq!(tokens_of(&collect(stream).await, 0).len(), 3);
    }
    let good = collect(handle.generate(request(&[1], 5)).expect("accepted")).await;
    assert_eq!(tokens_of(&good, 0).len(), 5);
    assert_eq!(handle.health(), Health::Alive);
    // Everybody gave back what they took at the door.
    handle.drain();
    tokio::time::timeout(Duration::from_secs(20), handle.stopped()).await.expect("nobody is left");
    thread.join().expect("a clean end");
}

#[tokio::test]
async fn a_cache_that_became_smaller_is_not_overrun() {
    let mut runners = vec![(500, 12), (10, 64)];
    let (handle, _) = spawn(config(), move || {
        let (num_good_steps, num_blocks) = runners.pop().ok_or("no other runner")?;
        Ok(Faulty { num_good_steps, num_blocks: Some(num_blocks), ..Faulty::default() })
    });
    let lost = collect(handle.generate(request(&[1; 20], 40)).expect("accepted")).await;
    assert!(matches!(lost.last(), Some(Event::Failed(why)) if why.contains("another size")));
    let streams: Vec<_> =
        (0..4).map(|_| handle.generate(request(&[1; 20], 20)).expect("accepted")).collect();
    for stream in streams {
        assert_eq!(tokens_of(&collect(stream).await, 0).len(), 20);
    }
    assert_eq!(handle.stats().num_blocks, 12);
    assert_eq!(handle.health(), Health::Alive);
}

#[tokio::test]
async fn gives_up_when_a_new_runner_fails_too() {
    for (runners, words) in [(vec![5, 0], "a new runner fails too"), (vec![5], "no other runner")] {
        let (handle, thread) = wearing(runners);
        let lost = collect(handle.generate(request(&[1], 30)).expect("accepted")).await;
        assert!(matches!(lost.last(), Some(Event::Failed(_))), "{lost:?}");
        handle.stopped().await;
        thread.join().expect("contained");
        assert!(matches!(handle.health(), Health::Dead { reason } if reason.contains(words)));
        assert!(matches!(handle.generate(request(&[1], 1)), Err(SubmitError::Dead { .. })));
    }
}

#[tokio::test]
async fn a_request_ends_when_its_time_is_over() {
    let runner = FakeRunner { step_delay: Duration::from_millis(5), ..FakeRunner::default() };
    let (handle, _) = spawn(EngineConfig { max_num_seqs: 1, ..config() }, once(runner));
    let deadline = Some(Instant::now() + Duration::from_millis(100));
    let running = Request { deadline, n: 2, ..request(&[1, 2], 150) };
    let running = handle.generate(running).expect("accepted");
    let waiting = handle.generate(Request { deadline, ..request(&[1], 5) }).expect("accepted");
    let patient = handle.generate(request(&[1, 2, 3], 5)).expect("accepted");
    let (running, waiting, patient) =
        tokio::join!(collect(running), collect(waiting), collect(patient));
    assert_eq!(running.last(), Some(&Event::Expired));
    assert!(!tokens_of(&running, 0).is_empty());
    assert_eq!(waiting, [Event::Expired]);
    assert_eq!(tokens_of(&patient, 0).len(), 5);
    until(&handle, is_empty).await;
}

#[tokio::test]
async fn who_would_wait_too_long_is_refused_at_once() {
    let runner = FakeRunner { step_delay: Duration::from_millis(10), ..FakeRunner::default() };
    let target_ttft = Some(Duration::from_secs(5));
    let config = EngineConfig { max_num_seqs: 1, max_queue: 100, target_ttft, ..config() };
    let (handle, _) = spawn(config, once(runner));
    handle.ready().await.expect("a runner");
    // Ten sequences a second leave the queue.
    let streams: Vec<_> =
        (0..20).map(|_| handle.generate(request(&[1], 10)).expect("accepted")).collect();
    until(&handle, |stats| 50 < stats.num_steps && !stats.wait_per_token.is_zero()).await;
    let soon = |after| Request { deadline: Some(Instant::now() + after), ..request(&[1], 1) };
    let refused = handle.generate(soon(Duration::from_millis(300))).expect_err("too late");
    assert!(matches!(refused, SubmitError::TooLate { wait, .. } if Duration::from_secs(1) < wait));
    let more: Vec<_> = (0..60).map_while(|_| handle.generate(request(&[1], 10)).ok()).collect();
    assert!((5..30).contains(&more.len()), "as many as start within the target: {}", more.len());
    drop((streams, more));
    until(&handle, is_empty).await;
    assert!(handle.generate(soon(Duration::from_millis(300))).is_ok(), "nobody waits");
}

#[tokio::test]
async fn a_lost_device_ends_the_engine_at_once() {
    // The device answers with errors only once one has happened, and the cache is smaller than was
    // planned.
    let lost = || Faulty { num_blocks: Some(16), is_broken: || true, ..Faulty::default() };
    let (handle, thread) = spawn(config(), move || Ok(lost()));
    let fine = collect(handle.generate(request(&[1], 3)).unwrap()).await;
    assert!(matches!(fine.last(), Some(Event::Finished { .. })), "{fine:?}");
    assert_eq!(handle.stats().num_blocks, 16);
    let events = collect(handle.generate(request(&[ERROR_TOKEN], 3)).unwrap()).await;
    assert!(matches!(events.last(), Some(Event::Failed(_))), "{events:?}");
    handle.stopped().await;
    thread.join().expect("contained");
    assert!(matches!(handle.health(), Health::Dead { reason } if reason.contains("is lost")));
}

#[tokio::test]
async fn a_runner_that_cannot_be_built_is_reported() {
    let (handle, _) = spawn(config(), || Err::<FakeRunner, _>("no such file".to_owned()));
    assert_eq!(handle.ready().await, Err("no such file".to_owned()));
    assert_eq!(handle.health(), Health::Dead { reason: "no such file".to_owned() });
}

#[tokio::test]
async fn a_hanging_step_is_a_stall() {
    let (runner, gate) = FakeRunner::default().gated();
    let config = EngineConfig { stall_timeout: Duration::ZERO, ..config() };
    let (handle, _) = spawn(config, once(runner));
    handle.ready().await.expect("a runner");
    assert_eq!(handle.health(), Health::Alive, "idle is healthy");
    let stream = handle.generate(request(&[1], 1)).expect("accepted");
    let stalled = async {
        while !matches!(handle.health(), Health::Stalled { .. }) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), stalled).await.expect("noticed");
    drop(gate);
    collect(stream).await;
    assert_eq!(handle.health(), Health::Alive);
}
