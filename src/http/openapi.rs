//! `GET /openapi.json` and `/docs`: this API described, for programs and for people.
//!
//! The description is a file, and tests hold it to the router, to the fields that requests know
//! and to what handlers answer.

use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};

const DESCRIPTION: &str = include_str!("openapi.json");
const PAGE: &str = include_str!("docs.html");
/// The page runs its own script, reads the description, and nothing else.
const POLICY: &str = concat!(
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; ",
    "connect-src 'self'; base-uri 'none'; form-action 'none'",
);

pub(super) async fn description() -> Response {
    ([(CONTENT_TYPE, "application/json")], DESCRIPTION).into_response()
}

pub(super) async fn page() -> Response {
    let headers = [(CONTENT_TYPE, "text/html; charset=utf-8"), (CONTENT_SECURITY_POLICY, POLICY)];
    (headers, PAGE).into_response()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde::de::DeserializeOwned;
    use serde_json::Value;

    use super::super::aliases;
    use super::super::body::Body;
    use super::super::extract::Strictness;
    use super::*;
    use crate::anthropic::MessagesRequest;
    use crate::dashscope::{EmbeddingInput, EmbeddingParameters, Input, NoParameters, Parameters};
    use crate::openai::adapter::{LoadAdapterRequest, UnloadAdapterRequest};
    use crate::openai::chat::ChatCompletionRequest;
    use crate::openai::completion::{CompletionRequest, FimRequest};
    use crate::openai::embedding::EmbeddingRequest;
    use crate::openai::generation::GenerationFields;
    use crate::openai::responses::ResponsesRequest;
    use crate::openai::tokenize::{DetokenizeRequest, TokenizeRequest};

    fn spec() -> Value {
        serde_json::from_str(DESCRIPTION).unwrap()
    }

    /// The names of a schema's properties, with those of the schemas it is made of.
    fn properties(spec: &Value, schema: &Value) -> BTreeSet<String> {
        if let Some(name) = schema["$ref"].as_str() {
            return properties(spec, spec.pointer(name.trim_start_matches('#')).unwrap());
        }
        let own = schema["properties"].as_object().into_iter().flatten();
        let parts = schema["allOf"].as_array().into_iter().flatten();
        own.map(|(name, _)| name.clone())
            .chain(parts.flat_map(|part| properties(spec, part)))
            .collect()
    }

    /// The fields that an endpoint reads into `T` and `U`.
    fn known<T: DeserializeOwned, U: DeserializeOwned>() -> BTreeSet<String> {
        let mut body = Body::scan(b"{}").unwrap();
        // Required fields are missing here; the names are noted before that shows.
        let _ = body.read::<T>();
        let _ = body.read::<U>();
        body.known().iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn requests_have_the_fields_that_are_described() {
        let spec = spec();
        let requests = [
            ("ChatCompletionRequest", known::<ChatCompletionRequest, GenerationFields>()),
            ("CompletionRequest", known::<CompletionRequest, GenerationFields>()),
            ("FimRequest", known::<FimRequest, GenerationFields>()),
            ("ResponsesRequest", known::<ResponsesRequest, GenerationFields>()),
            ("MessagesRequest", known::<MessagesRequest, GenerationFields>()),
            ("EmbeddingRequest", known::<EmbeddingRequest, Strictness>()),
            ("TokenizeRequest", known::<TokenizeRequest, Strictness>()),
            ("LoadAdapterRequest", known::<LoadAdapterRequest, Strictness>()),
            ("UnloadAdapterRequest", known::<UnloadAdapterRequest, Strictness>()),
            ("DetokenizeRequest", known::<DetokenizeRequest, Strictness>()),
            ("DashScopeInput", known::<Input, NoParameters>()),
            ("DashScopeParameters", known::<Parameters, GenerationFields>()),
            ("DashScopeEmbeddingInput", known::<EmbeddingInput, NoParameters>()),
            ("DashScopeEmbeddingParameters", known::<EmbeddingParameters, Strictness>()),
        ];
        for (name, known) in &requests {
            let schema = &spec["components"]["schemas"][*name];
            assert_eq!(properties(&spec, schema), *known, "{name}");
        }
        for (path, operations) in spec["paths"].as_object().unwrap() {
            let body = &operations["post"]["requestBody"]["content"]["application/json"]["schema"];
            // DashScope has what is read as a body of its own inside of its bodies.
            let inner = body["properties"].as_object().into_iter().flatten();
            for schema in inner.map(|(_, schema)| schema).chain([body]) {
                let Some(reference) = schema["$ref"].as_str() else { continue };
                let is_compared = requests.iter().any(|(name, _)| reference.ends_with(name));
                assert!(is_compared, "{path}: compare {reference} with its type here");
            }
        }
    }

    #[test]
    fn every_route_is_described_and_nothing_else() {
        let routes: BTreeSet<(String, String)> =
            [include_str!("router.rs"), include_str!("admin.rs")]
                .into_iter()
                .filter_map(|text| text.split("#[cfg(test)]").next())
                .flat_map(|text| text.split(".route(\"").skip(1))
                .filter_map(|rest| rest.lines().next())
                .filter_map(|rest| rest.split_once("\", "))
                .flat_map(|(path, handlers)| {
                    ["get", "post", "delete"]
                        .into_iter()
                        .filter(|method| handlers.contains(&format!("{method}(")))
                        .map(|method| (path.replace("{*", "{"), method.to_owned()))
                })
                .collect();
        assert!(10 < routes.len());
        let spec = spec();
        let described: BTreeSet<(String, String)> = spec["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, operations)| {
                let keys = operations.as_object().unwrap().keys();
                let methods = keys.filter(|key| *key != "servers");
                methods.map(|method| (path.clone(), method.clone()))
            })
            .collect();
        assert_eq!(routes, described);
        assert_eq!(spec["info"]["version"], env!("CARGO_PKG_VERSION"));
    }

    /// An alias is another server of the same path.
    #[test]
    fn every_alias_is_described() {
        let bases = aliases::COMPATIBLE.map(|prefix| prefix.strip_suffix("/v1/").unwrap());
        let anthropic = aliases::ANTHROPIC.strip_suffix("/v1/messages").unwrap();
        for (path, item) in spec()["paths"].as_object().unwrap() {
            let servers = item["servers"].as_array().into_iter().flatten();
            let servers: Vec<&str> =
                servers.map(|server| server["url"].as_str().unwrap()).collect();
            let mut expected = Vec::new();
            if path.starts_with("/v1/") {
                expected.push("/");
                expected.extend(bases);
            }
            if path.starts_with("/v1/messages") {
                expected.push(anthropic);
            }
            assert_eq!(servers, expected, "{path}");
        }
    }

    #[test]
    fn the_page_needs_nothing_from_elsewhere() {
        for word in ["http://", "https://", "src=", "@import", "innerHTML"] {
            assert!(!PAGE.contains(word), "{word}");
        }
    }
}
