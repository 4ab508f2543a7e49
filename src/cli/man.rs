//! `ploopfs man`, hidden: writes the man pages that are checked in under `man/`.

use std::path::PathBuf;

use anyhow::Context;
use clap::CommandFactory;

use crate::cli::{Cli, Outcome};

/// Arguments of `man`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder; it must exist
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    clap_mangen::generate_to(Cli::command(), &args.dir)
        .with_context(|| format!("{}: cannot write the man pages", args.dir.display()))?;
    Ok(Outcome::Done)
}
