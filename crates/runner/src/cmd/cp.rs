//! `runner cp`: files into and out of a running job's VM.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use bytes::Bytes;
use clap::ValueEnum;
use guest_control::{FileSpec, UserSpec};

use crate::context::{CliError, Context, block_on};
use crate::control::client::{self, ActiveRun, RunPrefix};
use crate::control::protocol::{self, CHUNK, Failure, Input, Reply, Request};
use crate::home::Home;

/// Where relative guest paths begin: the home of the image's user.
const GUEST_HOME: &str = "/home/user";

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exactly one side is RUN:PATH. A relative guest path begins at /home/user; `-` is standard input or \
output. To copy a directory, stream it: `runner exec RUN -- tar c -C DIR . | tar x`.\n\n\
Examples:\n  runner cp 6f1c:/tmp/test.png .\n  runner cp input.csv 6f1c:/tmp/\n  runner cp 6f1c:report.md -"
)]
pub(crate) struct Args {
    /// Local path, `-` or RUN:PATH
    source: Place,
    /// Local path, `-` or RUN:PATH
    destination: Place,
    /// Whom a file in the VM belongs to
    #[arg(long, value_enum, default_value = "user")]
    user: User,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum User {
    User,
    Root,
}

/// One side of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Guest { run: RunPrefix, path: String },
    Local(PathBuf),
    Standard,
}

impl FromStr for Place {
    type Err = String;

