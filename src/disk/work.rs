//! Work with an image that is at rest: the live code without a transport, in this process, under the same locks
//! (docs/design.md#at-rest). What is refused is refused before anything is changed.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use crate::disk::find::is_layered;
use crate::disk::open::{OpenDisk, no_snapshot};
use crate::error::{Error, Kind, Result};
use crate::image::chain::Candidate;
use crate::image::kind::Class;
use crate::image::layers::{Direct, Layers};
use crate::image::leave_folder::{leave_folder, take_back, unmake_folder};
use crate::image::make_folder::make_folder;
use crate::image::paths::image_folder;
use crate::image::switch::switch;
use crate::io::real::Access;
use crate::progress::Progress;
use crate::sync::Arc;
use crate::vdisk::Options;
use crate::vdisk::live::{Done, Work, carry_out_before_close, judge, lower};

/// Does `work` with the image at `path`.
pub fn carry_out(path: &Path, work: &Work, progress: &Progress) -> Result<Done> {
    match work {
        _ if is_layered(path) => layered(path, work, progress),
        Work::Snapshot { .. } | Work::Clone { snapshot: None, .. } => {
            let folder = to_folder(path, work)?;
            let done = layered(&folder, work, progress);
            if done.is_err()
                && let Err(e) = to_file(&folder, path.file_name().unwrap_or_default())
            {
                log::debug!("{e}; the image stays a folder");
            }
            done
        }
        Work::Clone { snapshot: Some(name), .. }
        | Work::Delete { snapshot: name }
        | Work::Merge { snapshot: name }
        | Work::Switch { snapshot: name } => Err(no_snapshot(path, name)),
        Work::Finish => Ok(Done::default()),
        Work::Resize { .. } | Work::Compact { .. } | Work::Track { .. } | Work::Untrack => {
            opened(path, work, progress)
        }
    }
}

fn layered(folder: &Path, work: &Work, progress: &Progress) -> Result<Done> {
    if let Work::Switch { snapshot } = work {
        let opener = Arc::new(Direct(Access::Widest));
        let (layers, chain) = Layers::open(image_folder(folder)?, folder, opener, false)?;
        let guid = layers.store().find_snapshot(snapshot)?;
        drop(chain);
        return switch(&layers, guid).map(|()| Done::default());
    }
    opened(folder, work, progress)
}

/// Order: (1) the locks, and the image; (2) the work; (3) the close, which makes it durable and clears the mark, also after
/// work that failed; (4) of a layered image, what is done best while it is closed; (5) the locks' end.
fn opened(path: &Path, work: &Work, progress: &Progress) -> Result<Done> {
    let access = if work.only_looks() { Access::ReadOnly } else { Access::ReadWrite };
    let opened = OpenDisk::open(path, None, access, Options::default())?;
    if opened.layers.as_ref().is_some_and(|layers| !layers.writable()) && changes_top(work) {
        let what =
            "cannot be written here: its disk's own file, or the file system on which it lies, is read-only";
        return Err(Error::at(Kind::ReadOnly, path, what));
    }
    if let Some(layers) = opened.layers.as_ref().filter(|_| !work.only_looks()) {
        in_its_place(path, |images, parent, name| take_back(images, parent, name, layers))?;
    }
    let writable = if work.only_looks() { Ok(()) } else { opened.image.make_writable() };
    let result =
        writable.and_then(|()| carry_out_before_close(&opened.image, opened.layers.as_ref(), work, progress));
    let layers = opened.layers.clone();
    let closed = opened.close();
    // A clone that failed has deleted the snapshot that was taken for it.
    let merges = match work {
        Work::Delete { .. } | Work::Merge { .. } | Work::Finish => result.is_ok(),
        Work::Clone { .. } => true,
        _ => false,
    };
    let rest = match layers {
        Some(layers) if merges && closed.is_ok() => finish_closed(path, layers, progress),
        _ => Ok(()),
    };
    result.and_then(|done| closed.and(rest).map(|()| done))
}

/// The file of the live disk itself is written. What else is done is a matter of other files, too: those say so.
fn changes_top(work: &Work) -> bool {
    !work.only_looks()
        && matches!(work, Work::Resize { .. } | Work::Compact { .. } | Work::Track { .. } | Work::Untrack)
}

/// Merges a deleted raw base with the live disk, which is closed; a disk without snapshots is one raw file again.
fn finish_closed(folder: &Path, layers: Arc<Layers>, progress: &Progress) -> Result<()> {
    if !lower::finish(&layers, progress, &|| true)? {
        // The work itself has written what makes the other way the shorter one.
        drop(layers);
        return opened(folder, &Work::Finish, progress).map(drop);
    }
    in_its_place(folder, |images, parent, name| leave_folder(images, parent, name, &layers).map(drop))
}

/// Does `act` with the folder around the image's `folder`, its path, and the folder's name in it.
fn in_its_place(folder: &Path, act: impl FnOnce(BorrowedFd<'_>, &Path, &OsStr) -> Result<()>) -> Result<()> {
    let resolved = folder.canonicalize().map_err(|e| Error::io(&e, folder, "cannot resolve the path"))?;
    let (Some(parent), Some(name)) = (resolved.parent(), resolved.file_name()) else { return Ok(()) };
    let images = image_folder(parent)?;
    act(images.as_fd(), parent, name)
}

/// Makes the image in `folder` the single file `file` again, for which nothing was done after all. It stays a folder where
/// anything came of it.
pub fn to_file(folder: &Path, file: &OsStr) -> Result<()> {
    let opener = Arc::new(Direct(Access::ReadWrite));
    let (layers, chain) = Layers::open(image_folder(folder)?, folder, opener, false)?;
    drop(chain);
    let _alone = layers.begin_operation()?;
    in_its_place(folder, |images, parent, name| unmake_folder(images, parent, name, &layers, file).map(drop))
}

/// Makes a single file a folder for `work`, under the file's lock. The lock ends with this step: the next user takes
/// the folder's, and reads everything anew.
///
/// 1. the image is opened, and its map looked through, as for a first write; 2. the work is judged; 3. it becomes a folder.
///
/// 3 before 1 or 2, and a refusal would leave another image than it found.
fn to_folder(path: &Path, work: &Work) -> Result<PathBuf> {
    let Class::Image { name, .. } = Candidate::open(path)?.class() else {
        return Err(Error::at(Kind::Unsupported, path, "not an image"));
    };
    let file = path.file_name().ok_or_else(|| Error::at(Kind::Invalid, path, "ends in no name"))?;
    let opened = OpenDisk::open(path, None, Access::ReadWrite, Options::default())?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // The folder where it was found, and not where its path leads by now.
    let at =
        opened.place().ok_or_else(|| Error::at(Kind::Busy, path, "became a folder meanwhile; try again"))?;
    let (folder, held) = (at.around()?, opened.image.host_status());
    let held = held.map_err(|e| Error::io(&e, path, "cannot look at it"))?;
    let made = opened
        .image
        .make_writable() // 1
        .and_then(|()| judge(&opened.image, None, work)) // 2
        .and_then(|()| make_folder(folder.as_fd(), parent, file, Some((held.dev, held.ino)))); // 3
    opened.close()?;
    made.map(|_| path.with_file_name(name))
}
