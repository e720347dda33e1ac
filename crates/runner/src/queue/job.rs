//! What a job says, parsed once into a type that cannot be wrong.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::network::{JobNetwork, MAX_SECRETS};
use crate::names::{ProfileName, RunId, SessionId};
use crate::telemetry::TraceParent;

/// Largest job file, bytes. A prompt of [`MAX_PROMPT_BYTES`] whose every byte needs escaping as `\uXXXX` does not
/// fit; one of ordinary text does, twice.
pub(crate) const MAX_JOB_BYTES: u64 = 8 << 20;
/// Longest prompt, bytes.
pub(crate) const MAX_PROMPT_BYTES: usize = 4 << 20;
/// Longest single string handed to execve, bytes. The kernel's limit is 128 KiB (`MAX_ARG_STRLEN`); longer prompts
/// travel by stdin, other longer values are refused.
pub(crate) const MAX_STRING_BYTES: usize = 96 << 10;
/// All of a job's environment, bytes: well below the kernel's limit for a whole argument list.
const MAX_ENVIRONMENT_BYTES: usize = 1 << 20;
/// Most paths one job may ask to be copied out.
pub(crate) const MAX_COLLECT: usize = 16;
/// Longest path, bytes (the kernel's `PATH_MAX`, less the terminating NUL).
const MAX_PATH_BYTES: usize = 4095;
/// Longest time limit, seconds: a week.
const MAX_TIMEOUT_SECS: u64 = 7 * 24 * 3600;

/// The fields of a job file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct JobFields {
    /// The run; the file's name says the same.
    pub(crate) run_id: RunId,
    /// What the agent is to do.
    pub(crate) prompt: String,
    /// What VM it runs in.
    pub(crate) profile: ProfileName,
    /// Absolute path in the guest; made if missing.
    pub(crate) working_dir: String,
    /// Which agent CLI.
    pub(crate) cli_agent_type: String,
    /// The agent's environment beside what the runner sets.
    #[serde(default)]
    pub(crate) environment: BTreeMap<String, String>,
    /// Jobs of one session may meet the same VM again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) session_id: Option<SessionId>,
    /// Killed after this many seconds; the runner's own limit stands above it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) timeout_secs: Option<u64>,
    /// Absolute guest paths of files to copy out when the agent has ended. File *i* of this list lands as
    /// `.results/<id>.files/<i>`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) collect: Vec<String>,
    /// What it may reach, and its secrets' names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) network: Option<JobNetwork>,
    /// The span of the submitter's trace that the job belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) traceparent: Option<TraceParent>,
}

/// Why a job was refused, for its submitter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum JobError {
    /// Not JSON, or not a job.
    #[error("the job file is not a valid job: {0}")]
    Syntax(String),
    /// Larger than [`MAX_JOB_BYTES`].
    #[error("the job file is larger than {MAX_JOB_BYTES} bytes")]
    TooLarge,
    /// A field's value makes no sense.
    #[error("the job's `{field}` is not usable: {reason}")]
    Field {
        /// Which.
        field: &'static str,
        /// Why, and what would be right.
        reason: String,
    },
}

/// A job whose every field was checked. Read its fields through it; it cannot be changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub(crate) struct Job(JobFields);

impl std::ops::Deref for Job {
    type Target = JobFields;
    fn deref(&self) -> &JobFields {
        &self.0
    }
}

impl Job {
    /// Checks the fields.
    pub(crate) fn new(fields: JobFields) -> Result<Self, JobError> {
        check(&fields)?;
        Ok(Self(fields))
    }

    /// Parses the contents of a job file.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, JobError> {
        if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > MAX_JOB_BYTES {
            return Err(JobError::TooLarge);
        }
        let text = std::str::from_utf8(bytes).map_err(|error| {
            JobError::Syntax(format!(
                "it is not UTF-8 text (byte {})",
                error.valid_up_to()
            ))
        })?;
        let fields =
            serde_json::from_str(text).map_err(|error| JobError::Syntax(error.to_string()))?;
        Self::new(fields)
    }

    /// The contents of its file.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>, JobError> {
        let bytes =
            serde_json::to_vec(&self.0).map_err(|error| JobError::Syntax(error.to_string()))?;
        if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > MAX_JOB_BYTES {
            return Err(JobError::TooLarge);
        }
        Ok(bytes)
    }
}

fn refuse<T>(field: &'static str, reason: impl Into<String>) -> Result<T, JobError> {
    Err(JobError::Field {
        field,
        reason: reason.into(),
    })
}

