//! Loop devices: attach, detach, list.
//!
//! For command-line clients. Some ioctls of a loop device ask the file behind it (its length, its inode), so the
//! daemon that serves that file must never call them: it would wait for itself. [`list`] reads sysfs only, which
//! asks nobody, and is safe everywhere.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use crate::{Error, Kind, Result};

// linux/loop.h
const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
const LOOP_SET_CAPACITY: libc::Ioctl = 0x4C07;
const LOOP_SET_DIRECT_IO: libc::Ioctl = 0x4C08;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_DIRECT_IO: u32 = 16;
const LO_NAME_SIZE: usize = 64;

/// Others may take a free device before we configure it: then the next one is tried, so many times.
const ATTACH_TRIES: u32 = 64;
/// How often a device that is going away is looked at.
const POLL: Duration = Duration::from_millis(10);

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; LO_NAME_SIZE],
    crypt_name: [u8; LO_NAME_SIZE],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl LoopInfo {
    const ZERO: LoopInfo = LoopInfo {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; LO_NAME_SIZE],
        crypt_name: [0; LO_NAME_SIZE],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

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

/// Puts a loop device over the file at `path`, with direct I/O where the file can do it.
pub fn attach(path: &Path, read_only: bool) -> Result<LoopDevice> {
    attach_opened(path, read_only, &|flags| {
        let flags = flags | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::open(path, flags, Mode::empty())?))
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
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control").map_err(|e| {
        Error::io(&e, "/dev/loop-control", "cannot attach (is the module loop loaded? modprobe loop)")
    })?;
    let mut busy = io::Error::from_raw_os_error(libc::EBUSY);
    for _ in 0..ATTACH_TRIES {
        // SAFETY: the descriptor is open, and this ioctl takes no argument.
        let number = retry(|| unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) });
        let number = number.map_err(|e| failed(&e))?;
        match configure(number, &file, path, read_only) {
            Ok(()) => {
                let found = describe(number.unsigned_abs());
                return found.ok_or_else(|| failed(&io::Error::from_raw_os_error(libc::ENXIO)));
            }
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => busy = e,
            Err(e) => return Err(Error::io(&e, path, format!("cannot attach /dev/loop{number}"))),
        }
    }
    Err(failed(&busy))
}

fn configure(number: i32, file: &File, path: &Path, read_only: bool) -> io::Result<()> {
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
    Ok(())
}

/// Turns direct I/O on or off.
pub fn set_direct_io(dev: &Path, on: bool) -> Result<()> {
    let set = || -> io::Result<()> {
        let file = OpenOptions::new().read(true).write(true).open(dev).or_else(|_| File::open(dev))?;
        // SAFETY: the descriptor is open; the argument is a number.
        retry(|| unsafe { libc::ioctl(file.as_raw_fd(), LOOP_SET_DIRECT_IO, libc::c_ulong::from(on)) })?;
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
    set().map_err(|e| Error::io(&e, dev, "cannot tell this loop device its new size; try: losetup -c"))
}

/// Where the file systems on a loop device and its partitions are mounted, each file system once.
pub fn mounted_on(device: &LoopDevice) -> Vec<PathBuf> {
    let mut found: Vec<(String, PathBuf)> = mounts(device.number, &device.dev);
    let mut seen = std::collections::HashSet::new();
    found.retain(|(file_system, _)| seen.insert(file_system.clone()));
    found.into_iter().map(|(_, point)| point).collect()
}

/// Takes the file away from a loop device and returns when it is really gone, at most `wait` later.
///
/// The kernel lets go only when the last opener closes the device, so: (1) what holds it for long (a mount,
/// swap, a device stacked on it) is looked for first, and then nothing is done: a device marked to go would
/// vanish at the later umount, unasked; (2) clear; (3) wait for the kernel. [`Kind::Busy`] says who holds it.
pub fn detach(dev: &Path, wait: Duration) -> Result<()> {
    let number = number_of(dev)?;
    let Some(attached) = attached_as(number) else {
        return Err(Error::at(Kind::NotFound, dev, "has no file attached"));
    };
    let held = holders(number, dev);
    if !held.is_empty() {
        let what = format!("is {}; end that, then detach again", held.join(", "));
        return Err(Error::at(Kind::Busy, dev, what));
    }
    let clear = || -> io::Result<()> {
        let file = File::open(dev)?;
        // SAFETY: the descriptor is open, and this ioctl takes no argument.
        retry(|| unsafe { libc::ioctl(file.as_raw_fd(), LOOP_CLR_FD) })?;
        Ok(())
    };
    match clear() {
        // Somebody else detached it just now.
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => {}
        result => result.map_err(|e| Error::io(&e, dev, "cannot detach"))?,
    }
    let deadline = Instant::now() + wait;
    while attached_as(number).as_ref() == Some(&attached) {
        if Instant::now() >= deadline {
            let mut held = holders(number, dev);
            held.extend(openers(dev));
            let who = if held.is_empty() { "still in use".to_owned() } else { held.join(", ") };
            let what = format!("is {who}; it goes away when that ends");
            return Err(Error::at(Kind::Busy, dev, what));
        }
        thread::sleep(POLL);
    }
    Ok(())
}

/// All loop devices with a file behind them, by number.
pub fn list() -> io::Result<Vec<LoopDevice>> {
    let mut devices = Vec::new();
    for entry in fs::read_dir("/sys/block")? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("loop")?.parse().ok());
        devices.extend(number.and_then(describe));
    }
    devices.sort_by_key(|device| device.number);
    Ok(devices)
}

