//! `.ploopfs/metrics`: the live counters in the text format of Prometheus, made up when the file is opened. Names are
//! added, never renamed.

use std::fmt::Write;
use std::sync::Arc;

use bytes::Bytes;

use super::stats::MountInfo;
use crate::folder::{Entry, Folder};
use crate::image::kind::in_text;
use crate::vdisk::latency::{Histogram, Latencies, Op};
use crate::vdisk::{Engine, Stats};

/// Every mode that an image can have.
const MODES: [&str; 5] = ["closed", "write", "read-only", "full-queue", "full-error"];

/// What one image says at one moment, so that all of its figures are of that.
struct Seen {
    /// Escaped for a label.
    name: String,
    entry: Arc<Entry>,
    stats: Option<Stats>,
    latency: Option<[Histogram; Op::ALL.len()]>,
}

/// A family of samples with one figure for each image.
struct PerImage {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    value: fn(&Seen) -> Option<u64>,
}

/// Counters count from an image's opening on: a reader takes a smaller value for a new beginning. A closed image has none.
const PER_IMAGE: [PerImage; 13] = [
    PerImage {
        name: "ploopfs_image_openers",
        kind: "gauge",
        help: "Open handles.",
        value: |s| Some(s.entry.openers().into()),
    },
    PerImage {
        name: "ploopfs_image_size_bytes",
        kind: "gauge",
        help: "Size of the disk.",
        value: |s| Some(s.entry.size()),
    },
    PerImage {
        name: "ploopfs_image_low_water",
        kind: "gauge",
        help: "1 while the host's free space is below the low-water mark.",
        value: |s| s.stats.map(|stats| stats.low.into()),
    },
    PerImage {
        name: "ploopfs_image_dirty_bat_pages",
        kind: "gauge",
        help: "Pages of the block allocation table that are not durable yet.",
        value: |s| s.stats.map(|stats| stats.dirty_pages),
    },
    PerImage {
        name: "ploopfs_image_inflight_requests",
        kind: "gauge",
        help: "Parts of requests, each in one cluster, that are being carried out.",
        value: |s| s.stats.map(|stats| stats.inflight),
    },
    PerImage {
        name: "ploopfs_image_queued_requests",
        kind: "gauge",
        help: "Parts of requests that wait for space, or for unsynced data to shrink.",
        value: |s| s.stats.map(|stats| stats.queued),
    },
    PerImage {
        name: "ploopfs_image_reads_total",
        kind: "counter",
        help: "Finished reads.",
        value: |s| s.stats.map(|stats| stats.reads),
    },
    PerImage {
        name: "ploopfs_image_writes_total",
        kind: "counter",
        help: "Finished writes.",
        value: |s| s.stats.map(|stats| stats.writes),
    },
    PerImage {
        name: "ploopfs_image_discards_total",
        kind: "counter",
        help: "Finished discards.",
        value: |s| s.stats.map(|stats| stats.discards),
    },
    PerImage {
        name: "ploopfs_image_flushes_total",
        kind: "counter",
        help: "Finished syncs.",
        value: |s| s.stats.map(|stats| stats.flushes),
    },
    PerImage {
        name: "ploopfs_image_read_bytes_total",
        kind: "counter",
        help: "Bytes read.",
        value: |s| s.stats.map(|stats| stats.read_bytes),
    },
    PerImage {
        name: "ploopfs_image_written_bytes_total",
        kind: "counter",
        help: "Bytes written.",
        value: |s| s.stats.map(|stats| stats.written_bytes),
    },
    PerImage {
        name: "ploopfs_image_failed",
        kind: "gauge",
        help: "1 when something is wrong with the image; ploopfs info says what.",
        value: |s| Some(s.entry.trouble().is_some().into()),
    },
];

