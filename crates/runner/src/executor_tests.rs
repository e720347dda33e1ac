//! The executor against the fake engine: the real control protocol, and processes that do what a test says.

use std::os::unix::fs::MetadataExt;
use std::sync::Mutex;

use api_types::runner::ResumeSession;
use guest_control::{ExitReport, ExitStatus, UserSpec};
use host::slot::SlotId;
use sandbox::fake::{FakeEngine, FakeEvent, FakeExec, FakeGuest, Gate};
use sandbox::{Death, Shape};
use tokio::sync::{Semaphore, mpsc};

use super::agent::{TIMEOUT_GRACE, masked};
use super::last_line::{LAST_LINE, LastLine};
use super::*;
use crate::names::RunId;
use crate::queue::test_support::fields;
use crate::queue::{JobFields, QueueError};

const SHAPE: Shape = Shape {
    vcpu: 1,
    memory_mb: 128,
    disk_mb: 64,
};

struct Bench {
    root: tempfile::TempDir,
    engine: FakeEngine,
    guests: mpsc::UnboundedReceiver<FakeGuest>,
    setting: Setting,
    cancel: watch::Sender<Option<CancelReason>>,
}

struct Collecting(std::path::PathBuf);

impl Provider for Collecting {
    fn claim(&self, _: RunId) {}
    fn complete(&self, _: JobResult) {}
    fn collect_dir(&self, _: RunId) -> Result<Dir, QueueError> {
        Ok(Dir::open(&self.0)?)
    }
}

/// What the executor told.
#[derive(Default)]
struct Heard {
    phases: Mutex<Vec<Phase>>,
    devices: Mutex<DeviceStats>,
}

impl Progress for Heard {
    fn phase(&self, phase: Phase) {
        self.phases.lock().unwrap().push(phase);
    }
    fn vm(&self, _: &Sandbox) {}
    fn devices(&self, stats: DeviceStats) {
        *self.devices.lock().unwrap() += stats;
    }
}

impl Bench {
    fn new(program: impl Fn(FakeExec) + Send + Sync + 'static) -> Self {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("logs")).unwrap();
        std::fs::create_dir(root.path().join("files")).unwrap();
        let (engine, guests) = FakeEngine::new();
        engine.on_exec(program);
        let setting = Setting {
            home: Arc::new(Dir::open(root.path()).unwrap()),
            provider: Arc::new(Collecting(root.path().join("files"))),
            job_timeout: Duration::from_secs(7200),
            log_max: 1 << 20,
            mock: Some("true".to_owned()),
            networks: None,
            restores: Arc::new(Semaphore::new(1)),
        };
        Self {
            root,
            engine,
            guests,
            setting,
            cancel: watch::channel(None).0,
        }
    }

    fn source(&self) -> VmSource {
        VmSource::Restore(self.engine.template(SHAPE), Place::unplugged(SlotId(3)))
    }

    async fn run(&self, job: &Job) -> (Ended, Vec<Phase>) {
        let heard = Heard::default();
        let ended = self.run_heard(job, &heard).await;
        (ended, heard.phases.into_inner().unwrap())
    }

    async fn run_heard(&self, job: &Job, heard: &Heard) -> Ended {
        self.run_for(job, None, heard).await
    }

    async fn run_for(&self, job: &Job, api: Option<&ApiSide>, heard: &Heard) -> Ended {
        let cancel = self.cancel.subscribe();
        let work = Work {
            job,
            submitter: 0,
            api,
            source: self.source(),
            network: None,
            steps: &Steps::default(),
        };
        execute(&self.setting, work, cancel, heard).await
    }

    fn log(&self, job: &Job) -> String {
        let path = self
            .root
            .path()
            .join(crate::home::rel::system_log(&job.run_id));
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        std::fs::read_to_string(path).unwrap()
    }
}

fn job(change: impl FnOnce(&mut JobFields)) -> Job {
    let mut fields = fields(RunId::random());
    change(&mut fields);
    Job::new(fields).unwrap()
}

fn variable<'a>(exec: &'a FakeExec, name: &str) -> Option<&'a str> {
    let found = exec.spec.env.iter().find(|(n, _)| n == name);
    found.map(|(_, value)| value.as_str())
}

fn report(status: ExitStatus) -> ExitReport {
    ExitReport {
        status,
        oom_kills: 0,
        pids_limit_hits: 0,
        disk_free_bytes: 1 << 30,
    }
}

#[tokio::test]
async fn a_job_s_output_is_in_its_log_before_its_result_is_there() {
    let bench = Bench::new(|mut exec| {
        exec.print("out\n");
        exec.print_error("err\n");
        exec.exit(0);
    });
    let job = job(|_| ());
    let (ended, phases) = bench.run(&job).await;
    assert_eq!(ended.result, JobResult::exited(job.run_id, 0));
    assert!(ended.reusable);
    assert_eq!(phases, [Phase::Running]);
    let log = bench.log(&job);
    assert!(log.contains("out\n") && log.contains("err\n"), "{log}");
}

