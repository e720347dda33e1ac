//! Starting, replacing, draining and ending the service.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use host::fs::{Lock, LockKind};
use tokio::signal::unix::{self, SignalKind};

use super::systemd::{JournalMark, State, require_root, systemctl};
use super::unit::{Place, Unit, UnitName, other_home};
use super::{Run, instances};
use crate::cmd::start::source;
use crate::config::{self, Config};
use crate::context::{CliError, Context, block_on, note};
use crate::home::{Home, rel};
use crate::names::{RunId, RunnerName};
use crate::status::{Mode, Status};

/// Longest wait for a predecessor that was told to stop.
const PREDECESSOR: Duration = Duration::from_secs(600);

pub(super) fn start(args: &Run, place: Place, context: &Context) -> Result<ExitCode, CliError> {
    require_root(match place {
        Place::UntilReboot => "start",
        Place::Persistent => "install",
    })?;
    let file = std::fs::canonicalize(&args.config).map_err(|error| {
        CliError::failed(format_args!(
            "cannot open {}: {error}",
            args.config.display()
        ))
    })?;
    let config = config::load(&file)?;
    if args.name.as_ref().is_some_and(|name| *name != config.name) {
        return Err(CliError::usage(format_args!(
            "{} is the configuration of runner {}",
            file.display(),
            config.name
        )));
    }
    let unit = UnitName::of(&config.name);
    require_own(&unit, context)?;
    let _one = one_at_a_time(&context.home()?, &config.name)?;
    if place == Place::UntilReboot && Place::Persistent.read(&unit)?.is_some() {
        return Err(
            CliError::failed(format_args!("{unit} is installed for every boot"))
                .with_hint("`runner service install` replaces it, `uninstall` removes it"),
        );
    }
    let text = text(args, &file, &config, context)?;
    let before = State::of(&unit)?;
    let kept = place.read(&unit)?;
    // What failed before is no reason not to start now.
    if before.has_failed() {
        systemctl(&["reset-failed", unit.as_str()])?;
    }
    place.write(&unit, Some(&text))?;
    systemctl(&["daemon-reload"])?;
    let mark = JournalMark::now();
    let started = if before.is_active() {
        note(format_args!("replacing {unit}; its running jobs go on"));
        systemctl(&["reload", unit.as_str()])
    } else {
        // Also where it is between two attempts to start: it has no jobs then.
        systemctl(&["restart", unit.as_str()])
    };
    if let Err(error) = started {
        return Err(undo(&unit, place, &before, kept.as_deref(), &mark, error));
    }
    if place == Place::Persistent {
        systemctl(&["enable", "--quiet", unit.as_str()])?;
        // The one in /etc counts; this one would be there again after an uninstall.
        Place::UntilReboot.write(&unit, None)?;
        systemctl(&["daemon-reload"])?;
    }
    context.print_line(format_args!("{unit} is running"))?;
    Ok(ExitCode::SUCCESS)
}

/// Fails for a unit of another home: units are the whole host's, and the jobs of this one are in that home.
fn require_own(unit: &UnitName, context: &Context) -> Result<(), CliError> {
    let Some(home) = other_home(unit, &context.home_path()?)? else {
        return Ok(());
    };
    let home = home.display();
    Err(CliError::failed(format_args!(
        "{unit} is of the runner in another home, {home}"
    ))
    .with_hint(format_args!(
        "--home {home} is the one that is meant, or name another runner"
    )))
}

/// Two deploys at once, one after the other.
fn one_at_a_time(home: &Home, name: &RunnerName) -> Result<Lock, CliError> {
    let locks = home.ensure_dir(rel::LOCKS)?;
    Ok(locks.lock(format!("service-{name}"), LockKind::Exclusive, 0o600)?)
}

fn text(
    args: &Run,
    file: &std::path::Path,
    config: &Config,
    context: &Context,
) -> Result<String, CliError> {
    let program = std::env::current_exe()?;
    let token_file = api_token_file(args)?;
    let api = args.api_url.as_deref().zip(token_file.as_deref());
    let environment_file = args
        .env_file
        .as_ref()
        .map(std::fs::canonicalize)
        .transpose();
    let environment_file = environment_file
        .map_err(|error| CliError::failed(format_args!("cannot open --env-file: {error}")))?;
    Unit {
        name: &config.name,
        program: &program,
        home: context.home()?.path(),
        config: file,
        local: args.local,
        api,
        environment: &args.env,
        environment_file: environment_file.as_deref(),
        stop_timeout: config.stop_timeout(),
    }
    .text()
}

