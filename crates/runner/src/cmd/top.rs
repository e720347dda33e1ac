//! `runner top`: what runs, what it takes, what ended; as a dashboard in a terminal.

mod data;
mod signals;
mod view;

use std::io::{BufRead, IsTerminal};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

use crate::context::{CliError, Context, block_on, note};
use crate::control::protocol::{Reply, Request};
use crate::home::Home;
use crate::names::RunId;
use data::{Data, Sampler};
use signals::Drawing;
use view::{Overlay, View};

/// How often everything is looked at.
const INTERVAL: Duration = Duration::from_secs(1);

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Keys: up and down (or k and j) choose a run, l follows its log, s opens a shell in its VM, c cancels it, ? helps, \
q quits. Shows all runners of the home; no root is needed beyond its owner.\n\n\
Examples:\n  runner top\n  runner top --json | jq '.runs[].cpu_percent'"
)]
pub(crate) struct Args {
    /// Print what it would show as one JSON object, and end
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let home = context.home()?;
    let mut sampler = Sampler::new()?;
    if args.json {
        // What a VM takes of the CPU is the difference of two looks.
        block_on(sampler.look(&home))?;
        std::thread::sleep(INTERVAL);
        context.print_json(&block_on(sampler.look(&home))?)?;
        return Ok(ExitCode::SUCCESS);
    }
    if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        return Err(CliError::failed("`runner top` needs a terminal")
            .with_hint("`runner top --json` prints the same once"));
    }
    let drawing = signals::watch()?;
    let mut terminal = ratatui::try_init()?;
    let result = watch(&mut terminal, &home, context, &mut sampler, &drawing);
    ratatui::restore();
    result.map(|()| ExitCode::SUCCESS)
}

/// What a key asks for.
enum Wish {
    Nothing,
    Quit,
    Follow(RunId),
    Shell(RunId),
    Cancel(RunId),
}

fn watch(
    terminal: &mut DefaultTerminal,
    home: &Home,
    context: &Context,
    sampler: &mut Sampler,
    drawing: &Drawing,
) -> Result<(), CliError> {
    let mut data = block_on(sampler.look(home))?;
    let mut looked = Instant::now();
    let mut view = View::default();
    loop {
        view.keep_selection(&data);
        drawing.undisturbed(|| terminal.draw(|frame| view.draw(frame, &data)).map(|_| ()))?;
        let left = INTERVAL.saturating_sub(looked.elapsed());
        if event::poll(left)? {
            let wish = match event::read()? {
                Event::Key(key) if key.kind == KeyEventKind::Press => {
                    let interrupt = key.modifiers.contains(KeyModifiers::CONTROL)
                        && key.code == KeyCode::Char('c');
                    match interrupt {
                        true => Wish::Quit,
                        false => pressed(&mut view, &data, key.code),
                    }
                }
                // A resize only wants a new frame.
                _ => Wish::Nothing,
            };
            match wish {
                Wish::Nothing => {}
                Wish::Quit => return Ok(()),
                Wish::Cancel(run) => view.say(block_on(cancel(home, &data, run))?),
                Wish::Follow(run) => {
                    let run = run.to_string();
                    aside(terminal, context, &["logs", &run, "--follow"], true)?;
                }
                Wish::Shell(run) => {
                    let run = run.to_string();
                    aside(
                        terminal,
                        context,
                        &["exec", &run, "-it", "--", "bash"],
                        false,
                    )?;
                }
            }
        }
        if looked.elapsed() >= INTERVAL {
            data = block_on(sampler.look(home))?;
            looked = Instant::now();
        }
    }
}

fn pressed(view: &mut View, data: &Data, key: KeyCode) -> Wish {
    view.say(String::new());
    match (view.overlay, key) {
        (Overlay::Confirm(run), KeyCode::Char('y')) => {
            view.overlay = Overlay::None;
            return Wish::Cancel(run);
        }
        (Overlay::Help | Overlay::Confirm(_), _) => view.overlay = Overlay::None,
        (Overlay::None, KeyCode::Char('q') | KeyCode::Esc) => return Wish::Quit,
        (Overlay::None, KeyCode::Char('?' | 'h')) => view.overlay = Overlay::Help,
        (Overlay::None, KeyCode::Up | KeyCode::Char('k')) => view.move_by(data, -1),
        (Overlay::None, KeyCode::Down | KeyCode::Char('j')) => view.move_by(data, 1),
        (Overlay::None, KeyCode::Char(key @ ('l' | 's' | 'c'))) => {
            let Some(run) = view.selected() else {
                view.say("no run is chosen".to_owned());
                return Wish::Nothing;
            };
            match key {
                'l' => return Wish::Follow(run),
                's' => return Wish::Shell(run),
                _ => view.overlay = Overlay::Confirm(run),
            }
        }
        (Overlay::None, KeyCode::Enter) => {
            if let Some(run) = view.selected() {
                return Wish::Follow(run);
            }
        }
        (Overlay::None, _) => {}
    }
    Wish::Nothing
}

async fn cancel(home: &Home, data: &Data, run: RunId) -> Result<String, CliError> {
    let Some(owner) = data.owner(run) else {
        return Ok(format!("run {run} has ended"));
    };
    let instances = crate::control::client::Instance::live(home)?;
    let mut instances = instances.into_iter();
    let Some(instance) = instances.find(|instance| instance.runner == *owner) else {
        return Ok(format!("runner {owner} does not run any more"));
    };
    Ok(match instance.ask(&Request::Cancel { run }).await {
        Ok(Reply::Done) => format!("run {run} is being cancelled"),
        Ok(Reply::Failed(failure)) => failure.message,
        Ok(_) => "the runner gave an odd answer".to_owned(),
        Err(error) => format!("the runner does not answer: {error}"),
    })
}

/// Gives the terminal to another command of this program until that ends.
fn aside(
    terminal: &mut DefaultTerminal,
    context: &Context,
    arguments: &[&str],
    wait: bool,
) -> Result<(), CliError> {
    ratatui::restore();
    let mut command = Command::new(std::env::current_exe()?);
    if let Some(home) = context.named_home() {
        command.arg("--home").arg(home);
    }
    note(format_args!(
        "── runner {} ── (Ctrl-C or its end leads back)",
        arguments.join(" ")
    ));
    // Ctrl-C is for the command alone, which has the terminal now: while a handler is set we outlive it, and a program that is
    // started has none.
    let status = block_on(async {
        let _interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
        Ok(tokio::process::Command::from(command)
            .args(arguments)
            .status()
            .await)
    })?;
    match status {
        Ok(status) if wait || !status.success() => {
            note("── Enter leads back ──");
            let mut line = String::new();
            std::io::stdin().lock().read_line(&mut line)?;
        }
        Ok(_) => {}
        Err(error) => note(format_args!("it cannot be started: {error}")),
    }
    *terminal = ratatui::try_init()?;
    terminal.clear()?;
    Ok(())
}
