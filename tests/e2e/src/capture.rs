//! What travels through a network namespace, packet by packet.

use std::collections::BTreeSet;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::process::Proc;
use crate::text::Text;
use crate::wait::{LONG, eventually_some};

/// A capture that goes on until it is dropped.
pub struct Capture {
    child: Child,
    text: Text,
}

impl Capture {
    /// Of the namespace that a process is in: the hub of a runner, for its proxy.
    pub fn around(process: &Proc) -> Self {
        let namespace = format!("--net=/proc/{}/ns/net", process.pid);
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "nsenter", &namespace, "--"])
            .args(["python3", "-c", include_str!("capture.py")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("setpriv is installed");
        let text = Text::collect(child.stdout.take().expect("piped"));
        text.wait_for("ready\n", LONG);
        Self { child, text }
    }

    /// All packets so far.
    pub fn packets(&self) -> Vec<Value> {
        let text = self.text.now();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// Waits for a packet whose data is so.
    pub fn until(&self, what: &str, so: impl Fn(&str) -> bool) -> Value {
        eventually_some(what, LONG, || {
            let mut packets = self.packets().into_iter();
            packets.find(|packet| packet["data"].as_str().is_some_and(&so))
        })
    }

    /// Where TCP connections were begun to, as `address:port`.
    pub fn connections(&self) -> BTreeSet<String> {
        let packets = self.packets().into_iter();
        let begun = packets.filter(|packet| packet["tcp"] == true && packet["opens"] == true);
        begun
            .map(|packet| {
                let address = packet["to"].as_str().unwrap_or_default();
                format!("{address}:{}", packet["port"])
            })
            .collect()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
