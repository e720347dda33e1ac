//! A download against a server that behaves badly in each way we know of.

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;

use super::*;

const LIMITS: Limits = Limits {
    max_bytes: 1 << 20,
    stall: Duration::from_secs(20),
    attempts: 3,
    pause: Duration::ZERO,
};

/// What a test's server does with one request; the argument is the request's `Range`.
type Answer = Box<dyn FnOnce(&mut TcpStream, Option<String>) + Send>;

/// A server on loopback that answers each request in turn as it is told, and closes the connection. Gives the port and
/// what the requests' `Range` said.
fn server(answers: Vec<Answer>) -> (Url, mpsc::Receiver<Option<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/file", listener.local_addr().unwrap());
    let (ranges, seen) = mpsc::channel();
    std::thread::spawn(move || {
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            let mut range = None;
            for line in BufReader::new(stream.try_clone().unwrap()).lines() {
                let line = line.unwrap().to_lowercase();
                if let Some(value) = line.strip_prefix("range: ") {
                    range = Some(value.to_owned());
                }
                if line.is_empty() {
                    break;
                }
            }
            // Whoever does not care about ranges does not listen.
            let _ = ranges.send(range.clone());
            answer(&mut stream, range);
        }
    });
    (url.parse().unwrap(), seen)
}

/// Status, headers and body as they stand.
fn say(text: impl Into<Vec<u8>>) -> Answer {
    let text = text.into();
    Box::new(move |stream, _| {
        // The client may have had enough before the end.
        let _ = stream.write_all(&text);
    })
}

fn with_body(head: &str, body: &[u8]) -> Vec<u8> {
    [head.as_bytes(), b"\r\n\r\n", body].concat()
}

fn ok(body: &[u8]) -> Answer {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}", body.len());
    say(with_body(&head, body))
}

fn content() -> Vec<u8> {
    (0..100_000u32).flat_map(u32::to_le_bytes).collect()
}

fn pin(content: &[u8]) -> Sha256Hex {
    crate::image::sha256(content).parse().unwrap()
}

struct Parts {
    temp: tempfile::TempDir,
    dir: Dir,
    steps: Steps,
}

impl Parts {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        let dir = Dir::open(temp.path()).unwrap();
        Self {
            temp,
            dir,
            steps: Steps::new(),
        }
    }

    async fn fetch(&self, url: &Url, limits: Limits) -> Result<Vec<u8>, FirecrackerError> {
        let downloader = Downloader::new(&self.dir, &self.steps, limits)?;
        let mut file = downloader.fetch(url, &pin(&content())).await?;
        file.rewind().unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        Ok(bytes)
    }

    /// Bytes of the unfinished file, if there is one.
    fn kept(&self) -> Option<u64> {
        let path = self.temp.path().join(part_name(&pin(&content())));
        std::fs::metadata(path).ok().map(|meta| meta.len())
    }

    fn keep(&self, bytes: &[u8]) {
        let path = self.temp.path().join(part_name(&pin(&content())));
        std::fs::write(path, bytes).unwrap();
    }
}

/// Half of it, then the connection is gone.
fn cut() -> Answer {
    let whole = content();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}", whole.len());
    say(with_body(&head, &whole[..whole.len() / 2]))
}

/// The rest, from where the request wants it.
fn rest() -> Answer {
    Box::new(|stream, range| {
        let whole = content();
        let range = range.unwrap();
        let from: usize = range
            .strip_prefix("bytes=")
            .and_then(|range| range.strip_suffix('-'))
            .unwrap()
            .parse()
            .unwrap();
        let head = format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{}/{}",
            whole.len() - from,
            whole.len() - 1,
            whole.len()
        );
        stream.write_all(&with_body(&head, &whole[from..])).unwrap();
    })
}

#[tokio::test]
async fn what_was_cut_goes_on_from_where_it_was() {
    let parts = Parts::new();
    let (url, ranges) = server(vec![cut(), rest()]);
    assert_eq!(parts.fetch(&url, LIMITS).await.unwrap(), content());
    assert_eq!(ranges.recv().unwrap(), None);
    assert_eq!(
        ranges.recv().unwrap(),
        Some(format!("bytes={}-", content().len() / 2))
    );
}

#[tokio::test]
async fn a_later_set_up_goes_on_and_a_whole_file_needs_no_server() {
    let parts = Parts::new();
    parts.keep(&content()[..1000]);
    let (url, ranges) = server(vec![rest()]);
    assert_eq!(parts.fetch(&url, LIMITS).await.unwrap(), content());
    assert_eq!(ranges.recv().unwrap(), Some("bytes=1000-".to_owned()));
    assert_eq!(parts.fetch(&url, LIMITS).await.unwrap(), content());
}

#[tokio::test]
async fn a_server_without_ranges_begins_again() {
    let parts = Parts::new();
    parts.keep(&content()[..1000]);
    let (url, _) = server(vec![ok(&content())]);
    assert_eq!(parts.fetch(&url, LIMITS).await.unwrap(), content());
}

