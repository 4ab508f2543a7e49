//! `ploopfs list`: the images of a folder, and what its daemon says of them where one serves it.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::cli::{Outcome, out, served, size, target};
use crate::control::protocol::ImageLine;
use crate::daemon::holders;
use crate::disk::layered::Layered;
use crate::error::{Error, Kind};
use crate::image::chain::Candidate;
use crate::image::kind::{self, Class, DESCRIPTOR, NAMED_BY_DESCRIPTOR, in_text};
use crate::io::loopdev::LoopDevice;
use crate::io::mounts::{self, Mount};
use crate::io::process::spawn_detached;
use crate::words;

/// A descriptor larger than this (in bytes) names no files; ploop's own are some KiB.
const MAX_DESCRIPTOR: u64 = 16 << 20;

/// How long the daemons of all mounts have to answer: far longer than one of them needs that is alive.
const PATIENCE: Duration = Duration::from_secs(5);

/// stat(2) counts blocks of this many bytes, whatever the file system's own are.
const SECTOR: u64 = 512;

/// The kind of an image with a descriptor.
const LAYERED: &str = "layered";

/// Arguments of `list`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder, or where it is mounted [default: this folder's images, and those of all mounts]
    #[arg(value_name = "IMAGES|MOUNTPOINT")]
    folder: Option<PathBuf>,
    /// Also name what is no image, and say why
    #[arg(long)]
    all: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One image; the fields of `--json`.
#[derive(Debug, Default, Serialize)]
struct Row {
    name: String,
    path: String,
    kind: Cow<'static, str>,
    /// Disk size in bytes; none where the image cannot be read.
    size: Option<u64>,
    /// Space taken on the host, in bytes.
    allocated: u64,
    served: bool,
    /// Why it is not served; none for a good image.
    reason: Option<String>,
    /// What it can do now; none where no daemon serves it.
    #[serde(skip_serializing_if = "Option::is_none")]
    mode: Option<String>,
    /// The loop devices over it.
    loops: Vec<Attached>,
}

/// A loop device over an image.
#[derive(Debug, Serialize)]
struct Attached {
    device: PathBuf,
    direct_io: bool,
    /// The line that switches direct I/O on, where it is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

/// What is no image.
#[derive(Debug, Serialize)]
struct Other {
    path: String,
    reason: String,
}

#[derive(Debug, Default, Serialize)]
struct Listing {
    images: Vec<Row>,
    /// Only with `--all`.
    #[serde(skip_serializing_if = "Option::is_none")]
    others: Option<Vec<Other>>,
    /// Only where no folder was named.
    #[serde(skip_serializing_if = "Option::is_none")]
    mounts: Option<Vec<Mounted>>,
}

/// A mount of ours.
#[derive(Debug, Serialize)]
struct Mounted {
    mountpoint: String,
    /// The images folder.
    folder: String,
    images: Vec<Row>,
    /// Why nothing is known of its images.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let listing = match &args.folder {
        Some(folder) => of(folder, args.all)?.1,
        None => of_all(args.all)?,
    };
    if args.json {
        out::json(&listing)?;
        return Ok(Outcome::Done);
    }
    if listing.images.is_empty() && listing.mounts.as_ref().is_none_or(Vec::is_empty) {
        let folder = args.folder.as_deref().unwrap_or(Path::new("."));
        let nor = if args.folder.is_none() { ", and nothing is mounted" } else { "" };
        // Not on standard output, which is the list.
        out::say(&format!("{}: no images in this folder{nor}", in_text(folder.as_os_str())));
    }
    out::text(&to_text(&listing))?;
    Ok(Outcome::Done)
}

/// The images of a folder, or of the one that is mounted at `named`; and the folder.
fn of(named: &Path, all: bool) -> Result<(PathBuf, Listing), Error> {
    let (folder, mut daemon) = served::behind(named)?;
    let mut listing = look(&folder, all, daemon.is_some())?;
    if daemon.is_none() {
        // Not on standard output, which is the list.
        served::dead_of(&folder)
            .into_iter()
            .for_each(|(point, what)| out::say(&format!("{}: {what}", point.display())));
    }
    if let Some(daemon) = &mut daemon {
        add_live(&mut listing.images, daemon)?;
    }
    Ok((folder, listing))
}