#[tokio::test]
async fn what_a_vm_s_devices_did_is_told_with_the_job_also_of_a_failed_one() {
    let (executions, mut seen) = mpsc::unbounded_channel();
    let mut bench = Bench::new(move |exec| {
        let _ = executions.send(exec);
    });
    let mut guests = std::mem::replace(&mut bench.guests, mpsc::unbounded_channel().1);
    let did = DeviceStats {
        disk_written_bytes: 7,
        network_throttled: 2,
        ..DeviceStats::default()
    };
    let heard = Heard::default();
    let job = job(|_| ());
    let guest = async {
        let guest = guests.recv().await.unwrap();
        let exec: FakeExec = seen.recv().await.unwrap();
        guest.count(did);
        exec.exit(3);
    };
    let (ended, ()) = tokio::join!(bench.run_heard(&job, &heard), guest);
    assert_eq!(ended.result.exit_code, 3);
    assert_eq!(*heard.devices.lock().unwrap(), did);
}

#[tokio::test]
async fn the_agent_gets_clock_and_entropy_its_job_and_nothing_that_was_overridden() {
    let (specs, mut seen) = mpsc::unbounded_channel();
    let bench = Bench::new(move |exec| {
        let show = |name| variable(&exec, name).unwrap_or("-").to_owned();
        let names = ["VM0_PROMPT", "VM0_API_TOKEN", "USE_MOCK_CLAUDE", "MINE"];
        specs.send((names.map(show), exec.spec.clone())).unwrap();
        exec.exit(0);
    });
    let job = job(|f| {
        f.prompt = "say \"hi\" $(x)".to_owned();
        f.environment.insert("MINE".to_owned(), "yes".to_owned());
    });
    bench.run(&job).await;
    let (values, spec) = seen.recv().await.unwrap();
    assert_eq!(values, ["say \"hi\" $(x)", "", "true", "yes"]);
    assert_eq!(spec.user, UserSpec::User);
    assert!(spec.kill_group_on_exit && spec.wake.is_some() && !spec.stdin);
    assert_eq!(spec.timeout, Some(Duration::from_secs(7200)));
    let mut names: Vec<_> = spec.env.iter().map(|(name, _)| name).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), spec.env.len(), "a name twice");
}

#[tokio::test]
async fn a_long_prompt_travels_by_stdin_whole() {
    let (prompts, mut seen) = mpsc::unbounded_channel();
    let bench = Bench::new(move |mut exec| {
        assert_eq!(variable(&exec, "VM0_PROMPT"), None);
        assert_eq!(variable(&exec, "VM0_PROMPT_STDIN"), Some("1"));
        let stdin = exec.take_stdin().unwrap();
        let prompts = prompts.clone();
        std::thread::spawn(move || {
            rustix::io::ioctl_fionbio(&stdin, false).unwrap();
            let mut text = String::new();
            let mut stdin = std::fs::File::from(stdin);
            std::io::Read::read_to_string(&mut stdin, &mut text).unwrap();
            prompts.send(text).unwrap();
            exec.exit(0);
        });
    });
    let prompt = "0123456789".repeat(100_000);
    let job = job(|f| f.prompt = prompt.clone());
    let (ended, _) = bench.run(&job).await;
    assert_eq!(ended.result.exit_code, 0);
    assert!(seen.recv().await.unwrap() == prompt);
}

#[tokio::test]
async fn a_job_that_takes_input_gets_its_prompt_and_each_input_as_a_line() {
    const TEXTS: [&str; 3] = ["the\nprompt", "more", "\u{1f600}\"\n"];
    let bench = Bench::new(move |mut exec| {
        assert_eq!(variable(&exec, "VM0_PROMPT"), None);
        assert_eq!(variable(&exec, "VM0_INPUT"), Some("1"));
        let stdin = exec.take_stdin().unwrap();
        std::thread::spawn(move || {
            rustix::io::ioctl_fionbio(&stdin, false).unwrap();
            let lines = std::io::BufReader::new(std::fs::File::from(stdin));
            let lines = std::io::BufRead::lines(lines).map(Result::unwrap);
            let lines: Vec<_> = lines.take(TEXTS.len()).collect();
            assert_eq!(lines.len(), TEXTS.len());
            for (text, line) in TEXTS.into_iter().zip(lines) {
                let message: serde_json::Value = serde_json::from_str(&line).unwrap();
                assert_eq!(message["type"], "user");
                assert_eq!(message["message"]["role"], "user");
                assert_eq!(message["message"]["content"], text);
                assert!(message["uuid"].is_string());
            }
            exec.exit(7);
        });
    });
    let (give, inputs) = mpsc::channel(2);
    for text in &TEXTS[1..] {
        give.try_send((*text).to_owned()).unwrap();
    }
    let api = ApiSide {
        url: "https://api.example.com".to_owned(),
        token: "token".to_owned().into(),
        group_policy: policy::Draft::default(),
        resume: None,
        inputs: Some(tokio::sync::Mutex::new(inputs)),
    };
    let job = job(|f| f.prompt = TEXTS[0].to_owned());
    let ended = bench.run_for(&job, Some(&api), &Heard::default()).await;
    assert_eq!(ended.result.exit_code, 7, "{:?}", ended.result.error);
}

