//! `runner gc`: removes what nobody needs any more.

use std::fmt;
use std::path::Path;
use std::process::ExitCode;

use host::launcher::{ForkedLauncher, LauncherConfig};

use crate::config::{LOGS_DAYS, days};
use crate::context::{CliError, Context, block_on, note};
use crate::gc::{self, Kind, Report, Rules};

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Removed are images and snapshots that no runner uses and no runner.yaml names, old logs, and what dead builds, \
daemons and deploys left. What is in use is locked and stays, and so does everything younger than ten minutes. \
With root it also reclaims the slots of dead runners and removes deployed runners that nobody starts.\n\n\
A removal that fails is told on stderr, and the rest goes on.\n\n\
Examples:\n  sudo runner gc --dry-run\n  sudo runner gc --keep-latest 3\n  sudo runner gc --json | jq .bytes"
)]
pub(crate) struct Args {
    /// Keep the N snapshots that were used last, of all images together
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_latest: usize,
    /// Keep logs that were written to within so many days
    #[arg(long, value_name = "DAYS", default_value_t = LOGS_DAYS, value_parser = clap::value_parser!(u64).range(0..=3650))]
    logs_days: u64,
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let home = context.home()?;
    let rules = Rules {
        keep_latest: args.keep_latest,
        young: Rules::YOUNG,
        images_unused: std::time::Duration::ZERO,
        images_max: None,
        logs_age: days(args.logs_days),
        logs_max: None,
        // How long they are kept, the runner that writes them knows.
        audit_age: None,
        dry_run: args.dry_run,
    };
    let mut collector = gc::collect(&home, rules);
    if rustix::process::geteuid().is_root() {
        let slots = slots(args.dry_run)?;
        for error in &slots.failed {
            collector.failed(Kind::Slot, error);
        }
        collector.reclaimed(slots.gone);
    }
    let report = collector.finish();
    for failed in &report.failed {
        note(format_args!(
            "warning: {}: {}",
            failed.kind.name(),
            failed.error
        ));
    }
    if args.json {
        let mut value = serde_json::to_value(&report)?;
        if let Some(object) = value.as_object_mut() {
            object.insert("bytes".to_owned(), report.bytes().into());
        }
        context.print_json(&value)?;
    } else {
        context.print(Table(&report))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Slots of dead launchers.
#[derive(Default)]
pub(super) struct Slots {
    /// Those that are reclaimed, or would be.
    pub(super) gone: Vec<String>,
    /// What went wrong with others.
    pub(super) failed: Vec<String>,
}

/// Reclaims them, with whatever follows them. The launcher that does it is ours, and ends with us.
pub(super) fn slots(dry_run: bool) -> Result<Slots, CliError> {
    let config = LauncherConfig::from_env(format!("gc-{}", std::process::id()))?;
    let mut slots = Slots::default();
    let orphans = match host::slot::orphaned_slots(&config.run_dir) {
        Ok(orphans) => orphans,
        Err(error) => {
            slots.failed.push(error.to_string());
            return Ok(slots);
        }
    };
    let mut left = std::collections::BTreeMap::new();
    if !dry_run && !orphans.is_empty() {
        let run_dir = config.run_dir.clone();
        let forked = ForkedLauncher::fork(config)?;
        let reclaimed = block_on(async {
            let launcher = forked.attach()?;
            let reclaimed = launcher.reclaim_orphans().await;
            launcher.shutdown().await;
            Ok(reclaimed)
        })?;
        if let Err(error) = reclaimed {
            slots.failed.push(error.to_string());
        }
        left = host::slot::orphaned_slots(&run_dir).unwrap_or_default();
        let stay = left
            .keys()
            .map(|slot| format!("slot {} cannot be cleaned; see `runner doctor`", slot.0));
        slots.failed.extend(stay);
    }
    let gone = orphans.keys().filter(|slot| !left.contains_key(slot));
    slots.gone.extend(gone.map(|slot| slot.0.to_string()));
    Ok(slots)
}

/// The report for a person.
struct Table<'a>(&'a Report);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = self.0;
        let verb = match report.dry_run {
            true => "would remove",
            false => "removed",
        };
        for kept in &report.kept {
            let kind = kept.kind.name();
            writeln!(f, "kept  {kind:9} {}: {}", shown(&kept.path), kept.why)?;
        }
        if report.removed.is_empty() {
            return writeln!(f, "nothing to clean up");
        }
        for one in &report.removed {
            let kind = one.kind.name();
            let (size, path) = (Size(one.bytes), shown(&one.path));
            writeln!(f, "{verb}  {kind:9} {size:>9}  {path}")?;
        }
        writeln!(
            f,
            "{verb} {} in all, {}",
            report.removed.len(),
            Size(report.bytes())
        )
    }
}

fn shown(path: &Path) -> String {
    crate::terminal::escape(&path.display().to_string())
}

/// Bytes, for people.
pub(crate) struct Size(pub(crate) u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
        let mut whole = self.0;
        let mut unit = "B";
        let mut tenths = 0;
        for next in UNITS {
            if whole < 1024 {
                break;
            }
            tenths = (whole % 1024) * 10 / 1024;
            whole /= 1024;
            unit = next;
        }
        let text = match unit {
            "B" => format!("{whole} B"),
            _ => format!("{whole}.{tenths} {unit}"),
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_for_people() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (200 << 20, "200.0 MiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
        assert_eq!(format!("{:>9}", Size(5)), "      5 B");
    }

    #[test]
    fn nothing_to_do_is_said() {
        let report = Report::default();
        assert_eq!(Table(&report).to_string(), "nothing to clean up\n");
    }
}
