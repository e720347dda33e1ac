//! What runs in a guest before its snapshot is taken: it fills the page cache and leaves nothing behind.

use guest_control::{ExecSpec, UserSpec};

use crate::profile::Flavour;

/// The whole chain of a job, agent to shell, with the mock CLI and a fixed prompt. Warmed clones run it once more.
pub(crate) fn job() -> ExecSpec {
    let env = [
        ("VM0_RUN_ID", "00000000-0000-4000-8000-000000000000"),
        ("VM0_PROMPT", "true"),
        ("VM0_WORKING_DIR", "/home/user"),
        ("CLI_AGENT_TYPE", "claude-code"),
        ("USE_MOCK_CLAUDE", "true"),
    ];
    ExecSpec {
        argv: vec![b"/usr/local/bin/guest-agent".to_vec()],
        env: env
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .to_vec(),
        user: UserSpec::User,
        kill_group_on_exit: true,
        ..ExecSpec::default()
    }
}

/// Everything that runs before a snapshot: the flavour's own command lines, then the chain, which is what a job needs
/// soonest and the cache must not lose to anything.
pub(crate) fn all(flavour: Flavour) -> Vec<ExecSpec> {
    let lines = flavour.warm_up().into_iter().map(|line| ExecSpec {
        argv: [&b"/bin/bash"[..], b"-c", line.as_bytes()]
            .map(<[u8]>::to_vec)
            .to_vec(),
        user: UserSpec::User,
        kill_group_on_exit: true,
        ..ExecSpec::default()
    });
    lines.chain([job()]).collect()
}