/// This folder's images, and what every mount shows whose daemon listens to this user.
fn of_all(all: bool) -> Result<Listing, Error> {
    let mut mounted: Vec<Mounted> = Vec::new();
    let mut folders = HashSet::new();
    // A second place of a mount (a bind mount) has the same file system.
    let mut devices = HashSet::new();
    // What another user mounted is no business of ours, and its source may lead where nothing answers.
    let ours =
        mounts::all()?.into_iter().rev().filter(|mount| mount.is_ours() && mount.clone().trusted().is_ok());
    let ours: Vec<_> = ours.filter(|mount| devices.insert(mount.device)).collect();
    // All at once: one whose daemon was stopped must not keep the others waiting.
    let asked: Vec<_> = ours.iter().map(|mount| shown_by(mount.clone())).collect();
    let end = Instant::now() + PATIENCE;
    for (mount, answer) in ours.iter().zip(asked) {
        let answer = answer?.recv_timeout(end.saturating_duration_since(Instant::now()));
        let (folder, images, reason) = match answer {
            Ok(Ok(Some((folder, images)))) => (folder, images, None),
            Ok(Ok(None)) | Err(_) => {
                let point = words::quoted(&mount.point);
                (
                    mount.source.clone(),
                    Vec::new(),
                    Some(format!("its daemon does not answer; to end it: ploopfs umount {point}")),
                )
            }
            // Another user answers there.
            Ok(Err(e)) if matches!(e.kind(), Kind::Access | Kind::NotPermitted) => continue,
            Ok(Err(e)) => (mount.source.clone(), Vec::new(), Some(e.to_string())),
        };
        mounted.push(Mounted {
            mountpoint: in_text(mount.point.as_os_str()),
            folder: in_text(folder.as_os_str()),
            images,
            reason,
        });
        folders.insert(folder);
    }
    mounted.reverse();
    let here = Path::new(".");
    let is_mounted = here.canonicalize().is_ok_and(|here| folders.contains(&here));
    // What is listed with its mount is not listed twice.
    let own = if is_mounted && !all { Listing::default() } else { of(here, all)?.1 };
    Ok(Listing { mounts: Some(mounted), ..own })
}

/// What was heard of one mount, with its folder as that is called now; None: it has no daemon.
type Shown = Result<Option<(PathBuf, Vec<Row>)>, Error>;

/// The images of a mount that has a daemon, on a thread of its own.
fn shown_by(mount: Mount) -> Result<Receiver<Shown>, Error> {
    let (send, receive) = channel();
    spawn_detached("ploopfs/list", move || {
        let images = served::of_mount(&mount).and_then(|daemon| match daemon {
            Some((folder, _)) => of(&folder, false).map(|(folder, listing)| Some((folder, listing.images))),
            None => match served::of_dead(&mount) {
                Some(what) => Err(Error::new(Kind::Io, what)),
                None => Ok(None),
            },
        });
        // Too late: then it was said that it does not answer.
        drop(send.send(images));
    })?;
    Ok(receive)
}

/// What the daemon knows better than the files say; and what it serves whose file is gone from the folder.
fn add_live(rows: &mut Vec<Row>, daemon: &mut served::Daemon) -> Result<(), Error> {
    let mut loops = daemon.loops();
    let mut of_served = HashSet::new();
    let mut images = daemon.client.list()?;
    // Served ones first: a file that was renamed while it was open is left out under its new name.
    images.sort_by_key(|image| !image.served);
    for image in images {
        let file = Path::new(&image.path).file_name();
        let found = rows.iter().position(|row| Path::new(&row.path).file_name() == file);
        let at = match found {
            Some(at) if image.served => at,
            Some(at) if !of_served.contains(&at) => at,
            None if image.served => {
                rows.push(without_file(&image));
                rows.len() - 1
            }
            _ => continue,
        };
        let row = &mut rows[at];
        let shown = daemon.shown(&image.name);
        if image.served {
            of_served.insert(at);
            row.name.clone_from(&image.name);
        }
        row.served = image.served;
        // What is open for writing was scanned, and changes while we look.
        let looked =
            row.reason.take().filter(|_| !image.served || ["closed", "read-only"].contains(&&*image.mode));
        row.reason = image.reason.or(looked);
        row.mode = image.served.then_some(image.mode);
        let (over, others) = loops.into_iter().partition(|device| device.backing == shown);
        loops = others;
        row.loops = Vec::from_iter(over).into_iter().map(attached).collect();
    }
    Ok(())
}

/// An image that is served, and whose file was removed: it takes space until it is closed.
fn without_file(image: &ImageLine) -> Row {
    Row {
        name: image.name.clone(),
        path: image.path.clone(),
        kind: image.kind.clone().into(),
        size: Some(image.size),
        allocated: image.allocated,
        served: true,
        reason: None,
        mode: None,
        loops: Vec::new(),
    }
}

