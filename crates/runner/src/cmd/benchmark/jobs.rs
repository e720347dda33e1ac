//! Figures of whole jobs and commands: a daemon of its own in a group of its own, timed from outside.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use host::fs::Dir;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};

use super::samples::Samples;
use crate::config::{
    Config, EngineChoice, GcConfig, JOB_TIMEOUT_SECS, LOG_MAX_MB, ProfileConfig, Rendered,
    SandboxConfig, WarmConfig,
};
use crate::context::{CliError, note};
use crate::control::client::{self, Instance};
use crate::control::protocol::{Reply, Request};
use crate::home::{Home, rel};
use crate::names::{GroupName, ImageHash, ProfileName, RunId, RunnerName};
use crate::profile::ProfileSpec;
use crate::queue::{Change, GroupQueue, Job, JobFields, JobResult, Watch};

/// Warm VMs kept ready where single jobs are timed: enough that one always finds one.
pub(super) const WARM: u32 = 4;

/// Longest wait for the daemon, a pool or an answer.
const LIMIT: Duration = Duration::from_secs(600);

/// How often something that is waited for outside of a measurement is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// Process starts in the guest that are averaged in one measurement of their cost.
const STARTS: u32 = 20;

/// What was measured.
#[derive(Debug, Default)]
pub(super) struct Measured {
    pub(super) pickup: Samples,
    pub(super) exec: Samples,
    pub(super) submit: Samples,
}

/// A daemon that is stopped, and whose files are removed, when this is dropped.
pub(super) struct Jobs {
    home: Arc<Home>,
    program: PathBuf,
    group: GroupName,
    runner: RunnerName,
    profile: ProfileName,
    /// Size of the warm pool.
    warm: u32,
    daemon: Child,
    /// Whose logs go with the daemon.
    runs: Vec<RunId>,
}

