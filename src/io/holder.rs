//! Who has a lock, as /proc shows it. A message then names a process, and does not only say that there is one.
//!
//! A confined daemon may not look around in /proc; it asks its keeper ([`ask_instead`]).

use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use crate::{Error, Kind};

/// What a delta is locked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Use {
    /// Its content is read and must not change. Any number at a time.
    Reader,
    /// It may be changed. One, and no reader beside it.
    Writer,
}

/// A process that holds a lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Process id.
    pub pid: u32,
    /// The name the kernel knows it by (at most 15 characters).
    pub name: String,
    /// Its command line, cut to 200 characters; empty where it cannot be read.
    pub command: String,
}

impl Holder {
    /// The process with this id; None if there is none.
    pub(super) fn of(pid: u32) -> Option<Holder> {
        let name = fs::read(format!("/proc/{pid}/comm")).ok()?;
        let name = String::from_utf8_lossy(name.trim_ascii_end()).into_owned();
        let raw = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<_> =
            raw.split(|b| *b == 0).filter(|w| !w.is_empty()).map(String::from_utf8_lossy).collect();
        let command = words.join(" ").chars().take(200).collect();
        Some(Holder { pid, name, command })
    }

    /// True for the daemon of a mount, as its command line says: `ploopfs daemon IMAGES MOUNTPOINT`; and for its keeper, which
    /// may keep its locks. A command that works on an image has no mount to take away.
    fn serves(&self) -> bool {
        self.name.starts_with("ploopfs")
            && matches!(self.command.split(' ').nth(1), Some("daemon" | "keeper"))
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {}", self.name, self.pid)?;
        if !self.command.is_empty() {
            write!(f, ": {}", self.command)?;
        }
        f.write_str(")")
    }
}

/// A lock that a process has, named by the file it is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeldLock {
    /// Byte ranges of a delta, which QEMU, the ploop tool and ploopfs take.
    Delta {
        /// Device of the delta.
        dev: u64,
        /// Its inode number.
        ino: u64,
        /// What it was wanted for: a reader is not kept out by other readers.
        used: Use,
    },
    /// The whole lock file of a descriptor.
    Descriptor {
        /// Inode number of the lock file. The device is left out: file systems show different ones in /proc/locks and
        /// in `stat`, and this only names a process in a message.
        ino: u64,
    },
}

/// Looks a holder up where the process itself may not.
pub type HolderLookup = Box<dyn Fn(HeldLock) -> Option<Holder> + Send + Sync>;

static INSTEAD: OnceLock<HolderLookup> = OnceLock::new();

/// From now on this process looks nothing up itself. Once per process; a second call changes nothing.
pub fn ask_instead(lookup: HolderLookup) {
    let _ = INSTEAD.set(lookup);
}

impl HeldLock {
    /// The process that has the lock. None if it is hidden (another container, another host), or, for a delta, if it
    /// is this process.
    pub fn holder(self) -> Option<Holder> {
        match INSTEAD.get() {
            Some(ask) => ask(self),
            None => self.look_up(std::process::id()),
        }
    }

    /// The same, looked up in /proc for the process `asker`.
    pub fn look_up(self, asker: u32) -> Option<Holder> {
        // A keeper that looks for its daemon has the daemon's open files itself.
        let own = [asker, std::process::id()];
        let pid = match self {
            HeldLock::Delta { dev, ino, used } => {
                let delta = Delta { dev, ino, used };
                delta.in_proc_locks(own).or_else(|| delta.in_proc_fdinfo(own))
            }
            HeldLock::Descriptor { ino } => of_whole_file(ino, own),
        };
        pid.and_then(Holder::of)
    }
}

/// The source of an error about a lock whose holder is still to be looked for: see [`name_later`].
#[derive(Debug)]
struct Unnamed(HeldLock);

impl fmt::Display for Unnamed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("who holds it was not looked for")
    }
}

impl std::error::Error for Unnamed {}

