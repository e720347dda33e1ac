//! What has had its time goes: finished runs with all that was kept of them, keys, sessions, what broke off.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api_types::UnixMillis;

use crate::engine::EngineError;
use crate::run::State;
use crate::service::Service;
use crate::tokens::KeyringError;

/// How often it is looked for keys that nothing needs.
const KEY_REMOVAL_MILLIS: u64 = 24 * 3600 * 1000;

/// How often it is looked for sessions and uploads; longer than an upload can take.
const SWEEP: Duration = Duration::from_secs(3600);

impl Service {
    /// Removes whatever has had its time.
    pub(crate) async fn keep_house(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(self.config.housekeeping);
        let mut looked_for_keys: Option<UnixMillis> = None;
        let (mut swept, mut strays) = (None::<Instant>, BTreeSet::new());
        loop {
            ticks.tick().await;
            if !self.is_ready() {
                continue;
            }
            let kept = u64::try_from(self.config.run_retention.as_millis()).unwrap_or(u64::MAX);
            let before = self.clock.now().saturating_sub(kept);
            while let Ok(runs) = self.read_model.ended_before(before, 100) {
                if runs.is_empty() {
                    break;
                }
                for run in runs {
                    if let Ok(Some((entry, _))) = self.engine.run(run).await
                        && matches!(entry.state, State::Done { .. })
                        && let Err(error) = self.engine.remove_run(&entry).await
                    {
                        tracing::warn!(%run, %error, "an old run cannot be removed");
                    }
                    let _ = self.read_model.forget(run);
                }
            }
            if swept.is_none_or(|at| at.elapsed() >= SWEEP) {
                match self.sweep(before, &strays).await {
                    Ok(left) => (swept, strays) = (Some(Instant::now()), left),
                    Err(error) => {
                        tracing::warn!(%error, "old sessions and uploads cannot be removed");
                    }
                }
            }
            // One pass over all runs: cheap once a day.
            let now = self.clock.now();
            if looked_for_keys.is_none_or(|at| now.abs_diff(at) >= KEY_REMOVAL_MILLIS) {
                match self.remove_old_keys(now).await {
                    Ok(()) => looked_for_keys = Some(now),
                    Err(error) => tracing::warn!(%error, "old keys cannot be removed"),
                }
            }
        }
    }

    /// Removes sessions that went on before this the last time, and what broke off before an earlier sweep.
    async fn sweep(
        &self,
        before: UnixMillis,
        strays: &BTreeSet<String>,
    ) -> Result<BTreeSet<String>, EngineError> {
        self.engine.remove_sessions(before).await?;
        self.engine.remove_strays(strays).await
    }

    /// Removes the keys that went out of use before the oldest run was made: no secret and no token needs them.
    async fn remove_old_keys(&self, now: UnixMillis) -> Result<(), KeyringError> {
        // As NATS knows them: the list here may lack some.
        let oldest = self.engine.oldest_run().await?.unwrap_or(now);
        let removed = self.keyring.remove_unused(oldest.min(now)).await?;
        if removed > 0 {
            tracing::info!(removed, "keys that nothing needs any more are removed");
        }
        Ok(())
    }
}
