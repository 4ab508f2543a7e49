//! Long work with images that clients ask for: one piece at a time for each image, on a thread of its own, so that it
//! goes on when the client goes away (docs/design.md#live-operations).

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};

use crate::control::protocol::Amount;
use crate::control::server::Peer;
use crate::error::{Error, Kind, Result};
use crate::folder::Folder;
use crate::io::process::spawn_detached;
use crate::progress::Progress;
use crate::sync::plain::lock;
use crate::vdisk::live::{Done, Work};

/// How often a client hears how far the work is: five times a second looks smooth to a person.
const REPORT_EVERY: Duration = Duration::from_millis(200);

/// What is under way, by image. A leaf.
type Table = Arc<Mutex<HashMap<String, Arc<Progress>>>>;

/// Does a piece of work with the image of this name; blocks.
pub(super) type Carry = Arc<dyn Fn(&str, &Work, &Progress) -> Result<Done> + Send + Sync>;

/// The work under way in one folder.
pub(super) struct Works {
    carry: Carry,
    /// Protects what is under way. A leaf.
    running: Table,
}

/// Takes an image's work out of the table, however it ends.
struct Running {
    table: Table,
    image: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        lock(&self.table).remove(&self.image);
    }
}

impl Works {
    /// Nothing is under way.
    pub(super) fn new(carry: Carry) -> Works {
        Works { carry, running: Table::default() }
    }

    /// The same, with the images of `folder`.
    pub(super) fn in_folder(folder: Arc<Folder>) -> Works {
        Works::new(Arc::new(move |name, work, progress| {
            folder.work(name, work, progress).map_err(|e| folder.named(e))
        }))
    }

    /// Begins `work` with the image `name`, and reports to `caller` how it goes. None: the caller went away; the work
    /// goes on. `rate` in bytes per second.
    pub(super) fn carry_out(
        &self,
        name: &str,
        work: Work,
        rate: Option<u64>,
        caller: &dyn Peer,
    ) -> Option<Result<Done>> {
        let progress = Arc::new(Progress::with_rate(rate));
        let running = match self.begin(name, &progress) {
            Ok(running) => running,
            Err(e) => return Some(Err(e)),
        };
        let (send, receive) = bounded(1);
        let (carry, watched) = (self.carry.clone(), progress.clone());
        let body = move || {
            let result = carry(&running.image, &work, &progress);
            match &result {
                Ok(_) => log::info!("{}: {} done", running.image, word(&work)),
                Err(e) => log::warn!("{}: {} ended: {e}", running.image, word(&work)),
            }
            // Out of the table before the answer, so that the client's next request finds the image free.
            drop(running);
            // The client may be gone.
            let _ = send.send(result);
        };
        if let Err(e) = spawn_detached("ploopfs/work", body) {
            return Some(Err(e));
        }
        loop {
            match receive.recv_timeout(REPORT_EVERY) {
                Ok(result) => return Some(result),
                Err(RecvTimeoutError::Disconnected) => {
                    return Some(Err(Error::new(Kind::Io, "the work was abandoned (see the log)")));
                }
                Err(RecvTimeoutError::Timeout) if caller.gone() => return None,
                Err(RecvTimeoutError::Timeout) => {
                    let (done, total) = watched.so_far();
                    caller.report(Amount { done, total });
                }
            }
        }
    }

    fn begin(&self, name: &str, progress: &Arc<Progress>) -> Result<Running> {
        let mut running = lock(&self.running);
        if running.contains_key(name) {
            let what = "another operation on this image is under way; wait until it has ended";
            return Err(Error::at(Kind::Busy, name, what));
        }
        running.insert(name.to_owned(), progress.clone());
        Ok(Running { table: self.running.clone(), image: name.to_owned() })
    }

    /// Asks the work with the image `name` to end.
    pub(super) fn cancel(&self, name: &str) -> Result<()> {
        let progress = lock(&self.running).get(name).cloned();
        let idle = || Error::at(Kind::NotFound, name, "nothing is under way with it");
        progress.ok_or_else(idle)?.cancel();
        Ok(())
    }
}

/// The work in a word, for the log.
fn word(work: &Work) -> &'static str {
    match work {
        Work::Snapshot { .. } => "snapshot",
        Work::Delete { .. } => "deleting a snapshot",
        Work::Merge { .. } => "merge",
        Work::Switch { .. } => "switch",
        Work::Clone { .. } => "clone",
        Work::Finish => "finishing what was begun",
        Work::Resize { .. } => "resize",
        Work::Compact { .. } => "compacting",
        Work::Track { .. } => "starting to track changes",
        Work::Untrack => "ending the tracking of changes",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::time::Instant;

    /// A client that hangs up once it has heard so many lines.
    #[derive(Default)]
    struct Client {
        heard: AtomicU64,
        stays: bool,
    }

    impl Peer for Client {
        fn gone(&self) -> bool {
            !self.stays && self.heard.load(Ordering::Relaxed) > 0
        }

        fn report(&self, progress: Amount) {
            // 0: on a busy machine the first line may come before the work knows.
            assert!(matches!(progress.total, 0 | 100), "{}", progress.total);
            self.heard.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Work that goes on until it is cancelled or `end` is set.
    fn endless(end: &Arc<AtomicBool>) -> Works {
        let end = end.clone();
        Works::new(Arc::new(move |_, _, progress| {
            progress.set_total(100);
            while !end.load(Ordering::Relaxed) {
                progress.check()?;
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(Done::default())
        }))
    }

    const GROW: Work = Work::Resize { size: 1 };

    fn idle_soon(works: &Works) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !lock(&works.running).is_empty() {
            assert!(Instant::now() < deadline, "the work is still in the table");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn work_goes_on_when_its_client_goes_away_and_the_image_stays_taken() {
        let end = Arc::new(AtomicBool::new(false));
        let works = endless(&end);
        assert!(works.carry_out("vm1", GROW, None, &Client::default()).is_none(), "the client went away");
        let second = works.carry_out("vm1", GROW, None, &Client::default()).expect("an answer");
        assert_eq!(second.expect_err("one at a time").kind(), Kind::Busy);
        assert!(works.carry_out("vm2", GROW, None, &Client::default()).is_none(), "another image is free");
        end.store(true, Ordering::Relaxed);
        idle_soon(&works);
        assert_eq!(works.cancel("vm1").expect_err("ended").kind(), Kind::NotFound);
    }

    #[test]
    fn cancelled_work_ends_and_its_client_hears_it() {
        let works = endless(&Arc::default());
        let client = Client { stays: true, ..Client::default() };
        let result = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| works.carry_out("vm1", GROW, None, &client));
            let deadline = Instant::now() + Duration::from_secs(20);
            while client.heard.load(Ordering::Relaxed) == 0 {
                assert!(Instant::now() < deadline, "no line about the progress");
                std::thread::sleep(Duration::from_millis(5));
            }
            works.cancel("vm1").expect("under way");
            waiting.join().expect("no panic")
        });
        assert_eq!(result.expect("an answer").expect_err("cancelled").kind(), Kind::Cancelled);
    }

    #[test]
    fn work_that_panics_is_an_error_and_leaves_the_image_free() {
        let works = Works::new(Arc::new(|_, _, _| panic!("a fault of ours")));
        let client = Client { stays: true, ..Client::default() };
        let result = works.carry_out("vm1", GROW, None, &client).expect("an answer");
        assert_eq!(result.expect_err("it panicked").kind(), Kind::Io);
        idle_soon(&works);
    }
}