/// The file of the token, once it is sure that the daemon will take address and token: what is wrong with them is said
/// here and not in the journal.
fn api_token_file(args: &Run) -> Result<Option<PathBuf>, CliError> {
    if args.env.iter().any(|(name, _)| name == source::TOKEN) {
        return Err(CliError::usage(
            "--env writes the token into the unit, which everybody can read",
        )
        .with_hint("--api-token-file FILE; or VM0_API_TOKEN=… in the file of --env-file"));
    }
    let Some(url) = &args.api_url else {
        return Ok(None);
    };
    let Some(file) = &args.api_token_file else {
        // It may be in the file of --env-file, which is not ours to read; then the address belongs there, too.
        return Err(
            CliError::usage("--api-url needs --api-token-file").with_hint(
                "or put VM0_API_URL and VM0_API_TOKEN into a file of mode 0600 and name it with --env-file",
            ),
        );
    };
    let file = std::fs::canonicalize(file).map_err(|error| {
        CliError::failed(format_args!("cannot open {}: {error}", file.display()))
    })?;
    source::of(false, Some(url.clone()), Some(&file))?;
    Ok(Some(file))
}

/// Leaves things as they were before a start that failed, and says why it did.
fn undo(
    unit: &UnitName,
    place: Place,
    before: &State,
    kept: Option<&str>,
    mark: &JournalMark,
    error: CliError,
) -> CliError {
    mark.show_since(unit);
    // The file of what runs has to stay, or systemd forgets how to end it.
    let mut undone = Ok(String::new());
    if !before.is_active() {
        undone = systemctl(&["stop", unit.as_str()]);
    }
    let restored = match place.write(unit, kept) {
        Ok(()) => systemctl(&["daemon-reload"]),
        Err(error) => Err(error),
    };
    for problem in [undone, restored].into_iter().filter_map(Result::err) {
        note(format_args!("warning: {problem}"));
    }
    let why = if before.is_active() {
        "could not be replaced; the instance that ran goes on"
    } else {
        "did not start"
    };
    CliError::failed(format_args!("{unit} {why}: {error}"))
        .with_hint("what it said stands above; `journalctl -u` of the unit has all of it")
}

pub(super) fn stop(
    name: &RunnerName,
    force: bool,
    context: &Context,
) -> Result<ExitCode, CliError> {
    require_root("stop")?;
    let unit = UnitName::of(name);
    end(&unit, name, force, context)?;
    // A unit until the reboot ends with its service.
    Place::UntilReboot.write(&unit, None)?;
    systemctl(&["daemon-reload"])?;
    context.print_line(format_args!("{unit} is stopped"))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn uninstall(
    name: &RunnerName,
    force: bool,
    context: &Context,
) -> Result<ExitCode, CliError> {
    require_root("uninstall")?;
    let unit = remove(name, force, context)?;
    context.print_line(format_args!("{unit} is uninstalled"))?;
    Ok(ExitCode::SUCCESS)
}

/// Ends the service and removes its unit, wherever that is.
pub(super) fn remove(
    name: &RunnerName,
    force: bool,
    context: &Context,
) -> Result<UnitName, CliError> {
    let unit = UnitName::of(name);
    end(&unit, name, force, context)?;
    if Place::Persistent.read(&unit)?.is_some() {
        systemctl(&["disable", "--quiet", unit.as_str()])?;
        Place::Persistent.write(&unit, None)?;
    }
    Place::UntilReboot.write(&unit, None)?;
    systemctl(&["daemon-reload"])?;
    Ok(unit)
}

/// Ends the service, if no job would be lost by it or that is wanted.
fn end(unit: &UnitName, name: &RunnerName, force: bool, context: &Context) -> Result<(), CliError> {
    require_own(unit, context)?;
    let home = context.home()?;
    let _one = one_at_a_time(&home, name)?;
    let state = State::of(unit)?;
    if state.is_up() {
        let drained = if force {
            block_on(end_predecessors(&home, unit, name))?;
            None
        } else {
            refuse_active(&home, unit, name)?
        };
        // Where that fails, also because somebody interrupts it, what runs takes jobs again.
        systemctl(&["stop", unit.as_str()])?;
        if let Some(drained) = drained {
            drained.ended();
        }
    }
    if State::of(unit)?.has_failed() {
        systemctl(&["reset-failed", unit.as_str()])?;
    }
    Ok(())
}

/// A service that was told to take no jobs, so that it can be ended. It takes them again when this is dropped.
struct Drained<'a>(Option<&'a UnitName>);

