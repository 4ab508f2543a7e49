//! `ploopfs compact`.

use std::path::PathBuf;

use serde::Serialize;

use crate::cli::work::{self, Pace};
use crate::cli::{Outcome, out, size, target};
use crate::control::protocol::work::GainAnswer;
use crate::disk::owner::refuse_level;
use crate::error::{Error, Kind};
use crate::vdisk::live::Work;
use crate::vdisk::live::compact::Gain;
use crate::vdisk::live::order::Pieces;

/// Arguments of `compact`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// Also put the live disk's clusters in the order of the disk, so that reading it from front to back reads its file
    /// from front to back
    #[arg(long)]
    defrag: bool,
    /// Only say what it would gain
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pace: Pace,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Document {
    /// Nothing was changed.
    dry_run: bool,
    #[serde(flatten)]
    gain: GainAnswer,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let path = target::find(&args.image)?;
    if !args.dry_run {
        // The look that comes first changes nothing, and would pass.
        refuse_level(&path)?;
    }
    let name = out::printable(&args.image.to_string_lossy());
    let mut gain = Gain::default();
    for dry_run in [true, false] {
        // To say before what it would gain, a person is worth a second look; a program reads the result.
        if args.json && dry_run != args.dry_run || args.dry_run && !dry_run {
            continue;
        }
        let work = Work::Compact { dry_run, defrag: args.defrag };
        gain = work::carry_out(&path, &work, args.pace)?.gain.unwrap_or_default();
        if args.defrag && gain.defrag.is_none() {
            let why = "the daemon that serves it is of an older version, which knows no --defrag; mount again first";
            return Err(Error::at(Kind::Unsupported, &path, why).into());
        }
        if !args.json {
            out::text(&to_text(&name, &gain, dry_run))?;
        }
    }
    if args.json {
        out::json(&Document { dry_run: args.dry_run, gain: gain.into() })?;
    }
    Ok(Outcome::Done)
}

/// As `info` says things: a line each.
fn to_text(name: &str, gain: &Gain, dry_run: bool) -> String {
    let (title, freed, moved, needed) = if dry_run {
        ("what it would gain", "to free", "to move", "needed")
    } else {
        ("what it has gained", "freed", "moved", "was needed")
    };
    let then = |before: u64, after: u64| format!("{} -> {}", size::human(before), size::human(after));
    let mut text = format!(
        "{name}, {title}:\n  file length: {}\n  allocated:   {}\n  zeroes:      {} {freed}\n  moves:       {} {moved}\n",
        then(gain.length, gain.length_after),
        then(gain.allocated, gain.allocated_after),
        size::count(gain.zero_clusters, "cluster"),
        size::count(gain.moved_clusters, "cluster"),
    );
    if let Some(Pieces { pieces, pieces_after, spare }) = gain.defrag {
        text += &format!("  pieces:      {pieces} -> {pieces_after}\n");
        text += &format!("  free space:  {} {needed} meanwhile\n", size::human(spare));
    }
    text
}
