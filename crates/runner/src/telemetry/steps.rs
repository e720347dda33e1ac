//! The steps of a job, as they are noted while it runs.

use std::sync::Mutex;
use std::time::Instant;

use crate::sync::lock;

/// One step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    /// What its span is named.
    pub(crate) name: &'static str,
    /// When it began.
    pub(crate) began: Instant,
    /// When it ended.
    pub(crate) ended: Instant,
    /// Whether it got through to its end.
    pub(crate) ok: bool,
}

/// All of a job so far.
#[derive(Debug, Default)]
pub(crate) struct Steps(Mutex<Vec<Step>>);

/// A step that goes on. Dropped before it was said to be done, it has failed or was cancelled.
#[derive(Debug)]
pub(crate) struct Running<'a> {
    steps: &'a Steps,
    name: &'static str,
    began: Instant,
    ok: bool,
}

/// The runtime's clock, which a test may hold.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

impl Steps {
    /// A step begins; it ends when what this gives is dropped.
    pub(crate) fn begin(&self, name: &'static str) -> Running<'_> {
        Running {
            steps: self,
            name,
            began: now(),
            ok: false,
        }
    }

    /// A step that is over.
    pub(crate) fn add(&self, step: Step) {
        lock(&self.0).push(step);
    }

    /// All that are over.
    pub(crate) fn all(&self) -> Vec<Step> {
        lock(&self.0).clone()
    }
}

impl Running<'_> {
    /// It ends here; `ok` if it got through.
    pub(crate) fn end(mut self, ok: bool) {
        self.ok = ok;
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.steps.add(Step {
            name: self.name,
            began: self.began,
            ended: now(),
            ok: self.ok,
        });
    }
}
