//! Goal: every line of the log about a request can be found by the request's id, there is one line
//! at its end, and nothing of what was said or of libraries is in any of them.
//!
//! Method: the real binary at its most talkative level; distinctive words in every place where a
//! client can put some.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "support/served.rs"]
mod served;

use serde_json::{Value, json};

use crate::served::Served;

const CANARY: &str = "canary7f3a";

fn chat(more: &Value) -> Value {
    let mut body = json!({
        "messages": [{"role": "system", "content": CANARY}, {"role": "user", "content": CANARY}],
        "max_tokens": 5, "ignore_eos": true,
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[test]
fn lines_are_found_by_id_and_say_nothing_of_what_was_said() {
    let mut server = Served::start(&["--log-level", "trace", "--served-model-name", "m"], &[]);
    let send = |id: &str, path: &str, body: &Value| {
        server.send("POST", path, &format!("x-request-id: {id}\r\n"), body)
    };
    let path = "/v1/chat/completions";
    let answer = send("whole", path, &chat(&json!({"model": "m"})));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let stream = json!({"model": "m", "stream": true, "user": CANARY, "stop": [CANARY]});
    assert!(send("stream", path, &chat(&stream)).contains("data: [DONE]"));
    let refused = json!({"model": "m", "temperature": CANARY, "top_p": CANARY});
    assert!(send("refused", path, &chat(&refused)).starts_with("HTTP/1.1 400"));
    let odd = json!({"model": CANARY, "response_format": CANARY, "tools": [CANARY]});
    assert!(send("odd", path, &chat(&odd)).starts_with("HTTP/1.1 4"));
    let schema = json!({"model": "m", "guided_regex": format!("{CANARY}[a-b]{{1,2}}")});
    assert!(send("grammar", path, &chat(&schema)).starts_with("HTTP/1.1 200"));
    let template = json!({"model": "m", "chat_template": format!("{{{{ {CANARY}")});
    assert!(send("template", path, &chat(&template)).starts_with("HTTP/1.1 4"));
    let bearer = format!("authorization: Bearer {CANARY}\r\nx-api-key: {CANARY}\r\n");
    server.send("GET", &format!("/v1/models/{CANARY}?{CANARY}"), &bearer, &Value::Null);
    server.wait_for(|line| line.contains("/v1/models/{*id}"));
    let (status, _, lines) = server.stop();
    assert!(status.success());

    let told: Vec<&String> = lines.iter().filter(|line| line.contains(CANARY)).collect();
    assert!(told.is_empty(), "{told:#?}");
    let is_json = |line: &&String| line.starts_with('{');
    let parsed: Vec<Value> =
        lines.iter().filter(is_json).map(|line| serde_json::from_str(line).unwrap()).collect();
    let library =
        parsed.iter().find(|line| !line["target"].as_str().unwrap().starts_with("qwen_server"));
    assert_eq!(library, None);
    let ends = |id: &str| -> Vec<&Value> {
        let is_end =
            |line: &&Value| line["request_id"] == id && line["message"] == "request finished";
        parsed.iter().filter(is_end).collect()
    };
    for id in ["whole", "stream", "grammar"] {
        let [end] = ends(id)[..] else { panic!("{id}: {:#?}", ends(id)) };
        assert_eq!((&end["route"], &end["status"]), (&json!(path), &json!(200)), "{end}");
        assert_eq!((&end["client"], &end["outcome"]), (&json!("anonymous"), &json!("finished")));
        assert!(0 < end["prompt_tokens"].as_u64().unwrap() && end["total_ms"].is_u64(), "{end}");
        assert!(end["first_token_ms"].as_u64() <= end["total_ms"].as_u64(), "{end}");
    }
    assert_eq!(ends("whole")[0]["completion_tokens"], 5);
    let [end] = ends("refused")[..] else { panic!("{:#?}", ends("refused")) };
    assert_eq!((&end["status"], &end["prompt_tokens"]), (&json!(400), &Value::Null));
}
