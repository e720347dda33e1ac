use std::collections::HashSet;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::super::job::tests::fields;
use super::super::{JobFields, JobState};
use super::*;

struct Group {
    temp: tempfile::TempDir,
}

impl Group {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        std::fs::set_permissions(temp.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        Self { temp }
    }
    fn dir(&self) -> Dir {
        Dir::open(self.temp.path()).unwrap()
    }
    fn submitter(&self) -> GroupQueue {
        GroupQueue::open(self.dir()).unwrap()
    }
    fn runner(&self) -> RunnerQueue {
        let runner = LiveRunner {
            instance: RunId::random().to_string(),
            name: "one".parse().unwrap(),
            pid: std::process::id(),
            profiles: vec!["vm0/small".parse().unwrap()],
        };
        RunnerQueue::open(self.dir(), &runner).unwrap()
    }
    fn path(&self, name: impl AsRef<std::path::Path>) -> PathBuf {
        self.temp.path().join(name)
    }
    fn submit(&self) -> RunId {
        let id = RunId::random();
        self.submitter()
            .submit(&Job::new(fields(id)).unwrap())
            .unwrap();
        id
    }
    /// Nothing but the runner's own files is left.
    fn is_clean(&self) -> bool {
        let mut left: Vec<_> = self.dir().list().unwrap();
        left.retain(|entry| !entry.name.to_str().unwrap().starts_with('.'));
        let claims = self.dir().open_dir(CLAIMS).unwrap().list().unwrap();
        left.is_empty()
            && claims
                .iter()
                .all(|c| c.name.to_str().unwrap().starts_with('.'))
    }
}

fn won(claim: Claim) -> Box<ClaimedJob> {
    match claim {
        Claim::Won(job) => job,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_runner_that_starts_while_another_clears_up_can_claim() {
    let group = Group::new();
    let other = group.runner();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                other.recover(&HashSet::new()).unwrap();
            }
        });
        let claims = std::panic::catch_unwind(|| {
            for _ in 0..100 {
                let (runner, id) = (group.runner(), group.submit());
                won(runner.claim(id).unwrap());
                runner.answer(&JobResult::exited(id, 0)).unwrap();
            }
        });
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        claims.unwrap();
    });
}

#[test]
fn a_job_goes_from_its_submitter_to_a_runner_and_the_answer_comes_back() {
    let group = Group::new();
    let (submitter, runner) = (group.submitter(), group.runner());
    let id = group.submit();
    assert_eq!(runner.scan().unwrap().jobs, [id]);
    let Look::Fresh(head) = runner.look(id, true) else {
        panic!()
    };
    assert_eq!(head.profile.as_str(), "vm0/small");
    let job = won(runner.claim(id).unwrap());
    assert_eq!(job.submitter, rustix::process::geteuid().as_raw());
    assert_eq!(job.job.prompt, "true");
    assert!(matches!(runner.look(id, true), Look::NotOurs));
    assert!(matches!(
        submitter.list().unwrap()[0].state,
        JobState::Running
    ));
    let result = JobResult::exited(id, 0);
    runner.answer(&result).unwrap();
    assert_eq!(submitter.result(id).unwrap(), Some(result));
    assert!(group.is_clean());
    submitter.forget(id);
    assert_eq!(submitter.result(id).unwrap(), None);
}

#[test]
fn names_of_variables_are_compared_whole_and_take_no_room() {
    let of = |names: &[&str]| VariableNames::of(names.iter().copied());
    assert_eq!(of(&["A", "B"]), of(&["B", "A"]));
    assert_eq!(of(&[]), VariableNames::none());
    for other in [&["AB"] as &[&str], &["A"], &["A", "B", "C"], &["A", "C"]] {
        assert_ne!(of(&["A", "B"]), of(other));
    }
    // A group's directory holds any number of jobs, and all of their heads are kept.
    fn is_plain<T: Copy>(_: T) {}
    is_plain(of(&["A"]));

    let mut with = fields(RunId::random());
    with.session_id = Some("s".parse().unwrap());
    let head = |fields: &JobFields| {
        JobHead::of(
            &Job::new(fields.clone()).unwrap(),
            0,
            SystemTime::UNIX_EPOCH,
        )
    };
    let without = head(&with);
    with.environment.insert("A".to_owned(), "1".to_owned());
    assert!(!head(&with).decides_like(&without));
    assert_eq!(head(&with).variables, of(&["A"]));
}

