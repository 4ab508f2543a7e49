//! `ploopfs check`.

use crate::cli::{Outcome, out, repair, report, target};
use crate::disk::examine::examine;
use crate::image::check::check;

/// Arguments of `check`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    which: target::FactsArgs,
    /// Put right what can be put right, and say what is lost
    #[arg(long)]
    repair: bool,
    /// Only show what --repair would do
    #[arg(long, requires = "repair")]
    dry_run: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let path = target::find(&args.which.image)?;
    if args.repair {
        return repair::run(&path, args.dry_run, args.which.json);
    }
    if target::is_layered(&path) {
        let examined = examine(&path)?;
        if args.which.json {
            out::json(&report::layered_json(&examined))?;
        } else {
            out::text(&report::layered_text(&examined))?;
        }
        return Ok(if examined.is_damaged() { Outcome::Damaged } else { Outcome::Done });
    }
    let found = check(&path)?;
    if args.which.json {
        out::json(&report::to_json(&found))?;
    } else {
        out::text(&report::to_text(&found))?;
    }
    Ok(if found.is_damaged() { Outcome::Damaged } else { Outcome::Done })
}
