//! Runs the programs of the distribution that do the work, so that nothing of them outlives us.
//!
//! Each runs in its own process group (Ctrl-C reaches only us, and we decide) and dies with this thread
//! (`setpriv --pdeathsig`). Programs that mount or start daemons run in [`Cage::Private`]: their own mount and process
//! namespaces, whose end unmounts and kills everything, also after a `kill -9` of ours.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use host::fs::Space;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::Command;

use super::ImageError;
use super::progress::Steps;

/// What a program is confined to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cage {
    /// Nothing beside dying with us.
    None,
    /// Private mount and process namespaces.
    Private,
}

/// A program with its arguments.
#[derive(Debug)]
pub(crate) struct Tool {
    program: &'static str,
    args: Vec<OsString>,
    env: Vec<(&'static str, OsString)>,
    cage: Cage,
    directory: Option<PathBuf>,
    input: Option<PathBuf>,
    output: Option<PathBuf>,
    room: Option<PathBuf>,
}

impl Tool {
    /// A program found in `PATH`.
    pub(crate) fn new(program: &'static str) -> Self {
        Self {
            program,
            args: Vec::new(),
            env: Vec::new(),
            cage: Cage::None,
            directory: None,
            input: None,
            output: None,
            room: None,
        }
    }

    /// One more argument.
    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// More arguments.
    pub(crate) fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// One more variable of its environment.
    pub(crate) fn env(mut self, key: &'static str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((key, value.as_ref().to_owned()));
        self
    }

    /// Where it starts.
    pub(crate) fn in_directory(mut self, directory: &Path) -> Self {
        self.directory = Some(directory.to_owned());
        self
    }

    /// In namespaces of its own.
    pub(crate) fn caged(mut self) -> Self {
        self.cage = Cage::Private;
        self
    }

    /// Standard input from a file.
    pub(crate) fn input(mut self, file: &Path) -> Self {
        self.input = Some(file.to_owned());
        self
    }

    /// Standard output into a new file.
    pub(crate) fn output(mut self, file: &Path) -> Self {
        self.output = Some(file.to_owned());
        self
    }

    /// It needs room on the file system of `path`, and may wait for ever when there is none: it is ended then.
    pub(crate) fn needs_room(mut self, path: &Path) -> Self {
        self.room = Some(path.to_owned());
        self
    }

    /// Whether it is installed.
    pub(crate) fn exists(program: &str) -> bool {
        find(program).is_some()
    }

    /// Runs it to its end; `what` names the step in errors. Gives what it printed to standard output.
    pub(crate) async fn run(self, what: &str, steps: &Steps) -> Result<String, ImageError> {
        let (status, stdout, said) = self.wait(steps).await?;
        if status.success() {
            return Ok(stdout);
        }
        Err(ImageError::Tool {
            what: what.to_owned(),
            status: status.to_string(),
            // What a program says of a full disk is its own affair, and may be long past or nothing at all.
            full: said.full || self.has_no_room(),
            last: said.last.into(),
        })
    }

    fn command(&self) -> Result<Command, ImageError> {
        let missing = |program: &str| ImageError::NoTool {
            program: program.to_owned(),
        };
        let program = find(self.program).ok_or_else(|| missing(self.program))?;
        let mut command = Command::new(find("setpriv").ok_or_else(|| missing("setpriv"))?);
        command.args(["--pdeathsig", "KILL", "--"]);
        if self.cage == Cage::Private {
            command
                .arg(find("unshare").ok_or_else(|| missing("unshare"))?)
                .args([
                    "--mount",
                    "--propagation=private",
                    "--pid",
                    "--fork",
                    "--kill-child=KILL",
                    "--mount-proc",
                    "--",
                ]);
        }
        command
            .arg(program)
            .args(&self.args)
            // Messages are shown to people and searched for; their language must not vary.
            .env("LC_ALL", "C.UTF-8")
            .env("PATH", SEARCH_PATH)
            .envs(self.env.iter().map(|(key, value)| (key, value)))
            .process_group(0)
            .kill_on_drop(true)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        if let Some(input) = &self.input {
            command.stdin(std::fs::File::open(input).map_err(ImageError::io("open", input))?);
        }
        if let Some(output) = &self.output {
            command.stdout(
                std::fs::File::create_new(output).map_err(ImageError::io("create", output))?,
            );
        }
        Ok(command)
    }

    async fn wait(&self, steps: &Steps) -> Result<(ExitStatus, String, Said), ImageError> {
        let failed = |source| ImageError::Io {
            action: "run",
            path: self.program.into(),
            source,
        };
        let mut child = self.command()?.spawn().map_err(failed)?;
        let stdout = child.stdout.take();
        let stderr = child.stderr.take();
        let work = async {
            let (stdout, said) = tokio::join!(read_all(stdout), follow(stderr, steps));
            (stdout, said)
        };
        tokio::pin!(work);
        tokio::select! {
            (stdout, mut said) = &mut work => {
                let status = child.wait().await.map_err(failed)?;
                // Some programs explain themselves on standard output.
                if said.last.is_empty() {
                    stdout.lines().for_each(|line| said.hear(escape(line)));
                }
                Ok((status, stdout, said))
            }
            why = self.in_vain(steps) => {
                // Killing the namespace's first process kills all of it; the pipes end when the last one is gone.
                let _ = child.start_kill();
                let _ = work.await;
                let _ = child.wait().await;
                Err(why)
            }
        }
    }

