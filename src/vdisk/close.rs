//! The end of an open image.

use std::any::Any;
use std::time::{Duration, Instant};

use super::{Image, Operating, Stage};
use crate::error::{Error, Kind, Result};
use crate::sync::{Arc, mpsc, thread};

/// How long a live operation has to see that the image closes: it looks before each cluster, and a step between two looks
/// is a sync at most. Short, since a stop that is forced has no time: what it costs is a scan at the next open.
const OPERATION_ENDS: Duration = Duration::from_secs(3);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(2);
/// How long the last sync may take beside an operation that does not end.
const LAST_SYNC: Duration = Duration::from_secs(3);

impl Image {
    /// Closes: fails what is parked for space, waits for what runs, syncs, cuts the tail, clears the in-use mark.
    /// Blocks. The image answers EIO afterwards. On error the in-use mark stays.
    pub fn close(self: &Arc<Self>) -> Result<()> {
        if !self.ends.begin_close() {
            return Ok(());
        }
        self.fail_parked(&self.closed_error());
        self.engine.no_clean_pages(self.id);
        // A live operation sees that the image closes, and ends.
        let Some(operating) = self.operation_ends() else { return self.close_beside_an_operation() };
        self.gate.shut();
        let synced = if self.stage() == Stage::ReadOnly { Ok(()) } else { self.flush_now() };
        let result = synced
            .and_then(|()| if self.stage() == Stage::Marked { operating.unmark_tracked() } else { Ok(()) });
        if let Err(e) = &result {
            self.fail(e);
        }
        self.stop_rounds();
        self.closed();
        result
    }

    /// True while an operation or a request is under way: also after a close that did not wait for it.
    pub fn is_busy(&self) -> bool {
        self.gate.inside() > 0 || self.operations.is_running()
    }

    /// Keeps the locks of a closed image until its last user is gone: what is under way in it may still write, and a
    /// new holder of those locks would have its files changed.
    pub fn keep(&self, locks: impl Any + Send + Sync) {
        // Once is enough: an image is closed once.
        let _ = self.kept.set(Box::new(locks));
    }

    /// What comes from now on, or came meanwhile, finds the image closed.
    fn closed(&self) {
        self.give_up_pages();
        self.ends.close();
        self.gate.take_outside().into_iter().for_each(|job| self.submit(job));
    }

    /// None: the operation did not end in time. A host that hangs may hold it for good.
    fn operation_ends(self: &Arc<Self>) -> Option<Operating<'_>> {
        let deadline = Instant::now() + OPERATION_ENDS;
        loop {
            match self.try_to_operate() {
                Some(operating) => return Some(operating),
                None if Instant::now() >= deadline => return None,
                None => thread::sleep(LOOK),
            }
        }
    }

    /// The end for an image whose operation does not end:
    /// 1. what was acknowledged is made durable, if the host does that in time;
    /// 2. the image is read-only, for the operation as well.
    ///
    /// Its mark stays, and its files stay open, and locked ([`keep`](Self::keep)), for as long as the operation has them. 2
    /// before 1 would fail that last sync. The gate is not waited for: the operation may be inside.
    fn close_beside_an_operation(self: &Arc<Self>) -> Result<()> {
        let (reply, synced) = mpsc::channel();
        self.flush(Box::new(move |result| {
            let _ = reply.send(result);
        })); // 1
        let e = match synced.recv_timeout(LAST_SYNC) {
            Ok(Err(e)) => e,
            synced => {
                let durable =
                    if synced.is_ok() { "is durable" } else { "may be lost: the host does not answer" };
                let why = format!(
                    "closed by force while an operation on it was running; what was written {durable}, and its in-use \
                     mark stays until it is opened again"
                );
                Error::at(Kind::Io, self.path(), why)
            }
        };
        self.fail(&e); // 2
        self.closed();
        Err(e)
    }
}
