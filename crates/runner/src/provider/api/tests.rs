//! Answers that were left, taken and refused, over HTTP to an API that a test scripts.

mod claims;
mod logs;

use api_types::runner::{HeartbeatAnswer, LeaseAnswer};
use api_types::{Problem, ProblemKind};
use host::fs::LockKind;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use zeroize::Zeroizing;

use super::*;
use crate::queue::VariableNames;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the API says to the n-th completion: `None` takes it.
type Script = fn(u64) -> Option<ProblemKind>;

/// One request as JSON, or nothing if the connection was given up.
async fn request(stream: &mut tokio::net::TcpStream) -> Option<(String, Value)> {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                let found = name.eq_ignore_ascii_case("content-length");
                found.then(|| value.trim().parse::<usize>().ok())?
            });
            if body.len() >= length.unwrap_or(0) {
                let path = head.split(' ').nth(1)?.to_owned();
                return Some((path, serde_json::from_str(body).unwrap_or_default()));
            }
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
}

/// One request, in the test's hands.
struct Asked {
    path: String,
    body: Value,
    answer: oneshot::Sender<(u16, String)>,
}

impl Asked {
    fn answer(self, body: &impl Serialize) {
        let body = serde_json::to_string(body).unwrap();
        // A runner that has stopped listening needs no answer.
        let _ = self.answer.send((200, body));
    }

    fn refuse(self, kind: ProblemKind) {
        let problem = Problem::new(kind, "scripted");
        let body = serde_json::to_string(&problem).unwrap();
        let _ = self.answer.send((problem.status, body));
    }

    /// Of a heartbeat: this is what became of the leases.
    fn take_heartbeat(self, leases: Vec<LeaseAnswer>) {
        let lease_secs = 60;
        self.answer(&HeartbeatAnswer { leases, lease_secs });
    }
}

/// Serves until the runtime ends; what is answered is the test's to say.
async fn open_api() -> (ApiSettings, mpsc::UnboundedReceiver<Asked>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (ask, asked) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let ask = ask.clone();
            tokio::spawn(async move {
                let Some((path, body)) = request(&mut stream).await else {
                    return;
                };
                let (answer, answered) = oneshot::channel();
                let _ = ask.send(Asked { path, body, answer });
                let Ok((status, body)) = answered.await else {
                    return;
                };
                let length = body.len();
                let head = format!(
                    "HTTP/1.1 {status} x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
                );
                let _ = stream.write_all((head + &body).as_bytes()).await;
            });
        }
    });
    let settings = ApiSettings {
        url: url.parse().unwrap(),
        token: Zeroizing::new("vm0_runner_a_b".to_owned()),
    };
    (settings, asked)
}

/// Serves until the runtime ends; tells of every completion.
async fn api(script: Script) -> (ApiSettings, mpsc::UnboundedReceiver<Value>) {
    let (settings, mut asked) = open_api().await;
    let (tell, completions) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut count = 0;
        while let Some(asked) = asked.recv().await {
            if !asked.path.ends_with("/complete") {
                asked.take_heartbeat(Vec::new());
                continue;
            }
            let _ = tell.send(asked.body.clone());
            match script(count) {
                None => asked.answer(&()),
                Some(kind) => asked.refuse(kind),
            }
            count += 1;
        }
    });
    (settings, completions)
}

fn runner(instance: &str) -> ApiRunner {
    ApiRunner {
        name: "demo".parse().unwrap(),
        instance: instance.to_owned(),
        group: "vm0/demo".parse().unwrap(),
        // It takes no runs: these tests are about those that have ended.
        profiles: Vec::new(),
        max_concurrent: 0,
        submitter: 0,
        networks: None,
    }
}

/// What an offer says of a run.
pub(super) fn head(run: RunId) -> JobHead {
    JobHead {
        run_id: run,
        profile: "vm0/small".parse().unwrap(),
        session_id: None,
        variables: VariableNames::none(),
        submitter: 0,
        submitted: discover::now(),
    }
}

/// A home with an answer that instance `old` left; the directory of that instance.
fn left(home: &Home) -> (Spooled, Dir) {
    let name = "demo".parse().unwrap();
    let answer = Spooled {
        runner_id: RunnerId::random(),
        epoch: 3,
        logs: LogStarts::default(),
        result: JobResult::failed(RunId::random(), 7, "it ended"),
    };
    let spool = Spool::open(home, &name, "old").unwrap();
    spool.keep(&answer).unwrap();
    let instance = home.ensure_dir(crate::home::rel::instances(&name).join("old"));
    (answer, instance.unwrap())
}

fn spooled(home: &Home) -> usize {
    let spool = home.ensure_dir(crate::home::rel::runner(&"demo".parse().unwrap()).join("spool"));
    spool.unwrap().list().unwrap().len()
}

async fn settled(provider: &ApiProvider) {
    let nothing_left = async {
        while provider.0.lock().undelivered > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, nothing_left).await.unwrap();
}

async fn next(completions: &mut mpsc::UnboundedReceiver<Value>) -> Value {
    let next = tokio::time::timeout(PATIENCE, completions.recv());
    next.await.unwrap().unwrap()
}

/// A home that goes with its directory.
fn home() -> (tempfile::TempDir, Home) {
    let top = tempfile::tempdir().unwrap();
    let home = Home::open_or_create(&top.path().join("home")).unwrap();
    (top, home)
}

