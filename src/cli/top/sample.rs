//! What the daemons say of their images, twice, and what happened between.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use serde::Serialize;

use crate::cli::served;
use crate::control::client::Client;
use crate::error::{Error, Kind, Result};
use crate::io::mounts::{self, Mount};
use crate::io::process::spawn_detached;
use crate::tree::{Document, ImageStats};
use crate::vdisk::latency::{Histogram, Op};

/// All mounts at one moment.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Found {
    /// Seconds that the rates are of; 0 in the first one.
    pub seconds: f64,
    /// By mount point.
    pub mounts: Vec<MountRow>,
    /// What could not be asked, and why.
    pub troubles: Vec<String>,
}

/// One mount.
#[derive(Clone, Debug, Serialize)]
pub(super) struct MountRow {
    /// Where it is.
    pub mountpoint: String,
    /// Process id of its daemon.
    pub pid: u32,
    /// How often a daemon of it was replaced.
    pub restarts: u64,
    /// How long requests waited at the last time, in milliseconds.
    pub last_pause_ms: u64,
    /// Free space of the host's file system, in bytes.
    pub host_available: u64,
    /// Its size in bytes.
    pub host_size: u64,
    /// Its images, by name.
    pub images: Vec<ImageRow>,
}

/// One image.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct ImageRow {
    /// Name without `.img`.
    pub name: String,
    /// What it can do.
    pub mode: String,
    /// Open handles.
    pub openers: u32,
    /// Reads per second.
    pub reads: f64,
    /// Writes per second.
    pub writes: f64,
    /// Discards per second.
    pub discards: f64,
    /// Syncs per second.
    pub flushes: f64,
    /// Bytes read per second.
    pub read_bytes: f64,
    /// Bytes written per second.
    pub written_bytes: f64,
    /// By kind of request, of those that ended meanwhile.
    pub latency: BTreeMap<&'static str, Percentiles>,
    /// Of reads and writes together; None where there were none.
    #[serde(skip)]
    pub both: Option<Percentiles>,
    /// BAT pages that are not durable yet.
    pub dirty_pages: u64,
    /// Parts of requests under way or waiting.
    pub queue: u64,
    /// Disk size in bytes.
    pub size: u64,
    /// Space taken on the host, in bytes.
    pub allocated: u64,
}

/// How long requests took, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Percentiles {
    /// Half of them took up to this.
    pub p50_us: f64,
    /// 99 of 100 took up to this.
    pub p99_us: f64,
}

impl Percentiles {
    fn of(histogram: &Histogram) -> Option<Percentiles> {
        let round = |micros: f64| (micros * 10.0).round() / 10.0;
        Some(Percentiles {
            p50_us: round(histogram.percentile(50.0)?),
            p99_us: round(histogram.percentile(99.0)?),
        })
    }
}

/// Looks again and again.
pub(super) struct Watch {
    /// The images folder to ask about; None: those of all our mounts.
    folder: Option<PathBuf>,
    before: BTreeMap<PathBuf, (Instant, Document)>,
}

impl Watch {
    /// Of the mount at `mountpoint`, or of all mounts of ours: an error where there is none.
    pub(super) fn new(mountpoint: Option<&Path>) -> Result<Watch> {
        let folder = match mountpoint {
            Some(point) => match served::behind(point)? {
                (folder, Some(_)) => Some(folder),
                (folder, None) => {
                    if let Some((point, what)) = served::dead_of(&folder).pop() {
                        return Err(Error::at(Kind::Io, point, what));
                    }
                    let why = "nothing is mounted here; mount it first: ploopfs mount IMAGES MOUNTPOINT";
                    return Err(Error::at(Kind::NotFound, point, why));
                }
            },
            None => None,
        };
        let watch = Watch { folder, before: BTreeMap::new() };
        if watch.folders()?.is_empty() {
            let why = "nothing is mounted; mount a folder first: ploopfs mount IMAGES MOUNTPOINT";
            return Err(Error::new(Kind::NotFound, why));
        }
        Ok(watch)
    }

    fn folders(&self) -> Result<Vec<PathBuf>> {
        if let Some(folder) = &self.folder {
            return Ok(vec![folder.clone()]);
        }
        let mut folders: Vec<PathBuf> = mounts::all()?
            .into_iter()
            .filter(Mount::is_ours)
            .filter_map(|mount| {
                let mount = mount.trusted().ok()?;
                // One that does not answer is said to be so when it is asked.
                let found = served::of_mount(&mount).ok().flatten();
                Some(found.map_or(mount.source, |(folder, _)| folder))
            })
            .collect();
        folders.sort();
        folders.dedup();
        Ok(folders)
    }

