//! A layered image becomes a single raw file again, when its last snapshot is gone: what `make_folder` did is taken back.

use std::ffi::{OsStr, OsString};
use std::os::fd::BorrowedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, statat};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::format::descriptor::Descriptor;
use crate::image::kind::{self, Class, DESCRIPTOR, ImageKind};
use crate::image::labels::{LABELS_NAME, is_plain_name};
use crate::image::layers::Layers;
use crate::image::make_folder::remove_folder;
use crate::image::names;
use crate::image::store::{sync_folder, unlink};
use crate::io::file::HostStatus;
use crate::io::rename::{link, rename_new_folder};
use crate::rules::{Rule, Step, broken, step};

/// Makes the image in the folder `folder` of `images` (`path`, for messages) the file `FOLDER.raw` beside it, if it is one
/// raw file and nothing else, and returns that file's name. The caller holds the image's locks (`layers`), and the disk
/// is closed. None: it stays a folder, and the log says why where that is no matter of course.
///
/// 1. a hard link `NAME.raw` beside the folder; 2. the images folder synced; 3. the folder renamed to a dot-name, which is
///    no image; 4. the images folder synced; 5. the folder's files removed, then itself.
///
/// Before 3 the folder is the image, and wins over its own file where both are found; after it the file is. 3 before 2: a
/// power cut could keep the rename, and lose the link. 5 before 4: it could bring back a folder without its files. What a
/// crash leaves goes: before 3 the link, when a mount finds both; after it the folder, with the next mount
/// ([`names::sweep`]).
pub fn leave_folder(
    images: BorrowedFd<'_>,
    path: &Path,
    folder: &OsStr,
    layers: &Layers,
) -> Result<Option<OsString>> {
    // The file is known by what it is: its name in a folder may be another's by now.
    let Some(level) = layers.live_chain()?.pop() else { return Ok(None) };
    let held = level.file.status().map_err(|e| Error::io(&e, &level.path, "cannot look at it"))?;
    let store = layers.store();
    let Some((inner, file)) = raw_file(store.dir(), folder, store.descriptor())? else { return Ok(None) };
    let stays = |why: &str| {
        log::warn!("{}: stays a folder: {why}", path.join(folder).display());
        Ok(None)
    };
    // 1.
    match link(store.dir(), inner.as_ref(), images, file.as_ref()) {
        Ok(()) => step(Step::Names),
        // What an earlier attempt left.
        Err(Errno::EXIST) if is_held(images, &file, &held) => {}
        Err(Errno::EXIST) => return stays(&format!("{} is in the way", file.display())),
        Err(e) => return stays(&format!("cannot link its file: {}", crate::error::words(&e.into()))),
    }
    if !is_held(images, &file, &held) {
        let _ = unlink(images, &file);
        return stays(&format!("{} is another file by now", level.path.display()));
    }
    let gone = names::removed(folder);
    let renamed = || {
        // 2.
        if !broken(Rule::R8) {
            sync_folder(images, path)?;
        }
        let cannot = |e: std::io::Error| Error::io(&e, path.join(folder), "cannot put the folder away");
        remove_folder(images, &gone).map_err(cannot)?;
        // 3.
        rename_new_folder(images, folder, &gone).map_err(|e| cannot(e.into()))
    };
    if let Err(e) = renamed() {
        // Best effort: a mount that finds both takes it away.
        let _ = unlink(images, &file);
        return Err(e);
    }
    step(Step::Names);
    // Who found both before 3 does not take away what we have locked; the last other name of the file goes only if it did.
    if !is_held(images, &file, &held) {
        let back = rename_new_folder(images, &gone, folder);
        return back.map_or_else(
            |e| Err(Error::io(&e.into(), path.join(&gone), "cannot give the folder its name again")),
            |()| stays(&format!("{} was taken away meanwhile", file.display())),
        );
    }
    log::info!("{}: is a raw file again; it has no snapshots", path.join(&file).display());
    // The image is the file from here on. What fails leaves a folder that is no image.
    let finish = || {
        sync_folder(images, path)?; // 4
        let cannot = |e: std::io::Error| Error::io(&e, path.join(&gone), "cannot remove");
        remove_folder(images, &gone).map_err(cannot) // 5
    };
    finish().unwrap_or_else(|e| log::warn!("{e}; the next mount tries again"));
    Ok(Some(file))
}

