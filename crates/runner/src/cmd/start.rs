//! Runs the daemon.

mod collector;
mod handover;
mod profiles;
pub(super) mod source;
mod starting;
mod sweep;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use host::fs::{Access, Lock, LockKind, lock_holder};
use host::launcher::{ForkedLauncher, LauncherConfig};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::MakeWriterExt;

use self::handover::Side;
use self::profiles::hold_images;
use self::starting::Starting;
use crate::config::{self, Config, EngineChoice};
use crate::context::{CliError, Context};
use crate::home::{Home, rel};
use crate::names::{RunId, RunnerName};
use crate::proxy::{Authority, ProxyConfig, install};

/// A log larger than this is put aside (one is kept) when the daemon starts, bytes.
const LOG_ROTATE: u64 = 64 << 20;

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Needs root, to make slots for VMs; everything in the home is then done as the home's owner.\n\
SIGTERM stops (jobs may finish within stop_timeout_secs, a second one cancels them), SIGUSR1 drains, SIGUSR2 resumes.\n\n\
Example:\n  sudo runner start --config ~/.vm0-runner/runners/demo/runner.yaml --local"
)]
pub(crate) struct Args {
    /// The runner's configuration, as `runner config` wrote it
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
    /// Take jobs from the local file queue
    #[arg(long, conflicts_with = "api_token_file")]
    local: bool,
    /// Take runs from the Web API at this address
    #[arg(long, value_name = "URL", env = "VM0_API_URL")]
    api_url: Option<String>,
    /// File with the runner token for the Web API, readable for its owner only; without it the token is taken from
    /// the variable VM0_API_TOKEN
    #[arg(long, value_name = "FILE")]
    api_token_file: Option<PathBuf>,
    /// Refuse profiles that were built for another engine, whatever the configuration says
    #[arg(long, value_enum)]
    engine: Option<EngineChoice>,
    /// Set a variable of the runner's own environment; USE_MOCK_CLAUDE=true makes jobs run the mock agent
    #[arg(long, value_name = "NAME=VALUE", value_parser = crate::cmd::parse::variable)]
    env: Vec<(String, String)>,
    /// How the daemon's own log is written
    #[arg(long, value_enum, default_value_t)]
    log_format: LogFormat,
    /// Take over from the instance of this name that runs; returns when that is done. For `systemctl reload`
    #[arg(long, hide = true)]
    takeover: bool,
}

/// How a log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum LogFormat {
    /// A line of text.
    #[default]
    Text,
    /// A JSON object on each line.
    Json,
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    if !rustix::process::geteuid().is_root() {
        let config = args.config.display();
        let hint = format!("sudo runner start --config {config} --local");
        return Err(
            CliError::failed("`runner start` needs root, to make slots for VMs").with_hint(hint),
        );
    }
    for (name, value) in &args.env {
        // SAFETY: the process has one thread, so nobody reads the environment meanwhile.
        unsafe { std::env::set_var(name, value) };
    }
    let source = source::of(args.local, args.api_url, args.api_token_file.as_deref())?;
    // SAFETY: as above. What we start has no business with the runner's token.
    unsafe { std::env::remove_var(source::TOKEN) };
    let mut config = config::load(&args.config)?;
    if let Some(engine) = args.engine {
        config.engine = engine;
    }
    // SAFETY: as above.
    let traces = unsafe { collector::settle(&config.telemetry) }?;
    let home = Arc::new(context.home()?);
    let proxy = proxy_parts(&home, &config)?;
    let readiness = if args.takeover {
        match handover::split()? {
            Side::Command(code) => return Ok(code),
            Side::Instance(readiness) => Some(readiness),
        }
    } else {
        None
    };
    let instance = RunId::random().to_string();
    let launcher = LauncherConfig::from_env(instance.clone())?;
    let run_dir = launcher.run_dir.clone();
    // Before any thread, and before anything is open that the launcher should not hold.
    let forked = ForkedLauncher::fork(launcher)?;
    host::process::come_before_vms();
    host::process::may_open_many();
    // Still as root, who may have made the locks.
    let images = hold_images(&home, &config)?;
    home.become_owner()?;
    let name = match &readiness {
        None => Some(only_one(&home, &config.name)?),
        // It is somebody else's, most likely, until everything else is ready.
        Some(_) => name_if_free(&home, &config.name)?,
    };
    log_to_file(&home, &config.name, args.log_format)?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let code = runtime.block_on(async {
        let launcher = forked.attach()?;
        let starting = Starting {
            source,
            config,
            home,
            instance,
            launcher: launcher.clone(),
            run_dir,
            proxy,
            images,
            name,
            readiness,
            traces,
        };
        let result = starting.run().await;
        // Whatever is left of our VMs goes now.
        launcher.shutdown().await;
        result
    })?;
    // A task that hangs in the kernel must not keep a daemon that is done.
    runtime.shutdown_timeout(Duration::from_secs(2));
    Ok(ExitCode::from(code))
}

