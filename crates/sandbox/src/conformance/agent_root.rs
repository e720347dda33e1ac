//! What a process finds around it in the guest, and what it cannot do there.

use std::time::Duration;

use bytes::Bytes;
use guest_control::{ControlError, ExecSpec, ExitStatus, FileSpec, MountSource, PtySize, UserSpec};

use super::{Entry, Outcome, Room, drain, ensure, run, script, stdout_of};

pub(super) const CASES: &[Entry] = &[
    (
        "a process runs as the user asked for, at home, with the image's environment and the host's",
        true,
        |room| Box::pin(identity(room)),
    ),
    (
        "a missing working directory is made for the user",
        true,
        |room| Box::pin(working_directory(room)),
    ),
    (
        "a program that cannot be started is an error with its number",
        true,
        |room| Box::pin(cannot_start(room)),
    ),
    (
        "a terminal has a size, is resized, and passes Ctrl-C on",
        true,
        |room| Box::pin(terminal(room)),
    ),
    (
        "user namespaces work, and the kernel's switches are out of reach of an ordinary account",
        true,
        |room| Box::pin(confined(room)),
    ),
    (
        "the first process survives whatever root inside does to it",
        true,
        |room| Box::pin(first_process(room)),
    ),
    (
        "file transfers stay inside the root and take regular files only",
        true,
        |room| Box::pin(regular_files(room)),
    ),
    (
        "what a process leaves behind is killed with it, or left, as asked",
        true,
        |room| Box::pin(left_behind(room)),
    ),
    (
        "a timeout ends everything the process has started",
        true,
        |room| Box::pin(timeout(room)),
    ),
    (
        "killing everything keeps the root, dropping it makes room for a new one",
        true,
        |room| Box::pin(roots(room)),
    ),
];

/// A bash command line as the agent's own account.
fn as_user(text: &str) -> ExecSpec {
    ExecSpec {
        user: UserSpec::User,
        ..script(text)
    }
}

fn errno(error: &ControlError) -> Option<i32> {
    match error {
        ControlError::Guest { errno, .. } => *errno,
        _ => None,
    }
}

async fn identity(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let spec = ExecSpec {
        env: vec![
            ("LANG".to_owned(), "host's word".to_owned()),
            ("QUOTES".to_owned(), "\"'$(id)\n".to_owned()),
        ],
        ..as_user("id -u; id -g; pwd; echo $HOME $USER $SHELL; echo \"$LANG|$QUOTES|\"")
    };
    let (_, printed) = run(&sandbox, spec).await?;
    let printed = String::from_utf8_lossy(&printed.stdout).into_owned();
    ensure!(
        printed == "1000\n1000\n/home/user\n/home/user user /bin/bash\nhost's word|\"'$(id)\n|\n",
        "{printed:?}"
    );
    let root = stdout_of(&sandbox, "id -u; pwd; echo $$ $(ps -o sid= -p $$)").await?;
    ensure!(root.starts_with("0\n/root\n"), "{root:?}");
    let ids: Vec<_> = root.lines().nth(2).unwrap_or_default().split(' ').collect();
    ensure!(
        ids.first() == ids.last(),
        "not the leader of its session: {root:?}"
    );
    Ok(())
}

async fn working_directory(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let spec = ExecSpec {
        cwd: Some("/jobs/a b/c".to_owned()),
        ..as_user("pwd; stat -c '%u %a' . ..; touch here")
    };
    let (report, printed) = run(&sandbox, spec).await?;
    let stdout = String::from_utf8_lossy(&printed.stdout).into_owned();
    ensure!(
        stdout == "/jobs/a b/c\n1000 755\n1000 755\n",
        "{report:?} {printed:?}"
    );
    for bad in ["/etc/passwd", "/etc/passwd/below"] {
        let spec = ExecSpec {
            cwd: Some(bad.to_owned()),
            ..as_user("true")
        };
        match sandbox.client().exec(spec).await {
            Err(error) if errno(&error) == Some(20) => {}
            other => return Err(format!("{bad}: {other:?}").into()),
        }
    }
    Ok(())
}

