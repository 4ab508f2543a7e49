//! The delta files that are open, by device and inode: one descriptor and one lock for each in the whole process, since
//! a second one of our own looks foreign (docs/design.md#who-may-use-a-file). Shared by the live disk, its snapshots,
//! and clones that have the same file under another name. The lock is a writer's as long as one of them writes the
//! file, else a reader's.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::lease::{Lease, Leased};
use super::scan::Identity;
use super::{Wrap, locked};
use crate::error::{Error, Result};
use crate::image::layers::{Hold, Opened, Opener};
use crate::io::direct::DirectFile;
use crate::io::file::HostFile;
use crate::io::heirs::Heirs;
use crate::io::lock::{DeltaLock, Use};
use crate::io::real::{Access, RealFile};

/// The open files of one folder.
pub(super) struct Deltas {
    read_only: bool,
    /// Past the host's page cache.
    direct: bool,
    wrap: Option<Wrap>,
    /// What outlives this process.
    pub(super) heirs: Arc<Heirs>,
    /// It was said that this host has no locks.
    unlocked: AtomicBool,
    /// Protects which files have a place. Held for a look-up only: whatever one file waits for, others are opened. A leaf
    /// but for the places that only the table has.
    places: Mutex<HashMap<Identity, Arc<FilePlace>>>,
}

/// The place of one file. Protects that it is opened once for all its users. Held across that open, its locks, and the end of
/// a use of ours that has begun (which takes no lock). Behind the table, which is released by then.
type FilePlace = Mutex<Leased<HeldDelta>>;

/// One file as long as it has a user here. Dropping it gives the lock back at once, also while a reader still looks
/// at the file: our own next open would take a lock that lingers for a stranger's.
struct HeldDelta {
    real: Arc<RealFile>,
    file: Arc<dyn HostFile>,
    writable: bool,
    lock: DeltaLock,
    identity: Identity,
    heirs: Arc<Heirs>,
    /// Protects how many users write the file, and that the lock follows. A leaf; held across fcntl, which does not
    /// wait.
    writers: Mutex<u32>,
    /// Behind the lock: dropped when that is given back.
    _lease: Lease,
}

impl Drop for HeldDelta {
    fn drop(&mut self) {
        // The lock is given back by name behind this: what another process still holds of the open file keeps none.
        self.heirs.let_go(self.identity);
    }
}

/// One user of a file.
struct User {
    held: Arc<HeldDelta>,
    /// It is one of the writers. Protects that it is counted once; before `writers`.
    writes: Mutex<bool>,
}

impl User {
    fn new(held: Arc<HeldDelta>, used: Use) -> Result<User> {
        let user = User { held, writes: Mutex::new(false) };
        if used == Use::Writer {
            user.begin_writing()?;
        }
        Ok(user)
    }
}

impl Hold for User {
    fn begin_writing(&self) -> Result<()> {
        let mut writes = locked(&self.writes);
        if !*writes {
            let mut writers = locked(&self.held.writers);
            if *writers == 0 {
                self.held.lock.begin_writing()?;
            }
            *writers += 1;
            *writes = true;
        }
        Ok(())
    }

    fn end_writing(&self) {
        let mut writes = locked(&self.writes);
        if std::mem::take(&mut *writes) {
            let mut writers = locked(&self.held.writers);
            *writers -= 1;
            if *writers == 0 {
                self.held.lock.end_writing();
            }
        }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.end_writing();
    }
}

impl Deltas {
    /// Nothing is open. `read_only`: files are never opened for writing. `direct`: they are read and written past the
    /// host's page cache, where it can.
    pub(super) fn new(read_only: bool, direct: bool, wrap: Option<Wrap>, heirs: Arc<Heirs>) -> Deltas {
        let unlocked = AtomicBool::new(false);
        Deltas { read_only, direct, wrap, heirs, unlocked, places: Mutex::default() }
    }

    /// What images are opened for.
    pub(super) fn used(&self) -> Use {
        if self.read_only { Use::Reader } else { Use::Writer }
    }

    /// Opens what a daemon before has left of this file, whatever lies under its name now. None: nothing.
    pub(super) fn open_left(&self, file: Identity, shown: &Path, used: Use) -> Option<Result<Opened>> {
        let left = self.heirs.left(file)?;
        // Another descriptor of the same open file: what is taken below is that one.
        let again = RealFile::from_file(left.descriptor.into(), shown);
        Some(again.and_then(|again| self.opened(again, shown, used)))
    }

    fn opened(&self, file: RealFile, shown: &Path, used: Use) -> Result<Opened> {
        let used = if self.read_only { Use::Reader } else { used };
        let held = self.held(file, shown, used)?;
        let (file, writable) = (Arc::clone(&held.file), held.writable);
        Ok(Opened { file, writable, hold: Arc::new(User::new(held, used)?) })
    }

