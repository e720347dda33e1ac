//! `runner exec`: a command in a running job's VM, with its streams, its exit status and, with `-t`, a terminal.

mod streams;

use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use guest_control::{ExecSpec, ExitReport, ExitStatus, PtySize, UserSpec};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::cmd::parse;
use crate::context::{CliError, Context, block_on, note};
use crate::control::client::{self, RunPrefix};
use crate::control::protocol::{self, CHUNK, Connection, Failure, Input, Reply, Request};
use crate::terminal::{self, RawMode};
use streams::{Piece, Printer};

/// Detaches from an interactive session: Ctrl-], as in telnet. (Ctrl-P and Ctrl-\ are bash's and the kernel's.)
const DETACH_KEY: u8 = 0x1d;

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "One argument is a bash command line, several are a program and its arguments.\n\n\
Examples:\n  \
    runner exec 6f1c 'free -m | head -2'\n  \
    runner exec 6f1c -it -- bash                a real terminal; Ctrl-] leaves it running\n  \
    runner exec 6f1c --user root -- dmesg\n  \
    tar c src | runner exec 6f1c -i -- tar x -C /tmp\n  \
    runner exec 6f1c --attach 3                 back to a session that was left\n\n\
Exit status: the command's; 128+n when signal n killed it, 124 when --timeout ran out, 126 when it could not be\n\
run, 127 when it was not found."
)]
pub(crate) struct Args {
    /// Beginning of the run's id
    #[arg(value_name = "RUN")]
    run: RunPrefix,
    /// Keep stdin open even if it is a terminal
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Whom the command runs as
    #[arg(long, value_enum, default_value = "user")]
    user: User,
    /// Set an environment variable
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = parse::variable)]
    env: Vec<(String, String)>,
    /// Directory the command starts in [default: the user's home]
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<String>,
    /// Kill the command after this long, such as 30, 5m
    #[arg(long, value_name = "TIME", value_parser = parse::duration)]
    timeout: Option<Duration>,
    /// Leave the command running and print its session number
    #[arg(long, short, conflicts_with = "attach")]
    detach: bool,
    /// Attach to a session that was left running
    #[arg(long, value_name = "SESSION", conflicts_with_all = ["command", "env", "workdir", "timeout", "user"])]
    attach: Option<u32>,
    /// The command
    #[arg(trailing_var_arg = true, required_unless_present = "attach")]
    command: Vec<std::ffi::OsString>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum User {
    User,
    Root,
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let home = context.home()?;
    let stdin_is_terminal = terminal::is_terminal(std::io::stdin());
    if args.tty && !stdin_is_terminal {
        return Err(
            CliError::usage("-t needs a terminal on standard input, and there is none")
                .with_hint("leave -t away to pipe into the command"),
        );
    }
    let forward_stdin = !args.detach && (args.interactive || args.tty || !stdin_is_terminal);
    block_on(async {
        let found = client::find(&home, &args.run).await?;
        let run = found.info.run_id;
        let size = args
            .tty
            .then(|| terminal::size(std::io::stdin()).unwrap_or(PtySize { rows: 24, cols: 80 }));
        let detach = args.detach;
        let request = match args.attach {
            Some(session) => Request::Attach { run, session, size },
            None => Request::Exec {
                run,
                spec: spec(args, size, forward_stdin),
                detach,
            },
        };
        let mut connection = found
            .instance
            .request(&request)
            .await
            .map_err(|error| client::broken(&error))?;
        let session = match receive(&mut connection).await? {
            Reply::Started { session, .. } => session,
            Reply::Failed(failure) => return Ok(cannot_start(&failure)),
            _ => return Err(client::odd()),
        };
        if detach {
            context.print_line(session)?;
            return Ok(ExitCode::SUCCESS);
        }
        let attached = Attached {
            connection,
            tty: size.is_some(),
        };
        match attached.drive(forward_stdin).await? {
            End::Exited(report) => Ok(exit_code(&report)),
            End::Interrupted(signal) => Ok(ExitCode::from(128_u8.saturating_add(signal))),
            End::Detached => {
                note(format_args!(
                    "left running; attach again with `runner exec {run} -it --attach {session}`"
                ));
                Ok(ExitCode::SUCCESS)
            }
        }
    })
}

/// The process to start. A terminal's type travels with it, so that programs know its keys and colours.
fn spec(args: Args, pty: Option<PtySize>, stdin: bool) -> ExecSpec {
    use std::os::unix::ffi::OsStringExt;
    let mut env = args.env;
    if pty.is_some()
        && !env.iter().any(|(name, _)| name == "TERM")
        && let Ok(term) = std::env::var("TERM")
    {
        env.push(("TERM".to_owned(), term));
    }
    let mut argv: Vec<Vec<u8>> = args
        .command
        .into_iter()
        .map(OsStringExt::into_vec)
        .collect();
    if argv.len() == 1 {
        argv.splice(0..0, [b"bash".to_vec(), b"-c".to_vec()]);
    }
    ExecSpec {
        argv,
        env,
        cwd: args.workdir,
        user: match args.user {
            User::User => UserSpec::User,
            User::Root => UserSpec::Root,
        },
        stdin,
        pty,
        timeout: args.timeout,
        wake: None,
        kill_group_on_exit: false,
    }
}

async fn receive(connection: &mut Connection) -> Result<Reply, CliError> {
    match protocol::receive(connection).await {
        Ok(Some(reply)) => Ok(reply),
        Ok(None) => Err(client::broken(&std::io::ErrorKind::UnexpectedEof.into())),
        Err(error) => Err(client::broken(&error)),
    }
}

