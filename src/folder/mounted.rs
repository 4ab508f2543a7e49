//! Entries of the folder on which another file system is mounted. That one may not answer, its server being stopped, gone or
//! hostile, and a question that it does not answer has no end. So each of them is asked on a thread of its own, which is
//! waited for a moment. The other images of the folder are what the look is for.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fs::{AtFlags, StatxFlags};

use super::locked;
use crate::io::foreign::mount_id;
use crate::io::process::spawn_detached;

/// How long a look at the folder waits for one such file system: a disk that wakes up answers in some seconds, and is there
/// at the next look; a look that a client waits for should not take longer than this.
const PATIENCE: Duration = Duration::from_secs(1);

/// Those that owe an answer, by the kernel's number of the mount. Each has one thread that waits. A leaf.
#[derive(Default)]
pub(super) struct Silent(Arc<Mutex<HashSet<u64>>>);

/// The number of the mount on which the entry `name` of `dir` lies, where that is another one than the folder's own. Asks
/// neither file system for anything.
pub(super) fn other_mount(dir: &OwnedFd, name: &OsStr) -> Option<u64> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(dir, name, flags, StatxFlags::MNT_ID).ok()?;
    let known = stat.stx_mask & StatxFlags::MNT_ID.bits() != 0;
    // Before Linux 5.8 nothing is known, and all are asked directly.
    (known && mount_id(dir).ok()? != stat.stx_mnt_id).then_some(stat.stx_mnt_id)
}

impl Silent {
    /// The answer of `ask`, which is given the folder, from the file system `mount`. None: it has none at the moment.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        dir: &OwnedFd,
        mount: u64,
        name: &OsStr,
        ask: impl FnOnce(&OwnedFd) -> T + Send + 'static,
    ) -> Option<T> {
        let dir = dir.as_fd().try_clone_to_owned().ok()?;
        if !locked(&self.0).insert(mount) {
            return None;
        }
        let (send, receive) = channel();
        let owing = self.0.clone();
        let body = move || {
            let answer = ask(&dir);
            locked(&owing).remove(&mount);
            // Too late: the next look asks again.
            drop(send.send(answer));
        };
        if spawn_detached("ploopfs/mounted", body).is_err() {
            locked(&self.0).remove(&mount);
            return None;
        }
        match receive.recv_timeout(PATIENCE) {
            Ok(answer) => Some(answer),
            Err(RecvTimeoutError::Timeout) => {
                log::warn!(
                    "{}: the file system that is mounted there does not answer; it is left out until it does",
                    name.display()
                );
                None
            }
            // Its thread ended otherwise.
            Err(RecvTimeoutError::Disconnected) => {
                locked(&self.0).remove(&mount);
                None
            }
        }
    }
}
