//! What uses a loop device and its partitions: mounts, swap, devices on top, processes. By the kernel's tables and the links
//! in /proc alone, which ask no device and no file.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::Result;
use crate::io::mounts::{self, Mount};

/// As [`loopdev::mounted_on`](super::mounted_on), by the device's number.
pub(super) fn mounted_on(number: u32) -> Result<Vec<Vec<Mount>>> {
    let mut found: Vec<Vec<Mount>> = Vec::new();
    for mount in mounts_of(number)? {
        match found.iter_mut().find(|others| others[0].device == mount.device) {
            Some(others) => others.push(mount),
            None => found.push(vec![mount]),
        }
    }
    Ok(found)
}

/// The mounts of a device and of its partitions.
fn mounts_of(number: u32) -> Result<Vec<Mount>> {
    let numbers = numbers(number);
    let mut found = mounts::all()?;
    found.retain(|mount| {
        // btrfs shows a device number of its own, so the source is looked at as well.
        numbers.contains(&mount.device)
            || (mount.device.0 == 0 && source_number(mount).is_some_and(|source| numbers.contains(&source)))
    });
    Ok(found)
}

/// The number of the device that a mount names as its source.
fn source_number(mount: &Mount) -> Option<(u32, u32)> {
    // A network file system names something else there, which is not to be asked for.
    let meta = mount.source.starts_with("/dev").then(|| fs::metadata(&mount.source).ok()).flatten()?;
    Some((rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev())))
}

/// The numbers of a device and of its partitions.
pub fn numbers(number: u32) -> Vec<(u32, u32)> {
    let read = |place: PathBuf| {
        let text = fs::read(place.join("dev")).ok()?;
        let mut halves = text.trim_ascii().split(|b| *b == b':').map(parse);
        Some((halves.next()??, halves.next()??))
    };
    places(number).into_iter().filter_map(read).collect()
}

/// A number in the kernel's text.
pub(super) fn parse<N: std::str::FromStr>(text: &[u8]) -> Option<N> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// What holds the device for long, in words: mounts, swap, devices on top of it or of its partitions.
pub(super) fn holders(number: u32) -> Result<Vec<String>> {
    let mut held = Vec::new();
    for place in places(number) {
        for stacked in fs::read_dir(place.join("holders")).into_iter().flatten().flatten() {
            held.push(format!("used by /dev/{}", stacked.file_name().display()));
        }
    }
    held.extend(mounts_of(number)?.iter().map(|mount| format!("mounted at {}", mount.point.display())));
    let swaps = fs::read("/proc/swaps").unwrap_or_default();
    for line in swaps.split(|b| *b == b'\n').skip(1) {
        let source = line.split(|b| b.is_ascii_whitespace()).next().unwrap_or_default();
        if is_device_or_partition(OsStr::from_bytes(source), number) {
            held.push("used as swap".to_owned());
        }
    }
    Ok(held)
}

/// The device itself and its partitions in sysfs.
fn places(number: u32) -> Vec<PathBuf> {
    let sys = PathBuf::from(format!("/sys/block/loop{number}"));
    let inside = partitions(number).into_iter().map(|name| sys.join(OsString::from_vec(name)));
    inside.chain([sys.clone()]).collect()
}

/// The names of a device's partitions.
pub(super) fn partitions(number: u32) -> Vec<Vec<u8>> {
    let prefix = format!("loop{number}p").into_bytes();
    let entries = fs::read_dir(format!("/sys/block/loop{number}")).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().into_vec());
    names.filter(|name| name.starts_with(&prefix)).collect()
}

fn is_device_or_partition(source: &OsStr, number: u32) -> bool {
    let rest = source.as_bytes().strip_prefix(format!("/dev/loop{number}").as_bytes());
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"p"))
}

/// Processes that have the device or a partition of it open, by their links in /proc, which ask no file.
pub(super) fn openers(number: u32) -> Vec<String> {
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let fds = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        let mut links = fds.into_iter().filter_map(|fd| fs::read_link(fd.path()).ok());
        if links.any(|link| is_device_or_partition(link.as_os_str(), number)) {
            let name = fs::read(process.path().join("comm")).unwrap_or_default();
            let pid = process.file_name();
            let name = String::from_utf8_lossy(name.trim_ascii_end());
            found.push(format!("open in {name} (pid {})", pid.to_string_lossy()));
        }
    }
    found
}
