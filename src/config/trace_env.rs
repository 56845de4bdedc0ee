//! What the environment says about traces: OpenTelemetry's own variables, so that whoever runs a
//! collector need not learn others. What is not read here (sampler, limits, headers, batches), its
//! library reads itself.

/// Where traces go and who they say to come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceEnvironment {
    /// Whether traces are wanted: an endpoint is named, and nothing turns them off.
    pub is_on: bool,
    /// `OTEL_SERVICE_NAME`.
    pub service_name: Option<String>,
}

/// Reads the process's environment.
pub fn trace_environment() -> TraceEnvironment {
    trace_environment_from(|name| std::env::var(name).ok())
}

fn trace_environment_from(variable: impl Fn(&str) -> Option<String>) -> TraceEnvironment {
    let get = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
    let endpoints = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
    let is_named = endpoints.iter().any(|name| get(name).is_some());
    let says = |name, value: &str| get(name).is_some_and(|is| is.eq_ignore_ascii_case(value));
    let is_off = says("OTEL_SDK_DISABLED", "true") || says("OTEL_TRACES_EXPORTER", "none");
    TraceEnvironment { is_on: is_named && !is_off, service_name: get("OTEL_SERVICE_NAME") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_are_on_where_a_collector_is_named() {
        let read = |variables: &[(&str, &str)]| {
            trace_environment_from(|name| {
                let found = variables.iter().find(|(key, _)| *key == name);
                found.map(|(_, value)| (*value).to_owned())
            })
        };
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318");
        assert!(!read(&[]).is_on);
        assert!(!read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")]).is_on);
        assert!(read(&[endpoint]).is_on);
        assert!(read(&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c/v1/traces")]).is_on);
        assert!(!read(&[endpoint, ("OTEL_SDK_DISABLED", "True")]).is_on);
        assert!(!read(&[endpoint, ("OTEL_TRACES_EXPORTER", "none")]).is_on);
        let named = read(&[endpoint, ("OTEL_SERVICE_NAME", "qwen")]);
        assert_eq!(named.service_name.as_deref(), Some("qwen"));
    }
}
