//! Replicas for tests: within the process, or as the real program.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use api_types::client::{Run, RunPage};
use api_types::runner::{ExecutionContext, Offer, Polled};
use api_types::{Problem, ProblemKind, RunId, RunnerId};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use web_api::clock::Clock;
use web_api::engine::Engine;
use web_api::service::{Config, Service, Tasks};
use web_api::tokens::{BearerKind, Bearers, MasterKey, MasterKeys, new_bearer};

use crate::nats::{GUARD, Kind, Nats, address};

pub(crate) const GROUP: &str = "vm0/demo";

/// NATS with tokens and a master key.
pub(crate) struct World {
    pub(crate) nats: Nats,
    pub(crate) key_file: PathBuf,
    pub(crate) client: String,
    pub(crate) runner: String,
    pub(crate) operator: String,
    pub(crate) other_client: String,
    pub(crate) other_runner: String,
}

/// A replica within this process.
pub(crate) struct Replica {
    pub(crate) url: String,
    pub(crate) service: Arc<Service>,
    pub(crate) clock: Clock,
    server: tokio::task::JoinHandle<()>,
    _tasks: Tasks,
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.server.abort();
    }
}

pub(crate) async fn open(nats: &Nats) -> Engine {
    // A cluster elects its leaders first.
    for _ in 0..100 {
        if let Ok(engine) = Engine::open(&nats.settings()).await {
            return engine;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Engine::open(&nats.settings()).await.unwrap()
}

impl World {
    pub(crate) async fn new(kind: Kind) -> Result<Self, String> {
        let nats = Nats::start(kind)?;
        let engine = open(&nats).await;
        let bearers = Bearers::new(engine.tokens.clone());
        let mut tokens = Vec::new();
        for (kind, group) in [
            (BearerKind::Client, GROUP),
            (BearerKind::Runner, GROUP),
            (BearerKind::Operator, GROUP),
            (BearerKind::Client, "vm0/other"),
            (BearerKind::Runner, "vm0/other"),
        ] {
            let groups = BTreeSet::from([group.parse().unwrap()]);
            let (token, id, record) = new_bearer(kind, "test", groups, 0).unwrap();
            bearers.add(&id, &record).await.unwrap();
            tokens.push(token);
        }
        let key_file = nats.dir().join("master.key");
        MasterKey::write_new(&key_file).unwrap();
        let [client, runner, operator, other_client, other_runner] = tokens.try_into().unwrap();
        Ok(Self {
            nats,
            key_file,
            client,
            runner,
            operator,
            other_client,
            other_runner,
        })
    }

    pub(crate) async fn replica(&self, config: Config) -> Replica {
        self.skewed_replica(config, 0).await
    }

    pub(crate) async fn skewed_replica(&self, config: Config, skew_ms: i64) -> Replica {
        let master = MasterKey::read(&self.key_file).unwrap();
        self.replica_with(master, config, skew_ms).await
    }

    pub(crate) async fn replica_with(
        &self,
        masters: impl Into<MasterKeys>,
        config: Config,
        skew_ms: i64,
    ) -> Replica {
        let engine = open(&self.nats).await;
        let clock = Clock::skewed(skew_ms);
        let (service, tasks) = Service::start(engine, masters, clock.clone(), config)
            .await
            .unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let app = web_api::http::router(Arc::clone(&service));
        let server = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        let replica = Replica {
            url,
            service,
            clock,
            server,
            _tasks: tasks,
        };
        eventually("the replica is ready", || async {
            replica.service.is_ready()
        })
        .await;
        replica
    }

    /// The real program.
    pub(crate) fn process(&self, extra: &[&str]) -> Process {
        let mut guard = Command::new("sh")
            .args(["-c", GUARD, "guard", env!("CARGO_BIN_EXE_vm0-api"), "serve"])
            .arg("--listen")
            .arg(format!("{}:0", address()))
            .arg("--master-key")
            .arg(&self.key_file)
            .args(extra)
            .env("VM0_NATS_URL", self.nats.url())
            .env("VM0_NATS_SYSTEM_URL", self.nats.system_url())
            .env("VM0_API_LOG", "error")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut url, mut pid) = (None, 0);
        for line in BufReader::new(guard.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            if let Some(text) = line.strip_prefix("pid ") {
                pid = text.parse().unwrap();
            }
            if let Some(at) = line.strip_prefix("listening on ") {
                url = Some(at.to_owned());
                break;
            }
        }
        Process {
            url: url.expect("vm0-api says where it listens"),
            pid,
            pipe: guard.stdin.take(),
            guard,
        }
    }

    pub(crate) fn as_client<'a>(&'a self, url: &'a str) -> Api<'a> {
        Api::new(url, &self.client)
    }

    pub(crate) fn as_runner<'a>(&'a self, url: &'a str) -> Api<'a> {
        Api::new(url, &self.runner)
    }
}

/// A `vm0-api`.
pub(crate) struct Process {
    pub(crate) url: String,
    pub(crate) pid: u32,
    guard: Child,
    pipe: Option<ChildStdin>,
}

impl Process {
    /// kill -9.
    pub(crate) fn kill(mut self) {
        drop(self.pipe.take());
        self.guard.wait().unwrap();
        let process = format!("/proc/{}", self.pid);
        assert!(!std::path::Path::new(&process).exists());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.pipe.take());
        let _ = self.guard.wait();
    }
}

