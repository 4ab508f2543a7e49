//! What a living daemon knows of a folder or an image, for the commands that look.

use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use crate::cli::{out, size};
use crate::control::client::Client;
use crate::control::protocol::{Hello, ImageLine};
use crate::daemon::holders::{self, Holder};
use crate::daemon::processes;
use crate::error::{Error, Kind, Result};
use crate::image::kind::in_text;
use crate::io::loopdev::{self, LoopDevice};
use crate::io::mounts::{self, Mount};
use crate::transfer::disk::FlatFile;
use crate::tree::SNAPSHOTS_NAME;
use crate::words::quoted;

/// How long a killed daemon may take until its mount is dead: the time of its last system call.
const LAST_THREADS: Duration = Duration::from_secs(2);

/// How long a close may be on its way to the daemon, with its sync.
const CLOSING: Duration = Duration::from_secs(2);
/// How often it is asked meanwhile.
const LOOK: Duration = Duration::from_millis(50);

/// The daemon of a folder, and where the folder is mounted.
#[derive(Debug)]
pub struct Daemon {
    /// The line to it.
    pub client: Client,
    /// Where it shows the folder.
    pub mountpoint: PathBuf,
    /// That mount in the kernel's table. None: in another namespace, or just being unmounted.
    pub mount: Option<Mount>,
    /// The folder, as it is called now.
    pub folder: PathBuf,
}

impl Daemon {
    /// Opens the flat file of an image, or of a snapshot of it, on the mount that the kernel knows, and nowhere else: what
    /// the daemon answers is made of names that others chose.
    pub fn open_shown(&self, image: &str, snapshot: Option<&str>) -> Result<FlatFile> {
        let inside = match snapshot {
            None => named(&self.mountpoint, &format!("{image}.img")).into(),
            Some(snapshot) => {
                let folder = named(&self.mountpoint.join(SNAPSHOTS_NAME), image);
                Path::new(SNAPSHOTS_NAME).join(folder).join(format!("{snapshot}.img"))
            }
        };
        let shown = self.mountpoint.join(&inside);
        let Some(mount) = &self.mount else {
            let what = "is not in the table of mounts here (another namespace?); its content cannot be read";
            return Err(Error::at(Kind::NotFound, &shown, what));
        };
        let file = mount.open(&inside, OFlags::RDONLY).map_err(|e| Error::io(&e, &shown, "cannot open"))?;
        FlatFile::of(file, &shown)
    }

    /// The flat file of the image that it calls `image`.
    pub fn shown(&self, image: &str) -> PathBuf {
        self.mountpoint.join(named(&self.mountpoint, &format!("{image}.img")))
    }

    /// The loop devices over its files.
    pub fn loops(&self) -> Vec<LoopDevice> {
        holders::loops_below(&self.mountpoint)
    }
}

/// How often a daemon was replaced, in words; None: never.
pub fn restarted(restarts: u64, last_pause_ms: u64) -> Option<String> {
    let times = size::count(restarts, "time");
    (restarts > 0).then(|| format!("{times}; the last time requests waited for {last_pause_ms} ms"))
}

