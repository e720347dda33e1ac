//! The guest's token: a JWT (RFC 7519) signed with HMAC-SHA-256 by a key of the keyring.
//!
//! It proves that a claim was granted, no more: every use also asks whether the run still has that claim.

use api_types::{Epoch, RunId};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};

use super::keyring::{Keyring, KeyringError, Purpose};

/// The only audience.
pub const AUDIENCE: &str = "vm0:webhooks:agent";
const ISSUER: &str = "vm0-api";
/// Longest token that is looked at, bytes.
const MAX_TOKEN_BYTES: usize = 4096;

/// How far the clocks of two replicas may be apart, seconds.
pub const fn leeway_secs() -> u64 {
    300
}

/// What the token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxClaims {
    /// The run.
    pub sub: RunId,
    /// Of which claim.
    pub epoch: Epoch,
    /// [`AUDIENCE`].
    pub aud: String,
    /// Who made it.
    pub iss: String,
    /// When, seconds since the epoch.
    pub iat: u64,
    /// When it ends, seconds since the epoch.
    pub exp: u64,
}

/// Why a token is refused.
#[derive(Debug, thiserror::Error)]
pub enum SandboxRefusal {
    /// Not ours, changed, for something else, or of an unknown key.
    #[error("the token is not valid")]
    Invalid,
    /// Too old, or from the future.
    #[error("the token has expired")]
    Expired,
    /// It could not be checked.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
}

/// Makes a token that lasts for so long, seconds.
pub async fn mint(
    keyring: &Keyring,
    run: RunId,
    epoch: Epoch,
    now_secs: u64,
    lifetime_secs: u64,
) -> Result<String, KeyringError> {
    let key = keyring.current(Purpose::Sign).await?;
    let header = Header {
        kid: Some(key.kid),
        ..Header::new(Algorithm::HS256)
    };
    let claims = SandboxClaims {
        sub: run,
        epoch,
        aud: AUDIENCE.to_owned(),
        iss: ISSUER.to_owned(),
        iat: now_secs,
        exp: now_secs.saturating_add(lifetime_secs),
    };
    jsonwebtoken::encode(&header, &claims, &EncodingKey::from_secret(&key.bytes))
        .map_err(|_| KeyringError::Crypto)
}

/// Reads a token.
pub async fn read(
    keyring: &Keyring,
    token: &str,
    now_secs: u64,
) -> Result<SandboxClaims, SandboxRefusal> {
    if token.len() > MAX_TOKEN_BYTES {
        return Err(SandboxRefusal::Invalid);
    }
    let header = jsonwebtoken::decode_header(token).map_err(|_| SandboxRefusal::Invalid)?;
    let kid = match header.kid {
        Some(kid) if header.alg == Algorithm::HS256 => kid,
        _ => return Err(SandboxRefusal::Invalid),
    };
    let key = keyring
        .by_id(Purpose::Sign, &kid)
        .await?
        .ok_or(SandboxRefusal::Invalid)?;
    let mut validation = Validation::new(Algorithm::HS256);
    validation.set_audience(&[AUDIENCE]);
    validation.set_issuer(&[ISSUER]);
    validation.set_required_spec_claims(&["exp", "aud", "iss", "sub"]);
    // By the replica's own clock, below.
    validation.validate_exp = false;
    let data = jsonwebtoken::decode::<SandboxClaims>(
        token,
        &DecodingKey::from_secret(&key.bytes),
        &validation,
    )
    .map_err(|_| SandboxRefusal::Invalid)?;
    let claims = data.claims;
    let early = claims.iat > now_secs.saturating_add(leeway_secs());
    let late = claims.exp.saturating_add(leeway_secs()) <= now_secs;
    if early || late {
        return Err(SandboxRefusal::Expired);
    }
    Ok(claims)
}
