//! Who may do what: API keys and runner tokens, the guests' tokens, and the keys that encrypt secrets.
//!
//! Nothing here is in NATS in the clear: of keys and runner tokens only hashes, of signing and encryption keys only what
//! the master key wrapped. Whoever reads NATS without the master key file learns no secret and can make no token; whoever
//! writes it can do both, since hashes can be put there (`docs/security.md`).

mod bearer;
mod keyring;
mod master;
mod rotate;
mod sandbox;

pub use bearer::{Bearer, BearerKind, BearerRecord, Bearers, new_bearer};
pub use keyring::{Keyring, KeyringError, Sealed};
pub use master::{MasterKey, MasterKeyError, MasterKeys};
pub use rotate::{Rotated, rotate};
pub use sandbox::{AUDIENCE, SandboxClaims, SandboxRefusal, leeway_secs, mint, read};