    /// Looks, and returns what happened since the last look.
    pub(super) fn look(&mut self) -> Found {
        let mut found = Found::default();
        let folders = self.folders().unwrap_or_else(|e| {
            found.troubles.push(e.to_string());
            Vec::new()
        });
        for folder in folders {
            let asked = Client::find(&folder).and_then(|client| {
                let gone = || Error::at(Kind::NotFound, &folder, "is not mounted any more");
                client.ok_or_else(gone)?.stats()
            });
            match asked {
                Ok(document) => {
                    let now = Instant::now();
                    let before = self.before.insert(folder, (now, document.clone()));
                    let seconds = before.as_ref().map_or(0.0, |(then, _)| (now - *then).as_secs_f64());
                    found.seconds = found.seconds.max(seconds);
                    found.mounts.push(mount_row(&document, before.as_ref().map(|(_, old)| old), seconds));
                }
                Err(e) => found.troubles.push(e.to_string()),
            }
        }
        found.mounts.sort_by(|a, b| a.mountpoint.cmp(&b.mountpoint));
        found
    }

    /// Looks every `interval` on a thread of its own, until the receiver is dropped.
    pub(super) fn start(mut self, interval: Duration) -> Result<Receiver<Found>> {
        let (send, receive) = bounded(1);
        spawn_detached("ploopfs/top", move || {
            while send.send(self.look()).is_ok() {
                std::thread::sleep(interval);
            }
        })?;
        Ok(receive)
    }
}

fn mount_row(now: &Document, before: Option<&Document>, seconds: f64) -> MountRow {
    let row = |(name, image): (&String, &ImageStats)| {
        image_row(name, image, before.and_then(|before| before.images.get(name)), seconds)
    };
    MountRow {
        mountpoint: now.mountpoint.clone(),
        pid: now.pid,
        restarts: now.restarts,
        last_pause_ms: now.last_pause_ms,
        host_available: now.host_available,
        host_size: now.host_size,
        images: now.images.iter().map(row).collect(),
    }
}

fn image_row(name: &str, now: &ImageStats, before: Option<&ImageStats>, seconds: f64) -> ImageRow {
    // Without a moment before it nothing is known of a rate; an image that was closed and opened counts anew.
    let rate = |of: fn(&ImageStats) -> u64| match before {
        Some(before) if seconds > 0.0 => {
            let count = of(now).checked_sub(of(before)).unwrap_or(of(now));
            (count as f64 / seconds * 10.0).round() / 10.0
        }
        _ => 0.0,
    };
    let since = |op: Op| -> Histogram {
        let Some(before) = before else { return Histogram::default() };
        let now = now.latency.get(op.as_str()).cloned().unwrap_or_default();
        before.latency.get(op.as_str()).map_or(now.clone(), |before| now.since(before))
    };
    let mut both = since(Op::Read);
    let writes = since(Op::Write);
    both.buckets.iter_mut().zip(writes.buckets).for_each(|(sum, more)| *sum += more);
    let latency = Op::ALL.iter().filter_map(|op| Some((op.as_str(), Percentiles::of(&since(*op))?)));
    ImageRow {
        name: name.to_owned(),
        mode: now.mode.clone(),
        openers: now.openers,
        reads: rate(|image| image.reads),
        writes: rate(|image| image.writes),
        discards: rate(|image| image.discards),
        flushes: rate(|image| image.flushes),
        read_bytes: rate(|image| image.read_bytes),
        written_bytes: rate(|image| image.written_bytes),
        latency: latency.collect(),
        both: Percentiles::of(&both),
        dirty_pages: now.dirty_pages,
        queue: now.inflight + now.queued,
        size: now.size,
        allocated: now.allocated,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_differences_and_an_image_that_was_opened_anew_counts_anew() {
        let at = |reads, read_bytes| ImageStats { reads, read_bytes, ..ImageStats::default() };
        let row = image_row("vm", &at(300, 4096), Some(&at(100, 0)), 2.0);
        assert_eq!((row.reads, row.read_bytes), (100.0, 2048.0));
        assert_eq!(image_row("vm", &at(50, 0), Some(&at(100, 0)), 2.0).reads, 25.0);
        assert_eq!(image_row("vm", &at(50, 0), None, 0.0).reads, 0.0);
    }

    #[test]
    fn percentiles_are_of_what_ended_meanwhile() {
        let with = |k: usize, count: u64| {
            let mut read = Histogram::default();
            read.buckets[k] = count;
            read.nanos = count;
            ImageStats { latency: [("read".to_owned(), read)].into(), ..ImageStats::default() }
        };
        let row = image_row("vm", &with(5, 10), Some(&with(5, 10)), 1.0);
        assert_eq!((row.both, row.latency.len()), (None, 0));
        let row = image_row("vm", &with(5, 20), Some(&with(5, 10)), 1.0);
        let read = row.latency["read"];
        assert!((16.0..=32.0).contains(&read.p50_us) && read.p99_us <= 32.0, "{read:?}");
        assert_eq!(row.both, Some(read));
    }
}
