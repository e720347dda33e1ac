//! What a job says of its network: in the job file its policy and the names of its secrets, and beside it, in shared
//! memory until the job is claimed, their values.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;

use host::handover::{Handover, HandoverError};
use policy::{Draft, HostPattern, Placeholder, Secret, SecretName, SecretValue};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::names::RunId;

/// Most secrets of one job.
pub(crate) const MAX_SECRETS: usize = 64;

/// The part of a job file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct JobNetwork {
    /// What it wants beside and over the profile's own policy.
    pub(crate) policy: Draft,
    /// Names of its secrets; the agent finds a placeholder under each.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub(crate) secrets: BTreeSet<SecretName>,
}

impl JobNetwork {
    /// Says nothing that is not so anyway.
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// One secret on its way from submitter to runner.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HandedSecret {
    /// Its name.
    pub(crate) name: SecretName,
    /// Its value.
    pub(crate) value: Zeroizing<String>,
    /// Hosts it may go to; none: wherever an allowing rule names it.
    #[serde(default)]
    pub(crate) hosts: Vec<HostPattern>,
}

impl std::fmt::Debug for HandedSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HandedSecret({})", self.name.as_str())
    }
}

/// Why a job's secrets cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SecretsError {
    /// The file.
    #[error("the job's secrets cannot be had: {0}")]
    Handover(#[from] HandoverError),
    /// Its content.
    #[error("the job's secrets cannot be understood: {0}")]
    Content(String),
}

/// Leaves a job's secrets where its runner finds them. They go when this is dropped.
pub(crate) fn hand_over(run: RunId, secrets: &[HandedSecret]) -> Result<Handover, SecretsError> {
    // Sized ahead, so that no half-filled buffer is left behind unwiped when it grows.
    let size = secrets.iter().map(|secret| secret.value.len() * 6 + 1024);
    let mut bytes = Zeroizing::new(Vec::with_capacity(size.sum::<usize>() + 16));
    serde_json::to_writer(&mut *bytes, secrets)
        .map_err(|error| SecretsError::Content(error.to_string()))?;
    Ok(Handover::leave(&handover_name(run), &bytes)?)
}

/// The name under which a run's secrets are handed over.
pub(crate) fn handover_name(run: RunId) -> String {
    run.to_string()
}

/// Reads what was handed over: exactly the secrets that the job file names.
pub(crate) fn receive(
    file: File,
    wanted: &BTreeSet<SecretName>,
) -> Result<Vec<Secret>, SecretsError> {
    let content = |why: String| SecretsError::Content(why);
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(host::handover::MAX_BYTES)
        .read_to_end(&mut bytes)
        .map_err(|error| content(error.to_string()))?;
    let handed: Vec<HandedSecret> =
        serde_json::from_slice(&bytes).map_err(|error| content(error.to_string()))?;
    let names: BTreeSet<SecretName> = handed.iter().map(|secret| secret.name.clone()).collect();
    if names != *wanted || handed.len() != wanted.len() {
        return Err(content("they are not the ones the job names".to_owned()));
    }
    let mut secrets = Vec::new();
    for HandedSecret {
        name,
        mut value,
        hosts,
    } in handed
    {
        let mut entropy = [0_u8; 16];
        rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty())
            .map_err(|errno| content(format!("there is no entropy: {errno}")))?;
        let value = SecretValue::new(std::mem::take(&mut *value))
            .map_err(|error| content(error.to_string()))?;
        let placeholder = Placeholder::generate(&value, entropy);
        let secret = Secret::new(name, value, placeholder, hosts);
        secrets.push(secret.map_err(|error| content(error.to_string()))?);
    }
    Ok(secrets)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handed(name: &str, value: &str) -> HandedSecret {
        HandedSecret {
            name: name.parse().unwrap(),
            value: value.to_owned().into(),
            hosts: vec!["api.example.com".parse().unwrap()],
        }
    }

    #[test]
    fn secrets_arrive_with_a_placeholder_of_their_own_and_are_not_printed() {
        let run = RunId::random();
        let secrets = [
            handed("TOKEN", "very-secret-1"),
            handed("OTHER", "very-secret-2"),
        ];
        assert!(!format!("{secrets:?}").contains("very-secret"));
        let _left = hand_over(run, &secrets).unwrap();
        let owner = rustix::process::geteuid().as_raw();
        let file = host::handover::take(&handover_name(run), owner).unwrap();
        let wanted = secrets.iter().map(|secret| secret.name.clone()).collect();
        let received = receive(file, &wanted).unwrap();
        assert_eq!(received[0].value().expose(), "very-secret-1");
        assert_ne!(received[0].placeholder(), received[1].placeholder());
        assert!(!format!("{received:?}").contains("very-secret"));
    }

    #[test]
    fn secrets_that_the_job_does_not_name_or_that_are_missing_are_refused() {
        for wanted in [&["TOKEN", "MORE"][..], &["MORE"], &[]] {
            let run = RunId::random();
            let _left = hand_over(run, &[handed("TOKEN", "very-secret")]).unwrap();
            let owner = rustix::process::geteuid().as_raw();
            let file = host::handover::take(&handover_name(run), owner).unwrap();
            let wanted = wanted.iter().map(|name| name.parse().unwrap()).collect();
            assert!(receive(file, &wanted).is_err());
        }
    }
}
