//! A takeover: what a daemon before had open is opened again, under the same handles (docs/restart.md#takeover).

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use super::data::OpenFile;
use super::names::Node;
use super::{Arc, Tree};
use crate::error::{Error, Kind, Result};
use crate::folder::{Folder, OpenImage};
use crate::fuse::ops::{Answer, Done, Handle, OpenFlags};
use crate::io::buffers::{self, Room, Writer};
use crate::ledger::{Found, Ledger, Open};
use crate::sync::{Mutex, lock};

/// How long all wait for those that are not open again. What takes longer (its host hangs, its BAT is large) keeps its own
/// requests waiting, and no others.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Each open that is under way has a part; the last to end gives up what none has taken.
struct Settling {
    folder: Arc<Folder>,
    ledger: Arc<Ledger>,
    /// Closed with the last part.
    _over: mpsc::Sender<Infallible>,
}

impl Drop for Settling {
    fn drop(&mut self) {
        self.folder.settle_inheritance();
        self.ledger.settle_numbers();
    }
}

/// What was open for writing is so until each of its handles has it, also where only readers are left. A leaf.
type Kept = Arc<Mutex<Option<OpenImage>>>;

/// The images of which something was in use when the daemon before ended, by number.
pub fn left_open(found: &Found) -> HashSet<u64> {
    let of_node = |node| match Node::of(node)? {
        Node::Image(id) => Some(id),
        Node::Snapshot(number) => {
            let snapshot = found.snapshots.get(usize::try_from(number).ok()?);
            snapshot.copied().flatten().map(|(id, _)| id)
        }
        _ => None,
    };
    let opens = found.opens.iter().filter_map(|place| of_node(place.open?.node));
    found.images.iter().map(|image| image.id).chain(opens).collect()
}

impl Tree {
    /// Opens what was open, each image on threads of its own; to be called before a request is served. Returns when all is
    /// open, or [soon](AT_ONCE): what asks for a handle that is not, waits for it. What cannot be opened costs its own handles.
    /// An error: this mount cannot be gone on with, and nothing was touched.
    pub fn restore(&self) -> Result<()> {
        let Some(ledger) = self.folder.ledger() else { return Ok(()) };
        let found = ledger.found();
        self.can_take_over(found)?;
        found
            .nonsense
            .iter()
            .for_each(|what| log::error!("what the daemon before has left makes no sense: {what}"));
        let (over, ended) = mpsc::channel();
        let settling =
            Arc::new(Settling { folder: self.folder.clone(), ledger: ledger.clone(), _over: over });
        let mut kept: HashMap<u64, Kept> = HashMap::new();
        for image in &found.images {
            let Some(entry) = self.folder.get(image.id) else {
                log::error!(
                    "image {} was open when the daemon before ended, and is not in the folder now",
                    image.id
                );
                continue;
            };
            let (keep, path, settling) =
                (kept.entry(image.id).or_default().clone(), entry.path(), settling.clone());
            let opened = move |result| {
                match result {
                    Ok(open) => *lock(&keep) = Some(open),
                    Err(e) => log::error!("{}: cannot be gone on with: {e}", path.display()),
                }
                drop((keep, settling));
            };
            // For reading: one that can no longer be written is open all the same, with what was left of it.
            entry.open_later(false, Box::new(opened));
        }
        for open in found.opens.iter().filter_map(|place| place.open) {
            match Node::of(open.node) {
                Some(Node::Image(id)) => {
                    self.restore_image(id, open, kept.get(&id).cloned(), settling.clone())
                }
                Some(Node::Snapshot(number)) => self.restore_snapshot(number, open, settling.clone()),
                Some(node @ (Node::Stats | Node::Metrics)) => self.restore_own(node, open),
                _ => drop(self.handles.lose(open.handle)),
            }
        }
        // Ours are not theirs: when all of those are gone, nothing more comes.
        drop((kept, settling));
        if ended.recv_timeout(AT_ONCE) == Err(RecvTimeoutError::Timeout) {
            log::warn!("some images are not open again; what asks for them waits, and all others go on");
        }
        Ok(())
    }

