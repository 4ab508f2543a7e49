//! Loop devices: attach, detach, list.
//!
//! For command-line clients. Some ioctls of a loop device ask the file behind it (its length, its inode), so the
//! daemon that serves that file must never call them: it would wait for itself. [`list`] reads sysfs only, which
//! asks no device, and is safe everywhere.

mod uapi;
mod users;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::mounts::Mount;
use crate::{Error, Kind, Result};
use uapi::{
    BLKPG, BLKPG_DEL_PARTITION, LO_FLAGS_DIRECT_IO, LO_FLAGS_READ_ONLY, LO_NAME_SIZE, LOOP_CLR_FD,
    LOOP_CONFIGURE, LOOP_CTL_GET_FREE, LOOP_GET_STATUS64, LOOP_SET_CAPACITY, LoopConfig, LoopInfo, Partition,
    PartitionCall,
};
pub use users::numbers;
use users::{holders, openers, parse, partitions};

/// Others may take a free device before we configure it: then the next one is tried, so many times.
const ATTACH_TRIES: u32 = 64;
/// How long files under loop devices may take to say which they are. One may lie on a server that is gone, and the
/// question then has no end.
const ANSWER: Duration = Duration::from_secs(2);
/// How often a device that is going away is looked at.
const POLL: Duration = Duration::from_millis(10);

/// A loop device with a file behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoopDevice {
    /// `/dev/loopN`.
    pub dev: PathBuf,
    /// N.
    pub number: u32,
    /// The file behind it, as the kernel names it now.
    pub backing: PathBuf,
    /// The file has no name any more.
    pub deleted: bool,
    /// Direct I/O: the file is read and written past the page cache.
    pub direct_io: bool,
    /// The device cannot be written.
    pub read_only: bool,
    /// Where in the file the device begins, in bytes.
    pub offset: u64,
}

impl LoopDevice {
    /// Device and inode number of the file behind it. Asks that file: never from the daemon that serves it.
    pub fn backing_identity(&self) -> io::Result<(u64, u64)> {
        let dev = File::open(&self.dev)?;
        let mut info = LoopInfo::ZERO;
        // SAFETY: the descriptor is open, and the kernel writes one whole `loop_info64`.
        retry(|| unsafe { libc::ioctl(dev.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) })?;
        Ok((info.device, info.inode))
    }
}

#[cfg(any(test, feature = "internals"))]
/// Puts a loop device over the file at `path`, with direct I/O where the file can do it.
pub fn attach(path: &Path, read_only: bool) -> Result<LoopDevice> {
    attach_opened(path, read_only, &|flags| {
        let flags = flags | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?))
    })
}

/// The same over the file that `open` opens with the flags it is given; `path` is how messages name it.
pub fn attach_opened(
    path: &Path,
    read_only: bool,
    open: &dyn Fn(OFlags) -> io::Result<File>,
) -> Result<LoopDevice> {
    let failed = |e: &io::Error| Error::io(e, path, "cannot attach a loop device");
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    // O_DIRECT at the file makes the kernel use direct I/O from the first request; not every file has it.
    let file = open(access | OFlags::DIRECT).or_else(|e| match e.raw_os_error() {
        Some(libc::EINVAL) => open(access),
        _ => Err(e),
    });
    let file = file.map_err(|e| failed(&e))?;
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control");
    let control = control.map_err(|e| no_control(&e))?;
    let mut busy = io::Error::from_raw_os_error(libc::EBUSY);
    for _ in 0..ATTACH_TRIES {
        // SAFETY: the descriptor is open, and this ioctl takes no argument.
        let number = retry(|| unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) });
        let number = number.map_err(|e| failed(&e))?;
        match configure(number, &file, path, read_only) {
            Ok(dev) => {
                let number = number.unsigned_abs();
                // What partx made over an earlier file is left when that goes, and would lie over this one.
                drop_partitions(&dev, number).map_err(|e| failed(&e))?;
                let found = describe(number);
                return found.ok_or_else(|| failed(&io::Error::from_raw_os_error(libc::ENXIO)));
            }
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => busy = e,
            Err(e) => return Err(Error::io(&e, path, format!("cannot attach /dev/loop{number}"))),
        }
    }
    Err(failed(&busy))
}

fn no_control(e: &io::Error) -> Error {
    let advice = match e.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => "cannot attach; loop devices are for root and the group disk",
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            "cannot attach (is the module loop loaded? modprobe loop)"
        }
        _ => "cannot attach",
    };
    Error::io(e, "/dev/loop-control", advice)
}