fn attached(device: LoopDevice) -> Attached {
    let advice = (!device.direct_io).then(|| holders::direct_io_advice(&device));
    Attached { device: device.dev, direct_io: device.direct_io, advice }
}

fn look(folder: &Path, all: bool, served: bool) -> Result<Listing, Error> {
    let cannot = |e: &std::io::Error| Error::io(e, folder, "cannot list the folder");
    let mut names = Vec::new();
    for entry in folder.read_dir().map_err(|e| cannot(&e))? {
        names.push(entry.map_err(|e| cannot(&e))?.file_name());
    }
    names.sort();
    let descriptor = read_descriptor(&folder.join(DESCRIPTOR));
    let (mut images, mut others) = (Vec::new(), Vec::new());
    let strange = mounts::of_others(folder);
    for name in &names {
        let path = if folder == Path::new(".") { name.into() } else { folder.join(name) };
        if let Some(mount) = strange.iter().find(|mount| mount.point.file_name() == Some(name)) {
            others.push(Other { path: in_text(path.as_os_str()), reason: mount.not_ours() });
            continue;
        }
        match entry(&path, name, &descriptor, served) {
            Ok(row) => images.push(row),
            Err(reason) => others.push(Other { path: in_text(path.as_os_str()), reason }),
        }
    }
    refuse_levels(folder, &mut images);
    refuse_shared_names(&mut images);
    Ok(Listing { images, others: all.then_some(others), mounts: None })
}

/// One entry of the folder as an image, or why it is none.
fn entry(path: &Path, name: &OsStr, descriptor: &[u8], served: bool) -> Result<Row, String> {
    // The name alone may rule it out; then it is not even opened.
    if name.as_encoded_bytes().starts_with(b".")
        && let Class::NotAnImage { reason } = kind::classify(name, true, b"")
    {
        return Err(reason);
    }
    if target::is_layered(path) {
        return Ok(layered_row(path, served));
    }
    let candidate = match Candidate::open(path) {
        Ok(candidate) => candidate,
        Err(e) => return unreadable(path, name, &e),
    };
    let (name, kind) = match candidate.class() {
        Class::Image { name, kind } => (name, kind),
        Class::NotAnImage { reason } => return Err(reason),
    };
    if path.file_name().is_some_and(|name| kind::descriptor_names(descriptor, name)) {
        return Err(NAMED_BY_DESCRIPTOR.into());
    }
    let (_, allocated) = candidate.extent();
    let (size, reason) = match candidate.open_as(kind) {
        Ok(image) => {
            let damage = image.glance().err();
            (Some(image.size()), damage.map(|e| format!("damaged: {}", without_path(&e, path))))
        }
        Err(e) => (None, Some(format!("damaged: {}", without_path(&e, path)))),
    };
    Ok(Row {
        name: in_text(&name),
        path: in_text(path.as_os_str()),
        kind: kind.as_str().into(),
        size,
        allocated,
        reason,
        ..Row::default()
    })
}

/// A folder with a descriptor.
fn layered_row(path: &Path, served: bool) -> Row {
    let (mut size, mut allocated) = (None, 0);
    let reason = match Layered::read(path) {
        Ok(image) => {
            (size, allocated) = (Some(image.size()), image.allocated());
            // Whether its files may lie elsewhere a daemon that serves it knows better.
            let known = |e: &Error| served && e.kind() == Kind::NotPermitted;
            image.glance().err().filter(|e| !known(e)).map(|e| match e.kind() {
                Kind::Damaged => format!("damaged: {}", without_path(&e, path)),
                _ => without_path(&e, path),
            })
        }
        Err(e) => Some(format!("damaged: {}", without_path(&e, path))),
    };
    Row {
        name: in_text(&kind::folder_image_name(path.file_name().unwrap_or_default())),
        path: in_text(path.as_os_str()),
        kind: LAYERED.into(),
        size,
        allocated,
        reason,
        ..Row::default()
    }
}

/// What could not be opened or read: an image by its name all the same, unless it is no regular file.
fn unreadable(path: &Path, name: &OsStr, e: &Error) -> Result<Row, String> {
    let reason = without_path(e, path);
    match (kind::classify(name, true, b""), path.symlink_metadata()) {
        (Class::Image { name, kind }, Ok(meta)) if meta.is_file() => Ok(Row {
            name: in_text(&name),
            path: in_text(path.as_os_str()),
            kind: kind.as_str().into(),
            size: None,
            allocated: meta.blocks() * SECTOR,
            served: false,
            reason: Some(reason),
            mode: None,
            loops: Vec::new(),
        }),
        _ => Err(reason),
    }
}

