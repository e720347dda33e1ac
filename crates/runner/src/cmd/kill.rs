//! `runner kill`: ends a run, through its runner where that lives, and without it where it does not.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use host::launcher::{ForkedLauncher, LauncherConfig};
use host::slot::{SlotId, SlotRecord, held_slots, orphaned_slots};

use crate::context::{CliError, Context, block_on, note};
use crate::control::client::{self, RunPrefix};
use crate::control::protocol::{Reply, Request};
use crate::home::Home;
use crate::names::RunId;
use crate::vms;

/// A cancelled run is over after this, or its runner is stuck.
const OVER: Duration = Duration::from_secs(10);
/// How often it is looked whether it is.
const LOOK: Duration = Duration::from_millis(100);
/// A killed process is gone after this, or hangs in the kernel.
const GONE: Duration = Duration::from_secs(5);

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The runner of the job cancels it; the submitter gets a result that says so. With --force the job's VM is killed if \
the run is not over ten seconds later, or if its runner does not answer (needs root).\n\
Where the runner is dead, what is left of the run's VM is removed (needs root); the next runner of the group answers \
the submitter.\n\n\
Examples:\n  runner kill 6f1c\n  sudo runner kill 6f1c --force\n\n\
A job that no runner has taken yet is cancelled with `runner local cancel`."
)]
pub(crate) struct Args {
    /// Beginning of the run's id
    #[arg(value_name = "RUN")]
    run: RunPrefix,
    /// Kill the VM if cancelling does not help
    #[arg(short, long)]
    force: bool,
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let home = context.home()?;
    let asked = block_on(ask_owner(&home, &args));
    let unanswered = match asked {
        Ok(run) => {
            context.print_line(run)?;
            return Ok(ExitCode::SUCCESS);
        }
        Err(error) => error,
    };
    let config = LauncherConfig::from_env(format!("kill-{}", std::process::id()))?;
    let found = without_owner(&config.run_dir, &args)?;
    let Some((run, slot, of)) = found else {
        return Err(unanswered);
    };
    if !rustix::process::geteuid().is_root() {
        return Err(CliError::failed(format_args!(
            "run {run} has a VM in slot {}, but no runner that answers",
            slot.0
        ))
        .with_hint(format_args!("sudo runner kill {run} --force")));
    }
    match of {
        Of::Dead => reclaim(config, slot)?,
        Of::Silent => kill_slot(&config, slot, run)?,
    }
    context.print_line(run)?;
    Ok(ExitCode::SUCCESS)
}

/// Has the owner cancel the run; with `--force` waits until it is over, which is an error if it does not come.
async fn ask_owner(home: &Home, args: &Args) -> Result<RunId, CliError> {
    let found = client::find(home, &args.run).await?;
    let run = found.info.run_id;
    let reply = found
        .instance
        .ask(&Request::Cancel { run })
        .await
        .map_err(|error| client::broken(&error))?;
    match reply {
        Reply::Done => {}
        Reply::Failed(failure) => return Err(client::told(failure)),
        _ => return Err(client::odd()),
    }
    if !args.force {
        return Ok(run);
    }
    let begin = Instant::now();
    while begin.elapsed() < OVER {
        let active = client::active_runs(home).await?;
        if !active.iter().any(|active| active.info.run_id == run) {
            return Ok(run);
        }
        tokio::time::sleep(LOOK).await;
    }
    note(format_args!(
        "run {run} is not over {} s after it was cancelled",
        OVER.as_secs()
    ));
    Err(CliError::failed(format_args!("run {run} does not end")))
}

/// Who holds the slot of a run.
#[derive(Clone, Copy)]
enum Of {
    /// Nobody any more.
    Dead,
    /// A launcher that lives, though its daemon does not answer.
    Silent,
}

/// The one run with a slot but no daemon that answers for it. Slots of launchers that live are touched with `--force` only.
fn without_owner(run_dir: &Path, args: &Args) -> Result<Option<(RunId, SlotId, Of)>, CliError> {
    let mut found: Vec<(RunId, SlotId, Of)> = Vec::new();
    let mut add = |slot: SlotId, record: &SlotRecord, of: Of| {
        let run: Option<RunId> = record.run_id.as_deref().and_then(|run| run.parse().ok());
        if let Some(run) = run.filter(|run| args.run.matches(*run)) {
            found.push((run, slot, of));
        }
    };
    if args.force {
        for held in held_slots(run_dir)? {
            add(held.slot, &held.record, Of::Silent);
        }
    }
    if rustix::process::geteuid().is_root() {
        for (slot, record) in &orphaned_slots(run_dir)? {
            add(*slot, record, Of::Dead);
        }
    }
    match found.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(*one)),
        several => {
            let list: String = several
                .iter()
                .map(|(run, ..)| format!("\n  {run}"))
                .collect();
            Err(CliError::failed(format_args!(
                "{} runs begin with {}:{list}",
                several.len(),
                args.run
            ))
            .with_hint("give more of the id"))
        }
    }
}

/// Kills the processes of a slot. Each is held before it is looked at again: uid, start and slot must still be those of this
/// run, so that nobody else's process is hit, whatever became of numbers meanwhile.
fn kill_slot(config: &LauncherConfig, slot: SlotId, run: RunId) -> Result<(), CliError> {
    let mut killed = 0;
    for process in vms::processes(config.uid_base) {
        if process.slot != slot {
            continue;
        }
        let Some(held) = process.hold(config.uid_base) else {
            continue;
        };
        let still = held_slots(&config.run_dir)?.into_iter().any(|held| {
            held.slot == slot && held.record.run_id.as_deref() == Some(run.to_string().as_str())
        });
        if !still {
            return Err(CliError::failed(format_args!(
                "slot {} is not that of run {run} any more: it has just ended",
                slot.0
            )));
        }
        if !held.kill(GONE)? {
            return Err(CliError::failed(format_args!(
                "process {} of run {run} does not die: it hangs in the kernel",
                process.pid
            )));
        }
        killed += 1;
    }
    if killed == 0 {
        return Err(CliError::failed(format_args!(
            "run {run} has no process any more; its runner does not answer"
        ))
        .with_hint("restart the runner: the next one answers the job"));
    }
    note(format_args!(
        "killed the VM of run {run}; its runner answers the submitter"
    ));
    Ok(())
}

/// Cleans the slots that dead runners left, this one among them.
fn reclaim(config: LauncherConfig, slot: SlotId) -> Result<(), CliError> {
    let run_dir = config.run_dir.clone();
    let forked = ForkedLauncher::fork(config)?;
    block_on(async {
        let launcher = forked.attach()?;
        launcher.reclaim_orphans().await?;
        launcher.shutdown().await;
        Ok(())
    })?;
    if orphaned_slots(&run_dir)?.contains_key(&slot) {
        return Err(
            CliError::failed(format_args!("slot {} could not be cleaned", slot.0))
                .with_hint("sudo runner doctor"),
        );
    }
    note(
        "its runner is dead, and what it left is removed; the next one of the group answers the submitter",
    );
    Ok(())
}
