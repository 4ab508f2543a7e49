//! The end of a mount, however it comes (DESIGN.md 8).
//!
//! - The connection ended (anyone's umount, and the last file closed): every image is closed, the daemon ends.
//! - SIGTERM, SIGINT or `stop` on the control socket: everything is synced. With no file open the mount is taken
//!   away and the first case follows. Else the daemon goes on, opens nothing new, says who holds on, and ends with
//!   the last close.
//! - A second one of these, or the end of `--stop-timeout`: every image is closed under its users, who get EIO.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::link::Link;
use super::log;
use super::settings::Settings;
use crate::control::protocol::Closed;
use crate::error::Result;
use crate::folder::Folder;
use crate::io::process::spawn_detached as spawn;

/// How often open files are looked at while they hold up the end.
const LOOK: Duration = Duration::from_millis(100);
/// How long the connection may take to end after an unmount that succeeded.
const LAST_MOMENTS: Duration = Duration::from_secs(2);
/// How long clients that were told the end may take to hear it.
const FAREWELL: Duration = Duration::from_secs(1);

/// What ends a mount, shared by all who may do it.
pub struct Ending {
    settings: Settings,
    folder: Arc<Folder>,
    link: Arc<Link>,
    requests: (Sender<&'static str>, Receiver<&'static str>),
    /// How every image was closed; None until it happened. Held while they are closed, so that it is done once;
    /// outermost: the folder's own locks are taken under it.
    closed: Mutex<Option<Vec<Closed>>>,
    over: Condvar,
}

impl Ending {
    /// Nothing happens until [`start`](Self::start).
    pub fn new(settings: Settings, folder: Arc<Folder>, link: Arc<Link>) -> Ending {
        let closed = Mutex::new(None);
        Ending { settings, folder, link, requests: bounded(8), closed, over: Condvar::new() }
    }

    /// Starts the thread that ends the mount when it is asked to.
    pub fn start(self: &Arc<Self>) -> Result<()> {
        let ending = self.clone();
        spawn("ploopfs/stop", move || ending.wait_for_request())
    }

    /// Asks for the end; a second time: forces it. `who` is for the log.
    pub fn request(&self, who: &'static str) {
        // Full: it was asked for often enough.
        let _ = self.requests.0.try_send(who);
    }

    /// Closes every image, once; whoever comes later gets the same answer.
    pub fn close_all(&self) -> Vec<Closed> {
        let mut closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(closed) = &*closed {
            return closed.clone();
        }
        let mut all = Vec::new();
        for (name, result) in self.folder.close_all() {
            let error = result.err().map(|e| e.to_string());
            if let Some(why) = &error {
                ::log::error!("{name}: not closed cleanly, its in-use mark stays: {why}");
            }
            all.push(Closed { name, error });
        }
        *closed = Some(all.clone());
        self.over.notify_all();
        all
    }

    /// Waits until every image was closed; None when `gone` became true before.
    pub fn wait_closed(&self, gone: &dyn Fn() -> bool) -> Option<Vec<Closed>> {
        let mut closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(closed) = &*closed {
                return Some(closed.clone());
            }
            let waited = self.over.wait_timeout(closed, Duration::from_millis(500));
            closed = waited.unwrap_or_else(PoisonError::into_inner).0;
            if closed.is_none() && gone() {
                return None;
            }
        }
    }

    /// The last thing a daemon does, after everything was closed: lets clients hear it, empties the log, ends.
    pub fn exit(&self, closed: &[Closed], clients: &dyn Fn() -> usize) -> ! {
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

    fn wait_for_request(&self) {
        let Ok(who) = self.requests.1.recv() else { return };
        let point = self.settings.mountpoint().display();
        ::log::info!("{point}: {who}: ending");
        self.folder.refuse_new_opens();
        self.sync_all();
        if self.drained() {
            if let Err(e) = self.link.unmount(&self.settings, false) {
                // Someone's working folder, most likely; no file is open and none can be opened.
                ::log::info!("{e}; detaching the mount point");
                self.detach();
            }
            // The thread of the connection sees its end and ends the process.
            thread::sleep(LAST_MOMENTS);
            ::log::info!("{point}: someone still looks at it, ending all the same");
        } else {
            self.close_all();
            self.detach();
        }
        let closed = self.close_all();
        self.exit(&closed, &|| 0);
    }

    /// Waits until no image is open. False: asked again, or the time is over.
    fn drained(&self) -> bool {
        let deadline = Instant::now() + self.settings.stop_timeout();
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
                ::log::warn!("{who} again: closing images that are open; their users get EIO");
                return false;
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