/// The error's text without the file in front, which stands beside it.
fn without_path(error: &Error, path: &Path) -> String {
    let text = error.to_string();
    let rest = text.strip_prefix(&format!("{}: ", path.display())).unwrap_or(&text);
    rest.strip_prefix("not an image: ").unwrap_or(rest).to_owned()
}

/// A file that a descriptor in the folder names, under whatever name, is a level of that image and not served by itself.
fn refuse_levels(folder: &Path, images: &mut [Row]) {
    let mut levels: HashMap<(u64, u64), String> = HashMap::new();
    let below = images.iter().filter(|row| row.kind == LAYERED).map(|row| Path::new(&row.path));
    // The folder may be an image itself.
    for image in below.chain([folder]).filter_map(|folder| Layered::read(folder).ok()) {
        let name = in_text(image.folder().as_os_str());
        levels.extend(image.files().map(|file| (file, name.clone())));
    }
    for row in images.iter_mut().filter(|row| row.kind != LAYERED && row.reason.is_none()) {
        let file = Path::new(&row.path).symlink_metadata().ok().map(|meta| (meta.dev(), meta.ino()));
        if let Some(folder) = file.and_then(|file| levels.get(&file)) {
            row.reason = Some(format!("is a level of the layered image {folder}, and no image of its own"));
        }
    }
}

/// Two sources with one name: neither is served, both are named.
fn refuse_shared_names(images: &mut [Row]) {
    let mut sources: HashMap<String, Vec<String>> = HashMap::new();
    for row in images.iter() {
        sources.entry(row.name.clone()).or_default().push(row.path.clone());
    }
    for row in images {
        let paths = &sources[&row.name];
        if paths.len() > 1 && row.reason.is_none() {
            row.reason =
                Some(format!("{} have one name: neither can be served; rename one", paths.join(" and ")));
        }
    }
}

/// The descriptor's text; empty where there is none.
fn read_descriptor(path: &Path) -> Vec<u8> {
    let mut text = Vec::new();
    if let Ok(meta) = path.symlink_metadata()
        && meta.is_file()
        && let Ok(file) = std::fs::File::open(path)
        && file.take(MAX_DESCRIPTOR).read_to_end(&mut text).is_err()
    {
        text.clear();
    }
    text
}

fn to_text(listing: &Listing) -> String {
    let mut text = rows(&listing.images);
    for mount in listing.mounts.iter().flatten() {
        let gap = if text.is_empty() { "" } else { "\n" };
        // Writing into a String cannot fail.
        let _ = writeln!(text, "{gap}mounted on {}", out::printable(&mount.mountpoint));
        let _ = writeln!(text, "    images: {}", out::printable(&mount.folder));
        if let Some(reason) = &mount.reason {
            let _ = writeln!(text, "    {}", out::printable(reason));
        } else if mount.images.is_empty() {
            let _ = writeln!(text, "    no images");
        }
        text += &rows(&mount.images);
    }
    if let Some(others) = &listing.others
        && !others.is_empty()
    {
        let _ = writeln!(text, "Not images:");
        for other in others {
            let name = Path::new(&other.path).file_name().map_or_else(OsString::new, OsStr::to_owned);
            let _ = writeln!(
                text,
                "    {}: {}",
                out::printable(&name.to_string_lossy()),
                out::printable(&other.reason)
            );
        }
    }
    text
}

/// The table of some images; empty where there are none.
fn rows(images: &[Row]) -> String {
    let mut text = String::new();
    // Writing into a String cannot fail.
    if !images.is_empty() {
        let _ = writeln!(text, "{:<32} {:<7} {:>10} {:>10}  STATE", "NAME", "KIND", "SIZE", "ALLOCATED");
    }
    for row in images {
        let shown = row.size.map_or("-".into(), size::human);
        let state = match (&row.reason, row.served) {
            (_, true) => row.mode.as_deref().unwrap_or("served"),
            (Some(_), false) => "not served",
            (None, false) => "idle",
        };
        let name = out::printable(&row.name);
        let _ = writeln!(
            text,
            "{name:<32} {:<7} {shown:>10} {:>10}  {state}",
            row.kind,
            size::human(row.allocated)
        );
        if let Some(reason) = &row.reason {
            let _ = writeln!(text, "    {}", out::printable(reason));
        }
        for device in &row.loops {
            let plain = || format!("{} is attached to it", device.device.display());
            let _ = writeln!(text, "    {}", out::printable(&device.advice.clone().unwrap_or_else(plain)));
        }
    }
    text
}
