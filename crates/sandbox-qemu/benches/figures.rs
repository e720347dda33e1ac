//! What the engine costs on this host, printed: nothing here passes or fails.
//!
//! `VM0_TEST_IMAGE_DIR=<home>/images/<hash> cargo bench -p sandbox-qemu [-- ROUNDS]`, as root.
#![cfg(test)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use common::{Fixture, with_engine};
use sandbox::{PausedAs, Place, Sandbox, Shape};

/// The default profile's.
const SHAPE: Shape = Shape {
    vcpu: 2,
    memory_mb: 2048,
    disk_mb: 4096,
};

fn main() -> ExitCode {
    match with_engine(SHAPE, figures) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            println!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Median, smallest and largest, in milliseconds.
fn line(name: &str, mut samples: Vec<Duration>) {
    samples.sort();
    let at = |index: usize| {
        samples
            .get(index)
            .copied()
            .unwrap_or_default()
            .as_secs_f64()
            * 1e3
    };
    let (low, median, high) = (
        at(0),
        at(samples.len() / 2),
        at(samples.len().saturating_sub(1)),
    );
    println!(
        "{name:<32} {median:>8.2} ms  ({low:.2}..{high:.2}, n={})",
        samples.len()
    );
}

async fn figures(fixture: Fixture) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
    let rounds: usize = std::env::args()
        .skip(1)
        .find_map(|argument| argument.parse().ok())
        .unwrap_or(20);
    println!("{SHAPE:?}; {}", sandbox_qemu::Kvm::of_host());
    line("cold boot of the template", vec![fixture.outcome.cold_boot]);

    let (mut raw_restore, mut raw_claim) = (Vec::new(), Vec::new());
    let (mut answers, mut claims, mut pauses, mut ends) = (vec![], vec![], vec![], vec![]);
    let mut steps: BTreeMap<usize, (&'static str, Vec<Duration>)> = BTreeMap::new();
    let mut private = Vec::new();
    // Alternating, so that both see the same host.
    for _ in 0..rounds {
        let raw = fixture
            .engine
            .raw_restore(
                fixture.image.clone(),
                fixture.shape,
                fixture.snapshot.path(),
                &fixture.outcome,
            )
            .await?;
        raw_restore.push(raw.restore);
        raw_claim.push(raw.claim);

        let slot = fixture.slots.take().await?;
        let sandbox = Sandbox::adopt(
            fixture.template.restore(Place::unplugged(slot)).await?,
            slot,
        );
        let mut answered = Duration::ZERO;
        for (index, (name, took)) in sandbox.steps().0.iter().enumerate() {
            if *name != "mount" {
                answered += *took;
            }
            steps
                .entry(index)
                .or_insert_with(|| (name, Vec::new()))
                .1
                .push(*took);
        }
        answers.push(answered);
        let start = Instant::now();
        sandbox.pause(PausedAs::Warm).await?;
        pauses.push(start.elapsed());
        private.push(sandbox.memory().await?.private_dirty);
        let start = Instant::now();
        sandbox.resume().await?;
        sandbox.client().ping().await?;
        claims.push(start.elapsed());
        let start = Instant::now();
        sandbox.destroy().await;
        ends.push(start.elapsed());
        fixture.slots.give_back(slot).await?;
    }
    line("raw: start to handshake", raw_restore);
    line("ours: start to handshake", answers);
    for (_, (name, samples)) in steps {
        line(&format!("  of it: {name}"), samples);
    }
    line("raw: cont to ping", raw_claim);
    line("ours: resume to ping", claims);
    line("pause", pauses);
    line("destroy and reap", ends);
    private.sort();
    let median = private.get(private.len() / 2).copied().unwrap_or_default();
    println!(
        "{:<32} {:>8.2} MiB",
        "private memory after restore",
        median as f64 / f64::from(1 << 20)
    );

    let mut many = Vec::new();
    for _ in 0..20 {
        let slot = fixture.slots.take().await?;
        many.push(Sandbox::adopt(
            fixture.template.restore(Place::unplugged(slot)).await?,
            slot,
        ));
    }
    for sandbox in &many {
        sandbox.pause(PausedAs::Warm).await?;
    }
    let mut sum = 0;
    for sandbox in many {
        sum += sandbox.memory().await?.private_dirty;
        sandbox.destroy().await;
        fixture.slots.give_back(sandbox.slot()).await?;
    }
    println!(
        "{:<32} {:>8.2} MiB",
        "the same, mean of 20 at once",
        sum as f64 / 20.0 / f64::from(1 << 20)
    );
    let usage = fixture.launcher.usage().await?;
    Ok(usage.firm_count + usage.revocable_count == 0)
}
