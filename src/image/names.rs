//! An image's name in the images folder: giving it another one, and taking the image away (R8).

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Kind, Result};
use crate::image::create;
use crate::image::folder_files::{sync_folder, unlink};
use crate::image::kind::{self, Class, DESCRIPTOR};
use crate::image::labels::LABELS_NAME;
use crate::image::make_folder::{remove_abandoned, remove_folder};
use crate::image::paths;
use crate::image::store::Store;
use crate::io::new_file;
use crate::io::rename::{rename_new_file, rename_new_folder, rename_over};
use crate::rules::{Rule, Step, broken, step};

/// Behind the dot-name of a layered image's folder that is being removed.
const REMOVED: &[u8] = b".removed";
/// Behind the dot-name of a folder in which an image is being made.
const BEING_MADE: &[u8] = b".new";
/// Endings that say what a file is: a new name must not change that.
const TELLING: [&[u8]; 3] = [b".hds", b".raw", b".hdd"];

/// The file that a thin image `name` is created in; refuses names that no image can have, or that are taken.
pub fn file_of_new(images: &Path, name: &OsStr) -> Result<OsString> {
    let mut file = name.to_owned();
    file.push(".hds");
    let shown = images.join(name);
    let class = kind::classify(&file, true, b"");
    let is_itself = matches!(&class, Class::Image { name: shown, .. } if shown == name);
    if name.is_empty() || !is_itself || name.as_bytes().ends_with(b".hdd") {
        let why = match class {
            Class::NotAnImage { reason } => format!("no image can have this name: {reason}"),
            Class::Image { .. } => "no image can have this name".into(),
        };
        return Err(Error::at(Kind::Invalid, shown, why));
    }
    if let Some(taken) = create::taken_by(&images.join(&file))? {
        return Err(Error::at(Kind::Exists, taken, "has this name already, and no image is ever replaced"));
    }
    Ok(file)
}

/// Gives the image `name`, which lies in the file or folder `file` of `images` (`path`, for messages), the name `new`,
/// which is free. The caller holds its locks.
///
/// 1. renamed without replacing anything; 2. the images folder synced. A crash leaves the old name or the new one.
pub fn rename(images: BorrowedFd<'_>, path: &Path, file: &OsStr, name: &OsStr, new: &OsStr) -> Result<()> {
    file_of_new(path, new)?;
    let shown = path.join(file);
    let Some(suffix) = file.as_bytes().strip_prefix(name.as_bytes()) else {
        return Err(Error::at(
            Kind::Unsupported,
            shown,
            "is not named after its image; rename it in the images folder",
        ));
    };
    if suffix.is_empty() && TELLING.iter().any(|telling| new.as_bytes().ends_with(telling)) {
        return Err(Error::at(Kind::Invalid, shown, "would be taken for something else under this name"));
    }
    let to = OsString::from_vec([new.as_bytes(), suffix].concat());
    let is_folder = is_folder(images, file, &shown)?;
    if is_folder && names_itself(images, file, &shown)? {
        let why = "its descriptor names files by a path through the folder's own name; rename it by hand";
        return Err(Error::at(Kind::Unsupported, shown, why));
    }
    let renamed = match is_folder {
        true => rename_new_folder(images, file, &to),
        false => rename_new_file(images, file, &to),
    }; // 1
    renamed.map_err(|e| match e {
        Errno::EXIST | Errno::NOTEMPTY => Error::at(Kind::Exists, path.join(&to), "is in the way"),
        e => Error::io(&e.into(), &shown, "cannot rename"),
    })?;
    step(Step::Names);
    sync_folder(images, path) // 2
}

/// Removes the image in the file or folder `file` of `images`. The caller holds its locks.
///
/// A file: 1. unlinked; 2. the images folder synced. A folder:
/// 1. renamed to a dot-name, which is no image; 2. the images folder synced: the image is gone for good; 3. its files
///    removed, then itself.
///
/// 3 before 2: a power cut could leave the image's name on a folder without some of its files. What a crash leaves after
/// 2 goes with the next mount ([`sweep`]).
pub fn remove(images: BorrowedFd<'_>, path: &Path, file: &OsStr) -> Result<()> {
    let shown = path.join(file);
    let cannot = |e: std::io::Error| Error::io(&e, &shown, "cannot remove");
    if !is_folder(images, file, &shown)? {
        unlink(images, file).map_err(cannot)?;
        return sync_folder(images, path);
    }
    let strangers = strangers(images, file, &shown)?;
    if let Some(stranger) = strangers.first() {
        let why = format!(
            "holds {} other files or folders, such as {}; remove them, or the whole folder, by hand",
            strangers.len(),
            stranger.display()
        );
        return Err(Error::at(Kind::Busy, shown, why));
    }
    let gone = removed(file);
    remove_folder(images, &gone).map_err(cannot)?;
    rename_over(images, file, &gone).map_err(|e| cannot(e.into()))?; // 1
    step(Step::Names);
    if !broken(Rule::R8) {
        sync_folder(images, path)?; // 2
    }
    remove_folder(images, &gone).map_err(cannot) // 3
}