fn check(fields: &JobFields) -> Result<(), JobError> {
    if fields.prompt.is_empty() {
        return refuse("prompt", "it is empty");
    }
    if fields.prompt.len() > MAX_PROMPT_BYTES {
        return refuse(
            "prompt",
            format!("it is longer than {MAX_PROMPT_BYTES} bytes"),
        );
    }
    if fields.prompt.contains('\0') {
        return refuse("prompt", "it contains a NUL character");
    }
    check_path("working_dir", &fields.working_dir)?;
    let agent = &fields.cli_agent_type;
    let label = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if agent.is_empty() || agent.len() > 64 || !agent.bytes().all(label) {
        return refuse(
            "cli_agent_type",
            "it is 1 to 64 lowercase letters, digits and hyphens, such as claude-code",
        );
    }
    check_environment(&fields.environment)?;
    if let Some(secs) = fields.timeout_secs
        && !(1..=MAX_TIMEOUT_SECS).contains(&secs)
    {
        return refuse(
            "timeout_secs",
            format!("it is {secs}; it must be 1 to {MAX_TIMEOUT_SECS}"),
        );
    }
    if fields.collect.len() > MAX_COLLECT {
        return refuse("collect", format!("it names more than {MAX_COLLECT} paths"));
    }
    for path in &fields.collect {
        check_path("collect", path)?;
    }
    if let Some(network) = &fields.network {
        check_secrets(network, &fields.environment)?;
    }
    Ok(())
}

fn check_path(field: &'static str, path: &str) -> Result<(), JobError> {
    if !path.starts_with('/') {
        return refuse(field, "it is not an absolute path in the guest");
    }
    if path.len() > MAX_PATH_BYTES {
        return refuse(field, format!("it is longer than {MAX_PATH_BYTES} bytes"));
    }
    if path.chars().any(char::is_control) {
        return refuse(field, "it contains a control character");
    }
    if path.split('/').any(|part| part == "..") {
        return refuse(field, "it contains `..`");
    }
    Ok(())
}

fn check_secrets(
    network: &JobNetwork,
    environment: &BTreeMap<String, String>,
) -> Result<(), JobError> {
    if network.secrets.len() > MAX_SECRETS {
        return refuse(
            "network.secrets",
            format!("it names more than {MAX_SECRETS} secrets"),
        );
    }
    for name in &network.secrets {
        let name = name.as_str();
        if is_reserved(name) {
            return refuse(
                "network.secrets",
                format!("{name} is set by the runner and cannot be a secret"),
            );
        }
        if environment.contains_key(name) {
            return refuse(
                "network.secrets",
                format!("{name} is also a variable of the environment; it can only be one of both"),
            );
        }
    }
    Ok(())
}

/// Whether only the runner may set this variable: what it sets itself, and everything it may set one day.
pub(crate) fn is_reserved(name: &str) -> bool {
    name.starts_with("VM0_") || matches!(name, "CLI_AGENT_TYPE" | "USE_MOCK_CLAUDE")
}

