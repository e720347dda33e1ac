//! Server and client together, over a real socket in a real home, with guest-control's own server behind them.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use guest_control::{ExecSpec, ExitStatus, FileSpec, PtySize, UserSpec};

use super::client::{self, ActiveRun};
use super::protocol::{self, Connection, Input, Reply, Request, STDIN_WINDOW};
use super::test_guest::{Daemon, eventually};
use crate::names::RunId;

fn bash(line: &str) -> ExecSpec {
    ExecSpec {
        argv: vec![b"bash".to_vec(), b"-c".to_vec(), line.as_bytes().to_vec()],
        stdin: true,
        ..ExecSpec::default()
    }
}

struct Finished {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    status: ExitStatus,
}

async fn receive(connection: &mut Connection) -> Reply {
    let reply = tokio::time::timeout(
        Duration::from_secs(20),
        protocol::receive::<Reply, _>(connection),
    );
    reply.await.expect("an answer in time").unwrap().unwrap()
}

async fn exec(run: &ActiveRun, spec: ExecSpec) -> (Connection, u32) {
    let request = Request::Exec {
        run: run.info.run_id,
        spec,
        detach: false,
    };
    let mut connection = run.instance.request(&request).await.unwrap();
    match receive(&mut connection).await {
        Reply::Started { session, .. } => (connection, session),
        other => panic!("{other:?}"),
    }
}