#[tokio::test]
async fn an_answer_of_an_instance_that_ends_later_is_brought_in_its_name() {
    let (_top, home) = home();
    let (answer, old) = left(&home);
    let alive = old.lock("lock", LockKind::Exclusive, 0o600).unwrap();
    let (settings, mut completions) = api(|_| None).await;
    let provider = ApiProvider::start(settings, &home, runner("new"), |_| {}).unwrap();
    let contact = async {
        while provider.0.lock().last_contact.is_none() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, contact).await.unwrap();
    assert_eq!(spooled(&home), 1, "its instance lives, so it is not ours");
    assert_eq!(provider.0.lock().undelivered, 0);

    drop(alive);
    provider.0.beat.notify_one();
    let brought = next(&mut completions).await;
    assert_eq!(brought["runnerId"], answer.runner_id.to_string());
    assert_eq!(brought["epoch"], 3);
    assert_eq!(brought["exitCode"], 7);
    settled(&provider).await;
    assert_eq!(spooled(&home), 0);
    provider.finish().await;
    assert!(completions.try_recv().is_err(), "it is brought once");
}

#[tokio::test]
async fn every_heartbeat_that_is_taken_is_told_also_of_a_runner_without_work() {
    let (_top, home) = home();
    let (settings, _completions) = api(|_| None).await;
    let (told, mut changes) = tokio::sync::mpsc::unbounded_channel();
    let tell = move |event| {
        if matches!(event, ProviderEvent::Changed) {
            // After the test has ended nobody listens.
            let _ = told.send(());
        }
    };
    let provider = ApiProvider::start(settings, &home, runner("idle"), tell).unwrap();
    let mut before = None;
    for _ in 0..2 {
        let change = tokio::time::timeout(PATIENCE, changes.recv()).await;
        change.expect("nothing was told").unwrap();
        let contact = provider.0.lock().last_contact;
        assert!(contact.is_some() && contact > before, "{contact:?}");
        before = contact;
        provider.0.beat.notify_one();
    }
    provider.finish().await;
}

#[tokio::test]
async fn a_heartbeat_that_hangs_is_given_up_long_before_its_leases_end() {
    let (_top, home) = home();
    let (settings, mut asked) = open_api().await;
    let provider = ApiProvider::start(settings, &home, runner("new"), |_| {}).unwrap();
    let first = asked.recv().await.unwrap();
    // Short leases, so that it does not take long here.
    first.answer(&HeartbeatAnswer {
        leases: Vec::new(),
        lease_secs: 8,
    });
    let _hanging = asked.recv().await.unwrap();
    // Less than any other call has.
    let next = tokio::time::timeout(PATIENCE, asked.recv()).await;
    next.expect("nothing comes after it").unwrap();
    let failed = provider.0.lock().error.clone();
    assert!(failed.is_some(), "it was not given up");
}

#[tokio::test]
async fn an_answer_is_brought_again_until_it_is_taken() {
    let (_top, home) = home();
    left(&home);
    let (settings, mut completions) = api(|n| (n < 2).then_some(ProblemKind::Unavailable)).await;
    let provider = ApiProvider::start(settings, &home, runner("new"), |_| {}).unwrap();
    let first = next(&mut completions).await;
    assert_eq!(spooled(&home), 1, "it stays on disk while it is not taken");
    for _ in 0..2 {
        assert_eq!(next(&mut completions).await, first);
    }
    settled(&provider).await;
    assert_eq!(spooled(&home), 0);
    provider.finish().await;
    assert!(completions.try_recv().is_err(), "nothing after it is taken");
}

#[tokio::test]
async fn an_answer_of_a_lease_that_was_lost_is_dropped() {
    let (_top, home) = home();
    left(&home);
    let (settings, mut completions) = api(|_| Some(ProblemKind::LeaseLost)).await;
    let provider = ApiProvider::start(settings, &home, runner("new"), |_| {}).unwrap();
    next(&mut completions).await;
    settled(&provider).await;
    assert_eq!(spooled(&home), 0);
    provider.finish().await;
    assert!(completions.try_recv().is_err(), "it is not asked again");
}

#[tokio::test]
async fn a_run_is_not_claimed_while_an_answer_of_it_is_on_its_way() {
    let (_top, home) = home();
    let (answer, old) = left(&home);
    let alive = old.lock("lock", LockKind::Exclusive, 0o600).unwrap();
    let (settings, mut completions) = api(|_| Some(ProblemKind::Unavailable)).await;
    let (tell, mut told) = mpsc::unbounded_channel();
    let told_too = move |event| {
        let _ = tell.send(event);
    };
    let provider = ApiProvider::start(settings, &home, runner("new"), told_too).unwrap();
    let run = answer.result.run_id;
    provider.0.lock().offered.insert(run, head(run));
    drop(alive);
    provider.0.adopt();
    next(&mut completions).await;
    provider.claim(run);
    let event = tokio::time::timeout(PATIENCE, told.recv()).await.unwrap();
    assert!(
        matches!(event, Some(ProviderEvent::Lost(lost)) if lost == run),
        "{event:?}"
    );
    assert_eq!(spooled(&home), 1, "and the answer is still there");
}