fn check_environment(environment: &BTreeMap<String, String>) -> Result<(), JobError> {
    let mut total = 0_usize;
    for (name, value) in environment {
        let shown: String = name.chars().take(60).flat_map(char::escape_debug).collect();
        let first_ok = name
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
        let rest_ok = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !first_ok || !rest_ok || name.len() > 256 {
            return refuse(
                "environment",
                format!(
                    "\"{shown}\" is no variable name: it is up to 256 letters, digits and underscores and does not \
                     start with a digit"
                ),
            );
        }
        if is_reserved(name) {
            return refuse(
                "environment",
                format!("{shown} is set by the runner and cannot be overridden"),
            );
        }
        if value.contains('\0') {
            return refuse(
                "environment",
                format!("the value of {shown} contains a NUL character"),
            );
        }
        if value.len() > MAX_STRING_BYTES {
            return refuse(
                "environment",
                format!("the value of {shown} is longer than {MAX_STRING_BYTES} bytes"),
            );
        }
        total = total
            .saturating_add(name.len())
            .saturating_add(value.len())
            .saturating_add(2);
    }
    if total > MAX_ENVIRONMENT_BYTES {
        return refuse(
            "environment",
            format!("it is larger than {MAX_ENVIRONMENT_BYTES} bytes in all"),
        );
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A job that is fine.
    pub(crate) fn fields(run_id: RunId) -> JobFields {
        JobFields {
            run_id,
            prompt: "true".to_owned(),
            profile: "vm0/small".parse().unwrap(),
            working_dir: "/home/user/workspace".to_owned(),
            cli_agent_type: "claude-code".to_owned(),
            environment: BTreeMap::new(),
            session_id: None,
            timeout_secs: None,
            collect: Vec::new(),
            network: None,
            traceparent: None,
        }
    }

    fn with(change: impl FnOnce(&mut JobFields)) -> Result<Job, JobError> {
        let mut fields = fields(RunId::random());
        change(&mut fields);
        Job::new(fields)
    }

    #[test]
    fn a_job_survives_its_file() {
        let job = with(|f| {
            f.prompt = "echo \"it's\" \u{1f600}\n$(x)".to_owned();
            f.environment = BTreeMap::from([("A".to_owned(), "b c".to_owned())]);
            f.session_id = Some("s-1".parse().unwrap());
            f.timeout_secs = Some(5);
            f.collect = vec!["/tmp/x y".to_owned()];
        })
        .unwrap();
        assert_eq!(Job::parse(&job.to_bytes().unwrap()).unwrap(), job);
    }

    #[test]
    fn what_the_runner_sets_cannot_be_overridden() {
        for name in [
            "VM0_RUN_ID",
            "VM0_ANYTHING",
            "CLI_AGENT_TYPE",
            "USE_MOCK_CLAUDE",
        ] {
            let refused = with(|f| {
                f.environment.insert(name.to_owned(), "x".to_owned());
            });
            assert!(refused.unwrap_err().to_string().contains(name));
        }
    }

    #[test]
    fn senseless_values_are_refused_naming_the_field() {
        let cases: Vec<(&str, Result<Job, JobError>)> = vec![
            ("prompt", with(|f| f.prompt.clear())),
            ("prompt", with(|f| f.prompt = "a\0b".to_owned())),
            (
                "prompt",
                with(|f| f.prompt = "x".repeat(MAX_PROMPT_BYTES + 1)),
            ),
            (
                "working_dir",
                with(|f| f.working_dir = "relative".to_owned()),
            ),
            (
                "working_dir",
                with(|f| f.working_dir = "/a/../b".to_owned()),
            ),
            ("working_dir", with(|f| f.working_dir = "/a\nb".to_owned())),
            (
                "working_dir",
                with(|f| f.working_dir = format!("/{}", "a".repeat(5000))),
            ),
            (
                "cli_agent_type",
                with(|f| f.cli_agent_type = "a b".to_owned()),
            ),
            ("timeout_secs", with(|f| f.timeout_secs = Some(0))),
            ("timeout_secs", with(|f| f.timeout_secs = Some(u64::MAX))),
            ("collect", with(|f| f.collect = vec!["x".to_owned()])),
            (
                "collect",
                with(|f| f.collect = vec!["/x".to_owned(); MAX_COLLECT + 1]),
            ),
            (
                "environment",
                with(|f| drop(f.environment.insert("1A".to_owned(), String::new()))),
            ),
            (
                "environment",
                with(|f| drop(f.environment.insert("A=B".to_owned(), String::new()))),
            ),
            (
                "environment",
                with(|f| {
                    drop(
                        f.environment
                            .insert("A".to_owned(), "x".repeat(MAX_STRING_BYTES + 1)),
                    )
                }),
            ),
        ];
        for (field, result) in cases {
            let error = result.unwrap_err().to_string();
            assert!(error.contains(&format!("`{field}`")), "{field}: {error}");
        }
    }

    #[test]
    fn what_is_not_a_job_is_refused() {
        let good = String::from_utf8(with(|_| ()).unwrap().to_bytes().unwrap()).unwrap();
        let unknown = good.replacen('{', "{\"surprise\":1,", 1);
        let bad_id = good.replacen("\"run_id\":\"", "\"run_id\":\"..", 1);
        let half = &good[..good.len() / 2];
        for bad in [
            unknown.as_bytes(),
            bad_id.as_bytes(),
            half.as_bytes(),
            b"",
            b"null",
            b"\xff",
        ] {
            assert!(matches!(Job::parse(bad), Err(JobError::Syntax(_))));
        }
        let huge = vec![b' '; usize::try_from(MAX_JOB_BYTES).unwrap() + 1];
        assert_eq!(Job::parse(&huge), Err(JobError::TooLarge));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_fall(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = Job::parse(&bytes);
        }

        #[test]
        fn any_prompt_that_is_accepted_comes_back(prompt in "\\PC{1,200}") {
            let job = with(|f| f.prompt = prompt.clone()).unwrap();
            prop_assert_eq!(&Job::parse(&job.to_bytes().unwrap()).unwrap().prompt, &prompt);
        }
    }
}
