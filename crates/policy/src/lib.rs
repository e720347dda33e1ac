//! What a VM may reach, and everything that proxy, resolver and daemon must agree on about it.
//!
//! [`Draft`] is what a user wrote, [`Policy`] the canonical form that it becomes once (`docs/network.md`), and
//! [`Policy::decide`] with its siblings the decisions. The same decisions are taken by the proxy's addon in another
//! language: `vectors/*.json` hold both to one meaning. Nothing here reads a file or opens a socket.
#![forbid(unsafe_code)]

mod api;
mod decide;
mod draft;
mod fields;
mod host;
pub mod log;
mod merge;
mod path;
mod policy;
pub mod ranges;
mod secret;
mod template;
pub mod wire;

pub use api::ApiAccess;
pub use decide::{Action, By, Decision, HttpRequest, Tls};
pub use draft::{Draft, DraftError, MAX_FILE_BYTES, RuleArgument};
pub use host::{Host, HostError, HostPattern};
pub use merge::{MergeError, merge, merge_under};
pub use path::{PathError, PathPattern, RequestPath, RulePath};
pub use policy::{
    Effect, MAX_BYTES, MAX_REQUESTS, MAX_RULES, Method, Mode, Policy, PolicyError, Request, Rule,
    RuleAction, RuleName, Scheme, WEB_PORTS,
};
pub use ranges::InternalAllow;
pub use secret::{Placeholder, Secret, SecretError, SecretName, SecretValue};
pub use template::{Template, TemplateError};
