//! Whose a file is: the layered image that has it as a level. Changed by itself, a level takes the image with it, and all
//! that stands on it; so this is asked before anything is changed. Files are known by device and inode, whatever they are
//! called: by a relative path, through a link to a folder, by a hard link, through a bind mount.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags};

use crate::disk::find::is_layered;
use crate::disk::layered::Layered;
use crate::error::{Error, Kind, Result};
use crate::image::paths::Located;
use crate::io::file::HostStatus;
use crate::io::mounts;
use crate::words::quoted;

/// Device and inode.
type Identity = (u64, u64);

/// The folder of a layered image that has the file at `path` as a level; None: it is no level, or no regular file.
///
/// A descriptor may name files of the folder around its own and of all below it. So every folder is looked at that lies
/// in one of those above the file. Those on other file systems are passed over: what is mounted there may not answer.
pub fn owner(path: &Path) -> Result<Option<PathBuf>> {
    // The open says what is missing, or no file.
    let Some((wanted, links)) = identity(path) else { return Ok(None) };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let own = parent.canonicalize().map_err(|e| Error::io(&e, parent, "cannot resolve the path"))?;
    Ok(owner_of(&own.join(path.file_name().unwrap_or_default()), wanted, links))
}

/// The same of what is called `file`, absolute and without links.
fn owner_of(file: &Path, wanted: Identity, links: u64) -> Option<PathBuf> {
    let mut ways = other_ways(file, wanted);
    ways.insert(0, file.to_owned());
    let near = || ways.iter().find_map(|way| above(way, wanted));
    // A file with one name has none in another folder.
    near().or_else(|| if links > 1 { in_served_folders(file, wanted) } else { None })
}

/// Looks where hard links lead, mostly: in the folders of the same file system as `file` that mounts of ours show here. Which
/// those are the table of mounts tells: another file system may not answer.
fn in_served_folders(file: &Path, wanted: Identity) -> Option<PathBuf> {
    let table = mounts::all().unwrap_or_default();
    let here = mounts::covering_in(&table, file)?.device;
    let near = |path: &Path| mounts::covering_in(&table, path).is_some_and(|mount| mount.device == here);
    let ours = table.iter().filter(|mount| mount.is_ours() && !mount.is_of_another());
    let sources: HashSet<&Path> = ours.map(|mount| &*mount.source).filter(|source| near(source)).collect();
    sources.into_iter().find_map(|source| within(source, wanted))
}

/// Looks in every folder above `file`, and in those that lie in one of them.
fn above(file: &Path, wanted: Identity) -> Option<PathBuf> {
    let here = |folder: &Path| device(folder) == Some(wanted.0);
    for around in file.ancestors().skip(1).take_while(|around| here(around)) {
        if let Some(found) = within(around, wanted) {
            return Some(found);
        }
    }
    None
}

/// Looks in `around`, and in the folders that lie in it, on the file's own file system.
fn within(around: &Path, wanted: Identity) -> Option<PathBuf> {
    if names(around, wanted) {
        return Some(around.to_owned());
    }
    // A folder that may not be listed is one whose images cannot be known either. One whose name begins with a dot is
    // no image: a crash may have left it, with a link to the file, before it got its name.
    let may_be_one = |entry: &fs::DirEntry| {
        !entry.file_name().as_encoded_bytes().starts_with(b".")
            && entry.file_type().is_ok_and(|kind| kind.is_dir())
    };
    let entries = around.read_dir().ok()?.filter_map(std::result::Result::ok);
    let mut folders = entries.filter(may_be_one).map(|entry| entry.path());
    folders.find(|folder| device(folder) == Some(wanted.0) && names(folder, wanted))
}

/// Where else the same file is seen: by other mounts of its file system, where one of them was bound.
fn other_ways(file: &Path, wanted: Identity) -> Vec<PathBuf> {
    // Without a table of mounts there is nothing to be known of them.
    let table = mounts::all().unwrap_or_default();
    let Some(here) = mounts::covering_in(&table, file) else { return Vec::new() };
    let Some(inside) = here.inside(file) else { return Vec::new() };
    let others = table.iter().filter(|mount| mount.device == here.device && mount.id != here.id);
    let seen = others.filter_map(|mount| Some(mount.point.join(inside.strip_prefix(&mount.root).ok()?)));
    seen.filter(|way| identity(way).is_some_and(|(file, _)| file == wanted)).collect()
}