/// The dot-name of an image's folder that is being removed.
pub(super) fn removed(folder: &OsStr) -> OsString {
    OsString::from_vec([b".", folder.as_bytes(), REMOVED].concat())
}

/// Removes what a crash left: of a removed image, a folder of that dot-name with a descriptor in it, or empty; of one that
/// was being made, a folder of that dot-name with an image's files alone. Others are not ours. The latter takes space,
/// and may hold hard links, by which another image's files would count as shared for ever (R9). Likewise of single files.
pub fn sweep(images: BorrowedFd<'_>, path: &Path) {
    new_file::sweep(images, path);
    let Ok(entries) = Dir::read_from(images) else { return };
    for entry in entries.flatten() {
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        let Some(inner) = name.as_bytes().strip_prefix(b".") else { continue };
        let (removed, of) = if inner.ends_with(REMOVED) && was_an_image(images, name) {
            (remove_folder(images, name).map(|()| true), "a removed image")
        } else if let Some(image) = inner.strip_suffix(BEING_MADE)
            && is_folder(images, name, path).unwrap_or(false)
        {
            let abandoned = remove_abandoned(images, name, OsStr::from_bytes(image));
            (abandoned, "an image that was not made to the end")
        } else {
            continue;
        };
        match removed {
            Ok(true) => log::info!("{}: removed; it was left of {of}", path.join(name).display()),
            Ok(false) => {}
            Err(e) => log::warn!("{}: cannot remove what is left of {of}: {e}", path.join(name).display()),
        }
    }
}

/// True when a crash left something of a folder of the name `folder` that was being removed.
pub(super) fn is_left(images: BorrowedFd<'_>, folder: &OsStr) -> bool {
    was_an_image(images, &removed(folder))
}

/// Removes that.
pub(super) fn sweep_one(images: BorrowedFd<'_>, folder: &OsStr) -> std::io::Result<()> {
    if is_left(images, folder) { remove_folder(images, &removed(folder)) } else { Ok(()) }
}

fn was_an_image(images: BorrowedFd<'_>, name: &OsStr) -> bool {
    let Ok(folder) = open_folder(images, name, Path::new(name)) else { return false };
    let described = rustix::fs::statat(&folder, DESCRIPTOR, AtFlags::SYMLINK_NOFOLLOW).is_ok();
    // "." and ".." are all that an empty one has.
    described || Dir::read_from(&folder).is_ok_and(|entries| entries.flatten().count() <= 2)
}

/// The layered image in the folder `other` that names a delta which `file` is or holds (R9); None: it names none.
/// By name and not by content: a clone's hard link lives on without this name.
pub fn names_a_part(images: BorrowedFd<'_>, path: &Path, other: &OsStr, file: &OsStr) -> Result<bool> {
    let shown = path.join(other);
    let dir = open_folder(images, other, &shown)?;
    let (descriptor, _) = Store::read(dir.as_fd(), &shown)?;
    let cannot = |e: Errno| Error::io(&e.into(), &shown, "cannot look at it");
    let identity = |dir: BorrowedFd<'_>| rustix::fs::fstat(dir).map(|stat| (stat.st_dev, stat.st_ino));
    let home = identity(images).map_err(cannot)?;
    let own = open_folder(images, file, &shown).ok().map(|own| identity(own.as_fd()));
    let own = own.transpose().map_err(cannot)?;
    for delta in &descriptor.deltas {
        let text = Path::new(&delta.file);
        let (folder, name) = match paths::resolve(dir.as_fd(), text, &shown, true) {
            Ok(found) => found,
            // Only for the moment.
            Err(e) if e.is_passing() => return Err(e),
            // What cannot be found is part of no image.
            Err(_) => continue,
        };
        let folder = identity(folder.as_fd()).map_err(cannot)?;
        if Some(folder) == own || folder == home && name == file {
            return Ok(true);
        }
    }
    Ok(false)
}

/// True when the descriptor in the folder `file` would not find its files under another name of the folder.
fn names_itself(images: BorrowedFd<'_>, file: &OsStr, shown: &Path) -> Result<bool> {
    let (descriptor, _) = Store::read(open_folder(images, file, shown)?.as_fd(), shown)?;
    let through = |text: &str| {
        let text = Path::new(text);
        text.is_absolute() || text.components().any(|part| part == Component::Normal(file))
    };
    // The last part is the delta's own name.
    Ok(descriptor.deltas.iter().filter_map(|d| Path::new(&d.file).parent()?.to_str()).any(through))
}

fn open_folder(images: BorrowedFd<'_>, name: &OsStr, shown: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(images, name, flags, Mode::empty())
        .map_err(|e| Error::io(&e.into(), shown, "cannot open the image's folder"))
}

