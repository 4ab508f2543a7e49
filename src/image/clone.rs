//! A new image with the content of a snapshot. Where the host can, it shares extents with the old one and no file.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};

use crate::error::{Error, Kind, Result};
use crate::format::descriptor::{Descriptor, Guid};
use crate::image::create;
use crate::image::folder_files::{make, own, sync_folder, write_beside, write_new};
use crate::image::kind::DESCRIPTOR;
use crate::image::labels::{LABELS_NAME, Labels};
use crate::image::layers::Layers;
use crate::image::level::{Layout, Level};
use crate::image::levels::{disk_size, header_above};
use crate::image::make_folder::{new_folder, remove_opened};
use crate::image::new_delta::{create_delta, create_unsynced, new_delta_name};
use crate::io::file::{HostFile, read_full};
use crate::io::foreign::mount_id;
use crate::io::real::RealFile;
use crate::io::rename::{link, rename_new_folder};
use crate::io::whole;
use crate::progress::Progress;
use crate::rules::{Rule, Step, broken, step};

/// Bytes copied between two looks at `progress`.
const PIECE: usize = 1 << 20;

/// How many images one call makes. Each keeps its folder open while it is made, and a command may have 1,024 descriptors, of
/// which a chain takes up to 250; with paths of 200 bytes their names fit into a request of the control socket.
pub const MOST: usize = 256;

/// Where a new image is to lie.
#[derive(Debug)]
pub struct Destination {
    /// Its name.
    pub name: String,
    /// The folder around it, opened.
    pub around: File,
    /// The same, as it was named.
    pub parent: PathBuf,
}

impl Destination {
    /// Refuses a name that cannot be, that its descriptor could not hold, or that is taken.
    pub fn of(to: &Path) -> Result<Destination> {
        let Destinations { mut names, around, parent } = Destinations::of(&[to.to_owned()])?;
        Ok(Destination { name: names.pop().unwrap_or_default(), around, parent })
    }
}

/// Where new images are to lie: side by side.
#[derive(Debug)]
pub struct Destinations {
    /// Their names.
    pub names: Vec<String>,
    /// The folder around them, opened.
    pub around: File,
    /// The same, as it was named.
    pub parent: PathBuf,
}

impl Destinations {
    /// The same for several, each as if the others were there already.
    pub fn of(to: &[PathBuf]) -> Result<Destinations> {
        let invalid = |to: &Path, why: String| Err(Error::at(Kind::Invalid, to, why));
        let Some(first) = to.first() else { return Err(Error::new(Kind::Invalid, "no new image is named")) };
        if to.len() > MOST {
            let why = format!(
                "is the first of {} new images, and one command makes {MOST} at most; make the others, of the same \
                 snapshot, with a second one",
                to.len()
            );
            return invalid(first, why);
        }
        let (mut names, mut shown) = (Vec::with_capacity(to.len()), HashSet::new());
        for to in to {
            if folder_of(to) != folder_of(first) {
                let why = format!(
                    "does not lie beside {}; one command makes images in one folder",
                    first.display()
                );
                return invalid(to, why);
            }
            names.push(name_of(to)?);
            if !shown.insert(create::shown_name(to)?) {
                return invalid(to, "is named twice; nothing was made".into());
            }
        }
        let parent = folder_of(first).to_owned();
        let around = File::open(&parent).map_err(|e| Error::io(&e, &parent, "cannot open the folder"))?;
        Ok(Destinations { names, around, parent })
    }
}

