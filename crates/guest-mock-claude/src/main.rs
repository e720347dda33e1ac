//! Mock agent CLI: runs the prompt with bash and answers in the real CLI's own stream.
//!
//! It stands in for `claude` where no credentials are: same flags, same JSON lines, same session history file,
//! and the prompt is executed instead of thought about. Prompts that begin with `@` misbehave on purpose, so
//! that whatever supervises an agent CLI can be tested against every way one can go wrong (`script`; the table
//! of them is `docs/mock-agent.md`).
//!
//! It is started once for every job, often under emulation where each new basic block costs: no async runtime,
//! no argument-parsing crate, one write per batch of lines.

mod args;
mod bash;
mod events;
mod history;
mod messages;
mod script;

use std::ffi::OsStr;
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStringExt as _;
use std::process::ExitCode;

use args::{Args, Format};
use events::{Stream, command_lines, opening_lines, result_lines};

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        // The reader of our output is gone: nobody is left to tell.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("Error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<ExitCode> {
    let args = Args::parse(std::env::args_os().skip(1));
    if args.messages {
        return converse(args.resume.as_deref());
    }
    let Some(prompt) = prompt_bytes(&args)? else {
        eprintln!(
            "Error: Input must be provided either through stdin or as a prompt argument when using --print"
        );
        return Ok(ExitCode::FAILURE);
    };
    if let Some(script) = script::Script::parse(&prompt) {
        return script.play(false);
    }
    match args.output_format {
        Format::Text => Err(bash::become_bash(&prompt)),
        Format::StreamJson => answer(&prompt, args.resume.as_deref()),
    }
}

/// The prompt: the first argument that is one, or else standard input to its end.
fn prompt_bytes(args: &Args) -> io::Result<Option<Vec<u8>>> {
    let mut prompt = match &args.prompt {
        Some(prompt) => prompt.clone().into_vec(),
        None => Vec::new(),
    };
    if prompt.is_empty() {
        io::stdin().lock().read_to_end(&mut prompt)?;
    }
    Ok((!prompt.is_empty()).then_some(prompt))
}

/// The lines around one run of the prompt.
fn answer(prompt: &[u8], resume: Option<&OsStr>) -> io::Result<ExitCode> {
    match session(resume)? {
        Some(mut stream) => turn(&mut stream, prompt, None),
        None => Ok(ExitCode::FAILURE),
    }
}

/// A turn for each message on standard input, until its end. The exit code is the last turn's.
fn converse(resume: Option<&OsStr>) -> io::Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    let mut stream = None;
    while let Some(text) = messages::next()? {
        if let Some(script) = script::Script::parse(text.as_bytes()) {
            return script.play(true);
        }
        if stream.is_none() {
            stream = session(resume)?;
        }
        let Some(stream) = &mut stream else {
            return Ok(ExitCode::FAILURE);
        };
        code = turn(stream, text.as_bytes(), Some(&text))?;
    }
    Ok(code)
}

/// The session to go on with, or a new one. `None` when it is not there, which has been said.
fn session(resume: Option<&OsStr>) -> io::Result<Option<Stream>> {
    let Some(id) = resume.map(OsStr::to_string_lossy) else {
        return Stream::new().map(Some);
    };
    match Stream::resume(&id) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // As the real CLI says it.
            eprintln!("No conversation found with session ID: {id}");
            Ok(None)
        }
        other => other.map(Some),
    }
}

/// The five lines around one command, and one that repeats the message it came with.
fn turn(stream: &mut Stream, prompt: &[u8], message: Option<&str>) -> io::Result<ExitCode> {
    opening_lines(stream, message);
    command_lines(stream, prompt);
    stream.flush()?;

    let outcome = bash::run(prompt);

    result_lines(stream, &outcome.text(), outcome.failed());
    stream.flush()?;
    if let Err(error) = history::save(stream) {
        eprintln!("the session history could not be written: {error}");
    }
    Ok(ExitCode::from(outcome.code))
}
