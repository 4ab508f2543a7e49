//! The processes behind a mount, daemon and keeper, as /proc shows them: for a command that finds no socket, or no answer
//! on it. They carry their folder and their mount point on their command lines.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The two processes of one served folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The daemon.
    pub daemon: u32,
    /// Its keeper; None: it is gone.
    pub keeper: Option<u32>,
    /// The folder that they serve.
    pub images: PathBuf,
    /// Where it was mounted.
    pub mountpoint: PathBuf,
}

impl Pair {
    /// The one of them that was stopped (SIGSTOP, Ctrl-Z, a debugger), in words, and its process id.
    pub fn stopped(&self) -> Option<(&'static str, u32)> {
        let both = [("its daemon", Some(self.daemon)), ("its keeper", self.keeper)];
        let both = both.into_iter().filter_map(|(who, pid)| Some((who, pid?)));
        both.into_iter().find(|(_, pid)| is_stopped(*pid))
    }
}

/// The processes of the folder `images`.
pub fn serving(images: &Path) -> Option<Pair> {
    all().find(|pair| pair.images == images)
}

/// The processes of a mount of the folder `images` at `point`: where several folders had that path one after the other,
/// those that were started for this mount point.
pub fn behind(images: &Path, point: &Path) -> Option<Pair> {
    let all: Vec<Pair> = all().filter(|pair| pair.images == images).collect();
    let here = all.iter().position(|pair| pair.mountpoint == point);
    all.into_iter().nth(here.unwrap_or(0))
}

/// The daemons that were started for a folder which had the path `images` then.
pub fn daemons(images: &Path) -> impl Iterator<Item = u32> {
    all().filter(move |pair| pair.images == images).map(|pair| pair.daemon)
}

/// The paths, as they are now, of what a process has open, in the order in which it was opened; empty where it cannot be
/// seen.
pub fn has_open(pid: u32) -> Vec<PathBuf> {
    let home = PathBuf::from(format!("/proc/{pid}/fd"));
    let open = fs::read_dir(&home).into_iter().flatten().flatten();
    let mut open: Vec<u32> = open.filter_map(|fd| fd.file_name().to_str()?.parse().ok()).collect();
    open.sort_unstable();
    let paths = open.iter().filter_map(|fd| fs::read_link(home.join(fd.to_string())).ok());
    paths.filter(|path| path.is_absolute()).collect()
}

/// The processes that were started for the mount point `point`.
pub fn mounted_at(point: &Path) -> Option<Pair> {
    all().find(|pair| pair.mountpoint == point)
}

/// True while a process is stopped.
pub fn is_stopped(pid: u32) -> bool {
    // `12 (any bytes) T ...`
    let stat = fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
    let behind = stat.iter().rposition(|b| *b == b')').and_then(|at| stat.get(at + 2));
    matches!(behind, Some(b'T' | b't'))
}

/// The standby of the daemon `pair` ([`standby`](super::standby)).
pub fn standby_of(pair: &Pair) -> Option<u32> {
    let places_of = |home: &Path| places(home, "standby");
    each()
        .find(|(_, home)| {
            places_of(home).is_some_and(|of| of == (pair.images.clone(), pair.mountpoint.clone()))
        })
        .map(|(pid, _)| pid)
}

fn all() -> impl Iterator<Item = Pair> {
    each().filter_map(|(pid, home)| pair(pid, &home))
}

/// All processes, each with its folder in /proc.
fn each() -> impl Iterator<Item = (u32, PathBuf)> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
}

/// The folder and the mount point of the process with the folder `home` in /proc, if it is one of ours that does `what`.
fn places(home: &Path, what: &str) -> Option<(PathBuf, PathBuf)> {
    let line = fs::read(home.join("cmdline")).ok()?;
    let words: Vec<&[u8]> = line.split(|b| *b == 0).collect();
    let [program, does, images, point, ..] = words[..] else { return None };
    let path = |word| PathBuf::from(OsStr::from_bytes(word));
    let ours = program.ends_with(b"ploopfs") && does == what.as_bytes() && is_trusted(home);
    ours.then(|| (path(images), path(point)))
}

/// True for a process of root or ours. Any user may call one what he likes, also a set-uid program of root's, which is root's
/// in /proc, and which he may stop: so all of its user numbers count.
fn is_trusted(home: &Path) -> bool {
    let status = fs::read(home.join("status")).unwrap_or_default();
    let line = status.split(|b| *b == b'\n').find_map(|line| line.strip_prefix(b"Uid:"));
    let text = line.and_then(|line| std::str::from_utf8(line).ok()).unwrap_or_default();
    let own = rustix::process::geteuid().as_raw().to_string();
    ["0", &own].iter().any(|user| !text.is_empty() && text.split_whitespace().all(|one| one == *user))
}

/// The pair whose daemon is process `pid`, with the folder `home` in /proc.
fn pair(pid: u32, home: &Path) -> Option<Pair> {
    let (images, mountpoint) = places(home, "daemon")?;
    // A keeper that is gone was replaced by the process that takes in orphans: init, mostly.
    let keeper = parent(home).filter(|pid| *pid > 1 && names_us(*pid));
    Some(Pair { daemon: pid, keeper, images, mountpoint })
}

fn names_us(pid: u32) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|b| *b == 0).next().is_some_and(|program| program.ends_with(b"ploopfs"))
}

fn parent(home: &Path) -> Option<u32> {
    let status = fs::read(home.join("status")).ok()?;
    let mut lines = status.split(|b| *b == b'\n');
    let text = lines.find_map(|line| line.strip_prefix(b"PPid:"))?.trim_ascii();
    std::str::from_utf8(text).ok()?.parse().ok()
}
