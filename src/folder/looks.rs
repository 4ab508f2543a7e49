//! What is asked of the host about an image, its snapshots or the whole folder on behalf of those who must not wait.
//!
//! A host may take its time, or hang, below one image alone: another file system, a server that is gone. So a question
//! about an image is carried out on a thread of the engine, one at a time for each image; the thread that asked goes on, and
//! the answer finds its way from there. What hangs holds up who asks about that image, and one thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::entry::{Attributes, Entry};
use super::locked;
use super::set::Folder;
use super::snapshots::Snapshot;
use crate::error::{Error, Result};
use crate::io::holder::{self, HeldLock};

/// How long a look at all images waits for one whose host does not answer. What was known of it then has to do.
const PATIENCE: Duration = Duration::from_secs(1);

impl Entry {
    /// Runs `question` behind those that were asked about this image before, on a thread that may wait for its host.
    pub fn ask(self: &Arc<Self>, question: impl FnOnce(&Arc<Entry>) + Send + 'static) {
        let entry = self.clone();
        self.questions.submit(Box::new(move || question(&entry)));
    }

    /// What stat shows, for `done`. Never older than the call; those who ask at the same time share one look.
    pub fn attributes_later(self: &Arc<Self>, done: impl FnOnce(Attributes) + Send + 'static) {
        let now = Instant::now();
        self.ask(move |entry| {
            let known = locked(&entry.last).asked.is_some_and(|asked| asked >= now);
            done(if known { entry.known_attributes() } else { entry.attributes() });
        });
    }

    /// The snapshot of this name. Blocks.
    pub fn find_snapshot(&self, name: &[u8]) -> Result<Option<Snapshot>> {
        let is = |snapshot: &&Snapshot| snapshot.name.as_bytes() == name;
        let known = self.shared.snapshots.get(self.id());
        if let Some(found) = known.as_deref().and_then(|list| list.iter().find(is)) {
            return Ok(Some(found.clone()));
        }
        Ok(self.snapshots()?.iter().find(is).cloned())
    }
}

impl Folder {
    /// Asks the hosts of all images, all at the same time, so that what is known of them is of now. Waits a second at most:
    /// an image whose host hangs keeps what was known before. Not for threads of the engine or a transport.
    pub fn look_at_all(&self) {
        let (answered, all) = channel::<std::convert::Infallible>();
        for entry in self.entries() {
            // One that has not answered since the last time is not asked once more.
            if entry.asked.swap(true, Ordering::AcqRel) {
                continue;
            }
            let answered = answered.clone();
            entry.ask(move |entry| {
                entry.attributes();
                entry.asked.store(false, Ordering::Release);
                drop(answered);
            });
        }
        drop(answered);
        // Nothing is ever sent: the end of the last question ends the wait.
        if all.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            log::debug!("{}: the hosts of some images do not answer", self.path().display());
        }
    }

    /// Logs who holds the lock that `error` is about, once that is known; to be called when the error was answered. Does
    /// nothing with other errors. Never waits.
    pub fn name_later(&self, error: &Error, doing: &'static str) {
        let Some(held) = holder::unnamed(error) else { return };
        if self.wanted.enqueue(held, doing, error) {
            let wanted = self.wanted.clone();
            let log = |doing: &str, error: &Error| log::error!("{doing} failed: {error}");
            (self.shared.spawn)(Box::new(move || wanted.work(&HeldLock::holder, &log)));
        }
    }

    /// The same error with the name of who holds the lock, for a command that waits for it. Blocks; not for threads of the
    /// engine or a transport.
    pub fn named(&self, error: Error) -> Error {
        match holder::unnamed(&error) {
            Some(held) => holder::named(&error, self.wanted.look(held, &HeldLock::holder).as_ref()),
            None => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::folder::FolderOptions;
    use crate::vdisk::{Engine, Options};
    use std::sync::mpsc;

    fn folder_of(names: &[&str]) -> (tempfile::TempDir, Arc<Folder>) {
        let temp = tempfile::tempdir().expect("a folder");
        for name in names {
            std::fs::write(temp.path().join(name), [1; 4096]).expect("written");
        }
        let engine = Engine::new(Options::default(), Box::new(|_| {}));
        let folder = Folder::open(temp.path(), &engine, FolderOptions::default()).expect("opens");
        (temp, folder)
    }

    #[test]
    fn an_image_whose_host_hangs_holds_up_who_asks_about_it_and_no_other() {
        let (_temp, folder) = folder_of(&["a.raw", "b.raw"]);
        let [a, b] = ["a", "b"].map(|name| folder.find(name.as_ref()).expect("served"));
        let (open, gate) = mpsc::channel::<()>();
        a.ask(move |_| {
            let _ = gate.recv();
        });
        let (send, receive) = mpsc::channel();
        // More than the pool has threads.
        for _ in 0..100 {
            let send = send.clone();
            a.attributes_later(move |_| {
                let _ = send.send("a");
            });
        }
        b.attributes_later(move |_| {
            let _ = send.send("b");
        });
        let limit = Duration::from_secs(20);
        assert_eq!(receive.recv_timeout(limit), Ok("b"));
        // A look at all of them ends, and has what is known of the one that hangs.
        folder.look_at_all();
        assert_eq!(b.known_attributes().host.len, 4096);
        drop(open);
        assert_eq!(receive.iter().take(100).filter(|who| *who == "a").count(), 100);
    }
}
