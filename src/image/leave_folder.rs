//! A layered image becomes a single raw file again, when its last snapshot is gone: what `make_folder` did is taken back.

use std::ffi::{OsStr, OsString};
use std::os::fd::BorrowedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, statat};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::format::descriptor::Descriptor;
use crate::image::folder_files::{sync_folder, unlink};
use crate::image::kind::{self, Class, DESCRIPTOR, ImageKind};
use crate::image::labels::{LABELS_NAME, is_plain_name};
use crate::image::layers::Layers;
use crate::image::make_folder::remove_folder;
use crate::image::names;
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
    let store = layers.store();
    let Some((inner, file)) = raw_file(store.dir(), folder, store.descriptor())? else { return Ok(None) };
    drop(store);
    leave(images, path, folder, layers, (inner, file))
}

/// Takes back what `make_folder` did with `file` for work that then failed, by the same steps: where nothing came of it, the
/// image is that file again, and not a folder that a full host was left with. False: it has another form by now. The caller
/// holds the image's locks, and keeps other operations off.
pub fn unmake_folder(
    images: BorrowedFd<'_>,
    path: &Path,
    folder: &OsStr,
    layers: &Layers,
    file: &OsStr,
) -> Result<bool> {
    let is_raw = matches!(kind::classify(file, true, b""), Class::Image { kind: ImageKind::Raw, .. });
    let store = layers.store();
    let inner = store.descriptor().lone_file(is_raw).filter(|inner| is_plain_name(inner)).map(OsString::from);
    let Some(inner) = inner.filter(|inner| holds_only(store.dir(), folder, inner).unwrap_or(false)) else {
        return Ok(false);
    };
    drop(store);
    leave(images, path, folder, layers, (inner, file.to_owned())).map(|left| left.is_some())
}

/// The steps of [`leave_folder`], of the file `inner` in the folder, which is to be `file` beside it.
fn leave(
    images: BorrowedFd<'_>,
    path: &Path,
    folder: &OsStr,
    layers: &Layers,
    (inner, file): (OsString, OsString),
) -> Result<Option<OsString>> {
    // The file is known by what it is: its name in a folder may be another's by now.
    let Some(level) = layers.live_chain()?.pop() else { return Ok(None) };
    let held = level.file.status().map_err(|e| Error::io(&e, &level.path, "cannot look at it"))?;
    let store = layers.store();
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
    log::info!("{}: is one file again; it has no snapshots", path.join(&file).display());
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
    let alone = holds_only(dir, folder, inner.as_ref())?;
    Ok(alone.then(|| (inner.into(), file)))
}

/// True where the image's folder `dir` (`folder`, for messages) has no file but `inner` and our own.
fn holds_only(dir: BorrowedFd<'_>, folder: &OsStr, inner: &OsStr) -> Result<bool> {
    let cannot = |e: Errno| Error::io(&e.into(), Path::new(folder), "cannot read the image's folder");
    for entry in Dir::read_from(dir).map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        let name = entry.file_name().to_bytes();
        // With the locks beside them, and what a crash left of writing them.
        let ours = |of: &str| name.strip_prefix(b".").unwrap_or(name).starts_with(of.as_bytes());
        if name != b"."
            && name != b".."
            && name != inner.as_encoded_bytes()
            && !ours(DESCRIPTOR)
            && !ours(LABELS_NAME)
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// `name` is a name of the file that is held.
fn is_held(dir: BorrowedFd<'_>, name: &OsStr, held: &HostStatus) -> bool {
    let found = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW);
    found.is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (held.dev, held.ino))
}
