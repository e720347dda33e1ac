//! How long jobs are in which phase.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use super::Metrics;
use crate::names::{ProfileName, RunId};
use crate::queue::{ClaimedJob, JobResult};
use crate::status::{Clock, Phase, RecentRun};

/// Runs that ended last are remembered for people; this many.
const RECENT: usize = 20;
/// Longest error that is remembered with one, bytes.
const ERROR: usize = 200;

/// Follows each run from its claim to its answer.
#[derive(Debug)]
pub(crate) struct Meter {
    metrics: Arc<Metrics>,
    runs: HashMap<RunId, Run>,
    /// The newest first.
    recent: VecDeque<Ended>,
}

#[derive(Debug)]
struct Ended {
    result: JobResult,
    profile: ProfileName,
    began: Instant,
    at: Instant,
}

#[derive(Debug)]
struct Run {
    profile: ProfileName,
    phase: &'static str,
    since: Instant,
    began: Instant,
}

impl Meter {
    /// Feeds these figures.
    pub(crate) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            runs: HashMap::new(),
            recent: VecDeque::new(),
        }
    }

    /// A job is ours.
    pub(crate) fn claimed(&mut self, job: &ClaimedJob, now: Instant) {
        let profile = job.job.profile.clone();
        // A clock that was set back, or a file from the future, has waited for no time.
        let waited = job.submitted.elapsed().unwrap_or_default();
        self.metrics
            .phase("waiting", profile.as_str(), waited.as_secs_f64());
        let run = Run {
            profile,
            phase: "preparing",
            since: now,
            began: now,
        };
        self.runs.insert(job.job.run_id, run);
    }

    /// It got further.
    pub(crate) fn progress(&mut self, run: RunId, phase: Phase, now: Instant) {
        let name = match phase {
            Phase::Preparing => "preparing",
            Phase::Running => "running",
            Phase::Finishing => "finishing",
        };
        self.enter(run, name, now);
    }

    fn enter(&mut self, run: RunId, name: &'static str, now: Instant) {
        if let Some(run) = self.runs.get_mut(&run)
            && run.phase != name
        {
            let took = now.saturating_duration_since(run.since).as_secs_f64();
            self.metrics.phase(run.phase, run.profile.as_str(), took);
            run.phase = name;
            run.since = now;
        }
    }

    /// It has its result, whose way to the submitter is the last phase.
    pub(crate) fn ended(&mut self, result: &JobResult, now: Instant) {
        self.metrics.answered(result);
        self.enter(result.run_id, "finishing", now);
        let Some(run) = self.runs.get(&result.run_id) else {
            return;
        };
        self.recent.push_front(Ended {
            result: result.clone(),
            profile: run.profile.clone(),
            began: run.began,
            at: now,
        });
        self.recent.truncate(RECENT);
    }

    /// Runs that ended last, the newest first.
    pub(crate) fn recent(&self, clock: &Clock) -> Vec<RecentRun> {
        let shown = |ended: &Ended| RecentRun {
            run_id: ended.result.run_id,
            profile: ended.profile.clone(),
            exit_code: ended.result.exit_code,
            error: ended.result.error.as_deref().map(shortened),
            ended_at: clock.time(ended.at),
            took_secs: ended.at.saturating_duration_since(ended.began).as_secs(),
        };
        self.recent.iter().map(shown).collect()
    }

    /// Its submitter has the answer.
    pub(crate) fn completed(&mut self, run: RunId, now: Instant) {
        self.enter(run, "done", now);
        self.runs.remove(&run);
    }
}

fn shortened(text: &str) -> String {
    let end = (0..=ERROR.min(text.len())).rev();
    let mut ends = end.filter(|end| text.is_char_boundary(*end));
    let kept = ends.next().and_then(|end| text.get(..end));
    kept.unwrap_or_default().to_owned()
}
