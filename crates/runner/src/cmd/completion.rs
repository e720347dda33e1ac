//! Prints a shell completion script.

use std::process::ExitCode;

use clap::ValueEnum;

use crate::context::{CliError, Context};

/// Command line.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  source <(runner completion bash)\n  \
    runner completion zsh > ~/.zfunc/_runner\n  runner completion fish > ~/.config/fish/completions/runner.fish")]
pub(crate) struct Args {
    /// Which shell
    shell: Shell,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let shell = match args.shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    // Into memory first: the generator panics when its writer fails, and stdout may be a closed pipe.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut crate::cli::command(), "runner", &mut script);
    context.print(String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}
