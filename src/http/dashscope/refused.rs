//! Paths of DashScope that this server has nothing behind, and what to do instead.

const RERANK: &str = "this model generates text and cannot rank documents: serve a reranker \
                      elsewhere, or compare embeddings";
const FILES: &str = "files are not kept here: put their text into the messages";
const TASKS: &str = "there are no asynchronous tasks here: call without `X-DashScope-Async` and \
                     read the answer, or stream it";
const OTHER_SERVICES: &str = "of DashScope's services, this server has text generation, text \
                              embedding and the tokenizer";

const REFUSED: [(&str, &str); 11] = [
    ("/api/v1/services/rerank/", RERANK),
    ("/v1/reranks", RERANK),
    ("/v1/rerank", RERANK),
    ("/api/v1/tasks", TASKS),
    ("/api/v1/files", FILES),
    ("/api/v1/uploads", FILES),
    ("/v1/files", FILES),
    ("/v1/batches", "there are no batches here: send the requests one by one, with `priority`"),
    ("/api/v1/apps/", "agent applications run on the hosted platform: call the model directly"),
    ("/api/v1/services/", OTHER_SERVICES),
    ("/api/v1/", OTHER_SERVICES),
];

/// Why there is nothing at `path`, if a client of DashScope may look for something there.
pub(in crate::http) fn refusal(path: &str) -> Option<&'static str> {
    let is_below = |prefix: &str| {
        path.strip_prefix(prefix)
            .is_some_and(|rest| prefix.ends_with('/') || rest.is_empty() || rest.starts_with('/'))
    };
    REFUSED.iter().find(|(prefix, _)| is_below(prefix)).map(|(_, advice)| *advice)
}
