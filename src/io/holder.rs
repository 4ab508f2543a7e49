//! Who has a lock, as /proc shows it. A message then names a process, and not just "somebody".
//!
//! A confined daemon may not look around in /proc; it asks its keeper ([`ask_instead`]).

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use super::lock::says_in_use;

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
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim_end().to_owned();
        let raw = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<_> =
            raw.split(|b| *b == 0).filter(|w| !w.is_empty()).map(String::from_utf8_lossy).collect();
        let command = words.join(" ").chars().take(200).collect();
        Some(Holder { pid, name, command })
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

/// A lock that somebody has, named by the file it is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Held {
    /// Byte ranges of a delta, which QEMU, the ploop tool and ploopfs take.
    Delta {
        /// Device of the delta.
        dev: u64,
        /// Its inode number.
        ino: u64,
    },
    /// The whole lock file of a descriptor.
    Descriptor {
        /// Inode number of the lock file. The device is left out: file systems show different ones in /proc/locks and
        /// in `stat`, and this only names a process in a message.
        ino: u64,
    },
}

/// Looks a holder up where the process itself may not.
pub type Lookup = Box<dyn Fn(Held) -> Option<Holder> + Send + Sync>;

static INSTEAD: OnceLock<Lookup> = OnceLock::new();

/// From now on this process looks nothing up itself. Once per process; a second call changes nothing.
pub fn ask_instead(lookup: Lookup) {
    let _ = INSTEAD.set(lookup);
}

impl Held {
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
        let pid = match self {
            Held::Delta { dev, ino } => {
                in_proc_locks(dev, ino, asker).or_else(|| in_proc_fdinfo(dev, ino, asker))
            }
            Held::Descriptor { ino } => of_whole_file(ino),
        };
        pid.and_then(Holder::of)
    }
}

/// Who uses the file, and what ends that; follows the file's name in a message.
pub(super) fn sentence(holder: Option<&Holder>) -> String {
    match holder {
        Some(holder) if holder.name.starts_with("ploopfs") => {
            format!("is in use by {holder}; `ploopfs umount` of its mount ends that")
        }
        Some(holder) => format!("is in use by {holder}; `kill {}` ends that", holder.pid),
        None => "is in use by another process; end that first".to_owned(),
    }
}

/// One line of /proc/locks, or of a "lock:" line in /proc/PID/fdinfo/N, if it speaks of this file's ranges.
/// The pid is None for OFD locks.
///
/// `12: OFDLCK ADVISORY  READ -1 fe:00:1234 200 204`; "->" after the number marks one that only waits.
fn holder_in_line(line: &str, dev: u64, ino: u64) -> Option<Option<u32>> {
    let words: Vec<&str> = line.split_whitespace().skip_while(|w| !w.ends_with(':')).skip(1).collect();
    let [kind @ ("POSIX" | "OFDLCK"), _, _, pid, place, first, last] = words[..] else { return None };
    let mut place = place.split(':');
    let mut hex = || place.next().and_then(|n| u32::from_str_radix(n, 16).ok());
    let (major, minor) = (hex()?, hex()?);
    let inode: u64 = place.next()?.parse().ok()?;
    // btrfs: the lock names the file system's device, `stat` the subvolume's; neither has a major number.
    let same_device = (major, minor) == (rustix::fs::major(dev), rustix::fs::minor(dev))
        || (major == 0 && rustix::fs::major(dev) == 0);
    let first: i64 = first.parse().ok()?;
    let last: i64 = last.parse().unwrap_or(i64::MAX);
    if !same_device || inode != ino || !says_in_use(first, last) {
        return None;
    }
    let pid = pid.parse().ok().filter(|_| kind == "POSIX");
    Some(pid)
}

/// POSIX locks (the ploop tool) name their process.
fn in_proc_locks(dev: u64, ino: u64, asker: u32) -> Option<u32> {
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().filter_map(|line| holder_in_line(line, dev, ino)).flatten().find(|pid| *pid != asker)
}

/// OFD locks (QEMU, ploopfs) name none; but the kernel lists under each descriptor the locks set through it.
/// Only fdinfo is read: looking at the files themselves could hang on a dead mount.
fn in_proc_fdinfo(dev: u64, ino: u64, asker: u32) -> Option<u32> {
    let pids = fs::read_dir("/proc").ok()?.flatten();
    let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.find(|pid| {
        *pid != asker && holds_through_a_descriptor(&PathBuf::from(format!("/proc/{pid}/fdinfo")), dev, ino)
    })
}

fn holds_through_a_descriptor(fdinfo: &Path, dev: u64, ino: u64) -> bool {
    let Ok(entries) = fs::read_dir(fdinfo) else { return false };
    entries.flatten().any(|entry| {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let mut locks = text.lines().filter_map(|line| line.strip_prefix("lock:"));
        locks.any(|line| holder_in_line(line, dev, ino).is_some())
    })
}

/// `7: FLOCK  ADVISORY  WRITE 1234 fe:01:5678 0 EOF`.
fn of_whole_file(ino: u64) -> Option<u32> {
    let ending = format!(":{ino}");
    fs::read_to_string("/proc/locks").ok()?.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [_, "FLOCK", _, "WRITE", pid, place, ..] if place.ends_with(&ending) => pid.parse().ok(),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc_locks_are_read_for_device_inode_range_and_process() {
        let dev = rustix::fs::makedev(0xfe, 1);
        let line = |s| holder_in_line(s, dev, 1234);
        assert_eq!(line("1: POSIX  ADVISORY  READ 77 fe:01:1234 200 204"), Some(Some(77)));
        assert_eq!(line("\t9: OFDLCK ADVISORY  READ -1 fe:01:1234 201 201"), Some(None));
        assert_eq!(line("9: OFDLCK ADVISORY  WRITE -1 fe:01:1234 0 EOF"), Some(None));
        assert_eq!(line("1: POSIX  ADVISORY  READ 77 fe:02:1234 200 204"), None, "another device");
        assert_eq!(line("1: POSIX  ADVISORY  READ 77 fe:01:1235 200 204"), None, "another file");
        assert_eq!(line("1: POSIX  ADVISORY  READ 77 fe:01:1234 100 100"), None, "reading alone");
        assert_eq!(line("2: -> POSIX  ADVISORY  READ 77 fe:01:1234 200 204"), None, "only waits");
        assert_eq!(line("3: FLOCK  ADVISORY  WRITE 77 fe:01:1234 0 EOF"), None, "another sort of lock");
        let subvolume = rustix::fs::makedev(0, 50);
        let other = "9: OFDLCK ADVISORY  READ -1 00:2f:1234 200 204";
        assert_eq!(holder_in_line(other, subvolume, 1234), Some(None), "btrfs");
    }
}