async fn cannot_start(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let exec = |argv: &[&str]| {
        let spec = ExecSpec {
            argv: argv.iter().map(|word| word.as_bytes().to_vec()).collect(),
            ..ExecSpec::default()
        };
        sandbox.client().exec(spec)
    };
    for (argv, expected) in [
        (&["no-such-program"][..], 2),
        (&["/no/such/program"], 2),
        (&["/etc/passwd"], 13),
        (&["/etc"], 13),
        (&["/etc/passwd/x"], 2),
        (&["a\0b"], 22),
        (&[], 22),
    ] {
        match exec(argv).await {
            Err(error) if errno(&error) == Some(expected) => {}
            other => return Err(format!("{argv:?}: {other:?}").into()),
        }
    }
    Ok(())
}

async fn terminal(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let spec = ExecSpec {
        pty: Some(PtySize { rows: 31, cols: 97 }),
        ..as_user(
            "stty size; tty; trap 'echo caught' INT; echo ready; read line; stty size; echo \"<$line>\"; exec cat",
        )
    };
    let session = sandbox.client().exec(spec).await?;
    let mut output = session.attach(0, true);
    let mut seen = String::new();
    while !seen.contains("ready") {
        let Some(chunk) = output.next().await else {
            return Err(format!("ended early: {seen:?}").into());
        };
        seen.push_str(&String::from_utf8_lossy(&chunk.data));
    }
    ensure!(seen.starts_with("31 97\r\n/dev/pts/"), "{seen:?}");
    session.resize(PtySize { rows: 10, cols: 20 }).await?;
    session
        .write_stdin(Bytes::from_static(b"\x03typed\n"))
        .await?;
    session.close_stdin().await?;
    let rest = drain(output).await;
    let rest = String::from_utf8_lossy(&rest.stdout).into_owned();
    ensure!(
        rest.contains("caught") && rest.contains("10 20") && rest.contains("<typed>"),
        "{rest:?}"
    );
    let status = session.wait().await?.status;
    ensure!(status == ExitStatus::Exited(0), "{status:?}");
    Ok(())
}

async fn confined(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let (_, printed) = run(
        &sandbox,
        as_user(
            "unshare -Urm sh -c 'id -u; mount -t tmpfs none /mnt && echo mounted'
             for path in /proc/sysrq-trigger /proc/sys/kernel/hostname /proc/1/mem /sys/fs/cgroup/cgroup.procs \
                 /sys/fs/cgroup/agent/memory.max /sys/power /dev /dev/kmsg /run /etc/passwd; do
                 test -w $path && echo \"writable: $path\"
             done
             for path in /dev/null /dev/shm /tmp /home/user; do test -w $path || echo \"not writable: $path\"; done
             ls /dev/vd* /dev/vport* 2>/dev/null
             kill -9 1 2>/dev/null && echo killed
             true",
        ),
    )
    .await?;
    let stdout = String::from_utf8_lossy(&printed.stdout).into_owned();
    ensure!(stdout == "0\nmounted\n", "{printed:?}");
    Ok(())
}

