//! Watches one CLI from its start to its end.
//!
//! ```text
//!           exit                         end of file, or drain time over
//! Running ─────────────────▶ Draining ─────────────────────────────────▶ done
//!    │ signal · stuck tool ·    ▲
//!    │ still here after result  │ exit
//!    ▼ SIGTERM to the group     │
//! Terminating ── grace over ──▶ SIGKILL to the group
//! ```
//!
//! Whatever way it ends, the whole process group is killed before the CLI is reaped, so that its number cannot
//! yet belong to somebody else. What has left the group is guest-init's to kill, with the cgroup.

use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdout};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::api::{Reporter, Session};
use crate::end::{self, End};
use crate::env::Limits;
use crate::events::{self, Event};
use crate::inputs::Inputs;
use crate::lines::{Line, Lines, MAX_LINE};
use crate::log::Log;
use crate::signals;
use crate::tools::PendingTools;

/// Bytes read from the CLI at once: what a pipe holds.
const READ_SIZE: usize = 64 * 1024;

/// A CLI that keeps printing events after its result gets its grace anew with each, up to this many graces.
const MAX_GRACES: u32 = 10;

/// One running CLI and all that decides when it is over.
pub(crate) struct Supervisor<'a> {
    child: Child,
    group: Option<Pid>,
    stdout: Option<ChildStdout>,
    /// What the CLI is told while it works, where it is to be told anything.
    inputs: Option<Inputs>,
    limits: Limits,
    phase: Phase,
    /// Why we ended it, when we did.
    reason: Option<Reason>,
    signalled: &'a OwnedFd,
    watch: Watch<'a>,
}

#[derive(Clone, Copy)]
enum Phase {
    Running,
    Terminating { kill_at: Instant },
    Killed,
    Draining { until: Instant },
}

/// Why the agent ended the CLI.
#[derive(Clone, Copy)]
enum Reason {
    Signal(i32),
    StuckTool(&'static str),
    LeftAfterResult,
}

impl<'a> Supervisor<'a> {
    /// `signalled` is what [`signals::catch`] returned before the CLI was started.
    pub(crate) fn new(
        mut child: Child,
        limits: Limits,
        signalled: &'a OwnedFd,
        log: &'a mut Log,
        reporter: Reporter,
    ) -> Self {
        Self {
            group: i32::try_from(child.id()).ok().and_then(Pid::from_raw),
            stdout: child.stdout.take(),
            inputs: None,
            child,
            limits,
            phase: Phase::Running,
            reason: None,
            signalled,
            watch: Watch {
                log,
                reporter,
                tools: PendingTools::default(),
                result: None,
                messages: 0,
                read: 0,
            },
        }
    }

    /// Runs to the end. The exit code is the CLI's, 128 + n when signal n ended it or us.
    pub(crate) fn run(mut self) -> io::Result<End> {
        let watched = self.watch_to_the_end();
        // Also when watching failed: nothing the CLI started may stay.
        self.signal_group(Signal::KILL);
        let status = self.child.wait()?;
        watched?;
        let said = self.watch.result.and_then(|result| result.failure);
        Ok(match self.reason {
            Some(Reason::Signal(signal)) => End::failed(
                signal_code(signal),
                format_args!("ended by signal {signal}"),
            ),
            Some(Reason::StuckTool(tool)) => End::failed(1, self.limits.tool_timeout(tool)),
            Some(Reason::LeftAfterResult) => End {
                code: u8::from(said.is_some()),
                reason: said,
            },
            None => {
                let code = match (status.code(), status.signal()) {
                    (Some(code), _) => u8::try_from(code).unwrap_or(1),
                    (None, Some(signal)) => signal_code(signal),
                    (None, None) => 1,
                };
                let reason = said.filter(|_| code != 0);
                End { code, reason }
            }
        })
    }

    fn watch_to_the_end(&mut self) -> io::Result<()> {
        let group = self.group.ok_or(io::ErrorKind::InvalidInput)?;
        let exited = pidfd_open(group, PidfdFlags::empty())?;
        self.inputs = self.child.stdin.take().map(Inputs::new).transpose()?;
        let mut lines = Lines::new(MAX_LINE);
        let mut buffer = vec![0; READ_SIZE];
        loop {
            let now = Instant::now();
            self.act_on_time(now);
            match self.phase {
                Phase::Draining { until } if self.stdout.is_none() || until <= now => break,
                _ => {}
            }
            let ready = self.wait(&exited, now)?;
            if ready.log {
                self.watch.log.write_some();
            }
            if ready.output && !self.read(&mut lines, &mut buffer)? {
                self.stdout = None;
                lines.finish(|line| self.watch.line(line));
            }
            self.pass_inputs(&ready, now);
            if ready.exit {
                // Nobody reads any more: what comes now must not count as handed on.
                self.inputs = None;
                let until = later(Instant::now(), self.limits.drain);
                self.phase = Phase::Draining { until };
            }
            if let (Phase::Running, Some(signal)) = (self.phase, signals::received()) {
                self.watch
                    .log
                    .line(format_args!("✗ Ended by signal {signal}"));
                self.terminate(Reason::Signal(signal));
            }
        }
        lines.finish(|line| self.watch.line(line));
        Ok(())
    }