fn folder_of(to: &Path) -> &Path {
    to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn name_of(to: &Path) -> Result<String> {
    if let Some(taken) = create::taken_by(to)? {
        let why = "there is an image of this name already; choose another";
        return Err(Error::at(Kind::Exists, taken, why));
    }
    let name = to.file_name().ok_or_else(|| Error::at(Kind::Invalid, to, "ends in no name"))?;
    let name = name.to_str().ok_or_else(|| Error::at(Kind::Invalid, to, "must be UTF-8"))?.to_owned();
    let described = Descriptor::new(0, 1, &name, false).written();
    described
        .map_err(|bad| Error::at(Kind::Invalid, to, format!("is no name for a layered image: {bad}")))?;
    Ok(name)
}

/// False where a file in the folder `around` can neither share extents with `source` nor be a link to it. On one file
/// system a link is taken for possible; on another, a file without a name shows whether extents are shared.
pub fn shares(source: &dyn HostFile, around: &File) -> io::Result<bool> {
    let there = rustix::fs::fstat(around)?;
    // overlayfs gives its files the device of the layer they lie in: there the mount is the same.
    let mount = source.descriptor().and_then(|fd| mount_id(&fd).ok());
    if source.status()?.dev == there.st_dev || mount.is_some() && mount == mount_id(around).ok() {
        return Ok(true);
    }
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let trial = retry_on_intr(|| rustix::fs::openat(around, ".", flags, Mode::RUSR | Mode::WUSR));
    match (trial, source.descriptor()) {
        (Ok(trial), Some(source)) => Ok(retry_on_intr(|| rustix::fs::ioctl_ficlone(&trial, source)).is_ok()),
        // A host without such files: the clone itself will show.
        (Err(_), _) => Ok(true),
        (_, None) => Ok(false),
    }
}

/// What is left of a clone, or of several, that did not come to its end.
#[derive(Debug)]
pub struct Unmade {
    /// So many, the first of those that were asked for, are there all the same, each whole.
    pub made: usize,
    /// Why the others are not.
    pub error: Error,
}

/// Makes the folders `to`, side by side, images with the content of the snapshot `guid`, which must not be changed or merged
/// meanwhile. Each delta shares its extents with the old one (FICLONE); else it is a hard link, and neither image
/// may change it from then on (R9: its link count says so); else, if `copy`, it is copied; else the whole is refused.
///
/// 1. of each `.NAME.new/` with the deltas; 2. the new top; 3. labels, then the descriptor; 4. all of that synced: for one
///    image as it is made, and then its folder; for several at once, with all that the file system holds, where that is as
///    good; 5. each renamed to `NAME`, which must be free; 6. the folder around them synced. Until 5 there is no image: a
///    crash leaves dot-folders, which go with the next attempt or the next mount. 5 before 4: a power cut could leave an
///    image without a file.
///
/// Before 5 an error, or a cancel, leaves none. In 5 it leaves those that have their names: they are whole, and may be in use
/// by then.
pub fn clone(
    layers: &Layers,
    guid: Guid,
    to: &[PathBuf],
    copy: bool,
    progress: &Progress,
) -> std::result::Result<(), Unmade> {
    let none = |error| Unmade { made: 0, error };
    let Destinations { names, around, parent } = Destinations::of(to).map_err(none)?;
    let several = names.len() > 1;
    let cannot = |e: io::Error| Error::io(&e, &parent, "cannot look at the folder");
    let at_once = several && whole::can_sync(&around).map_err(cannot).map_err(none)?;
    let source = Source::of(layers, guid).map_err(none)?;
    let bytes = source.levels.iter().map(size).sum::<u64>();
    progress.set_total(if copy || several { bytes.saturating_mul(names.len() as u64) } else { 0 });
    let mut made = Vec::with_capacity(names.len());
    // 1. to 3.
    let built = names.iter().try_for_each(|name| {
        progress.check()?;
        let path = parent.join(format!(".{name}.new"));
        let folder = new_folder(around.as_fd(), path.file_name().unwrap_or_default(), &path)?;
        made.push(NewFolder { folder, path, name });
        let NewFolder { folder, path, .. } = &made[made.len() - 1];
        let new = NewImage { dir: folder.as_fd(), path, name, copy, at_once, progress };
        new.fill(layers, &source)?;
        if at_once { Ok(()) } else { sync_folder(folder.as_fd(), path) } // 4.
    });
    // 4.
    let synced = built.and_then(|()| if at_once { sync_host(&around, &parent, &source) } else { Ok(()) });
    // 5.
    let mut named = 0;
    let finished = synced.and_then(|()| {
        progress.check()?;
        made.iter().try_for_each(|new| {
            new.rename(around.as_fd(), &parent)?;
            named += 1;
            Ok(())
        })
    });
    for new in &made[named..] {
        // Best effort; a dot-folder is never taken for an image.
        let building = new.path.file_name().unwrap_or_default();
        let _ = remove_opened(around.as_fd(), building, new.folder.as_fd());
    }
    // 6. Of an error in 5, too: those that are named are said to be there.
    let durable = if named > 0 { sync_folder(around.as_fd(), &parent) } else { Ok(()) };
    finished.and(durable).map_err(|error| Unmade { made: named, error: error_of(&error, named, to) })
}

/// What is there, with the reason why not all is.
fn error_of(error: &Error, made: usize, to: &[PathBuf]) -> Error {
    let all = to.len();
    match (made, to.first(), made.checked_sub(1).and_then(|last| to.get(last))) {
        _ if all == 1 => error.clone(),
        (2.., Some(first), Some(last)) => error.and(format!(
            "{made} of {all} images are made, and stay: {} to {}",
            first.display(),
            last.display()
        )),
        (1, Some(first), _) => {
            error.and(format!("1 of {all} images is made, and stays: {}", first.display()))
        }
        _ => error.and(format!("none of {all} images was made")),
    }
}

/// Makes what was filled durable, with all else that the file system holds.
fn sync_host(around: &File, parent: &Path, source: &Source) -> Result<()> {
    for level in &source.levels {
        // A hard link: its content was never synced by us if another program wrote it, and an error may be as old as that.
        level.file.sync_all().map_err(|e| Error::io(&e, &level.path, "cannot sync it"))?;
    }
    if !broken(Rule::R8) {
        whole::sync(around).map_err(|e| Error::io(&e, parent, "cannot sync the file system"))?;
        step(Step::HostSynced);
    }
    Ok(())
}

/// The folder of an image that has no name yet.
struct NewFolder<'a> {
    folder: OwnedFd,
    path: PathBuf,
    name: &'a str,
}

