//! Who keeps a mount busy: loop devices, and processes with open files, mappings or their working folder in it. And what
//! keeps its file system alive after it is unmounted: other mounts of it, here and in other mount namespaces, and overlays.
//!
//! Everything is read from `/sys` and `/proc` without touching the mount, so it works for a mount whose daemon is
//! busy, stopped or dead. It is called from the command line and from the keeper, never from the daemon.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::io::foreign;
use crate::io::loopdev::{self, LoopDevice};
use crate::io::mounts::{self, Mount};
use crate::io::namespaces::Everywhere;
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
    /// A second mount of the file system (a bind mount).
    Copy(PathBuf),
    /// A mount of the file system in another mount namespace (a container, a service with mounts of its own).
    Elsewhere {
        /// A process of that namespace.
        pid: u32,
        /// Its name.
        name: String,
        /// Where it is mounted there.
        point: PathBuf,
    },
    /// An overlay that takes files from it.
    Overlay {
        /// A process of the namespace in which it is mounted; None: ours.
        pid: Option<u32>,
        /// Where.
        point: PathBuf,
    },
}

impl Holder {
    /// The file of the mount that it uses, as far as that is known.
    pub fn file(&self) -> Option<&PathBuf> {
        match self {
            Holder::Loop(device) => Some(&device.backing),
            Holder::Process { file, .. } => file.as_ref(),
            _ => None,
        }
    }

    /// The command that ends it.
    pub fn remedy(&self) -> String {
        match self {
            Holder::Loop(device) => format!("ploopfs detach {}", quoted(&device.dev)),
            Holder::Process { pid, .. } => format!("kill {pid}"),
            Holder::Mount(point) | Holder::Copy(point) | Holder::Overlay { pid: None, point } => {
                format!("umount {}", quoted(point))
            }
            Holder::Elsewhere { pid, point, .. } | Holder::Overlay { pid: Some(pid), point } => {
                format!("nsenter -m -t {pid} umount {}", quoted(point))
            }
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
            Holder::Copy(point) => write!(f, "a bind mount at {}", point.display()),
            Holder::Elsewhere { pid, name, point } => {
                let point = point.display();
                write!(f, "another mount namespace, of {name} (pid {pid}), has it mounted at {point}")
            }
            Holder::Overlay { pid: None, point } => write!(f, "an overlay at {}", point.display()),
            Holder::Overlay { pid: Some(pid), point } => {
                write!(f, "an overlay at {} in the mount namespace of process {pid}", point.display())
            }
        }
    }
}

/// The loop devices over files of the mount at `point`, by whatever mount of its file system they came to them; each with
/// the path that the mount at `point` shows.
pub fn loops_below(point: &Path) -> Vec<LoopDevice> {
    let mut found = loopdev::list().unwrap_or_default();
    let table = mounts::all().unwrap_or_default();
    let mount = mounts::covering_in(&table, point).filter(|mount| mount.point == point);
    match mount {
        Some(mount) => found.retain_mut(|device| {
            let through = mounts::covering_in(&table, &device.backing);
            let shown = through.and_then(|through| shown_by(mount, through, &device.backing));
            let ours = shown.is_some();
            device.backing = shown.unwrap_or_default();
            ours
        }),
        None => found.retain(|device| device.backing.starts_with(point)),
    }
    found
}

