//! The owner with a real launcher and a fake engine: what the plan decides is really done, and everything that was
//! taken is given back. Needs root for the launcher.

use std::sync::Mutex;

use host::launcher::ForkedLauncher;
use host::slot::{HostLimits, HostUsage};
use host::test_support::TestHost;
use sandbox::Shape;
use sandbox::fake::FakeEngine;
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::*;
use crate::metrics::Metrics;
use crate::provider::ProviderEvent;
use crate::queue::test_support::fields;
use crate::queue::{ClaimedJob, Job, JobFields, JobHead, JobResult, QueueError};

/// A queue in the test's hands: claims always succeed, results are kept.
struct TestQueue {
    mailbox: Mailbox,
    jobs: Mutex<HashMap<RunId, Box<ClaimedJob>>>,
    results: mpsc::UnboundedSender<JobResult>,
}

impl Provider for TestQueue {
    fn claim(&self, id: RunId) {
        let job = self.jobs.lock().unwrap().remove(&id);
        let event = job.map_or(ProviderEvent::Lost(id), ProviderEvent::Claimed);
        super::super::forward(&self.mailbox, event);
    }
    fn complete(&self, result: JobResult) {
        let run = result.run_id;
        self.results.send(result).unwrap();
        super::super::forward(&self.mailbox, ProviderEvent::Completed(run));
    }
    fn collect_dir(&self, _: RunId) -> Result<host::fs::Dir, QueueError> {
        panic!("the executor meets a bug")
    }
}

impl TestQueue {
    fn submit(&self, change: impl FnOnce(&mut JobFields)) -> RunId {
        let mut fields = fields(RunId::random());
        change(&mut fields);
        let job = ClaimedJob {
            job: Job::new(fields).unwrap(),
            submitter: 1000,
            submitted: std::time::SystemTime::now(),
            api: None,
        };
        let head = JobHead::of(&job.job, job.submitter, job.submitted);
        let run = head.run_id;
        self.jobs.lock().unwrap().insert(run, Box::new(job));
        super::super::forward(&self.mailbox, ProviderEvent::Found(head));
        run
    }
}

const CONFIG: &str = "\
name: test
group: vm0/test
profiles:
  vm0/small:
    rootfs_hash: 0123456789abcdef
    snapshot_hash: fedcba9876543210
    vcpu: 1
    memory_mb: 256
    disk_mb: 1024
    flavour: small
    warm: { low: 1, high: 1 }
";

/// Runs `story` beside a daemon, stops the daemon, and checks that it ended well and that nothing is held.
fn with_daemon<F>(story: impl FnOnce(Arc<TestQueue>, mpsc::UnboundedReceiver<JobResult>) -> F)
where
    F: Future<Output = ()>,
{
    with_telemetry(Telemetry::default, story);
}

/// The same, with traces that go where `telemetry` says; it is called on the daemon's runtime.
fn with_telemetry<F>(
    telemetry: impl FnOnce() -> Telemetry,
    story: impl FnOnce(Arc<TestQueue>, mpsc::UnboundedReceiver<JobResult>) -> F,
) where
    F: Future<Output = ()>,
{
    let Some(host) = TestHost::new() else {
        return;
    };
    let forked = ForkedLauncher::fork_in_tests(host.config("test")).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let launcher = forked.attach().unwrap();
        let limits = HostLimits {
            total: Resources {
                vcpu: 4,
                memory_mb: 1024,
                disk_mb: 10_240,
            },
        };
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("logs")).unwrap();
        let (engine, _guests) = FakeEngine::new();
        let template = engine.template(Shape {
            vcpu: 1,
            memory_mb: 256,
            disk_mb: 1024,
        });
        let (mailbox, inbox) = Mailbox::new();
        let (results, answers) = mpsc::unbounded_channel();
        let queue = Arc::new(TestQueue {
            mailbox: mailbox.clone(),
            jobs: Mutex::default(),
            results,
        });
        let home = host::fs::Dir::open(root.path()).unwrap();
        let status_dir = home.try_clone().unwrap();
        let config = Config::parse(CONFIG).unwrap();
        let parts = Parts {
            identity: Identity {
                name: config.name.clone(),
                instance: "test".to_owned(),
                version: "0".to_owned(),
                engine: EngineKind::Fake,
            },
            templates: BTreeMap::from([("vm0/small".parse().unwrap(), template)]),
            budget: Budget::new(launcher.clone(), "test".to_owned(), limits, 0, 0, None),
            config,
            provider: queue.clone(),
            metrics: Arc::new(Metrics::new(None, "0")),
            telemetry: telemetry(),
            setting: Setting {
                home: Arc::new(home),
                provider: queue.clone(),
                job_timeout: Duration::from_secs(60),
                log_max: 1 << 20,
                mock: None,
                networks: None,
                restores: Arc::new(Semaphore::new(1)),
            },
            name: None,
            mailbox: mailbox.clone(),
            inbox,
        };
        let (done, ended) = oneshot::channel();
        tokio::spawn(async move {
            let code = run(
                parts,
                |first| StatusWriter::start(status_dir, first),
                |_| (),
            )
            .await;
            let _ = done.send(code);
        });
        story(queue, answers).await;
        mailbox.event(Event::Stop);
        assert_eq!(ended.await.unwrap(), 0);
        // Every VM is destroyed and every slot given back, also those of the pool.
        assert_eq!(*engine.live().borrow(), 0);
        assert_eq!(launcher.usage().await.unwrap(), HostUsage::default());
        launcher.shutdown().await;
    });
}

#[test]
fn every_job_is_answered_and_everything_is_given_back() {
    with_daemon(async |queue, mut answers| {
        let mut runs: Vec<RunId> = (0..10).map(|_| queue.submit(|_| ())).collect();
        let mut answered = Vec::new();
        for _ in &runs {
            let result = answers.recv().await.unwrap();
            assert_eq!(result, JobResult::exited(result.run_id, 0));
            answered.push(result.run_id);
        }
        runs.sort();
        answered.sort();
        assert_eq!(answered, runs);
    });
}

#[test]
fn a_job_whose_executor_panics_is_answered_and_the_next_one_runs() {
    with_daemon(async |queue, mut answers| {
        // The panic waits in `collect_dir`.
        let falls = queue.submit(|fields| fields.collect = vec!["/x".to_owned()]);
        let result = answers.recv().await.unwrap();
        assert_eq!((result.run_id, result.exit_code), (falls, 1));
        assert!(result.error.unwrap().contains("internal error"));
        let next = queue.submit(|_| ());
        let result = answers.recv().await.unwrap();
        assert_eq!(result, JobResult::exited(next, 0));
    });
}

#[test]
fn a_session_s_vm_is_kept_used_again_and_given_back_at_the_end() {
    with_daemon(async |queue, mut answers| {
        for _ in 0..3 {
            let run = queue.submit(|fields| fields.session_id = Some("s".parse().unwrap()));
            let result = answers.recv().await.unwrap();
            assert_eq!(result, JobResult::exited(run, 0));
        }
    });
}

#[path = "traces_tests.rs"]
mod traces;
