//! What one replica carries, on one NATS node that syncs each write, beside the raw client on the same server in the same
//! run: `cargo bench -p web-api --bench load`. Prints one line a figure; docs/scaling.md has a run of it.
#![expect(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a program that measures, with the helpers of tests"
)]

#[path = "../tests/api/nats.rs"]
mod nats;
#[path = "../tests/api/replica.rs"]
mod replica;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use api_types::client::Run;
use api_types::guest::Accepted;
use api_types::{RunId, RunnerId};
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use serde_json::json;
use web_api::engine::Swap;

use nats::Kind;
use replica::{Api, Process, World, open};

const RUNS: usize = 10_000;
const RUNNERS: usize = 200;

fn quantile(times: &mut [Duration], q: f64) -> f64 {
    times.sort_unstable();
    let at = ((times.len() - 1) as f64 * q).round() as usize;
    times[at].as_secs_f64() * 1000.0
}

fn rate(count: usize, begin: Instant) -> f64 {
    count as f64 / begin.elapsed().as_secs_f64()
}

/// What the engine does with nothing of ours around it: 200 tasks, each with a key of its own.
async fn floor(world: &World) {
    let engine = open(&world.nats).await;
    let bucket = engine.sessions.clone();
    let value = Bytes::from(vec![b'x'; 600]);
    let (done, end) = (AtomicU64::new(0), Instant::now() + Duration::from_secs(5));
    let begin = Instant::now();
    join_all((0..RUNNERS).map(|n| {
        let (bucket, value, done) = (&bucket, &value, &done);
        async move {
            let key = format!("floor.{n}");
            let mut revision = bucket.put(&key, value.clone()).await.unwrap();
            while Instant::now() < end {
                match bucket.update(&key, value.clone(), revision).await.unwrap() {
                    Swap::Done(next) => revision = next,
                    Swap::Conflict => panic!("nobody else writes it"),
                }
                done.fetch_add(1, Ordering::Relaxed);
            }
        }
    }))
    .await;
    println!(
        "floor: raw compare-and-sets of 600 bytes, {RUNNERS} tasks: {:.0}/s",
        rate(done.load(Ordering::Relaxed) as usize, begin)
    );
}

async fn create(client: &Api<'_>, count: usize) -> HashSet<RunId> {
    let each = count / 50;
    join_all((0..50).map(|_| async move {
        let mut made = Vec::new();
        for _ in 0..each {
            made.push(client.create(json!({})).await.run_id);
        }
        made
    }))
    .await
    .into_iter()
    .flatten()
    .collect()
}

async fn closed_loop(world: &World, url: &str) {
    let client = world.as_client(url);
    let begin = Instant::now();
    let made = create(&client, RUNS).await;
    println!("create, 50 clients: {:.0} runs/s", rate(RUNS, begin));

    let begin = Instant::now();
    let mut times: Vec<Duration> = Vec::new();
    let mut claimed: Vec<(RunnerId, RunId)> = Vec::new();
    let mut conflicts = 0;
    let loops = join_all((0..RUNNERS).map(|_| async move {
        let (runner, me) = (world.as_runner(url), RunnerId::random());
        let (mut mine, mut times, mut conflicts) = (Vec::new(), Vec::new(), 0);
        loop {
            let at = Instant::now();
            let Some(offer) = runner.poll(me, 0).await else {
                break;
            };
            if runner.try_claim(me, offer.run_id).await.status.is_success() {
                mine.push((me, offer.run_id));
                times.push(at.elapsed());
            } else {
                conflicts += 1;
            }
        }
        (mine, times, conflicts)
    }))
    .await;
    let took = rate(RUNS, begin);
    for (mine, each, lost) in loops {
        claimed.extend(mine);
        times.extend(each);
        conflicts += lost;
    }
    let distinct: HashSet<RunId> = claimed.iter().map(|(_, run)| *run).collect();
    assert!(
        claimed.len() == RUNS && distinct == made,
        "every run once: {}",
        claimed.len()
    );
    println!(
        "dispatch, closed loop, {RUNNERS} runners, {RUNS} queued: {took:.0} claims/s (poll and claim p50 {:.1} ms, p99 {:.1} ms; \
         {conflicts} conflicts; every run claimed once)",
        quantile(&mut times, 0.5),
        quantile(&mut times, 0.99)
    );
    let begin = Instant::now();
    join_all(claimed.chunks(RUNS / 50).map(|part| async move {
        let runner = world.as_runner(url);
        for (me, run) in part {
            runner.complete(*me, *run, 1).await.ok::<Run>();
        }
    }))
    .await;
    println!("complete, 50 at once: {:.0} runs/s", rate(RUNS, begin));
}

