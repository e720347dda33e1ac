//! What has had its time goes: finished runs with all that was kept of them, keys, sessions, what broke off.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api_types::UnixMillis;

use crate::engine::EngineError;
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
            // One moment for all of it: keys are looked for where the runs of that moment are gone.
            let now = self.clock.now();
            let before = now.saturating_sub(kept);
            self.remove_old_runs(before).await;
            if swept.is_none_or(|at| at.elapsed() >= SWEEP) {
                match self.sweep(before, &strays).await {
                    Ok(left) => (swept, strays) = (Some(Instant::now()), left),
                    Err(error) => {
                        tracing::warn!(%error, "old sessions and uploads cannot be removed");
                    }
                }
            }
            // One pass over all runs: cheap once a day.
            if looked_for_keys.is_none_or(|at| now.abs_diff(at) >= KEY_REMOVAL_MILLIS) {
                match self.remove_old_keys(now).await {
                    Ok(()) => looked_for_keys = Some(now),
                    Err(error) => tracing::warn!(%error, "old keys cannot be removed"),
                }
            }
        }
    }

    /// Removes runs that ended before this. One that cannot be removed now is known still, for the next time.
    async fn remove_old_runs(&self, before: UnixMillis) {
        let mut kept: u32 = 0;
        while let Ok(runs) = self.read_model.ended_before(before, kept, 100) {
            if runs.is_empty() {
                return;
            }
            for run in runs {
                let outcome = match self.engine.remove_run(run).await {
                    Ok(true) => {
                        let forgotten = self.read_model.forget_finished(run);
                        forgotten.map_err(|error| error.to_string())
                    }
                    Ok(false) => Err("it is not finished".to_owned()),
                    // The others would fare no better, and each is waited for.
                    Err(error @ EngineError::Unavailable(_)) => {
                        tracing::warn!(%run, %error, "an old run cannot be removed now");
                        return;
                    }
                    Err(error) => Err(error.to_string()),
                };
                if let Err(error) = outcome {
                    tracing::warn!(%run, %error, "an old run cannot be removed");
                    kept = kept.saturating_add(1);
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
