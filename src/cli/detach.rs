//! `ploopfs detach`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cli::attach::shown;
use crate::cli::{Outcome, out};
use crate::error::{Error, Kind, Result};
use crate::io::loopdev;

/// How long the kernel may take to release the device. udev looks at every device that changes, for a second at most.
const PATIENCE: Duration = Duration::from_secs(30);

/// Arguments of `detach`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image, or its loop device
    #[arg(value_name = "IMAGE|/dev/loopN")]
    target: PathBuf,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let devices = devices(&args.target)?;
    if devices.is_empty() {
        out::say(&format!("{}: not attached", args.target.display()));
    }
    for device in devices {
        match loopdev::detach(&device, PATIENCE) {
            Err(e) if e.kind() == Kind::Busy => return Err(e.with_kind(Kind::InUse).into()),
            result => result?,
        }
    }
    Ok(Outcome::Done)
}

/// The loop devices that are meant; none when nothing is attached.
fn devices(target: &Path) -> Result<Vec<PathBuf>> {
    let all = loopdev::list()?;
    if target.starts_with("/dev") {
        target.symlink_metadata().map_err(|e| Error::io(&e, target, "no such device"))?;
        return Ok(all.into_iter().map(|device| device.dev).filter(|dev| dev == target).collect());
    }
    // An image whose daemon died is still named by its loop device.
    let absolute =
        std::path::absolute(target).map_err(|e| Error::io(&e, target, "cannot resolve the path"))?;
    let mut named: Vec<PathBuf> =
        all.into_iter().filter(|device| device.backing == absolute).map(|device| device.dev).collect();
    match shown(target).and_then(|shown| loopdev::over(&shown)) {
        Ok(over) => named.extend(over.into_iter().map(|device| device.dev)),
        Err(e) if named.is_empty() => return Err(e),
        Err(_) => {}
    }
    named.sort();
    named.dedup();
    Ok(named)
}
