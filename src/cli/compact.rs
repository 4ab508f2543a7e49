//! `ploopfs compact`.

use std::path::PathBuf;

use serde::Serialize;

use crate::cli::work::{self, Pace};
use crate::cli::{Outcome, out, size, target};
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
    gain: Gain,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let path = target::find(&args.image)?;
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
            out::text(&format!("{name}: {}\n", to_text(&gain, dry_run)))?;
        }
    }
    if args.json {
        out::json(&Document { dry_run: args.dry_run, gain })?;
    }
    Ok(Outcome::Done)
}

fn to_text(gain: &Gain, dry_run: bool) -> String {
    let (would, clusters) = if dry_run { ("would become ", "to free") } else { ("is now ", "freed") };
    let moved = if dry_run { "to move" } else { "moved" };
    let mut text = format!(
        "the file, {} long with {} allocated, {would}{} long with {}; {} zero clusters {clusters}, {} clusters {moved}",
        size::human(gain.length),
        size::human(gain.allocated),
        size::human(gain.length_after),
        size::human(gain.allocated_after),
        gain.zero_clusters,
        gain.moved_clusters,
    );
    if let Some(Pieces { pieces, pieces_after, spare }) = gain.defrag {
        let (is, needs) = if dry_run { ("would be", "needs") } else { ("is now", "needed") };
        let spare = size::human(spare);
        text +=
            &format!("; in {pieces} pieces, {is} in {pieces_after}; {needs} {spare} of free space meanwhile");
    }
    text
}
