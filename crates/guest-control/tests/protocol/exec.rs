//! Sessions, over real processes.

use std::time::Duration;

use crate::common::{argv, pair, sh, soon};
use bytes::Bytes;
use guest_control::{ControlError, ExecSpec, ExitStatus, Output, PtySize, Session, Stream, Wake};

async fn everything(mut output: Output) -> (Vec<u8>, Vec<u8>) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    while let Some(chunk) = output.next().await {
        match chunk.stream {
            Stream::Stdout => out.extend_from_slice(&chunk.data),
            Stream::Stderr => err.extend_from_slice(&chunk.data),
        }
    }
    (out, err)
}

async fn stdout(session: &Session) -> String {
    String::from_utf8(everything(session.attach(0, true)).await.0).unwrap()
}

#[tokio::test]
async fn output_and_exit_status_arrive() {
    let pair = pair().await;
    let session = soon(pair.client.exec(sh("echo out; echo err >&2; exit 3")))
        .await
        .unwrap();
    let (out, err) = soon(everything(session.attach(0, false))).await;
    assert_eq!((out, err), (b"out\n".to_vec(), b"err\n".to_vec()));
    let report = soon(session.wait()).await.unwrap();
    assert_eq!(report.status, ExitStatus::Exited(3));
}

#[tokio::test]
async fn all_output_is_in_the_ring_when_wait_returns() {
    let pair = pair().await;
    let session = soon(pair.client.exec(sh("head -c 900000 /dev/zero")))
        .await
        .unwrap();
    soon(session.wait()).await.unwrap();
    // Nobody was attached meanwhile; whoever comes late sees it all, twice if they like.
    for _ in 0..2 {
        let (out, _) = soon(everything(session.attach(0, false))).await;
        assert_eq!(out.len(), 900_000);
    }
    let (tail, _) = soon(everything(session.attach(899_990, false))).await;
    assert_eq!(tail.len(), 10);
}

#[tokio::test]
async fn a_late_reader_sees_the_last_mebibyte_and_where_it_begins() {
    let pair = pair().await;
    let session = soon(pair.client.exec(sh("head -c 5000000 /dev/zero")))
        .await
        .unwrap();
    soon(session.wait()).await.unwrap();
    let mut output = session.attach(0, false);
    let first = soon(output.next()).await.unwrap();
    assert_eq!(first.offset, 5_000_000 - 1024 * 1024);
}

#[tokio::test]
async fn a_lossless_reader_loses_nothing_however_slow_it_is() {
    let pair = pair().await;
    let session = soon(pair.client.exec(sh("seq 1 700000"))).await.unwrap();
    let mut output = session.attach(0, true);
    let mut seen = Vec::new();
    while let Some(chunk) = soon(output.next()).await {
        assert_eq!(chunk.offset, seen.len() as u64);
        seen.extend_from_slice(&chunk.data);
        // Slower than the process: everybody else goes first.
        tokio::task::yield_now().await;
    }
    let expected: String = (1..=700_000).map(|n| format!("{n}\n")).collect();
    assert!(seen == expected.as_bytes());
}

#[tokio::test]
async fn a_reader_that_does_not_read_stalls_only_its_own_process() {
    let pair = pair().await;
    let flood = soon(pair.client.exec(argv(&["cat", "/dev/zero"])))
        .await
        .unwrap();
    let mut output = flood.attach(0, true);
    soon(output.next()).await.unwrap();
    // The flood now waits for its reader; others do not.
    for _ in 0..20 {
        soon(pair.client.ping()).await.unwrap();
        let other = soon(pair.client.exec(sh("echo fine"))).await.unwrap();
        assert_eq!(soon(stdout(&other)).await, "fine\n");
    }
    soon(flood.kill()).await.unwrap();
    // The reader still does not read: a killed process ends without it.
    let report = soon(flood.wait()).await.unwrap();
    assert_eq!(report.status, ExitStatus::Signaled(9));
}

