//! Live operations on the images of a folder. A running one counts as an opener: the image stays open for it.

use std::ffi::{OsStr, OsString};
use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};

use super::entry::{Entry, OpenImage};
use super::lease::Leased;
use super::origin::Origin;
use super::scan::{self, Source};
use super::set::Folder;
use super::shared::Around;
use super::{closing, locked};
use crate::error::{Error, Kind, Result};
use crate::image::kind::in_text;
use crate::image::layers::Layers;
use crate::image::leave_folder::{may_leave, unmake_folder};
use crate::image::make_folder::make_folder;
use crate::image::store::Store;
use crate::image::switch::switch;
use crate::progress::Progress;
use crate::vdisk::Image;
use crate::vdisk::live::{Done, Work, carry_out, carry_out_before_close, judge, lower};

impl Folder {
    /// Carries `work` out on the image `name` (without `.img`), while it is in use. Blocks as long as it takes; not for
    /// threads of the engine or a transport.
    pub fn work(&self, name: &str, work: &Work, progress: &Progress) -> Result<Done> {
        let missing = || Error::at(Kind::NotFound, self.path().join(name), "no such image is served");
        let entry = self.find_text(name).ok_or_else(missing)?;
        if let Work::Switch { snapshot } = work {
            let done = entry.switch(snapshot);
            self.shared.snapshots.forget(entry.id());
            self.tell_work(entry.id(), work, None);
            return done;
        }
        let open = self.open_image(name, true)?;
        entry.check_passthrough(work)?;
        let going = entry.shown_snapshot(work);
        let done = self.work_on(open, work, progress);
        self.shared.snapshots.forget(entry.id());
        // A close has done so itself.
        if let Some(size) = entry.with_image(Image::size) {
            entry.size.store(size, std::sync::atomic::Ordering::Release);
        }
        self.tell_work(entry.id(), work, going.as_deref());
        done
    }

    /// Announces what `work` has changed, or may have before it failed: a look after the caller's answer sees it.
    /// `going`: the name of the snapshot that it took away.
    pub(super) fn tell_work(&self, id: u64, work: &Work, going: Option<&OsStr>) {
        self.with_announce(|announce| {
            announce.disk(id);
            if let (Work::Delete { .. } | Work::Merge { .. }, Some(name)) = (work, going) {
                announce.snapshot(id, name);
            }
            announce.settle();
        });
    }

    fn work_on(&self, open: OpenImage, work: &Work, progress: &Progress) -> Result<Done> {
        let entry = &open.entry().clone();
        let before = entry.origin();
        let layers = match entry.live_layers() {
            None if work.needs_folder() => {
                judge(open.image(), None, work)?;
                let layers = self.make_layered(entry)?;
                // A clone's snapshot is best taken back while the disk is closed.
                if !matches!(work, Work::Snapshot { .. }) && entry.openers() == 1 {
                    return self.work_alone(open, entry, layers, work, progress);
                }
                let done = carry_out(open.image(), Some(&layers), work, progress);
                if done.is_err()
                    && let Err(e) = self.unmake_layered(entry, &layers, before)
                {
                    log::warn!("{e}; the image stays a folder");
                }
                return done;
            }
            layers => layers,
        };
        let _going = match (work, &layers) {
            (Work::Delete { snapshot } | Work::Merge { snapshot }, Some(layers)) => {
                // One that is not there, or deleted already, is not shown either.
                let guid = layers.store().find_snapshot(snapshot);
                guid.ok().map(|guid| entry.begin_going(guid, snapshot)).transpose()?
            }
            _ => None,
        };
        if let Some(layers) = &layers
            && entry.openers() > 1
            && lower::wants_closed(layers, work)?
        {
            closing::wait(|| entry.openers() == 1);
        }
        match layers {
            // It has no other opener.
            Some(layers) if !work.only_looks() && entry.openers() == 1 => {
                self.work_alone(open, entry, layers, work, progress)
            }
            layers => carry_out(open.image(), layers.as_ref(), work, progress),
        }
    }

