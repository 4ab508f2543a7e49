//! `ploopfs merge`.

use crate::cli::snapshot::{self, Named};
use crate::cli::work::{self, Pace};
use crate::cli::{Outcome, target};
use crate::vdisk::live::Work;

/// Arguments of `merge`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    which: Named,
    #[command(flatten)]
    pace: Pace,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let path = target::find(&args.which.image)?;
    snapshot::forewarn(&path, &args.which.snapshot)?;
    let done = work::carry_out(&path, &Work::Merge { snapshot: args.which.snapshot }, args.pace)?;
    snapshot::say(&done)?;
    Ok(Outcome::Done)
}