/// Takes away what a crash left beside the image's folder, of its own file: a second name, from before step 3 or from the
/// last step of `make_folder`, and the folder that was put away in step 3. With them the file would count as shared with
/// another image (R9), and the name be an image of its own once the folder has another file. A mount does so when it begins.
///
/// 1. the images folder synced: the folder's own name may be as new; 2. the names removed, and that synced.
pub fn take_back(images: BorrowedFd<'_>, path: &Path, folder: &OsStr, layers: &Layers) -> Result<()> {
    let chain = layers.live_chain()?;
    let Some(base) = chain.first() else { return Ok(()) };
    let held = base.file.status().map_err(|e| Error::io(&e, &base.path, "cannot look at it"))?;
    if held.links < 2 {
        return Ok(());
    }
    let mut raw = folder.to_owned();
    raw.push(".raw");
    let is_image =
        |name: &OsStr| matches!(kind::classify(name, true, b""), Class::Image { name, .. } if name == folder);
    let names = [base.path.file_name().unwrap_or_default(), raw.as_os_str()];
    let left: Vec<_> =
        names.into_iter().filter(|name| is_image(name) && is_held(images, name, &held)).collect();
    if left.is_empty() && !names::is_left(images, folder) {
        return Ok(());
    }
    sync_folder(images, path)?; // 1
    let cannot =
        |e: std::io::Error| Error::io(&e, path.join(folder), "cannot remove what a crash left beside it");
    for name in left {
        unlink(images, name).map_err(cannot)?; // 2
    }
    names::sweep_one(images, folder).map_err(cannot)?;
    sync_folder(images, path)
}

/// True when [`leave_folder`] would find nothing in the way in the folder `dir` of an image.
pub fn may_leave(dir: BorrowedFd<'_>, folder: &OsStr, descriptor: &Descriptor) -> bool {
    raw_file(dir, folder, descriptor).is_ok_and(|found| found.is_some())
}

/// The name of the raw file in the image's folder, and the one that it would have beside it. None: it is not alone, or the
/// folder came from elsewhere.
fn raw_file(
    dir: BorrowedFd<'_>,
    folder: &OsStr,
    descriptor: &Descriptor,
) -> Result<Option<(OsString, OsString)>> {
    let Some(inner) = descriptor.lone_raw_file().filter(|file| is_plain_name(file)) else { return Ok(None) };
    let mut file = folder.to_owned();
    file.push(".raw");
    // Parallels' own folders end in .hdd, and have no labels of ours.
    let named = kind::folder_image_name(folder) == folder
        && matches!(kind::classify(&file, true, b""), Class::Image { name, kind: ImageKind::Raw } if name == folder);
    if !named || statat(dir, LABELS_NAME, AtFlags::SYMLINK_NOFOLLOW).is_err() {
        return Ok(None);
    }
    let cannot = |e: Errno| Error::io(&e.into(), Path::new(folder), "cannot read the image's folder");
    for entry in Dir::read_from(dir).map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        let name = entry.file_name().to_bytes();
        // With the locks beside them, and what a crash left of writing them.
        let ours = |of: &str| name.strip_prefix(b".").unwrap_or(name).starts_with(of.as_bytes());
        if name != b"."
            && name != b".."
            && name != inner.as_bytes()
            && !ours(DESCRIPTOR)
            && !ours(LABELS_NAME)
        {
            return Ok(None);
        }
    }
    Ok(Some((inner.into(), file)))
}

/// `name` is a name of the file that is held.
fn is_held(dir: BorrowedFd<'_>, name: &OsStr, held: &HostStatus) -> bool {
    let found = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW);
    found.is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (held.dev, held.ino))
}