    fn restore_image(&self, id: u64, open: Open, keep: Option<Kept>, settling: Arc<Settling>) {
        let Some(entry) = self.folder.get(id) else {
            self.handles.lose(open.handle);
            return;
        };
        // Sent when requests are served.
        self.folder.announce_disk(id);
        let (handles, path) = (Arc::clone(&self.handles), entry.path());
        let opened = move |result: Result<OpenImage>| {
            match result {
                Ok(image) => handles.restore(open.handle, OpenFile::Image(image)),
                Err(e) => {
                    log::error!("{}: an open file of it is lost: {e}", path.display());
                    handles.lose(open.handle);
                }
            }
            drop((keep, settling));
        };
        let again = entry.clone();
        let as_it_was = move |result: Result<OpenImage>| match result {
            // A writer's, of an image that can no longer be written: it reads on, and hears of it when it writes.
            Err(e) if e.kind() == Kind::ReadOnly => again.open_for_kernel(false, Box::new(opened)),
            result => opened(result),
        };
        entry.open_for_kernel(OpenFlags { raw: open.flags }.writes(), Box::new(as_it_was));
    }

    fn restore_snapshot(&self, number: u64, open: Open, settling: Arc<Settling>) {
        let found = self.numbers.snapshot(number).and_then(|(id, guid)| Some((self.folder.get(id)?, guid)));
        let Some((entry, guid)) = found else {
            log::error!("snapshot {number} was open when the daemon before ended, and is not there now");
            self.handles.lose(open.handle);
            return;
        };
        let handles = Arc::clone(&self.handles);
        let again = move || {
            match entry.open_snapshot(guid) {
                Ok(snapshot) => handles.restore(open.handle, OpenFile::Snapshot(snapshot)),
                Err(e) => {
                    log::error!("{}: an open snapshot of it is lost: {e}", entry.path().display());
                    handles.lose(open.handle);
                }
            }
            drop(settling);
        };
        let lane = self.numbers.snapshot(number).map_or(0, |(id, _)| id);
        self.engine.blocking(lane, Box::new(again));
    }

    /// What nothing of the ledger says how to go on with.
    fn can_take_over(&self, found: &Found) -> Result<()> {
        let name = |id: u64| {
            self.folder.get(id).map_or_else(|| id.to_string(), |entry| entry.path().display().to_string())
        };
        let cannot =
            |what: String| Err(Error::new(Kind::Unsupported, format!("cannot take the mount over: {what}")));
        if found.beyond {
            return cannot("more was open than the ledger has room for".to_owned());
        }
        if let Some(image) = found.images.iter().find(|image| image.beyond) {
            return cannot(format!("an operation has changed {} since it was opened", name(image.id)));
        }
        Ok(())
    }

    /// What is asked of a handle whose file is being opened again waits for that: `again` is called then. Else gives `done`
    /// back.
    pub(super) fn returned<T: 'static>(
        &self,
        handle: Handle,
        done: Done<T>,
        again: impl FnOnce(&Tree, Done<T>) + Send + 'static,
    ) -> Option<Done<T>> {
        if self.handles.all_are_back() {
            return Some(done);
        }
        let Some(tree) = self.own.upgrade() else { return Some(done) };
        self.handles.wait_for(handle, done, |done| Box::new(move || again(&tree, done)))
    }

    /// Room for a write through a handle without an image: one that is being opened again is one that completes nothing, so
    /// that what waits for it is bounded.
    pub(super) fn room_until_back(&self, handle: Handle, len: usize) -> Answer<Room> {
        let Some(Node::Image(id)) = self.handles.returning(handle).and_then(Node::of) else {
            return Ok(buffers::any_room(len));
        };
        let path = || self.folder.get(id).map_or_else(|| self.folder.path().to_owned(), |entry| entry.path());
        buffers::room(&Absent(id), len).map_err(|hung| self.refusal(&hung, &path()))
    }
}

/// An image that is being opened again, as a writer.
struct Absent(u64);

impl Writer for Absent {
    fn id(&self) -> u64 {
        // Images count up, from 1.
        u64::MAX - self.0
    }

    fn completed(&self) -> u64 {
        0
    }
}
