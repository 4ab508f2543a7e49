//! `ploopfs attach`.

use std::path::{Path, PathBuf};

use crate::cli::{Outcome, out, target};
use crate::control::client::Client;
use crate::daemon::mounts;
use crate::error::{Error, Kind, Result};
use crate::image::chain::Candidate;
use crate::image::kind::Class;
use crate::io::loopdev::{self, LoopDevice};

/// Arguments of `attach`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image: its file (images/vm1) or what is shown of it (/mnt/vdisks/vm1.img)
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// Attach it for reading only
    #[arg(long)]
    read_only: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let shown = shown(&args.image)?;
    if let Some(device) = over(&shown)?.into_iter().next() {
        let what =
            format!("is attached already: {0}; end that with: ploopfs detach {0}", device.dev.display());
        return Err(Error::at(Kind::InUse, &shown, what).into());
    }
    let device = loopdev::attach(&shown, args.read_only).map_err(|e| match e.kind() {
        Kind::ReadOnly => Error::at(
            Kind::ReadOnly,
            &shown,
            "cannot be written (`ploopfs info` says why); to attach it for reading: --read-only",
        ),
        _ => e,
    })?;
    out::text(&format!("{}\n", device.dev.display()))?;
    Ok(Outcome::Done)
}

/// The loop devices over a file.
pub fn over(file: &Path) -> Result<Vec<LoopDevice>> {
    let mut devices =
        loopdev::list().map_err(|e| Error::io(&e, "/sys/block", "cannot look for loop devices"))?;
    devices.retain(|device| device.backing == file);
    Ok(devices)
}

/// The flat file that a mount shows of `image`: `image` itself where it lies on a mount of ours, else looked up in
/// the mount that serves its folder.
pub fn shown(image: &Path) -> Result<PathBuf> {
    if let Ok(found) = image.canonicalize()
        && mounts::covering(&found)?.is_some_and(|mount| mount.is_ours())
    {
        return Ok(found);
    }
    let source = target::find(image)?;
    let source = source.canonicalize().map_err(|e| Error::io(&e, &source, "cannot resolve the path"))?;
    let Some(folder) = source.parent() else {
        return Err(Error::at(Kind::Invalid, image, "is not an image in a folder"));
    };
    let mounted = mounts::all()?.into_iter().rev().find(|mount| mount.is_ours() && mount.source == folder);
    let (Some(mount), Some(_)) = (mounted, Client::find(folder)?) else {
        let what = format!("no mount shows it; first: ploopfs mount {} MOUNTPOINT", folder.display());
        return Err(Error::at(Kind::NotFound, image, what));
    };
    let Class::Image { mut name, .. } = Candidate::open(&source)?.class() else {
        return Err(Error::at(Kind::Invalid, image, "is no image (`ploopfs list --all` says why)"));
    };
    name.push(".img");
    let shown = mount.point.join(name);
    shown.symlink_metadata().map_err(|e| {
        let what = format!("{} does not show it (`ploopfs list` says why)", mount.point.display());
        Error::io(&e, image, what)
    })?;
    Ok(shown)
}