#[tokio::test]
async fn a_beginning_that_does_not_fit_is_fetched_again() {
    // Of another file; longer than the file; gone on from elsewhere.
    for (there, answers) in [
        (vec![7; 1000], vec![rest(), ok(&content())]),
        (
            vec![7; content().len() + 5],
            vec![
                say("HTTP/1.1 416 Range Not Satisfiable\r\nContent-Length: 0\r\n\r\n"),
                ok(&content()),
            ],
        ),
        (
            content()[..1000].to_vec(),
            vec![
                say(
                    "HTTP/1.1 206 Partial Content\r\nContent-Length: 1\r\nContent-Range: bytes 5-5/9\r\n\r\nx",
                ),
                ok(&content()),
            ],
        ),
    ] {
        let parts = Parts::new();
        parts.keep(&there);
        let (url, _) = server(answers);
        assert_eq!(parts.fetch(&url, LIMITS).await.unwrap(), content());
    }
}

#[tokio::test]
async fn what_is_not_the_pinned_content_is_thrown_away() {
    let mut tampered = content();
    tampered[70_000] ^= 1;
    let shorter = content()[..5000].to_vec();
    let longer = [content(), vec![0]].concat();
    for wrong in [tampered, shorter, longer, Vec::new()] {
        let parts = Parts::new();
        let (url, _) = server(vec![ok(&wrong)]);
        let error = parts.fetch(&url, LIMITS).await.unwrap_err();
        assert!(
            matches!(error, FirecrackerError::Tampered { .. }),
            "{error}"
        );
        assert_eq!(parts.kept(), None);
    }
}

#[tokio::test]
async fn more_than_any_file_has_is_not_read() {
    let parts = Parts::new();
    // A body without an end, as far as its header goes.
    let endless: Answer = Box::new(|stream, _| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
        while stream.write_all(&[0; 1 << 16]).is_ok() {}
    });
    let (url, _) = server(vec![endless]);
    let error = parts.fetch(&url, LIMITS).await.unwrap_err();
    assert!(
        matches!(error, FirecrackerError::TooLarge { .. }),
        "{error}"
    );
    assert_eq!(parts.kept(), None);
}

#[tokio::test]
async fn a_server_that_says_nothing_more_is_given_up_and_what_came_is_kept() {
    let parts = Parts::new();
    // Says no more, and ends only when the client has hung up.
    let silent = |text: Vec<u8>| -> Answer {
        Box::new(move |stream, _| {
            stream.write_all(&text).unwrap();
            let _ = stream.read(&mut [0]);
        })
    };
    let whole = content();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}", whole.len());
    let (url, ranges) = server(vec![
        silent(with_body(&head, &whole[..1000])),
        silent(Vec::new()),
    ]);
    let limits = Limits {
        stall: Duration::from_millis(300),
        attempts: 1,
        ..LIMITS
    };
    // The first answer brought something, so it is tried again; the second brings nothing.
    let error = parts.fetch(&url, limits).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("nothing came for 300ms"), "{text}");
    assert_eq!(parts.kept(), Some(1000));
    assert_eq!(ranges.iter().nth(1), Some(Some("bytes=1000-".to_owned())));
}

#[tokio::test]
async fn a_refusal_is_told_with_its_address_and_what_passes_is_tried_again() {
    let parts = Parts::new();
    let (url, _) = server(vec![say(
        "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    )]);
    let error = parts.fetch(&url, LIMITS).await.unwrap_err().to_string();
    assert!(
        error.contains(url.as_str()) && error.contains("404"),
        "{error}"
    );

    let busy = || say("HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n");
    let (url, _) = server(vec![busy(), busy(), ok(&content())]);
    assert_eq!(parts.fetch(&url, LIMITS).await.unwrap(), content());
    let parts = Parts::new();
    let (url, _) = server(vec![busy(), busy(), busy()]);
    let error = parts.fetch(&url, LIMITS).await.unwrap_err().to_string();
    assert!(
        error.contains("3 attempts") && error.contains("503"),
        "{error}"
    );
}

#[tokio::test]
async fn redirections_are_followed_but_not_for_ever() {
    let redirect = |to: &str| {
        say(format!(
            "HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        ))
    };
    let parts = Parts::new();
    let (target, _) = server(vec![ok(&content())]);
    let (url, _) = server(vec![redirect(target.as_str())]);
    assert_eq!(parts.fetch(&url, LIMITS).await.unwrap(), content());

    let parts = Parts::new();
    let circle = (0..20).map(|_| redirect("/file")).collect();
    let (url, _) = server(circle);
    let limits = Limits {
        attempts: 1,
        ..LIMITS
    };
    let error = parts.fetch(&url, limits).await.unwrap_err().to_string();
    assert!(error.contains("redirection"), "{error}");
}

#[tokio::test]
async fn nobody_there_is_told_after_the_attempts() {
    // A port that was free a moment ago and that nobody listens on.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/file", listener.local_addr().unwrap());
    drop(listener);
    let error = Parts::new()
        .fetch(&url.parse().unwrap(), LIMITS)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("3 attempts") && error.contains("no connection"),
        "{error}"
    );
}
