//! `runner kill`: ends a run, through its runner where that lives, and without it where it does not.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use host::launcher::{ForkedLauncher, LauncherConfig};
use host::slot::{SlotId, SlotRecord, held_slots, orphaned_slots};

use crate::context::{CliError, Context, block_on, note};
use crate::control::client::{self, Instance, RunPrefix};
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
    let mut search = Search {
        run: args.run.clone(),
        instances: Vec::new(),
    };
    let asked = block_on(ask_owner(&home, &args, &mut search));
    let unanswered = match asked {
        Ok(run) => {
            context.print_line(run)?;
            return Ok(ExitCode::SUCCESS);
        }
        Err(error) => error,
    };
    let config = LauncherConfig::from_env(format!("kill-{}", std::process::id()))?;
    let found = without_owner(&config.run_dir, &search, args.force)?;
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

/// What to look for among the slots, which are the whole host's: runs of other homes are in them, too.
struct Search {
    run: RunPrefix,
    /// Only in slots of these.
    instances: Vec<String>,
}

/// Has the owner cancel the run; with `--force` waits until it is over, which is an error if it does not come. Where the
/// owner has not done it, `search` says afterwards whose slots may have it.
async fn ask_owner(home: &Home, args: &Args, search: &mut Search) -> Result<RunId, CliError> {
    let (active, mut lost) = client::survey(home).await?;
    if !active.iter().any(|run| args.run.matches(run.info.run_id)) {
        // It may be a run of those that do not answer, or are dead.
        lost.extend(Instance::all(home)?.into_iter().filter(|it| !it.is_live()));
        search.instances = lost.into_iter().map(|instance| instance.id).collect();
    }
    let found = client::choose(active, &args.run)?;
    let run = found.info.run_id;
    let reply = found.instance.ask(&Request::Cancel { run }).await;
    if let Ok(Reply::Failed(failure)) = reply {
        return Err(client::told(failure));
    }
    // From here on it is this run of this instance.
    search.run = run.into();
    search.instances.push(found.instance.id);
    match reply {
        Ok(Reply::Done) => {}
        Ok(_) => return Err(client::odd()),
        Err(error) => return Err(client::broken(&error)),
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
fn without_owner(
    run_dir: &Path,
    search: &Search,
    force: bool,
) -> Result<Option<(RunId, SlotId, Of)>, CliError> {
    let mut found: Vec<(RunId, SlotId, Of)> = Vec::new();
    if search.instances.is_empty() {
        return Ok(None);
    }
    let mut add = |slot: SlotId, record: &SlotRecord, of: Of| {
        if !search.instances.contains(&record.instance) {
            return;
        }
        let run: Option<RunId> = record.run_id.as_deref().and_then(|run| run.parse().ok());
        if let Some(run) = run.filter(|run| search.run.matches(*run)) {
            found.push((run, slot, of));
        }
    };
    if force {
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
                search.run
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

#[cfg(test)]
mod tests {
    use host::fs::LockKind;
    use host::slot::{CHANGES_FILE, HeldSlot, LeaseKind, Resources};

    use super::*;
    use crate::control::protocol::{self, RunInfo};
    use crate::home::rel;

    /// A home with a live instance that runs these, or does not answer at all.
    struct Place {
        temp: tempfile::TempDir,
        home: Home,
        _lock: host::fs::Lock,
    }

    impl Place {
        fn new(runs: Option<Vec<RunId>>) -> Self {
            let temp = tempfile::tempdir().unwrap();
            let home = Home::open_or_create(&temp.path().join("home")).unwrap();
            let directory = rel::instances(&"demo".parse().unwrap()).join("own");
            let instance = home.ensure_dir(directory).unwrap();
            let lock = instance.lock("lock", LockKind::Exclusive, 0o600).unwrap();
            if let Some(runs) = runs {
                let listener = instance.bind_socket(crate::control::SOCKET, 0o600).unwrap();
                listener.set_nonblocking(true).unwrap();
                let listener = tokio::net::UnixListener::from_std(listener).unwrap();
                tokio::spawn(answer(listener, runs));
            }
            Self {
                temp,
                home,
                _lock: lock,
            }
        }

        /// What `kill` finds, where slots of these instances have these runs.
        async fn kill(&self, prefix: &str, slots: &[(&str, RunId)]) -> Result<RunId, String> {
            let held: Vec<HeldSlot> = (0..)
                .zip(slots)
                .map(|(number, (instance, run))| HeldSlot {
                    slot: SlotId(number),
                    launcher_pid: std::process::id(),
                    record: SlotRecord {
                        instance: (*instance).to_owned(),
                        kind: LeaseKind::Firm,
                        resources: Resources::default(),
                        run_id: Some(run.to_string()),
                        shared_mb: 0,
                    },
                })
                .collect();
            let run_dir = self.temp.path();
            let text = serde_json::to_vec(&held).unwrap();
            std::fs::write(run_dir.join(CHANGES_FILE), text).unwrap();
            let args = Args {
                run: prefix.parse().unwrap(),
                force: true,
            };
            let mut search = Search {
                run: args.run.clone(),
                instances: Vec::new(),
            };
            let error = match ask_owner(&self.home, &args, &mut search).await {
                Ok(run) => panic!("{run} was ended by its owner"),
                Err(error) => error.to_string(),
            };
            match without_owner(run_dir, &search, true) {
                Ok(Some((run, ..))) => Ok(run),
                Ok(None) => Err(error),
                Err(error) => Err(error.to_string()),
            }
        }
    }

    /// A daemon that takes a cancellation and does nothing about it but to hang up.
    async fn answer(listener: tokio::net::UnixListener, runs: Vec<RunId>) {
        while let Ok((stream, _)) = listener.accept().await {
            let mut connection = protocol::frame(stream);
            if let Ok(Some(Request::Runs)) = protocol::receive(&mut connection).await {
                let info = |run: &RunId| RunInfo {
                    run_id: *run,
                    profile: "vm0/small".parse().unwrap(),
                    phase: "running".to_owned(),
                    since_unix: 1,
                };
                let reply = Reply::Runs(runs.iter().map(info).collect());
                protocol::send(&mut connection, &reply).await.unwrap();
            }
        }
    }

    fn run(number: u32) -> RunId {
        format!("6f1c{number:04}-3a7b-4c1d-9e55-0a1b2c3d4e5f")
            .parse()
            .unwrap()
    }

    #[tokio::test]
    async fn a_run_of_another_home_is_never_found() {
        let answers = Place::new(Some(vec![run(1), run(2)]));
        let others = [("other", run(3)), ("own", run(4))];
        // Nobody knows it, and whoever is ours has said so.
        let error = answers.kill("6f1c0003", &others).await.unwrap_err();
        assert!(error.contains("no active run"), "{error}");
        let error = answers.kill("6f1c0004", &others).await.unwrap_err();
        assert!(error.contains("no active run"), "{error}");
        let error = answers.kill("6f1c", &others).await.unwrap_err();
        assert!(error.contains("2 active runs"), "{error}");
        let silent = Place::new(None);
        let error = silent.kill("6f1c0003", &others).await.unwrap_err();
        assert!(error.contains("no active run"), "{error}");
    }

    #[tokio::test]
    async fn a_run_of_an_instance_that_fails_is_found_among_its_own() {
        let slots = [("other", run(3)), ("own", run(1)), ("own", run(2))];
        let silent = Place::new(None);
        assert_eq!(silent.kill("6f1c0001", &slots).await, Ok(run(1)));
        let error = silent.kill("6f1c", &slots).await.unwrap_err();
        assert!(error.contains("2 runs begin with"), "{error}");
        // It hangs up when it is told to cancel: this run is meant and no other.
        let fails = Place::new(Some(vec![run(1)]));
        assert_eq!(fails.kill("6f1c", &slots).await, Ok(run(1)));
    }
}
