//! Where fuser's thread of a session becomes ours: named, counted, and held until all are there (`sessions`).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

use crossbeam_channel::{Receiver, Sender};

use crate::fuse::ops::Ino;
use crate::io::connection::Slot;
use crate::io::process::name_this_thread;
use crate::sync::plain::lock;

/// The inode of the second message; the kernel's numbers begin with 1.
pub(super) const HELLO: Ino = 0;

/// What the thread of a session says.
pub(super) enum Said {
    /// It is there, and held.
    Here,
    /// It reads from the connection from now on, or cannot.
    Serves(io::Result<()>),
    /// It has ended.
    Ended(io::Result<()>),
}

/// Where a session's thread comes in.
#[derive(Default)]
pub(super) struct Door {
    /// Protects that it comes in once. A leaf.
    entrance: Mutex<Option<Entrance>>,
}

pub(super) struct Entrance {
    /// Numbers the thread's name.
    pub(super) number: usize,
    /// Where the session keeps its descriptor, and what belongs there.
    pub(super) slot: Slot,
    pub(super) connection: OwnedFd,
    pub(super) say: Sender<Said>,
    /// One message is the word to go on; the channel's end sends it home.
    pub(super) go: Receiver<()>,
}

impl Door {
    /// What the thread is to be given, before it starts.
    pub(super) fn open(&self, entrance: Entrance) {
        *lock(&self.entrance) = Some(entrance);
    }

    /// The session's thread, which is the caller, comes in: see `sessions`. Without a word to go on it reads the socket
    /// again, finds its other end closed, and ends.
    pub(super) fn enter(&self) {
        let Some(entrance) = lock(&self.entrance).take() else {
            return;
        };
        let Entrance { number, slot, connection, say, go } = entrance;
        // Only for ps and top: a refusal changes nothing.
        let _ = name_this_thread(&format!("ploopfs/t{number}"));
        let _ = say.send(Said::Here);
        if go.recv().is_ok() {
            let _ = say.send(Said::Serves(slot.put(connection)));
        }
    }
}
