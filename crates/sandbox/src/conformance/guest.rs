//! Working in a VM.

use bytes::Bytes;
use guest_control::{ExecSpec, ExitStatus, FileSpec, UserSpec};

use super::{Entry, Outcome, Room, drain, ensure, run, script, stdout_of};

pub(super) const CASES: &[Entry] = &[
    (
        "a process's output, streams and exit code arrive",
        true,
        |room| Box::pin(exec(room)),
    ),
    ("standard input reaches the process", true, |room| {
        Box::pin(stdin(room))
    }),
    ("files go in and come out unchanged", true, |room| {
        Box::pin(files(room))
    }),
    (
        "a guest that floods its output stays controllable",
        true,
        |room| Box::pin(flood(room)),
    ),
    (
        "the disk has the size of the shape and can be written",
        true,
        |room| Box::pin(disk(room)),
    ),
    ("the guest has the shape's CPUs and memory", true, |room| {
        Box::pin(shape(room))
    }),
    (
        "a guest that eats its memory loses the process, not the VM",
        true,
        |room| Box::pin(out_of_memory(room)),
    ),
    (
        "a guest that forks without end is held back and stays controllable",
        true,
        |room| Box::pin(fork_bomb(room)),
    ),
    (
        "a guest that fills its disk is told so and stays controllable",
        true,
        |room| Box::pin(full_disk(room)),
    ),
    (
        "a VM without a network has a card that leads nowhere",
        true,
        |room| Box::pin(unplugged(room)),
    ),
];

async fn exec(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let (report, printed) = run(&sandbox, script("echo out; echo err >&2; exit 7")).await?;
    ensure!(report.status == ExitStatus::Exited(7), "{report:?}");
    ensure!(printed.stdout == b"out\n", "{printed:?}");
    ensure!(printed.stderr == b"err\n", "{printed:?}");
    Ok(())
}

async fn stdin(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let data: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    let spec = ExecSpec {
        stdin: true,
        ..script("cat")
    };
    let session = sandbox.client().exec(spec).await?;
    let output = session.attach(0, true);
    let feed = async {
        session.write_stdin(Bytes::from(data.clone())).await?;
        session.close_stdin().await
    };
    let (fed, printed) = tokio::join!(feed, drain(output));
    fed?;
    ensure!(
        printed.stdout == data,
        "{} bytes back",
        printed.stdout.len()
    );
    Ok(())
}

async fn files(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let data: Vec<u8> = (0..=255).rev().cycle().take(500_000).collect();
    let spec = FileSpec {
        path: "/tmp/in".to_owned(),
        mode: 0o640,
        user: UserSpec::User,
    };
    sandbox.client().write_file(spec, data.as_slice()).await?;
    let listing = stdout_of(&sandbox, "stat -c '%a %u %s' /tmp/in; cp /tmp/in /tmp/out").await?;
    ensure!(listing == "640 1000 500000", "{listing}");
    let mut back = Vec::new();
    sandbox.client().read_file("/tmp/out", &mut back).await?;
    ensure!(back == data, "{} bytes back", back.len());
    Ok(())
}

async fn flood(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let session = sandbox.client().exec(script("exec yes")).await?;
    // Nobody reads; the guest must be held back and everything else go on.
    let mut output = session.attach(0, true);
    ensure!(output.next().await.is_some(), "no output");
    for _ in 0..20 {
        sandbox.client().ping().await?;
    }
    ensure!(
        stdout_of(&sandbox, "echo there").await? == "there",
        "no exec"
    );
    session.kill().await?;
    while output.next().await.is_some() {}
    let report = session.wait().await?;
    ensure!(report.status == ExitStatus::Signaled(9), "{report:?}");
    Ok(())
}

async fn disk(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let megabytes = room.subject.template.shape().disk_mb;
    let size: u64 = stdout_of(&sandbox, "df --output=size -m / | tail -n 1")
        .await?
        .parse()?;
    // What ext4 keeps for itself is less than a tenth.
    ensure!(
        size <= megabytes && size > megabytes * 9 / 10,
        "{size} MiB of {megabytes}"
    );
    stdout_of(
        &sandbox,
        "dd if=/dev/zero of=/big bs=1M count=20 status=none && sync && rm /big",
    )
    .await?;
    Ok(())
}

async fn shape(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let shape = room.subject.template.shape();
    let cpus = stdout_of(&sandbox, "nproc").await?;
    ensure!(cpus == shape.vcpu.to_string(), "{cpus} CPUs");
    let total = sandbox.client().stats().await?.mem_total_kb / 1024;
    // The kernel and its page tables have taken their part.
    ensure!(
        total <= shape.memory_mb && total > shape.memory_mb * 3 / 4,
        "{total} MiB of {}",
        shape.memory_mb
    );
    Ok(())
}

async fn unplugged(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    // Cards, and whatever else is up: kernels add templates of tunnels (sit0, tunl0, …), which have no device and carry
    // nothing until somebody sets them up.
    let look = "for card in /sys/class/net/*; do
             test -e $card/device || (( $(< $card/flags) & 1 )) && echo ${card##*/}
         done
         cat /proc/net/if_inet6
         timeout 1 bash -c 'exec 3<>/dev/tcp/192.168.241.1/53'; echo $?";
    let seen = stdout_of(&sandbox, look).await?;
    // 124: nobody answered, not even to refuse.
    ensure!(seen == "eth0\nlo\n124", "{seen}");
    Ok(())
}

/// The agent's own user, as a job has it.
fn as_user(spec: ExecSpec) -> ExecSpec {
    ExecSpec {
        user: UserSpec::User,
        ..spec
    }
}

async fn out_of_memory(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    // Fills page cache and code cache first: all that a VM may take of the host's memory, at once.
    let eat = "for program in ps ls git python3; do command -v $program > /dev/null && $program --version; done \
               > /dev/null 2>&1; dd if=/dev/zero of=big bs=1M count=100 status=none; tail /dev/zero";
    let (report, printed) = run(&sandbox, as_user(script(eat))).await?;
    ensure!(report.oom_kills > 0, "{report:?}, {printed:?}");
    ensure!(
        stdout_of(&sandbox, "echo there").await? == "there",
        "no exec"
    );
    Ok(())
}

async fn fork_bomb(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let bomb = "bomb() { bomb | bomb & }; bomb; sleep 1000";
    let session = sandbox.client().exec(as_user(script(bomb))).await?;
    let mut output = session.attach(0, false);
    // The first complaint is bash's, that it may not fork.
    let complaint = output.next().await;
    ensure!(complaint.is_some(), "no complaint");
    sandbox.client().ping().await?;
    session.kill().await?;
    let report = session.wait().await?;
    ensure!(report.pids_limit_hits > 0, "{report:?} after {complaint:?}");
    ensure!(
        stdout_of(&sandbox, "echo there").await? == "there",
        "no exec"
    );
    Ok(())
}

async fn full_disk(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let fill = "cat /dev/zero > big";
    let (report, printed) = run(&sandbox, as_user(script(fill))).await?;
    ensure!(report.status != ExitStatus::Exited(0), "{report:?}");
    ensure!(report.disk_free_bytes < 1 << 20, "{report:?}");
    let said = String::from_utf8_lossy(&printed.stderr).into_owned();
    ensure!(said.contains("No space left"), "{said}");
    sandbox.client().ping().await?;
    Ok(())
}
