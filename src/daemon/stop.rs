//! The end of a mount, however it comes (docs/design.md#ends).
//!
//! - The connection ended (an umount by any user, and the last file closed): every image is closed, the daemon ends.
//! - SIGTERM, SIGINT or `stop` on the control socket: everything is synced. With no file open the mount is taken
//!   away and the first case follows. Else the daemon goes on, opens nothing new, says who holds on, and ends with
//!   the last close.
//! - A second one of these, or the end of `--stop-timeout`: every image is closed under its users, who get EIO. What
//!   then is not closed in time (its host hangs, an operation holds it), or before a third one, is left with its in-use
//!   mark: the process ends.

use std::cell::Cell;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, select};

use super::link::Link;
use super::log;
use super::settings::Settings;
use crate::control::protocol::Closed;
use crate::error::{Kind, Result};
use crate::folder::Folder;
use crate::io::process::spawn_detached as spawn;
use crate::sync::plain::{lock, wait_timeout};

/// How often open files are looked at while they hold up the end.
const LOOK: Duration = Duration::from_millis(100);
/// How long the connection may take to end after an unmount that succeeded.
const LAST_MOMENTS: Duration = Duration::from_secs(2);
/// How long clients may take to read that the end has come.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long closing may take once the end is forced: all that is unsynced goes to the disk, at most 256 MiB an image.
/// Service managers give us as long ([`notify::stopping`](super::notify::stopping)).
pub(super) const CLOSING: Duration = Duration::from_secs(60);

/// What ends a mount, shared by all who may do it.
pub(super) struct Ending {
    settings: Settings,
    folder: Arc<Folder>,
    link: Arc<Link>,
    requests: (Sender<&'static str>, Receiver<&'static str>),
    /// Protects that the images are closed once. Not held while they are, which may take for ever. A leaf.
    images: Mutex<Images>,
    /// They are closed.
    over: Condvar,
}

/// What became of the images.
enum Images {
    Served,
    Closing,
    /// How each was closed.
    Closed(Vec<Closed>),
}

impl Ending {
    /// Nothing happens until [`start`](Self::start).
    pub(super) fn new(settings: Settings, folder: Arc<Folder>, link: Arc<Link>) -> Ending {
        let images = Mutex::new(Images::Served);
        Ending { settings, folder, link, requests: bounded(8), images, over: Condvar::new() }
    }