fn configure(number: i32, file: &File, path: &Path, read_only: bool) -> io::Result<File> {
    let dev = OpenOptions::new().read(true).write(!read_only).open(format!("/dev/loop{number}"))?;
    let mut info = LoopInfo::ZERO;
    info.flags = LO_FLAGS_DIRECT_IO | if read_only { LO_FLAGS_READ_ONLY } else { 0 };
    // For show only, and cut; the last byte stays 0.
    let name = path.as_os_str().as_encoded_bytes();
    let len = name.len().min(LO_NAME_SIZE - 1);
    info.file_name[..len].copy_from_slice(&name[..len]);
    let fd = file.as_raw_fd().unsigned_abs();
    let config = LoopConfig { fd, block_size: 0, info, reserved: [0; 8] };
    // SAFETY: both descriptors are open, and the kernel reads one whole `loop_config`.
    retry(|| unsafe { libc::ioctl(dev.as_raw_fd(), LOOP_CONFIGURE, &raw const config) })?;
    Ok(dev)
}

/// Takes the partitions of a device away. Busy: one of them is open.
fn drop_partitions(dev: &File, number: u32) -> io::Result<()> {
    for name in partitions(number) {
        let Some(number) = name.rsplit(|b| !b.is_ascii_digit()).next().and_then(parse) else { continue };
        let mut partition =
            Partition { start: 0, length: 0, number, device_name: [0; 64], volume_name: [0; 64] };
        let length = libc::c_int::try_from(size_of::<Partition>()).unwrap_or_default();
        let call =
            PartitionCall { what: BLKPG_DEL_PARTITION, flags: 0, length, partition: &raw mut partition };
        // SAFETY: the descriptor is open, and the kernel reads one whole `blkpg_ioctl_arg` and the `blkpg_partition`
        // that it names, both alive during the call.
        match retry(|| unsafe { libc::ioctl(dev.as_raw_fd(), BLKPG, &raw const call) }) {
            // It went away by itself.
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => {}
            result => drop(result?),
        }
    }
    Ok(())
}

#[cfg(test)]
/// Turns direct I/O on or off.
pub fn set_direct_io(dev: &Path, on: bool) -> Result<()> {
    let set = || -> io::Result<()> {
        let file = OpenOptions::new().read(true).write(true).open(dev).or_else(|_| File::open(dev))?;
        // SAFETY: the descriptor is open; the argument is a number.
        retry(|| unsafe {
            libc::ioctl(file.as_raw_fd(), uapi::LOOP_SET_DIRECT_IO, libc::c_ulong::from(on))
        })?;
        Ok(())
    };
    set().map_err(|e| Error::io(&e, dev, "cannot change direct I/O of this loop device"))
}

/// Makes the device as large as the file behind it is now.
pub fn update_size(dev: &Path) -> Result<()> {
    let set = || -> io::Result<()> {
        let file = File::open(dev)?;
        // SAFETY: the descriptor is open, and this ioctl takes no argument.
        retry(|| unsafe { libc::ioctl(file.as_raw_fd(), LOOP_SET_CAPACITY) })?;
        Ok(())
    };
    set().map_err(|e| Error::io(&e, dev, "cannot give this loop device its new size; try: losetup -c"))
}

/// The file systems on a loop device and its partitions that are mounted: of each all its mounts.
pub fn mounted_on(device: &LoopDevice) -> Result<Vec<Vec<Mount>>> {
    users::mounted_on(device.number)
}

/// Takes the file away from a loop device and returns when it is really gone, at most `wait` later.
///
/// The kernel detaches it only when the last opener closes the device, so: (1) what holds it for long (a mount,
/// swap, a device stacked on it) is looked for first, and then nothing is done: a device marked to go would
/// vanish at the later umount, unasked; (2) clear; (3) wait for the kernel. [`Kind::Busy`] says who holds it.
pub fn detach(dev: &Path, wait: Duration) -> Result<()> {
    let number = number_of(dev)?;
    let Some(attached) = attached_as(number) else {
        return Err(Error::at(Kind::NotFound, dev, "has no file attached"));
    };
    let held = holders(number)?;
    if !held.is_empty() {
        let what = format!("is {}; end that, then detach again", held.join(", "));
        return Err(Error::at(Kind::Busy, dev, what));
    }
    let clear = || -> io::Result<()> {
        let file = File::open(dev)?;
        // First: a partition outlives the file, and lies over the next one that is attached here.
        drop_partitions(&file, number)?;
        // SAFETY: the descriptor is open, and this ioctl takes no argument.
        retry(|| unsafe { libc::ioctl(file.as_raw_fd(), LOOP_CLR_FD) })?;
        Ok(())
    };
    match clear() {
        // Another process detached it just now.
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => {}
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            let held = openers(number);
            let who = if held.is_empty() { "in use".to_owned() } else { held.join(", ") };
            return Err(Error::at(Kind::Busy, dev, format!("has a partition that is {who}; end that first")));
        }
        result => result.map_err(|e| Error::io(&e, dev, "cannot detach"))?,
    }
    let deadline = Instant::now() + wait;
    while attached_as(number).as_ref() == Some(&attached) {
        if Instant::now() >= deadline {
            let mut held = holders(number)?;
            held.extend(openers(number));
            let who = if held.is_empty() { "still in use".to_owned() } else { held.join(", ") };
            let what = format!("is {who}; it goes away when that ends");
            return Err(Error::at(Kind::Busy, dev, what));
        }
        thread::sleep(POLL);
    }
    Ok(())
}