/// Errors are to be made without a look at who holds the lock.
static LATER: AtomicBool = AtomicBool::new(false);

/// From now on an error is made without a look for the holder: that takes as long as /proc is large or the keeper slow, and
/// a thread that tried a lock holds others up meanwhile. The error then leads to the lock ([`unnamed`]), and can be
/// made again with a name ([`named`]).
pub fn name_later() {
    LATER.store(true, Ordering::Relaxed);
}

/// "`path` is in use", and by which process, unless that is for later.
pub(super) fn in_use(held: Option<HeldLock>, path: &Path) -> Error {
    match held {
        Some(held) if LATER.load(Ordering::Relaxed) => {
            Error::at(Kind::InUse, path, sentence(None)).because(Unnamed(held))
        }
        held => Error::at(Kind::InUse, path, sentence(held.and_then(HeldLock::holder).as_ref())),
    }
}

/// The lock that `error` is about, whose holder is still to be looked for.
pub fn unnamed(error: &Error) -> Option<HeldLock> {
    let source = std::error::Error::source(error)?;
    source.downcast_ref::<Unnamed>().map(|unnamed| unnamed.0)
}

/// The same error, now that it is known who holds the lock, or that it cannot be found out.
pub fn named(error: &Error, holder: Option<&Holder>) -> Error {
    Error::at(error.kind(), error.file().unwrap_or(Path::new("")), sentence(holder))
}

/// Who uses the file, and what ends that; follows the file's name in a message.
pub(super) fn sentence(holder: Option<&Holder>) -> String {
    match holder {
        Some(holder) if holder.serves() => {
            format!("is in use by {holder}; `ploopfs umount` of its mount ends that")
        }
        Some(holder) if holder.name.starts_with("ploopfs") => {
            format!("is in use by {holder}; try again when that has ended")
        }
        Some(holder) => format!("is in use by {holder}; `kill {}` ends that", holder.pid),
        None => "is in use by another process; end that first".to_owned(),
    }
}

/// A delta, and what it was wanted for.
#[derive(Clone, Copy)]
struct Delta {
    dev: u64,
    ino: u64,
    used: Use,
}

impl Delta {
    /// One line of /proc/locks, or of a "lock:" line in /proc/PID/fdinfo/N, if it speaks of this file's ranges and
    /// keeps the asker out. The pid is None for OFD locks.
    ///
    /// `12: OFDLCK ADVISORY  READ -1 fe:00:1234 200 204`; "->" after the number marks one that only waits.
    fn holder_in_line(self, line: &str) -> Option<Option<u32>> {
        let words: Vec<&str> = line.split_whitespace().skip_while(|w| !w.ends_with(':')).skip(1).collect();
        let [kind @ ("POSIX" | "OFDLCK"), _, _, pid, place, first, last] = words[..] else { return None };
        let mut place = place.split(':');
        let mut hex = || place.next().and_then(|n| u32::from_str_radix(n, 16).ok());
        let (major, minor) = (hex()?, hex()?);
        let inode: u64 = place.next()?.parse().ok()?;
        // btrfs: the lock names the file system's device, `stat` the subvolume's; neither has a major number.
        let same_device = (major, minor) == (rustix::fs::major(self.dev), rustix::fs::minor(self.dev))
            || (major == 0 && rustix::fs::major(self.dev) == 0);
        let first: i64 = first.parse().ok()?;
        let last: i64 = last.parse().unwrap_or(i64::MAX);
        if !same_device || inode != self.ino || !self.used.is_kept_out_by(first, last) {
            return None;
        }
        let pid = pid.parse().ok().filter(|_| kind == "POSIX");
        Some(pid)
    }

    /// POSIX locks (the ploop tool) name their process.
    fn in_proc_locks(self, own: [u32; 2]) -> Option<u32> {
        let locks = fs::read_to_string("/proc/locks").ok()?;
        locks.lines().filter_map(|line| self.holder_in_line(line)).flatten().find(|pid| !own.contains(pid))
    }

