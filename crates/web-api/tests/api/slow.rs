//! NATS far away: everything that goes to it or comes from it is late.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::faults::{Tokens, survives};
use crate::nats::Kind;
use crate::world;

/// How late, each way.
const LATE: Duration = Duration::from_millis(40);

async fn late(
    mut from: impl tokio::io::AsyncRead + Unpin,
    mut to: impl tokio::io::AsyncWrite + Unpin,
) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut bytes).await {
        tokio::time::sleep(LATE).await;
        if to.write_all(&bytes[..read]).await.is_err() {
            return;
        }
    }
}

/// An address at which the server answers late.
async fn slowly(server: String) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = TcpStream::connect(&server).await.unwrap();
            let (client_in, client_out) = client.into_split();
            let (server_in, server_out) = server.into_split();
            tokio::spawn(late(client_in, server_out));
            tokio::spawn(late(server_in, client_out));
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_that_is_slow_costs_no_run() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let url = world.nats.url();
    let (_, server) = url.rsplit_once('@').unwrap();
    let address = slowly(server.to_owned()).await;
    let late = format!("nats://app:app@{address}");
    let (near, far) = (world.process(&[]), world.process(&["--nats-url", &late]));
    let urls = vec![far.url.clone(), near.url.clone()];
    survives(&Tokens::of(&world), urls, || async {
        tokio::time::sleep(Duration::from_secs(3)).await;
    })
    .await;
}
