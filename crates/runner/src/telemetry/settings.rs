//! `runner.yaml` and OpenTelemetry's standard variables, settled once when the daemon starts.

use std::time::Duration;

use percent_encoding::percent_decode_str;
use reqwest::header::{HeaderName, HeaderValue};

use crate::config::{Collector, TelemetryConfig};

/// The variables with headers, which may hold credentials: nothing that the daemon starts has any business with them.
pub(crate) const HEADER_VARIABLES: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    "OTEL_EXPORTER_OTLP_HEADERS",
];
/// The specification's default of OTEL_EXPORTER_OTLP_TIMEOUT.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time that one may give to a request, milliseconds.
const TIMEOUT_MAX_MS: u64 = 600_000;

/// What the export does.
#[derive(Clone)]
pub(crate) struct Settings {
    /// Where traces are posted to.
    pub(crate) traces: Collector,
    /// Headers of each request. They may hold credentials.
    pub(super) headers: Vec<(String, String)>,
    /// Which part of the jobs is traced.
    pub(super) sample_ratio: f64,
    /// Limit on each request.
    pub(super) timeout: Duration,
    /// What the sender is called.
    pub(super) service_name: String,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = self.headers.iter().map(|(name, _)| name);
        f.debug_struct("Settings")
            .field("traces", &self.traces.url().as_str())
            .field("headers", &names.collect::<Vec<_>>())
            .field("sample_ratio", &self.sample_ratio)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// Why traces cannot be exported as asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    /// A variable makes no sense.
    #[error("the variable {name} is not usable: {reason}")]
    Variable {
        /// Which.
        name: &'static str,
        /// Why, and what would be right.
        reason: String,
    },
    /// The file with headers makes no sense.
    #[error("line {line} of telemetry.headers_file is no header, which is like `Name: value`")]
    HeadersFile {
        /// Which line, from 1.
        line: usize,
    },
    /// The library refuses them.
    #[error("spans cannot be exported: {0}")]
    Exporter(String),
}

impl Settings {
    /// Settles them; `None`: nothing is exported. `file` is what stands in the file with headers.
    pub(crate) fn settle(
        config: &TelemetryConfig,
        file: Option<&str>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, SettingsError> {
        // The specification: an empty variable is one that is not set.
        let get = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let is = |name: &str, word: &str| get(name).is_some_and(|v| v.eq_ignore_ascii_case(word));
        if is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
            return Ok(None);
        }
        let Some(traces) = endpoint(config, &get)? else {
            return Ok(None);
        };
        for name in [
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
            "OTEL_EXPORTER_OTLP_PROTOCOL",
        ] {
            if get(name).is_some_and(|protocol| protocol != "http/protobuf") {
                return refuse(name, "the runner speaks http/protobuf only");
            }
        }
        for name in [
            "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION",
            "OTEL_EXPORTER_OTLP_COMPRESSION",
        ] {
            if get(name).is_some_and(|compression| compression != "none") {
                return refuse(name, "the runner does not compress what it sends");
            }
        }
        for name in [
            "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
            "OTEL_EXPORTER_OTLP_CERTIFICATE",
        ] {
            if get(name).is_some() {
                return refuse(
                    name,
                    "the runner trusts the host's certificate authorities; add the collector's to those",
                );
            }
        }
        let mut headers = file.map_or(Ok(Vec::new()), file_headers)?;
        let given = HEADER_VARIABLES
            .iter()
            .find_map(|name| Some((*name, get(name)?)));
        if let Some((name, text)) = given {
            headers.extend(variable_headers(name, &text)?);
        }
        Ok(Some(Self {
            traces,
            headers,
            sample_ratio: config.sample_ratio,
            timeout: timeout(&get)?,
            service_name: get("OTEL_SERVICE_NAME").unwrap_or_else(|| "vm0-runner".to_owned()),
        }))
    }
}

fn refuse<T>(name: &'static str, reason: impl Into<String>) -> Result<T, SettingsError> {
    let reason = reason.into();
    Err(SettingsError::Variable { name, reason })
}

/// A variable stands above the file, and one for traces above one for all signals, as the specification has it.
fn endpoint(
    config: &TelemetryConfig,
    get: &impl Fn(&str) -> Option<String>,
) -> Result<Option<Collector>, SettingsError> {
    let parse = |name: &'static str| -> Result<Option<Collector>, SettingsError> {
        let parsed = get(name).map(Collector::try_from).transpose();
        parsed.or_else(|reason| refuse(name, reason))
    };
    if let Some(exact) = parse("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")? {
        return Ok(Some(exact));
    }
    let base = parse("OTEL_EXPORTER_OTLP_ENDPOINT")?;
    Ok(base
        .as_ref()
        .or(config.otlp_endpoint.as_ref())
        .map(Collector::traces))
}

