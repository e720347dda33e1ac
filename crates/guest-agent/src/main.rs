//! Runs the agent CLI inside the guest.
//!
//! guest-init starts it as the agent's own user for every job; it starts the CLI, watches it, prints what
//! people read in the system log, and ends with the CLI's exit code:
//!
//! ```text
//! env ─▶ launch ─▶ supervisor ─┬─ lines ─▶ events ─▶ watchdogs
//!                              ├─ log ─▶ standard output
//!                              └─ api ─▶ webhooks, where there is a token
//! ```
//!
//! One thread and one `poll`: the CLI's output is read whatever else is slow, because nothing else ever blocks
//! (`log`); what talks to the API does so in threads of its own. It sits on the path between a claim and the prompt, often under emulation: no async runtime, and
//! nothing allocated or asked of the kernel that is not used.

mod api;
mod emulation;
mod end;
mod env;
mod events;
mod inputs;
mod launch;
mod lines;
mod log;
mod signals;
mod supervisor;
mod tools;

use std::os::fd::OwnedFd;
use std::process::{Child, ExitCode};
use std::time::Instant;

use api::{Api, Reporter};
use end::End;
use env::AgentEnv;
use launch::LaunchError;
use log::Log;
use supervisor::Supervisor;

fn main() -> ExitCode {
    let mut log = Log::new();
    let end = run(&mut log);
    log.flush();
    if let Some(reason) = end.reason.filter(|reason| !reason.is_empty()) {
        // The host takes the last line of standard error as the reason that it answers with.
        eprintln!("{reason}");
    }
    ExitCode::from(end.code)
}

fn run(log: &mut Log) -> End {
    let started = Instant::now();
    let env = match AgentEnv::from_process() {
        Ok(env) => env,
        Err(error) => {
            log.line(format_args!("✗ The agent cannot start: {error}"));
            return End::failed(1, error);
        }
    };
    log.line(format_args!("▶ VM0 Sandbox {}", env.run_id));
    log.line(format_args!("▷ Initialization"));
    // Before signals are caught: until then one ends the agent, whatever it waits for.
    let api = match env
        .api
        .as_ref()
        .map(|api| Api::connect(api, &env.run_id, &env.home))
    {
        None => None,
        Some(Ok(api)) => Some(api),
        Some(Err(error)) => {
            log.line(format_args!("✗ Initialization failed: {error}"));
            return finish(log, End::failed(1, error));
        }
    };
    let reporter = api.as_ref().map(Api::reporter).unwrap_or_default();
    log.report_to(reporter.clone());
    let signalled = match signals::catch().map_err(LaunchError::Signals) {
        Ok(signalled) => signalled,
        Err(error) => {
            log.line(format_args!("✗ Initialization failed: {error}"));
            return finish(log, End::failed(1, error));
        }
    };
    let end = work(log, &env, started, &signalled, reporter);
    let Some(api) = api else {
        return finish(log, end);
    };
    let deadline = api.checkpoint(log, &signalled);
    let end = finish(log, end);
    api.close(log, &end, &signalled, deadline);
    end
}

/// Runs the CLI.
fn work(
    log: &mut Log,
    env: &AgentEnv,
    started: Instant,
    signalled: &OwnedFd,
    reporter: Reporter,
) -> End {
    let cli = match initialize(env) {
        Ok(cli) => cli,
        Err(error) => {
            log.line(format_args!("✗ Initialization failed: {error}"));
            return End::failed(error.exit_code(), error);
        }
    };
    log.line(format_args!(
        "✓ Initialization complete ({}s)",
        started.elapsed().as_secs()
    ));
    log.line(format_args!("▷ Execution"));

    let end = match Supervisor::new(cli, env.limits, signalled, log, reporter).run() {
        Ok(end) => end,
        Err(error) => {
            log.line(format_args!("✗ The agent CLI cannot be watched: {error}"));
            End::failed(1, error)
        }
    };
    if end.code == 0 {
        log.line(format_args!("✓ Execution complete"));
    } else {
        log.line(format_args!("✗ Execution failed (exit code {})", end.code));
    }
    end
}

/// From here on the CLI runs.
fn initialize(env: &AgentEnv) -> Result<Child, LaunchError> {
    launch::enter_working_dir(&env.working_dir)?;
    launch::restore_session(env)?;
    launch::start(env)
}

/// The last lines of every run that got as far as its first.
fn finish(log: &mut Log, end: End) -> End {
    log.line(format_args!("▷ Cleanup"));
    if end.code == 0 {
        log.line(format_args!("✓ Sandbox finished successfully"));
    } else {
        log.line(format_args!("✗ Sandbox failed (exit code {})", end.code));
    }
    end
}
