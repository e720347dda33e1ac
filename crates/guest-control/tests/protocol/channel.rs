//! The channel itself: handshake, end, quiet, files, and guests that do not keep to the protocol.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use crate::common::{LocalOs, PATIENCE, argv, pair, sh, soon};
use guest_control::server::{Ended, serve};
use guest_control::{
    Client, CloseReason, ControlError, ExecSpec, FileSpec, MountSource, UserSpec, Wake,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};

fn file(path: &str) -> FileSpec {
    FileSpec {
        path: path.to_owned(),
        mode: 0o640,
        user: UserSpec::User,
    }
}

#[tokio::test]
async fn small_operations_have_answers() {
    let pair = pair().await;
    soon(pair.client.ping()).await.unwrap();
    soon(pair.client.mount(MountSource::Tmpfs)).await.unwrap();
    soon(pair.client.kill_all()).await.unwrap();
    assert_eq!(soon(pair.client.stats()).await.unwrap().processes, 7);
    let refused = soon(pair.client.unmount()).await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the guest could not drop the agent's root: nothing is mounted: Invalid argument (os error 22)"
    );
    let unseeded = Wake {
        realtime_ns: 1,
        entropy: [0; 32],
    };
    soon(pair.client.wake(unseeded)).await.unwrap_err();
    soon(pair.client.shutdown()).await.unwrap();
    assert_eq!(soon(pair.server).await.unwrap().0, Ended::Shutdown);
}

#[tokio::test]
async fn a_host_that_lets_go_is_noticed() {
    let pair = pair().await;
    drop(pair.client);
    assert_eq!(soon(pair.server).await.unwrap().0, Ended::HostGone);
}

#[tokio::test]
async fn a_guest_that_is_gone_fails_everything_pending() {
    let pair = pair().await;
    let session = soon(pair.client.exec(argv(&["sleep", "1000"])))
        .await
        .unwrap();
    pair.server.abort();
    assert_eq!(soon(pair.client.closed()).await, CloseReason::GuestGone);
    let error = soon(session.wait()).await.unwrap_err();
    assert!(matches!(error, ControlError::Closed), "{error}");
    assert!(soon(session.attach(0, true).next()).await.is_none());
    let error = soon(pair.client.ping()).await.unwrap_err();
    assert!(matches!(error, ControlError::Closed), "{error}");
}

#[tokio::test]
async fn a_silent_guest_is_given_up() {
    let (near, _far) = tokio::io::duplex(1024);
    let limit = std::time::Duration::from_millis(20);
    let error = soon(Client::connect(near, limit)).await.unwrap_err();
    assert!(matches!(error, ControlError::Timeout { .. }), "{error}");
}

#[tokio::test]
async fn quiet_leaves_nothing_in_the_stream_and_the_next_handshake_works() {
    let (near, mut far) = tokio::io::duplex(4096);
    // The near end outlives its client, as a hypervisor's end of a port does.
    let near = std::sync::Arc::new(tokio::sync::Mutex::new(near));
    let os = LocalOs::new();
    for _ in 0..3 {
        let lent = Lent(near.clone().lock_owned().await);
        let of_server = os.clone();
        let server = tokio::spawn(async move {
            let ended = serve(&mut far, &of_server).await;
            (ended, far)
        });
        let client = soon(Client::connect(lent, PATIENCE)).await.unwrap();
        let busy = soon(client.exec(argv(&["sleep", "1000"]))).await.unwrap();
        let error = soon(client.clone().quiesce()).await.unwrap_err();
        assert!(
            matches!(
                error,
                ControlError::Guest {
                    errno: Some(16),
                    ..
                }
            ),
            "{error}"
        );
        soon(busy.kill()).await.unwrap();
        soon(busy.wait()).await.unwrap();
        drop(busy);
        soon(client.quiesce()).await.unwrap();
        let (ended, back) = soon(server).await.unwrap();
        assert_eq!(ended, Ended::Quiet);
        far = back;
    }
}

/// A stream that is given back when its user drops it.
struct Lent(tokio::sync::OwnedMutexGuard<tokio::io::DuplexStream>);

