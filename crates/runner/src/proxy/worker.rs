//! One worker: a mitmdump that is started, asked whether it listens, told who is who, and started again when it dies.
//!
//! ```text
//! start ─▶ listening ─▶ told all registrations ─▶ ready ─ it died, or broke its protocol ─▶ down ─ pause ─▶ start
//! ```
//!
//! Jobs go on meanwhile: their connections are refused until it is ready again, on the same port.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use host::launcher::{CgroupLimits, Launcher, LauncherError, ServiceId, ServiceSpec};
use policy::Policy;
use policy::wire::{FromProxy, Request};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, timeout};

use super::channel::{Channel, ChannelError};
use crate::network::{Registration, Registrations};

/// How long mitmdump may take to listen: half a second on an idle host, more when many things start at once.
const START_LIMIT: Duration = Duration::from_secs(90);
/// First pause after a death, doubled with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A worker that lived this long died for a new reason.
const SETTLED: Duration = Duration::from_secs(60);
/// How often a worker is asked whether it still works: one that hangs does so for all of its jobs.
const PING_PERIOD: Duration = Duration::from_secs(5);
/// A worker that does not answer that is as good as dead, and is ended.
const PING_LIMIT: Duration = Duration::from_secs(30);
/// How long an order may take: longer than it takes to find out that the worker hangs.
const ORDER_LIMIT: Duration = Duration::from_secs(60);
/// Where the worker sees its files.
const SHOWN: &str = "/proxy";
/// And the authorities it trusts upstream.
const TRUSTED: &str = "/trusted.crt";
/// Memory limit of one worker, bytes: 93 MB after its start, and bounded work for each connection.
const MEMORY_MAX: u64 = 1 << 30;

/// How a worker is.
#[derive(Clone, Debug)]
pub(crate) enum State {
    /// On its way up.
    Starting,
    /// It listens and knows everybody.
    Ready(Channel),
    /// It died and will be started again.
    Down(String),
}

/// What a worker is started from.
#[derive(Debug)]
pub(super) struct Plan {
    /// Which service it is.
    pub(super) service: ServiceId,
    /// Where it listens, on every address of the hub.
    pub(super) port: u16,
    /// The directory that holds `venv` and `addon`.
    pub(super) files: OwnedFd,
    /// Key and certificate, sealed.
    pub(super) authority: OwnedFd,
    /// Whom it trusts upstream: a bundle as it sees it, or nothing for its own.
    pub(super) trusted: Option<PathBuf>,
    /// The address at which it asks for names.
    pub(super) resolver: Ipv4Addr,
}

/// Keeps a worker running until `state` has no reader any more.
pub(super) async fn keep(
    plan: Plan,
    launcher: Launcher,
    registrations: Arc<Registrations>,
    state: watch::Sender<State>,
) {
    let mut pause = FIRST_PAUSE;
    while !state.is_closed() {
        let started = Instant::now();
        let died = run_once(&plan, &launcher, &registrations, &state).await;
        let why = match died {
            Err(LauncherError::Gone) => return,
            Err(error) => error.to_string(),
            Ok(why) => why,
        };
        tracing::error!(
            worker = plan.service.0,
            why,
            "the proxy ended and is started again"
        );
        state.send_replace(State::Down(why));
        // What it left is reaped before the next one takes its place.
        if let Err(error) = launcher.kill_service(plan.service).await {
            tracing::warn!(%error, "a dead proxy cannot be cleaned up after");
        }
        if started.elapsed() > SETTLED {
            pause = FIRST_PAUSE;
        }
        sleep(pause).await;
        pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
    }
}

