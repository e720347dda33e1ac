//! Builds a profile's image and snapshot.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use host::launcher::{ForkedLauncher, LauncherConfig};
use serde::Serialize;

use crate::config::EngineChoice;
use crate::context::{CliError, Context, block_on};
use crate::engine::{self, BOOT_LIMIT_SECS, Candidates};
use crate::image::proof::{self, Standing};
use crate::image::{self, GuestPaths, ImageError, Plan, Request, SnapshotPlan, Steps, Store};
use crate::names::ImageHash;
use crate::profile::ProfileSpec;

/// Command line.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  sudo runner build --profile vm0/small\n  \
    runner build --profile vm0/default --dry-run\n  sudo runner build --profile vm0/small --engine firecracker\n\n\
    Prints `rootfs_hash=` and `snapshot_hash=` on stdout, for `runner config`; what is already built is only verified.")]
pub(crate) struct Args {
    /// Profile: vm0/default, vm0/small, or one of your own with its size
    #[arg(long, value_name = "ORG/NAME[:KEY=VALUE,…]")]
    profile: ProfileSpec,
    /// Engine to build for; auto takes the fastest that boots the image here
    #[arg(long, value_enum, default_value = "auto")]
    engine: EngineChoice,
    /// Longest time that the boot which proves an engine may take, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = BOOT_LIMIT_SECS, value_parser = clap::value_parser!(u64).range(1..=3600))]
    boot_limit: u64,
    /// Print the hashes and build nothing
    #[arg(long)]
    dry_run: bool,
    /// Package archive to use instead of the host's (a URL, or a whole `deb …` line); may be repeated
    #[arg(long, value_name = "URL")]
    mirror: Vec<String>,
    /// Release to use instead of the host's, such as bookworm
    #[arg(long, value_name = "NAME")]
    suite: Option<String>,
    /// guest-init to use instead of the embedded one
    #[arg(long, value_name = "PATH")]
    guest_init: Option<PathBuf>,
    /// guest-agent to use instead of the embedded one
    #[arg(long, value_name = "PATH")]
    guest_agent: Option<PathBuf>,
    /// guest-mock-claude to use instead of the embedded one
    #[arg(long, value_name = "PATH")]
    guest_mock_claude: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What stdout gets with `--json`.
#[derive(Serialize)]
struct Report<'a> {
    rootfs_hash: &'a ImageHash,
    snapshot_hash: &'a ImageHash,
    /// Whether anything had to be built.
    built: bool,
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let home = Arc::new(context.home()?);
    let boot_limit = Duration::from_secs(args.boot_limit);
    let candidates = Candidates::probe(args.engine, boot_limit, &home);
    let engines = candidates.wanted().map_err(|error| {
        CliError::from(error).with_hint(match args.engine {
            EngineChoice::Firecracker => {
                "`sudo runner setup --engine firecracker` fetches it; `runner doctor` shows what each engine lacks"
            }
            _ => "install what is missing with `sudo runner setup`",
        })
    })?;
    let request = Request {
        profile: args.profile.profile,
        mirrors: args.mirror,
        suite: args.suite,
        guest: GuestPaths {
            init: args.guest_init,
            agent: args.guest_agent,
            mock_claude: args.guest_mock_claude,
        },
        engines,
    };
    let store = Store::open(home)?;
    let steps = Steps::new();
    // No thread may exist when the launcher is forked, so there are two runtimes, one before and one after.
    let image = block_on(prepare(&store, request, &candidates, args.dry_run, &steps))?;
    let (plan, built) = match image {
        Prepared::Known(snapshot) => (snapshot, false),
        Prepared::Unbuilt(plan) => {
            let instance = format!("build-{}", std::process::id());
            let forked = ForkedLauncher::fork(LauncherConfig::from_env(instance)?)?;
            (
                block_on(take_snapshot(&store, &plan, &candidates, forked, &steps))?,
                true,
            )
        }
    };
    drop(steps);
    let report = Report {
        rootfs_hash: plan.rootfs_hash(),
        snapshot_hash: plan.snapshot_hash(),
        built,
    };
    if args.json {
        context.print_json(&report)?;
    } else {
        context.print(format_args!(
            "rootfs_hash={}\nsnapshot_hash={}\n",
            report.rootfs_hash, report.snapshot_hash
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// How far the first part of a build got.
enum Prepared {
    /// Nothing is left to do.
    Known(SnapshotPlan),
    /// The image is there, the snapshot is not.
    Unbuilt(Box<Plan>),
}

/// Everything that needs no VM.
async fn prepare(
    store: &Store,
    request: Request,
    candidates: &Candidates,
    dry_run: bool,
    steps: &Steps,
) -> Result<Prepared, CliError> {
    steps.catch_signals()?;
    let mut plan = Plan::make(store, request.clone(), false, steps).await?;
    if !dry_run && !plan.is_fresh() && !store.has_image(plan.rootfs_hash()) {
        plan = Plan::make(store, request, true, steps).await?;
    }
    // What cannot be known before a boot is assumed to go well.
    let kind = match proof::standing(store, plan.rootfs_hash(), candidates)? {
        Standing::Proved(kind) | Standing::Open(kind) => kind,
        Standing::Failed(kind, reason) => {
            let engine = engine::describe(kind);
            return Err(ImageError::NotProved { engine, reason }.into());
        }
    };
    let snapshot = SnapshotPlan::make(&plan, candidates.snapshot_key(kind)?)?;
    if dry_run {
        return Ok(Prepared::Known(snapshot));
    }
    image::build::image(store, &plan, steps).await?;
    match image::snapshot::existing(store, &snapshot, steps)? {
        Some(_) => Ok(Prepared::Known(snapshot)),
        None if rustix::process::geteuid().is_root() => Ok(Prepared::Unbuilt(Box::new(plan))),
        None => Err(ImageError::NotRoot.into()),
    }
}

/// Everything that needs one.
async fn take_snapshot(
    store: &Store,
    plan: &Plan,
    candidates: &Candidates,
    forked: ForkedLauncher,
    steps: &Steps,
) -> Result<SnapshotPlan, CliError> {
    steps.catch_signals()?;
    let launcher = forked.attach()?;
    let result = async {
        let rootfs = plan.rootfs_hash();
        let kind = proof::choose(store, rootfs, candidates, &launcher, steps).await?;
        if let Some(why) = candidates.slow_because(kind) {
            steps.note(&format!("note: {why}"));
        }
        let snapshot = SnapshotPlan::make(plan, candidates.snapshot_key(kind)?)?;
        let engine = candidates.open(kind, launcher.clone())?;
        let limit = candidates.boot_limit();
        image::snapshot::make(store, &snapshot, engine.as_ref(), &launcher, limit, steps).await?;
        Ok(snapshot)
    }
    .await;
    launcher.shutdown().await;
    result
}
