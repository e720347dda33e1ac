//! Random operations side by side over streams of random width: each gets what it would have got alone.

use bytes::Bytes;
use guest_control::{Client, ExecSpec, ExitStatus, FileSpec, UserSpec};
use proptest::prelude::*;

use crate::common::{argv, pair_over, sh, soon};

#[derive(Clone, Debug)]
enum Deed {
    Ping,
    /// Prints so many bytes, read by a lossless reader that pauses after every piece, or not.
    Print {
        length: usize,
        slowly: bool,
    },
    /// Pieces of stdin through `cat`.
    Cat(Vec<usize>),
    /// A file there and back.
    File(usize),
    /// Started, never read, killed.
    Killed,
    /// A transfer given up after so many polls.
    GivenUp(u8),
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        Just(Deed::Ping),
        (0usize..800_000, any::<bool>())
            .prop_map(|(length, slowly)| Deed::Print { length, slowly }),
        prop::collection::vec(0usize..200_000, 0..4).prop_map(Deed::Cat),
        (0usize..800_000).prop_map(Deed::File),
        Just(Deed::Killed),
        any::<u8>().prop_map(Deed::GivenUp),
    ]
}

async fn read_all(mut output: guest_control::Output, slowly: bool) -> usize {
    let mut length = 0;
    while let Some(chunk) = output.next().await {
        assert_eq!(chunk.offset, length as u64);
        length += chunk.data.len();
        if slowly {
            tokio::task::yield_now().await;
        }
    }
    length
}

async fn perform(client: Client, number: usize, deed: Deed) {
    match deed {
        Deed::Ping => drop(client.ping().await.unwrap()),
        Deed::Print { length, slowly } => {
            let spec = sh(&format!("head -c {length} /dev/zero"));
            let session = client.exec(spec).await.unwrap();
            assert_eq!(read_all(session.attach(0, true), slowly).await, length);
            assert_eq!(session.wait().await.unwrap().status, ExitStatus::Exited(0));
        }
        Deed::Cat(pieces) => {
            let spec = ExecSpec {
                stdin: true,
                ..argv(&["cat"])
            };
            let session = client.exec(spec).await.unwrap();
            let reader = tokio::spawn(read_all(session.attach(0, true), false));
            for piece in &pieces {
                session
                    .write_stdin(Bytes::from(vec![b'c'; *piece]))
                    .await
                    .unwrap();
            }
            session.close_stdin().await.unwrap();
            assert_eq!(reader.await.unwrap(), pieces.iter().sum::<usize>());
        }
        Deed::File(length) => {
            let content: Vec<u8> = (0..=255).cycle().skip(number).take(length).collect();
            let path = format!("/file{number}");
            let spec = FileSpec {
                path: path.clone(),
                mode: 0o600,
                user: UserSpec::Root,
            };
            client.write_file(spec, &content[..]).await.unwrap();
            let mut back = Vec::new();
            client.read_file(&path, &mut back).await.unwrap();
            assert!(back == content);
        }
        Deed::Killed => {
            let session = client.exec(argv(&["cat", "/dev/zero"])).await.unwrap();
            let _held = session.attach(0, true);
            session.kill().await.unwrap();
            let status = session.wait().await.unwrap().status;
            assert_eq!(status, ExitStatus::Signaled(9));
        }
        Deed::GivenUp(polls) => {
            let spec = FileSpec {
                path: format!("/given-up{number}"),
                mode: 0o600,
                user: UserSpec::Root,
            };
            let content = vec![1; 1_000_000];
            let transfer = client.write_file(spec, &content[..]);
            tokio::pin!(transfer);
            for _ in 0..polls {
                let polled =
                    std::future::poll_fn(|cx| std::task::Poll::Ready(transfer.as_mut().poll(cx)));
                if polled.await.is_ready() {
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn operations_do_not_disturb_each_other(
        deeds in prop::collection::vec(deed(), 1..10),
        width in 1usize..20_000,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let pair = pair_over(width).await;
            let tasks: Vec<_> = deeds
                .into_iter()
                .enumerate()
                .map(|(number, deed)| tokio::spawn(perform(pair.client.clone(), number, deed)))
                .collect();
            for task in tasks {
                soon(task).await.unwrap();
            }
            // Everything has ended at the guest's end, too.
            soon(async {
                while pair.client.clone().quiesce().await.is_err() {
                    tokio::task::yield_now().await;
                }
            })
            .await;
        });
    }
}