impl AsyncRead for Lent {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_read(cx, buffer)
    }
}

impl tokio::io::AsyncWrite for Lent {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0).poll_write(cx, data)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_shutdown(cx)
    }
}

#[tokio::test]
async fn files_travel_whole_in_both_directions() {
    let pair = pair().await;
    for length in [0usize, 1, 64 * 1024, 3_000_001] {
        let content: Vec<u8> = (0..=255).cycle().take(length).collect();
        let written = soon(pair.client.write_file(file("/copy"), &content[..]))
            .await
            .unwrap();
        assert_eq!(written, length as u64);
        let mut back = Vec::new();
        let read = soon(pair.client.read_file("/copy", &mut back))
            .await
            .unwrap();
        assert_eq!(read, length as u64);
        assert!(back == content);
    }
}

#[tokio::test]
async fn files_that_cannot_be_had_are_errors_and_leave_the_channel_usable() {
    let pair = pair().await;
    let error = soon(pair.client.read_file("/no", &mut Vec::new()))
        .await
        .unwrap_err();
    assert!(
        matches!(error, ControlError::Guest { errno: Some(2), .. }),
        "{error}"
    );
    // More than a window, so that the refusal meets a sender that waits for credit.
    let much = vec![0; 2_000_000];
    let error = soon(pair.client.write_file(file("/no/such/dir"), &much[..]))
        .await
        .unwrap_err();
    assert!(
        matches!(error, ControlError::Guest { errno: Some(2), .. }),
        "{error}"
    );
    soon(pair.client.ping()).await.unwrap();
}

/// Yields some bytes, then an error.
struct Broken(usize);