/// From its start to its end; says why it ended.
async fn run_once(
    plan: &Plan,
    launcher: &Launcher,
    registrations: &Arc<Registrations>,
    state: &watch::Sender<State>,
) -> Result<String, LauncherError> {
    let step = |step: &str, error: std::io::Error| LauncherError::Step {
        step: step.to_owned(),
        message: error.to_string(),
    };
    let (ours, theirs) = UnixStream::pair().map_err(|e| step("connect the proxy", e))?;
    let spec = spec(plan, theirs).map_err(|e| step("prepare the proxy", e))?;
    launcher.launch_service(spec).await?;

    let (listening, listens) = oneshot::channel();
    let mut listening = Some(listening);
    let lines = Arc::clone(registrations);
    let hear = move |message| match message {
        FromProxy::Log {
            address,
            generation,
            line,
        } => lines.write(address, Some(generation), &line),
        FromProxy::Listening { .. } => {
            if let Some(listening) = listening.take() {
                let _ = listening.send(());
            }
        }
        FromProxy::Answer { .. } => {}
    };
    let channel = Channel::start(ours, hear).map_err(|e| step("speak to the proxy", e))?;
    match timeout(START_LIMIT, listens).await {
        Ok(Ok(())) => {}
        Ok(Err(_)) => return Ok("it ended before it listened".to_owned()),
        Err(_) => {
            return Ok(format!(
                "it did not listen within {} s",
                START_LIMIT.as_secs()
            ));
        }
    }
    if tell_all(&channel, registrations).await.is_err() {
        return Ok("it ended while it was told who is who".to_owned());
    }
    state.send_replace(State::Ready(channel.clone()));
    tracing::info!(
        worker = plan.service.0,
        port = plan.port,
        "the proxy listens"
    );
    tokio::select! {
        () = channel.closed() => {}
        () = hangs(&channel, PING_PERIOD, PING_LIMIT) => return Ok(silent(PING_LIMIT)),
        reaped = launcher.wait_service(plan.service) => {
            let reaped = reaped?;
            return Ok(match (reaped.code, reaped.signal) {
                _ if reaped.oom_killed => "it ran out of memory".to_owned(),
                (Some(code), _) => format!("it exited with code {code}"),
                (None, Some(signal)) => format!("signal {signal} killed it"),
                (None, None) => "it died".to_owned(),
            });
        }
    }
    Ok("it closed its connection to the runner".to_owned())
}

/// Resolves when a worker does not answer within a limit. One that is gone is not this one's matter.
async fn hangs(channel: &Channel, period: Duration, limit: Duration) {
    loop {
        sleep(period).await;
        match timeout(limit, channel.ask(&Request::Ping)).await {
            Err(_) => return,
            Ok(Err(ChannelError::Closed)) => std::future::pending().await,
            Ok(Err(error)) => tracing::warn!(%error, "the proxy cannot be asked how it is"),
            Ok(Ok(())) => {}
        }
    }
}

fn silent(limit: Duration) -> String {
    format!("it did not answer within {} s", limit.as_secs())
}

/// Tells a worker everything, until it knows what holds now: jobs end, and policies change, while it is told. Those who
/// come or change afterwards find it ready: between the last look and the announcement nobody else's turn comes.
async fn tell_all(channel: &Channel, registrations: &Registrations) -> Result<(), ChannelError> {
    let mut told: HashMap<(Ipv4Addr, u64), Arc<Policy>> = HashMap::new();
    loop {
        let current = registrations.all();
        let key = |registration: &Registration| (registration.address, registration.generation);
        let ended = told
            .keys()
            .find(|known| {
                !current
                    .iter()
                    .any(|registration| key(registration) == **known)
            })
            .copied();
        let news = current.iter().find(|registration| {
            told.get(&key(registration))
                .is_none_or(|policy| !Arc::ptr_eq(policy, &registration.decides))
        });
        let answer = if let Some((address, generation)) = ended {
            told.remove(&(address, generation));
            let request = Request::Unregister {
                address,
                generation,
            };
            ask(channel, &request).await
        } else if let Some(registration) = news {
            told.insert(key(registration), Arc::clone(&registration.decides));
            register(channel, registration).await
        } else {
            return Ok(());
        };
        match answer {
            Err(ChannelError::Closed) => return Err(ChannelError::Closed),
            Err(error) => tracing::warn!(%error, "the proxy does not take a registration"),
            Ok(()) => {}
        }
    }
}

/// Tells a worker who is behind an address.
pub(super) async fn register(
    channel: &Channel,
    registration: &Registration,
) -> Result<(), ChannelError> {
    let run = registration.run.to_string();
    let request = Request::Register {
        address: registration.address,
        generation: registration.generation,
        run_id: &run,
        policy: &registration.decides,
        secrets: &registration.secrets,
    };
    ask(channel, &request).await
}