    /// Hands messages on. A CLI that has answered while none waited gets no more, and ends.
    fn pass_inputs(&mut self, ready: &Ready, now: Instant) {
        let over = self.no_more_inputs_at().is_some_and(|at| at <= now);
        let Some(inputs) = &mut self.inputs else {
            return;
        };
        if ready.input == Some(true) {
            self.watch.handed(inputs.read());
        }
        let takes = !ready.cli || inputs.write();
        if !takes || inputs.is_over() || over && ready.input == Some(false) {
            self.inputs = None;
        }
    }

    /// When the CLI is told that nothing more comes, unless something does: at its answer. One that has not said of every
    /// message that it read it is likely to begin another turn.
    fn no_more_inputs_at(&self) -> Option<Instant> {
        let result = self.watch.result.as_ref()?;
        self.inputs.as_ref().filter(|inputs| inputs.is_idle())?;
        Some(match self.watch.has_unread() {
            true => later(result.last_event, self.limits.post_result),
            false => result.last_event,
        })
    }

    /// Reads once. `false` at end of file.
    fn read(&mut self, lines: &mut Lines, buffer: &mut [u8]) -> io::Result<bool> {
        let Some(stdout) = &mut self.stdout else {
            return Ok(false);
        };
        let count = match stdout.read(buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Err(error) => return Err(error),
        };
        lines.push(buffer.get(..count).unwrap_or_default(), |line| {
            self.watch.line(line);
        });
        Ok(count > 0)
    }

    /// Does what is due at `now`.
    fn act_on_time(&mut self, now: Instant) {
        match self.phase {
            Phase::Running => {
                if let Some((at, tool)) = self.watch.tools.deadline(self.limits.stuck_tool)
                    && at <= now
                {
                    let timeout = self.limits.tool_timeout(tool);
                    self.watch.log.line(format_args!("✗ {timeout}"));
                    self.terminate(Reason::StuckTool(tool));
                } else if let Some(result) = &self.watch.result
                    && self.watch.deadline(result, self.limits.post_result) <= now
                {
                    self.watch.log.line(format_args!(
                        "The agent CLI is still there {}s after its result and is ended",
                        now.duration_since(result.first).as_secs()
                    ));
                    self.terminate(Reason::LeftAfterResult);
                }
            }
            Phase::Terminating { kill_at } if kill_at <= now => {
                self.signal_group(Signal::KILL);
                self.phase = Phase::Killed;
            }
            Phase::Terminating { .. } | Phase::Killed | Phase::Draining { .. } => {}
        }
    }

    /// When [`Self::act_on_time`] or the end of draining is due next.
    fn next_deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Running => {
                let tool = self.watch.tools.deadline(self.limits.stuck_tool);
                let result = self.watch.result.as_ref();
                let grace = self.limits.post_result;
                let result = result.map(|result| self.watch.deadline(result, grace));
                let inputs = self.no_more_inputs_at();
                let ends = result.into_iter().chain(inputs);
                tool.map(|(at, _)| at).into_iter().chain(ends).min()
            }
            Phase::Terminating { kill_at } => Some(kill_at),
            Phase::Killed => None,
            Phase::Draining { until } => Some(until),
        }
    }

    fn terminate(&mut self, reason: Reason) {
        self.inputs = None;
        self.reason = Some(reason);
        let signal = match reason {
            Reason::Signal(signal) => Signal::from_named_raw(signal).unwrap_or(Signal::TERM),
            Reason::StuckTool(_) | Reason::LeftAfterResult => Signal::TERM,
        };
        self.signal_group(signal);
        let kill_at = later(Instant::now(), self.limits.term);
        self.phase = Phase::Terminating { kill_at };
    }

    fn signal_group(&self, signal: Signal) {
        if let Some(group) = self.group {
            // It fails only when no process of the group is left, which is as good.
            let _gone = kill_process_group(group, signal);
        }
    }

    /// Waits for the next thing to happen, or to become due.
    fn wait(&self, exited: &OwnedFd, now: Instant) -> io::Result<Ready> {
        let running = !matches!(self.phase, Phase::Draining { .. });
        let sources = [
            // Each is polled only while its answer would be used, or it would be ready for ever.
            (running.then(|| exited.as_fd()), PollFlags::IN),
            (
                matches!(self.phase, Phase::Running).then(|| self.signalled.as_fd()),
                PollFlags::IN,
            ),
            (
                self.stdout.as_ref().map(|stdout| stdout.as_fd()),
                PollFlags::IN,
            ),
            (self.watch.log.wants_to_write(), PollFlags::OUT),
            (
                self.inputs.as_ref().and_then(Inputs::wants_to_read),
                PollFlags::IN,
            ),
            (
                self.inputs.as_ref().and_then(Inputs::wants_to_write),
                PollFlags::OUT,
            ),
        ];
        let mut polled: Vec<PollFd<'_>> = sources
            .iter()
            .filter_map(|(fd, flags)| Some(PollFd::from_borrowed_fd((*fd)?, *flags)))
            .collect();
        let timeout = self
            .next_deadline()
            .map(|at| at.saturating_duration_since(now))
            .and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut answers = polled.iter().map(|fd| !fd.revents().is_empty());
        let [exit, _signal, output, log, input, cli] =
            sources.map(|(fd, _)| fd.is_some().then(|| answers.next().unwrap_or(false)));
        Ok(Ready {
            exit: exit == Some(true),
            output: output == Some(true),
            log: log == Some(true),
            input,
            cli: cli == Some(true),
        })
    }
}