impl AsyncRead for Broken {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.0 == 0 {
            return Poll::Ready(Err(io::Error::other("the disk is on fire")));
        }
        let count = self.0.min(buffer.remaining());
        buffer.put_slice(&vec![1; count]);
        self.0 -= count;
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn a_half_written_file_never_appears() {
    let pair = pair().await;
    let error = soon(pair.client.write_file(file("/half"), Broken(1_000_000)))
        .await
        .unwrap_err();
    assert!(matches!(error, ControlError::Local { .. }), "{error}");
    assert!(error.to_string().contains("on fire"));
    // Quiet needs all operations to have ended: then the temporary file is gone as well.
    soon(async {
        while pair.client.clone().quiesce().await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(pair.os.dir.path().read_dir().unwrap().count(), 0);
}

#[tokio::test]
async fn a_reader_that_fails_gives_the_transfer_up() {
    let pair = pair().await;
    let much = vec![7; 2_000_000];
    soon(pair.client.write_file(file("/much"), &much[..]))
        .await
        .unwrap();
    let (mut sink, _full) = tokio::io::duplex(10);
    let transfer = pair.client.read_file("/much", &mut sink);
    // The other end never reads: the transfer is dropped in the middle of it.
    let waited = tokio::time::timeout(std::time::Duration::from_millis(50), transfer).await;
    assert!(waited.is_err());
    let mut back = Vec::new();
    soon(pair.client.read_file("/much", &mut back))
        .await
        .unwrap();
    assert!(back == much);
}

#[tokio::test]
async fn many_things_at_once_do_not_mix() {
    let pair = pair().await;
    let mut tasks = Vec::new();
    for n in 0..24u32 {
        let client = pair.client.clone();
        tasks.push(tokio::spawn(async move {
            let spec = ExecSpec {
                stdin: true,
                ..sh(&format!("seq {n} 3 60000; cat"))
            };
            let session = client.exec(spec).await.unwrap();
            let input = session.clone();
            let feeder = tokio::spawn(async move {
                for line in 0..2000 {
                    let line = format!("{n}:{line}\n");
                    input.write_stdin(line.into()).await.unwrap();
                }
                input.close_stdin().await.unwrap();
            });
            let mut output = session.attach(0, true);
            let mut seen = Vec::new();
            while let Some(chunk) = output.next().await {
                seen.extend_from_slice(&chunk.data);
            }
            feeder.await.unwrap();
            let mut expected = String::new();
            for value in (n..=60_000).step_by(3) {
                expected += &format!("{value}\n");
            }
            for line in 0..2000 {
                expected += &format!("{n}:{line}\n");
            }
            assert!(seen == expected.as_bytes(), "session {n}");
        }));
    }
    for task in tasks {
        soon(task).await.unwrap();
    }
}

/// Shakes hands as a guest, then sends `frames`, each with its length.
async fn treacherous_guest(frames: &[&[u8]]) -> (Client, tokio::io::DuplexStream) {
    let (near, mut far) = tokio::io::duplex(1024 * 1024);
    let connect = tokio::spawn(Client::connect(near, PATIENCE));
    crate::treachery::echo_handshake(&mut far).await;
    let client = soon(connect).await.unwrap().unwrap();
    for frame in frames {
        let length = u32::try_from(frame.len()).unwrap();
        far.write_all(&length.to_be_bytes()).await.unwrap();
        far.write_all(frame).await.unwrap();
    }
    (client, far)
}

#[tokio::test]
async fn a_guest_that_breaks_the_protocol_ends_the_channel_with_a_reason() {
    let long = vec![0; 70_000];
    for (frame, reason) in [
        (&[0xff][..], "does not hold a message"),
        (&[][..], "does not hold a message"),
        // Pong 1, and a byte too many.
        (&[1, 1, 0][..], "do not belong"),
        (&[1, 1][..], "ping that was not sent"),
        // Data for operation 5.
        (&[3, 5, 0, 1, 2, 3][..], "takes none"),
        (&[4, 5][..], "has none"),
        (&[5, 5, 1][..], "sends nothing"),
        (&long[..], "longer than 64 KiB"),
    ] {
        let (client, _far) = treacherous_guest(&[frame]).await;
        match soon(client.closed()).await {
            CloseReason::Protocol(why) => assert!(why.contains(reason), "{why}"),
            other => panic!("{frame:?}: {other:?}"),
        }
        let error = soon(client.ping()).await.unwrap_err();
        assert!(matches!(error, ControlError::Protocol(_)), "{error}");
    }
}

#[tokio::test]
async fn a_guest_that_sends_beyond_its_credit_is_stopped() {
    let (client, mut far) = treacherous_guest(&[]).await;
    let exec = tokio::spawn(async move {
        let session = client.exec(argv(&["true"])).await.unwrap();
        // Lossless and never read: no credit comes back beyond the ring.
        let _output = session.attach(0, true);
        client.closed().await
    });
    // The exec request's frame.
    let length = far.read_u32().await.unwrap() as usize;
    far.read_exact(&mut vec![0; length]).await.unwrap();
    // Reply { op: 1, Ok(Started { pid: 9 }) }, then data for ever.
    let started = [2u8, 1, 0, 1, 9];
    far.write_all(&5u32.to_be_bytes()).await.unwrap();
    far.write_all(&started).await.unwrap();
    let mut flood = (60_003u32).to_be_bytes().to_vec();
    flood.extend([3, 1, 0]);
    flood.extend(vec![b'x'; 60_000]);
    let (mut read, mut write) = tokio::io::split(far);
    let drain = tokio::spawn(async move {
        let mut grants = Vec::new();
        let _ = read.read_to_end(&mut grants).await;
    });
    while write.write_all(&flood).await.is_ok() {}
    match soon(exec).await.unwrap() {
        CloseReason::Protocol(why) => assert!(why.contains("credit"), "{why}"),
        other => panic!("{other:?}"),
    }
    drop(write);
    soon(drain).await.unwrap();
}

#[tokio::test]
async fn nothing_but_the_handshake_is_accepted_first() {
    for reply in [
        // Pong 1.
        &[1u8, 1][..],
        // Hello of version 1 with another nonce.
        &[0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        // Hello of version 2.
        &[0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ] {
        let (near, mut far) = tokio::io::duplex(1024);
        let length = u32::try_from(reply.len()).unwrap();
        far.write_all(&length.to_be_bytes()).await.unwrap();
        far.write_all(reply).await.unwrap();
        let error = soon(Client::connect(near, PATIENCE)).await.unwrap_err();
        assert!(matches!(error, ControlError::Protocol(_)), "{error}");
    }
}
