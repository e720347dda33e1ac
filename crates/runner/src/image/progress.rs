//! What a person sees while something long happens: a spinner with the elapsed time on a terminal, plain lines otherwise.

use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Steps, one after another, on stderr, and whether the person wants them to end. The time of each is kept for the
/// manifest.
pub(crate) struct Steps {
    terminal: bool,
    interrupt: CancellationToken,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    current: Option<Current>,
    times: Vec<(String, Duration)>,
}

struct Current {
    what: String,
    began: Instant,
    bar: Option<ProgressBar>,
}

impl Steps {
    /// A spinner if stderr is a terminal.
    pub(crate) fn new() -> Self {
        Self {
            terminal: io::stderr().is_terminal(),
            interrupt: CancellationToken::new(),
            state: Mutex::default(),
        }
    }

    /// From now on SIGINT and SIGTERM do not end the process but [`Steps::interrupted`] does; in a runtime only.
    pub(crate) fn catch_signals(&self) -> io::Result<()> {
        let mut int = signal(SignalKind::interrupt())?;
        let mut term = signal(SignalKind::terminate())?;
        let interrupt = self.interrupt.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = int.recv() => {}
                _ = term.recv() => {}
            }
            interrupt.cancel();
        });
        Ok(())
    }

    /// Resolves when the person interrupts. What was going on is to be undone.
    pub(crate) async fn interrupted(&self) {
        self.interrupt.cancelled().await;
    }

    /// Ends the current step and begins another.
    pub(crate) fn begin(&self, what: &str) {
        self.end();
        let bar = self.terminal.then(|| {
            let style = ProgressStyle::with_template("{spinner} {msg} {elapsed:.dim}");
            let bar = ProgressBar::new_spinner().with_message(what.to_owned());
            if let Ok(style) = style {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() {
            say(&format!("{what} …"));
        }
        if let Ok(mut state) = self.state.lock() {
            state.current = Some(Current {
                what: what.to_owned(),
                began: Instant::now(),
                bar,
            });
        }
    }

    /// A detail of the current step: shown on a terminal only.
    pub(crate) fn detail(&self, text: &str) {
        if let Ok(state) = self.state.lock()
            && let Some(Current {
                what,
                bar: Some(bar),
                ..
            }) = &state.current
        {
            bar.set_message(format!("{what}: {text}"));
        }
    }

    /// How far the current step is, bytes: a bar on a terminal.
    pub(crate) fn progress(&self, done: u64, total: Option<u64>) {
        if let Ok(state) = self.state.lock()
            && let Some(Current { bar: Some(bar), .. }) = &state.current
        {
            if let Some(total) = total
                && bar.length() != Some(total)
                && let Ok(style) = ProgressStyle::with_template(
                    "{spinner} {msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}",
                )
            {
                bar.set_style(style);
                bar.set_length(total);
            }
            bar.set_position(done);
        }
    }

    /// A sentence that stays on the screen.
    pub(crate) fn note(&self, text: &str) {
        if let Ok(state) = self.state.lock()
            && let Some(Current { bar: Some(bar), .. }) = &state.current
        {
            bar.suspend(|| say(text));
        } else {
            say(text);
        }
    }

    /// Ends the current step, which succeeded.
    pub(crate) fn end(&self) {
        let Ok(mut state) = self.state.lock() else {
            return;
        };
        if let Some(Current { what, began, bar }) = state.current.take() {
            let took = began.elapsed();
            let line = format!("{what}: {:.1} s", took.as_secs_f64());
            match bar {
                Some(bar) => {
                    bar.finish_and_clear();
                    say(&format!("✓ {line}"));
                }
                None => say(&line),
            }
            state.times.push((what, took));
        }
    }

    /// Seconds each finished step took, in order.
    pub(crate) fn seconds(&self) -> Vec<(String, f64)> {
        let state = self
            .state
            .lock()
            .map(|state| state.times.clone())
            .unwrap_or_default();
        state
            .into_iter()
            .map(|(what, took)| (what, took.as_secs_f64()))
            .collect()
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        // A step that did not end has failed: its spinner must not stay over the error.
        if let Ok(mut state) = self.state.lock()
            && let Some(Current { bar: Some(bar), .. }) = state.current.take()
        {
            bar.finish_and_clear();
        }
    }
}

impl sandbox::Progress for Steps {
    fn step(&self, what: &str) {
        self.begin(what);
    }
}

/// Whoever closed stderr does not want to hear it.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}
