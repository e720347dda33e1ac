//! Connections to the guest: Firecracker passes on what arrives at a Unix socket (its docs/vsock.md).

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// How often a guest that does not listen yet is tried again. Nothing tells when it does: it may take 100 ms or, where
/// it boots slowly, a minute.
const TRY_AGAIN: Duration = Duration::from_millis(10);
/// Longest first line: `OK` and a port number.
const MAX_LINE: usize = 32;

/// Connects to a port of the guest; waits for as long as it takes the guest to listen. Fails if the process does not
/// listen at `path`, or answers something else than it should.
pub(crate) async fn connect(path: &Path, port: u32) -> io::Result<UnixStream> {
    loop {
        let mut stream = UnixStream::connect(path).await?;
        if ask(&mut stream, port).await? {
            return Ok(stream);
        }
        tokio::time::sleep(TRY_AGAIN).await;
    }
}

/// Asks to be passed on; false if the guest does not listen.
async fn ask(stream: &mut UnixStream, port: u32) -> io::Result<bool> {
    let request = format!("CONNECT {port}\n");
    match stream.write_all(request.as_bytes()).await {
        Err(error) if is_gone(&error) => return Ok(false),
        other => other?,
    }
    let mut line = Vec::new();
    // Byte by byte: what follows the line is the guest's.
    while line.last() != Some(&b'\n') {
        match stream.read_u8().await {
            Ok(byte) if line.len() < MAX_LINE => line.push(byte),
            Ok(_) => break,
            Err(error) if is_gone(&error) && line.is_empty() => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    let line = String::from_utf8_lossy(&line);
    let port = line
        .strip_prefix("OK ")
        .and_then(|rest| rest.strip_suffix('\n'));
    if port.is_some_and(|port| port.parse::<u32>().is_ok()) {
        Ok(true)
    } else {
        let what = format!("Firecracker answered {line:?} to {request:?}");
        Err(io::Error::new(io::ErrorKind::InvalidData, what))
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    /// Answers connections one after another with these bytes.
    fn answering(answers: &'static [&'static [u8]]) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 13];
                stream.read_exact(&mut request).await.unwrap();
                assert_eq!(&request, b"CONNECT 1024\n");
                stream.write_all(answer).await.unwrap();
            }
        });
        (dir, path)
    }

    #[tokio::test]
    async fn a_guest_that_does_not_listen_yet_is_tried_again_and_its_first_bytes_are_kept() {
        let (_dir, path) = answering(&[b"", b"", b"OK 1073741824\nhello"]);
        let mut stream = connect(&path, 1024).await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "hello");
    }

    #[tokio::test]
    async fn nonsense_is_an_error() {
        const ANSWERS: [&[&[u8]]; 4] = [
            &[b"NO\n"],
            &[b"OK x\n"],
            &[b"OK 1234567890123456789012345678901234567890"],
            &[b"OK 12"],
        ];
        for answer in ANSWERS {
            let (_dir, path) = answering(answer);
            assert!(connect(&path, 1024).await.is_err(), "{answer:?}");
        }
    }

    #[tokio::test]
    async fn a_guest_that_is_connected_and_silent_is_waited_for_until_the_limit_around_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let silent = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 13];
            stream.read_exact(&mut request).await.unwrap();
            stream
        };
        let connect = async { Ok(connect(&path, 1024).await.unwrap()) };
        let limited = sandbox::parts::within("handshake", Duration::from_millis(50), connect);
        let (_stream, connected) = tokio::join!(silent, limited);
        let error = connected.err().unwrap().to_string();
        assert!(error.contains("`handshake` within 50ms"), "{error}");
    }

    #[tokio::test]
    async fn no_socket_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(connect(&dir.path().join("none"), 1024).await.is_err());
    }
}