    /// Work with an image that has no other opener: it is closed behind it, and what is done best then is done. Where another
    /// opener was faster, the rest is done as for an open image.
    fn work_alone(
        &self,
        open: OpenImage,
        entry: &Arc<Entry>,
        layers: Arc<Layers>,
        work: &Work,
        progress: &Progress,
    ) -> Result<Done> {
        let done = carry_out_before_close(open.image(), Some(&layers), work, progress);
        if !entry.waits_for_close(&layers)? {
            return done;
        }
        drop((layers, open));
        let rest = self.finish_closed(entry, progress).and_then(|finished| {
            if finished {
                return Ok(());
            }
            let open = self.open_image(&in_text(entry.name()), true)?;
            carry_out(open.image(), entry.live_layers().as_ref(), &Work::Finish, progress).map(drop)
        });
        done.and_then(|done| rest.map(|()| done))
    }

    /// The first snapshot of a single file: it becomes a folder, under the open image. Its file stays the same one, so
    /// nothing that runs notices.
    fn make_layered(&self, entry: &Arc<Entry>) -> Result<Arc<Layers>> {
        // No look at the folder may come between its new name and our knowing of it.
        let known = locked(&self.known);
        if let Some(layers) = entry.live_layers() {
            return Ok(layers);
        }
        let live = entry.live.load_full();
        let closed = || Error::at(Kind::Io, entry.path(), "the image was closed meanwhile");
        let live = live.ok_or_else(closed)?;
        let place = &self.shared.place;
        // It is one already where an earlier attempt could not open it.
        if !matches!(entry.origin().source, Source::Layers) {
            let dir = make_folder(place.fd().as_fd(), place.path(), &entry.file(), Some(entry.identity()))?;
            let stat = rustix::fs::fstat(&dir)
                .map_err(|e| Error::io(&e.into(), entry.path(), "cannot look at the new folder"))?;
            let name = entry.origin().name;
            let origin = Origin {
                file: name.clone(),
                name,
                source: Source::Layers,
                identity: (stat.st_dev, stat.st_ino),
            };
            entry.set_origin(origin);
        }
        // Other images do not wait for the files of this one.
        drop(known);
        let layers = entry.open_layers()?;
        live.layers.store(Some(layers.clone()));
        // The layers hold the file from here on, and they say for what: it becomes a frozen level.
        if let Some(opened) = &*locked(&live.hold) {
            opened.hold.end_writing();
        }
        log::info!("{}: is a folder from now on, for its snapshots", entry.path().display());
        Ok(layers)
    }
}

impl Folder {
    /// Takes back [`make_layered`](Self::make_layered) under the open image, for work that failed: it is the single file that
    /// it was `before`, unless something came of the work.
    ///
    /// 1. no other operation begins; 2. the image's own lock writes again: 3 ends the one of the layers; 3. the folder is
    ///    left; 4. what is known of it.
    fn unmake_layered(&self, entry: &Arc<Entry>, layers: &Arc<Layers>, before: Origin) -> Result<()> {
        let Source::File(_) = before.source else { return Ok(()) };
        let Some(live) = entry.live.load_full() else { return Ok(()) };
        let _alone = layers.begin_operation()?; // 1
        // No look at the folder may come between its new name and our knowing of it.
        let mut known = locked(&self.known);
        let (origin, place) = (entry.origin(), &self.shared.place);
        let hold = locked(&live.hold).as_ref().map(|opened| opened.hold.clone());
        let Some(hold) = hold else { return Ok(()) };
        hold.begin_writing()?; // 2
        let (images, path) = (place.fd().as_fd(), place.path());
        if !unmake_folder(images, path, &origin.file, layers, &before.file)? {
            hold.end_writing();
            return Ok(());
        } // 3
        known.remove(&origin.file);
        if let Some(seen) = scan::file_again(place.fd(), &before.file) {
            known.insert(before.file.clone(), seen);
        }
        entry.set_origin(before); // 4
        layers.retire();
        live.layers.store(None);
        *locked(&entry.layers) = Leased::default();
        Ok(())
    }
}