/// What sysfs says of one loop device; None where no file is attached.
fn describe(number: u32) -> Option<LoopDevice> {
    let sys = PathBuf::from(format!("/sys/block/loop{number}"));
    let read = |name: &str| fs::read_to_string(sys.join(name)).ok();
    let backing = read("loop/backing_file")?;
    let backing = backing.strip_suffix('\n').unwrap_or(&backing);
    if backing.is_empty() {
        return None;
    }
    let (backing, deleted) = match backing.strip_suffix(" (deleted)") {
        Some(name) => (name, true),
        None => (backing, false),
    };
    let flag = |name: &str| read(name).is_some_and(|text| text.trim_end() == "1");
    Some(LoopDevice {
        dev: PathBuf::from(format!("/dev/loop{number}")),
        number,
        backing: PathBuf::from(backing),
        deleted,
        direct_io: flag("loop/dio"),
        read_only: flag("ro"),
        offset: read("loop/offset").and_then(|text| text.trim_end().parse().ok()).unwrap_or(0),
    })
}

/// The file behind a device and the kernel's count of its attachments: somebody else may attach the same number
/// again while we wait for it to go.
fn attached_as(number: u32) -> Option<(PathBuf, String)> {
    let device = describe(number)?;
    let count = fs::read_to_string(format!("/sys/block/loop{number}/diskseq")).unwrap_or_default();
    Some((device.backing, count))
}

fn number_of(dev: &Path) -> Result<u32> {
    let name = dev.strip_prefix("/dev").ok().and_then(Path::to_str);
    let number = name.and_then(|name| name.strip_prefix("loop")?.parse().ok());
    number.ok_or_else(|| Error::at(Kind::Invalid, dev, "is not a loop device (/dev/loopN)"))
}

/// What holds the device for long, in words: mounts, swap, devices on top of it or of its partitions.
fn holders(number: u32, dev: &Path) -> Vec<String> {
    let mut held = Vec::new();
    for place in places(number) {
        for stacked in fs::read_dir(place.join("holders")).into_iter().flatten().flatten() {
            held.push(format!("used by /dev/{}", stacked.file_name().to_string_lossy()));
        }
    }
    held.extend(mounts(number, dev).into_iter().map(|(_, point)| format!("mounted at {}", point.display())));
    for line in fs::read_to_string("/proc/swaps").unwrap_or_default().lines().skip(1) {
        if line.split_whitespace().next().is_some_and(|source| is_device_or_partition(source, dev)) {
            held.push("used as swap".to_owned());
        }
    }
    held
}

/// The device itself and its partitions in sysfs.
fn places(number: u32) -> Vec<PathBuf> {
    let sys = PathBuf::from(format!("/sys/block/loop{number}"));
    let partition = format!("loop{number}p");
    let is_partition =
        |path: &PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&partition));
    let inside = fs::read_dir(&sys).into_iter().flatten().flatten().map(|entry| entry.path());
    inside.filter(is_partition).chain([sys.clone()]).collect()
}

