//! Runs the prompt with bash.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Where bash is in every image; a lookup through `PATH` would cost failed execs.
const BASH: &str = "/bin/bash";

/// Longest prompt given as an argument: one execve string holds 128 KiB with its final NUL.
const MAX_ARGUMENT: usize = 128 * 1024 - 1;

/// Bytes kept of each output stream. The rest is read and counted, so that the command neither blocks nor fills
/// the memory of the guest.
const MAX_CAPTURE: usize = 16 * 1024 * 1024;

/// How the command ended and what it printed.
pub(crate) struct Outcome {
    /// The command's exit code; 1 when a signal ended it or it could not be started.
    pub(crate) code: u8,
    stdout: Capture,
    stderr: Capture,
}

impl Outcome {
    pub(crate) fn failed(&self) -> bool {
        self.code != 0
    }

    /// Standard output, followed by standard error when the command failed.
    pub(crate) fn text(&self) -> String {
        let mut text = self.stdout.text();
        if self.failed() {
            text.push_str(&self.stderr.text());
        }
        text
    }
}

/// Runs the prompt to the end of bash itself and captures what it prints.
///
/// Processes it leaves in the background may hold the pipes open; what they print later is nobody's, so the
/// capture ends when bash does.
pub(crate) fn run(prompt: &[u8]) -> Outcome {
    match start_and_capture(prompt) {
        Ok(outcome) => outcome,
        Err(error) => Outcome {
            code: 1,
            stdout: Capture::default(),
            stderr: Capture::of(format!("bash could not be run: {error}\n").into_bytes()),
        },
    }
}

/// Replaces this process by bash running the prompt. Returns only when that failed.
pub(crate) fn become_bash(prompt: &[u8]) -> io::Error {
    match command(prompt) {
        Ok((mut command, _script)) => command.exec(),
        Err(error) => error,
    }
}

/// Standard output without Rust's line buffer, so that a batch of lines is one write.
pub(crate) fn stdout_unbuffered() -> ManuallyDrop<File> {
    // SAFETY: descriptor 1 is open for the whole life of the process (the runtime opens /dev/null there if the
    // parent left it closed), and ManuallyDrop keeps this borrow of it from closing it.
    ManuallyDrop::new(unsafe { File::from_raw_fd(1) })
}

fn start_and_capture(prompt: &[u8]) -> io::Result<Outcome> {
    let (mut command, _script) = command(prompt)?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (stdout, stderr) = capture(&mut child)?;
    let status = child.wait()?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(Outcome {
        code: code.unwrap_or(1),
        stdout,
        stderr,
    })
}

/// The command, and the descriptor that must stay open until it is started when the prompt travels as a script.
fn command(prompt: &[u8]) -> io::Result<(Command, Option<OwnedFd>)> {
    let mut command = Command::new(BASH);
    if prompt.len() < MAX_ARGUMENT && !prompt.contains(&0) {
        // `--`, as a prompt that begins with a dash is no option of bash.
        command.args(["-c", "--"]).arg(OsStr::from_bytes(prompt));
        return Ok((command, None));
    }
    // Without CLOEXEC: bash opens the script by this descriptor's path. Standard input stays the command's own.
    let script = memfd_create("prompt", MemfdFlags::empty())?;
    let mut file = File::from(script);
    file.write_all(prompt)?;
    file.rewind()?;
    command.arg(format!("/proc/self/fd/{}", file.as_raw_fd()));
    Ok((command, Some(file.into())))
}

/// Reads both pipes until bash ends and they are drained, or both are closed.
fn capture(child: &mut Child) -> io::Result<(Capture, Capture)> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("bash has no process id"))?;
    let exited = pidfd_open(pid, PidfdFlags::empty())?;
    let mut out = Pipe::new(child.stdout.take().map(OwnedFd::from))?;
    let mut err = Pipe::new(child.stderr.take().map(OwnedFd::from))?;
    let mut running = true;
    while running && (out.is_open() || err.is_open()) {
        let mut polled = vec![PollFd::new(&exited, PollFlags::IN)];
        polled.extend(out.poll_fd());
        polled.extend(err.poll_fd());
        match poll(&mut polled, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        // Looked at before the pipes are read: all that bash wrote is then in them.
        running = polled.first().is_some_and(|fd| fd.revents().is_empty());
        out.drain()?;
        err.drain()?;
    }
    Ok((out.capture, err.capture))
}