impl Around for Folder {
    fn look_again(&self) {
        if let Err(e) = self.look(&mut |_, _, _| false) {
            log::warn!("{e}");
        }
    }

    fn finish(&self, name: &str) {
        // The image is being opened just now; this open comes behind it.
        match self.work(name, &Work::Finish, &Progress::new()) {
            Ok(_) => log::info!("{name}: what was begun with its snapshots is done"),
            Err(e) => log::warn!("{name}: cannot merge a deleted snapshot yet: {}", self.named(e)),
        }
    }
}

impl Entry {
    pub(super) fn live_layers(&self) -> Option<Arc<Layers>> {
        self.live.load().as_ref()?.layers.load_full()
    }

    /// The name under which the snapshot is shown that `work` takes away.
    fn shown_snapshot(&self, work: &Work) -> Option<OsString> {
        let (Work::Delete { snapshot } | Work::Merge { snapshot }) = work else { return None };
        let guid = self.live_layers()?.store().find_snapshot(snapshot).ok()?;
        let shown = self.snapshots().ok()?.into_iter().find(|shown| shown.guid == guid)?;
        Some(OsString::from(shown.name))
    }

    /// Goes back to a snapshot. Only while the live disk is not open (a close that is under way is waited for), and it
    /// is not opened meanwhile.
    fn switch(self: &Arc<Self>, snapshot: &str) -> Result<Done> {
        closing::wait(|| self.openers() == 0);
        let (send, receive) = mpsc::channel();
        let (entry, snapshot) = (self.clone(), snapshot.to_owned());
        self.strand.submit(Box::new(move || {
            let count = locked(&entry.count);
            let result = match count.openers() {
                0 => entry.switch_closed(&snapshot),
                n => {
                    let why = format!("the disk is open ({n} times); a switch needs a disk that is not open");
                    Err(Error::at(Kind::Busy, entry.path(), why))
                }
            };
            drop(count);
            let _ = send.send(result);
        }));
        let abandoned = || Err(Error::at(Kind::Io, self.path(), "the switch was abandoned"));
        receive.recv().unwrap_or_else(|_| abandoned()).map(|()| Done::default())
    }

    fn switch_closed(&self, snapshot: &str) -> Result<()> {
        if !matches!(self.origin().source, Source::Layers) {
            return Err(Error::at(Kind::NotFound, self.path(), "is a single file, and has no snapshots"));
        }
        if self.shared.read_only {
            return Err(Error::at(Kind::ReadOnly, self.path(), "the mount is read-only"));
        }
        let layers = self.open_layers()?;
        let _alone = layers.begin_operation()?;
        let guid = layers.store().find_snapshot(snapshot)?;
        switch(&layers, guid)
    }

    /// Goes on, in the background, with a merge that a crash interrupted. Looks at the descriptor only where nothing is
    /// to be done.
    pub(super) fn finish_interrupted(self: &Arc<Self>) {
        if !self.shared.read_only && matches!(self.origin().source, Source::Layers) {
            self.ask(|entry| entry.finish_if_interrupted());
        }
    }

    fn finish_if_interrupted(&self) {
        let (origin, path) = (self.origin(), self.path());
        let Ok(dir) = origin.folder(self.shared.place.fd().as_fd(), &path) else { return };
        let Ok((descriptor, _)) = Store::read(dir.as_fd(), &path) else { return };
        let deleted = !descriptor.unfinished().is_empty() || !descriptor.abandoned().is_empty();
        if deleted || may_leave(dir.as_fd(), &origin.file, &descriptor) {
            self.finish_later();
        }
    }

    fn finish_later(&self) {
        let (folder, name) = (self.folder.clone(), in_text(self.name()));
        let body = move || {
            let Some(folder) = folder.upgrade() else { return };
            folder.finish(&name);
        };
        if let Err(e) = crate::io::process::spawn_detached("ploopfs/merge", body) {
            log::warn!("{e}");
        }
    }
}