    fn images(&self) -> MutexGuard<'_, Images> {
        lock(&self.images)
    }

    /// Starts the thread that ends the mount when it is asked to.
    pub(super) fn start(self: &Arc<Self>) -> Result<()> {
        let ending = self.clone();
        spawn("ploopfs/stop", move || ending.wait_for_request())
    }

    /// Asks for the end; a second time: forces it. `who` is for the log.
    pub(super) fn request(&self, who: &'static str) {
        // Full: it was asked for often enough.
        let _ = self.requests.0.try_send(who);
    }

    /// Closes every image, once; a second caller waits for the first, and gets the same answer.
    pub(super) fn close_all(&self) -> Vec<Closed> {
        let begun = {
            let mut images = self.images();
            let served = matches!(*images, Images::Served);
            if served {
                *images = Images::Closing;
            }
            !served
        };
        if begun {
            // It never says no: nothing ends this wait but the answer.
            return self.wait_closed(&|| false).unwrap_or_default();
        }
        let mut all = Vec::new();
        for (name, result) in self.folder.close_all() {
            let error = result.err().map(|e| e.to_string());
            if let Some(why) = &error {
                ::log::error!("{name}: not closed cleanly, its in-use mark stays: {why}");
            }
            all.push(Closed { name, error });
        }
        *self.images() = Images::Closed(all.clone());
        self.over.notify_all();
        all
    }

    /// True once images are being closed.
    pub(super) fn is_closing(&self) -> bool {
        !matches!(*self.images(), Images::Served)
    }

    /// Waits until every image was closed; None when `gone` became true before.
    pub(super) fn wait_closed(&self, gone: &dyn Fn() -> bool) -> Option<Vec<Closed>> {
        let mut images = self.images();
        loop {
            if let Images::Closed(closed) = &*images {
                return Some(closed.clone());
            }
            images = wait_timeout(&self.over, images, Duration::from_millis(500)).0;
            if !matches!(*images, Images::Closed(_)) && gone() {
                return None;
            }
        }
    }

    /// Closes every image on a thread of its own, so that what hangs there does not hang here. None: not done in time; the
    /// time begins when the end is forced, now or by a request that comes meanwhile, and a further request ends it.
    fn close_in_time(self: &Arc<Self>, forced: bool) -> Option<Vec<Closed>> {
        let ending = self.clone();
        if spawn("ploopfs/closing", move || drop(ending.close_all())).is_err() {
            // No thread to be had: then here.
            return Some(self.close_all());
        }
        let deadline = Cell::new(forced.then(|| Instant::now() + CLOSING));
        self.wait_closed(&|| {
            if self.requests.1.try_recv().is_ok() {
                let patience = if deadline.get().is_none() { CLOSING } else { Duration::ZERO };
                deadline.set(Some(Instant::now() + patience));
            }
            deadline.get().is_some_and(|deadline| Instant::now() >= deadline)
        })
    }

    /// The last thing a daemon does, after everything was closed: lets clients hear it, empties the log, ends.
    pub(super) fn exit(&self, closed: &[Closed], clients: &dyn Fn() -> usize) -> ! {
        let deadline = Instant::now() + FAREWELL;
        while clients() > 0 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        let clean = closed.iter().all(|image| image.error.is_none());
        ::log::info!(
            "{}: ended{}",
            self.settings.mountpoint().display(),
            if clean { "" } else { ", not cleanly" }
        );
        log::flush();
        std::process::exit(if clean { 0 } else { 1 })
    }

    fn wait_for_request(self: &Arc<Self>) {
        let Ok(who) = self.requests.1.recv() else { return };
        let deadline = Instant::now() + self.settings.stop_timeout();
        let point = self.settings.mountpoint().display();
        ::log::info!("{point}: {who}: ending");
        self.folder.refuse_new_opens();
        let orderly = self.synced(deadline) && self.drained(deadline);
        if orderly {
            match self.link.unmount(&self.settings, false) {
                Ok(()) => self.let_connection_end(),
                // The keeper is gone, and the mount goes behind us: nothing to wait for.
                Err(e) if e.kind() == Kind::NotPermitted => ::log::warn!("{e}"),
                Err(e) => {
                    // A working folder in it, most likely; no file is open and none can be opened.
                    ::log::info!("{e}; detaching the mount point");
                    self.detach();
                    self.let_connection_end();
                }
            }
        }
        let closed = self.close_in_time(!orderly);
        if !orderly {
            self.detach();
        }
        match closed {
            Some(closed) => self.exit(&closed, &|| 0),
            None => {
                ::log::error!(
                    "{point}: images cannot be closed; ending without them, their in-use marks stay"
                );
                log::flush();
                std::process::exit(1)
            }
        }
    }

    /// After an unmount: the thread of the connection sees its end and ends the process.
    fn let_connection_end(&self) {
        thread::sleep(LAST_MOMENTS);
        if !self.is_closing() {
            let point = self.settings.mountpoint().display();
            ::log::info!("{point}: the connection has not ended (another mount of it?), ending all the same");
        }
    }

    /// Syncs every image, until `deadline` at most: a host that hangs must not keep the second request from being heard.
    /// False: asked again.
    fn synced(self: &Arc<Self>, deadline: Instant) -> bool {
        let (done, over) = bounded::<()>(1);
        let ending = self.clone();
        let body = move || {
            ending.sync_all();
            // Not waited for any more.
            let _ = done.send(());
        };
        if spawn("ploopfs/syncing", body).is_err() {
            // Closing syncs, too.
            return true;
        }
        select! {
            recv(over) -> _ => true,
            recv(self.requests.1) -> who => self.forced(who.unwrap_or("asked")),
            default(deadline.saturating_duration_since(Instant::now())) => true,
        }
    }

    /// Says that the end is forced.
    fn forced(&self, who: &str) -> bool {
        ::log::warn!("{who} again: closing images that are open; their users get EIO");
        false
    }

    /// Waits until no image is open. False: asked again, or the time is over.
    fn drained(&self, deadline: Instant) -> bool {
        let mut named = Vec::new();
        loop {
            let busy = self.folder.busy();
            if busy.is_empty() {
                return true;
            }
            if busy != named {
                self.name_holders(&busy);
                named = busy;
            }
            if let Ok(who) = self.requests.1.recv_timeout(LOOK) {
                return self.forced(who);
            }
            if Instant::now() >= deadline {
                let seconds = self.settings.stop_timeout_s;
                ::log::warn!("still open after {seconds} s: closing images; their users get EIO");
                return false;
            }
        }
    }

    fn name_holders(&self, busy: &[String]) {
        let who = self.link.holders();
        let who = if who.is_empty() { "unknown".to_owned() } else { who.join(", ") };
        ::log::warn!(
            "still open: {}; held by: {who}; going on until the last is closed (a second signal, or {} s, forces it)",
            busy.join(", "),
            self.settings.stop_timeout_s
        );
    }

    fn sync_all(&self) {
        for (name, result) in self.folder.sync_all() {
            if let Err(e) = result {
                ::log::error!("{name}: cannot sync: {e}");
            }
        }
    }

    fn detach(&self) {
        if let Err(e) = self.link.unmount(&self.settings, true) {
            ::log::error!("{e}");
        }
    }
}
