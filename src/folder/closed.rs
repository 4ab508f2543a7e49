//! Work that needs a closed disk, and takes a while: the merge of a live disk into its raw base
//! (`vdisk::live::lower`), and the end of the folder that its last snapshot leaves.
//!
//! An open that comes meanwhile waits a little: most often that is enough. Then the merge is broken off, which costs
//! nothing but its time, and the open goes on; the rest is done as for a disk that is open.

use std::cell::Cell;
use std::convert::Infallible;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use super::entry::Entry;
use super::lease::Leased;
use super::origin::Origin;
use super::scan::{self, Source};
use super::set::Folder;
use super::{closing, locked};
use crate::error::Result;
use crate::image::kind::ImageKind;
use crate::image::layers::Layers;
use crate::image::leave_folder::{leave_folder, may_leave};
use crate::progress::Progress;
use crate::vdisk::live::lower;

/// How long an open waits for the end of a merge: as it does for a close with its sync on a slow disk.
const PATIENCE: Duration = Duration::from_secs(2);

/// An image is closed, and no open of it goes on, for as long as this lives.
struct Closed {
    _end: Sender<Infallible>,
}

impl Entry {
    /// Something is left to do that a closed disk is waited for.
    pub(super) fn waits_for_close(&self, layers: &Layers) -> Result<bool> {
        let store = layers.store();
        if may_leave(store.dir(), &self.origin().file, store.descriptor()) {
            return Ok(true);
        }
        drop(store);
        Ok(lower::waiting(layers)?.is_some())
    }

    /// None: it has openers, and not only one that has just closed it.
    ///
    /// The strand stands still: opens queue up behind this, and one thread waits, however many they are.
    fn keep_closed(self: &Arc<Self>) -> Option<Closed> {
        closing::wait(|| self.openers() == 0);
        let ((closed, is_closed), (end, ended)) = (channel(), channel::<Infallible>());
        let entry = self.clone();
        self.strand.submit(Box::new(move || {
            let count = locked(&entry.count);
            if count.openers() == 0 && closed.send(()).is_ok() {
                // Nothing is ever sent.
                let _ = ended.recv();
            }
            drop(count);
        }));
        is_closed.recv().ok().map(|()| Closed { _end: end })
    }

    /// False: the mount ends, or an open has waited for too long; `since` remembers since when.
    fn may_stay_closed(&self, since: &Cell<Option<Instant>>) -> bool {
        if self.shared.refusing.load(Ordering::Acquire) {
            return false;
        }
        let now = Instant::now();
        since.set(self.is_held().then(|| since.get().unwrap_or(now)));
        since.get().is_none_or(|since| now.duration_since(since) < PATIENCE)
    }
}

impl Folder {
    /// Does what is left for a closed disk. False: it is open, or was opened meanwhile. Blocks; not for threads of the
    /// engine or a transport.
    pub(super) fn finish_closed(&self, entry: &Arc<Entry>, progress: &Progress) -> Result<bool> {
        let Some(closed) = entry.keep_closed() else { return Ok(false) };
        let layers = entry.open_layers()?;
        let since = Cell::new(None);
        let done = lower::finish(&layers, progress, &|| entry.may_stay_closed(&since))?;
        if done && let Err(e) = self.leave_folder(entry, &layers) {
            log::warn!("{e}; the image stays a folder");
        }
        // The locks first: who opens it next takes them anew.
        drop(layers);
        drop(closed);
        Ok(done)
    }

    /// An image without snapshots that is one raw file becomes that file. What is shown stays the same file.
    fn leave_folder(&self, entry: &Entry, layers: &Layers) -> Result<()> {
        // No look at the folder may come between its new name and our knowing of it.
        let mut known = locked(&self.known);
        let (origin, place) = (entry.origin(), &self.shared.place);
        let Some(file) = leave_folder(place.fd().as_fd(), place.path(), &origin.file, layers)? else {
            return Ok(());
        };
        known.remove(&origin.file);
        if let Some(seen) = scan::file_again(place.fd(), &file) {
            let (source, identity) = (Source::File(ImageKind::Raw), seen.stamp.identity);
            known.insert(file.clone(), seen);
            entry.set_origin(Origin { file, source, identity, ..origin });
        }
        drop(known);
        // Who looks at the old folder yet (a diff) keeps it; the next snapshot makes another.
        *locked(&entry.layers) = Leased::default();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::folder::FolderOptions;
    use crate::image::make_folder::make_folder;
    use crate::io::lock::{DeltaLock, Use};
    use crate::io::real::{Access, RealFile};
    use crate::vdisk::{Engine, Options};

    /// Another process has linked the raw file beside its folder, and is about to take the folder away: a mount that begins
    /// at that moment took the link for a leftover, and the file had no name at all in the end.
    #[test]
    fn the_second_name_of_a_file_that_is_in_use_is_not_taken_away() {
        let temp = tempfile::tempdir().expect("a folder");
        let path = |name: &str| temp.path().join(name);
        std::fs::write(path("vm1.raw"), [7; 65536]).expect("written");
        let images = std::fs::File::open(temp.path()).expect("opens");
        make_folder(images.as_fd(), temp.path(), "vm1.raw".as_ref(), None).expect("a folder");
        std::fs::hard_link(path("vm1/vm1.raw"), path("vm1.raw")).expect("linked");
        let other = |file: &Path| {
            let file = Arc::new(RealFile::open(file, Access::ReadWrite).expect("opens"));
            DeltaLock::acquire(file, Use::Writer).expect("locked")
        };
        let held = other(&path("vm1.raw"));
        let engine = Engine::new(Options::default(), Box::new(|_| {}));
        let open = || Folder::open(temp.path(), &engine, FolderOptions::default()).expect("opens");
        drop(open());
        assert!(path("vm1.raw").exists(), "taken away");
        drop(held);
        let folder = open();
        assert!(!path("vm1.raw").exists() && path("vm1/vm1.raw").exists());
        assert_eq!(folder.open_image("vm1", true).expect("opens").image().size(), 65536);
    }
}
