//! Snapshots that are looked at through the mount: read-only images of their own over the files that the live disk has.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, TryLockError};
use std::time::Instant;

use super::entry::{Attributes, Entry, time_of};
use super::scan::Source;
use super::set::Folder;
use super::snapshots::Snapshot;
use super::{closing, locked};
use crate::error::{Error, Kind, Result};
use crate::format::descriptor::{Descriptor, Guid};
use crate::image::kind::in_text;
use crate::image::labels::Labels;
use crate::image::layers::Reader;
use crate::image::level::read_header;
use crate::image::map::Piece;
use crate::image::paths;
use crate::image::store::Store;
use crate::io::file::HostFile;
use crate::io::real::{Access, RealFile};
use crate::vdisk::Image;
use crate::vdisk::tracking::Changes;

/// A snapshot that is open; dropping it gives it back.
pub struct OpenSnapshot {
    entry: Arc<Entry>,
    guid: Guid,
    /// Some until it is dropped. The reader keeps the files locked, and those of a clone from being changed.
    held: Option<(Arc<Image>, Reader)>,
}

impl OpenSnapshot {
    /// The read-only image.
    pub fn image(&self) -> &Arc<Image> {
        let (image, _) = self.held.as_ref().expect("only dropping takes it");
        image
    }

    /// Which snapshot it is.
    pub fn guid(&self) -> Guid {
        self.guid
    }

    /// The image it is a snapshot of.
    pub fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }
}

impl Drop for OpenSnapshot {
    fn drop(&mut self) {
        let Some((image, reader)) = self.held.take() else { return };
        let (entry, guid) = (self.entry.clone(), self.guid);
        // A close waits for what runs, and the last user of the files gives their locks back: nothing for the
        // thread of a transport.
        (self.entry.spawn)(Box::new(move || {
            if let Err(e) = image.close() {
                log::warn!("{e}");
            }
            drop((image, reader));
            entry.end_view(guid);
        }));
    }
}

/// A snapshot that is about to go; dropping it ends that, whatever came of it.
pub(super) struct Going<'a> {
    entry: &'a Entry,
    guid: Guid,
}

impl Drop for Going<'_> {
    fn drop(&mut self) {
        locked(&self.entry.views).going.remove(&self.guid);
    }
}

impl Folder {
    /// A piece of the map of an image (by its name without `.img`), or of a snapshot of it (label or GUID), from byte
    /// `offset` of the disk on. Opens it for that long. Blocks; not for threads of the engine or a transport.
    pub fn map_piece(&self, name: &str, snapshot: Option<&str>, offset: u64) -> Result<Piece> {
        let missing = |what: String| Error::at(Kind::NotFound, self.path().join(name), what);
        let Some(wanted) = snapshot else {
            return self.open_image(name, false)?.image().map_piece(offset);
        };
        let entry = self.find_text(name).ok_or_else(|| missing("no such image is served".into()))?;
        let is = |s: &&Snapshot| s.name == wanted || Guid::parse(wanted).is_some_and(|guid| guid == s.guid);
        let found = entry.snapshots()?.iter().find(is).map(|s| s.guid);
        let guid = found.ok_or_else(|| missing(format!("there is no snapshot {wanted}")))?;
        entry.open_snapshot(guid)?.image().map_piece(offset)
    }

    /// What has changed on the disk of the image `name` (without `.img`) since its tracking began, from byte `start` on.
    pub fn changes(&self, name: &str, start: u64) -> Result<Changes> {
        Ok(self.open_image(name, false)?.image().changes(start))
    }
}

