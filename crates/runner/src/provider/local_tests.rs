use std::sync::mpsc::Receiver;

use super::*;
use crate::queue::test_support::fields;
use crate::queue::{GroupQueue, Job};

/// Longest wait for an event; only a broken provider takes it.
const PATIENCE: Duration = Duration::from_secs(20);

struct Bench {
    temp: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self {
            temp: tempfile::tempdir().unwrap(),
        }
    }
    fn dir(&self) -> Dir {
        Dir::open(self.temp.path()).unwrap()
    }
    fn queue(&self) -> GroupQueue {
        GroupQueue::open(self.dir()).unwrap()
    }
    fn provider(&self, profile: &str) -> (LocalProvider, Receiver<ProviderEvent>) {
        let (tell, events) = mpsc::channel();
        let runner = LiveRunner {
            instance: RunId::random().to_string(),
            name: "one".parse().unwrap(),
            pid: std::process::id(),
            profiles: vec![profile.parse().unwrap()],
        };
        let provider = LocalProvider::start(self.dir(), &runner, move |event| {
            let _ = tell.send(event);
        });
        (provider.unwrap(), events)
    }
    fn submit(&self, profile: &str) -> RunId {
        let id = RunId::random();
        let mut fields = fields(id);
        fields.profile = profile.parse().unwrap();
        self.queue().submit(&Job::new(fields).unwrap()).unwrap();
        id
    }
    fn result(&self, id: RunId) -> JobResult {
        let mut watch = self.queue().watch_results().unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(result) = self.queue().result(id).unwrap() {
                return result;
            }
            assert!(Instant::now() < deadline, "no result");
            watch.wait(1000).unwrap();
            watch.changes().unwrap();
        }
    }
}

fn found(events: &Receiver<ProviderEvent>) -> RunId {
    match events.recv_timeout(PATIENCE).unwrap() {
        ProviderEvent::Found(head) => head.run_id,
        other => panic!("{other:?}"),
    }
}

/// The next event says that our marker cancelled this run.
fn marked(events: &Receiver<ProviderEvent>, id: RunId) {
    let me = rustix::process::geteuid().as_raw();
    let event = events.recv_timeout(PATIENCE).unwrap();
    assert!(
        matches!(event, ProviderEvent::Marked { run, by } if run == id && by == me),
        "{event:?}"
    );
}

#[test]
fn a_job_is_found_claimed_cancelled_and_completed_in_order() {
    let bench = Bench::new();
    let (provider, events) = bench.provider("vm0/small");
    let id = bench.submit("vm0/small");
    assert_eq!(found(&events), id);
    provider.claim(id);
    let ProviderEvent::Claimed(job) = events.recv_timeout(PATIENCE).unwrap() else {
        panic!()
    };
    assert_eq!(job.job.run_id, id);
    bench.queue().cancel(id).unwrap();
    marked(&events, id);
    assert!(
        matches!(events.recv_timeout(PATIENCE).unwrap(), ProviderEvent::Cancelled(run) if run == id)
    );
    provider.complete(JobResult::cancelled(id));
    assert!(
        matches!(events.recv_timeout(PATIENCE).unwrap(), ProviderEvent::Completed(run) if run == id)
    );
    assert_eq!(bench.result(id).exit_code, 137);
}

#[test]
fn a_job_that_was_there_before_the_runner_is_found() {
    let bench = Bench::new();
    let id = bench.submit("vm0/small");
    let (_provider, events) = bench.provider("vm0/small");
    assert_eq!(found(&events), id);
}

