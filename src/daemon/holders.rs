//! Who keeps a mount busy: loop devices, and processes with open files, mappings or their working folder in it.
//!
//! Everything is read from `/sys` and `/proc` without touching the mount, so it works for a mount whose daemon is
//! busy, stopped or dead. It is called from the command line and from the keeper, never from the daemon.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::mounts::{self, Mount};
use crate::io::loopdev::{self, LoopDevice};
use crate::words::quoted;

/// One thing that keeps a mount busy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A loop device over a file of the mount.
    Loop(LoopDevice),
    /// A process.
    Process {
        /// Its id.
        pid: u32,
        /// Its name.
        name: String,
        /// What it uses; None: its working folder, its root or a mapping.
        file: Option<PathBuf>,
    },
    /// A mount that lies on this one.
    Mount(PathBuf),
}

impl Holder {
    /// The file of the mount that it uses, as far as that is known.
    pub fn file(&self) -> Option<&PathBuf> {
        match self {
            Holder::Loop(device) => Some(&device.backing),
            Holder::Process { file, .. } => file.as_ref(),
            Holder::Mount(_) => None,
        }
    }

    /// The command that ends it.
    pub fn remedy(&self) -> String {
        match self {
            Holder::Loop(device) => format!("ploopfs detach {}", quoted(&device.dev)),
            Holder::Process { pid, .. } => format!("kill {pid}"),
            Holder::Mount(point) => format!("umount {}", quoted(point)),
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Holder::Loop(device) => {
                write!(f, "{} (over {})", device.dev.display(), device.backing.display())
            }
            Holder::Process { pid, name, file: Some(file) } => {
                write!(f, "{name} (pid {pid}, has {} open)", file.display())
            }
            Holder::Process { pid, name, file: None } => write!(f, "{name} (pid {pid}, works in it)"),
            Holder::Mount(point) => write!(f, "a mount on {}", point.display()),
        }
    }
}

/// The loop devices over files below `point`.
pub fn loops_below(point: &Path) -> Vec<LoopDevice> {
    let mut found = loopdev::list().unwrap_or_default();
    found.retain(|device| device.backing.starts_with(point));
    found
}

/// The loop devices below `point` that serve one request at a time, because they go through the page cache.
pub fn without_direct_io(point: &Path) -> Vec<LoopDevice> {
    loops_below(point).into_iter().filter(|device| !device.direct_io).collect()
}

/// One line about a loop device without direct I/O, with the command that mends it.
pub fn direct_io_advice(device: &LoopDevice) -> String {
    format!(
        "{} over {} runs without direct I/O, one request at a time; switch it on: losetup --direct-io=on {}",
        device.dev.display(),
        device.backing.display(),
        quoted(&device.dev)
    )
}

/// All that keeps `mount` busy, as far as we may see it.
pub fn of(mount: &Mount) -> Vec<Holder> {
    let mut holders: Vec<Holder> = loops_below(&mount.point).into_iter().map(Holder::Loop).collect();
    let above =
        mounts::all().unwrap_or_default().into_iter().filter(|m| m.parent == mount.id && m.id != mount.id);
    holders.extend(above.map(|m| Holder::Mount(m.point)));
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let home = entry.path();
        let uses = uses_of(&home, mount);
        if !uses.is_empty() {
            let name = fs::read_to_string(home.join("comm")).unwrap_or_default();
            let process = |file| Holder::Process { pid, name: name.trim().to_owned(), file };
            holders.extend(uses.into_iter().map(process));
        }
    }
    holders
}

/// What the process with the folder `home` in /proc uses of the mount: open files, else (None) its working folder,
/// root or a mapping. Processes of others, which we may not look into, count as using nothing.
fn uses_of(home: &Path, mount: &Mount) -> BTreeSet<Option<PathBuf>> {
    let mut uses = BTreeSet::new();
    for fd in fs::read_dir(home.join("fdinfo")).into_iter().flatten().flatten() {
        let info = fs::read_to_string(fd.path()).unwrap_or_default();
        let on =
            info.lines().find_map(|line| line.strip_prefix("mnt_id:")).and_then(|id| id.trim().parse().ok());
        if on == Some(mount.id) {
            uses.insert(fs::read_link(home.join("fd").join(fd.file_name())).ok());
        }
    }
    let inside = |link: &str| fs::read_link(home.join(link)).is_ok_and(|to| to.starts_with(&mount.point));
    if uses.is_empty() && (inside("cwd") || inside("root") || maps(home, &mount.point)) {
        uses.insert(None);
    }
    uses
}

/// True when a mapped file lies below `point`.
fn maps(home: &Path, point: &Path) -> bool {
    let maps = fs::read(home.join("maps")).unwrap_or_default();
    let mut prefix = point.as_os_str().as_bytes().to_vec();
    prefix.push(b'/');
    maps.split(|b| *b == b'\n').any(|line| {
        let path = line.iter().position(|b| *b == b'/').map(|at| &line[at..]);
        path.is_some_and(|path| path.starts_with(&prefix))
    })
}