async fn first_process(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    // Signals, its memory limit, its control group, the port it listens on.
    let (_, printed) = run(
        &sandbox,
        script(
            "kill -9 1; kill -STOP 1; kill -INT 1
             mount -o remount,rw /sys/fs/cgroup
             echo 1 > /sys/fs/cgroup/cgroup.kill
             mknod /tmp/port c $(sed s/:/\\ / /sys/class/virtio-ports/*/dev) && echo garbage > /tmp/port
             echo still here",
        ),
    )
    .await?;
    let stdout = String::from_utf8_lossy(&printed.stdout).into_owned();
    ensure!(stdout == "still here\n", "{printed:?}");
    sandbox.client().ping().await?;
    Ok(())
}

async fn regular_files(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    stdout_of(
        &sandbox,
        "mkfifo /tmp/fifo; ln -s ../../../.. /tmp/up; ln -s /etc/shadow /tmp/absolute; ln -s /proc/1/root /tmp/magic
         mkdir /tmp/dir; echo inside > /etc/marker",
    )
    .await?;
    let client = sandbox.client();
    for path in [
        "/tmp/fifo",
        "/dev/zero",
        "/tmp/dir",
        "/tmp/magic/etc/marker",
        "/proc/1/root/etc/marker",
        "/no/such",
        "",
    ] {
        let mut sink = Vec::new();
        let read = client.read_file(path, &mut sink).await;
        ensure!(read.is_err(), "reading {path:?}: {read:?}");
    }
    let mut marker = Vec::new();
    client.read_file("/tmp/up/etc/marker", &mut marker).await?;
    ensure!(marker == b"inside\n", "{marker:?}");
    for path in [
        "/tmp/fifo",
        "/tmp/dir",
        "/dev/null",
        "relative",
        "/no/such/dir/file",
    ] {
        let spec = FileSpec {
            path: path.to_owned(),
            mode: 0o600,
            user: UserSpec::Root,
        };
        let written = client.write_file(spec, &b"x"[..]).await;
        ensure!(written.is_err(), "writing {path:?}: {written:?}");
    }
    let left = stdout_of(&sandbox, "find /tmp /dev -name '*.part'; test -c /dev/null").await?;
    ensure!(left.is_empty(), "{left}");
    Ok(())
}

async fn left_behind(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let text = "setsid sleep 4321 >/dev/null 2>&1 </dev/null & echo started";
    for (kill_group_on_exit, expected) in [(false, "1"), (true, "1")] {
        let spec = ExecSpec {
            kill_group_on_exit,
            ..as_user(text)
        };
        run(&sandbox, spec).await?;
        // The survivor of the first round and nobody else, both times.
        let count = stdout_of(&sandbox, "pgrep -fxc 'sleep 4321' || true").await?;
        ensure!(count == expected, "{kill_group_on_exit}: {count}");
    }
    // A process whose parent has gone is adopted, and reaped when it ends.
    let orphans = "for i in 1 2 3 4 5 6 7 8; do (setsid sleep 0 &) ; done
        while pgrep -fx 'sleep 0' || ps -eo stat= | grep -q Z; do :; done >/dev/null";
    stdout_of(&sandbox, orphans).await?;
    Ok(())
}

async fn timeout(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let spec = ExecSpec {
        timeout: Some(Duration::from_millis(300)),
        ..as_user("setsid sleep 4321 & trap '' TERM INT; while :; do sleep 1; done")
    };
    let (report, _) = run(&sandbox, spec).await?;
    ensure!(report.status == ExitStatus::TimedOut, "{report:?}");
    let count = stdout_of(&sandbox, "pgrep -fxc 'sleep 4321' || true").await?;
    ensure!(count == "0", "{count}");
    Ok(())
}

async fn roots(room: Room) -> Outcome {
    let sandbox = room.restore().await?;
    let client = sandbox.client();
    let spec = ExecSpec {
        kill_group_on_exit: false,
        ..as_user("echo kept > /tmp/file; setsid sleep 4321 >/dev/null 2>&1 &")
    };
    run(&sandbox, spec).await?;
    let busy = client.exec(as_user("sleep 4321")).await?;
    client.kill_all().await?;
    let report = busy.wait().await?;
    ensure!(report.status == ExitStatus::Signaled(9), "{report:?}");
    let left = stdout_of(&sandbox, "cat /tmp/file; pgrep -fxc 'sleep 4321' || true").await?;
    ensure!(left == "kept\n0", "{left:?}");

    let again = client.mount(MountSource::Tmpfs).await;
    ensure!(
        again.is_err_and(|error| errno(&error) == Some(16)),
        "mounted twice"
    );
    client.unmount().await?;
    let homeless = client.exec(as_user("true")).await;
    ensure!(homeless.is_err(), "{homeless:?}");
    client.mount(MountSource::Tmpfs).await?;
    let fresh = stdout_of(&sandbox, "ls /tmp; findmnt -no FSTYPE / || true").await?;
    ensure!(fresh == "overlay", "{fresh:?}");
    Ok(())
}
