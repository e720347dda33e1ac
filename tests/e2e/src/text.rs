//! Output of a process, collected while it runs.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

/// Grows as the process writes; shared.
#[derive(Clone, Default)]
pub struct Text {
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl Text {
    /// Collects everything `source` gives, on a thread of its own that ends with the source.
    pub fn collect(mut source: impl Read + Send + 'static) -> Self {
        let text = Self::default();
        let shared = text.shared.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 65536];
            loop {
                let read = source.read(&mut buffer).unwrap_or(0);
                let mut state = shared.0.lock().unwrap();
                state.bytes.extend_from_slice(&buffer[..read]);
                state.ended |= read == 0;
                shared.1.notify_all();
                if state.ended {
                    return;
                }
            }
        });
        text
    }

    /// What came so far.
    pub fn now(&self) -> String {
        String::from_utf8_lossy(&self.shared.0.lock().unwrap().bytes).into_owned()
    }

    /// Everything, once the source has ended.
    pub fn all(&self, deadline: Duration) -> String {
        self.wait(deadline, |state| state.ended)
            .unwrap_or_else(|so_far| panic!("not ended within {deadline:?}; so far: {so_far}"))
    }

    /// Waits until the text contains `wanted`; panics when the source ends without it or the deadline passes.
    pub fn wait_for(&self, wanted: &str, deadline: Duration) {
        let found = |state: &State| contains(&state.bytes, wanted.as_bytes());
        match self.wait(deadline, |state| found(state) || state.ended) {
            Ok(text) => assert!(
                text.contains(wanted),
                "ended without {wanted:?}; all of it: {text}"
            ),
            Err(so_far) => panic!("no {wanted:?} within {deadline:?}; so far: {so_far}"),
        }
    }

    fn wait(
        &self,
        deadline: Duration,
        mut done: impl FnMut(&State) -> bool,
    ) -> Result<String, String> {
        let until = Instant::now() + deadline;
        let mut state = self.shared.0.lock().unwrap();
        loop {
            let text = || String::from_utf8_lossy(&state.bytes).into_owned();
            if done(&state) {
                return Ok(text());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(text());
            }
            state = self.shared.1.wait_timeout(state, left).unwrap().0;
        }
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack
        .windows(needle.len())
        .any(|window| window == needle)
}