/// From the client's 201 to the runner's execution context, at a steady rate.
async fn open_loop(world: &World, url: &str, per_second: u32, seconds: u32) {
    let created: Arc<std::sync::Mutex<std::collections::HashMap<RunId, Instant>>> = Arc::default();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let runners: Vec<_> = (0..RUNNERS)
        .map(|_| {
            let (url, token, stop) = (url.to_owned(), world.runner.clone(), Arc::clone(&stop));
            tokio::spawn(async move {
                let (runner, me) = (Api::new(&url, &token), RunnerId::random());
                let mut at = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let Some(offer) = runner.poll(me, 2).await else {
                        continue;
                    };
                    if runner.try_claim(me, offer.run_id).await.status.is_success() {
                        at.push((offer.run_id, Instant::now()));
                        runner.complete(me, offer.run_id, 1).await.ok::<Run>();
                    }
                }
                at
            })
        })
        .collect();
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / per_second);
    let client = Api::new("", &world.client);
    let mut makers = Vec::new();
    for _ in 0..per_second * seconds {
        ticks.tick().await;
        let (url, client, created) = (url.to_owned(), client.clone(), Arc::clone(&created));
        makers.push(tokio::spawn(async move {
            let api = Api {
                url: &url,
                ..client
            };
            let run = api.create(json!({})).await.run_id;
            created.lock().unwrap().insert(run, Instant::now());
        }));
    }
    for maker in makers {
        maker.await.unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    let created = created.lock().unwrap().clone();
    let mut times = Vec::new();
    for runner in runners {
        for (run, at) in runner.await.unwrap() {
            // The claim can be answered before the creation is.
            times.push(at.saturating_duration_since(created[&run]));
        }
    }
    assert_eq!(times.len(), created.len());
    println!(
        "dispatch, open loop at {per_second}/s for {seconds} s, {RUNNERS} runners that wait: 201 to execution context p50 {:.1} ms, \
         p99 {:.1} ms, most {:.1} ms",
        quantile(&mut times, 0.5),
        quantile(&mut times, 0.99),
        quantile(&mut times, 1.0)
    );
}

async fn guest(world: &World, url: &str) -> (RunId, RunnerId, String) {
    let (runner, me) = (world.as_runner(url), RunnerId::random());
    let run = world.as_client(url).create(json!({})).await.run_id;
    let context = runner.claim(me, run).await;
    (run, me, context.sandbox_token)
}

async fn ingestion(world: &World, url: &str, guests: usize, batch: u64) {
    let mut tokens = Vec::new();
    for _ in 0..guests {
        tokens.push(guest(world, url).await);
    }
    let text = "x".repeat(200);
    let (begin, end) = (Instant::now(), Instant::now() + Duration::from_secs(8));
    let counts = join_all(tokens.iter().map(|(run, _, token)| {
        let text = &text;
        async move {
            let api = Api::new(url, token);
            let mut next = 0;
            while Instant::now() < end {
                let events: Vec<_> = (next..next + batch)
                    .map(|n| json!({"sequenceNumber": n, "type": "assistant", "text": text}))
                    .collect();
                let body = json!({"runId": run, "events": events});
                next = api
                    .post("/api/webhooks/agent/events", body)
                    .await
                    .ok::<Accepted>()
                    .next;
            }
            next
        }
    }))
    .await;
    let count: u64 = counts.into_iter().sum();
    println!(
        "events of 240 bytes, {guests} guests, {batch} a request: {:.0} events/s",
        rate(count as usize, begin)
    );
}

async fn followers(world: &World, url: &str, count: usize) {
    let (run, me, token) = guest(world, url).await;
    let path = format!("/api/runs/{run}/events");
    let all: Vec<_> = (0..count)
        .map(|_| {
            let (url, client, path) = (url.to_owned(), world.client.clone(), path.clone());
            tokio::spawn(async move {
                let api = Api::new(&url, &client);
                let response = api.stream(&path, None).await;
                let mut bytes = response.bytes_stream();
                let (mut text, mut times, mut seen) = (String::new(), Vec::new(), 0_u64);
                while let Some(Ok(chunk)) = bytes.next().await {
                    text.push_str(std::str::from_utf8(&chunk).unwrap());
                    while let Some((event, rest)) = text.split_once("\n\n") {
                        if let Some(data) = event.lines().find_map(|l| l.strip_prefix("data: "))
                            && let Ok(value) = serde_json::from_str::<serde_json::Value>(data)
                            && let Some(sent) = value["event"]["sent"].as_u64()
                        {
                            assert_eq!(value["event"]["sequenceNumber"], seen);
                            seen += 1;
                            times.push(Duration::from_micros(micros().saturating_sub(sent)));
                        }
                        text = rest.to_owned();
                    }
                }
                times
            })
        })
        .collect();
    // All of them are there when the server says so by its places.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let api = Api::new(url, &token);
    let events = 50;
    for n in 0..events {
        let event = json!({"sequenceNumber": n, "sent": micros()});
        api.post(
            "/api/webhooks/agent/events",
            json!({"runId": run, "events": [event]}),
        )
        .await
        .ok::<Accepted>();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    world.as_runner(url).complete(me, run, 1).await.ok::<Run>();
    let mut times = Vec::new();
    for follower in all {
        let seen = follower.await.unwrap();
        assert_eq!(seen.len(), events);
        times.extend(seen);
    }
    println!(
        "followers of one run: {count}, each saw all of {events} events once; post to follower p50 {:.1} ms, p99 {:.1} ms",
        quantile(&mut times, 0.5),
        quantile(&mut times, 0.99)
    );
}

fn micros() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_micros() as u64
}

fn memory(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        / 1024
}

fn main() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let world = match World::new(Kind::default()).await {
            Ok(world) => world,
            Err(why) => {
                eprintln!("error: {why}");
                std::process::exit(1);
            }
        };
        floor(&world).await;
        let process = world.process(&[]);
        let url = process.url.clone();
        println!("memory of the replica at first: {} MiB", memory(&process));
        open_loop(&world, &url, 300, 10).await;
        closed_loop(&world, &url).await;
        println!("memory after {RUNS} runs: {} MiB", memory(&process));
        closed_loop(&world, &url).await;
        println!("memory after {} runs: {} MiB", 2 * RUNS, memory(&process));
        ingestion(&world, &url, 50, 1).await;
        ingestion(&world, &url, 50, 20).await;
        followers(&world, &url, 1000).await;
        println!("memory at last: {} MiB", memory(&process));
        floor(&world).await;
    });
}
