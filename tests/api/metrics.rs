//! What `/metrics` tells of requests. Other tests of a process count too, so numbers are compared
//! before and after.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::http::Request;
use qwen_server::telemetry::metrics;
use serde_json::json;

use crate::api_fake::{FakeServer, MODEL, chat, with};

type Samples = BTreeMap<String, f64>;

/// Every sample by its name and labels, without the model's.
async fn scrape(server: &FakeServer) -> Samples {
    let answer = server.get("/metrics").await;
    assert_eq!(answer.status, 200);
    let samples = answer.text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let samples = samples.map(|line| {
        let (sample, value) = line.rsplit_once(' ').unwrap();
        let sample = sample.replace("model_name=\"test\"", "").replace("{,", "{").replace("{}", "");
        (sample, value.parse().unwrap())
    });
    samples.collect()
}

/// Goal: requests are counted by what the operator knows, never by what a client made up. Method:
/// look for every new sample after requests with odd paths and methods.
#[tokio::test]
async fn requests_are_counted_by_route_status_and_client() {
    metrics::install("test");
    let server = FakeServer::start();
    let before = scrape(&server).await;
    let answer = server.post("/v1/chat/completions", chat("hello")).await;
    answer.ok();
    server.post("/v1/chat/completions", json!({"model": "unheard-of"})).await.error(400);
    server.get("/v1/models/org/alias").await.ok();
    server.get("/secret-path-1").await.error(404);
    let odd = Request::builder().method("BREW").uri("/v1/models").body(Body::empty()).unwrap();
    assert_eq!(server.send(odd).await.status(), 405);
    server.wait_until_idle().await;

    let wanted = [
        (
            "qwen_http_requests_total{route=\"/v1/chat/completions\",method=\"POST\",status=\"200\"}",
            1.0,
        ),
        (
            "qwen_http_requests_total{route=\"/v1/chat/completions\",method=\"POST\",status=\"400\"}",
            1.0,
        ),
        ("qwen_http_requests_total{route=\"/v1/models/{*id}\",method=\"GET\",status=\"200\"}", 1.0),
        ("qwen_http_requests_total{route=\"none\",method=\"GET\",status=\"404\"}", 1.0),
        ("qwen_http_requests_total{route=\"/v1/models\",method=\"other\",status=\"405\"}", 1.0),
        ("qwen_http_errors_total{code=\"not_found\"}", 1.0),
        ("qwen_client_requests_total{client=\"anonymous\",outcome=\"finished\"}", 1.0),
        ("qwen_client_tokens_total{client=\"anonymous\",kind=\"completion\"}", 6.0),
        ("vllm:request_params_n_count", 1.0),
        ("vllm:request_max_num_generation_tokens_sum", 6.0),
        ("vllm:time_in_queue_requests_count", 1.0),
        ("qwen_step_phase_seconds_count{phase=\"launch\"}", 1.0),
        ("qwen_step_phase_seconds_count{phase=\"update\"}", 1.0),
        ("qwen_step_sequences_count", 1.0),
    ];
    // The engine counts after the client has its answer.
    let mut missing = Vec::new();
    let mut after = BTreeMap::new();
    for _ in 0..100 {
        after = scrape(&server).await;
        let count = |samples: &Samples, sample: &str| samples.get(sample).copied().unwrap_or(0.0);
        let grown = |sample: &str| count(&after, sample) - count(&before, sample);
        missing = wanted.iter().filter(|(sample, least)| grown(sample) < *least).collect();
        if missing.is_empty() {
            break;
        }
    }
    assert!(missing.is_empty(), "{missing:?} in {after:#?}");
    assert_eq!(after["qwen_ready"], 1.0);
    assert_eq!(after["qwen_engine_up"], 1.0);
    assert_eq!(after["qwen_engine_stalled_seconds"], 0.0);
    assert!(0.0 < after["process_resident_memory_bytes"] && 0.0 < after["process_open_fds"]);
    let told = after.keys().find(|sample| sample.contains("secret") || sample.contains("BREW"));
    assert_eq!(told, None);
}

/// Goal: a request counts when its answer is over, not when it begins; one whose client leaves
/// counts too. Method: drop the answer's body.
#[tokio::test]
async fn a_stream_counts_when_it_is_over() {
    metrics::install("test");
    let server = FakeServer::start();
    let body = json!({"model": MODEL, "messages": [{"role": "user", "content": "on and on"}]});
    let body = with(body, json!({"stream": true, "max_tokens": 400}));
    let request = Request::post("/v1/messages?never").header("content-type", "application/json");
    let request = request.body(Body::from(with(body, json!({"client": 1})).to_string())).unwrap();
    let sample = "qwen_client_requests_total{client=\"anonymous\",outcome=\"cancelled\"}";
    let before = scrape(&server).await;
    let response = server.send(request).await;
    assert_eq!(response.status(), 200);
    assert!(1.0 <= scrape(&server).await["qwen_http_requests_in_flight"]);
    drop(response);
    let after = scrape(&server).await;
    let count = |samples: &Samples| samples.get(sample).copied().unwrap_or(0.0);
    assert!(count(&before) < count(&after), "{after:#?}");
    server.wait_until_idle().await;
}
