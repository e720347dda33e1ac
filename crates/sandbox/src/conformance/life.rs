//! Starting, pausing and ending VMs.

use std::path::Path;
use std::time::Duration;

use super::{Entry, Outcome, Room, ensure, script};
use crate::error::SandboxError;
use crate::sandbox::{PausedAs, State};

pub(super) const CASES: &[Entry] = &[
    ("a restored VM answers", false, |room| {
        Box::pin(answers(room))
    }),
    ("a VM is paused, resumed and answers", false, |room| {
        Box::pin(pause_and_resume(room))
    }),
    ("a paused VM does not answer", true, |room| {
        Box::pin(paused_is_silent(room))
    }),
    ("a destroyed VM leaves no process", true, |room| {
        Box::pin(destroy_reaps(room))
    }),
    ("dropping the last handle ends the VM", false, |room| {
        Box::pin(drop_ends(room))
    }),
    (
        "a killed process is reported with its signal",
        true,
        |room| Box::pin(killed_from_outside(room)),
    ),
    ("a paused VM that is killed is reported", true, |room| {
        Box::pin(killed_while_paused(room))
    }),
    (
        "a parked VM gives memory back, or its engine says that it cannot",
        true,
        |room| Box::pin(gives_memory_back(room)),
    ),
    (
        "what a VM's devices do is counted once, or its engine says that it is not",
        true,
        |room| Box::pin(counts_devices(room)),
    ),
    ("a guest that powers off is reported so", true, |room| {
        Box::pin(powers_off(room))
    }),
    ("a guest that panics is reported so", true, |room| {
        Box::pin(panics(room))
    }),
];

async fn answers(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    sandbox.client().ping().await?;
    ensure!(!sandbox.steps().0.is_empty(), "no times of its start");
    Ok(())
}

async fn pause_and_resume(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    for label in [PausedAs::Warm, PausedAs::Parked] {
        sandbox.pause(label).await?;
        let state = sandbox.state().borrow().clone();
        ensure!(state == State::Paused(label), "{state:?} after a pause");
        sandbox.resume().await?;
        sandbox.client().ping().await?;
    }
    Ok(())
}

async fn paused_is_silent(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    sandbox.pause(PausedAs::Warm).await?;
    // A running guest answers within a millisecond; silence can only be shown by waiting for longer than that.
    let answer = tokio::time::timeout(Duration::from_millis(200), sandbox.client().ping()).await;
    ensure!(answer.is_err(), "a paused VM answered: {answer:?}");
    sandbox.resume().await?;
    sandbox.client().ping().await?;
    Ok(())
}

async fn destroy_reaps(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let process = format!("/proc/{}", sandbox.pid());
    ensure!(Path::new(&process).exists(), "{process} does not exist");
    sandbox.destroy().await;
    ensure!(!Path::new(&process).exists(), "{process} still exists");
    Ok(())
}

async fn drop_ends(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let mut state = sandbox.state();
    // The room holds the other handle.
    room.taken
        .lock()
        .await
        .retain(|(slot, _)| *slot != sandbox.slot());
    let slot = sandbox.slot();
    drop(sandbox);
    state
        .wait_for(|state| matches!(state, State::Dead(_)))
        .await?;
    room.subject.slots.give_back(slot).await?;
    Ok(())
}

/// Kills a VM's process as an operator or the kernel might.
fn kill(pid: u32) -> Outcome {
    let status = std::process::Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status()?;
    ensure!(status.success(), "kill: {status}");
    Ok(())
}

async fn killed_from_outside(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let session = sandbox.client().exec(script("sleep 1000")).await?;
    kill(sandbox.pid())?;
    let death = sandbox.died().await;
    ensure!(death.reason.contains("signal 9"), "{death:?}");
    ensure!(!death.oom, "{death:?}");
    ensure!(session.wait().await.is_err(), "its session did not end");
    Ok(())
}

async fn killed_while_paused(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    sandbox.pause(PausedAs::Warm).await?;
    kill(sandbox.pid())?;
    let death = sandbox.died().await;
    ensure!(death.reason.contains("signal 9"), "{death:?}");
    ensure!(sandbox.resume().await.is_err(), "a dead VM was resumed");
    Ok(())
}

async fn counts_devices(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let before = sandbox.take_device_stats().await;
    if !room.subject.device_stats {
        ensure!(
            matches!(before, Err(SandboxError::Unavailable { .. })),
            "{before:?}"
        );
        return Ok(());
    }
    let written = 256 * 1024;
    let write = format!("head -c {written} /dev/zero > /written && sync /written");
    super::stdout_of(&sandbox, &write).await?;
    let stats = sandbox.take_device_stats().await?;
    ensure!(stats.disk_written_bytes >= written, "{stats:?}");
    // The same again while it stands still, when there is nothing new.
    sandbox.pause(PausedAs::Parked).await?;
    let stats = sandbox.take_device_stats().await?;
    ensure!(stats.disk_written_bytes < written, "{stats:?}");
    Ok(())
}

async fn gives_memory_back(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    // Touched and free again: the guest's kernel keeps it, and so does the host. More than what a guest is left with.
    let touch = "head -c 90000000 /dev/zero > /dev/shm/much; rm /dev/shm/much";
    super::stdout_of(&sandbox, touch).await?;
    sandbox.pause(PausedAs::Parked).await?;
    let before = sandbox.memory().await?.private_dirty;
    let reclaimed = sandbox.reclaim_memory().await;
    let after = sandbox.memory().await?.private_dirty;
    if room.subject.balloon {
        let balloon = reclaimed?;
        ensure!(
            balloon.held_mb > 0 && balloon.held_mb == balloon.target_mb,
            "{balloon:?}"
        );
        let less = before.saturating_sub(after) >> 20;
        ensure!(less >= 30, "only {less} of {} MiB came back", before >> 20);
    } else {
        ensure!(
            matches!(reclaimed, Err(SandboxError::Unavailable { .. })),
            "{reclaimed:?}"
        );
    }
    let state = sandbox.state().borrow().clone();
    ensure!(state == State::Paused(PausedAs::Parked), "{state:?}");
    // The next job finds all of it.
    sandbox.resume().await?;
    super::stdout_of(&sandbox, touch).await?;
    Ok(())
}

async fn powers_off(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    sandbox.client().shutdown().await?;
    let death = sandbox.died().await;
    ensure!(death.reason.contains("powered itself off"), "{death:?}");
    Ok(())
}

async fn panics(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let crash = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 1000";
    // The answer to this may or may not make it out of the guest.
    let _ = sandbox.client().exec(script(crash)).await;
    let death = sandbox.died().await;
    ensure!(death.reason.contains("kernel panicked"), "{death:?}");
    Ok(())
}