#[test]
fn only_one_of_two_runners_wins_and_an_answered_job_is_never_run_again() {
    let group = Group::new();
    let (one, two) = (group.runner(), group.runner());
    let id = group.submit();
    won(one.claim(id).unwrap());
    assert!(matches!(two.claim(id).unwrap(), Claim::Lost));
    one.answer(&JobResult::exited(id, 0)).unwrap();
    // The second runner had seen the job before it was answered.
    assert!(matches!(two.claim(id).unwrap(), Claim::Lost));
    assert!(group.submitter().result(id).unwrap().is_some());
    assert!(group.is_clean());
}

#[test]
fn files_that_can_never_be_jobs_are_answered_with_the_reason() {
    let group = Group::new();
    let runner = group.runner();
    let outside = tempfile::NamedTempFile::new().unwrap();
    type Make<'a> = Box<dyn Fn(&std::path::Path) + 'a>;
    let make: Vec<(&str, Make<'_>)> = vec![
        (
            "link",
            Box::new(|path| symlink(outside.path(), path).unwrap()),
        ),
        (
            "regular",
            Box::new(|path| {
                let fifo = std::process::Command::new("mkfifo").arg(path).status();
                assert!(fifo.unwrap().success());
            }),
        ),
        (
            "regular",
            Box::new(|path| std::fs::create_dir_all(path.join("x")).unwrap()),
        ),
        (
            "larger",
            Box::new(|path| {
                std::fs::File::create(path)
                    .unwrap()
                    .set_len(1 << 30)
                    .unwrap();
            }),
        ),
        (
            "UTF-8",
            Box::new(|path| std::fs::write(path, b"\xff\xfe{}").unwrap()),
        ),
        (
            "not a valid job",
            Box::new(|path| std::fs::write(path, b"{\"run_id\":").unwrap()),
        ),
        (
            "second name",
            Box::new(|path| {
                std::fs::write(path, b"{}").unwrap();
                std::fs::hard_link(path, path.with_extension("other")).unwrap();
            }),
        ),
        (
            "differ",
            Box::new(|path| {
                let other = Job::new(fields(RunId::random())).unwrap();
                std::fs::write(path, other.to_bytes().unwrap()).unwrap();
            }),
        ),
    ];
    for (expected, make) in make {
        let id = RunId::random();
        make(&group.path(job_name(id)));
        let Look::Bad(reason) = runner.look(id, true) else {
            panic!("{expected}")
        };
        assert!(reason.contains(expected), "{expected}: {reason}");
        let Claim::Bad(reason) = runner.claim(id).unwrap() else {
            panic!("{expected}")
        };
        runner.answer(&JobResult::failed(id, 1, &reason)).unwrap();
        let result = group.submitter().result(id).unwrap().unwrap();
        assert_eq!(result.exit_code, 1);
        let _ = std::fs::remove_file(group.path(format!("{id}.other")));
        assert!(group.is_clean(), "{expected}");
    }
    assert!(outside.path().exists());
}

#[test]
fn a_file_that_makes_no_sense_is_bad_once_it_is_finished_whatever_its_time_says() {
    let group = Group::new();
    let runner = group.runner();
    let id = RunId::random();
    std::fs::write(group.path(job_name(id)), b"{\"run_id\":").unwrap();
    let file = std::fs::File::options()
        .append(true)
        .open(group.path(job_name(id)))
        .unwrap();
    let hour = Duration::from_secs(3600);
    for time in [SystemTime::now() - hour, SystemTime::now() + hour] {
        file.set_modified(time).unwrap();
        let Look::Unfinished { stamp, .. } = runner.look(id, false) else {
            panic!("it may still be being written");
        };
        assert_eq!(stamp, time);
        assert!(matches!(runner.look(id, true), Look::Bad(_)));
    }
}

