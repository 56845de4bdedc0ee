//! `GET /admin/state`: what runs, what waits, and why. Numbers and names, never content.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::engine::snapshot::{SeqState, SequenceReport, WaitReason};
use crate::engine::{EngineHandle, Health};
use crate::http::caller::ANONYMOUS;
use crate::http::health;
use crate::http::state::{AppState, unix_seconds};

/// How long the engine may take to answer. It does so between two steps, so this is longer than
/// the steps of most machines.
const PATIENCE: Duration = Duration::from_secs(2);

/// Answers even if the engine does not: then with a 503, what is known without it, and the reason.
pub(super) async fn state(State(state): State<AppState>) -> Response {
    let sequences = sequences(&state.engine).await;
    let mut body = overview(&state);
    match sequences {
        Ok(sequences) => {
            body["sequences"] = sequences.iter().map(sequence).collect();
            Json(body).into_response()
        }
        Err(reason) => {
            body["sequences"] = Value::Null;
            body["reason"] = reason.into();
            (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
        }
    }
}

async fn sequences(engine: &EngineHandle) -> Result<Vec<SequenceReport>, String> {
    if engine.is_loading() {
        return Err("the model is loading".to_owned());
    }
    match timeout(PATIENCE, engine.report()).await {
        Ok(report) => report.ok_or_else(|| "the engine is not running".to_owned()),
        Err(_) => Err(why_silent(engine)),
    }
}

fn why_silent(engine: &EngineHandle) -> String {
    match engine.step_running_for() {
        Some(since) => format!("the engine is busy with a step since {} ms", since.as_millis()),
        None => format!("the engine did not answer within {} ms", PATIENCE.as_millis()),
    }
}

/// What is known without asking the engine's thread.
fn overview(state: &AppState) -> Value {
    let (engine, stats, limits) = (&state.engine, state.engine.stats(), state.engine.limits());
    let (is_alive, problem) = match engine.health() {
        Health::Alive => (true, None),
        Health::Stalled { running_for, phase } => {
            let ms = running_for.as_millis();
            (false, Some(format!("a step has been running for {ms} ms, now {phase:?}")))
        }
        Health::Dead { reason } => (false, Some(reason)),
    };
    let num_held_blocks = stats.num_blocks - stats.num_free_blocks;
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": state.model.name,
        "uptime_seconds": unix_seconds().saturating_sub(state.created),
        "health": {
            "live": is_alive,
            "ready": health::is_ready(state),
            "loading": engine.is_loading(),
            "problem": problem,
            "step_running_ms": engine.step_running_for().map(|time| time.as_millis() as u64),
        },
        "steps": {
            "taken": stats.num_steps,
            "failed": stats.num_failed_steps,
            "preemptions": stats.num_preemptions,
        },
        "queue": {
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "max_running": limits.max_num_seqs,
            "max_waiting": limits.max_queue,
        },
        "cache": {
            "block_size": limits.block_size,
            "blocks": stats.num_blocks,
            "held_blocks": num_held_blocks,
            "usage": num_held_blocks as f64 / stats.num_blocks.max(1) as f64,
        },
    })
}

fn sequence(report: &SequenceReport) -> Value {
    let seq = &report.sequence;
    let (phase, waits_for) = match seq.state {
        SeqState::Waiting(reason) => ("waiting", Some(explained(reason))),
        SeqState::Prefill => ("prefill", None),
        SeqState::Decode => ("decode", None),
    };
    json!({
        "request_id": &*report.request_id,
        "client": report.client.as_deref().unwrap_or(ANONYMOUS),
        "choice": report.choice,
        "phase": phase,
        "waits_for": waits_for,
        "age_ms": report.age.as_millis() as u64,
        "priority": seq.priority,
        "prompt_tokens": seq.num_prompt_tokens,
        "computed_tokens": seq.num_computed_tokens,
        "generated_tokens": seq.num_generated_tokens,
        "max_tokens": seq.max_tokens,
        "blocks": seq.num_blocks,
    })
}

fn explained(reason: WaitReason) -> &'static str {
    match reason {
        WaitReason::Slots => "a sequence to end: as many run as may",
        WaitReason::Blocks => "cache blocks: its prompt does not fit beside what runs",
        WaitReason::Prefix => "another sequence that computes the beginning of its prompt",
        WaitReason::Turn => "its turn: others are before it, or it has just come",
    }
}
