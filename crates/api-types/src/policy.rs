//! The shape of a policy, for the description of the API alone: policies travel as JSON and are parsed by the crate
//! `policy`, whose word is the last. `docs/network.md` says what each part means.

use std::collections::BTreeMap;

use serde::Deserialize;
use utoipa::ToSchema;

/// What VMs may reach (`docs/network.md`). Beyond this shape each value has a format of its own, and a rule needs a host.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// The format: 1.
    #[schema(minimum = 1, maximum = 1)]
    pub version: Option<u32>,
    /// What happens where no rule decides.
    pub default: Option<PolicyEffect>,
    /// Whether denials are carried out or only logged.
    pub mode: Option<PolicyMode>,
    /// In this order; the first that matches decides.
    #[serde(default)]
    #[schema(max_items = 1000)]
    pub rules: Vec<PolicyRule>,
}

/// One rule.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicyRule {
    /// What logs call it.
    pub name: Option<String>,
    /// Scheme, host, port and path in one: `https://api.example.com/v1`.
    pub base: Option<String>,
    /// How a request travels.
    pub scheme: Option<PolicyScheme>,
    /// A name, an address, or `*.` and a name.
    pub host: Option<String>,
    /// Its port.
    #[schema(minimum = 1, maximum = 65535)]
    pub port: Option<i64>,
    /// What the request's path begins with.
    pub path: Option<String>,
    /// What becomes of what matches.
    pub action: Option<PolicyAction>,
    /// Requests that are decided one by one, in the canonical form.
    #[serde(default)]
    pub requests: Vec<PolicyRequest>,
    /// Requests that pass: `METHOD /path`.
    #[serde(default)]
    pub allow: Vec<String>,
    /// Requests that do not.
    #[serde(default)]
    pub deny: Vec<String>,
    /// Headers that are set; `${{ secrets.NAME }}` stands for a secret.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// Query parameters, likewise.
    #[serde(default)]
    pub query: BTreeMap<String, String>,
}

/// A request of a rule.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicyRequest {
    /// What becomes of it.
    pub action: PolicyEffect,
    /// Its method, or `*`.
    pub method: String,
    /// Its path, with `{x}`, `{x+}` and `{x*}`.
    pub path: String,
}

/// Passes or does not.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PolicyEffect {
    /// It passes.
    Allow,
    /// It is refused.
    Deny,
}

/// Whether denials are carried out.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PolicyMode {
    /// They are.
    Enforce,
    /// They are only logged.
    Audit,
}

/// How a request travels.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PolicyScheme {
    /// In the clear.
    Http,
    /// Over TLS.
    Https,
}

/// What a rule does.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PolicyAction {
    /// Lets it pass, or what its requests say.
    Allow,
    /// Refuses all of it.
    Deny,
    /// Forwards TLS untouched.
    Passthrough,
}