    /// Resolves when there is no point in going on.
    async fn in_vain(&self, steps: &Steps) -> ImageError {
        let full = async {
            let mut looks = 0;
            while looks < FULL_LOOKS {
                tokio::time::sleep(LOOK).await;
                looks = if self.has_no_room() { looks + 1 } else { 0 };
            }
        };
        tokio::select! {
            () = steps.interrupted() => ImageError::Interrupted,
            () = full => self.disk_full(),
        }
    }

    /// Whether it needs room and there is none.
    fn has_no_room(&self) -> bool {
        self.room
            .as_ref()
            .is_some_and(|path| Space::of(path).is_ok_and(|space| space.free < NO_ROOM))
    }

    fn disk_full(&self) -> ImageError {
        ImageError::Io {
            action: "run",
            path: self.program.into(),
            source: std::io::ErrorKind::StorageFull.into(),
        }
    }
}

/// What a program said, for when it fails.
#[derive(Debug, Default)]
struct Said {
    /// The last lines, escaped.
    last: VecDeque<String>,
    /// Whether any line complained of a full disk.
    full: bool,
}

impl Said {
    fn hear(&mut self, line: String) {
        self.full |= DISK_FULL.iter().any(|words| line.contains(words));
        if self.last.len() == KEPT_LINES {
            self.last.pop_front();
        }
        self.last.push_back(line);
    }
}

/// How often the room of a program that needs some is looked at.
const LOOK: std::time::Duration = std::time::Duration::from_secs(1);
/// So many looks in a row at a full file system are enough: most programs end by themselves at once.
const FULL_LOOKS: u32 = 20;
/// What counts as none, bytes. A program that waits may have removed what it could not write whole, such as a list of packages
/// (50 MB); an image takes several times this.
const NO_ROOM: u64 = 64 << 20;
/// How programs name a full disk: strerror(3) of ENOSPC, and apt when it looks beforehand.
const DISK_FULL: &[&str] = &["No space left on device", "enough free space in"];
/// Lines of a failed program's output that are shown.
const KEPT_LINES: usize = 15;
/// Most bytes of standard output that are kept; no program here prints as much.
const MAX_OUTPUT: u64 = 16 << 20;
/// sbin too: mkfs and friends are there, and not in every user's PATH.
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

fn find(program: &str) -> Option<PathBuf> {
    SEARCH_PATH
        .split(':')
        .map(|directory| Path::new(directory).join(program))
        .find(|path| path.is_file())
}

async fn read_all(stream: Option<impl AsyncRead + Unpin>) -> String {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        // What cannot be read is missing from a message or makes the parser of it fail.
        let _ = stream.take(MAX_OUTPUT).read_to_end(&mut bytes).await;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Shows each line as detail and hears it.
async fn follow(stream: Option<impl AsyncRead + Unpin>, steps: &Steps) -> Said {
    let mut said = Said::default();
    let Some(stream) = stream else {
        return said;
    };
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    while matches!(reader.read_until(b'\n', &mut line).await, Ok(1..)) {
        let text = escape(String::from_utf8_lossy(&line).trim_end());
        steps.detail(&text.chars().take(100).collect::<String>());
        said.hear(text);
        line.clear();
    }
    said
}

/// Terminal control characters of a program's output, made visible.
fn escape(line: &str) -> String {
    line.chars()
        .flat_map(|c| {
            if c.is_control() && c != '\t' {
                c.escape_default().collect::<Vec<_>>()
            } else {
                vec![c]
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_program_that_waits_on_a_full_disk_is_ended() {
        // A file system that never has any room.
        let tool = Tool::new("sleep")
            .arg("1000")
            .needs_room(Path::new("/proc"));
        let error = tool.run("the step", &Steps::new()).await.unwrap_err();
        let ImageError::Io { source, .. } = error else {
            panic!("{error:?}");
        };
        assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
    }

    #[tokio::test]
    async fn a_program_that_fails_on_a_full_disk_need_not_say_so() {
        let lines =
            "; for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do echo $n >&2; done; exit 100";
        let sh = |script: String| Tool::new("sh").args(["-c", &script]);
        for tool in [
            sh("exit 100".to_owned()).needs_room(Path::new("/proc")),
            sh(format!("echo 'cp: x: No space left on device' >&2{lines}")),
            sh("echo \"E: You don't have enough free space in /x/.\" >&2; exit 100".to_owned()),
            sh("echo 'x: No space left on device'; exit 1".to_owned()),
        ] {
            let error = tool.run("the step", &Steps::new()).await.unwrap_err();
            let said = error.to_string();
            assert!(
                matches!(error, ImageError::Tool { full: true, .. }),
                "{error:?}"
            );
            assert!(said.contains("; the disk was full"), "{said}");
        }
        // Success on a full disk is success.
        let tool = sh("true".to_owned()).needs_room(Path::new("/proc"));
        tool.run("the step", &Steps::new()).await.unwrap();
    }

    #[tokio::test]
    async fn a_failing_program_tells_its_last_lines_escaped() {
        let tool = Tool::new("sh").args(["-c", "printf 'no\\033[31m luck\\n' >&2; exit 3"]);
        let error = tool
            .run("the step", &Steps::new())
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("the step failed (exit status: 3)"),
            "{error}"
        );
        assert!(error.contains("no\\u{1b}[31m luck"), "{error}");
    }

    #[tokio::test]
    async fn output_is_returned_and_a_missing_program_is_named() {
        let steps = Steps::new();
        let out = Tool::new("echo")
            .arg("hello")
            .run("echo", &steps)
            .await
            .unwrap();
        assert_eq!(out, "hello\n");
        let error = Tool::new("no-such-program")
            .run("x", &steps)
            .await
            .unwrap_err();
        assert!(matches!(error, ImageError::NoTool { .. }), "{error}");
    }
}