    /// OFD locks (QEMU, ploopfs) name none; but the kernel lists under each descriptor the locks set through it.
    fn in_proc_fdinfo(self, own: [u32; 2]) -> Option<u32> {
        in_proc_fdinfo(own, &|line| self.holder_in_line(line).is_some())
    }
}

/// The process with a descriptor whose lock `is_it`. Only fdinfo is read: looking at the files themselves could hang on a dead
/// mount.
fn in_proc_fdinfo(own: [u32; 2], is_it: &dyn Fn(&str) -> bool) -> Option<u32> {
    let has_it = |pid: &u32| {
        let entries = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            text.lines().filter_map(|line| line.strip_prefix("lock:")).any(is_it)
        })
    };
    let pids = fs::read_dir("/proc").ok()?.flatten();
    let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.find(|pid| !own.contains(pid) && has_it(pid))
}

/// `7: FLOCK  ADVISORY  WRITE 1234 fe:01:5678 0 EOF`. One that has it alone comes before those that share it. The process is
/// the one that took it: where that has ended and left the open file to another, it is not listed so.
fn of_whole_file(ino: u64, own: [u32; 2]) -> Option<u32> {
    let ending = format!(":{ino}");
    let taker = |line: &str, mode: &str| -> Option<u32> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [_, "FLOCK", _, kind, pid, place, ..] if kind == mode && place.ends_with(&ending) => {
                pid.parse().ok()
            }
            _ => None,
        }
    };
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let holder = |mode: &str| locks.lines().find_map(|line| taker(line, mode)).filter(|pid| *pid != 0);
    let heir = || in_proc_fdinfo(own, &|line| taker(line, "WRITE").is_some());
    holder("WRITE").or_else(|| holder("READ").filter(|pid| !own.contains(pid))).or_else(heir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc_locks_are_read_for_device_inode_range_and_process() {
        let delta = |dev, used| Delta { dev, ino: 1234, used };
        let line = |s| delta(rustix::fs::makedev(0xfe, 1), Use::Writer).holder_in_line(s);
        assert_eq!(line("1: POSIX  ADVISORY  READ 77 fe:01:1234 200 204"), Some(Some(77)));
        assert_eq!(line("\t9: OFDLCK ADVISORY  READ -1 fe:01:1234 201 201"), Some(None));
        assert_eq!(line("9: OFDLCK ADVISORY  WRITE -1 fe:01:1234 0 EOF"), Some(None));
        assert_eq!(line("1: POSIX  ADVISORY  READ 77 fe:02:1234 200 204"), None, "another device");
        assert_eq!(line("1: POSIX  ADVISORY  READ 77 fe:01:1235 200 204"), None, "another file");
        assert_eq!(line("1: POSIX  ADVISORY  READ 77 fe:01:1234 100 100"), None, "reading alone");
        assert_eq!(line("2: -> POSIX  ADVISORY  READ 77 fe:01:1234 200 204"), None, "only waits");
        assert_eq!(line("3: FLOCK  ADVISORY  WRITE 77 fe:01:1234 0 EOF"), None, "another sort of lock");
        let other = "9: OFDLCK ADVISORY  READ -1 00:2f:1234 200 204";
        let subvolume = delta(rustix::fs::makedev(0, 50), Use::Writer);
        assert_eq!(subvolume.holder_in_line(other), Some(None), "btrfs");
        let reader = |s| delta(rustix::fs::makedev(0xfe, 1), Use::Reader).holder_in_line(s);
        assert_eq!(reader("9: OFDLCK ADVISORY  READ -1 fe:01:1234 201 204"), None, "another reader");
        assert_eq!(reader("9: OFDLCK ADVISORY  READ -1 fe:01:1234 200 204"), Some(None), "a writer");
        assert_eq!(
            reader("9: OFDLCK ADVISORY  READ -1 fe:01:1234 101 101"),
            Some(None),
            "a QEMU that writes"
        );
    }
}
