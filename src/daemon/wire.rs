//! What keeper and daemon say to each other over the daemon's standard input and output: one JSON object a line.
//! The first line to the daemon is its [`Settings`](super::settings::Settings).

use std::io::{self, BufRead, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::io::holder::{Held, Holder};

/// From the daemon to its keeper; the first of them also goes on to the command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Note {
    /// The mount works. `notes`: what was refused, to be said once.
    Ready {
        /// One sentence each.
        notes: Vec<String>,
    },
    /// The mount cannot be had; the daemon ends.
    Failed {
        /// Why.
        text: String,
        /// The exit status that the command should end with.
        status: u8,
    },
    /// Unmount, please; answered with [`Order::Unmounted`].
    Unmount {
        /// Detach the name even when files are open.
        detach: bool,
    },
    /// Who holds files open? Answered with [`Order::Holders`].
    Holders,
    /// Who has this lock? Answered with [`Order::Holder`].
    Holder(Held),
    /// Something a person should hear of: run the program of `--on-event`.
    Event(Event),
}

/// An event as `--on-event PROGRAM` gets it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// `low-water`, `full`, `space` or `read-only`; the first argument and PLOOPFS_EVENT.
    pub event: String,
    /// The image; the second argument and PLOOPFS_IMAGE.
    pub image: String,
    /// Free bytes on the host (PLOOPFS_FREE), with `low-water`.
    pub free: Option<u64>,
    /// All bytes on the host (PLOOPFS_TOTAL), with `low-water`.
    pub total: Option<u64>,
    /// Why (PLOOPFS_REASON), with `read-only`.
    pub reason: Option<String>,
}

/// From the keeper to the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// What became of the unmounting; None: done.
    Unmounted {
        /// Why not.
        error: Option<String>,
    },
    /// Who holds files of the mount open, in words.
    Holders(Vec<String>),
    /// The process that has the lock that was asked about.
    Holder(Option<Holder>),
    /// Something the keeper found that belongs into the log.
    Warn(String),
}

/// Writes one line.
pub fn put(out: &mut impl Write, what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    out.write_all(&line)?;
    out.flush()
}

/// Reads one line; None at the end.
pub fn get<T: DeserializeOwned>(from: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    from.read_until(b'\n', &mut line)?;
    if line.is_empty() { Ok(None) } else { Ok(Some(serde_json::from_slice(&line)?)) }
}
