//! `metrics:` in `runner.yaml`.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Figures for Prometheus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct MetricsConfig {
    /// Where `GET /metrics` is answered; nowhere if it is not set. Whoever reaches the address may read.
    pub(crate) listen: Option<SocketAddr>,
}
