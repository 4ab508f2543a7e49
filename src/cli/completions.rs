//! `ploopfs completions`.

use clap::CommandFactory;
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
    clap_complete::generate(args.shell, &mut Cli::command(), "ploopfs", &mut script);
    out::bytes(&script)?;
    Ok(Outcome::Done)
}
