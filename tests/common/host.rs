//! What lies under and over an image: temporary folders, loop devices, host and guest file systems.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use super::run::{Finished, Run, ok, until};
use super::text;

/// A folder on the disk, removed at the end.
pub fn temp_dir() -> TempDir {
    tempfile::Builder::new().prefix("ploopfs-test.").tempdir().expect("a temporary folder")
}

/// A folder in memory (tmpfs) where the machine has one with room, else on the disk.
pub fn memory_dir() -> TempDir {
    let memory = Path::new("/dev/shm");
    let room = rustix::fs::statvfs(memory).map_or(0, |status| status.f_bavail * status.f_frsize);
    if room < 4 << 30 {
        return temp_dir();
    }
    tempfile::Builder::new().prefix("ploopfs-test.").tempdir_in(memory).unwrap_or_else(|_| temp_dir())
}

/// A loop device over a file.
#[derive(Debug)]
pub struct Loop {
    device: PathBuf,
    /// See [`sequence`].
    sequence: Option<u64>,
    attached: bool,
}

impl Loop {
    /// Attaches `file`, with or without direct I/O; panics where loop refuses.
    #[track_caller]
    pub fn attach(file: &Path, direct: bool) -> Loop {
        Loop::try_attach(file, direct).unwrap_or_else(|done| panic!("{done}"))
    }

    /// Attaches `file`. Several tests race for free devices, so a lost race is tried again.
    pub fn try_attach(file: &Path, direct: bool) -> Result<Loop, Finished> {
        let mode = if direct { "--direct-io=on" } else { "--direct-io=off" };
        for attempt in 1.. {
            let done = Run::new("losetup").args([mode, "-f", "--show", text(file)]).limit(60).run();
            if done.success() {
                let device = PathBuf::from(done.stdout.trim());
                let sequence = sequence(&device);
                let attached = Loop { device, sequence, attached: true };
                assert_eq!(attached.direct(), direct, "direct I/O of {}", attached.device.display());
                return Ok(attached);
            }
            if attempt == 5 || !done.stderr.contains("busy") {
                return Err(done);
            }
        }
        unreachable!("the loop returns")
    }

    /// The device.
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// Whether the kernel says that direct I/O is on.
    pub fn direct(&self) -> bool {
        std::fs::read_to_string(in_sysfs(&self.device, "loop/dio")).is_ok_and(|text| text.trim() == "1")
    }

    /// Makes its file systems hold writes to a page back while loop copies it, so that a sector is written whole or
    /// not at all, as the disks that we stand in for do. Without it a sector that is overwritten at that moment is
    /// torn inside its 512 bytes (934 of them in 19,476 copies of a file that was rewritten all the time; with it
    /// none in 11,016), and a power cut before it is written again shows that: also where none of our code is near.
    fn demand_stable_pages(&self) {
        let switch = stable_pages(&self.device);
        std::fs::write(&switch, "1").unwrap_or_else(|error| panic!("{}: {error}", switch.display()));
    }

    /// Detaches it and waits until it is gone; panics where it stays.
    #[track_caller]
    pub fn detach(mut self) {
        self.attached = false;
        assert!(drop_loop(&self.device, self.sequence), "{} is still attached", self.device.display());
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if self.attached && !drop_loop(&self.device, self.sequence) {
            eprintln!("left behind: loop device {}", self.device.display());
        }
    }
}

/// What the kernel says of a device under this name.
fn in_sysfs(device: &Path, what: &str) -> PathBuf {
    Path::new("/sys/block").join(device.file_name().expect("/dev/loopN has a name")).join(what)
}

/// Where the kernel keeps whether pages under writeback stay as they are; it outlives the device's file.
fn stable_pages(device: &Path) -> PathBuf {
    in_sysfs(device, "queue/stable_writes")
}

/// The kernel's number for what a device shows now; it changes with each file that is attached.
pub fn sequence(device: &Path) -> Option<u64> {
    std::fs::read_to_string(in_sysfs(device, "diskseq")).ok()?.trim().parse().ok()
}