/// Two daemons of one name would answer for each other.
fn only_one(home: &Home, name: &RunnerName) -> Result<Lock, CliError> {
    if let Some(lock) = name_if_free(home, name)? {
        return Ok(lock);
    }
    let dir = home.ensure_dir(rel::runner(name))?;
    let file = dir.open_file(LOCK, Access::Read)?;
    let who = lock_holder(&file).map_or_else(String::new, |pid| format!(" (pid {pid})"));
    Err(
        CliError::failed(format!("a runner named {name} runs already{who}"))
            .with_hint("stop it first, or give this one another name"),
    )
}

fn name_if_free(home: &Home, name: &RunnerName) -> Result<Option<Lock>, CliError> {
    let dir = home.ensure_dir(rel::runner(name))?;
    Ok(dir.try_lock(LOCK, LockKind::Exclusive, 0o600)?)
}

/// Held by the one daemon of a runner that takes jobs.
const LOCK: &str = "runner.lock";

fn log_to_file(home: &Home, name: &RunnerName, format: LogFormat) -> Result<(), CliError> {
    home.logs()?;
    let path = rel::runner_log(name);
    if let Some(meta) = home.dir().metadata(&path)?
        && meta.len() > LOG_ROTATE
    {
        let old = path.with_extension("log.1");
        home.dir().rename(&path, home.dir(), old)?;
    }
    let file: File = home
        .dir()
        .open_file(&path, Access::Append { mode: 0o600 })?;
    let filter =
        EnvFilter::try_from_env("VM0_RUNNER_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(io::stderr.and(Arc::new(file)));
    let _ = match format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    Ok(())
}

/// What only root may open: the proxy's key, and with it the rest of what it is started from.
fn proxy_parts(home: &Home, config: &Config) -> Result<ProxyConfig, CliError> {
    let missing = || {
        CliError::failed(
            "the proxy, which carries all traffic of jobs, is not installed here for this runner",
        )
        .with_hint("sudo runner setup")
    };
    let files = install::installed(home)?.ok_or_else(missing)?;
    Authority::load(home)?.ok_or_else(missing)?;
    let trusted = &config.network.ssl_verify_upstream_trusted_ca;
    if !trusted.as_os_str().is_empty() && !trusted.is_file() {
        return Err(CliError::failed(format_args!(
            "{}, which the proxy is to trust upstream, cannot be found",
            trusted.display()
        ))
        .with_hint("install ca-certificates, or set network.ssl_verify_upstream_trusted_ca"));
    }
    Ok(ProxyConfig {
        workers: config.network.workers(),
        files: files.as_fd().try_clone_to_owned()?,
        authority: Authority::for_proxy(home)?,
        trusted: (!trusted.as_os_str().is_empty()).then(|| trusted.clone()),
        resolver: host::net::RESOLVER_FOR_PROXY,
    })
}