impl Entry {
    /// Its snapshots, in the order of the descriptor. Reads the descriptor where the image is closed, or just being opened:
    /// what waits for that open is not waited for.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        let now = Instant::now();
        let snapshots = self.read_snapshots()?;
        self.shared.snapshots.keep(self.id(), now, &snapshots);
        Ok(snapshots)
    }

    fn read_snapshots(&self) -> Result<Vec<Snapshot>> {
        let origin = self.origin();
        if !matches!(origin.source, Source::Layers) {
            return Ok(Vec::new());
        }
        let list = |labels: &Labels, guids: Vec<Guid>| {
            guids.into_iter().map(|guid| Snapshot { guid, name: labels.name(guid) }).collect()
        };
        let open = match self.layers.try_lock() {
            Ok(layers) => layers.get(),
            Err(TryLockError::Poisoned(layers)) => layers.into_inner().get(),
            Err(TryLockError::WouldBlock) => None,
        };
        if let Some(layers) = open {
            let store = layers.store();
            return Ok(list(store.labels(), store.snapshots().collect()));
        }
        let (_, descriptor, labels) = self.read_descriptor()?;
        let shots = descriptor.shots.iter().filter(|s| s.guid != descriptor.top && s.marker.is_none());
        Ok(list(&labels, shots.map(|s| s.guid).collect()))
    }

    fn read_descriptor(&self) -> Result<(OwnedFd, Descriptor, Labels)> {
        let path = self.path();
        let dir = self.origin().folder(self.shared.place.fd().as_fd(), &path)?;
        let (descriptor, labels) = Store::read(dir.as_fd(), &path)?;
        Ok((dir, descriptor, labels))
    }

    /// How many files its live disk, or a snapshot, is made of.
    pub fn levels(&self, snapshot: Option<Guid>) -> Result<usize> {
        if !matches!(self.origin().source, Source::Layers) {
            return Ok(1);
        }
        let (_, descriptor, _) = self.read_descriptor()?;
        let broken =
            |bad: crate::format::descriptor::BadXml| Error::at(Kind::Damaged, self.path(), bad.to_string());
        Ok(descriptor.chain(snapshot.unwrap_or(descriptor.top)).map_err(broken)?.len())
    }

    /// What stat shows of a snapshot: its top file, and the disk's size of its own time. Opens nothing of the image.
    pub fn snapshot_attributes(&self, guid: Guid) -> Result<Attributes> {
        let path = self.path();
        let (dir, descriptor, _) = self.read_descriptor()?;
        let gone = || Error::at(Kind::NotFound, &path, "the snapshot is deleted");
        let delta = descriptor.delta(guid).filter(|_| guid != descriptor.top).ok_or_else(gone)?;
        let file = Path::new(&delta.file);
        let shown = path.join(file);
        let (folder, name) = paths::resolve(dir.as_fd(), file, &shown, self.shared.allow_outside)?;
        // Another descriptor of the file takes no lock and, closed, gives none back.
        let file = RealFile::open_as(&folder, Path::new(&name), &shown, Access::ReadOnly)?;
        let cannot = |e: std::io::Error| Error::io(&e, &shown, "cannot look at it");
        let host = file.status().map_err(cannot)?;
        let is_base = descriptor.shot(guid).is_some_and(|shot| shot.parent == Guid::NONE);
        let size =
            if delta.plain && is_base { host.len } else { read_header(&file, &shown)?.geometry().disk };
        Ok(Attributes { host, size, mtime: time_of(host.mtime) })
    }

    /// Opens a snapshot read-only. Blocks; for threads of the engine that may.
    pub fn open_snapshot(self: &Arc<Self>, guid: Guid) -> Result<OpenSnapshot> {
        {
            let mut views = locked(&self.views);
            if views.going.contains(&guid) || views.image_goes {
                return Err(Error::at(Kind::NotFound, self.path(), "the snapshot is being deleted"));
            }
            *views.open.entry(guid).or_default() += 1;
        }
        let opened = self.open_layers().and_then(|layers| {
            let reader = layers.begin_reading();
            let gone = || Error::at(Kind::NotFound, self.path(), "the snapshot is deleted");
            let there = layers.store().snapshots().any(|s| s == guid);
            let levels = if there { layers.chain(guid)? } else { return Err(gone()) };
            let name = format!("{}@{}", in_text(self.name()), layers.store().labels().name(guid));
            Ok((Image::open_beside(&self.shared.engine, &name, levels)?, reader))
        });
        match opened {
            Ok(held) => Ok(OpenSnapshot { entry: self.clone(), guid, held: Some(held) }),
            Err(e) => {
                self.end_view(guid);
                Err(e)
            }
        }
    }

    fn end_view(&self, guid: Guid) {
        let mut views = locked(&self.views);
        if let Some(count) = views.open.get_mut(&guid) {
            *count -= 1;
            if *count == 0 {
                views.open.remove(&guid);
            }
        }
    }

    /// True while a snapshot of it is open.
    pub(super) fn is_looked_at(&self) -> bool {
        !locked(&self.views).open.is_empty()
    }

    /// Why it cannot go while that is so.
    pub(super) fn looked_at(&self) -> Error {
        let why = "a snapshot of it is open below .snapshots in the mount; close it there first";
        Error::at(Kind::Busy, self.path(), why)
    }

    /// Closes a snapshot that is to go to new openers; refused while one has it open (R9). Blocks: a close that
    /// is under way is waited for.
    pub(super) fn begin_going(&self, guid: Guid, name: &str) -> Result<Going<'_>> {
        closing::wait(|| !locked(&self.views).open.contains_key(&guid));
        let mut views = locked(&self.views);
        if views.open.contains_key(&guid) {
            let why =
                format!("the snapshot {name} is open below .snapshots in the mount; close it there first");
            return Err(Error::at(Kind::Busy, self.path(), why));
        }
        views.going.insert(guid);
        Ok(Going { entry: self, guid })
    }

    /// Closes all its snapshots to new openers, or says that one is open (R9).
    pub(super) fn close_views(&self) -> Result<()> {
        let mut views = locked(&self.views);
        if !views.open.is_empty() {
            return Err(self.looked_at());
        }
        views.image_goes = true;
        Ok(())
    }

    /// Ends a [`close_views`](Self::close_views).
    pub(super) fn open_views(&self) {
        locked(&self.views).image_goes = false;
    }
}