#[tokio::test]
async fn stdin_arrives_whole_and_its_end_too() {
    let pair = pair().await;
    let spec = ExecSpec {
        stdin: true,
        ..argv(&["cat"])
    };
    let session = soon(pair.client.exec(spec)).await.unwrap();
    let reader = tokio::spawn(everything(session.attach(0, true)));
    let piece = Bytes::from((0..=255).cycle().take(100_000).collect::<Vec<u8>>());
    for _ in 0..30 {
        soon(session.write_stdin(piece.clone())).await.unwrap();
    }
    soon(session.close_stdin()).await.unwrap();
    let (out, _) = soon(reader).await.unwrap();
    assert_eq!(out.len(), 3_000_000);
    assert!(out.chunks(100_000).all(|chunk| chunk == piece));
    assert_eq!(
        soon(session.wait()).await.unwrap().status,
        ExitStatus::Exited(0)
    );
    let late = soon(session.write_stdin(piece)).await.unwrap_err();
    assert!(
        matches!(
            late,
            ControlError::Guest {
                errno: Some(32),
                ..
            }
        ),
        "{late}"
    );
}

#[tokio::test]
async fn writing_to_a_process_that_closed_its_stdin_fails_and_does_not_hang() {
    let pair = pair().await;
    let spec = ExecSpec {
        stdin: true,
        ..sh("exec 0<&-; echo closed; sleep 1000")
    };
    let session = soon(pair.client.exec(spec)).await.unwrap();
    let mut output = session.attach(0, false);
    soon(output.next()).await.unwrap();
    let error = soon(async {
        loop {
            if let Err(error) = session.write_stdin(Bytes::from_static(&[0; 4096])).await {
                break error;
            }
        }
    })
    .await;
    assert!(
        matches!(
            error,
            ControlError::Guest {
                errno: Some(32),
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn signals_kills_and_timeouts_are_told_apart() {
    let pair = pair().await;
    let sleep = || pair.client.exec(argv(&["sleep", "1000"]));
    let session = soon(sleep()).await.unwrap();
    soon(session.signal(libc::SIGTERM)).await.unwrap();
    let status = soon(session.wait()).await.unwrap().status;
    assert_eq!(status, ExitStatus::Signaled(libc::SIGTERM));
    // It is over: nothing to signal, no error either.
    soon(session.signal(libc::SIGTERM)).await.unwrap();

    let session = soon(sleep()).await.unwrap();
    soon(session.kill()).await.unwrap();
    let status = soon(session.wait()).await.unwrap().status;
    assert_eq!(status, ExitStatus::Signaled(libc::SIGKILL));

    let spec = ExecSpec {
        timeout: Some(Duration::from_millis(50)),
        ..argv(&["sleep", "1000"])
    };
    let session = soon(pair.client.exec(spec)).await.unwrap();
    let status = soon(session.wait()).await.unwrap().status;
    assert_eq!(status, ExitStatus::TimedOut);
}

#[tokio::test]
async fn a_child_that_keeps_the_pipe_does_not_keep_the_session() {
    let pair = pair().await;
    let spec = ExecSpec {
        kill_group_on_exit: false,
        ..sh("echo before; sleep 1000 & exit 4")
    };
    let session = soon(pair.client.exec(spec)).await.unwrap();
    let report = soon(session.wait()).await.unwrap();
    assert_eq!(report.status, ExitStatus::Exited(4));
    assert_eq!(soon(stdout(&session)).await, "before\n");
}

#[tokio::test]
async fn what_a_job_leaves_behind_is_killed_with_it() {
    let pair = pair().await;
    let session = soon(pair.client.exec(sh("sleep 1000 & echo $!")))
        .await
        .unwrap();
    soon(session.wait()).await.unwrap();
    let pid = soon(stdout(&session)).await;
    soon(gone(&pid)).await;
}

/// Waits until a process has ended (or is a zombie that nobody here can reap).
async fn gone(pid: &str) {
    let path = format!("/proc/{}/stat", pid.trim());
    while std::fs::read_to_string(&path).is_ok_and(|stat| !stat.contains(") Z")) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn large_arguments_and_environments_arrive() {
    let pair = pair().await;
    let value = "v".repeat(120 * 1024);
    let spec = ExecSpec {
        argv: vec![
            b"sh".to_vec(),
            b"-c".to_vec(),
            b"printf %s \"$1$V0$V7\" | wc -c".to_vec(),
            b"sh".to_vec(),
            vec![b'p'; 96 * 1024],
        ],
        env: (0..10).map(|n| (format!("V{n}"), value.clone())).collect(),
        kill_group_on_exit: true,
        ..ExecSpec::default()
    };
    let session = soon(pair.client.exec(spec)).await.unwrap();
    let expected = (96 + 240) * 1024;
    assert_eq!(soon(stdout(&session)).await.trim(), expected.to_string());
}

#[tokio::test]
async fn a_request_beyond_all_limits_is_refused_and_harms_nobody() {
    let pair = pair().await;
    let spec = ExecSpec {
        env: vec![("HUGE".to_owned(), "x".repeat(5 * 1024 * 1024))],
        ..argv(&["true"])
    };
    let error = soon(pair.client.exec(spec)).await.unwrap_err();
    assert!(
        matches!(error, ControlError::Guest { errno: Some(7), .. }),
        "{error}"
    );
    soon(pair.client.ping()).await.unwrap();
}

#[tokio::test]
async fn a_program_that_is_not_there_is_an_error_with_its_number() {
    let pair = pair().await;
    let error = soon(pair.client.exec(argv(&["/no/such\u{7}program"])))
        .await
        .unwrap_err();
    assert!(
        matches!(error, ControlError::Guest { errno: Some(2), .. }),
        "{error}"
    );
    assert!(!error.to_string().contains('\u{7}'));
}

#[tokio::test]
async fn a_failed_wake_starts_nothing() {
    let pair = pair().await;
    let marker = pair.os.dir.path().join("started");
    let spec = |entropy| ExecSpec {
        wake: Some(Wake {
            realtime_ns: 77,
            entropy,
        }),
        ..argv(&["touch", marker.to_str().unwrap()])
    };
    soon(pair.client.exec(spec([0; 32]))).await.unwrap_err();
    assert!(!marker.exists());
    let session = soon(pair.client.exec(spec([1; 32]))).await.unwrap();
    soon(session.wait()).await.unwrap();
    assert!(marker.exists());
    let woken = std::fs::read_to_string(pair.os.dir.path().join("woken")).unwrap();
    assert_eq!(woken, "77");
}

#[tokio::test]
async fn a_terminal_has_a_size_echoes_and_ends() {
    let pair = pair().await;
    let spec = ExecSpec {
        pty: Some(PtySize { rows: 33, cols: 99 }),
        ..sh("stty size; read line; stty size; cat")
    };
    let session = soon(pair.client.exec(spec)).await.unwrap();
    let mut output = session.attach(0, true);
    let first = soon(output.next()).await.unwrap();
    assert!(first.data.starts_with(b"33 99"));
    soon(session.resize(PtySize { rows: 10, cols: 20 }))
        .await
        .unwrap();
    soon(session.write_stdin(Bytes::from_static(b"go\n")))
        .await
        .unwrap();
    soon(session.close_stdin()).await.unwrap();
    let report = soon(session.wait()).await.unwrap();
    assert_eq!(report.status, ExitStatus::Exited(0));
    let (rest, _) = soon(everything(output)).await;
    let rest = String::from_utf8(rest).unwrap();
    assert!(rest.contains("10 20"), "{rest:?}");
}

#[tokio::test]
async fn a_start_nobody_waits_for_is_undone() {
    let pair = pair().await;
    let marker = pair.os.dir.path().join("pid");
    let spec = sh(&format!("echo $$ > {}; exec sleep 1000", marker.display()));
    {
        let exec = pair.client.exec(spec);
        tokio::pin!(exec);
        // Polled once: the request is on its way. Then given up.
        let first = std::future::poll_fn(|cx| std::task::Poll::Ready(exec.as_mut().poll(cx))).await;
        assert!(first.is_pending());
    }
    // Once the guest has forgotten the operation it can become quiet.
    soon(async {
        while pair.client.clone().quiesce().await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    if let Ok(pid) = std::fs::read_to_string(&marker) {
        soon(gone(&pid)).await;
    }
}
