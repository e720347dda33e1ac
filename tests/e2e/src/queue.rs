//! Job files written without the runner's own command: what a hostile or broken submitter does.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::host::Host;
use crate::wait::{LONG, eventually_some};

/// A job as JSON, with a new run id; fields can be replaced before it is queued.
#[derive(Clone, Debug)]
pub struct Job(pub Value);

impl Job {
    /// A job of the host's profile.
    pub fn new(host: &Host, prompt: &str) -> Self {
        Self(json!({
            "run_id": uuid::Uuid::new_v4().to_string(),
            "prompt": prompt,
            "profile": host.profile(),
            "working_dir": "/home/user",
            "cli_agent_type": "claude-code",
            "environment": {},
        }))
    }

    /// Its run id.
    pub fn run_id(&self) -> String {
        self.0["run_id"].as_str().expect("a string").to_owned()
    }

    /// Replaces or adds a field.
    pub fn with(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.0[field] = value.into();
        self
    }
}

impl Host {
    /// The group's directory in the queue.
    pub fn queue(&self) -> PathBuf {
        self.home().join("groups").join(self.group())
    }

    /// Puts bytes into the queue as `<id>.job`, the way submit does: a finished file, renamed into place.
    pub fn drop_job(&self, id: &str, bytes: impl AsRef<[u8]>) {
        let temporary = self.queue().join(format!(".e2e-{}", uuid::Uuid::new_v4()));
        fs::write(&temporary, bytes).expect("the queue can be written");
        fs::rename(&temporary, self.queue().join(format!("{id}.job")))
            .expect("the queue can be written");
    }

    /// Queues a job; returns its run id.
    pub fn queue_job(&self, job: &Job) -> String {
        let id = job.run_id();
        self.drop_job(&id, job.0.to_string());
        id
    }

    /// The answer to a job that was put into the queue by hand.
    pub fn answer(&self, id: &str) -> Value {
        let path = self.queue().join(".results").join(format!("{id}.result"));
        let bytes = eventually_some(&format!("{} exists", path.display()), LONG, || {
            fs::read(&path).ok()
        });
        serde_json::from_slice(&bytes).expect("results appear whole")
    }

    /// The answer, if it is there and its submitter has not fetched it.
    pub fn answer_if_kept(&self, id: &str) -> Option<Value> {
        let path = self.queue().join(".results").join(format!("{id}.result"));
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// Waits until a run's agent has been started, which its log says.
    pub fn until_runs(&self, id: &str) {
        let log = self.log_path(id);
        eventually_some(&format!("the agent of {id} runs"), LONG, || {
            let text = fs::read_to_string(&log).ok()?;
            text.contains("▷ Execution").then_some(())
        });
    }

    /// The ids of the jobs that are queued or running.
    pub fn jobs(&self) -> Vec<String> {
        fs::read_dir(self.queue())
            .expect("the queue can be read")
            .flatten()
            .filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".job")?.to_owned()))
            .collect()
    }

    /// The id of the queued job with this prompt.
    pub(crate) fn queued(&self, prompt: &str) -> Option<String> {
        fs::read_dir(self.queue())
            .ok()?
            .flatten()
            .find_map(|entry| {
                let path = entry.path();
                if path.extension()? != "job" {
                    return None;
                }
                let job: Value = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
                (job["prompt"] == prompt).then(|| job["run_id"].as_str().map(str::to_owned))?
            })
    }
}
