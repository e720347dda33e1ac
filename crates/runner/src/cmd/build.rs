//! Builds a profile's image and snapshot.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use crate::context::{CliError, Context, block_on};
use crate::image::{self, GuestPaths, Plan, Request, Steps, Store};
use crate::profile::ProfileSpec;

/// Command line.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  sudo runner build --profile vm0/small\n  \
    runner build --profile vm0/default --dry-run\n\n\
    Prints `rootfs_hash=` and `snapshot_hash=` on stdout, for `runner config`; what is already built is only verified.")]
pub(crate) struct Args {
    /// Profile: vm0/default, vm0/small, or one of your own with its size
    #[arg(long, value_name = "ORG/NAME[:KEY=VALUE,…]")]
    profile: ProfileSpec,
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

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let request = Request {
        profile: args.profile.profile,
        mirrors: args.mirror,
        suite: args.suite,
        guest: GuestPaths {
            init: args.guest_init,
            agent: args.guest_agent,
            mock_claude: args.guest_mock_claude,
        },
    };
    let store = Store::open(Arc::new(context.home()?))?;
    block_on(async {
        let steps = Steps::new();
        steps.catch_signals()?;
        let mut plan = Plan::make(&store, request.clone(), false, &steps).await?;
        if !args.dry_run && !plan.is_fresh() && !store.has_image(plan.rootfs_hash()) {
            plan = Plan::make(&store, request, true, &steps).await?;
        }
        if !args.dry_run {
            image::build::image(&store, &plan, &steps).await?;
        }
        context.print_line(format_args!("rootfs_hash={}", plan.rootfs_hash()))?;
        Ok(ExitCode::SUCCESS)
    })
}