    fn held(&self, file: RealFile, shown: &Path, used: Use) -> Result<Arc<HeldDelta>> {
        let status = file.status().map_err(|e| Error::io(&e, shown, "cannot open"))?;
        let identity = (status.dev, status.ino);
        let place = self.place_of(identity);
        locked(&place).get_or_open(|lease| {
            // On the open file of a daemon before are its locks: they go on without a gap.
            let inherited = self.heirs.take_own(identity);
            let is_new = inherited.is_none();
            let file = match inherited {
                Some(own) => RealFile::from_file(own.into(), shown)?,
                None => file,
            };
            let held = self.lock(Arc::new(file), shown, used, identity, lease)?;
            if is_new && !self.heirs.keep(identity, false, &*held.real) {
                log::warn!("{}: its locks end with this process", shown.display());
            }
            Ok(held)
        })
    }

    /// An open file that hears of a sync that has failed, whatever daemon heard of it before (L5).
    pub(super) fn witness(&self, file: Identity, shown: &Path) -> Result<Option<Arc<dyn HostFile>>> {
        let Some(witness) = self.heirs.take_witness(file) else { return Ok(None) };
        let real: Arc<dyn HostFile> = Arc::new(RealFile::from_file(witness.into(), shown)?);
        Ok(Some(match &self.wrap {
            Some(wrap) => wrap(real),
            None => real,
        }))
    }

    fn place_of(&self, identity: Identity) -> Arc<FilePlace> {
        let mut places = locked(&self.places);
        // A place that only this table has is not locked, and looking at it does not wait.
        places.retain(|&other, place| {
            other == identity || Arc::strong_count(place) > 1 || !locked(place).is_over()
        });
        places.entry(identity).or_default().clone()
    }

    fn lock(
        &self,
        file: Arc<RealFile>,
        shown: &Path,
        used: Use,
        identity: Identity,
        lease: Lease,
    ) -> Result<Arc<HeldDelta>> {
        let real = file.clone();
        let lock = DeltaLock::acquire(Arc::clone(&file), used)?;
        if !lock.held() && !self.unlocked.swap(true, Ordering::AcqRel) {
            log::warn!("{}: no locks on this file system; let nothing else use the images", shown.display());
        }
        let writable = file.writable();
        let file: Arc<dyn HostFile> = if self.direct {
            DirectFile::over(file).map_or_else(|file| file as Arc<dyn HostFile>, |direct| Arc::new(direct))
        } else {
            file
        };
        let file = match &self.wrap {
            Some(wrap) => wrap(file),
            None => file,
        };
        let (heirs, writers) = (self.heirs.clone(), Mutex::new(0));
        Ok(Arc::new(HeldDelta { real, file, writable, lock, identity, heirs, writers, _lease: lease }))
    }
}

impl Opener for Deltas {
    fn open(&self, dir: BorrowedFd<'_>, file: &Path, shown: &Path, used: Use) -> Result<Opened> {
        let access = if self.read_only { Access::ReadOnly } else { Access::Widest };
        self.opened(RealFile::open_as(&dir, file, shown, access)?, shown, used)
    }

    fn used(&self) -> Use {
        Deltas::used(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    fn open(deltas: &Deltas, dir: &File, name: &str) -> Result<Opened> {
        deltas.open(dir.as_fd(), Path::new(name), Path::new(name), Use::Writer)
    }

    #[test]
    fn a_file_that_is_waited_for_keeps_no_other_from_being_opened() {
        let temp = tempfile::tempdir().expect("a folder");
        fs::write(temp.path().join("a"), "x").expect("written");
        fs::write(temp.path().join("b"), "x").expect("written");
        let dir = File::open(temp.path()).expect("opens");
        let deltas = Deltas::new(false, false, None, Arc::default());
        let a = temp.path().join("a").metadata().expect("there");
        let place = deltas.place_of((a.dev(), a.ino()));
        let waiting = locked(&place);
        std::thread::scope(|scope| {
            let (send, receive) = std::sync::mpsc::channel();
            let (deltas, dir) = (&deltas, &dir);
            scope.spawn(move || send.send(open(deltas, dir, "b").map(drop)));
            let opened = receive.recv_timeout(std::time::Duration::from_secs(10));
            drop(waiting);
            opened.expect("not behind the other file").expect("opens");
        });
    }

    #[test]
    fn one_file_under_two_names_is_opened_and_locked_once() {
        let temp = tempfile::tempdir().expect("a folder");
        fs::write(temp.path().join("a"), "x").expect("written");
        fs::hard_link(temp.path().join("a"), temp.path().join("b")).expect("linked");
        let dir = File::open(temp.path()).expect("opens");
        let deltas = Deltas::new(false, false, None, Arc::default());
        let (a, b) = (open(&deltas, &dir, "a").expect("opens"), open(&deltas, &dir, "b").expect("opens"));
        assert!(Arc::ptr_eq(&a.file, &b.file));
        let others = Deltas::new(false, false, None, Arc::default());
        assert!(open(&others, &dir, "b").is_err(), "another user is kept out");
        // A reader still looks at the file; the lock goes with the last user all the same.
        let looker = Arc::clone(&a.file);
        drop((a, b));
        open(&others, &dir, "a").expect("free again");
        drop(looker);
    }
}