/// Has an order carried out, within a limit.
pub(super) async fn ask(channel: &Channel, request: &Request<'_>) -> Result<(), ChannelError> {
    match timeout(ORDER_LIMIT, channel.ask(request)).await {
        Ok(answer) => answer,
        Err(_) => Err(ChannelError::Refused(silent(ORDER_LIMIT))),
    }
}

fn spec(plan: &Plan, socket: UnixStream) -> std::io::Result<ServiceSpec> {
    let (complaints, complains) = std::io::pipe()?;
    tell_complaints(plan.service, complaints)?;
    let mut args: Vec<String> = [
        "-I",
        "/proxy/venv/bin/mitmdump",
        "--mode",
        "transparent",
        "--listen-host",
        "0.0.0.0",
        "--listen-port",
    ]
    .map(str::to_owned)
    .to_vec();
    args.push(plan.port.to_string());
    let mut shown = vec![(plan.files.try_clone()?, PathBuf::from(SHOWN))];
    if let Some(path) = &plan.trusted {
        // Opened anew for each start: the host's list changes.
        shown.push((File::open(path)?.into(), PathBuf::from(TRUSTED)));
    }
    let trusted = plan.trusted.as_ref().map(|_| TRUSTED);
    for (name, value) in [
        ("connection_strategy", "lazy"),
        ("upstream_cert", "false"),
        ("websocket", "false"),
        ("termlog_verbosity", "warn"),
        ("flow_detail", "0"),
    ]
    .into_iter()
    .chain(trusted.map(|path| ("ssl_verify_upstream_trusted_ca", path)))
    {
        args.push("--set".to_owned());
        args.push(format!("{name}={value}"));
    }
    args.extend(["-s", "/proxy/addon/mitm_addon.py"].map(str::to_owned));
    let environment = [
        ("PATH", "/usr/bin:/bin"),
        ("HOME", "/nonexistent"),
        ("LC_ALL", "C.UTF-8"),
        // Its threads are few and short-lived; arenas for each only keep memory.
        ("MALLOC_ARENA_MAX", "2"),
    ];
    Ok(ServiceSpec {
        service: plan.service,
        program: PathBuf::from("/proxy/venv/bin/python"),
        args: args.into_iter().map(Into::into).collect(),
        environment: environment
            .map(|(name, value)| (name.into(), value.into()))
            .to_vec(),
        fds: vec![
            (complains.into(), 2),
            (socket.into(), 3),
            (plan.authority.try_clone()?, 4),
        ],
        shown,
        resolv_conf: format!(
            "nameserver {}\noptions timeout:5 attempts:2\n",
            plan.resolver
        ),
        limits: CgroupLimits {
            memory_max: MEMORY_MAX,
            pids_max: 256,
            cpu_weight: 400,
        },
    })
}