/// True when `mount` is one of ours whose daemon died. Without a daemon on the socket its last threads may still be
/// about to end, so that is waited for. The socket is asked first: its answer is bounded in time, while a look at the
/// mount of a daemon that was stopped has no end. So a mount of another user is never looked at: it may answer never, and
/// its source may lead anywhere.
pub fn has_died(mount: &Mount) -> Result<bool> {
    if !mount.is_ours() || !mount.is_trusted() {
        return Ok(false);
    }
    let deadline = Instant::now() + LAST_THREADS;
    loop {
        // A mount may be dead while its folder is served elsewhere.
        if of_mount(mount)?.is_some() {
            return Ok(false);
        }
        if mount.is_dead() {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What is said of a mount whose daemon has died, with all that died with it and its ends; None: it lives, or cannot be asked.
pub fn of_dead(mount: &Mount) -> Option<String> {
    if !has_died(mount).is_ok_and(|died| died) {
        return None;
    }
    let mut what = format!("its daemon has died; to clear it: ploopfs umount {}", quoted(&mount.point));
    for holder in holders::of(mount) {
        // Writing into a String cannot fail.
        let _ = write!(what, "; still on it: {holder}; end that with: {}", holder.remedy());
    }
    Some(what)
}

/// Why nothing is known of `shown`, which lies in `mount`, while no daemon is found for it. The kernel goes on to know names for
/// a while: a path into a dead mount may be resolved all the same.
pub fn unanswered(mount: &Mount, shown: &Path) -> Error {
    match of_dead(mount) {
        Some(what) => Error::at(Kind::Io, &mount.point, what),
        None => Error::at(Kind::Io, shown, "the daemon of this mount does not answer"),
    }
}

/// The dead mounts of the folder `images`, each with what is said of it. A folder that is served has none.
pub fn dead_of(images: &Path) -> Vec<(PathBuf, String)> {
    let Ok(images) = images.canonicalize() else { return Vec::new() };
    let mut table = mounts::all().unwrap_or_default();
    table.retain(|mount| mount.is_ours() && mount.source == images);
    table.into_iter().filter_map(|mount| of_dead(&mount).map(|what| (mount.point, what))).collect()
}

/// The daemon of the folder `images`, if one serves it.
pub fn of_folder(images: &Path) -> Result<Option<Daemon>> {
    // A name without a folder in front has an empty parent.
    let images = if images.as_os_str().is_empty() { Path::new(".") } else { images };
    let images = images.canonicalize().map_err(|e| Error::io(&e, images, "cannot resolve the path"))?;
    let Some(client) = Client::find(&images)? else { return Ok(None) };
    let mount = mount_of(&client)?;
    // Mounted in another namespace, or just being unmounted: the daemon's own word, which is only shown.
    let mountpoint =
        mount.as_ref().map_or_else(|| PathBuf::from(&client.hello().mountpoint), |mount| mount.point.clone());
    Ok(Some(Daemon { client, mountpoint, mount, folder: images }))
}

/// True when `client` is the daemon of `mount`.
fn shows(client: &Client, mount: &Mount) -> bool {
    client.hello().device == Some(mount.device)
}

/// The mount of a daemon, in the kernel's table: made by root or by this user. The source of a mount is a path that may be
/// another folder's by now, so it is found by its file system's number.
pub fn mount_of(client: &Client) -> Result<Option<Mount>> {
    let mut mounts = mounts::all()?;
    mounts.retain(|mount| mount.is_ours() && shows(client, mount) && mount.is_trusted());
    // The number of one that has ended is given to the next.
    mounts.retain(|_| !client.hello().closing);
    // All of it, before a folder of it that was bound elsewhere.
    let whole = mounts.iter().rposition(|mount| mount.root == Path::new("/"));
    Ok(whole.map(|found| mounts.swap_remove(found)).or_else(|| mounts.pop()))
}

/// The daemon of `mount`, and the folder that it serves, as that is called now. It may have been renamed since, and another
/// folder have its name, with a daemon of its own, and images that are called the same.
pub fn of_mount(mount: &Mount) -> Result<Option<(PathBuf, Client)>> {
    let found = Client::find(&mount.source);
    let another = match found {
        Ok(Some(client)) if shows(&client, mount) => return Ok(Some((mount.source.clone(), client))),
        found => found.map(|_| None),
    };
    for pid in processes::daemons(&mount.source) {
        // The folder is among the first that it opens.
        for folder in processes::has_open(pid).into_iter().filter(|path| *path != mount.source) {
            if let Ok(Some(client)) = Client::find(&folder)
                && client.hello().pid == pid
                && shows(&client, mount)
            {
                return Ok(Some((folder, client)));
            }
        }
    }
    another
}

/// The images folder that `path` means (itself, or the one that is mounted there), and its daemon.
pub fn behind(path: &Path) -> Result<(PathBuf, Option<Daemon>)> {
    let point = mounts::resolve(path)?;
    let folder = match mounts::at(&point)? {
        Some(mount) if mount.is_ours() => {
            let mount = mount.trusted()?;
            if let Some((folder, client)) = of_mount(&mount)? {
                let daemon = Daemon { client, mountpoint: point, folder: folder.clone(), mount: Some(mount) };
                return Ok((folder, Some(daemon)));
            }
            mount.source
        }
        _ => path.to_owned(),
    };
    let daemon = if folder.exists() { of_folder(&folder)? } else { None };
    Ok((folder, daemon))
}

/// The name in the folder `dir` that is written as `text` ([`in_text`]); the text itself where there is none, or `dir` cannot
/// be read.
fn named(dir: &Path, text: &str) -> OsString {
    let written = |name: &OsString| in_text(name) == text;
    let name = || dir.read_dir().ok()?.flatten().map(|entry| entry.file_name()).find(written);
    // Only a name that is no text, or has a backslash, is written in another way.
    let other = text.contains('\\').then(name).flatten();
    other.unwrap_or_else(|| text.into())
}

/// A path that leads into a mount of ours.
pub struct InMount {
    /// Absolute, without links.
    pub path: PathBuf,
    /// Made by root or by this user.
    pub mount: Mount,
}

/// Where `shown` leads in a mount of ours; None where it leads elsewhere or nowhere. A mount whose daemon died is named, and one
/// of another user refused.
pub fn in_mount(shown: &Path) -> Result<Option<InMount>> {
    let path = match shown.canonicalize() {
        Ok(path) => path,
        Err(e) if e.raw_os_error() == Some(libc::ENOTCONN) => {
            let absolute = std::path::absolute(shown).unwrap_or_else(|_| shown.to_owned());
            let mount = mounts::covering(&absolute)?;
            let dead = mount.and_then(|mount| of_dead(&mount).map(|what| (mount.point, what)));
            return dead.map_or(Ok(None), |(point, what)| Err(Error::at(Kind::Io, point, what)));
        }
        Err(_) => return Ok(None),
    };
    let Some(mount) = mounts::covering(&path)?.filter(Mount::is_ours) else { return Ok(None) };
    Ok(Some(InMount { mount: mount.trusted()?, path }))
}

/// The image behind a flat file that a mount of ours shows, and which snapshot of it; None where `shown` is none.
pub fn source_of(shown: &Path) -> Result<Option<(PathBuf, Option<String>)>> {
    let Some(InMount { path, mount }) = in_mount(shown)? else { return Ok(None) };
    let none = || Error::at(Kind::Invalid, shown, "is no image of this mount");
    let inside = path.strip_prefix(&mount.point).map_err(|_| none())?;
    // NAME.img, or .snapshots/NAME/LABEL.img. A label is text; the name of an image may be any bytes.
    let (name, snapshot) = match (inside.strip_prefix(SNAPSHOTS_NAME), inside.components().count()) {
        (Ok(rest), 3) => (rest.parent(), rest.file_stem().and_then(OsStr::to_str)),
        (Err(_), 1) => (inside.file_stem().map(Path::new), None),
        _ => return Err(none()),
    };
    let name = name.filter(|_| inside.extension() == Some(OsStr::new("img"))).ok_or_else(none)?;
    let (name, snapshot) = (in_text(name.as_os_str()), snapshot.map(str::to_owned));
    let (folder, mut client) = of_mount(&mount)?.ok_or_else(|| unanswered(&mount, shown))?;
    let image = client.list()?.into_iter().find(|image| image.served && image.name == name);
    // Images lie in the folder, whatever the daemon says.
    let image = image.as_ref().and_then(|image| Path::new(&image.path).file_name()?.to_str());
    let image = named(&folder, image.ok_or_else(none)?);
    Ok(Some((folder.join(image), snapshot)))
}

/// The daemon that serves the image at `path` (a file or a layered image's folder), and what it says of it.
pub fn serving(path: &Path) -> Result<Option<(Daemon, ImageLine)>> {
    // "." and the like have a name only when resolved. One that was removed while it was open is not there.
    let resolved = match path.canonicalize() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => path.to_owned(),
        resolved => resolved.map_err(|e| Error::io(&e, path, "cannot resolve the path"))?,
    };
    let (Some(folder), Some(name)) = (resolved.parent(), resolved.file_name()) else { return Ok(None) };
    let Some(mut daemon) = of_folder(folder)? else { return Ok(None) };
    let name = in_text(name);
    let is_it = |image: &ImageLine| Path::new(&image.path).file_name() == Some(OsStr::new(&name));
    let found = daemon.client.list()?.into_iter().find(|image| image.served && is_it(image));
    Ok(found.map(|image| (daemon, image)))
}

/// True when the mount that serves the image at `path` has it open so that `counts`, and not only for a moment more: the
/// kernel sends a daemon the close after close(2) has returned, and a command's own close comes with a sync.
pub(crate) fn stays_open(path: &Path, counts: impl Fn(&ImageLine) -> bool) -> Result<bool> {
    let deadline = Instant::now() + CLOSING;
    while serving(path)?.is_some_and(|(_, image)| image.openers > 0 && counts(&image)) {
        if Instant::now() >= deadline {
            return Ok(true);
        }
        std::thread::sleep(LOOK);
    }
    Ok(false)
}

/// What a daemon says of one image, and who has it open.
#[derive(Debug)]
pub struct ServedImage {
    /// Process id of the daemon.
    pub pid: u32,
    /// The flat file that shows it.
    pub shown: PathBuf,
    /// What the image can do now.
    pub mode: String,
    /// What a person should know.
    pub reason: Option<String>,
    /// Who has it open, in words.
    pub openers: Vec<String>,
    /// What else it says of it.
    pub image: ImageLine,
    /// What it says of itself.
    pub daemon: Hello,
}

/// What a daemon says of the image in the file `path`; None where none serves it.
pub fn image(path: &Path) -> Result<Option<ServedImage>> {
    let Some((daemon, image)) = serving(path)? else { return Ok(None) };
    let openers = if image.openers > 0 { openers(&daemon, &image.name)? } else { Vec::new() };
    let shown = daemon.shown(&image.name);
    let hello = daemon.client.hello().clone();
    let (pid, mode, reason) = (hello.pid, image.mode.clone(), image.reason.clone());
    Ok(Some(ServedImage { pid, shown, mode, reason, openers, image, daemon: hello }))
}

fn openers(daemon: &Daemon, name: &str) -> Result<Vec<String>> {
    let shown = daemon.shown(name);
    let Some(mount) = mounts::at(&daemon.mountpoint)? else { return Ok(Vec::new()) };
    let mut found = holders::of(&mount);
    found.retain(|holder| holder.file() == Some(&shown));
    // By what they are, too: one may have come to the file by a mount that only another namespace has.
    for device in loopdev::over(&shown)? {
        let named = |holder: &Holder| matches!(holder, Holder::Loop(known) if known.number == device.number);
        if !found.iter().any(named) {
            found.push(Holder::Loop(device));
        }
    }
    Ok(found.iter().map(ToString::to_string).collect())
}

impl ServedImage {
    /// The lines of `info`.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        let mut row = |label: &str, value: &str| {
            // Writing into a String cannot fail.
            let _ = writeln!(text, "{:<13}{}", format!("{label}:"), out::printable(value));
        };
        row("shown as", &self.shown.to_string_lossy());
        row("served by", &format!("process {}", self.pid));
        if let Some(restarted) = restarted(self.daemon.restarts, self.daemon.last_pause_ms) {
            row("restarted", &restarted);
        }
        row("mode", &self.mode);
        if let Some(reason) = &self.reason {
            row("note", reason);
        }
        for opener in &self.openers {
            row("open by", opener);
        }
        text
    }
}