/// One output pipe of the command, read without blocking.
struct Pipe {
    source: Option<File>,
    capture: Capture,
}

impl Pipe {
    fn new(source: Option<OwnedFd>) -> io::Result<Self> {
        if let Some(fd) = &source {
            rustix::io::ioctl_fionbio(fd, true)?;
        }
        Ok(Self {
            source: source.map(File::from),
            capture: Capture::default(),
        })
    }

    fn is_open(&self) -> bool {
        self.source.is_some()
    }

    fn poll_fd(&self) -> Option<PollFd<'_>> {
        let source = self.source.as_ref()?;
        Some(PollFd::from_borrowed_fd(source.as_fd(), PollFlags::IN))
    }

    /// Reads what is there now; at end of file the pipe is closed.
    fn drain(&mut self) -> io::Result<()> {
        let mut buffer = [0; 16 * 1024];
        while let Some(source) = &mut self.source {
            match source.read(&mut buffer) {
                Ok(0) => self.source = None,
                Ok(n) => self.capture.add(buffer.get(..n).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Output kept up to [`MAX_CAPTURE`] bytes, and the count of what was not.
#[derive(Default)]
struct Capture {
    bytes: Vec<u8>,
    cut: u64,
}

impl Capture {
    fn of(bytes: Vec<u8>) -> Self {
        Self { bytes, cut: 0 }
    }

    fn add(&mut self, bytes: &[u8]) {
        let room = MAX_CAPTURE.saturating_sub(self.bytes.len());
        let (kept, cut) = bytes.split_at(room.min(bytes.len()));
        self.bytes.extend_from_slice(kept);
        self.cut = self.cut.saturating_add(cut.len() as u64);
    }

    fn text(&self) -> String {
        let mut text = String::from_utf8_lossy(&self.bytes).into_owned();
        if self.cut > 0 {
            text.push_str(&format!("\n[{} more bytes were cut]\n", self.cut));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_exit_code_come_back() {
        let outcome = run(b"echo out; echo err >&2; exit 7");
        assert_eq!(outcome.code, 7);
        assert_eq!(outcome.text(), "out\nerr\n");
    }

    #[test]
    fn standard_error_of_a_success_is_left_out() {
        assert_eq!(run(b"echo out; echo err >&2").text(), "out\n");
    }

    #[test]
    fn a_signal_is_a_failure_with_code_1() {
        assert_eq!(run(b"kill -9 $$").code, 1);
    }

    #[test]
    fn a_prompt_beyond_one_execve_string_runs_and_keeps_stdin_empty() {
        let mut prompt = b"cat; echo end; : ".to_vec();
        prompt.resize(300 * 1024, b'x');
        let outcome = run(&prompt);
        assert_eq!((outcome.code, outcome.text().as_str()), (0, "end\n"));
    }

    #[test]
    fn a_background_process_that_holds_the_pipe_does_not_delay_the_answer() {
        let outcome = run(b"sleep 60 & echo $!");
        let pid = outcome.text().trim().parse().unwrap();
        assert_eq!(outcome.code, 0);
        // Still alive, so the answer did not wait for it; then it is ours to end.
        let pid = Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }

    #[test]
    fn a_flood_is_read_to_its_end_and_marked() {
        let outcome = run(b"head -c 20000000 /dev/zero | tr '\\0' x; echo over >&2; exit 3");
        let text = outcome.text();
        assert!(
            text.contains("[3222784 more bytes were cut]"),
            "{}",
            text.len()
        );
        assert!(text.ends_with("over\n"));
        assert_eq!(outcome.code, 3);
    }

    #[test]
    fn output_need_not_be_utf8() {
        assert_eq!(run(b"printf 'a\\xffb'").text(), "a\u{fffd}b");
    }
}
