//! Where traces of jobs go: `runner.yaml` and the standard variables, settled before anything starts.

use sandbox::EngineKind;

use super::source::secret_file;
use crate::config::{Config, TelemetryConfig};
use crate::context::CliError;
use crate::telemetry::{Flush, HEADER_VARIABLES, Sender, Settings, SettingsError, Telemetry};

/// Longest file with headers, bytes.
const HEADERS_MAX: u64 = 64 << 10;

/// Settles it, and takes the headers out of the environment: what the daemon starts has no business with them.
///
/// # Safety
///
/// The process has one thread.
pub(super) unsafe fn settle(config: &TelemetryConfig) -> Result<Option<Settings>, CliError> {
    let file = config.headers_file.as_deref();
    let file = file
        .map(|path| secret_file(path, HEADERS_MAX))
        .transpose()?;
    let text = file.as_ref().map(|text| text.as_str());
    let settings = Settings::settle(config, text, |name| std::env::var(name).ok());
    for name in HEADER_VARIABLES {
        // SAFETY: the process has one thread, as the caller promises.
        unsafe { std::env::remove_var(name) };
    }
    settings.map_err(refused)
}

/// Begins to export.
pub(super) fn start(
    settings: &Settings,
    config: &Config,
    instance: &str,
    kind: EngineKind,
) -> Result<(Telemetry, Flush), CliError> {
    let sender = Sender {
        version: crate::cli::VERSION.to_owned(),
        runner: config.name.to_string(),
        group: config.group.to_string(),
        instance: instance.to_owned(),
        engine: serde_json::to_value(kind)
            .ok()
            .and_then(|name| name.as_str().map(str::to_owned))
            .unwrap_or_default(),
    };
    tracing::info!(?settings, "traces of jobs are exported");
    Telemetry::start(settings, &sender).map_err(refused)
}

fn refused(error: SettingsError) -> CliError {
    CliError::failed(error.to_string()).with_hint(
        "docs/operations.md, Traces, has an example; OTEL_SDK_DISABLED=true turns traces off",
    )
}