/// Detaches a device that has this [`sequence`]; true once it has no file any more (losetup -d returns before that), or
/// another one: then it was detached already, and is somebody else's.
pub fn drop_loop(device: &Path, its: Option<u64>) -> bool {
    if sequence(device) != its {
        return true;
    }
    let _ = std::fs::write(stable_pages(device), "0");
    let _ = Run::new("losetup").args(["-d", text(device)]).limit(20).run();
    let state = in_sysfs(device, "loop");
    until(Duration::from_secs(20), || !state.exists() || sequence(device) != its)
}

/// The loop devices over files in `folder`.
pub fn loops_in(folder: &Path) -> Vec<PathBuf> {
    let done = Run::new("losetup").args(["-l", "-n", "-O", "NAME,BACK-FILE"]).limit(20).run();
    let ours = |line: &str| {
        let (name, file) = line.trim().split_once(char::is_whitespace)?;
        Path::new(file.trim()).starts_with(folder).then(|| PathBuf::from(name))
    };
    done.stdout.lines().filter_map(ours).collect()
}

/// A file system mounted somewhere of its own.
#[derive(Debug)]
pub struct Guest {
    point: PathBuf,
    mounted: bool,
    _folder: Option<TempDir>,
}

impl Guest {
    /// Mounts `device`.
    #[track_caller]
    pub fn mount(device: &Path, options: &str) -> Guest {
        let folder = temp_dir();
        ok("mount", &["-o", options, text(device), text(folder.path())]);
        Guest { point: folder.path().to_owned(), mounted: true, _folder: Some(folder) }
    }

    /// A guard for a mount that something else makes, at `point`.
    pub fn adopt(point: &Path) -> Guest {
        Guest { point: point.to_owned(), mounted: true, _folder: None }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.point
    }

    /// Unmounts; panics where that fails.
    #[track_caller]
    pub fn umount(mut self) {
        ok("umount", &[text(&self.point)]);
        self.mounted = false;
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if !self.mounted {
            return;
        }
        let done = Run::new("umount").arg(&self.point).limit(30).run();
        if !done.success() && done.stderr.contains("busy") {
            let _ = Run::new("umount").arg("-l").arg(&self.point).limit(10).run();
        }
    }
}

/// A host file system of a chosen kind and size, in a sparse file under a loop device. The fields are dropped in
/// this order: unmounted, detached, removed.
#[derive(Debug)]
pub struct HostFs {
    guest: Guest,
    device: Loop,
    backing: PathBuf,
    _folder: Option<TempDir>,
}

impl HostFs {
    /// Makes one in memory (where there is room).
    #[track_caller]
    pub fn new(kind: &str, size: u64) -> HostFs {
        let folder = memory_dir();
        let backing = folder.path().join("host.fs");
        let mut host = HostFs::make(kind, size, &backing);
        host._folder = Some(folder);
        host
    }

    /// Makes one in `backing`, which the caller removes.
    #[track_caller]
    pub fn make(kind: &str, size: u64, backing: &Path) -> HostFs {
        let file = std::fs::File::create(backing).expect("the backing file");
        file.set_len(size).expect("a sparse file");
        let quiet = match kind {
            "ext4" => vec!["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
            // XFS wants direct I/O of whole blocks on a file that was cloned, and loop passes that on.
            "xfs" => vec!["-q", "-f", "-s", "size=4096"],
            "btrfs" => vec!["-q", "-f"],
            other => panic!("no such file system in the harness: {other}"),
        };
        Run::new(format!("mkfs.{kind}")).args(quiet).arg(backing).ok();
        HostFs::open(kind, backing)
    }

    /// Mounts one that exists, with its journal replayed; a copy beside its original may have the same id.
    #[track_caller]
    pub fn open(kind: &str, backing: &Path) -> HostFs {
        let device = Loop::attach(backing, true);
        device.demand_stable_pages();
        let options = if kind == "xfs" { "noatime,nouuid" } else { "noatime" };
        let guest = Guest::mount(device.device(), options);
        HostFs { guest, device, backing: backing.to_owned(), _folder: None }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.guest.path()
    }

    /// The file that is its disk.
    pub fn backing(&self) -> &Path {
        &self.backing
    }
}
