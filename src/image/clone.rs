//! A new image with the content of a snapshot. Where the host can, it shares extents with the old one and no file.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};

use crate::error::{Error, Kind, Result};
use crate::format::descriptor::{Descriptor, Guid};
use crate::image::create;
use crate::image::folder_files::{make, own, sync_folder, write_beside};
use crate::image::kind::DESCRIPTOR;
use crate::image::labels::{LABELS_NAME, Labels};
use crate::image::layers::{Layers, disk_size, header_above};
use crate::image::level::{Layout, Level};
use crate::image::make_folder::{new_folder, remove_opened};
use crate::image::new_delta::{create_delta, new_delta_name};
use crate::io::file::{HostFile, read_full};
use crate::io::foreign::mount_id;
use crate::io::real::RealFile;
use crate::io::rename::{link, rename_new_folder};
use crate::progress::Progress;
use crate::rules::{Step, step};

/// Bytes copied between two looks at `progress`.
const PIECE: usize = 1 << 20;

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
        if let Some(taken) = create::taken_by(to)? {
            let why = "there is an image of this name already; choose another";
            return Err(Error::at(Kind::Exists, taken, why));
        }
        let name = to.file_name().ok_or_else(|| Error::at(Kind::Invalid, to, "ends in no name"))?;
        let name = name.to_str().ok_or_else(|| Error::at(Kind::Invalid, to, "must be UTF-8"))?.to_owned();
        let described = Descriptor::new(0, 1, &name, false).written();
        described
            .map_err(|bad| Error::at(Kind::Invalid, to, format!("is no name for a layered image: {bad}")))?;
        let parent = to.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned();
        let around = File::open(&parent).map_err(|e| Error::io(&e, &parent, "cannot open the folder"))?;
        Ok(Destination { name, around, parent })
    }
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

/// Makes the folder `to` an image with the content of the snapshot `guid`, which must not be changed or merged
/// meanwhile. Each delta shares its extents with the old one (FICLONE); else it is a hard link, and neither image
/// may change it from then on (R9: its link count says so); else, if `copy`, it is copied; else the whole is refused.
///
/// 1. `.NAME.new/` with the deltas, synced; 2. the new top; 3. labels, then the descriptor; 4. the folder synced; 5.
///    renamed to `NAME`, which must be free; 6. the folder around it synced. Until 5 there is no image: a crash leaves a
///    dot-folder, which the next attempt removes. 5 before 4: a power cut could leave an image without a file.
pub fn clone(layers: &Layers, guid: Guid, to: &Path, copy: bool, progress: &Progress) -> Result<()> {
    let Destination { name: text, around, parent } = Destination::of(to)?;
    let name = OsStr::new(&text);
    let building = format!(".{text}.new");
    let built = parent.join(&building);
    let folder = new_folder(around.as_fd(), building.as_ref(), &built)?;
    let new = NewImage { dir: folder.as_fd(), path: &built, name: &text, copy, progress };
    let finished = new
        .fill(layers, guid)
        // 4.
        .and_then(|()| sync_folder(folder.as_fd(), &built))
        // 5.
        .and_then(|()| {
            rename_new_folder(around.as_fd(), building.as_ref(), name).map_err(|e| match e {
                Errno::EXIST | Errno::NOTEMPTY => {
                    Error::at(Kind::Exists, to, "has just been made by another")
                }
                e => Error::io(&e.into(), to, "cannot give the image its name"),
            })
        });
    if let Err(error) = finished {
        // Best effort; a dot-folder is never taken for an image.
        let _ = remove_opened(around.as_fd(), building.as_ref(), folder.as_fd());
        return Err(error);
    }
    // 6.
    sync_folder(around.as_fd(), &parent)
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
        let new = NewImage { dir: dir.as_fd(), path: &path, name: "", copy: true, progress };
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
    progress: &'a Progress,
}

impl NewImage<'_> {
    fn fill(&self, layers: &Layers, guid: Guid) -> Result<()> {
        let (descriptor, labels) = {
            let store = layers.store();
            (store.descriptor().clone(), store.labels().clone())
        };
        let bad =
            |bad: crate::format::descriptor::BadXml| Error::at(Kind::Invalid, self.path, bad.to_string());
        let levels = layers.chain(guid)?;
        let disk = disk_size(&levels, &descriptor);
        // 1. Names of their own, so that two deltas from two folders cannot meet.
        let chain = descriptor.chain(guid).map_err(bad)?;
        let base = match levels.first().map(|level| &level.layout) {
            Some(Layout::Plain { .. }) => format!("{}.raw", self.name),
            _ => format!("{}.hds", self.name),
        };
        let new_name = || format!("{}.hds.{}", self.name, Guid::random());
        let top = new_name();
        let mut next = descriptor.clone_of(guid, &top).map_err(bad)?;
        next.set_size(disk.div_ceil(512));
        self.progress.set_total(if self.copy { levels.iter().map(size).sum() } else { 0 });
        for (index, (guid, level)) in chain.iter().zip(&levels).enumerate() {
            let file = if index == 0 { base.clone() } else { new_name() };
            self.take(layers, &descriptor, *guid, level, &file)?;
            next.set_file(*guid, &file).map_err(bad)?;
        }
        // 2.
        let header = header_above(&levels, &descriptor, disk)?;
        let last = levels.last().ok_or_else(|| Error::at(Kind::Damaged, self.path, "an empty chain"))?;
        let like = last.file.status().map_err(|e| Error::io(&e, &last.path, "cannot look at it"))?;
        create_delta(self.dir, self.path, &top, &header, &like)?;
        // 3.
        let mut kept = Labels::default();
        for guid in &chain {
            kept.set(*guid, labels.label(*guid).map(str::to_owned));
            kept.set_taken(*guid, labels.taken(*guid));
            kept.set_length(*guid, labels.length(*guid));
        }
        write_beside(self.dir, self.path, LABELS_NAME, &kept.to_bytes())?;
        write_beside(self.dir, self.path, DESCRIPTOR, &next.written().map_err(bad)?)
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
                own(&target, &like).and_then(|()| target.sync_all()).map_err(cannot)?;
                self.progress.add(like.len);
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
                level.file.sync_all().map_err(cannot)?;
                self.progress.add(like.len);
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
            self.progress.add(data - at);
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
        target.sync_all().map_err(cannot)?;
        step(Step::FileSynced(&shown));
        Ok(())
    }
}

fn size(level: &Level) -> u64 {
    level.file.len().unwrap_or(0)
}
