//! Whose a file is: the layered image that has it as a level. Changed by itself, a level takes the image with it, and all
//! that stands on it; so this is asked before anything is changed. Files are known by device and inode, whatever they are
//! called: by a relative path, through a link to a folder, by a hard link, through a bind mount.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags};

use crate::disk::find::is_layered;
use crate::disk::layered::Layered;
use crate::error::{Error, Kind, Result};
use crate::io::mounts;

/// Device and inode.
type Identity = (u64, u64);

/// The folder of a layered image that has the file at `path` as a level; None: it is no level, or no regular file.
///
/// A descriptor may name files of the folder around its own and of all below it. So every folder is looked at that lies
/// in one of those above the file. Those on other file systems are passed over: what is mounted there may not answer.
pub fn owner(path: &Path) -> Result<Option<PathBuf>> {
    // The open says what is missing, or no file.
    let Some(wanted) = identity(path) else { return Ok(None) };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let own = parent.canonicalize().map_err(|e| Error::io(&e, parent, "cannot resolve the path"))?;
    let file = own.join(path.file_name().unwrap_or_default());
    let mut ways = other_ways(&file, wanted);
    ways.insert(0, file);
    Ok(ways.iter().find_map(|way| above(way, wanted)))
}

/// Looks in every folder above `file`, and in those that lie in one of them.
fn above(file: &Path, wanted: Identity) -> Option<PathBuf> {
    let here = |folder: &Path| device(folder) == Some(wanted.0);
    for around in file.ancestors().skip(1).take_while(|around| here(around)) {
        if names(around, wanted) {
            return Some(around.to_owned());
        }
        // A folder that may not be listed is one whose images cannot be known either. One whose name begins with a dot is
        // no image: a crash may have left it, with a link to the file, before it got its name.
        let Ok(entries) = around.read_dir() else { continue };
        let may_be_one = |entry: &fs::DirEntry| {
            !entry.file_name().as_encoded_bytes().starts_with(b".")
                && entry.file_type().is_ok_and(|kind| kind.is_dir())
        };
        let folders =
            entries.filter_map(std::result::Result::ok).filter(may_be_one).map(|entry| entry.path());
        let mut owners = folders.filter(|folder| here(folder) && names(folder, wanted));
        if let Some(found) = owners.next() {
            return Some(found);
        }
    }
    None
}

/// Where else the same file is seen: by other mounts of its file system, where one of them was bound.
fn other_ways(file: &Path, wanted: Identity) -> Vec<PathBuf> {
    // Without a table of mounts there is nothing to be known of them.
    let table = mounts::all().unwrap_or_default();
    let Some(here) = mounts::covering_in(&table, file) else { return Vec::new() };
    let Some(inside) = here.inside(file) else { return Vec::new() };
    let others = table.iter().filter(|mount| mount.device == here.device && mount.id != here.id);
    let seen = others.filter_map(|mount| Some(mount.point.join(inside.strip_prefix(&mount.root).ok()?)));
    seen.filter(|way| identity(way) == Some(wanted)).collect()
}

/// What a regular file is, whatever it is called.
fn identity(path: &Path) -> Option<Identity> {
    let meta = path.symlink_metadata().ok().filter(fs::Metadata::is_file)?;
    Some((meta.dev(), meta.ino()))
}

/// Refuses to change the file at `path` where it is a level of a layered image. What the image is called is part of the
/// message: it is what was meant, mostly.
pub fn refuse_level(path: &Path) -> Result<()> {
    let Some(folder) = owner(path)? else { return Ok(()) };
    let why = format!(
        "is a level of the layered image {0}, which would not survive a change of this file alone; name the image \
         itself: {0}",
        folder.display()
    );
    Err(Error::at(Kind::Invalid, path, why))
}

/// Without asking a server, and without mounting anything.
fn device(folder: &Path) -> Option<u64> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(CWD, folder, flags, StatxFlags::TYPE).ok()?;
    Some(rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor))
}

/// True when a descriptor in `folder` names the file. A descriptor that cannot be read names none: nothing stands on it.
fn names(folder: &Path, wanted: Identity) -> bool {
    is_layered(folder) && Layered::read(folder).is_ok_and(|image| image.files().any(|file| file == wanted))
}