#[test]
fn cancelling_before_discovery_or_before_the_claim_answers_without_running() {
    let bench = Bench::new();
    let early = RunId::random();
    bench.queue().cancel(early).unwrap();
    bench
        .queue()
        .submit(&Job::new(fields(early)).unwrap())
        .unwrap();
    let (_provider, events) = bench.provider("vm0/small");
    assert_eq!(
        bench.result(early).error.as_deref(),
        Some("cancelled by user")
    );
    marked(&events, early);
    let waiting = bench.submit("vm0/small");
    assert_eq!(found(&events), waiting);
    bench.queue().cancel(waiting).unwrap();
    marked(&events, waiting);
    assert!(
        matches!(events.recv_timeout(PATIENCE).unwrap(), ProviderEvent::Gone(run) if run == waiting)
    );
    assert_eq!(bench.result(waiting).exit_code, 137);
}

#[test]
fn a_profile_that_nobody_serves_is_answered_and_one_that_another_runner_serves_is_left_to_it() {
    let bench = Bench::new();
    let (_one, one_events) = bench.provider("vm0/small");
    let unserved = bench.submit("vm0/none");
    let result = bench.result(unserved);
    assert!(result.error.unwrap().contains("vm0/none"));
    let (_two, two_events) = bench.provider("vm0/large");
    let large = bench.submit("vm0/large");
    assert_eq!(found(&two_events), large);
    assert_eq!(bench.queue().result(large).unwrap(), None);
    assert!(one_events.try_recv().is_err());
}

#[test]
fn bad_files_are_answered_and_do_not_block_those_behind_them() {
    let bench = Bench::new();
    let bad: Vec<RunId> = (0..3).map(|_| RunId::random()).collect();
    let path = |id: RunId| bench.temp.path().join(format!("{id}.job"));
    std::fs::write(bench.temp.path().join("no-id.job"), b"{}").unwrap();
    let (_provider, events) = bench.provider("vm0/small");
    std::fs::write(path(bad[0]), b"not a job").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", path(bad[1])).unwrap();
    let fifo = std::process::Command::new("mkfifo")
        .arg(path(bad[2]))
        .status();
    assert!(fifo.unwrap().success());
    let good = bench.submit("vm0/small");
    assert_eq!(found(&events), good);
    for id in bad {
        let result = bench.result(id);
        assert_eq!(result.exit_code, 1);
        assert!(result.error.is_some());
        assert!(!path(id).exists());
    }
}

#[test]
fn the_claims_of_a_runner_that_was_killed_are_answered_by_the_next() {
    let bench = Bench::new();
    let id = bench.submit("vm0/small");
    let claims = bench.temp.path().join(".claims");
    let dead = format!("{{\"instance\":\"{}\"}}", RunId::random());
    std::fs::write(claims.join(format!("{id}.claim")), dead).unwrap();
    let (_provider, _events) = bench.provider("vm0/small");
    assert_eq!(
        bench.result(id).error.as_deref(),
        Some("runner stopped while the job was running")
    );
}

#[test]
fn what_cannot_be_removed_under_a_job_s_names_holds_up_neither_its_end_nor_others() {
    let bench = Bench::new();
    let (provider, events) = bench.provider("vm0/small");
    let id = bench.submit("vm0/small");
    assert_eq!(found(&events), id);
    provider.claim(id);
    let event = events.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(event, ProviderEvent::Claimed(_)), "{event:?}");
    // Deeper than anything is removed: as good as somebody else's directory, also for root.
    for name in ["job", "cancel"] {
        let path = bench.temp.path().join(format!("{id}.{name}"));
        let _ = std::fs::remove_file(&path);
        std::fs::create_dir_all(path.join("d/".repeat(300))).unwrap();
    }
    provider.complete(JobResult::exited(id, 0));
    let event = events.recv_timeout(PATIENCE).unwrap();
    assert!(
        matches!(event, ProviderEvent::Completed(run) if run == id),
        "{event:?}"
    );
    assert_eq!(bench.result(id).exit_code, 0);
    for left in ["job", "cancel"].map(|name| format!("{id}.{name}")) {
        assert!(!bench.temp.path().join(&left).exists(), "{left}");
    }
    let claim = bench.temp.path().join(format!(".claims/{id}.claim"));
    assert!(!claim.exists());
}