/// All loop devices with a file behind them, by number.
pub fn list() -> Result<Vec<LoopDevice>> {
    const TABLE: &str = "/sys/block";
    let failed = |e: &io::Error| match e.kind() {
        io::ErrorKind::NotFound => {
            let what = "is not mounted, and loop devices are found there: mount -t sysfs sysfs /sys";
            Error::at(Kind::Unsupported, "/sys", what)
        }
        _ => Error::io(e, TABLE, "cannot look for loop devices"),
    };
    let mut devices = Vec::new();
    for entry in fs::read_dir(TABLE).map_err(|e| failed(&e))? {
        let name = entry.map_err(|e| failed(&e))?.file_name();
        let number = name.as_bytes().strip_prefix(b"loop").and_then(parse);
        devices.extend(number.and_then(describe));
    }
    devices.sort_by_key(|device| device.number);
    Ok(devices)
}

/// The loop devices over one file, however they came to it: by another path, a bind mount, another namespace, or before
/// it was renamed. `path` finds those whose file does not say which it is (its daemon is gone).
pub fn over(path: &Path) -> Result<Vec<LoopDevice>> {
    let wanted = fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let mut devices = list()?;
    let said = identities(&devices);
    devices.retain(|device| {
        let same =
            said.iter().any(|(number, identity)| *number == device.number && Some(*identity) == wanted);
        same || device.backing == path
    });
    Ok(devices)
}

/// Device and inode number of the file behind each, as far as those files answer in time.
fn identities(devices: &[LoopDevice]) -> Vec<(u32, (u64, u64))> {
    let (say, said) = crossbeam_channel::unbounded();
    for device in devices.iter().cloned() {
        let say = say.clone();
        // A thread each: one that waits for ever keeps only itself, and goes with this process.
        let asked = super::process::spawn_thread("ploopfs/loop", move || {
            let _ = device.backing_identity().map(|identity| say.send((device.number, identity)));
        });
        if asked.is_err() {
            break;
        }
    }
    drop(say);
    let deadline = Instant::now() + ANSWER;
    std::iter::from_fn(|| said.recv_deadline(deadline).ok()).collect()
}

/// What sysfs says of one loop device; None where no file is attached. Names are bytes there, as everywhere.
fn describe(number: u32) -> Option<LoopDevice> {
    let sys = PathBuf::from(format!("/sys/block/loop{number}"));
    let read = |name: &str| fs::read(sys.join(name)).ok();
    let backing = read("loop/backing_file")?;
    let backing = backing.strip_suffix(b"\n").unwrap_or(&backing);
    if backing.is_empty() {
        return None;
    }
    let (backing, deleted) = match backing.strip_suffix(b" (deleted)") {
        Some(name) => (name, true),
        None => (backing, false),
    };
    let flag = |name: &str| read(name).is_some_and(|text| text.trim_ascii() == b"1");
    Some(LoopDevice {
        dev: PathBuf::from(format!("/dev/loop{number}")),
        number,
        backing: PathBuf::from(OsStr::from_bytes(backing)),
        deleted,
        direct_io: flag("loop/dio"),
        read_only: flag("ro"),
        offset: read("loop/offset").and_then(|text| parse(text.trim_ascii())).unwrap_or(0),
    })
}

/// The file behind a device and the kernel's count of its attachments: another process may attach the same number
/// again while we wait for it to go.
fn attached_as(number: u32) -> Option<(PathBuf, Vec<u8>)> {
    let device = describe(number)?;
    let count = fs::read(format!("/sys/block/loop{number}/diskseq")).unwrap_or_default();
    Some((device.backing, count))
}

fn number_of(dev: &Path) -> Result<u32> {
    let name = dev.strip_prefix("/dev").ok().and_then(Path::to_str);
    let number = name.and_then(|name| name.strip_prefix("loop")?.parse().ok());
    number.ok_or_else(|| Error::at(Kind::Invalid, dev, "is not a loop device (/dev/loopN)"))
}

fn retry(mut call: impl FnMut() -> libc::c_int) -> io::Result<libc::c_int> {
    loop {
        let result = call();
        if result >= 0 {
            return Ok(result);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests;