    /// `RUN:PATH` is the guest's only if RUN could be a run id; `./6f1c:x` is always local.
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "-" {
            return Ok(Self::Standard);
        }
        if let Some((run, path)) = text.split_once(':')
            && let Ok(run) = run.parse()
        {
            let path = match path {
                "" => return Err("the path in the VM is missing after the colon".to_owned()),
                absolute if absolute.starts_with('/') => absolute.to_owned(),
                relative => format!("{GUEST_HOME}/{relative}"),
            };
            return Ok(Self::Guest { run, path });
        }
        if text.is_empty() {
            return Err("it is empty".to_owned());
        }
        Ok(Self::Local(PathBuf::from(text)))
    }
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let user = match args.user {
        User::User => UserSpec::User,
        User::Root => UserSpec::Root,
    };
    match (args.source, args.destination) {
        (Place::Guest { run, path }, to @ (Place::Local(_) | Place::Standard)) => {
            let home = context.home()?;
            block_on(copy_out(&home, &run, &path, &to))
        }
        (from @ (Place::Local(_) | Place::Standard), Place::Guest { run, path }) => {
            let home = context.home()?;
            block_on(copy_in(&home, &from, &run, path, user))
        }
        (Place::Guest { .. }, Place::Guest { .. }) => Err(CliError::usage(
            "both sides are in a VM; copy by way of this host",
        )),
        _ => Err(CliError::usage("neither side is in a VM")
            .with_hint("name the VM's side as RUN:PATH, such as 6f1c2f0e:/tmp/file")),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// Where a file that comes out goes: it appears whole, by rename, or not at all.
enum Sink {
    Standard(io::Stdout),
    /// Something that is no regular file, such as /dev/null or a FIFO.
    Special(File),
    New {
        file: tempfile::NamedTempFile,
        path: PathBuf,
    },
}

impl Sink {
    fn open(to: &Place, guest_path: &str) -> Result<Self, CliError> {
        let Place::Local(path) = to else {
            return Ok(Self::Standard(io::stdout()));
        };
        let mut path = path.clone();
        if path.is_dir() {
            let name = Path::new(guest_path)
                .file_name()
                .ok_or_else(|| CliError::failed(format_args!("{guest_path} names no file")))?;
            path.push(name);
        }
        let cannot = |error: io::Error| {
            CliError::failed(format_args!("cannot write {}: {error}", path.display()))
        };
        match std::fs::metadata(&path) {
            Ok(metadata) if !metadata.is_file() => {
                let file = File::options().write(true).open(&path).map_err(cannot)?;
                return Ok(Self::Special(file));
            }
            // A link is followed, as cp does: the rename must not replace the link itself.
            Ok(_) => path = path.canonicalize().map_err(cannot)?,
            Err(_) => {}
        }
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let cannot = |error: io::Error| {
            CliError::failed(format_args!(
                "cannot write in {}: {error}",
                parent.display()
            ))
        };
        let file = tempfile::Builder::new()
            .prefix(".runner-cp-")
            .permissions(std::fs::Permissions::from_mode(0o666))
            .tempfile_in(parent)
            .map_err(cannot)?;
        Ok(Self::New { file, path })
    }

    fn write(&mut self, data: &[u8]) -> Result<(), CliError> {
        match self {
            Self::Standard(stdout) => stdout.write_all(data).map_err(CliError::stdout),
            Self::Special(file) => Ok(file.write_all(data)?),
            Self::New { file, path } => file.write_all(data).map_err(|error| {
                CliError::failed(format_args!("cannot write {}: {error}", path.display()))
            }),
        }
    }

    fn finish(self) -> Result<(), CliError> {
        match self {
            Self::Standard(mut stdout) => stdout.flush().map_err(CliError::stdout),
            Self::Special(_) => Ok(()),
            Self::New { file, path } => file.persist(&path).map(drop).map_err(|error| {
                CliError::failed(format_args!(
                    "cannot write {}: {}",
                    path.display(),
                    error.error
                ))
            }),
        }
    }
}

async fn copy_out(home: &Home, run: &RunPrefix, path: &str, to: &Place) -> Result<(), CliError> {
    let mut sink = Sink::open(to, path)?;
    let found = client::find(home, run).await?;
    let request = Request::ReadFile {
        run: found.info.run_id,
        path: path.to_owned(),
    };
    let mut connection = found
        .instance
        .request(&request)
        .await
        .map_err(|error| client::broken(&error))?;
    loop {
        match protocol::receive(&mut connection).await {
            Ok(Some(Reply::Data(data))) => sink.write(&data)?,
            Ok(Some(Reply::Done)) => return sink.finish(),
            Ok(Some(Reply::Failed(failure))) => return Err(explain(failure, path)),
            Ok(Some(_)) => return Err(client::odd()),
            Ok(None) => return Err(client::broken(&io::ErrorKind::UnexpectedEof.into())),
            Err(error) => return Err(client::broken(&error)),
        }
    }
}

async fn copy_in(
    home: &Home,
    from: &Place,
    run: &RunPrefix,
    path: String,
    user: UserSpec,
) -> Result<(), CliError> {
    let (name, mode) = match from {
        Place::Local(local) => {
            let cannot = |error: io::Error| {
                CliError::failed(format_args!("cannot read {}: {error}", local.display()))
            };
            let metadata = std::fs::metadata(local).map_err(cannot)?;
            if metadata.is_dir() {
                return Err(
                    CliError::failed(format_args!("{} is a directory", local.display())).with_hint(
                        format_args!(
                            "stream it: tar c -C {} . | runner exec {run} -- tar x -C {path}",
                            local.display()
                        ),
                    ),
                );
            }
            let name = local
                .file_name()
                .map(|name| name.to_string_lossy().into_owned());
            (name, metadata.permissions().mode() & 0o777)
        }
        _ => (None, 0o644),
    };
    let found = client::find(home, run).await?;
    let into_directory = path.ends_with('/');
    let first = match &name {
        Some(name) if into_directory => format!("{path}{name}"),
        _ => path.clone(),
    };
    let spec = |path: String| FileSpec {
        path,
        mode,
        user: user.clone(),
    };
    let failure = match send_file(&found, from, spec(first)).await? {
        None => return Ok(()),
        Some(failure) => failure,
    };
    // Only the guest knows what is a directory there.
    match name {
        Some(name)
            if failure.errno == Some(libc::EISDIR)
                && !into_directory
                && matches!(from, Place::Local(_)) =>
        {
            match send_file(&found, from, spec(format!("{path}/{name}"))).await? {
                None => Ok(()),
                Some(failure) => Err(explain(failure, &path)),
            }
        }
        _ => Err(explain(failure, &path)),
    }
}

/// Sends one file; `Some` is the guest's refusal.
async fn send_file(
    found: &ActiveRun,
    from: &Place,
    file: FileSpec,
) -> Result<Option<Failure>, CliError> {
    let mut source: Box<dyn Read> = match from {
        Place::Local(path) => Box::new(File::open(path).map_err(|error| {
            CliError::failed(format_args!("cannot read {}: {error}", path.display()))
        })?),
        _ => Box::new(io::stdin().lock()),
    };
    let request = Request::WriteFile {
        run: found.info.run_id,
        file,
    };
    let mut connection = found
        .instance
        .request(&request)
        .await
        .map_err(|error| client::broken(&error))?;
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = source.read(&mut buffer)?;
        let input = match buffer.get(..length) {
            Some(data) if !data.is_empty() => Input::Stdin(Bytes::copy_from_slice(data)),
            _ => Input::EndOfStdin,
        };
        let last = matches!(input, Input::EndOfStdin);
        let sent = protocol::send(&mut connection, &input).await;
        // A send that fails means the server has answered and closed: its answer says why.
        if last || sent.is_err() {
            break;
        }
    }
    match protocol::receive(&mut connection).await {
        Ok(Some(Reply::Done)) => Ok(None),
        Ok(Some(Reply::Failed(failure))) => Ok(Some(failure)),
        Ok(Some(_)) => Err(client::odd()),
        Ok(None) => Err(client::broken(&io::ErrorKind::UnexpectedEof.into())),
        Err(error) => Err(client::broken(&error)),
    }
}

fn explain(failure: Failure, path: &str) -> CliError {
    let directory = failure.errno == Some(libc::EISDIR);
    let error = client::told(failure);
    if directory {
        error.with_hint(format_args!(
            "stream a directory: runner exec RUN -- tar c -C {path} . | tar x"
        ))
    } else {
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart() {
        let guest = |run: &str, path: &str| Place::Guest {
            run: run.parse().unwrap(),
            path: path.to_owned(),
        };
        assert_eq!("6f1c:/tmp/x".parse(), Ok(guest("6f1c", "/tmp/x")));
        assert_eq!("6f1c:x".parse(), Ok(guest("6f1c", "/home/user/x")));
        assert_eq!("6f1c:/a:b".parse(), Ok(guest("6f1c", "/a:b")));
        assert_eq!("-".parse(), Ok(Place::Standard));
        for local in ["./6f1c:x", "x.txt", "/a:b", "notes:today"] {
            assert_eq!(local.parse(), Ok(Place::Local(PathBuf::from(local))));
        }
        "6f1c:".parse::<Place>().unwrap_err();
        "".parse::<Place>().unwrap_err();
    }
}