#[test]
fn a_scan_gives_jobs_in_the_order_of_their_submission() {
    let group = Group::new();
    let runner = group.runner();
    let ids: Vec<RunId> = (0..20).map(|_| group.submit()).collect();
    for (second, id) in (0..).zip(&ids) {
        let file = std::fs::File::options()
            .append(true)
            .open(group.path(job_name(*id)))
            .unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(second))
            .unwrap();
    }
    assert_eq!(runner.scan().unwrap().jobs, ids);
}

#[test]
fn a_cancel_marker_without_a_job_may_be_early_and_is_kept_a_while() {
    let group = Group::new();
    let runner = group.runner();
    let id = RunId::random();
    group.submitter().cancel(id).unwrap();
    let marker = std::fs::File::options()
        .append(true)
        .open(group.path(cancel_name(id)))
        .unwrap();
    // The clock was set: the marker looks a day old and is not.
    marker
        .set_modified(SystemTime::now() - Duration::from_secs(86_400))
        .unwrap();
    let now = Instant::now();
    runner.expire(&mut Unwanted::default(), now).unwrap();
    assert!(
        runner
            .cancelled_by(id, rustix::process::geteuid().as_raw())
            .is_some()
    );
}

#[test]
fn an_answer_that_nobody_fetched_goes_when_it_is_old_and_no_clock_only_says_so() {
    let group = Group::new();
    let runner = group.runner();
    let id = group.submit();
    won(runner.claim(id).unwrap());
    runner.answer(&JobResult::exited(id, 0)).unwrap();
    let day = Duration::from_secs(86_400);
    let result = group.path(format!("{RESULTS}/{}", result_name(id)));
    let file = std::fs::File::options().append(true).open(&result).unwrap();
    file.set_modified(SystemTime::now() - day * 8).unwrap();
    let (mut unwanted, now) = (Unwanted::default(), Instant::now());
    runner.expire(&mut unwanted, now).unwrap();
    assert!(result.exists(), "it has only just been seen");
    runner.expire(&mut unwanted, now + day).unwrap();
    assert!(!result.exists());
}

#[test]
fn the_claims_of_a_dead_runner_are_answered_once_and_those_of_a_live_one_are_not() {
    let group = Group::new();
    let (dead, live, other) = (group.runner(), group.runner(), group.runner());
    let (orphan, running) = (group.submit(), group.submit());
    won(dead.claim(orphan).unwrap());
    won(live.claim(running).unwrap());
    drop(dead);
    assert_eq!(other.recover(&HashSet::new()).unwrap(), [orphan]);
    assert_eq!(other.recover(&HashSet::new()).unwrap(), []);
    let result = group.submitter().result(orphan).unwrap().unwrap();
    assert_eq!(
        result.error.as_deref(),
        Some("runner stopped while the job was running")
    );
    assert_eq!(group.submitter().result(running).unwrap(), None);
    assert_eq!(group.submitter().live_runners().unwrap().len(), 2);
}

#[test]
fn a_runner_killed_between_its_answer_and_the_clean_up_keeps_its_answer() {
    let group = Group::new();
    let dead = group.runner();
    let id = group.submit();
    won(dead.claim(id).unwrap());
    let answer = serde_json::to_vec(&JobResult::exited(id, 7)).unwrap();
    dead.results
        .write_atomic(result_name(id), 0o644, &answer)
        .unwrap();
    drop(dead);
    group.runner().recover(&HashSet::new()).unwrap();
    let result = group.submitter().result(id).unwrap().unwrap();
    assert_eq!(result.exit_code, 7);
    assert!(group.is_clean());
}

#[test]
fn what_a_killed_runner_was_writing_goes_when_nobody_else_may_be_writing_it() {
    let group = Group::new();
    let runner = group.runner();
    let half = [".results/.tmp-1", ".claims/.tmp-2"].map(|name| group.path(name));
    for path in &half {
        std::fs::write(path, "{").unwrap();
    }
    let other = group.runner();
    runner.recover(&HashSet::new()).unwrap();
    assert!(half.iter().all(|path| path.exists()));
    drop(other);
    runner.recover(&HashSet::new()).unwrap();
    assert!(!half.iter().any(|path| path.exists()));
}

