//! `telemetry:` in `runner.yaml`.

use std::path::PathBuf;

use reqwest::Url;
use serde::{Deserialize, Serialize};

/// Traces of jobs for an OpenTelemetry collector.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TelemetryConfig {
    /// Where the collector takes OTLP over HTTP; nothing is sent if it is not set.
    pub(crate) otlp_endpoint: Option<Collector>,
    /// File with a header a line, `Name: value`, that every request to the collector carries.
    pub(crate) headers_file: Option<PathBuf>,
    /// Which part of the jobs is traced, 0 to 1, where a submitter's trace does not decide.
    pub(crate) sample_ratio: f64,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self {
            otlp_endpoint: None,
            headers_file: None,
            sample_ratio: 1.0,
        }
    }
}

/// Address of a collector: http or https, without password, query or fragment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Collector(Url);

impl Collector {
    /// The address itself.
    pub(crate) fn url(&self) -> &Url {
        &self.0
    }

    /// Where it takes traces: below the address, as the OTLP specification has it for an endpoint of all signals.
    pub(crate) fn traces(&self) -> Self {
        let mut url = self.0.clone();
        url.set_path(&format!("{}/v1/traces", url.path().trim_end_matches('/')));
        Self(url)
    }
}

impl TryFrom<String> for Collector {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        // A wrong address is not repeated: what is wrong with it may be that it holds a password.
        let url: Url = text
            .parse()
            .map_err(|_| "the collector's address is no URL; it is like http://127.0.0.1:4318")?;
        if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
            return Err("the collector's address must begin with http:// or https://".to_owned());
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(
                "the collector's address holds a password; credentials go into headers_file"
                    .to_owned(),
            );
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err("the collector's address has a query or a fragment".to_owned());
        }
        Ok(Self(url))
    }
}

impl From<Collector> for String {
    fn from(collector: Collector) -> Self {
        collector.0.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_checked_and_its_password_is_not_repeated() {
        for (text, why) in [
            ("collector.example.com:4318", "http://"),
            ("ftp://collector.example.com", "http://"),
            ("http://u:hunter2@collector.example.com", "headers_file"),
            ("http://collector.example.com/?key=hunter2", "query"),
            ("http://[hunter2", "no URL"),
        ] {
            let error = Collector::try_from(text.to_owned()).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        let base = |text: &str| Collector::try_from(text.to_owned()).unwrap().traces();
        let traces = "http://127.0.0.1:4318/v1/traces";
        assert_eq!(base("http://127.0.0.1:4318").url().as_str(), traces);
        assert_eq!(base("http://127.0.0.1:4318/").url().as_str(), traces);
        let below = base("https://otel.example.com/in/");
        assert_eq!(
            below.url().as_str(),
            "https://otel.example.com/in/v1/traces"
        );
    }
}