impl NewFolder<'_> {
    /// Gives the image its name.
    fn rename(&self, around: BorrowedFd<'_>, parent: &Path) -> Result<()> {
        let to = parent.join(self.name);
        let building = self.path.file_name().unwrap_or_default();
        rename_new_folder(around, building, self.name.as_ref()).map_err(|e| match e {
            Errno::EXIST | Errno::NOTEMPTY => Error::at(Kind::Exists, &to, "has just been made by another"),
            e => Error::io(&e.into(), &to, "cannot give the image its name"),
        })?;
        step(Step::Names);
        Ok(())
    }
}

/// What is cloned.
struct Source {
    guid: Guid,
    descriptor: Descriptor,
    labels: Labels,
    /// The base first.
    levels: Vec<Level>,
}

impl Source {
    fn of(layers: &Layers, guid: Guid) -> Result<Source> {
        let (descriptor, labels) = {
            let store = layers.store();
            (store.descriptor().clone(), store.labels().clone())
        };
        Ok(Source { guid, descriptor, labels, levels: layers.chain(guid)? })
    }
}

impl Layers {
    /// Copies a frozen delta into a new file of the image's folder; durable, noted, and not yet named by the descriptor.
    pub fn copy(&self, guid: Guid, progress: &Progress) -> Result<String> {
        let level = self.level_of(guid)?;
        let (dir, path, file) = {
            let mut store = self.store();
            let file = new_delta_name(store.descriptor());
            store.note(&[&file])?;
            let dir = store.dir().try_clone_to_owned();
            let dir = dir.map_err(|e| Error::io(&e, store.path(), "cannot open the folder"))?;
            (dir, store.path().to_owned(), file)
        };
        let new = NewImage { dir: dir.as_fd(), path: &path, name: "", copy: true, at_once: false, progress };
        match new.copy(&level, &file).and_then(|()| sync_folder(dir.as_fd(), &path)) {
            Ok(()) => Ok(file),
            Err(error) => {
                // Best effort: noted, it goes at the next open at the latest.
                let _ = self.remove(&file);
                Err(error)
            }
        }
    }
}

struct NewImage<'a> {
    dir: BorrowedFd<'a>,
    path: &'a Path,
    name: &'a str,
    copy: bool,
    /// Nothing of it is synced by itself.
    at_once: bool,
    progress: &'a Progress,
}

