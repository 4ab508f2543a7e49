//! `ploopfs completions`.

use clap::{Command, CommandFactory};
use clap_complete::Shell;

use crate::cli::{Cli, Outcome, out};

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    // Into memory first: the generator panics where its writer fails.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut shown(), "ploopfs", &mut script);
    out::bytes(&script)?;
    Ok(Outcome::Done)
}

/// The program as people see it. The scripts would offer hidden commands, too.
fn shown() -> Command {
    let all = Cli::command();
    let commands = all.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    let program = Command::new("ploopfs").version(env!("CARGO_PKG_VERSION"));
    program.args(all.get_arguments().cloned()).subcommands(commands)
}
