//! What keeper and daemon say to each other over the daemon's standard input and output: one JSON object a line. The
//! input is a connection, because a descriptor comes with one of the lines.
//! The first line to the daemon is its [`Settings`](super::settings::Settings).

use std::io::{self, BufRead, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind};
use crate::io::heirs::Fixture;
use crate::io::holder::{HeldLock, Holder};

/// The longest line, in bytes. Holders of a mount are the longest, and they are cut to some ([`MAX_HOLDERS`]).
const MAX_LINE: u64 = 1 << 20;
/// How many holders are named: more are not read, and each has a path of up to 4 KiB.
pub const MAX_HOLDERS: usize = 64;

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
    /// Mount, please; once. Answered with [`Order::Mounted`] or [`Order::NotMounted`]. How and where is in the settings that
    /// the keeper has from the command line.
    Mount,
    /// Unmount, please; answered with [`Order::Unmounted`].
    Unmount {
        /// Detach the name even when files are open.
        detach: bool,
    },
    /// Who holds files open? Answered with [`Order::Holders`].
    Holders,
    /// Who has this lock? Answered with [`Order::Holder`].
    Holder(HeldLock),
    /// The answer to [`Order::Answer`]: requests of the keeper are heard.
    Alive,
    /// Something a person should hear of: run the program of `--on-event`.
    Event(Event),
}

/// From the daemon to its keeper over the daemon's standard input, the other way round: what is to outlive it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kept {
    /// An open file comes with this line.
    Keep {
        /// Device and inode.
        file: (u64, u64),
        /// It is for asking whether a sync has failed; else the one that is used.
        witness: bool,
    },
    /// What the mount has one of comes with this line.
    Fixture {
        /// What it is.
        what: Fixture,
    },
    /// The oldest witness is asked now: no other daemon will hear from it what this one may.
    Asks {
        /// Device and inode.
        file: (u64, u64),
    },
    /// None of it is needed any more.
    LetGo {
        /// Device and inode.
        file: (u64, u64),
    },
}

/// An event as `--on-event PROGRAM` gets it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// The image, or nothing where it is about the mount; the second argument (with `./` in front of a `-`) and PLOOPFS_IMAGE.
    pub image: String,
    /// What happened to it.
    pub what: What,
}

/// What can happen to an image; its word is the first argument and PLOOPFS_EVENT.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// The host has little free space.
    LowWater {
        /// Free bytes on the host (PLOOPFS_FREE).
        free: u64,
        /// All bytes on the host (PLOOPFS_TOTAL).
        total: u64,
    },
    /// The host is full.
    Full,
    /// There is space again.
    Space,
    /// The image is not written any more.
    ReadOnly {
        /// Why (PLOOPFS_REASON).
        reason: String,
    },
    /// Another daemon went on with the mount.
    Restarted {
        /// How often by now (PLOOPFS_RESTARTS).
        restarts: u64,
        /// How long requests waited, in milliseconds (PLOOPFS_PAUSE_MS).
        pause_ms: u64,
    },
}

/// From the keeper to the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// The connection to the kernel comes with this line; its first message waits in it, unless a daemon before has had it.
    Mounted {
        /// Of its file system, in the kernel's table of mounts.
        device: (u32, u32),
    },
    /// The ledger of the mount comes with this line, the first after the settings, where they ask for one.
    Ledger,
    /// One more descriptor of the connection comes with this line, before [`Order::Mounted`].
    Thread,
    /// An open file of the daemon before comes with this line, before [`Order::Mounted`].
    File {
        /// Device and inode.
        file: (u64, u64),
        /// It is for asking whether a sync has failed; else the one that was used.
        witness: bool,
    },
    /// What the mount has one of, as the daemon before had it, comes with this line, before [`Order::Mounted`].
    Fixture {
        /// What it is.
        what: Fixture,
    },
    /// It could not be mounted.
    NotMounted {
        /// Why.
        text: String,
        /// The exit status that the command should end with.
        status: u8,
    },
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
    /// It was replaced so often by now, and missed for so long at the last.
    Restarted {
        /// Daemons that went on with what another one had begun.
        restarts: u64,
        /// In milliseconds.
        pause_ms: u64,
    },
    /// Are you there? Answered with [`Note::Alive`].
    Answer,
}

/// A failed start in the words that go to the command line.
pub fn failure(e: &Error) -> Note {
    Note::Failed { text: e.to_string(), status: e.kind().exit_status() }
}

/// A failed start as another process reported it.
pub fn reported(text: String, status: u8) -> Error {
    let kinds = [Kind::Invalid, Kind::Damaged, Kind::InUse];
    let kind = kinds.into_iter().find(|kind| kind.exit_status() == status).unwrap_or(Kind::Io);
    Error::new(kind, text)
}

/// One line.
pub fn line(what: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    Ok(line)
}

/// Writes one line.
pub fn put(out: &mut impl Write, what: &impl Serialize) -> io::Result<()> {
    out.write_all(&line(what)?)?;
    out.flush()
}

/// Reads one line; None at the end. [`is_odd`] separates a line that was no such object, or too long, from a broken
/// connection: it is read to its end, and the next call reads the next.
pub fn get<T: DeserializeOwned>(from: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    from.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        skip_line(from)?;
        return Err(odd(format!("a line without an end within {MAX_LINE} bytes")));
    }
    serde_json::from_slice(&line).map(Some).map_err(|e| odd(e.to_string()))
}

/// True when the other side said something that is not understood, and may go on.
pub fn is_odd(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::InvalidData
}

fn odd(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn skip_line(from: &mut impl BufRead) -> io::Result<()> {
    loop {
        let piece = match from.fill_buf() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            piece => piece?,
        };
        let end = piece.iter().position(|b| *b == b'\n');
        let (len, over) = (end.map_or(piece.len(), |end| end + 1), end.is_some() || piece.is_empty());
        from.consume(len);
        if over {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_not_understood_or_too_long_is_passed_over() {
        let mut said =
            b"{\"event\": {\"image\": \"vm1\", \"what\": \"explode\"}}\n\"holders\"\n\xff\xfe\n\n".to_vec();
        said.resize(said.len() + 3 * usize::try_from(MAX_LINE).expect("small"), b'x');
        said.extend(b"\n\"holders\"\nhalf a li");
        let mut from = &said[..];
        let mut heard = Vec::new();
        loop {
            match get::<Note>(&mut from) {
                Ok(Some(note)) => heard.push(Some(note)),
                Ok(None) => break,
                Err(e) => {
                    assert!(is_odd(&e), "{e}");
                    heard.push(None);
                }
            }
        }
        let holders = || Some(Note::Holders);
        assert_eq!(heard, [None, holders(), None, None, None, holders(), None]);
    }
}
