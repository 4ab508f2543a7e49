//! `ploopfs clone`.

use std::path::{Path, PathBuf};

use crate::cli::served;
use crate::cli::work::{self, Pace};
use crate::cli::{Outcome, out, snapshot, source, target};
use crate::error::{Error, Kind, Result};
use crate::io::mounts;
use crate::vdisk::live::Work;

/// Arguments of `clone`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image, or IMAGE@SNAPSHOT
    #[arg(value_name = "IMAGE[@SNAPSHOT]")]
    image: PathBuf,
    /// The new image, such as images/vm2
    #[arg(value_name = "NEW")]
    new: PathBuf,
    /// Copy the data where the host can neither share nor link it
    #[arg(long)]
    copy: bool,
    #[command(flatten)]
    pace: Pace,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let target = target::find_any(&args.image)?;
    let to = new_place(&args.new)?;
    // Before anything is done; an opener that comes in between is refused all the same.
    if to.symlink_metadata().is_ok() {
        return Err(Error::at(Kind::Exists, &to, "is there already; choose another name").into());
    }
    let work = Work::Clone { snapshot: target.snapshot, to: to.clone(), copy: args.copy };
    let done = work::carry_out(&target.path, &work, args.pace)?;
    source::show(&to)?;
    snapshot::say(&done)?;
    out::done(&format!("created {}\n", out::printable(&to.to_string_lossy())))?;
    Ok(Outcome::Done)
}

/// NEW as an absolute path, since the daemon has another working folder than we; in the images folder, where a mount of
/// ours was named.
pub fn new_place(new: &Path) -> Result<PathBuf> {
    let nameless = || Error::at(Kind::Invalid, new, "is no name for an image");
    let name = new.file_name().ok_or_else(nameless)?;
    let parent = new.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = parent.canonicalize().map_err(|e| Error::io(&e, parent, "no such folder"))?;
    let mount = mounts::covering(&folder)?.filter(|mount| mount.is_ours());
    let Some(mount) = mount else { return Ok(folder.join(name)) };
    let mount = mount.trusted()?;
    if mount.point != folder {
        return Err(Error::at(Kind::Invalid, new, "no image can be made there; name one beside the others"));
    }
    let bare = Path::new(name);
    let bare = if bare.extension().is_some_and(|e| e == "img") { bare.file_stem() } else { Some(name) };
    let daemon = served::of_mount(&mount)?;
    let silent = || served::unanswered(&mount, new);
    Ok(daemon.ok_or_else(silent)?.0.join(bare.ok_or_else(nameless)?))
}