fn timeout(get: &impl Fn(&str) -> Option<String>) -> Result<Duration, SettingsError> {
    for name in [
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
        "OTEL_EXPORTER_OTLP_TIMEOUT",
    ] {
        if let Some(text) = get(name) {
            return match text.trim().parse() {
                Ok(ms @ 1..=TIMEOUT_MAX_MS) => Ok(Duration::from_millis(ms)),
                _ => refuse(
                    name,
                    format!("it must be milliseconds, 1 to {TIMEOUT_MAX_MS}"),
                ),
            };
        }
    }
    Ok(TIMEOUT)
}

fn header(name: &str, value: &str) -> Option<(String, String)> {
    let (name, value) = (name.trim(), value.trim());
    let valid =
        HeaderName::from_bytes(name.as_bytes()).is_ok() && HeaderValue::from_str(value).is_ok();
    valid.then(|| (name.to_owned(), value.to_owned()))
}

fn file_headers(text: &str) -> Result<Vec<(String, String)>, SettingsError> {
    let lines = text.lines().enumerate();
    lines
        .filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'))
        .map(|(index, line)| {
            let parts = line.split_once(':');
            let parsed = parts.and_then(|(name, value)| header(name, value));
            parsed.ok_or(SettingsError::HeadersFile {
                line: index.saturating_add(1),
            })
        })
        .collect()
}

/// `name=value,name=value`, values percent-encoded (OTLP exporter specification, after W3C Baggage).
fn variable_headers(
    variable: &'static str,
    text: &str,
) -> Result<Vec<(String, String)>, SettingsError> {
    let pairs = text.split(',').filter(|pair| !pair.trim().is_empty());
    pairs
        .map(|pair| {
            let parsed = pair.split_once('=').and_then(|(name, value)| {
                let value = percent_decode_str(value).decode_utf8().ok()?;
                header(name, &value)
            });
            match parsed {
                Some(header) => Ok(header),
                None => refuse(variable, "it is like name=value,name=value"),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settle(
        yaml: Option<&str>,
        file: Option<&str>,
        variables: &[(&str, &str)],
    ) -> Result<Option<Settings>, SettingsError> {
        let config = TelemetryConfig {
            otlp_endpoint: yaml.map(|url| url.to_owned().try_into().unwrap()),
            ..TelemetryConfig::default()
        };
        Settings::settle(&config, file, |name| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn nothing_is_exported_unless_it_is_asked_for() {
        let off = |yaml, variables| settle(yaml, None, variables).unwrap().is_none();
        assert!(off(None, &[]));
        assert!(off(None, &[("OTEL_EXPORTER_OTLP_ENDPOINT", "")]));
        let yaml = Some("http://127.0.0.1:4318");
        assert!(off(yaml, &[("OTEL_SDK_DISABLED", "true")]));
        assert!(off(yaml, &[("OTEL_TRACES_EXPORTER", "none")]));
        assert!(!off(yaml, &[]));
    }

    #[test]
    fn variables_stand_above_the_file_and_those_for_traces_above_those_for_all() {
        let yaml = Some("http://a.example.com:4318");
        let all = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://b.example.com");
        let traces = (
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            "http://c.example.com/x",
        );
        for (variables, url) in [
            (&[][..], "http://a.example.com:4318/v1/traces"),
            (&[all], "http://b.example.com/v1/traces"),
            (&[all, traces], "http://c.example.com/x"),
        ] {
            let settings = settle(yaml, None, variables).unwrap().unwrap();
            assert_eq!(settings.traces.url().as_str(), url);
        }
        let file = "# credentials\nAuthorization: Bearer a:b\n\nX-Scope: one\n";
        let variables = [
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-scope=two%2C3, y = z"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "250"),
            ("OTEL_SERVICE_NAME", "fleet"),
        ];
        let settings = settle(yaml, Some(file), &variables).unwrap().unwrap();
        let headers = [
            ("Authorization", "Bearer a:b"),
            ("X-Scope", "one"),
            ("x-scope", "two,3"),
            ("y", "z"),
        ];
        assert_eq!(
            settings.headers,
            headers.map(|(name, value)| (name.to_owned(), value.to_owned()))
        );
        assert_eq!(settings.timeout, Duration::from_millis(250));
        assert_eq!(settings.service_name, "fleet");
        // What is logged of them names headers and tells no value.
        let shown = format!("{settings:?}");
        assert!(
            shown.contains("Authorization") && !shown.contains("Bearer"),
            "{shown}"
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name_and_without_its_value() {
        let yaml = Some("http://127.0.0.1:4318");
        for (name, value) in [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "hunter2"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://a:hunter2@b"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/etc/ca.pem"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "0"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "hunter2"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=hunter2%0Ab"),
        ] {
            let error = settle(yaml, None, &[(name, value)])
                .unwrap_err()
                .to_string();
            assert!(error.contains(name), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        let error = settle(yaml, Some("A: b\nhunter2\n"), &[]).unwrap_err();
        assert!(error.to_string().starts_with("line 2 "), "{error}");
    }
}
