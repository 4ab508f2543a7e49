//! `.ploopfs/stats.json`: the live counters, made up when the file is opened. Fields are added, never renamed.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use serde::Serialize;

use crate::folder::Folder;

/// What the mount says of itself.
#[derive(Clone, Debug)]
pub struct MountInfo {
    /// Where it is mounted.
    pub mountpoint: std::path::PathBuf,
    /// The transport that serves it.
    pub transport: &'static str,
    /// What confines the process; set once, after the mount and before the first request.
    pub sandbox: Arc<OnceLock<Sandbox>>,
}

/// What confines a serving process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sandbox {
    /// It can gain no privileges by starting programs.
    pub no_new_privs: bool,
    /// It opens files below the images folder only.
    pub landlock: bool,
    /// It makes only the system calls of a list.
    pub seccomp: bool,
}

#[derive(Serialize)]
struct Document<'a> {
    pid: u32,
    transport: &'a str,
    mountpoint: String,
    sandbox: Sandbox,
    images: BTreeMap<String, Image>,
}

#[derive(Serialize)]
struct Image {
    mode: &'static str,
    openers: u32,
    /// Free space of the host is below the low-water mark.
    low_water: bool,
    dirty_pages: u64,
    queued: u64,
    reads: u64,
    writes: u64,
    discards: u64,
    flushes: u64,
    read_bytes: u64,
    written_bytes: u64,
}

/// The file's content at this moment. A closed image has the mode "closed" and counts nothing.
pub fn render(folder: &Folder, info: &MountInfo) -> Bytes {
    let image = |entry: &crate::folder::Entry| {
        let stats = entry.stats();
        let count = |of: fn(&crate::vdisk::Stats) -> u64| stats.as_ref().map_or(0, of);
        Image {
            mode: entry.mode(),
            openers: entry.openers(),
            low_water: stats.as_ref().is_some_and(|s| s.low),
            dirty_pages: count(|s| s.dirty_pages),
            queued: count(|s| s.queued),
            reads: count(|s| s.reads),
            writes: count(|s| s.writes),
            discards: count(|s| s.discards),
            flushes: count(|s| s.flushes),
            read_bytes: count(|s| s.read_bytes),
            written_bytes: count(|s| s.written_bytes),
        }
    };
    let entries = folder.entries();
    let document = Document {
        pid: std::process::id(),
        transport: info.transport,
        mountpoint: info.mountpoint.to_string_lossy().into_owned(),
        sandbox: info.sandbox.get().copied().unwrap_or_default(),
        images: entries.iter().map(|e| (e.name().to_string_lossy().into_owned(), image(e))).collect(),
    };
    let mut text = serde_json::to_vec_pretty(&document).expect("strings and numbers are always JSON");
    text.push(b'\n');
    text.into()
}