async fn finish(connection: &mut Connection) -> Finished {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match receive(connection).await {
            Reply::Output { stderr: true, data } => stderr.extend_from_slice(&data),
            Reply::Output { data, .. } => stdout.extend_from_slice(&data),
            Reply::StdinTaken(_) => {}
            Reply::Exited(report) => {
                return Finished {
                    stdout,
                    stderr,
                    status: report.status,
                };
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Reads output until `wanted` was printed.
async fn wait_for(connection: &mut Connection, wanted: &str) {
    let mut seen = String::new();
    while !seen.contains(wanted) {
        match receive(connection).await {
            Reply::Output { data, .. } => seen.push_str(&String::from_utf8_lossy(&data)),
            Reply::StdinTaken(_) => {}
            other => panic!("{other:?} before {wanted:?} in {seen:?}"),
        }
    }
}

async fn send(connection: &mut Connection, input: Input) {
    protocol::send(connection, &input).await.unwrap();
}

async fn only_run(daemon: &Daemon) -> ActiveRun {
    let mut runs = client::active_runs(&daemon.home).await.unwrap();
    assert_eq!(runs.len(), 1);
    runs.remove(0)
}

#[tokio::test]
async fn streams_are_byte_exact_and_the_exit_code_is_the_commands() {
    let daemon = Daemon::start();
    let run = only_run(&daemon).await;
    let (mut connection, _) = exec(&run, bash("printf 'a\\0\\377b'; printf err >&2; exit 7")).await;
    let finished = finish(&mut connection).await;
    assert_eq!(finished.stdout, b"a\0\xffb");
    assert_eq!(finished.stderr, b"err");
    assert_eq!(finished.status, ExitStatus::Exited(7));
}

#[tokio::test]
async fn stdin_beyond_every_window_comes_back_whole() {
    let daemon = Daemon::start();
    let run = only_run(&daemon).await;
    let data: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let (mut connection, _) = exec(&run, bash("cat")).await;
    let (mut sent, mut taken, mut back) = (0, 0, Vec::new());
    let mut ended = false;
    loop {
        while sent < data.len() && sent - taken + 16_384 <= STDIN_WINDOW {
            let end = data.len().min(sent + 16_384);
            send(
                &mut connection,
                Input::Stdin(Bytes::copy_from_slice(&data[sent..end])),
            )
            .await;
            sent = end;
        }
        if sent == data.len() && !ended {
            ended = true;
            send(&mut connection, Input::EndOfStdin).await;
        }
        match receive(&mut connection).await {
            Reply::Output { data, .. } => back.extend_from_slice(&data),
            Reply::StdinTaken(bytes) => taken += bytes as usize,
            Reply::Exited(report) => {
                assert_eq!(report.status, ExitStatus::Exited(0));
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(taken, data.len());
    assert!(back == data, "{} of {} bytes", back.len(), data.len());
}

#[tokio::test]
async fn a_command_that_does_not_read_still_gets_its_signals() {
    let daemon = Daemon::start();
    let run = only_run(&daemon).await;
    let (mut connection, _) = exec(&run, bash("echo ready; exec sleep 1000")).await;
    wait_for(&mut connection, "ready").await;
    let mut left = STDIN_WINDOW;
    while left > 0 {
        send(&mut connection, Input::Stdin(vec![b'x'; 32_768].into())).await;
        left -= 32_768;
    }
    send(&mut connection, Input::Signal(libc::SIGTERM)).await;
    let finished = finish(&mut connection).await;
    assert_eq!(finished.status, ExitStatus::Signaled(libc::SIGTERM));
}

#[tokio::test]
async fn more_stdin_than_the_window_ends_the_connection_and_the_command() {
    let daemon = Daemon::start();
    let run = only_run(&daemon).await;
    let (mut connection, _) = exec(&run, bash("echo $$; exec sleep 1000")).await;
    for _ in 0..64 {
        let flood = Input::Stdin(vec![b'x'; 65_536].into());
        if protocol::send(&mut connection, &flood).await.is_err() {
            break;
        }
    }
    eventually("the command is killed", || daemon.processes() == 0).await;
}

#[tokio::test]
async fn a_client_that_goes_away_takes_its_command_with_it() {
    let daemon = Daemon::start();
    let run = only_run(&daemon).await;
    let (mut connection, _) = exec(&run, bash("echo ready; exec sleep 1000")).await;
    wait_for(&mut connection, "ready").await;
    assert_eq!(daemon.processes(), 1);
    drop(connection);
    eventually("the command is killed", || daemon.processes() == 0).await;
}

#[tokio::test]
async fn a_detached_session_lives_on_and_can_be_attached_to_once() {
    let daemon = Daemon::start();
    let run = only_run(&daemon).await;
    let (mut connection, session) =
        exec(&run, bash("echo before; read line; echo got $line; exit 3")).await;
    wait_for(&mut connection, "before").await;
    send(&mut connection, Input::Detach).await;
    assert!(
        protocol::receive::<Reply, _>(&mut connection)
            .await
            .unwrap()
            .is_none()
    );
    let attach = Request::Attach {
        run: run.info.run_id,
        session,
        size: None,
    };
    let mut again = run.instance.request(&attach).await.unwrap();
    assert!(matches!(receive(&mut again).await, Reply::Started { .. }));
    let mut second = run.instance.request(&attach).await.unwrap();
    assert!(matches!(receive(&mut second).await, Reply::Failed(_)));
    send(&mut again, Input::Stdin("hello\n".into())).await;
    let finished = finish(&mut again).await;
    assert_eq!(finished.stdout, b"before\ngot hello\n");
    assert_eq!(finished.status, ExitStatus::Exited(3));
}

#[tokio::test]
async fn a_session_that_somebody_asked_for_and_went_away_is_still_there() {
    let daemon = Daemon::start();
    let run = only_run(&daemon).await;
    let (mut connection, session) = exec(&run, bash("read line; echo got $line")).await;
    send(&mut connection, Input::Detach).await;
    let end = protocol::receive::<Reply, _>(&mut connection).await;
    assert!(end.unwrap().is_none());
    let attach = Request::Attach {
        run: run.info.run_id,
        session,
        size: None,
    };
    // Gone before the server, which has its turn at the next wait, can answer. It has the session then, and nobody else can,
    // until it finds that out.
    drop(run.instance.request(&attach).await.unwrap());
    let begin = std::time::Instant::now();
    let mut again = loop {
        let mut again = run.instance.request(&attach).await.unwrap();
        let reply = receive(&mut again).await;
        if matches!(reply, Reply::Started { .. }) {
            break again;
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "{reply:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    send(&mut again, Input::Stdin("hello\n".into())).await;
    assert_eq!(finish(&mut again).await.stdout, b"got hello\n");
}

#[tokio::test]
async fn a_terminal_has_its_size_and_its_new_size() {
    let daemon = Daemon::start();
    let run = only_run(&daemon).await;
    let spec = ExecSpec {
        pty: Some(PtySize { rows: 33, cols: 77 }),
        ..bash("stty size; read; stty size")
    };
    let (mut connection, _) = exec(&run, spec).await;
    wait_for(&mut connection, "33 77").await;
    send(
        &mut connection,
        Input::Resize(PtySize { rows: 11, cols: 22 }),
    )
    .await;
    send(&mut connection, Input::Stdin("\r".into())).await;
    wait_for(&mut connection, "11 22").await;
    assert_eq!(finish(&mut connection).await.status, ExitStatus::Exited(0));
}

#[tokio::test]
async fn what_cannot_be_started_says_so_with_its_errno() {
    let daemon = Daemon::start();
    let run = only_run(&daemon).await;
    let request = Request::Exec {
        run: run.info.run_id,
        spec: ExecSpec {
            argv: vec![b"/no/such/program".to_vec()],
            ..ExecSpec::default()
        },
        detach: false,
    };
    let mut connection = run.instance.request(&request).await.unwrap();
    match receive(&mut connection).await {
        Reply::Failed(failure) => assert_eq!(failure.errno, Some(libc::ENOENT)),
        other => panic!("{other:?}"),
    }
}

async fn write(run: &ActiveRun, path: &Path) -> Connection {
    let request = Request::WriteFile {
        run: run.info.run_id,
        file: FileSpec {
            path: path.to_str().unwrap().to_owned(),
            mode: 0o640,
            user: UserSpec::User,
        },
    };
    run.instance.request(&request).await.unwrap()
}

#[tokio::test]
async fn files_go_in_and_out_whole() {
    let daemon = Daemon::start();
    let run = only_run(&daemon).await;
    let data: Vec<u8> = (0..500_000_u32).flat_map(u32::to_le_bytes).collect();
    let path = daemon.guest_dir().join("file");
    let mut connection = write(&run, &path).await;
    for piece in data.chunks(protocol::CHUNK) {
        send(&mut connection, Input::Stdin(Bytes::copy_from_slice(piece))).await;
    }
    send(&mut connection, Input::EndOfStdin).await;
    assert!(matches!(receive(&mut connection).await, Reply::Done));
    assert!(std::fs::read(&path).unwrap() == data);

    let request = Request::ReadFile {
        run: run.info.run_id,
        path: path.to_str().unwrap().to_owned(),
    };
    let mut connection = run.instance.request(&request).await.unwrap();
    let mut back = Vec::new();
    loop {
        match receive(&mut connection).await {
            Reply::Data(piece) => back.extend_from_slice(&piece),
            Reply::Done => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(back == data);
}

#[tokio::test]
async fn a_file_whose_sender_goes_away_never_appears() {
    let daemon = Daemon::start();
    let run = only_run(&daemon).await;
    let path = daemon.guest_dir().join("half");
    let mut connection = write(&run, &path).await;
    send(&mut connection, Input::Stdin(vec![1; 50_000].into())).await;
    drop(connection);
    eventually("the half file is dropped", || daemon.dropped_files() == 1).await;
    assert!(!path.exists());
}

#[tokio::test]
async fn a_missing_file_is_told_with_its_errno() {
    let daemon = Daemon::start();
    let run = only_run(&daemon).await;
    let request = Request::ReadFile {
        run: run.info.run_id,
        path: "/no/such/file".to_owned(),
    };
    let mut connection = run.instance.request(&request).await.unwrap();
    match receive(&mut connection).await {
        Reply::Failed(failure) => assert_eq!(failure.errno, Some(libc::ENOENT)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn runs_are_found_by_prefix_and_only_among_the_living() {
    let daemon = Daemon::start();
    let id = daemon.run().to_string();
    let found = client::find(&daemon.home, &id[..8].parse().unwrap()).await;
    assert_eq!(found.unwrap().info.run_id, daemon.run());
    let other = if id.starts_with('0') { "1" } else { "0" };
    let error = client::find(&daemon.home, &other.parse().unwrap()).await;
    assert!(error.unwrap_err().to_string().contains(&id));
    let home = daemon.stop();
    assert!(client::active_runs(&home).await.unwrap().is_empty());
}

#[tokio::test]
async fn an_unknown_run_is_refused_and_a_known_one_cancelled() {
    let daemon = Daemon::start();
    let run = only_run(&daemon).await;
    let ask = |run_id: RunId| Request::Cancel { run: run_id };
    let reply = run.instance.ask(&ask(RunId::random())).await.unwrap();
    assert!(matches!(reply, Reply::Failed(_)));
    let reply = run.instance.ask(&ask(daemon.run())).await.unwrap();
    assert!(matches!(reply, Reply::Done));
    assert!(daemon.is_cancelled());
}

#[tokio::test]
async fn a_policy_is_shown_and_changed_and_a_refusal_says_what_to_do() {
    use crate::cmd::policy::ask;
    let daemon = Daemon::start();
    let mut run = only_run(&daemon).await;
    let before = ask(&run, Vec::new(), Vec::new()).await.unwrap();
    assert_eq!(before, policy::Policy::default().to_json());
    let rule = |text: &str| vec![text.parse().unwrap()];
    let changed = ask(&run, rule("*.b.example"), rule("a.b.example:22")).await;
    let changed = policy::Policy::from_json(&changed.unwrap()).unwrap();
    let hosts: Vec<String> = changed
        .rules()
        .iter()
        .map(|rule| rule.host().to_string())
        .collect();
    assert_eq!(hosts, ["*.b.example", "a.b.example"]);
    let after = ask(&run, Vec::new(), Vec::new()).await.unwrap();
    assert_eq!(after, changed.to_json());
    let many = (0..=policy::MAX_RULES).map(|n| format!("h{n}.example").parse().unwrap());
    let refused = ask(&run, Vec::new(), many.collect()).await.unwrap_err();
    assert!(refused.to_string().contains("rules"), "{refused}");
    run.info.run_id = RunId::random();
    let refused = ask(&run, Vec::new(), Vec::new()).await.unwrap_err();
    assert_eq!(refused.to_string(), "no such run");
}

#[tokio::test]
async fn garbage_ends_one_connection_and_nothing_else() {
    use futures_util::SinkExt;
    let daemon = Daemon::start();
    let run = only_run(&daemon).await;
    for garbage in [vec![0xff; 40], Vec::new()] {
        let mut connection = run.instance.request(&Request::Status).await.unwrap();
        assert!(matches!(receive(&mut connection).await, Reply::Status(_)));
        let (mut connection, _) = exec(&run, bash("exec sleep 1000")).await;
        connection.send(Bytes::from(garbage)).await.unwrap();
        eventually("the command is killed", || daemon.processes() == 0).await;
    }
    only_run(&daemon).await;
}

#[tokio::test]
async fn a_stranger_is_not_heard() {
    use std::os::unix::fs::PermissionsExt;
    let temp = tempfile::tempdir().unwrap();
    let socket = temp.path().join(super::SOCKET);
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    // Wide open, so that only the credentials decide.
    for path in [temp.path(), &socket] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    let daemon = Daemon::start();
    let me = rustix::process::geteuid();
    let (owner, stranger) = if me.is_root() {
        (0, Some(rustix::process::Uid::from_raw(65534)))
    } else {
        // Root is always heard, so somebody else plays the owner and we the stranger.
        (me.as_raw() + 1, None)
    };
    let server = tokio::spawn(super::server::serve(
        listener,
        owner,
        daemon.lookup(),
        Daemon::audit(&daemon.home),
    ));
    let stream = std::thread::spawn(move || {
        if let Some(uid) = stranger {
            // This thread's own: the kernel keeps credentials by thread, and the thread ends with this closure.
            rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
        }
        std::os::unix::net::UnixStream::connect(&socket).unwrap()
    });
    let stream = stream.join().unwrap();
    stream.set_nonblocking(true).unwrap();
    let mut connection = protocol::frame(tokio::net::UnixStream::from_std(stream).unwrap());
    // It may be closed before or after this arrives; it is never answered.
    let _ = protocol::send(&mut connection, &Request::Runs).await;
    let answer = tokio::time::timeout(
        Duration::from_secs(20),
        protocol::receive::<Reply, _>(&mut connection),
    );
    assert!(!matches!(answer.await.expect("the end"), Ok(Some(_))));
    server.abort();
}
