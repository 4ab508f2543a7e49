//! `ploopfs resize`.

use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags};

use crate::cli::work::{self, Pace};
use crate::cli::{Outcome, out, served, size, snapshot, target};
use crate::error::{Error, Result};
use crate::io::loopdev;
use crate::vdisk::live::Work;

/// Arguments of `resize`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// The disk's new size, such as 20G; rounded up to a cluster
    #[arg(value_name = "SIZE", value_parser = size::parse_disk)]
    size: u64,
    #[command(flatten)]
    pace: Pace,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let path = target::find(&args.image)?;
    let done = work::carry_out(&path, &Work::Resize { size: args.size }, args.pace)?;
    let devices = update_loops(&path)?;
    snapshot::say(&done)?;
    let size = size::human(done.size.unwrap_or(args.size));
    let mut text = format!("{}: {size}\n", out::printable(&args.image.to_string_lossy()));
    for device in devices {
        text += &format!("{}: {size}\n", device.display());
    }
    out::done(&text)?;
    Ok(Outcome::Done)
}

/// Gives the loop devices over the image its new size. Here and not in the daemon, which must never call a device that
/// asks it back.
fn update_loops(path: &Path) -> Result<Vec<PathBuf>> {
    let Some(live) = served::image(path)? else { return Ok(Vec::new()) };
    let devices = loopdev::over(&live.shown)?;
    if !devices.is_empty() {
        // The kernel takes the length that it knows of the file, and that may be the old one.
        rustix::fs::statx(CWD, &live.shown, AtFlags::STATX_FORCE_SYNC, StatxFlags::SIZE)
            .map_err(|e| Error::io(&e.into(), &live.shown, "cannot read its new size"))?;
    }
    devices.into_iter().map(|device| loopdev::update_size(&device.dev).map(|()| device.dev)).collect()
}