impl NewImage<'_> {
    fn fill(&self, layers: &Layers, source: &Source) -> Result<()> {
        let Source { guid, descriptor, labels, levels } = source;
        let bad =
            |bad: crate::format::descriptor::BadXml| Error::at(Kind::Invalid, self.path, bad.to_string());
        let disk = disk_size(levels, descriptor);
        // 1. Names of their own, so that two deltas from two folders cannot meet.
        let chain = descriptor.chain(*guid).map_err(bad)?;
        let base = match levels.first().map(|level| &level.layout) {
            Some(Layout::Plain { .. }) => format!("{}.raw", self.name),
            _ => format!("{}.hds", self.name),
        };
        let new_name = || format!("{}.hds.{}", self.name, Guid::random());
        let top = new_name();
        let mut next = descriptor.clone_of(*guid, &top).map_err(bad)?;
        next.set_size(disk.div_ceil(512));
        for (index, (guid, level)) in chain.iter().zip(levels).enumerate() {
            let file = if index == 0 { base.clone() } else { new_name() };
            self.take(layers, descriptor, *guid, level, &file)?;
            next.set_file(*guid, &file).map_err(bad)?;
        }
        // 2.
        let header = header_above(levels, descriptor, disk)?;
        let last = levels.last().ok_or_else(|| Error::at(Kind::Damaged, self.path, "an empty chain"))?;
        let like = last.file.status().map_err(|e| Error::io(&e, &last.path, "cannot look at it"))?;
        match self.at_once {
            true => drop(create_unsynced(self.dir, self.path, &top, &header, &like)?),
            false => drop(create_delta(self.dir, self.path, &top, &header, &like)?),
        }
        // 3.
        let mut kept = Labels::default();
        for guid in &chain {
            kept.set(*guid, labels.label(*guid).map(str::to_owned));
            kept.set_taken(*guid, labels.taken(*guid));
            kept.set_length(*guid, labels.length(*guid));
        }
        let write = if self.at_once { write_new } else { write_beside };
        write(self.dir, self.path, LABELS_NAME, &kept.to_bytes())?;
        write(self.dir, self.path, DESCRIPTOR, &next.written().map_err(bad)?)
    }

    /// Brings one frozen delta into the new folder as `file`.
    fn take(&self, layers: &Layers, from: &Descriptor, guid: Guid, level: &Level, file: &str) -> Result<()> {
        self.progress.check()?;
        let shown = self.path.join(file);
        let cannot = |e: io::Error| Error::io(&e, &shown, "cannot make the clone's file");
        let like = level.file.status().map_err(|e| Error::io(&e, &level.path, "cannot look at it"))?;
        let target = make(self.dir, file, like.mode).map_err(cannot)?;
        let shared = match level.file.descriptor() {
            Some(source) => retry_on_intr(|| rustix::fs::ioctl_ficlone(&target, source)),
            None => Err(Errno::OPNOTSUPP),
        };
        match shared {
            Ok(()) => {
                own(&target, &like).and_then(|()| self.sync(|| target.sync_all())).map_err(cannot)?;
                // No rate holds up what is not copied.
                self.progress.skip(like.len);
                return Ok(());
            }
            Err(Errno::NOSPC | Errno::DQUOT | Errno::IO) => {
                return Err(cannot(shared.err().map_or_else(io::Error::last_os_error, Into::into)));
            }
            Err(_) => {}
        }
        drop(target);
        rustix::fs::unlinkat(self.dir, file, AtFlags::empty()).map_err(|e| cannot(e.into()))?;
        let named = from.delta(guid).map(|delta| delta.file.clone()).unwrap_or_default();
        let (folder, name) = layers.place(&named)?;
        match link(folder.as_fd(), &name, self.dir, file.as_ref()) {
            Ok(()) => {
                // A link made of a file's name is of the file we hold only if the name was not moved meanwhile.
                let linked = rustix::fs::statat(self.dir, file, AtFlags::SYMLINK_NOFOLLOW);
                let linked = linked.map_err(|e| cannot(e.into()))?;
                if (linked.st_dev, linked.st_ino) != (like.dev, like.ino) {
                    // Or the host has no such identity: overlayfs makes a file of the lower layer another one for it. What
                    // we hold open is the snapshot in either case.
                    rustix::fs::unlinkat(self.dir, file, AtFlags::empty()).map_err(|e| cannot(e.into()))?;
                    return self.copy(level, file);
                }
                // Its content was never synced by us if another program wrote it.
                self.sync(|| level.file.sync_all()).map_err(cannot)?;
                self.progress.skip(like.len);
                Ok(())
            }
            Err(_) if self.copy => self.copy(level, file),
            Err(e) => {
                let why = format!(
                    "the clone cannot share this file: no shared extents, and no hard link ({}); --copy copies it",
                    crate::error::words(&e.into())
                );
                Err(Error::at(Kind::Unsupported, &level.path, why))
            }
        }
    }

    /// Copies what holds data; a hole stays one.
    fn copy(&self, level: &Level, file: &str) -> Result<()> {
        let shown = self.path.join(file);
        let cannot = |e: io::Error| Error::io(&e, &shown, "cannot copy");
        let status = level.file.status().map_err(cannot)?;
        let target = make(self.dir, file, status.mode).map_err(cannot)?;
        own(&target, &status).map_err(cannot)?;
        let target = RealFile::from_file(target, &shown)?;
        target.set_len(status.len).map_err(cannot)?;
        let (mut at, mut buf) = (0, vec![0; PIECE]);
        while let Some(data) = level.file.seek_data(at).map_err(cannot)?.filter(|data| *data < status.len) {
            self.progress.skip(data - at);
            let end = level.file.seek_hole(data).map_err(cannot)?.clamp(data + 1, status.len);
            at = data;
            while at < end {
                self.progress.check()?;
                let want = (end - at).min(PIECE as u64) as usize;
                let got = read_full(&*level.file, &mut buf[..want], at).map_err(cannot)?;
                if got < want {
                    return Err(Error::at(Kind::Io, &level.path, "became shorter while it was copied"));
                }
                crate::io::file::write_full(&target, &buf[..got], at).map_err(cannot)?;
                self.progress.add(got as u64);
                at += got as u64;
            }
        }
        self.sync(|| target.sync_all()).map_err(cannot)?;
        if !self.at_once {
            step(Step::FileSynced(&shown));
        }
        Ok(())
    }

    /// Syncs a file, unless that comes with all the others.
    fn sync(&self, file: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        if self.at_once { Ok(()) } else { file() }
    }
}

fn size(level: &Level) -> u64 {
    level.file.len().unwrap_or(0)
}