/// What `poll` found.
struct Ready {
    exit: bool,
    output: bool,
    log: bool,
    /// Whether there is something for the CLI; `None`: it could not be taken now anyway.
    input: Option<bool>,
    /// The CLI takes something.
    cli: bool,
}

/// What the CLI's lines have told so far.
struct Watch<'a> {
    log: &'a mut Log,
    reporter: Reporter,
    tools: PendingTools,
    result: Option<Finished>,
    /// Messages that were handed to the CLI, the prompt among them.
    messages: usize,
    /// How often it said that it reads one. Some versions say it once of several, so this can stay behind.
    read: usize,
}

/// A result has been printed.
struct Finished {
    first: Instant,
    last_event: Instant,
    /// Its last line, if it is a failure.
    failure: Option<String>,
}

impl Watch<'_> {
    /// Messages are on their way to the CLI.
    fn handed(&mut self, messages: usize) {
        for _ in 0..messages {
            if self.messages > 0 {
                self.log.line(format_args!("▷ Input {}", self.messages));
            }
            self.messages += 1;
        }
    }

    fn has_unread(&self) -> bool {
        self.read < self.messages
    }

    /// A turn begins: what has been answered was not the end. Without messages there is only one.
    fn turn(&mut self) {
        if self.messages > 0 {
            self.result = None;
        }
    }

    /// When a CLI that is still there after its result is ended. One that may have a message to read is about to go on.
    fn deadline(&self, result: &Finished, grace: Duration) -> Instant {
        let last = later(result.first, grace.saturating_mul(MAX_GRACES));
        if self.has_unread() {
            return last;
        }
        later(result.last_event, grace).min(last)
    }

    fn line(&mut self, line: Line<'_>) {
        let bytes = match line {
            Line::Whole([]) => return,
            Line::Whole(bytes) => bytes,
            Line::TooLong { bytes } => {
                self.log.line(format_args!(
                    "[a line of {bytes} bytes from the agent CLI was too long and is left out]"
                ));
                return;
            }
        };
        let text = String::from_utf8_lossy(bytes);
        let Some(event) = events::parse(&text) else {
            // Not an event: whatever the CLI wants to say, somebody may need it.
            self.log.text(&text);
            return;
        };
        self.reporter.event(&text);
        let now = Instant::now();
        if let Some(finished) = &mut self.result {
            finished.last_event = now;
        }
        match event {
            Event::ToolCalls(calls) => {
                for call in &calls {
                    self.tools.called(call, now);
                }
            }
            Event::ToolResults(ids) => {
                for id in &ids {
                    self.tools.returned(id);
                }
            }
            Event::Read => {
                self.read += 1;
                self.turn();
            }
            Event::Result { text, is_error } => {
                self.log.text(&text);
                let first = self.result.as_ref().map_or(now, |finished| finished.first);
                self.result = Some(Finished {
                    first,
                    last_event: now,
                    failure: is_error.then(|| end::last_line(&text).unwrap_or_default()),
                });
            }
            Event::Begin { session, cwd } => {
                self.turn();
                self.reporter.session(|| {
                    let id = session.parse().ok()?;
                    let cwd = PathBuf::from(cwd.as_ref());
                    Some(Session { id, cwd })
                });
            }
            Event::Other => {}
        }
    }
}

/// `at` plus `time`; a time beyond what the clock can hold is a day, far beyond any job's.
fn later(at: Instant, time: Duration) -> Instant {
    at.checked_add(time)
        .unwrap_or(at + Duration::from_secs(86_400))
}

fn signal_code(signal: i32) -> u8 {
    u8::try_from(signal.saturating_add(128)).unwrap_or(u8::MAX)
}
