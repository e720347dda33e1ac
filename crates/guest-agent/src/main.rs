//! Runs the agent CLI inside the guest.
//!
//! guest-init starts it as the agent's own user for every job; it starts the CLI, watches it, prints what
//! people read in the system log, and ends with the CLI's exit code:
//!
//! ```text
//! env ─▶ launch ─▶ supervisor ─┬─ lines ─▶ events ─▶ watchdogs
//!                              └─ log ─▶ standard output
//! ```
//!
//! One thread and one `poll`: the CLI's output is read whatever else is slow, because nothing else ever blocks
//! (`log`). It sits on the path between a claim and the prompt, often under emulation: no async runtime, and
//! nothing allocated or asked of the kernel that is not used.

mod emulation;
mod end;
mod env;
mod events;
mod launch;
mod lines;
mod log;
mod signals;
mod supervisor;
mod tools;

use std::os::fd::OwnedFd;
use std::process::{Child, ExitCode};
use std::time::Instant;

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
    let (signalled, cli) = match initialize(&env) {
        Ok(initialized) => initialized,
        Err(error) => {
            log.line(format_args!("✗ Initialization failed: {error}"));
            return finish(log, End::failed(error.exit_code(), error));
        }
    };
    log.line(format_args!(
        "✓ Initialization complete ({}s)",
        started.elapsed().as_secs()
    ));
    log.line(format_args!("▷ Execution"));

    let end = match Supervisor::new(cli, env.limits, &signalled, log).run() {
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
    finish(log, end)
}

/// From here on a signal is forwarded instead of ending the agent, and the CLI runs.
fn initialize(env: &AgentEnv) -> Result<(OwnedFd, Child), LaunchError> {
    let signalled = signals::catch().map_err(LaunchError::Signals)?;
    launch::enter_working_dir(&env.working_dir)?;
    Ok((signalled, launch::start(env)?))
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
