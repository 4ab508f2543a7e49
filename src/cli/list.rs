//! `ploopfs list`: the images of a folder, and what its daemon says of them where one serves it.

mod at_rest;

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde::Serialize;

use self::at_rest::{Attached, Other, Row, look};
use crate::cli::{Outcome, out, served, size};
use crate::control::protocol::{Hello, ImageLine};
use crate::daemon::holders;
use crate::error::{Error, Kind};
use crate::image::kind::in_text;
use crate::io::loopdev::LoopDevice;
use crate::io::mounts::{self, Mount};
use crate::io::process::spawn_detached;
use crate::words;

/// How long the daemons of all mounts have to answer: far longer than one of them needs that is alive.
const PATIENCE: Duration = Duration::from_secs(5);

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

#[derive(Debug, Default, Serialize)]
struct Listing {
    images: Vec<Row>,
    /// Only with `--all`.
    #[serde(skip_serializing_if = "Option::is_none")]
    others: Option<Vec<Other>>,
    /// Only where no folder was named.
    #[serde(skip_serializing_if = "Option::is_none")]
    mounts: Option<Vec<Mounted>>,
    /// Of the daemon that serves the folder, if one does.
    #[serde(flatten)]
    restarts: Option<Restarts>,
}

/// How often a daemon was replaced.
#[derive(Clone, Copy, Debug, Serialize)]
struct Restarts {
    restarts: u64,
    /// How long requests waited at the last time, in milliseconds.
    last_pause_ms: u64,
}

impl Restarts {
    fn of(hello: &Hello) -> Restarts {
        Restarts { restarts: hello.restarts, last_pause_ms: hello.last_pause_ms }
    }
}

/// A mount of ours.
#[derive(Debug, Serialize)]
struct Mounted {
    mountpoint: String,
    /// The images folder.
    folder: String,
    images: Vec<Row>,
    #[serde(flatten)]
    restarts: Option<Restarts>,
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
    let (images, others) = look(&folder, daemon.is_some())?;
    let restarts = daemon.as_ref().map(|daemon| Restarts::of(daemon.client.hello()));
    let mut listing = Listing { images, others: all.then_some(others), mounts: None, restarts };
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
    let ours = mounts::all()?.into_iter().rev().filter(|mount| mount.is_ours() && mount.is_trusted());
    let ours: Vec<_> = ours.filter(|mount| devices.insert(mount.device)).collect();
    // All at once: one whose daemon was stopped must not keep the others waiting.
    let asked: Vec<_> = ours.iter().map(|mount| shown_by(mount.clone())).collect();
    let end = Instant::now() + PATIENCE;
    for (mount, answer) in ours.iter().zip(asked) {
        let answer = answer?.recv_timeout(end.saturating_duration_since(Instant::now()));
        let (folder, shown, reason) = match answer {
            Ok(Ok(Some((folder, shown)))) => (folder, shown, None),
            Ok(Ok(None)) | Err(_) => {
                let point = words::quoted(&mount.point);
                (
                    mount.source.clone(),
                    Listing::default(),
                    Some(format!("its daemon does not answer; to end it: ploopfs umount {point}")),
                )
            }
            // Another user answers there.
            Ok(Err(e)) if matches!(e.kind(), Kind::Access | Kind::NotPermitted) => continue,
            Ok(Err(e)) => (mount.source.clone(), Listing::default(), Some(e.to_string())),
        };
        mounted.push(Mounted {
            mountpoint: in_text(mount.point.as_os_str()),
            folder: in_text(folder.as_os_str()),
            images: shown.images,
            restarts: shown.restarts,
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
type Shown = Result<Option<(PathBuf, Listing)>, Error>;

/// The images of a mount that has a daemon, on a thread of its own.
fn shown_by(mount: Mount) -> Result<Receiver<Shown>, Error> {
    let (send, receive) = channel();
    spawn_detached("ploopfs/list", move || {
        let images = served::of_mount(&mount).and_then(|daemon| match daemon {
            Some((folder, _)) => of(&folder, false).map(Some),
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

fn to_text(listing: &Listing) -> String {
    let mut text = rows(&listing.images);
    for mount in listing.mounts.iter().flatten() {
        let gap = if text.is_empty() { "" } else { "\n" };
        // Writing into a String cannot fail.
        let _ = writeln!(text, "{gap}mounted on {}", out::printable(&mount.mountpoint));
        let _ = writeln!(text, "    images: {}", out::printable(&mount.folder));
        let restarts = mount.restarts.as_ref();
        if let Some(restarted) = restarts.and_then(|of| served::restarted(of.restarts, of.last_pause_ms)) {
            let _ = writeln!(text, "    restarted: {restarted}");
        }
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