/// What it prints goes into our log, line by line, bounded.
fn tell_complaints(service: ServiceId, complaints: std::io::PipeReader) -> std::io::Result<()> {
    const LONGEST: u64 = 4096;
    std::thread::Builder::new()
        .name("proxy-stderr".to_owned())
        .spawn(move || {
            let mut reader = BufReader::new(complaints);
            let mut line = Vec::new();
            while matches!(
                reader.by_ref().take(LONGEST).read_until(b'\n', &mut line),
                Ok(1..)
            ) {
                let text = String::from_utf8_lossy(&line);
                tracing::warn!(
                    worker = service.0,
                    "proxy: {}",
                    crate::terminal::escape(text.trim_end())
                );
                line.clear();
            }
        })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use host::fs::Dir;
    use serde_json::Value;

    use super::*;
    use crate::names::RunId;
    use crate::network::NetworkLog;

    /// A worker that answers everything; before its first answer, `meanwhile` happens. Gives what it was told.
    fn worker(
        socket: UnixStream,
        meanwhile: impl FnOnce() + Send + 'static,
    ) -> std::thread::JoinHandle<Vec<(String, u64, Value)>> {
        std::thread::spawn(move || {
            let mut meanwhile = Some(meanwhile);
            let mut answers = socket.try_clone().unwrap();
            let mut told = Vec::new();
            for line in BufReader::new(socket).lines() {
                let order: Value = serde_json::from_str(&line.unwrap()).unwrap();
                if let Some(meanwhile) = meanwhile.take() {
                    meanwhile();
                }
                writeln!(answers, r#"{{"id":{},"ok":true}}"#, order["id"]).unwrap();
                let what = order["op"].as_str().unwrap().to_owned();
                let rules = order["policy"]["rules"].clone();
                told.push((what, order["generation"].as_u64().unwrap(), rules));
            }
            told
        })
    }

    #[tokio::test]
    async fn a_worker_that_hangs_is_told_from_one_that_answers_and_from_one_that_is_gone() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let channel = Channel::start(ours, |_| {}).unwrap();
        let (period, limit) = (Duration::from_millis(1), Duration::from_secs(20));
        let mut hangs = tokio::spawn({
            let channel = channel.clone();
            async move { hangs(&channel, period, limit).await }
        });
        // It is asked again and again, and says so each time.
        let answering = tokio::task::spawn_blocking(move || {
            let mut lines = BufReader::new(theirs.try_clone().unwrap()).lines();
            for _ in 0..3 {
                let order: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
                assert_eq!(order["op"], "ping");
                writeln!(&theirs, r#"{{"id":{},"ok":true}}"#, order["id"]).unwrap();
            }
            theirs
        });
        let theirs = answering.await.unwrap();
        assert!(!hangs.is_finished());
        hangs.abort();
        // From now on nobody answers.
        timeout(limit, super::hangs(&channel, period, period))
            .await
            .expect("to be found hanging");
        hangs = tokio::spawn(async move { super::hangs(&channel, period, limit).await });
        drop(theirs);
        assert!(
            timeout(Duration::from_millis(100), &mut hangs)
                .await
                .is_err()
        );
        hangs.abort();
    }

    /// Beside the runtime, whose tasks end the channel.
    async fn joined<T: Send + 'static>(thread: std::thread::JoinHandle<T>) -> T {
        let join = tokio::task::spawn_blocking(move || thread.join().unwrap());
        timeout(Duration::from_secs(20), join)
            .await
            .expect("an end in time")
            .unwrap()
    }

    #[tokio::test]
    async fn what_changes_while_a_worker_is_told_it_is_told_too() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("logs")).unwrap();
        let home = Dir::open(root.path()).unwrap();
        let registrations = Arc::new(Registrations::new(None));
        let add = |last: u8| {
            let run = RunId::random();
            let log = NetworkLog::create(&home, run, 1 << 20).unwrap();
            let address = Ipv4Addr::new(100, 96, 0, last);
            registrations
                .add(address, run, Arc::default(), Arc::from([]), log)
                .unwrap()
        };
        let only = add(1);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let changing = Arc::clone(&registrations);
        let denied = "bad.example.com"
            .parse::<policy::RuleArgument>()
            .unwrap()
            .deny();
        let stays = only.clone();
        let told = worker(theirs, move || {
            let policy = stays.policy.with_rules_first(vec![denied]).unwrap();
            changing
                .set_policy(stays.run, Arc::new(policy))
                .unwrap()
                .unwrap();
        });
        let channel = Channel::start(ours, |_| {}).unwrap();
        tell_all(&channel, &registrations).await.unwrap();
        drop(channel);
        let told = joined(told).await;
        assert_eq!(told.len(), 2, "{told:?}");
        assert_eq!(told[1].2[0]["host"], "bad.example.com");

        // One that ends meanwhile does not stay behind.
        let (ours, theirs) = UnixStream::pair().unwrap();
        let ending = Arc::clone(&registrations);
        let (address, generation) = (only.address, only.generation);
        let told = worker(theirs, move || {
            ending.begin_end(address, generation);
        });
        let channel = Channel::start(ours, |_| {}).unwrap();
        tell_all(&channel, &registrations).await.unwrap();
        drop(channel);
        let told = joined(told).await;
        let orders: Vec<&str> = told.iter().map(|(what, ..)| what.as_str()).collect();
        assert_eq!(orders, ["register", "unregister"]);
    }
}
