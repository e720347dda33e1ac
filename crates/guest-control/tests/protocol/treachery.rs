//! Guests and hosts that send whatever they like. Shared by the property tests and the fuzz target.

use std::sync::Arc;
use std::time::Duration;

use guest_control::server::{Os, serve};
use guest_control::{Client, ExecSpec};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

/// Answers the client's handshake as a guest does: the challenge's last 16 bytes come back.
pub(crate) async fn echo_handshake(far: &mut DuplexStream) {
    let length = far.read_u32().await.unwrap() as usize;
    let mut hello = vec![0; length];
    far.read_exact(&mut hello).await.unwrap();
    let mut answer = vec![0, 1];
    answer.extend_from_slice(&hello[hello.len() - 16..]);
    let length = u32::try_from(answer.len()).unwrap();
    far.write_all(&length.to_be_bytes()).await.unwrap();
    far.write_all(&answer).await.unwrap();
}

/// A client with one of each operation under way meets `bytes`. Every operation ends, and so does the channel.
pub(crate) async fn garbage_from_guest(bytes: &[u8]) {
    let (near, mut far) = tokio::io::duplex(64 * 1024);
    let connect = tokio::spawn(Client::connect(near, Duration::from_secs(60)));
    echo_handshake(&mut far).await;
    let client = connect.await.unwrap().unwrap();
    let operations = tokio::spawn(async move {
        let spec = ExecSpec {
            argv: vec![b"true".to_vec()],
            ..ExecSpec::default()
        };
        // In this order, so that operation ids are known to the sender: 1, 2, 3, 4.
        let (mut sink, source) = (Vec::new(), vec![0; 10_000]);
        let file = guest_control::FileSpec {
            path: "/x".to_owned(),
            mode: 0,
            user: guest_control::UserSpec::Root,
        };
        let _ = tokio::join!(
            biased;
            async {
                if let Ok(session) = client.exec(spec).await {
                    let mut output = session.attach(0, true);
                    while output.next().await.is_some() {}
                    let _ = session.wait().await;
                }
            },
            client.read_file("/x", &mut sink),
            client.write_file(file, &source[..]),
            client.ping(),
        );
        client.closed().await
    });
    // The host may hang up in the middle of it.
    let _ = far.write_all(bytes).await;
    drop(far);
    operations.await.unwrap();
}

/// A server meets `bytes` after a proper handshake, and ends.
pub(crate) async fn garbage_from_host<O: Os>(os: &Arc<O>, bytes: &[u8]) {
    let (mut near, mut far) = tokio::io::duplex(64 * 1024);
    let os = Arc::clone(os);
    let server = tokio::spawn(async move { serve(&mut far, &os).await });
    let mut hello = vec![0, b'v', b'm', b'0', b'c', 1];
    hello.extend([7; 16]);
    let length = u32::try_from(hello.len()).unwrap();
    let _ = near.write_all(&length.to_be_bytes()).await;
    let _ = near.write_all(&hello).await;
    let _ = near.write_all(bytes).await;
    drop(near);
    server.await.unwrap();
}