impl Drained<'_> {
    /// It has ended, and takes nothing any more.
    fn ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Drained<'_> {
    fn drop(&mut self) {
        // One that is stopping already does not heed it.
        if let Some(unit) = self.0
            && let Err(error) = signal(unit, "SIGUSR2")
        {
            note(format_args!(
                "warning: {unit} may still be draining (`runner service resume`): {error}"
            ));
        }
    }
}

/// Tells the service to take no jobs, and waits until it does as `followed` says.
async fn drain_to_end<T>(
    unit: &UnitName,
    followed: impl Future<Output = Result<T, CliError>>,
) -> Result<(Drained<'_>, T), CliError> {
    // From here on a signal is heard: who died of it would leave a service that takes no jobs, for no reason that shows.
    let mut interrupt = unix::signal(SignalKind::interrupt())?;
    let mut terminate = unix::signal(SignalKind::terminate())?;
    let mut hang_up = unix::signal(SignalKind::hangup())?;
    // Before it is told: when that fails, it may have heard.
    let drained = Drained(Some(unit));
    signal(unit, "SIGUSR1")?;
    tokio::select! {
        followed = followed => return Ok((drained, followed?)),
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hang_up.recv() => {}
    }
    Err(CliError::failed(format_args!(
        "interrupted; {unit} runs, and takes jobs again"
    )))
}

/// Fails while jobs run. A job that comes between this look and the end is impossible: the runner drains meanwhile.
fn refuse_active<'a>(
    home: &Home,
    unit: &'a UnitName,
    name: &RunnerName,
) -> Result<Option<Drained<'a>>, CliError> {
    let running = |status: &Status| status.mode == Mode::Running;
    let (drained, all) = block_on(async {
        let ran = instances::statuses(home, name).await?.iter().any(running);
        let drain = instances::wait_drained(home, name);
        if ran {
            let (drained, all) = drain_to_end(unit, drain).await?;
            Ok((Some(drained), all))
        } else {
            // Somebody else's drain goes on whatever becomes of this.
            Ok((None, drain.await?))
        }
    })?;
    let active = instances::runs(&all);
    if active.is_empty() {
        return Ok(drained);
    }
    Err(CliError::failed(format_args!(
        "runner {name} has {} active job(s): {}",
        active.len(),
        ids(&active)
    ))
    .with_hint(format_args!(
        "`runner service drain --name {name} --wait 30m` lets them finish, --force ends them"
    )))
}

fn ids(runs: &[RunId]) -> String {
    let ids: Vec<_> = runs.iter().map(ToString::to_string).collect();
    ids.join(", ")
}

/// systemd knows one main process; predecessors that still finish their jobs are told to stop before it, or they would
/// be killed with their jobs unanswered.
async fn end_predecessors(home: &Home, unit: &UnitName, name: &RunnerName) -> Result<(), CliError> {
    let Ok(statuses) = instances::statuses(home, name).await else {
        // --force is for those that do not answer, too.
        return Ok(());
    };
    let main = State::of(unit)?.get("MainPID").parse::<u32>().ok();
    for status in statuses.iter().filter(|status| Some(status.pid) != main) {
        let pid = i32::try_from(status.pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        let Some(pid) = pid else { continue };
        let Ok(process) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::NONBLOCK)
        else {
            continue;
        };
        // Still the one that answered: it holds the lock of its instance.
        let same = instances::statuses(home, name).await?;
        if !same.iter().any(|now| now.instance == status.instance) {
            continue;
        }
        let _ = rustix::process::pidfd_send_signal(&process, rustix::process::Signal::TERM);
        // SAFETY: the descriptor is owned by the `AsyncFd`, which closes it last.
        let ended = unsafe {
            tokio::io::unix::AsyncFd::register_with_interest(process, tokio::io::Interest::READABLE)
        }?;
        // It obeys its own stop_timeout_secs; what does not end at all is systemd's to kill.
        if let Ok(result) = tokio::time::timeout(PREDECESSOR, ended.readable()).await {
            let _ = result?;
        }
    }
    Ok(())
}

