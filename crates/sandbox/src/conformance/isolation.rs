//! Clones of one template have nothing in common.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Entry, Outcome, Room, ensure, stdout_of, wake};
use crate::sandbox::PausedAs;

pub(super) const CASES: &[Entry] = &[
    (
        "clones do not see each other's disk or memory",
        true,
        |room| Box::pin(apart(room)),
    ),
    ("a clone finds nothing of those before it", true, |room| {
        Box::pin(nothing_left(room))
    }),
    ("woken clones have entropy of their own", true, |room| {
        Box::pin(entropy(room))
    }),
    (
        "a woken clone has the right time and keeps it",
        true,
        |room| Box::pin(time(room)),
    ),
    ("clones are made and used side by side", false, |room| {
        Box::pin(side_by_side(room))
    }),
    (
        "an idle clone costs a small part of its memory",
        true,
        |room| Box::pin(memory(room)),
    ),
];

/// Leaves marks on the disk, in a tmpfs, and in a lot of memory.
const MARK: &str = "echo $RANDOM$RANDOM > /mark; mkdir -p /dev/shm; cp /mark /dev/shm/mark; \
     tr '\\0' x < /dev/zero | head -c 30000000 > /dev/shm/much; cat /mark /dev/shm/mark";

async fn apart(room: Room) -> Outcome {
    let (one, two) = tokio::try_join!(room.restore(), room.restore())?;
    let first = stdout_of(&one, MARK).await?;
    let unseen = stdout_of(&two, "ls /mark /dev/shm/mark 2>/dev/null | wc -l").await?;
    ensure!(unseen == "0", "the other clone's marks are seen");
    stdout_of(&two, MARK).await?;
    let still = stdout_of(&one, "cat /mark /dev/shm/mark").await?;
    ensure!(first == still, "{first} became {still}");
    Ok(())
}

async fn nothing_left(room: Room) -> Outcome {
    // Without the kernel's own threads, whose names say what they did last.
    let look = "ls -A / /dev/shm /tmp /home /root; ps -e -o args= | grep -v '^\\['";
    let clean = room.restore().await?;
    let before = stdout_of(&clean, look).await?;
    let dirty = room.restore().await?;
    stdout_of(&dirty, MARK).await?;
    dirty.destroy().await;
    let after = stdout_of(&room.restore().await?, look).await?;
    ensure!(before == after, "{before:?} became {after:?}");
    Ok(())
}

async fn entropy(room: Room) -> Outcome {
    let mut seen = BTreeSet::new();
    for count in 1..=4 {
        let sandbox = room.restore().await?;
        sandbox.client().wake(wake()?).await?;
        seen.insert(stdout_of(&sandbox, "head -c 16 /dev/urandom | od -An -tx1").await?);
        ensure!(seen.len() == count, "repeated: {seen:?}");
        sandbox.destroy().await;
    }
    Ok(())
}

/// How far guest and host may be apart: the question and its answer travel meanwhile, on a busy host.
const CLOCKS: Duration = Duration::from_secs(2);

async fn time(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    sandbox.client().wake(wake()?).await?;
    for _ in 0..2 {
        let before = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let guest: u64 = stdout_of(&sandbox, "date +%s%N").await?.parse()?;
        let after = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let guest = Duration::from_nanos(guest);
        ensure!(
            guest + CLOCKS > before && guest < after + CLOCKS,
            "{guest:?} in the guest, {before:?} to {after:?} on the host"
        );
        // Work for a while in between.
        stdout_of(&sandbox, "for ((i = 0; i < 20000; i++)); do :; done").await?;
    }
    Ok(())
}

async fn side_by_side(room: Room) -> Outcome {
    let (a, b, c, d) = tokio::try_join!(
        room.restore(),
        room.restore(),
        room.restore(),
        room.restore()
    )?;
    let all = [a, b, c, d];
    let slots: BTreeSet<_> = all.iter().map(crate::Sandbox::slot).collect();
    ensure!(slots.len() == all.len(), "a slot was used twice: {slots:?}");
    for sandbox in &all {
        sandbox.client().ping().await?;
    }
    Ok(())
}

async fn memory(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    sandbox.pause(PausedAs::Warm).await?;
    let stats = sandbox.memory().await?;
    let shape = room.subject.template.shape();
    let megabytes = stats.private_dirty >> 20;
    ensure!(stats.private_dirty > 0, "no figure");
    ensure!(
        megabytes < shape.memory_mb / 2,
        "{megabytes} MiB private of {}",
        shape.memory_mb
    );
    Ok(())
}