#[test]
fn planted_claims_and_results_do_not_cheat() {
    let group = Group::new();
    let runner = group.runner();
    for text in [
        String::new(),
        "\u{0}garbage".to_owned(),
        "{\"instance\":\"../../x\"}".to_owned(),
        format!("{{\"instance\":\"{}\"}}", runner.instance),
    ] {
        let id = group.submit();
        std::fs::write(group.path(format!("{CLAIMS}/{}", claim_name(id))), text).unwrap();
        assert_eq!(runner.recover(&HashSet::new()).unwrap(), [id]);
        assert_eq!(group.submitter().result(id).unwrap().unwrap().exit_code, 1);
    }
    let id = group.submit();
    let planted = serde_json::to_vec(&JobResult::exited(id, 0)).unwrap();
    std::fs::write(
        group.path(format!("{RESULTS}/{}", result_name(id))),
        planted,
    )
    .unwrap();
    won(runner.claim(id).unwrap());
    assert_eq!(group.submitter().result(id).unwrap(), None);
}

#[test]
fn a_directory_planted_before_the_first_runner_is_put_aside() {
    let group = Group::new();
    std::fs::create_dir(group.path(RESULTS)).unwrap();
    let open = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(group.path(RESULTS), open).unwrap();
    let runner = group.runner();
    let id = group.submit();
    won(runner.claim(id).unwrap());
    runner.answer(&JobResult::exited(id, 0)).unwrap();
    assert!(group.submitter().result(id).unwrap().is_some());
}

#[test]
fn a_job_is_withdrawn_only_while_nobody_has_it() {
    let group = Group::new();
    let runner = group.runner();
    let (free, taken) = (group.submit(), group.submit());
    won(runner.claim(taken).unwrap());
    assert!(group.submitter().withdraw(free).unwrap());
    assert!(!group.submitter().withdraw(taken).unwrap());
    assert!(matches!(runner.claim(free).unwrap(), Claim::Lost));
}

#[test]
fn only_the_submitter_the_owner_and_root_cancel() {
    let group = Group::new();
    let runner = group.runner();
    let id = group.submit();
    let me = rustix::process::geteuid().as_raw();
    assert_eq!(runner.cancelled_by(id, me), None);
    group.submitter().cancel(id).unwrap();
    assert!(runner.cancelled_by(id, me).is_some());
    if me == 0 {
        let marker = group.path(cancel_name(id));
        std::os::unix::fs::chown(&marker, Some(12_345), None).unwrap();
        assert_eq!(runner.cancelled_by(id, me), None);
        assert!(runner.cancelled_by(id, 12_345).is_some());
    }
    let link = RunId::random();
    symlink("/etc/passwd", group.path(cancel_name(link))).unwrap();
    assert_eq!(runner.cancelled_by(link, me), None);
}

#[test]
fn a_runner_that_has_no_descriptors_left_refuses_no_job() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    // In a process of its own, whose limit is no other test's.
    let name = "a_runner_that_has_no_descriptors_left_refuses_no_job";
    if crate::test_alone::elsewhere(module_path!(), name, |_| {}) {
        return;
    }
    let group = Group::new();
    let runner = group.runner();
    let id = group.submit();
    let before = getrlimit(Resource::Nofile);
    let none = Rlimit {
        current: Some(0),
        ..before
    };
    setrlimit(Resource::Nofile, none).unwrap();
    let (look, claim) = (runner.look(id, true), runner.claim(id));
    let read = runner.read_job(id);
    setrlimit(Resource::Nofile, before).unwrap();
    assert!(matches!(look, Look::NotOurs), "{look:?}");
    assert!(claim.is_err(), "{claim:?}");
    // As a claim finds it that the last descriptors were enough for.
    assert!(matches!(read, ReadJob::NotNow(_)), "{read:?}");
    assert!(matches!(runner.look(id, true), Look::Fresh(_)));
    won(runner.claim(id).unwrap());
}