/// The file's content at this moment.
pub(super) fn render(folder: &Folder, engine: &Engine, info: &MountInfo) -> Bytes {
    let seen: Vec<Seen> = folder.entries().into_iter().map(look).collect();
    let mut text = Families::default();
    let (version, transport) = (env!("CARGO_PKG_VERSION"), escaped(info.transport));
    text.begin("ploopfs_build_info", "gauge", "The program that serves the folder; always 1.");
    text.sample("ploopfs_build_info", &format!("version=\"{version}\",transport=\"{transport}\""), 1);
    text.begin("ploopfs_restarts_total", "counter", "Times that the mount's daemon was replaced.");
    text.sample("ploopfs_restarts_total", "", info.restarts.count());
    text.begin("ploopfs_last_pause_seconds", "gauge", "How long requests waited at the last of these.");
    text.duration("ploopfs_last_pause_seconds", info.restarts.last_pause_ms() * 1000);
    text.begin("ploopfs_images", "gauge", "Images that are served.");
    text.sample("ploopfs_images", "", seen.len() as u64);
    text.begin(
        "ploopfs_bat_cache_pages",
        "gauge",
        "Pages of block allocation tables in memory, 4 KiB on disk each.",
    );
    text.sample("ploopfs_bat_cache_pages", "", engine.cached_pages());
    if let Ok(space) = folder.space() {
        text.begin("ploopfs_host_size_bytes", "gauge", "Size of the file system that holds the images.");
        text.sample("ploopfs_host_size_bytes", "", space.total);
        text.begin("ploopfs_host_available_bytes", "gauge", "Free space of that file system.");
        text.sample("ploopfs_host_available_bytes", "", space.available);
    }
    for family in &PER_IMAGE {
        text.begin(family.name, family.kind, family.help);
        for image in &seen {
            if let Some(value) = (family.value)(image) {
                text.sample(family.name, &format!("image=\"{}\"", image.name), value);
            }
        }
    }
    text.begin("ploopfs_image_mode", "gauge", "1 for what the image can do at the moment, 0 for the rest.");
    for image in &seen {
        let now = image.entry.mode();
        for mode in MODES {
            let labels = format!("image=\"{}\",mode=\"{mode}\"", image.name);
            text.sample("ploopfs_image_mode", &labels, u64::from(mode == now));
        }
    }
    text.latencies(&seen);
    text.0.into()
}

fn look(entry: Arc<Entry>) -> Seen {
    let of = |latencies: &Latencies| Op::ALL.map(|op| latencies.of(op));
    Seen {
        name: escaped(&in_text(entry.name())),
        stats: entry.stats(),
        latency: entry.with_image(|image| of(image.latencies())),
        entry,
    }
}

#[derive(Default)]
struct Families(String);

impl Families {
    // Writing into a String cannot fail.

    fn begin(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: u64) {
        let _ = match labels {
            "" => writeln!(self.0, "{name} {value}"),
            labels => writeln!(self.0, "{name}{{{labels}}} {value}"),
        };
    }

    fn duration(&mut self, name: &str, micros: u64) {
        let _ = writeln!(self.0, "{name} {}", seconds(micros));
    }

    fn latencies(&mut self, seen: &[Seen]) {
        const NAME: &str = "ploopfs_image_latency_seconds";
        self.begin(NAME, "histogram", "Time from a request's arrival to its answer.");
        for image in seen {
            for (op, histogram) in Op::ALL.iter().zip(image.latency.iter().flatten()) {
                let labels = format!("image=\"{}\",op=\"{}\"", image.name, op.as_str());
                let mut sum = 0;
                for (k, requests) in histogram.buckets.iter().enumerate() {
                    sum += requests;
                    let bound = Histogram::bound(k).map_or("+Inf".to_owned(), seconds);
                    let _ = writeln!(self.0, "{NAME}_bucket{{{labels},le=\"{bound}\"}} {sum}");
                }
                let nanos = histogram.nanos as f64 / 1e9;
                let _ = writeln!(self.0, "{NAME}_sum{{{labels}}} {nanos}\n{NAME}_count{{{labels}}} {sum}");
            }
        }
    }
}

/// Microseconds in seconds, all digits.
fn seconds(micros: u64) -> String {
    format!("{}", micros as f64 / 1e6)
}

/// A label's value, between its quotes.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_written_as_plain_seconds() {
        let bounds = [0, 1, 10, 20, 24].map(|k| seconds(Histogram::bound(k).expect("a bound")));
        assert_eq!(bounds, ["0.000001", "0.000002", "0.001024", "1.048576", "16.777216"]);
    }

    #[test]
    fn a_name_cannot_leave_its_quotes() {
        assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}
