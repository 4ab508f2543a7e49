//! `ploopfs attach`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cli::served::{self, InMount};
use crate::cli::{Outcome, out, target};
use crate::disk::find;
use crate::error::{Error, Kind, Result};
use crate::io::loopdev;
use crate::io::mounts::Mount;
use crate::tree::SNAPSHOTS_NAME;
use crate::words::quoted;

/// How long the kernel may take to release a device whose name could not be said.
const UNHEARD: Duration = Duration::from_secs(5);

/// Arguments of `attach`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image: its file (images/vm1) or what is shown of it (/mnt/vdisks/vm1.img); a snapshot is attached read-only
    #[arg(value_name = "IMAGE[@SNAPSHOT]")]
    image: PathBuf,
    /// Attach it for reading only
    #[arg(long)]
    read_only: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let Shown { path: shown, frozen, mount } = shown_or_snapshot(&args.image)?;
    if let Some(device) = loopdev::over(&shown)?.into_iter().next() {
        let what =
            format!("is attached already: {0}; end that with: ploopfs detach {0}", device.dev.display());
        return Err(Error::at(Kind::InUse, &shown, what).into());
    }
    let inside = shown.strip_prefix(&mount.point).unwrap_or(&shown);
    let open = |flags| mount.open(inside, flags);
    let device =
        loopdev::attach_opened(&shown, args.read_only || frozen, &open).map_err(|e| match e.kind() {
            Kind::ReadOnly => Error::at(
                Kind::ReadOnly,
                &shown,
                "cannot be written (`ploopfs info` says why); to attach it for reading: --read-only",
            ),
            _ => e,
        })?;
    let said = out::text(&format!("{}\n", device.dev.display()));
    if said.is_err() {
        // A caller that does not learn its name would leave it over the image.
        loopdev::detach(&device.dev, UNHEARD)?;
    }
    said?;
    Ok(Outcome::Done)
}

/// The flat file that a mount shows of the live disk of `image`.
pub fn shown(image: &Path) -> Result<PathBuf> {
    match shown_or_snapshot(image)? {
        Shown { path, frozen: false, .. } => Ok(path),
        _ => Err(Error::at(Kind::Invalid, image, "is a snapshot; this command takes a whole image")),
    }
}

/// A flat file of a mount of ours.
struct Shown {
    path: PathBuf,
    /// It is a snapshot's.
    frozen: bool,
    mount: Mount,
}

/// The flat file that a mount shows of `image`: `image` itself where it lies on a mount of ours, else looked up in the
/// mount that serves its folder.
fn shown_or_snapshot(image: &Path) -> Result<Shown> {
    if let Some(InMount { path, mount }) = served::in_mount(image)? {
        // The kernel goes on to know its names for a while.
        if let Some(what) = served::of_dead(&mount) {
            return Err(Error::at(Kind::Io, &mount.point, what));
        }
        let frozen = path.starts_with(mount.point.join(SNAPSHOTS_NAME));
        return Ok(Shown { path, frozen, mount });
    }
    let target = target::find_any(image)?;
    let source = &target.path;
    let source = source.canonicalize().map_err(|e| Error::io(&e, source, "cannot resolve the path"))?;
    let Some(folder) = source.parent() else {
        return Err(Error::at(Kind::Invalid, image, "is not an image in a folder"));
    };
    let Some(mount) = served::of_folder(folder)?.and_then(|daemon| daemon.mount) else {
        let what = format!("no mount shows it; first: ploopfs mount {} MOUNTPOINT", quoted(folder));
        return Err(Error::at(Kind::NotFound, image, what));
    };
    let mut name = find::name(&source)?;
    let shown = match &target.snapshot {
        Some(snapshot) => mount.point.join(SNAPSHOTS_NAME).join(name).join(format!("{snapshot}.img")),
        None => {
            name.push(".img");
            mount.point.join(name)
        }
    };
    shown.symlink_metadata().map_err(|e| {
        let what = format!("{} does not show it (`ploopfs list` says why)", mount.point.display());
        Error::io(&e, image, what)
    })?;
    Ok(Shown { path: shown, frozen: target.snapshot.is_some(), mount })
}