/// The mounts of a device and its partitions: the file system ("major:minor") and the mount point.
fn mounts(number: u32, dev: &Path) -> Vec<(String, PathBuf)> {
    let numbers = places(number).into_iter().filter_map(|place| fs::read_to_string(place.join("dev")).ok());
    let numbers: Vec<String> = numbers.map(|dev| dev.trim_end().to_owned()).collect();
    let mut found = Vec::new();
    // btrfs shows a device number of its own, so the source is compared as well.
    for line in fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let source = words.iter().position(|w| *w == "-").and_then(|dash| words.get(dash + 2));
        let same_number = words.get(2).is_some_and(|place| numbers.iter().any(|n| n == place));
        let same_name = source.is_some_and(|source| is_device_or_partition(source, dev));
        if let (true, Some(file_system), Some(point)) = (same_number || same_name, words.get(2), words.get(4))
        {
            found.push(((*file_system).to_owned(), PathBuf::from(unescape(point))));
        }
    }
    found
}

fn is_device_or_partition(source: &str, dev: &Path) -> bool {
    let rest = dev.to_str().and_then(|dev| source.strip_prefix(dev));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('p'))
}

/// mountinfo writes space, tab, newline and backslash as octal.
fn unescape(text: &str) -> String {
    let codes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    codes.iter().fold(text.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

/// Processes that have the device open, by their links in /proc, which ask no file.
fn openers(dev: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let fds = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        if fds.into_iter().any(|fd| fs::read_link(fd.path()).is_ok_and(|link| link == dev)) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            let pid = process.file_name();
            found.push(format!("open in {} (pid {})", name.trim_end(), pid.to_string_lossy()));
        }
    }
    found
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
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};
    use std::process::Command;

    const WAIT: Duration = Duration::from_secs(10);

    /// A 16 MiB file with a loop device, both gone at the end.
    struct Attached {
        dir: tempfile::TempDir,
        path: PathBuf,
        device: LoopDevice,
    }

    impl Attached {
        fn new(read_only: bool) -> Attached {
            let dir = tempfile::tempdir().expect("temp folder");
            let path = dir.path().join("disk.img");
            File::create(&path).and_then(|f| f.set_len(16 << 20)).expect("create");
            let device = attach(&path, read_only).expect("attach");
            Attached { dir, path, device }
        }
    }

    impl Drop for Attached {
        fn drop(&mut self) {
            if describe(self.device.number).is_some_and(|d| d.backing == self.path) {
                let _ = detach(&self.device.dev, WAIT);
            }
        }
    }

    fn run(program: &str, args: &[&Path]) {
        let output = Command::new(program).args(args).output().expect(program);
        assert!(output.status.success(), "{program}: {output:?}");
    }

    #[test]
    fn an_attached_file_is_written_through_its_device_with_direct_io() {
        let a = Attached::new(false);
        assert!(a.device.direct_io && !a.device.read_only && !a.device.deleted, "{:?}", a.device);
        assert_eq!((&a.device.backing, a.device.offset), (&a.path, 0));
        let dev = OpenOptions::new().write(true).open(&a.device.dev).expect("open device");
        dev.write_all_at(&[7; 4096], 8192).expect("write");
        dev.sync_all().expect("sync");
        let mut buf = [0; 4096];
        File::open(&a.path).expect("open").read_exact_at(&mut buf, 8192).expect("read");
        assert_eq!(buf, [7; 4096]);
    }

    #[test]
    fn the_list_names_the_file_and_the_ioctl_its_inode() {
        let a = Attached::new(true);
        let listed = list().expect("list");
        let found = listed.iter().find(|d| d.dev == a.device.dev).expect("listed");
        assert_eq!((found, found.read_only), (&a.device, true));
        let meta = fs::metadata(&a.path).expect("stat");
        assert_eq!(found.backing_identity().expect("status"), (meta.dev(), meta.ino()));
        let dev = OpenOptions::new().write(true).open(&a.device.dev);
        dev.and_then(|dev| dev.write_all_at(&[1; 512], 0)).expect_err("read-only");
    }

    #[test]
    fn a_detached_device_is_gone_when_detach_returns() {
        let a = Attached::new(false);
        detach(&a.device.dev, WAIT).expect("detach");
        assert_ne!(describe(a.device.number).map(|d| d.backing), Some(a.path.clone()));
    }

    #[test]
    fn a_mounted_device_is_not_detached_and_the_mount_point_is_named() {
        struct Mounted(PathBuf);
        impl Drop for Mounted {
            fn drop(&mut self) {
                let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
            }
        }
        let a = Attached::new(false);
        run("mkfs.ext4", &[Path::new("-q"), &a.device.dev]);
        let point = a.dir.path().join("a point");
        fs::create_dir(&point).expect("mkdir");
        run("mount", &[&a.device.dev, &point]);
        let mounted = Mounted(point.clone());
        let error = detach(&a.device.dev, WAIT).expect_err("mounted");
        assert_eq!(error.kind(), Kind::Busy);
        assert!(error.to_string().contains(&format!("mounted at {}", point.display())), "{error}");
        assert!(describe(a.device.number).is_some(), "nothing was done");
        run("umount", &[&point]);
        drop(mounted);
        assert!(describe(a.device.number).is_some(), "and it is not marked to go");
        detach(&a.device.dev, WAIT).expect("detach");
    }

    #[test]
    fn a_device_that_somebody_has_open_is_waited_for_and_the_opener_named() {
        let a = Attached::new(false);
        let opener = File::open(&a.device.dev).expect("open device");
        let error = detach(&a.device.dev, Duration::from_millis(100)).expect_err("open");
        assert_eq!(error.kind(), Kind::Busy);
        assert!(error.to_string().contains(&format!("(pid {})", std::process::id())), "{error}");
        drop(opener);
        let deadline = Instant::now() + WAIT;
        while describe(a.device.number).is_some_and(|d| d.backing == a.path) {
            assert!(Instant::now() < deadline, "it goes away by itself");
            thread::sleep(POLL);
        }
    }

    #[test]
    fn many_that_attach_at_once_each_get_a_device_of_their_own() {
        let all: Vec<Attached> = thread::scope(|scope| {
            let each: Vec<_> = (0..6).map(|_| scope.spawn(|| Attached::new(false))).collect();
            each.into_iter().map(|one| one.join().expect("no panic")).collect()
        });
        let mut numbers: Vec<u32> = all.iter().map(|a| a.device.number).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), all.len());
        assert!(all.iter().all(|a| a.device.backing == a.path));
    }

    #[test]
    fn direct_io_is_switched_off_and_on() {
        let a = Attached::new(false);
        set_direct_io(&a.device.dev, false).expect("off");
        assert!(!describe(a.device.number).expect("attached").direct_io);
        set_direct_io(&a.device.dev, true).expect("on");
        assert!(describe(a.device.number).expect("attached").direct_io);
    }

    #[test]
    fn a_device_over_a_file_that_grew_is_as_large_as_it_once_it_is_told() {
        let a = Attached::new(false);
        let sectors = || {
            let text = fs::read_to_string(format!("/sys/block/loop{}/size", a.device.number)).expect("size");
            text.trim_end().parse::<u64>().expect("a number")
        };
        OpenOptions::new().write(true).open(&a.path).and_then(|f| f.set_len(32 << 20)).expect("grow");
        assert_eq!(sectors() * 512, 16 << 20);
        update_size(&a.device.dev).expect("told");
        assert_eq!(sectors() * 512, 32 << 20);
    }

    #[test]
    fn a_file_system_is_named_once_however_often_it_is_mounted() {
        struct Mounted(PathBuf);
        impl Drop for Mounted {
            fn drop(&mut self) {
                let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
            }
        }
        let a = Attached::new(false);
        run("mkfs.ext4", &[Path::new("-q"), &a.device.dev]);
        assert!(mounted_on(&a.device).is_empty());
        let points = ["one", "other"].map(|name| a.dir.path().join(name));
        points.iter().for_each(|point| fs::create_dir(point).expect("mkdir"));
        let mounted = points.each_ref().map(|point| {
            run("mount", &[&a.device.dev, point]);
            Mounted(point.clone())
        });
        assert_eq!(mounted_on(&a.device), [points[0].clone()]);
        drop(mounted);
    }

    #[test]
    fn what_is_no_loop_device_or_has_no_file_is_refused() {
        assert_eq!(detach(Path::new("/dev/null"), WAIT).expect_err("null").kind(), Kind::Invalid);
        assert_eq!(detach(Path::new("/dev/loop99999"), WAIT).expect_err("none").kind(), Kind::NotFound);
    }
}