impl Jobs {
    /// Starts the daemon and waits until its pool of `warm` VMs is full.
    pub(super) async fn start(
        home: &Arc<Home>,
        spec: &ProfileSpec,
        rootfs_hash: ImageHash,
        snapshot_hash: ImageHash,
        warm: u32,
    ) -> Result<Self, CliError> {
        let name = format!("benchmark-{}", std::process::id());
        let runner: RunnerName = name.parse()?;
        let group: GroupName = format!("benchmark/{name}").parse()?;
        let size = spec.profile;
        let profile = ProfileConfig {
            rootfs_hash,
            snapshot_hash,
            vcpu: size.vcpu,
            memory_mb: size.memory_mb,
            disk_mb: size.disk_mb,
            flavour: size.flavour,
            policy: Default::default(),
            limits: Default::default(),
            warm: WarmConfig {
                low: warm,
                high: warm,
            },
        };
        let config = Config {
            name: runner.clone(),
            group: group.clone(),
            profiles: BTreeMap::from([(spec.name.clone(), profile)]),
            sandbox: SandboxConfig {
                // The budget is not what is measured: room for the pool beside the job, also on a small host.
                concurrency_factor: 64.0,
                ..SandboxConfig::default()
            },
            network: Default::default(),
            metrics: Default::default(),
            telemetry: Default::default(),
            gc: GcConfig {
                interval_secs: 0,
                ..GcConfig::default()
            },
            engine: EngineChoice::Auto,
            stop_timeout_secs: 0,
            job_timeout_secs: JOB_TIMEOUT_SECS,
            log_max_mb: LOG_MAX_MB,
        };
        home.ensure_dir(rel::runner(&runner))?;
        let file = rel::runner_yaml(&runner);
        home.dir()
            .write_atomic(&file, 0o644, Rendered(&config).to_string().as_bytes())?;
        home.group(&group)?;
        let program = std::env::current_exe()?;
        let mut daemon = Command::new(&program);
        daemon
            .arg("--home")
            .arg(home.path())
            .args(["start", "--local", "--config"])
            .arg(home.at(&file))
            .env("USE_MOCK_CLAUDE", "true")
            .env("VM0_RUNNER_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        // SAFETY: prctl is a system call; nothing of the parent's memory is touched between fork and exec.
        unsafe {
            // A benchmark that is killed takes its daemon along. Its one thread lives as long as it does.
            daemon.pre_exec(|| {
                Ok(rustix::process::set_parent_process_death_signal(Some(
                    Signal::TERM,
                ))?)
            });
        }
        let daemon = daemon.spawn()?;
        let mut jobs = Self {
            home: Arc::clone(home),
            program,
            group,
            runner,
            profile: spec.name.clone(),
            warm,
            daemon,
            runs: Vec::new(),
        };
        jobs.rest(0).await?;
        Ok(jobs)
    }

    pub(super) async fn measure(mut self, runs: u32, pickups: u32) -> Result<Measured, CliError> {
        let mut measured = Measured::default();
        for _ in 0..runs {
            self.rest(0).await?;
            measured.submit.push(self.submit()?);
        }
        self.rest(0).await?;
        self.pickups(pickups, &mut measured.pickup).await?;
        self.execs(runs, &mut measured.exec).await?;
        Ok(measured)
    }

    /// Puts as many jobs into the queue at once as the pool has VMs, `rounds` times; each time from the first job's
    /// appearance to the last one's answer.
    pub(super) async fn bursts(mut self, rounds: u32) -> Result<Samples, CliError> {
        let queue = GroupQueue::open(self.home.group(&self.group)?)?;
        let results = self.home.group(&self.group)?.open_dir(".results")?;
        let mut samples = Samples::default();
        for _ in 0..rounds {
            self.rest(0).await?;
            let mut answered = Watch::new()?;
            answered.add(&results)?;
            let jobs = (0..self.warm).map(|_| self.job("true", None));
            let jobs = jobs.collect::<Result<Vec<_>, _>>()?;
            let mut open: HashSet<String> = HashSet::new();
            let start = Instant::now();
            for job in &jobs {
                queue.submit(job)?;
                open.insert(format!("{}.result", job.run_id));
            }
            samples.push(all_appeared(&mut answered, open, start)?);
            for job in jobs {
                let result = queue.result(job.run_id)?;
                if result.is_none_or(|result| result.exit_code != 0) {
                    return Err(CliError::failed("a job of the benchmark's burst failed"));
                }
                queue.forget(job.run_id);
            }
        }
        Ok(samples)
    }

    /// Waits until every warm VM is ready, `idle` VMs are kept for a session and nothing else goes on. Asked for, because
    /// nothing is measured here.
    async fn rest(&mut self, idle: usize) -> Result<(), CliError> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.daemon.try_wait()? {
                return Err(CliError::failed(format_args!(
                    "the daemon of the benchmark ended: {status}"
                )));
            }
            if let Some(instance) = self.instance()?
                && let Ok(Reply::Status(text)) = instance.ask(&Request::Status).await
            {
                let status: serde_json::Value = serde_json::from_str(&text)?;
                let pool = status.pointer("/warm/0");
                let number = |key| pool.and_then(|pool| pool.get(key)?.as_u64());
                let quiet = status
                    .pointer("/active_runs")
                    .and_then(|runs| runs.as_array())
                    .is_some_and(Vec::is_empty);
                let kept = status
                    .pointer("/idle_vms")
                    .and_then(|vms| vms.as_array())
                    .map(Vec::len);
                if quiet
                    && number("ready") == Some(u64::from(self.warm))
                    && number("preparing") == Some(0)
                    && kept == Some(idle)
                {
                    return Ok(());
                }
            }
            if start.elapsed() > LIMIT {
                return Err(CliError::failed(
                    "the benchmark's warm pool did not fill up",
                ));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn instance(&self) -> Result<Option<Instance>, CliError> {
        let live = Instance::live(&self.home)?;
        Ok(live.into_iter().find(|live| live.runner == self.runner))
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("--home")
            .arg(self.home.path())
            .stdin(Stdio::null());
        command
    }

    /// The whole command, from its start to its end.
    fn submit(&mut self) -> Result<Duration, CliError> {
        let mut command = self.command();
        command
            .args(["local", "submit", "--prompt", "true", "--group"])
            .arg(self.group.as_str())
            .arg("--profile")
            .arg(self.profile.as_str());
        let start = Instant::now();
        let output = command.output()?;
        let took = start.elapsed();
        succeeded("submit", &output)?;
        let result: JobResult = serde_json::from_slice(&output.stdout)?;
        self.runs.push(result.run_id);
        Ok(took)
    }

    /// From the rename of a job's file to the appearance of its claim, on a daemon at rest. The jobs are of one session,
    /// so that each finds the same VM and rest comes soon.
    async fn pickups(&mut self, count: u32, samples: &mut Samples) -> Result<(), CliError> {
        let dir = self.home.group(&self.group)?;
        let queue = GroupQueue::open(self.home.group(&self.group)?)?;
        let claims = dir.open_dir(".claims")?;
        let mut claimed = Watch::new()?;
        claimed.add(&claims)?;
        for round in 0..count {
            self.rest(usize::from(round > 0)).await?;
            let job = self.job("true", Some("pickup"))?;
            let name = dir.write_temporary(0o600, &job.to_bytes()?)?;
            claimed.changes()?;
            let start = Instant::now();
            dir.rename(&name, &dir, format!("{}.job", job.run_id))?;
            let took = appeared(&mut claimed, job.run_id, start)?;
            samples.push(took);
            self.answer(&queue, job.run_id).await?;
        }
        Ok(())
    }

    /// `runner exec` of a program that does nothing, less what it costs to start one in the guest.
    async fn execs(&mut self, count: u32, samples: &mut Samples) -> Result<(), CliError> {
        let dir = self.home.group(&self.group)?;
        let queue = GroupQueue::open(dir)?;
        let job = self.job("sleep 3600", None)?;
        queue.submit(&job)?;
        let start = Instant::now();
        let run = loop {
            let active = client::active_runs(&self.home).await?;
            let found = active
                .iter()
                .find(|run| run.info.run_id == job.run_id && run.info.phase == "running");
            if found.is_some() {
                break job.run_id.to_string();
            }
            if start.elapsed() > LIMIT {
                return Err(CliError::failed("the benchmark's job did not start"));
            }
            tokio::time::sleep(LOOK).await;
        };
        let (mut whole, mut starts) = (Samples::default(), Samples::default());
        let script = format!(
            "for i in $(seq 3); do /bin/true; done; s=${{EPOCHREALTIME/./}}; \
             for ((i = 0; i < {STARTS}; i++)); do /bin/true; done; e=${{EPOCHREALTIME/./}}; echo $((e - s))"
        );
        for _ in 0..count {
            let mut command = self.command();
            // Two arguments: a program, not a command line for bash.
            command.args(["exec", &run, "--", "/bin/true", "-"]);
            let begin = Instant::now();
            let output = command.output()?;
            whole.push(begin.elapsed());
            succeeded("exec", &output)?;
            let output = self
                .command()
                .args(["exec", &run, "--", &script])
                .output()?;
            succeeded("exec", &output)?;
            let micros: u64 = String::from_utf8_lossy(&output.stdout).trim().parse()?;
            starts.push(Duration::from_micros(micros) / STARTS);
        }
        queue.cancel(job.run_id)?;
        self.answer(&queue, job.run_id).await?;
        *samples = whole.above(starts.median());
        Ok(())
    }

    fn job(&mut self, prompt: &str, session: Option<&str>) -> Result<Job, CliError> {
        let run_id = RunId::random();
        self.runs.push(run_id);
        Ok(Job::new(JobFields {
            run_id,
            prompt: prompt.to_owned(),
            profile: self.profile.clone(),
            working_dir: "/home/user/workspace".to_owned(),
            cli_agent_type: "claude-code".to_owned(),
            environment: BTreeMap::new(),
            session_id: session.map(str::parse).transpose()?,
            timeout_secs: None,
            collect: Vec::new(),
            network: None,
            traceparent: None,
        })?)
    }

    /// Waits for an answer and takes it away.
    async fn answer(&self, queue: &GroupQueue, run: RunId) -> Result<(), CliError> {
        let start = Instant::now();
        while queue.result(run)?.is_none() {
            if start.elapsed() > LIMIT {
                return Err(CliError::failed("a job of the benchmark was not answered"));
            }
            tokio::time::sleep(LOOK).await;
        }
        queue.forget(run);
        Ok(())
    }
}

/// Waits for the claim of a run to appear.
fn appeared(claims: &mut Watch, run: RunId, start: Instant) -> Result<Duration, CliError> {
    all_appeared(claims, HashSet::from([format!("{run}.claim")]), start)
}

/// Waits until all the named files have appeared; how long after `start` the last one did.
fn all_appeared(
    watch: &mut Watch,
    mut names: HashSet<String>,
    start: Instant,
) -> Result<Duration, CliError> {
    let limit = Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    };
    while start.elapsed() < LIMIT {
        poll(&mut [PollFd::new(watch, PollFlags::IN)], Some(&limit))?;
        let took = start.elapsed();
        for change in watch.changes()? {
            if let Change::Appeared { name, .. } = &change
                && let Some(name) = name.to_str()
            {
                names.remove(name);
            }
        }
        if names.is_empty() {
            return Ok(took);
        }
    }
    Err(CliError::failed(format_args!(
        "{} files that the benchmark waits for did not appear",
        names.len()
    )))
}

fn succeeded(what: &str, output: &std::process::Output) -> Result<(), CliError> {
    if output.status.success() {
        return Ok(());
    }
    let stderr = crate::terminal::escape(String::from_utf8_lossy(&output.stderr).trim());
    Err(CliError::failed(format_args!(
        "a `{what}` of the benchmark failed ({}): {stderr}",
        output.status
    )))
}

impl Drop for Jobs {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.daemon.id()).ok().and_then(Pid::from_raw) {
            // Twice: its jobs are to be cancelled, not waited for. It kills its VMs itself.
            for _ in 0..2 {
                let _ = kill_process(pid, Signal::TERM);
            }
        }
        if let Err(error) = self.daemon.wait() {
            note(format_args!(
                "warning: the benchmark's daemon cannot be waited for: {error}"
            ));
        }
        for tree in [rel::runner(&self.runner), rel::group(&self.group)] {
            if let Err(error) = remove(self.home.dir(), tree) {
                note(format_args!(
                    "warning: what the benchmark left cannot be removed: {error}"
                ));
            }
        }
        for run in &self.runs {
            let _ = self.home.dir().remove_file(rel::system_log(run));
        }
        // Another benchmark may be at work beside this one.
        let _ = self.home.dir().remove_dir("groups/benchmark");
        let _ = self.home.dir().remove_file(rel::runner_log(&self.runner));
    }
}

fn remove(home: &Dir, tree: PathBuf) -> io::Result<()> {
    home.remove_tree(tree).map(drop).map_err(io::Error::from)
}