fn signal(unit: &UnitName, signal: &str) -> Result<(), CliError> {
    // The older name of the option, which newer versions know too.
    systemctl(&["kill", "--kill-who=main", "--signal", signal, unit.as_str()]).map(drop)
}

fn require_active(unit: &UnitName) -> Result<(), CliError> {
    if State::of(unit)?.is_active() {
        return Ok(());
    }
    Err(CliError::failed(format_args!("{unit} is not running"))
        .with_hint("`runner service status` shows what is"))
}

pub(super) fn drain(
    name: &RunnerName,
    wait: Option<Duration>,
    context: &Context,
) -> Result<ExitCode, CliError> {
    require_root("drain")?;
    let unit = UnitName::of(name);
    require_own(&unit, context)?;
    require_active(&unit)?;
    let home = context.home()?;
    signal(&unit, "SIGUSR1")?;
    let left = block_on(async {
        let statuses = instances::wait_drained(&home, name).await?;
        match wait {
            Some(limit) => instances::wait_empty(&home, name, limit).await,
            None => Ok(instances::runs(&statuses)),
        }
    })?;
    if wait.is_some() && !left.is_empty() {
        return Err(CliError::failed(format_args!(
            "runner {name} drains, and still has {} active job(s): {}",
            left.len(),
            ids(&left)
        ))
        .with_hint(format_args!(
            "wait again, end one with `runner kill`, or `runner service resume --name {name}`"
        )));
    }
    context.print_line(format_args!("{unit} drains, {} active job(s)", left.len()))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn resume(name: &RunnerName, context: &Context) -> Result<ExitCode, CliError> {
    require_root("resume")?;
    let unit = UnitName::of(name);
    require_own(&unit, context)?;
    require_active(&unit)?;
    signal(&unit, "SIGUSR2")?;
    context.print_line(format_args!("{unit} takes jobs again"))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_service_takes_jobs_again_unless_it_has_ended() {
        // In a process of its own, which gets the signals and another `systemctl`.
        const PLACE: &str = "VM0_TEST_SYSTEMCTL";
        let temp = tempfile::tempdir().unwrap();
        let name = "a_service_takes_jobs_again_unless_it_has_ended";
        let another = |test: &mut std::process::Command| {
            let program = temp.path().join("systemctl");
            let script = format!("#!/bin/sh\necho \"$4\" >> {}/told\n", temp.path().display());
            std::fs::write(&program, script).unwrap();
            std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
            let path = std::env::var("PATH").unwrap();
            test.env("PATH", format!("{}:{path}", temp.path().display()))
                .env(PLACE, temp.path());
        };
        if crate::test_alone::elsewhere(module_path!(), name, another) {
            return;
        }
        let place = std::env::var_os(PLACE).unwrap();
        let told = || {
            let told = std::fs::read_to_string(PathBuf::from(&place).join("told")).unwrap();
            told.replace('\n', " ").trim_end().to_owned()
        };
        let unit = UnitName::of(&"demo".parse().unwrap());
        let drain = || block_on(drain_to_end(&unit, async { Ok(()) })).unwrap();
        drain().0.ended();
        assert_eq!(told(), "SIGUSR1");
        // As where `systemctl stop` fails.
        drop(drain());
        assert_eq!(told(), "SIGUSR1 SIGUSR1 SIGUSR2");
        let interrupted = async {
            let me = rustix::process::getpid();
            rustix::process::kill_process(me, rustix::process::Signal::INT).unwrap();
            std::future::pending::<Result<(), CliError>>().await
        };
        assert!(block_on(drain_to_end(&unit, interrupted)).is_err());
        assert_eq!(told(), "SIGUSR1 SIGUSR1 SIGUSR2 SIGUSR1 SIGUSR2");
    }
}
