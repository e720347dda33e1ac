//! `--fix`: what can be cleaned up without asking, because it belongs to nobody.

use std::collections::BTreeSet;
use std::time::Duration;

use host::launcher::{ForkedLauncher, LauncherConfig};

use super::anomalies::{Anomaly, Remedy};
use super::network::output;
use crate::context::{CliError, block_on};
use crate::vms;

/// A killed process is gone after this, or stuck in the kernel.
const GONE: Duration = Duration::from_secs(5);

/// Does what can be done; gives a sentence for each thing.
pub(super) fn mend(found: &[Anomaly]) -> Result<Vec<String>, CliError> {
    if !rustix::process::geteuid().is_root() {
        return Err(CliError::failed("`--fix` needs root").with_hint("sudo runner doctor --fix"));
    }
    let config = LauncherConfig::from_env(format!("doctor-{}", std::process::id()))?;
    let uid_base = config.uid_base;
    let mut done = Vec::new();
    if found.iter().any(|one| one.remedy == Remedy::Reclaim) {
        let run_dir = config.run_dir.clone();
        // This process has no other thread yet.
        let forked = ForkedLauncher::fork(config)?;
        let count = block_on(async {
            let launcher = forked.attach()?;
            let count = launcher.reclaim_orphans().await?;
            launcher.shutdown().await;
            Ok(count)
        })?;
        let place = run_dir.display();
        done.push(format!(
            "reclaimed {count} slots of dead runners in {place}"
        ));
    }
    let mut nobodys = BTreeSet::new();
    for one in found {
        match &one.remedy {
            Remedy::Kill(slot) => {
                nobodys.insert(*slot);
            }
            Remedy::Table(table) => {
                let deleted = output(&["nft", "delete", "table", "ip", table], "");
                done.push(match deleted {
                    Ok(_) => format!("deleted the table ip {table}"),
                    Err(why) => format!("could not delete the table ip {table}: {why}"),
                });
            }
            Remedy::None | Remedy::Reclaim => {}
        }
    }
    for process in vms::processes(uid_base) {
        if !nobodys.contains(&process.slot) {
            continue;
        }
        let Some(held) = process.hold(uid_base) else {
            continue;
        };
        let pid = process.pid;
        done.push(match held.kill(GONE) {
            Ok(true) => format!("killed process {pid}, which belonged to nobody"),
            Ok(false) => format!("process {pid} does not die: it hangs in the kernel"),
            Err(error) => format!("process {pid} cannot be killed: {error}"),
        });
    }
    Ok(done)
}
