//! The life of a VM: every arrow of the state picture, with a fake engine in place of a hypervisor.
#![cfg(test)]

use std::time::Duration;

use guest_control::{ExecSpec, ExitStatus};
use host::slot::SlotId;
use sandbox::fake::{FakeEngine, FakeEvent, FakeGuest, Gate};
use sandbox::{
    Death, ImageFiles, Limits, PausedAs, Place, Proof, Sandbox, SandboxError, Shape, State, prove,
};

/// Far away: no test waits for it unless it says so.
const LIMITS: Limits = Limits {
    pause: Duration::from_secs(3600),
    post_mortem: Duration::from_secs(3600),
    reap: Duration::from_secs(3600),
};

async fn with(limits: Limits) -> (FakeEngine, Sandbox, FakeGuest) {
    let (engine, mut guests) = FakeEngine::new();
    let shape = Shape {
        vcpu: 1,
        memory_mb: 256,
        disk_mb: 64,
    };
    let vm = engine
        .template(shape)
        .restore(Place::unplugged(SlotId(3)))
        .await
        .unwrap();
    let sandbox = Sandbox::adopt_with(vm, SlotId(3), limits);
    let guest = guests.recv().await.unwrap();
    (engine, sandbox, guest)
}

async fn sandbox() -> (FakeEngine, Sandbox, FakeGuest) {
    with(LIMITS).await
}

fn oom() -> Death {
    Death {
        reason: "out of memory".to_owned(),
        oom: true,
    }
}

/// Waits until no VM of the engine is left.
async fn none_left(engine: &FakeEngine) {
    engine.live().wait_for(|live| *live == 0).await.unwrap();
}

#[tokio::test]
async fn a_vm_runs_is_paused_resumed_and_destroyed() {
    let (engine, sandbox, guest) = sandbox().await;
    assert_eq!(*sandbox.state().borrow(), State::Running);
    sandbox.pause(PausedAs::Warm).await.unwrap();
    assert_eq!(*sandbox.state().borrow(), State::Paused(PausedAs::Warm));
    sandbox.pause(PausedAs::Parked).await.unwrap();
    assert_eq!(*sandbox.state().borrow(), State::Paused(PausedAs::Parked));
    sandbox.resume().await.unwrap();
    sandbox.resume().await.unwrap();
    assert_eq!(*sandbox.state().borrow(), State::Running);
    let session = sandbox
        .client()
        .exec(ExecSpec {
            argv: vec![b"true".to_vec()],
            ..ExecSpec::default()
        })
        .await
        .unwrap();
    assert_eq!(session.wait().await.unwrap().status, ExitStatus::Exited(0));
    assert!(sandbox.destroy().await.reason.contains("destroyed"));
    assert!(matches!(*sandbox.state().borrow(), State::Dead(_)));
    none_left(&engine).await;
    let events = guest.events();
    assert!(events.ends_with(&[
        FakeEvent::Paused,
        FakeEvent::Resumed,
        FakeEvent::Started("true".to_owned()),
        FakeEvent::Destroyed,
    ]));
}

#[tokio::test]
async fn destroying_twice_and_from_many_handles_is_one_death() {
    let (_engine, sandbox, guest) = sandbox().await;
    let other = sandbox.clone();
    let deaths = tokio::join!(
        sandbox.destroy(),
        sandbox.died(),
        other.destroy(),
        sandbox.died()
    );
    assert_eq!(deaths.0, deaths.1);
    assert_eq!(deaths.0, deaths.2);
    assert_eq!(deaths.0, deaths.3);
    assert_eq!(sandbox.destroy().await, deaths.0);
    let destroyed = guest.events();
    let count = destroyed
        .iter()
        .filter(|event| **event == FakeEvent::Destroyed)
        .count();
    assert_eq!(count, 1);
}

#[tokio::test]
async fn the_last_handle_takes_the_vm_with_it() {
    let (engine, sandbox, guest) = sandbox().await;
    let other = sandbox.clone();
    drop(sandbox);
    other.pause(PausedAs::Parked).await.unwrap();
    drop(other);
    guest.happened(&FakeEvent::Destroyed).await;
    none_left(&engine).await;
}

#[tokio::test]
async fn a_process_that_dies_is_reported_with_its_own_reason() {
    let (engine, sandbox, guest) = sandbox().await;
    guest.die(oom());
    assert_eq!(sandbox.died().await, oom());
    assert_eq!(sandbox.destroy().await, oom());
    none_left(&engine).await;
}

#[tokio::test]
async fn a_paused_vm_that_dies_is_noticed() {
    let (_engine, sandbox, guest) = sandbox().await;
    sandbox.pause(PausedAs::Warm).await.unwrap();
    guest.die(oom());
    assert_eq!(sandbox.died().await, oom());
    let error = sandbox.resume().await.unwrap_err();
    assert!(matches!(error, SandboxError::Died(reason) if reason == "out of memory"));
}

#[tokio::test]
async fn a_guest_that_closes_its_channel_is_killed_and_told_apart() {
    let limits = Limits {
        post_mortem: Duration::ZERO,
        ..LIMITS
    };
    let (engine, sandbox, guest) = with(limits).await;
    guest.close_channel();
    let death = sandbox.died().await;
    assert!(
        death.reason.contains("closed its control channel"),
        "{}",
        death.reason
    );
    none_left(&engine).await;
}