/// A command that could not be started: as in a shell, 127 when it was not found, 126 when it could not be run.
fn cannot_start(failure: &Failure) -> ExitCode {
    note(format_args!("error: {}", failure.message));
    ExitCode::from(match failure.errno {
        Some(libc::ENOENT | libc::ENOTDIR) => 127,
        Some(_) => 126,
        None => 1,
    })
}

fn exit_code(report: &ExitReport) -> ExitCode {
    if report.oom_kills > 0 {
        note("note: the guest ran out of memory and killed a process of this command");
    }
    match report.status {
        ExitStatus::Exited(code) => ExitCode::from(u8::try_from(code & 0xff).unwrap_or(1)),
        ExitStatus::Signaled(signal) => {
            ExitCode::from(u8::try_from(128 + (signal & 0x7f)).unwrap_or(128))
        }
        ExitStatus::TimedOut => {
            note("error: the command ran longer than its --timeout and was killed");
            ExitCode::from(124)
        }
    }
}

/// How an attachment ended, as the client sees it.
enum End {
    Exited(ExitReport),
    /// By this signal to the client.
    Interrupted(u8),
    Detached,
}

struct Attached {
    connection: Connection,
    tty: bool,
}

/// Signals that a client without a terminal passes on.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
    quit: Signal,
    resized: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            quit: signal(SignalKind::quit())?,
            resized: signal(SignalKind::window_change())?,
        })
    }

    async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.interrupt.recv() => libc::SIGINT,
            _ = self.terminate.recv() => libc::SIGTERM,
            _ = self.hang_up.recv() => libc::SIGHUP,
            _ = self.quit.recv() => libc::SIGQUIT,
            _ = self.resized.recv() => libc::SIGWINCH,
        }
    }
}

impl Attached {
    /// Moves bytes, signals and sizes until the command ends, the user leaves or the connection breaks.
    async fn drive(mut self, forward_stdin: bool) -> Result<End, CliError> {
        let mut signals = Signals::new()?;
        // Restored by its drop, whichever way this function is left.
        let raw = if self.tty {
            Some(RawMode::enter()?)
        } else {
            None
        };
        let printer = Printer::start();
        let mut stdin = if forward_stdin {
            streams::read_stdin()
        } else {
            mpsc::channel(1).1
        };
        let end = self
            .exchange(&mut signals, &mut stdin, forward_stdin, &printer)
            .await;
        // What was printed comes before the shell's prompt and before our own words.
        let printed = printer.finish();
        drop(raw);
        let end = end?;
        printed?;
        Ok(end)
    }

    async fn exchange(
        &mut self,
        signals: &mut Signals,
        stdin: &mut mpsc::Receiver<Piece>,
        mut stdin_open: bool,
        printer: &Printer,
    ) -> Result<End, CliError> {
        let mut window = protocol::STDIN_WINDOW;
        let mut interrupted = false;
        loop {
            tokio::select! {
                reply = protocol::receive(&mut self.connection) => {
                    let reply = reply.map_err(|error| client::broken(&error))?;
                    let Some(reply) = reply else {
                        return Err(client::broken(&std::io::ErrorKind::UnexpectedEof.into()));
                    };
                    match reply {
                        Reply::Output { stderr, data } => printer.print(stderr, data).await?,
                        Reply::Lost { bytes } => {
                            let note = format!("\r\n[{bytes} bytes of output were overwritten before this]\r\n");
                            printer.print(true, note.into()).await?;
                        }
                        Reply::StdinTaken(bytes) => window += usize::try_from(bytes).unwrap_or(0),
                        Reply::Exited(report) => return Ok(End::Exited(report)),
                        Reply::Failed(failure) => return Err(client::told(failure)),
                        _ => return Err(client::odd()),
                    }
                }
                piece = stdin.recv(), if stdin_open && window >= CHUNK => {
                    match piece {
                        Some(Piece::Data(mut data)) => {
                            let leave = self.tty.then(|| data.iter().position(|b| *b == DETACH_KEY)).flatten();
                            if let Some(at) = leave {
                                data.truncate(at);
                            }
                            window = window.saturating_sub(data.len());
                            if !data.is_empty() {
                                self.send(&Input::Stdin(data)).await?;
                            }
                            if leave.is_some() {
                                self.send(&Input::Detach).await?;
                                return Ok(End::Detached);
                            }
                        }
                        Some(Piece::Failed(error)) => {
                            return Err(CliError::failed(format_args!("cannot read standard input: {error}")));
                        }
                        None => {
                            stdin_open = false;
                            self.send(&Input::EndOfStdin).await?;
                        }
                    }
                }
                signal = signals.next() => match signal {
                    libc::SIGWINCH => {
                        if self.tty && let Some(size) = terminal::size(std::io::stdin()) {
                            self.send(&Input::Resize(size)).await?;
                        }
                    }
                    // A terminal's keys travel as bytes; a signal then comes from outside and means us. So does the
                    // second one of somebody whose command does not listen to the first.
                    signal if self.tty || interrupted => {
                        return Ok(End::Interrupted(u8::try_from(signal).unwrap_or(0)));
                    }
                    signal => {
                        interrupted = true;
                        self.send(&Input::Signal(signal)).await?;
                    }
                },
            }
        }
    }

    async fn send(&mut self, input: &Input) -> Result<(), CliError> {
        match protocol::send(&mut self.connection, input).await {
            // The command has just ended: its report is on its way and says more than this.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            other => other.map_err(|error| client::broken(&error)),
        }
    }
}
