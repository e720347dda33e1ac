//! What a running daemon removes by itself, every now and then.

use std::sync::Arc;
use std::time::Duration;

use host::launcher::Launcher;

use super::{Report, collect};
use crate::config::GcConfig;
use crate::home::Home;
use crate::image::InUse;

/// The first look is not later than this after the start: jobs come first.
const FIRST: Duration = Duration::from_secs(60);

/// Looks until the future is dropped. `images` are those of the daemon, which stay meanwhile; `told` hears of every look.
pub(crate) async fn look_after(
    home: Arc<Home>,
    config: GcConfig,
    launcher: Launcher,
    images: Vec<InUse>,
    told: impl Fn(&Report) + Send,
) {
    let Some(interval) = config.interval() else {
        return std::future::pending().await;
    };
    let mut pause = interval.min(FIRST);
    loop {
        tokio::time::sleep(pause).await;
        pause = interval;
        for image in &images {
            image.touch();
        }
        let slots = launcher.reclaim_orphans().await;
        let home = Arc::clone(&home);
        let look = tokio::task::spawn_blocking(move || {
            let mut collector = collect(&home, config.rules());
            // Which ones, the launcher does not say.
            let slots = slots.unwrap_or(0);
            collector.reclaimed((0..slots).map(|_| "of a dead runner".to_owned()));
            collector.finish()
        });
        let Ok(report) = look.await else {
            // The runtime is on its way down.
            return;
        };
        for removed in &report.removed {
            tracing::info!(
                kind = removed.kind.name(), path = %removed.path.display(), bytes = removed.bytes,
                age_secs = removed.age_secs, "cleaned up"
            );
        }
        for failed in &report.failed {
            tracing::warn!(
                kind = failed.kind.name(),
                error = failed.error,
                "cannot be cleaned up"
            );
        }
        told(&report);
    }
}