#[tokio::test]
async fn a_channel_that_ends_because_the_process_dies_is_reported_as_the_death() {
    let (_engine, sandbox, guest) = sandbox().await;
    guest.close_channel();
    sandbox.client().closed().await;
    guest.die(oom());
    assert_eq!(sandbox.died().await, oom());
}

#[tokio::test]
async fn a_kill_is_served_while_a_pause_hangs() {
    let (engine, sandbox, guest) = sandbox().await;
    guest.set_pauses(Gate::Held);
    let (paused, death) = tokio::join!(sandbox.pause(PausedAs::Warm), sandbox.destroy());
    assert!(matches!(paused, Err(SandboxError::Died(_))));
    assert!(death.reason.contains("destroyed"));
    none_left(&engine).await;
}

#[tokio::test]
async fn the_last_handle_dropped_while_a_resume_hangs_still_kills() {
    let (engine, sandbox, guest) = sandbox().await;
    sandbox.pause(PausedAs::Warm).await.unwrap();
    guest.set_resumes(Gate::Held);
    let resume = tokio::spawn(async move { sandbox.resume().await });
    tokio::task::yield_now().await;
    resume.abort();
    none_left(&engine).await;
}

#[tokio::test(start_paused = true)]
async fn a_pause_that_hangs_beyond_its_limit_ends_the_vm() {
    let limits = Limits {
        pause: Duration::from_secs(10),
        ..LIMITS
    };
    let (engine, sandbox, guest) = with(limits).await;
    guest.set_pauses(Gate::Held);
    let error = sandbox.pause(PausedAs::Warm).await.unwrap_err();
    assert!(error.to_string().contains("within 10s"), "{error}");
    assert!(sandbox.died().await.reason.contains("did not pause"));
    none_left(&engine).await;
}

#[tokio::test]
async fn a_pause_that_fails_ends_the_vm_with_that_reason() {
    let limits = Limits {
        post_mortem: Duration::ZERO,
        ..LIMITS
    };
    let (engine, sandbox, guest) = with(limits).await;
    guest.set_pauses(Gate::Fails("no".to_owned()));
    let error = sandbox.pause(PausedAs::Warm).await.unwrap_err();
    assert_eq!(error.to_string(), "the VM engine failed at `pause`: no");
    assert_eq!(sandbox.died().await.reason, error.to_string());
    none_left(&engine).await;
}

#[tokio::test]
async fn a_failed_reclaim_leaves_the_vm_alone() {
    let (_engine, sandbox, _guest) = sandbox().await;
    assert!(sandbox.reclaim_memory().await.is_err());
    assert_eq!(*sandbox.state().borrow(), State::Running);
    sandbox.client().ping().await.unwrap();
}

#[tokio::test]
async fn whoever_wants_a_vm_does_not_wait_for_its_balloon() {
    let (engine, sandbox, guest) = sandbox().await;
    sandbox.pause(PausedAs::Parked).await.unwrap();
    guest.set_reclaims(Gate::Held);
    let (reclaimed, resumed) = tokio::join!(sandbox.reclaim_memory(), sandbox.resume());
    assert!(matches!(reclaimed, Err(SandboxError::Engine { .. })));
    resumed.unwrap();
    assert_eq!(*sandbox.state().borrow(), State::Running);

    // What does not want it to run finds it stopped: the engine is told so again.
    sandbox.pause(PausedAs::Parked).await.unwrap();
    let (reclaimed, memory) = tokio::join!(sandbox.reclaim_memory(), sandbox.memory());
    assert!(matches!(reclaimed, Err(SandboxError::Engine { .. })));
    memory.unwrap();
    let paused = |event: &FakeEvent| *event == FakeEvent::Paused;
    assert_eq!(guest.events().into_iter().filter(paused).count(), 3);

    // Neither does the end of it wait.
    let (reclaimed, _) = tokio::join!(sandbox.reclaim_memory(), sandbox.destroy());
    assert!(reclaimed.is_err());
    none_left(&engine).await;
}

#[tokio::test]
async fn a_boot_that_works_fails_or_takes_too_long_is_a_proof_and_leaves_no_vm() {
    let (engine, _guests) = FakeEngine::new();
    let image = || ImageFiles {
        kernel: "kernel".into(),
        initrd: "initrd".into(),
        rootfs: "rootfs".into(),
    };
    let limit = Duration::from_secs(3600);
    let proof = prove(&engine, SlotId(3), image(), limit).await.unwrap();
    assert!(matches!(proof, Proof::Boots(_)), "{proof:?}");
    none_left(&engine).await;

    engine.set_restores(Gate::Fails("no such CPU".to_owned()));
    let proof = prove(&engine, SlotId(3), image(), limit).await.unwrap();
    assert!(
        matches!(&proof, Proof::Fails(why) if why.contains("no such CPU")),
        "{proof:?}"
    );

    engine.set_restores(Gate::Held);
    let short = Duration::from_millis(20);
    let proof = prove(&engine, SlotId(3), image(), short).await.unwrap();
    assert!(
        matches!(&proof, Proof::Fails(why) if why.contains("20ms")),
        "{proof:?}"
    );
    none_left(&engine).await;
}