#[tokio::test]
async fn an_answer_says_what_happened() {
    let table: Vec<(ExitReport, i32, &str)> = vec![
        (report(ExitStatus::Exited(7)), 7, "why it failed"),
        (report(ExitStatus::Signaled(15)), 143, "signal 15"),
        (report(ExitStatus::TimedOut), 124, "timed out after 9 s"),
        (
            ExitReport {
                oom_kills: 2,
                ..report(ExitStatus::Exited(137))
            },
            137,
            "out of memory",
        ),
        (
            ExitReport {
                pids_limit_hits: 1,
                ..report(ExitStatus::Exited(1))
            },
            1,
            "process limit reached",
        ),
        (
            ExitReport {
                disk_free_bytes: 0,
                ..report(ExitStatus::Exited(1))
            },
            1,
            "disk full",
        ),
    ];
    for (report, code, expected) in table {
        let bench = Bench::new(move |mut exec| {
            exec.print_error("before\nwhy it failed\n\n");
            exec.finish(report.clone());
        });
        let job = job(|f| f.timeout_secs = Some(9));
        let (ended, _) = bench.run(&job).await;
        assert_eq!(ended.result.exit_code, code, "{expected}");
        let error = ended.result.error.unwrap();
        assert!(error.contains(expected), "{error}");
        assert!(!ended.reusable);
        assert!(bench.log(&job).contains(&format!("[runner] {error}")));
    }
}

#[tokio::test]
async fn cancelling_ends_the_job_whatever_it_is_at() {
    // While it is being restored.
    let bench = Bench::new(|exec| exec.exit(0));
    bench.engine.set_restores(Gate::Held);
    bench.cancel.send_replace(Some(CancelReason::User));
    let job1 = job(|_| ());
    assert_eq!(
        bench.run(&job1).await.0.result,
        JobResult::cancelled(job1.run_id)
    );

    // While the agent runs.
    let (held, mut running) = mpsc::unbounded_channel();
    let bench = Bench::new(move |mut exec| {
        exec.print("halfway\n");
        held.send(exec).unwrap();
    });
    let job2 = job(|_| ());
    let cancel = async {
        let exec = running.recv().await.unwrap();
        bench.cancel.send_replace(Some(CancelReason::Stopping));
        exec
    };
    let ((ended, _), _exec) = tokio::join!(bench.run(&job2), cancel);
    assert_eq!(ended.result.exit_code, 137);
    assert!(ended.result.error.unwrap().contains("stopped"));
}

#[tokio::test]
async fn a_vm_that_dies_or_closes_its_channel_fails_its_job_with_the_reason() {
    let (held, mut running) = mpsc::unbounded_channel();
    let mut bench = Bench::new(move |exec| held.send(exec).unwrap());
    let dying = job(|_| ());
    let mut guests = std::mem::replace(&mut bench.guests, mpsc::unbounded_channel().1);
    let kill = async {
        let exec = running.recv().await.unwrap();
        guests.recv().await.unwrap().die(Death {
            reason: "the host killed it".to_owned(),
            oom: true,
        });
        exec
    };
    let ((ended, _), _exec) = tokio::join!(bench.run(&dying), kill);
    let error = ended.result.error.unwrap();
    assert!(error.starts_with("VM died: out of memory"), "{error}");

    let closing = job(|_| ());
    let close = async {
        let exec = running.recv().await.unwrap();
        guests.recv().await.unwrap().close_channel();
        exec
    };
    let ((ended, _), _exec) = tokio::join!(bench.run(&closing), close);
    let error = ended.result.error.unwrap();
    assert!(error.contains("closed its control channel"), "{error}");
}