fn is_folder(images: BorrowedFd<'_>, file: &OsStr, shown: &Path) -> Result<bool> {
    let stat = rustix::fs::statat(images, file, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| Error::io(&e.into(), shown, "cannot look at it"))?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// What lies in an image's folder and is not the image's.
fn strangers(images: BorrowedFd<'_>, file: &OsStr, shown: &Path) -> Result<Vec<OsString>> {
    let dir = open_folder(images, file, shown)?;
    let (descriptor, _) = Store::read(dir.as_fd(), shown)?;
    let cannot = |e: Errno| Error::io(&e.into(), shown, "cannot read the image's folder");
    let mut strangers = Vec::new();
    for entry in Dir::read_from(&dir).map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        let bytes = name.as_bytes();
        if bytes == b"." || bytes == b".." {
            continue;
        }
        // The descriptor's own temporary and lock files begin with its name.
        let ours = bytes.starts_with(DESCRIPTOR.as_bytes())
            || bytes.starts_with(LABELS_NAME.as_bytes())
            || bytes.starts_with(b".")
            || descriptor.deltas.iter().any(|delta| Path::new(&delta.file).file_name() == Some(name));
        if !ours || is_folder(dir.as_fd(), name, &shown.join(name))? {
            strangers.push(name.to_owned());
        }
    }
    Ok(strangers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::create::{CreatePlan, create};
    use std::fs::{self, File};

    fn images() -> (tempfile::TempDir, File) {
        let folder = tempfile::tempdir().expect("a folder");
        create(&folder.path().join("vm1"), &CreatePlan::thin(1 << 20)).expect("an image");
        let dir = File::open(folder.path()).expect("opens");
        (folder, dir)
    }

    #[test]
    fn a_renamed_file_keeps_its_ending_and_replaces_nothing() {
        let (folder, dir) = images();
        let path = folder.path();
        create(&path.join("vm2"), &CreatePlan::thin(1 << 20)).expect("another");
        let to = |new: &str| rename(dir.as_fd(), path, "vm1.hds".as_ref(), "vm1".as_ref(), new.as_ref());
        assert_eq!(to("vm2").expect_err("taken").kind(), Kind::Exists);
        assert_eq!(to(".x").expect_err("no name").kind(), Kind::Invalid);
        assert_eq!(to("a.hdd").expect_err("no name").kind(), Kind::Invalid);
        to("vm3").expect("renamed");
        assert!(path.join("vm3.hds").exists() && !path.join("vm1.hds").exists());
    }

    #[test]
    fn what_a_crash_left_of_a_removal_goes_with_the_next_mount() {
        let (folder, dir) = images();
        let left = folder.path().join(".vm9.removed");
        fs::create_dir(&left).expect("a folder");
        fs::write(left.join("vm9.hds"), "x").expect("a file");
        fs::write(left.join(DESCRIPTOR), "x").expect("a file");
        let stranger = folder.path().join(".notes.removed");
        fs::create_dir(&stranger).expect("a folder");
        fs::write(stranger.join("letter"), "x").expect("a file");
        sweep(dir.as_fd(), folder.path());
        assert!(!left.exists() && folder.path().join("vm1.hds").exists());
        assert!(stranger.join("letter").exists(), "not ours");
    }

    /// Review F21: a killed clone left its folder, whose hard links kept the origin's snapshots from being merged.
    #[test]
    fn what_a_crash_left_of_a_clone_goes_with_the_next_mount_unless_somebody_builds_there() {
        let (folder, dir) = images();
        let made = |name: &str, files: &[&str]| {
            let left = folder.path().join(name);
            fs::create_dir(&left).expect("a folder");
            files.iter().for_each(|file| fs::write(left.join(file), "x").expect("a file"));
            left
        };
        let left = made(".vm9.new", &["vm9.hds", "vm9.hds.{1}", DESCRIPTOR, ".ploopfs.json.new"]);
        let building = made(".vm8.new", &["vm8.hds"]);
        let strangers = [made(".letters.new", &["letters.txt", "answer"]), made(".vm7.new", &[])];
        fs::create_dir(strangers[1].join("vm7.hds")).expect("a folder");
        fs::write(folder.path().join(".vm6.new"), "x").expect("a file");
        let maker = File::open(&building).expect("opens");
        rustix::fs::flock(&maker, rustix::fs::FlockOperation::LockExclusive).expect("locked");
        sweep(dir.as_fd(), folder.path());
        assert!(!left.exists() && folder.path().join("vm1.hds").exists());
        assert!(building.join("vm8.hds").exists(), "a process builds in it");
        assert!(strangers.iter().all(|folder| folder.exists()) && folder.path().join(".vm6.new").exists());
        drop(maker);
        sweep(dir.as_fd(), folder.path());
        assert!(!building.exists(), "its maker is gone");
    }
}
