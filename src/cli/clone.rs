//! `ploopfs clone`.

use std::path::{Path, PathBuf};

use crate::cli::made::Made;
use crate::cli::served;
use crate::cli::work::{self, Pace};
use crate::cli::{Outcome, out, snapshot, source, target};
use crate::error::{Error, Kind, Result};
use crate::image::clone::Destinations;
use crate::io::mounts;
use crate::vdisk::live::Work;

/// Arguments of `clone`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image, or IMAGE@SNAPSHOT
    #[arg(value_name = "IMAGE[@SNAPSHOT]")]
    image: PathBuf,
    /// The new image, such as images/vm2, or several in one folder, such as images/vm{2..101} in bash
    #[arg(value_name = "NEW", required = true)]
    new: Vec<PathBuf>,
    /// Copy the data where the host can neither share nor link it
    #[arg(long)]
    copy: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pace: Pace,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let target = target::find_any(&args.image)?;
    let to = new_places(&args.new)?;
    // Before anything is done; an opener that comes in between is refused all the same.
    drop(Destinations::of(&to)?);
    let work = Work::Clone { snapshot: target.snapshot.clone(), to: to.clone(), copy: args.copy };
    let done = work::carry_out(&target.path, &work, args.pace)?;
    // They lie in one folder, and one look shows them all.
    source::show(&to[0])?;
    if args.json {
        let image = work::as_it_is(&target.path);
        Made::with("clone", &image, target.snapshot.as_deref(), done.note.as_deref()).and(&to).print()?;
        return Ok(Outcome::Done);
    }
    snapshot::say(&done)?;
    let line = |to: &PathBuf| format!("created {}\n", out::printable(&to.to_string_lossy()));
    out::done(&to.iter().map(line).collect::<String>())?;
    Ok(Outcome::Done)
}

/// NEW as an absolute path, since the daemon has another working folder than we; in the images folder, where a mount of
/// ours was named.
pub fn new_place(new: &Path) -> Result<PathBuf> {
    Place::around(new)?.path_of(new)
}

/// The same of several. A folder is looked at once.
fn new_places(new: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut known: Option<(&Path, Place)> = None;
    let place = |new| {
        let parent = parent(new);
        let place = match known.take().filter(|(folder, _)| *folder == parent) {
            Some((_, place)) => place,
            None => Place::around(new)?,
        };
        let path = place.path_of(new);
        known = Some((parent, place));
        path
    };
    new.iter().map(|new| new.as_path()).map(place).collect()
}

fn parent(new: &Path) -> &Path {
    new.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn nameless(new: &Path) -> Error {
    Error::at(Kind::Invalid, new, "is no name for an image")
}

/// The folder in which new images are to lie.
struct Place {
    folder: PathBuf,
    /// A mount of ours was named: what is `vm2.img` there, is `vm2` in the folder.
    shown: bool,
}

impl Place {
    fn around(new: &Path) -> Result<Place> {
        new.file_name().ok_or_else(|| nameless(new))?;
        let parent = parent(new);
        let folder = parent.canonicalize().map_err(|e| Error::io(&e, parent, "no such folder"))?;
        let mount = mounts::covering(&folder)?.filter(|mount| mount.is_ours());
        let Some(mount) = mount else { return Ok(Place { folder, shown: false }) };
        let mount = mount.trusted()?;
        if mount.point != folder {
            return Err(Error::at(
                Kind::Invalid,
                new,
                "no image can be made there; name one beside the others",
            ));
        }
        let daemon = served::of_mount(&mount)?;
        let silent = || served::unanswered(&mount, new);
        Ok(Place { folder: daemon.ok_or_else(silent)?.0, shown: true })
    }

    fn path_of(&self, new: &Path) -> Result<PathBuf> {
        let name = new.file_name().ok_or_else(|| nameless(new))?;
        let bare = Path::new(name);
        let is_shown = self.shown && bare.extension().is_some_and(|e| e == "img");
        let bare = if is_shown { bare.file_stem() } else { Some(name) };
        Ok(self.folder.join(bare.ok_or_else(|| nameless(new))?))
    }
}