/// The path under which `mount` shows what `through` shows as `path`; None where it is of another file system.
fn shown_by(mount: &Mount, through: &Mount, path: &Path) -> Option<PathBuf> {
    if through.device != mount.device {
        return None;
    }
    let inside = through.inside(path)?;
    // What lies outside of a folder that was bound is not shown by it.
    Some(inside.strip_prefix(&mount.root).map_or_else(|_| path.to_owned(), |rest| mount.point.join(rest)))
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

/// All that keeps `mount` busy, and its file system alive, as far as we may see it.
pub fn of(mount: &Mount) -> Vec<Holder> {
    let mut holders: Vec<Holder> = loops_below(&mount.point).into_iter().map(Holder::Loop).collect();
    let Ok(tables) = Everywhere::look() else { return holders };
    let above = tables.here.iter().filter(|m| m.parent == mount.id && m.id != mount.id);
    holders.extend(above.map(|m| Holder::Mount(m.point.clone())));
    holders.extend(keeping(mount, &tables));
    let same: Vec<&Mount> =
        tables.all().map(|(_, one)| one).filter(|one| one.is_of_file_system(mount)).collect();
    let mut seen = HashSet::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let uses = uses_of(&entry.path(), mount, &same);
        if !uses.is_empty() && seen.insert(pid) {
            let name = name_of(pid);
            let process = |file| Holder::Process { pid, name: name.clone(), file };
            holders.extend(uses.into_iter().map(process));
        }
    }
    holders
}

/// What keeps the file system of `mount` alive after that is unmounted, and does not make it busy: the kernel unmounts
/// then, and the daemon goes on.
pub fn beyond(mount: &Mount) -> Vec<Holder> {
    Everywhere::look().map(|tables| keeping(mount, &tables)).unwrap_or_default()
}

/// What keeps the file system of `mount` alive, which is gone: its other mounts, wherever they are.
pub fn of_file_system(mount: &Mount) -> Vec<Holder> {
    let Ok(tables) = Everywhere::look() else { return Vec::new() };
    tables
        .all()
        .filter(|(_, one)| one.is_of_file_system(mount))
        .map(|(pid, one)| copy(pid, one.clone()))
        .collect()
}

/// What keeps the file system of a folder alive whose mount point is gone: its other mounts, wherever they are.
pub fn of_folder(images: &Path) -> Vec<Holder> {
    let Ok(tables) = Everywhere::look() else { return Vec::new() };
    let ours = tables.all().filter(|(_, mount)| mount.is_ours() && mount.source == images);
    ours.map(|(pid, mount)| copy(pid, mount.clone())).collect()
}

fn copy(pid: Option<u32>, mount: Mount) -> Holder {
    match pid {
        None => Holder::Copy(mount.point),
        Some(pid) => Holder::Elsewhere { pid, name: name_of(pid), point: mount.point },
    }
}

fn keeping(mount: &Mount, tables: &Everywhere) -> Vec<Holder> {
    // What lies on the mount keeps it busy and is named as that.
    let staying = tables.staying(mount).into_iter().filter(|(_, one)| one.parent != mount.id);
    let mut found: Vec<Holder> = staying.map(|(pid, one)| copy(pid, one)).collect();
    for (pid, overlay) in tables.all() {
        let inside = |layer: &PathBuf| {
            let table =
                tables.others.iter().find(|ns| Some(ns.pid) == pid).map_or(&tables.here, |ns| &ns.mounts);
            mounts::covering_in(table, layer).is_some_and(|through| through.is_of_file_system(mount))
        };
        if overlay.layers().iter().any(inside) {
            found.push(Holder::Overlay { pid, point: overlay.point.clone() });
        }
    }
    found
}

/// The name of a process, as bytes that may be anything.
fn name_of(pid: u32) -> String {
    let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    String::from_utf8_lossy(name.trim_ascii_end()).into_owned()
}

/// What the process with the folder `home` in /proc uses of the mount: open files, else (None) its working folder,
/// root or a mapping. Processes of others, which we may not look into, count as using nothing.
fn uses_of(home: &Path, mount: &Mount, same: &[&Mount]) -> BTreeSet<Option<PathBuf>> {
    let mut uses = BTreeSet::new();
    for fd in fs::read_dir(home.join("fdinfo")).into_iter().flatten().flatten() {
        let info = fs::read(fd.path()).unwrap_or_default();
        let on = foreign::mount_id_in(&info);
        if let Some(through) = same.iter().find(|one| Some(one.id) == on) {
            let file = fs::read_link(home.join("fd").join(fd.file_name())).ok();
            uses.insert(file.map(|file| shown_by(mount, through, &file).unwrap_or(file)));
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
