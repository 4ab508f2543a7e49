//! The processes of a mount whose daemon may be killed and has a successor (`--restart-timeout`).

use std::time::{Duration, Instant};

use super::mount::Mount;
use super::run::{signal, until};
use super::text;

/// The processes of a mount that are its daemon, its keeper or its standby, as the kernel lists them: looks at no mount.
pub fn processes(mount: &Mount, what: &str) -> Vec<u32> {
    let images = text(mount.images()).as_bytes();
    let entries = std::fs::read_dir("/proc").expect("/proc").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_one = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        words.get(1).is_some_and(|word| *word == what.as_bytes()) && words.contains(&images)
    };
    pids.filter(is_one).collect()
}

pub fn daemons(mount: &Mount) -> Vec<u32> {
    processes(mount, "daemon")
}

/// Waits until another daemon than `before` serves.
#[track_caller]
pub fn succeeded(mount: &Mount, before: u32, patience: Duration) {
    // What is open of the counters is not open any more behind a death.
    let pid = || std::fs::read_to_string(mount.point().join(".ploopfs/stats.json")).ok();
    let other = || {
        pid().is_some_and(|text| !text.contains(&format!("\"pid\": {before},")) && text.contains("\"pid\""))
    };
    assert!(until(patience, other), "no successor");
}

/// Kills the daemon, and returns when another one serves: how long a look at the mount took.
#[track_caller]
pub fn kill(mount: &Mount, patience: Duration) -> Duration {
    let before = daemons(mount);
    assert_eq!(before.len(), 1, "one daemon");
    signal(before[0], rustix::process::Signal::KILL);
    let began = Instant::now();
    succeeded(mount, before[0], patience);
    began.elapsed()
}
