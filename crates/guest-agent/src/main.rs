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

use env::AgentEnv;
use launch::LaunchError;
use log::Log;
use supervisor::Supervisor;

fn main() -> ExitCode {
    let mut log = Log::new();
    let code = run(&mut log);
    log.flush();
    ExitCode::from(code)
}

fn run(log: &mut Log) -> u8 {
    let started = Instant::now();
    let env = match AgentEnv::from_process() {
        Ok(env) => env,
        Err(error) => {
            log.line(format_args!("✗ The agent cannot start: {error}"));
            return 1;
        }
    };
    log.line(format_args!("▶ VM0 Sandbox {}", env.run_id));
    log.line(format_args!("▷ Initialization"));
    let (signalled, cli) = match initialize(&env) {
        Ok(initialized) => initialized,
        Err(error) => {
            log.line(format_args!("✗ Initialization failed: {error}"));
            return finish(log, error.exit_code());
        }
    };
    log.line(format_args!(
        "✓ Initialization complete ({}s)",
        started.elapsed().as_secs()
    ));
    log.line(format_args!("▷ Execution"));

    let outcome = Supervisor::new(cli, env.limits, &signalled, log).run();
    match outcome {
        Ok(0) => {
            log.line(format_args!("✓ Execution complete"));
            finish(log, 0)
        }
        Ok(code) => {
            log.line(format_args!("✗ Execution failed (exit code {code})"));
            finish(log, code)
        }
        Err(error) => {
            log.line(format_args!("✗ Execution failed: {error}"));
            finish(log, 1)
        }
    }
}

/// From here on a signal is forwarded instead of ending the agent, and the CLI runs.
fn initialize(env: &AgentEnv) -> Result<(OwnedFd, Child), LaunchError> {
    let signalled = signals::catch().map_err(LaunchError::Signals)?;
    launch::enter_working_dir(&env.working_dir)?;
    Ok((signalled, launch::start(env)?))
}

/// The last lines of every run that got as far as its first.
fn finish(log: &mut Log, code: u8) -> u8 {
    log.line(format_args!("▷ Cleanup"));
    if code == 0 {
        log.line(format_args!("✓ Sandbox finished successfully"));
    } else {
        log.line(format_args!("✗ Sandbox failed (exit code {code})"));
    }
    code
}
