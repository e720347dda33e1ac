//! An operator's command in the VM of a run, over the API's WebSocket.

use std::fs::File;
use std::net::TcpStream;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};
use tungstenite::client::ClientRequestBuilder;
use tungstenite::{Error, HandshakeError, Message, WebSocket};

use crate::wait::LONG;

/// Where an API is asked for commands: from which namespace, at which address and with what.
pub(crate) struct Door {
    pub(crate) namespace: PathBuf,
    pub(crate) address: String,
    pub(crate) token: String,
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its exit code, if it ran to an end.
    pub code: Option<i64>,
    /// Why it did not.
    pub error: Option<String>,
}

/// One command. It is ended by the API when this is dropped.
pub struct ApiExec {
    socket: WebSocket<TcpStream>,
    /// What it wrote to standard output so far, or to its terminal.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error so far.
    pub stderr: Vec<u8>,
    ended: Option<Ended>,
}

/// A connection from within another network namespace.
fn connect(namespace: PathBuf, address: String) -> TcpStream {
    // A thread of its own: this one's children stay where they are.
    let dial = move || {
        let namespace = File::open(namespace).expect("the world is there");
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
            .expect("root may enter it");
        TcpStream::connect(address).expect("the API listens")
    };
    std::thread::spawn(dial).join().expect("it connects")
}

/// The argument as a part of a query.
fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

impl ApiExec {
    /// Starts it. Where the API answers the request otherwise than by a WebSocket: its status.
    pub(crate) fn start(
        door: Door,
        run: &str,
        argv: &[&str],
        size: Option<(u16, u16)>,
    ) -> Result<Self, u16> {
        let stream = connect(door.namespace, door.address.clone());
        stream.set_read_timeout(Some(LONG)).expect("a socket");
        let mut url = format!(
            "ws://{}/api/runs/{run}/exec?argv={}",
            door.address,
            encoded(&json!(argv).to_string())
        );
        if let Some((columns, rows)) = size {
            url += &format!("&columns={columns}&rows={rows}");
        }
        let request = ClientRequestBuilder::new(url.parse().expect("an address"))
            .with_header("Authorization", format!("Bearer {}", door.token));
        match tungstenite::client(request, stream) {
            Ok((socket, _)) => Ok(Self {
                socket,
                stdout: Vec::new(),
                stderr: Vec::new(),
                ended: None,
            }),
            Err(HandshakeError::Failure(Error::Http(response))) => Err(response.status().as_u16()),
            Err(error) => panic!("no WebSocket: {error}"),
        }
    }

    fn say(&mut self, word: &Value) {
        let message = Message::text(word.to_string());
        self.socket.send(message).expect("the API listens");
    }

    /// Bytes for its standard input.
    pub fn write(&mut self, bytes: &[u8]) {
        let data = STANDARD.encode(bytes);
        self.say(&json!({"type": "execInput", "execId": "", "data": data}));
    }

    /// No more bytes will come.
    pub fn close_input(&mut self) {
        self.say(&json!({"type": "execInput", "execId": "", "data": null}));
    }

    /// Another size of its terminal.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        self.say(&json!({"type": "execResize", "execId": "", "size": [columns, rows]}));
    }

    /// Takes the next word about it.
    fn step(&mut self) {
        assert_eq!(self.ended, None, "it has ended: {}", self.text());
        let word = match self.socket.read() {
            Ok(Message::Text(text)) => text,
            Ok(Message::Ping(_) | Message::Pong(_)) => return,
            other => panic!("{other:?} after {:?} {:?}", self.text(), self.errors()),
        };
        let word: Value = serde_json::from_str(&word).expect("JSON");
        match word["type"].as_str() {
            Some("execOutput") => {
                let bytes = STANDARD.decode(word["data"].as_str().expect("data"));
                let to = match word["stderr"] == true {
                    true => &mut self.stderr,
                    false => &mut self.stdout,
                };
                to.extend(bytes.expect("base64"));
            }
            Some("execExit") => {
                self.ended = Some(Ended {
                    code: word["exitCode"].as_i64(),
                    error: word["error"].as_str().map(str::to_owned),
                });
            }
            _ => panic!("{word}"),
        }
    }

    /// Waits until standard output holds this.
    pub fn until(&mut self, text: &str) {
        let begun = Instant::now();
        while !self.text().contains(text) {
            assert!(
                begun.elapsed() < LONG,
                "{text:?} is not in {:?}",
                self.text()
            );
            self.step();
        }
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Ended {
        loop {
            match &self.ended {
                Some(ended) => return ended.clone(),
                None => self.step(),
            }
        }
    }

    /// Standard output so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error so far.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}