/// What a regular file is, whatever it is called, and how many names it has.
fn identity(path: &Path) -> Option<(Identity, u64)> {
    let meta = path.symlink_metadata().ok().filter(fs::Metadata::is_file)?;
    Some(((meta.dev(), meta.ino()), meta.nlink()))
}

/// Refuses to change the file at `path` where it is a level of a layered image. What the image is called is part of the
/// message: it is what was meant, mostly.
///
/// For what is said before a daemon is asked, or an image opened. What decides is [`refuse_opened`]: a path may lead to
/// another file a moment later.
pub fn refuse_level(path: &Path) -> Result<()> {
    refuse(path, owner(path)?)
}

/// The same of a file that was opened where `at` says, and is locked: by what it is, and by where that folder is now.
pub fn refuse_opened(at: &Located, file: &HostStatus) -> Result<()> {
    let folder = at.folder_now()?;
    refuse(&at.shown, owner_of(&folder.join(at.name()), (file.dev, file.ino), file.links))
}

/// What a person should know before the image in the single file `path` is changed: it has other names, and where those
/// are is not known. Nothing in a file says whose level it is.
pub fn other_names(path: &Path) -> Option<String> {
    let (_, links) = identity(path).filter(|(_, links)| *links > 1)?;
    Some(format!(
        "{}: has {links} names (hard links), and all of them change with it; where another one is a level of an image in a \
         folder that is not around this one, that image is destroyed: find FOLDER -samefile {}",
        path.display(),
        quoted(path)
    ))
}

fn refuse(path: &Path, owner: Option<PathBuf>) -> Result<()> {
    let Some(folder) = owner else { return Ok(()) };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::open::OpenDisk;
    use crate::disk::work::carry_out;
    use crate::image::create::{CreatePlan, create};
    use crate::io::real::Access;
    use crate::progress::Progress;
    use crate::vdisk::Options;
    use crate::vdisk::live::Work;
    use std::os::unix::fs::symlink;

    /// The layered image `vm`, and a link to its folder that leads to one with a single file of the same name as its base.
    fn swapped() -> (tempfile::TempDir, PathBuf) {
        let temp = tempfile::tempdir().expect("a folder");
        let at = |name: &str| temp.path().join(name);
        fs::create_dir(at("other")).expect("a folder");
        for image in ["vm", "other/vm"] {
            create(&at(image), &CreatePlan::thin(8 << 20)).expect("created");
        }
        carry_out(&at("vm.hds"), &Work::Snapshot { label: None }, &Progress::new()).expect("a snapshot");
        symlink(at("other"), at("link")).expect("a link");
        (temp, PathBuf::from("link/vm.hds"))
    }

    /// A path was judged, and then opened: a link on the way that was changed in between led to a level.
    #[test]
    fn a_level_is_known_by_the_file_that_was_opened_and_not_by_its_path() {
        let (temp, named) = swapped();
        let path = temp.path().join(named);
        refuse_level(&path).expect("not yet");
        fs::remove_file(temp.path().join("link")).expect("removed");
        symlink("vm", temp.path().join("link")).expect("a link");
        let open = |access| OpenDisk::open(&path, None, access, Options::default());
        let refused = open(Access::ReadWrite).map(drop).expect_err("a level");
        assert_eq!(refused.kind(), Kind::Invalid, "{refused}");
        open(Access::ReadOnly).expect("may be read").close().expect("closes");
        // The other way round: what was opened is no level, whatever its path leads to now.
        let at = Located::of(&temp.path().join("other/vm.hds")).expect("a folder");
        let file = rustix::fs::stat(temp.path().join("other/vm.hds")).expect("there").into();
        refuse_opened(&at, &file).expect("no level");
        fs::rename(temp.path().join("other"), temp.path().join("vm/moved")).expect("moved");
        refuse_opened(&at, &file).expect("no level there either");
    }
}