/// Asks until it is so; a minute at most.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, so: impl Fn() -> F) {
    let begin = std::time::Instant::now();
    while !so().await {
        assert!(begin.elapsed() < Duration::from_secs(60), "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Somebody with a token.
#[derive(Clone)]
pub(crate) struct Api<'a> {
    pub(crate) url: &'a str,
    pub(crate) token: String,
    pub(crate) http: reqwest::Client,
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) body: Value,
}

impl Answer {
    pub(crate) fn problem(&self) -> ProblemKind {
        let problem: Problem = serde_json::from_value(self.body.clone())
            .unwrap_or_else(|_| panic!("no problem document: {self:?}"));
        assert_eq!(problem.status, self.status.as_u16());
        problem.code
    }

    pub(crate) fn ok<T: serde::de::DeserializeOwned>(self) -> T {
        assert!(self.status.is_success(), "{self:?}");
        serde_json::from_value(self.body).unwrap()
    }
}

impl<'a> Api<'a> {
    pub(crate) fn new(url: &'a str, token: &str) -> Self {
        Self {
            url,
            token: token.to_owned(),
            http: reqwest::Client::new(),
        }
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http
            .request(method, format!("{}{path}", self.url))
            .bearer_auth(&self.token)
    }

    pub(crate) async fn try_send(&self, request: RequestBuilder) -> Result<Answer, reqwest::Error> {
        let response = request.send().await?;
        let status = response.status();
        let text = response.text().await?;
        Ok(Answer {
            status,
            body: serde_json::from_str(&text).unwrap_or(Value::String(text)),
        })
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.try_send(self.request(Method::GET, path))
            .await
            .unwrap()
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.try_send(self.request(Method::POST, path).json(&body))
            .await
            .unwrap()
    }

    pub(crate) async fn post_owned(&self, path: String, body: Value) -> Answer {
        self.post(&path, body).await
    }

    pub(crate) async fn put(&self, path: &str, body: Value) -> Answer {
        self.try_send(self.request(Method::PUT, path).json(&body))
            .await
            .unwrap()
    }

    pub(crate) async fn stream(&self, path: &str, last: Option<&str>) -> Response {
        let mut request = self.request(Method::GET, path);
        if let Some(last) = last {
            request = request.header("Last-Event-ID", last);
        }
        request.send().await.unwrap()
    }

    pub(crate) async fn create(&self, more: Value) -> Run {
        self.post("/api/runs", run(more)).await.ok()
    }

    pub(crate) async fn run(&self, run: RunId) -> Run {
        self.get(&format!("/api/runs/{run}")).await.ok()
    }

    /// Waits until the replica has heard by its watch of NATS that the run is done: what it wrote itself it knows sooner.
    pub(crate) async fn hears_of_the_end(&self, run: RunId) {
        eventually("the list tells it", || async {
            let page: RunPage = self.get("/api/runs?state=done").await.ok();
            page.runs.iter().any(|listed| listed.run_id == run)
        })
        .await;
    }

    pub(crate) async fn poll(&self, runner: RunnerId, wait_secs: u64) -> Option<Offer> {
        let body = json!({"runnerId": runner, "group": GROUP, "profiles": ["vm0/small"], "waitSecs": wait_secs});
        self.post("/api/runners/poll", body)
            .await
            .ok::<Polled>()
            .job
    }

    pub(crate) async fn try_claim(&self, runner: RunnerId, run: RunId) -> Answer {
        let body =
            json!({"runnerId": runner, "runnerName": "metal-1", "claimId": RunnerId::random()});
        self.post(&format!("/api/runners/jobs/{run}/claim"), body)
            .await
    }

    pub(crate) async fn claim(&self, runner: RunnerId, run: RunId) -> ExecutionContext {
        self.try_claim(runner, run).await.ok()
    }

    pub(crate) async fn job(&self, run: RunId, verb: &str, body: Value) -> Answer {
        self.post(&format!("/api/runners/jobs/{run}/{verb}"), body)
            .await
    }

    pub(crate) async fn complete(&self, runner: RunnerId, run: RunId, epoch: u64) -> Answer {
        let body = json!({"runnerId": runner, "epoch": epoch, "exitCode": 0});
        self.job(run, "complete", body).await
    }
}

/// A body that makes a run.
pub(crate) fn run(more: Value) -> Value {
    let mut body = json!({"group": GROUP, "profile": "vm0/small", "prompt": "true"});
    for (key, value) in more.as_object().cloned().unwrap_or_default() {
        body[key] = value;
    }
    body
}

/// Reads server-sent events until this many are there, or the end.
pub(crate) async fn read_events(response: Response, most: usize) -> Vec<Seen> {
    use futures_util::StreamExt as _;
    assert!(response.status().is_success(), "{:?}", response.status());
    let mut bytes = response.bytes_stream();
    let (mut text, mut seen) = (String::new(), Vec::new());
    while let Some(Ok(chunk)) = bytes.next().await {
        text.push_str(std::str::from_utf8(&chunk).unwrap());
        while let Some((event, rest)) = text.split_once("\n\n") {
            let field = |name: &str| {
                event
                    .lines()
                    .find_map(|line| line.strip_prefix(&format!("{name}: ")))
                    .map(str::to_owned)
            };
            if let Some(name) = field("event") {
                seen.push(Seen {
                    id: field("id"),
                    name,
                    data: serde_json::from_str(&field("data").unwrap()).unwrap(),
                });
            }
            text = rest.to_owned();
            if seen.len() >= most {
                return seen;
            }
        }
    }
    seen
}

/// A server-sent event.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) id: Option<String>,
    pub(crate) name: String,
    pub(crate) data: Value,
}