#[tokio::test]
async fn a_restore_that_fails_is_an_answer() {
    let bench = Bench::new(|exec| exec.exit(0));
    bench.engine.set_restores(Gate::Fails("no more".to_owned()));
    let job = job(|_| ());
    let (ended, phases) = bench.run(&job).await;
    assert_eq!(ended.result.exit_code, 1);
    assert!(ended.result.error.unwrap().contains("no more"));
    assert!(phases.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_job_that_runs_too_long_is_ended() {
    let (held, mut running) = mpsc::unbounded_channel();
    let bench = Bench::new(move |exec| held.send(exec).unwrap());
    let job = job(|f| f.timeout_secs = Some(60));
    let start = tokio::time::Instant::now();
    let (ended, _) = bench.run(&job).await;
    assert_eq!(ended.result.exit_code, JobResult::TIMED_OUT);
    let took = start.elapsed();
    assert!(took >= Duration::from_secs(60) && took <= Duration::from_secs(60) + TIMEOUT_GRACE);
    running.recv().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_takes_no_session_holds_its_job_for_a_bounded_time() {
    let mut bench = Bench::new(|exec| exec.exit(0));
    let vm = bench.engine.template(SHAPE);
    let vm = vm.restore(Place::unplugged(SlotId(3))).await.unwrap();
    let sandbox = Sandbox::adopt(vm, SlotId(3));
    sandbox.pause(sandbox::PausedAs::Parked).await.unwrap();
    bench.guests.recv().await.unwrap().turn_deaf();
    let api = ApiSide {
        url: "https://api.example.com".to_owned(),
        token: "token".to_owned().into(),
        group_policy: policy::Draft::default(),
        resume: Some(ResumeSession {
            session_id: "s".to_owned(),
            session_history: "x".repeat(1 << 20),
        }),
        inputs: None,
    };
    let job = job(|_| ());
    let work = Work {
        job: &job,
        submitter: 0,
        api: Some(&api),
        source: VmSource::Paused(sandbox),
        network: None,
        steps: &Steps::default(),
    };
    let (cancel, heard) = (bench.cancel.subscribe(), Heard::default());
    let executed = execute(&bench.setting, work, cancel, &heard);
    let ended = timeout(SESSION_LIMIT * 2, executed).await;
    let ended = ended.unwrap_or_else(|_| panic!("it hangs"));
    let error = ended.result.error.unwrap();
    assert!(error.contains("session's history"), "{error}");
    assert!(!ended.reusable);
}

#[tokio::test]
async fn output_beyond_the_limit_is_cut_and_does_not_hold_the_job_back() {
    let mut bench = Bench::new(|mut exec| {
        std::thread::spawn(move || {
            for _ in 0..100 {
                exec.print(&"x".repeat(10_000));
            }
            exec.exit(0);
        });
    });
    bench.setting.log_max = 5000;
    let job = job(|_| ());
    let (ended, _) = bench.run(&job).await;
    assert_eq!(ended.result.exit_code, 0);
    let log = bench.log(&job);
    assert!(
        log.len() < 6000 && log.contains("output cut here"),
        "{}",
        log.len()
    );
}

#[tokio::test]
async fn a_warm_vm_has_run_the_chain_once_and_is_paused_and_a_parked_one_runs_nothing() {
    let mut bench = Bench::new(|exec| {
        assert_eq!(variable(&exec, "VM0_PROMPT"), Some("true"));
        exec.exit(0);
    });
    let template = bench.engine.template(SHAPE);
    let sandbox = warm_up(&template, Place::unplugged(SlotId(1)))
        .await
        .unwrap();
    let guest = bench.guests.recv().await.unwrap();
    assert_eq!(guest.events().last(), Some(&FakeEvent::Paused));
    assert!(guest.events().contains(&FakeEvent::Woken));
    sandbox.resume().await.unwrap();
    park(&sandbox).await.unwrap();
    let events = guest.events();
    assert!(
        events.ends_with(&[FakeEvent::KilledAll, FakeEvent::Paused]),
        "{events:?}"
    );

    bench.engine.on_exec(|exec| exec.exit(3));
    let error = warm_up(&template, Place::unplugged(SlotId(1)))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("warm-up"), "{error}");
}

#[test]
fn the_last_line_of_stderr_is_found_in_pieces() {
    let mut line = LastLine::default();
    for piece in ["fir", "st\nsecond", " line\n", "\n  \n"] {
        line.push(piece.as_bytes());
    }
    assert_eq!(line.text(), "second line");
    line.push(b"no newline");
    assert_eq!(line.text(), "no newline");
    line.push(&vec![b'x'; 1 << 20]);
    assert!(line.text().len() <= LAST_LINE);
}

#[test]
fn what_is_masked_is_listed_as_the_agent_reads_it() {
    assert_eq!(masked(std::iter::empty()), "");
    let placeholders = ["placeholder1", "with,comma"];
    assert_eq!(
        masked(placeholders.into_iter()),
        "cGxhY2Vob2xkZXIx,d2l0aCxjb21tYQ=="
    );
}
