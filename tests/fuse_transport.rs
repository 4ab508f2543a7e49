//! A transport against the real kernel, with a file system made for the purpose. Needs root and /dev/fuse.
//! PLOOPFS_TRANSPORT says which (fuse).

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use ploopfs::fuse::notify::Notifier;
use ploopfs::fuse::ops::{
    Answer, Attr, Caller, Done, Errno, FileKind, FileSystem, Handle, Ino, Name, Now, OpenFlags, Opened,
    SetAttr, Space, Whence,
};
use ploopfs::fuse::session::{self, Transport};
use ploopfs::io::unmount::unmount;

const DISK: Ino = 2;
const SIZE: u64 = 16 << 20;
/// A read here panics.
const TRAP: u64 = 4096;
const DEADLINE: Duration = Duration::from_secs(20);

/// One file, `disk`, whose requests are counted and can be held up.
#[derive(Default)]
struct Probe {
    /// Reads are refused inline and answered 20 ms later from another thread.
    slow_reads: bool,
    /// Reads wait until `open_gate`.
    held_reads: bool,
    held: Mutex<Vec<(usize, Done<Bytes>)>>,
    /// Inline writes wait until `open_gate`.
    gated_writes: bool,
    in_flight: Arc<AtomicUsize>,
    most_in_flight: Arc<AtomicUsize>,
    written_here: AtomicUsize,
    written_later: AtomicUsize,
    gate: Mutex<bool>,
    gate_opened: Condvar,
    /// The names of the root: from the first of these numbers on, and before the second.
    first: AtomicUsize,
    names: AtomicUsize,
    ended: AtomicBool,
}

fn attr(ino: Ino, kind: FileKind, size: u64) -> Attr {
    let mtime = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 5);
    Attr { ino, kind, size, blocks: 8, mode: 0o700, links: 1, uid: 0, gid: 0, block_size: 1 << 20, mtime }
}

impl FileSystem for Probe {
    fn lookup(&self, _: Caller, parent: Ino, name: &OsStr, done: Done<Attr>) {
        done(match name.to_str() {
            Some("disk") if parent == 1 => Ok(attr(DISK, FileKind::File, SIZE)),
            Some(n) if parent == 1 && n.starts_with("name-") => Ok(attr(3, FileKind::File, 0)),
            _ => Err(Errno(libc::ENOENT)),
        });
    }
    fn forget(&self, _: Ino, _: u64) {}
    fn getattr(&self, ino: Ino, done: Done<Attr>) {
        done(Ok(match ino {
            1 => attr(1, FileKind::Folder, 0),
            DISK => attr(DISK, FileKind::File, SIZE),
            other => attr(other, FileKind::File, 0),
        }));
    }
    fn setattr(&self, _: Caller, _: Ino, change: SetAttr, done: Done<Attr>) {
        assert_ne!(change, SetAttr::default(), "something is asked for");
        thread::spawn(move || done(Err(Errno(libc::EPERM))));
    }
    fn readdir(&self, _: Ino, after: u64, most: usize, done: Done<Vec<Name>>) {
        // Name number i is at the place i + 3.
        let first = self.first.load(Ordering::Relaxed).max(after as usize - 2);
        let name = |i: usize| {
            let (name, next) = (format!("name-{i:05}").into(), i as u64 + 3);
            Name { ino: 3, kind: FileKind::File, name, next }
        };
        done(Ok((first..self.names.load(Ordering::Relaxed)).take(most).map(name).collect()));
    }
    fn statfs(&self, ino: Ino, done: Done<Space>) {
        let blocks = 100 + ino;
        done(Ok(Space { block_size: 4096, blocks, free: 50, available: 40, files: 9, files_free: 8 }));
    }
    fn change_name(&self, _: Caller, _: Ino, _: &OsStr) -> Answer<()> {
        Err(Errno(libc::EPERM))
    }
    fn open(&self, _: Caller, ino: Ino, _: OpenFlags, done: Done<Opened>) {
        thread::spawn(move || done(Ok(Opened { handle: ino, direct: true, backing: None })));
    }
    fn release(&self, _: Handle) {}
    fn read_now(&self, _: Handle, offset: u64, buf: &mut [u8]) -> Now<usize> {
        assert_ne!(offset, TRAP, "the trap of the test");
        if self.slow_reads || self.held_reads {
            return Now::Later;
        }
        buf.fill(7);
        Now::Done(Ok(buf.len()))
    }
    fn read_later(&self, _: Handle, _: u64, len: usize, done: Done<Bytes>) {
        let now = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_in_flight.fetch_max(now, Ordering::SeqCst);
        let gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        if self.held_reads && !*gate {
            return self.held.lock().unwrap_or_else(PoisonError::into_inner).push((len, done));
        }
        drop(gate);
        let in_flight = self.in_flight.clone();
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            in_flight.fetch_sub(1, Ordering::SeqCst);
            done(Ok(Bytes::from(vec![9; len])));
        });
    }
    fn writes_may_block(&self, _: Handle) -> bool {
        self.gated_writes
    }
    fn write_now(&self, _: Handle, _: u64, data: &[u8], _: OpenFlags) -> Now<usize> {
        self.written_here.fetch_add(1, Ordering::SeqCst);
        if self.gated_writes {
            let gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
            drop(self.gate_opened.wait_timeout_while(gate, DEADLINE, |open| !*open));
        }
        Now::Done(Ok(data.len()))
    }
    fn write_later(&self, _: Handle, _: u64, data: Bytes, _: OpenFlags, done: Done<usize>) {
        self.written_later.fetch_add(1, Ordering::SeqCst);
        done(Ok(data.len()));
    }
    fn fsync(&self, _: Handle, done: Done<()>) {
        done(Err(Errno(libc::ENOSPC)));
    }
    fn fallocate(&self, _: Handle, _: u64, _: u64, mode: i32, done: Done<()>) {
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        done(if mode == punch { Ok(()) } else { Err(Errno(libc::EOPNOTSUPP)) });
    }
    fn lseek(&self, _: Handle, offset: u64, whence: Whence, done: Done<u64>) {
        done(match whence {
            Whence::Data => Ok(offset),
            Whence::Hole => Err(Errno(libc::ENXIO)),
        });
    }
    fn ended(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }
}

impl Probe {
    fn open_gate(&self) {
        *self.gate.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.gate_opened.notify_all();
        let held = std::mem::take(&mut *self.held.lock().unwrap_or_else(PoisonError::into_inner));
        held.into_iter().for_each(|(len, done)| done(Ok(Bytes::from(vec![9; len]))));
    }
}

/// A served mount; unmounted and joined on drop.
struct Mounted {
    probe: Arc<Probe>,
    folder: tempfile::TempDir,
    notifier: Notifier,
    server: Option<JoinHandle<ploopfs::Result<()>>>,
}

impl Mounted {
    fn new(probe: Probe, threads: usize) -> Mounted {
        let probe = Arc::new(probe);
        let folder = tempfile::tempdir().expect("a temporary folder");
        let settings =
            session::Settings { threads, fs_name: "the, source".into(), ..session::Settings::default() };
        let transport = match std::env::var("PLOOPFS_TRANSPORT").as_deref() {
            Ok("uring") => Transport::Uring,
            _ => Transport::Fuse,
        };
        let session = session::mount(transport, probe.clone(), folder.path(), &settings).expect("a mount");
        let notifier = session.notifier();
        let server = Some(thread::spawn(move || session.run()));
        Mounted { probe, folder, notifier, server }
    }

    fn disk(&self) -> File {
        let path = self.folder.path().join("disk");
        File::options().read(true).write(true).open(path).expect("the file opens")
    }

    fn join(&mut self) -> ploopfs::Result<()> {
        let server = self.server.take().expect("joined once");
        server.join().expect("the session does not panic")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.probe.open_gate();
        if let Some(server) = self.server.take() {
            let _ = unmount(self.folder.path(), true);
            let _ = server.join();
        }
    }
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < end, "not in time: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn mount_table_line(folder: &Path) -> Option<String> {
    let table = std::fs::read_to_string("/proc/self/mounts").expect("a mount table");
    let point = folder.to_str().expect("an ASCII path").to_owned();
    table.lines().find(|line| line.split(' ').nth(1) == Some(point.as_str())).map(str::to_owned)
}

#[test]
fn sixteen_asynchronous_direct_reads_of_one_submitter_are_in_flight_at_once() {
    let mounted = Mounted::new(Probe { slow_reads: true, ..Probe::default() }, 2);
    let disk = mounted.folder.path().join("disk");
    let fio = Command::new("fio")
        .args(["--name=t", "--rw=randread", "--bs=4k", "--ioengine=libaio", "--direct=1", "--iodepth=16"])
        .args(["--number_ios=160", "--size=8m", "--offset=1m", "--allow_file_create=0"])
        .arg(format!("--filename={}", disk.display()))
        .output()
        .expect("fio is installed");
    assert!(fio.status.success(), "{}", String::from_utf8_lossy(&fio.stderr));
    assert_eq!(mounted.probe.most_in_flight.load(Ordering::SeqCst), 16);
}

#[test]
fn a_panic_answers_one_request_with_eio_and_every_thread_goes_on() {
    let mounted = Mounted::new(Probe::default(), 2);
    let disk = mounted.disk();
    let mut buf = [0; 512];
    for _ in 0..8 {
        let error = disk.read_at(&mut buf, TRAP).expect_err("the handler panics");
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
    }
    disk.read_exact_at(&mut buf, 0).expect("the mount still serves");
    assert_eq!(buf, [7; 512]);
}

#[test]
fn the_last_free_thread_hands_a_blocking_write_over_and_keeps_serving() {
    let mounted = Mounted::new(Probe { gated_writes: true, ..Probe::default() }, 2);
    let disk = Arc::new(mounted.disk());
    let first = {
        let disk = disk.clone();
        thread::spawn(move || disk.write_at(&[1; 4096], 0))
    };
    until("the first write waits on its thread", || mounted.probe.written_here.load(Ordering::SeqCst) == 1);
    assert_eq!(disk.write_at(&[2; 4096], 8192).expect("handed over"), 4096);
    assert_eq!(mounted.probe.written_later.load(Ordering::SeqCst), 1);
    assert_eq!(disk.read_at(&mut [0; 512], 0).expect("a read is served meanwhile"), 512);
    mounted.probe.open_gate();
    assert_eq!(first.join().expect("no panic").expect("the first write ends"), 4096);
}

/// More than the 64 entries that a queue of the rings begins with, fewer than the 256 that it may come to have.
#[test]
fn many_requests_that_wait_leave_others_of_their_cpu_alone() {
    many_wait(100);
}

#[test]
fn more_requests_at_once_than_a_queue_has_entries_are_taken_when_it_gets_more() {
    many_wait(600);
}

fn many_wait(many: usize) {
    let mounted = Mounted::new(Probe { held_reads: true, ..Probe::default() }, 2);
    let disk = Arc::new(mounted.disk());
    let all = rustix::thread::sched_getaffinity(None).expect("our CPUs");
    let cpu = (0..1024).find(|cpu| all.is_set(*cpu)).expect("one at least");
    let mut one = rustix::thread::CpuSet::new();
    one.set(cpu);
    let all_at_once = Arc::new(std::sync::Barrier::new(many));
    let readers: Vec<_> = (0..many)
        .map(|_| {
            let (disk, all_at_once) = (disk.clone(), all_at_once.clone());
            thread::spawn(move || {
                rustix::thread::sched_setaffinity(None, &one).expect("bound");
                all_at_once.wait();
                disk.read_at(&mut [0; 512], 0)
            })
        })
        .collect();
    let waiting = || mounted.probe.in_flight.load(Ordering::SeqCst);
    until("many wait", || waiting() >= 64);
    let (send, answered) = std::sync::mpsc::channel();
    let other = mounted.folder.path().join("name-1");
    thread::spawn(move || {
        rustix::thread::sched_setaffinity(None, &one).expect("bound");
        let _ = send.send(other.symlink_metadata().is_ok());
    });
    assert!(answered.recv_timeout(DEADLINE).expect("a look-up is answered beside them"));
    until("all wait", || waiting() == many);
    mounted.probe.open_gate();
    for reader in readers {
        assert_eq!(reader.join().expect("no panic").expect("read"), 512);
    }
}

/// Names of the threads of this process.
fn thread_names() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("our own threads");
    let names = tasks.flatten().map(|task| std::fs::read_to_string(task.path().join("comm")));
    names.map_while(Result::ok).map(|name| name.trim().to_owned()).collect()
}

#[test]
fn every_thread_is_there_before_the_first_request_and_named_by_us() {
    let mounted = Mounted::new(Probe::default(), 7);
    // No other test has so many; and none of them has had a request.
    let last = "ploopfs/t6".to_owned();
    until("all threads are there", || thread_names().contains(&last));
    assert_eq!(mounted.probe.in_flight.load(Ordering::SeqCst), 0);
    // Other tests' sessions may begin just now.
    until("no thread has its maker's name", || !thread_names().iter().any(|name| name.starts_with("fuser")));
}

#[test]
fn a_folder_that_is_read_on_one_thread_is_read_on_on_another() {
    let mounted = Mounted::new(Probe { names: AtomicUsize::new(3000), ..Probe::default() }, 4);
    let readers: Vec<_> = (0..8)
        .map(|_| {
            let folder = mounted.folder.path().to_owned();
            thread::spawn(move || std::fs::read_dir(folder).expect("opens").map_while(Result::ok).count())
        })
        .collect();
    for reader in readers {
        assert_eq!(reader.join().expect("no panic"), 3000);
    }
}

#[test]
fn the_end_of_a_session_leaves_a_newer_mount_on_the_same_folder_alone() {
    let mut mounted = Mounted::new(Probe::default(), 2);
    let folder = mounted.folder.path().to_owned();
    let held = mounted.disk();
    unmount(&folder, true).expect("detached while a file is open");
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("newer", &folder, "tmpfs", flags, None).expect("a newer mount");
    assert!(!mounted.probe.ended.load(Ordering::SeqCst), "the open file keeps the session");
    drop(held);
    let ended = mounted.join();
    let line = mount_table_line(&folder);
    let _ = unmount(&folder, true);
    ended.expect("a clean end");
    assert!(mounted.probe.ended.load(Ordering::SeqCst));
    assert!(line.is_some_and(|l| l.starts_with("newer ")), "the newer mount is gone");
}

#[test]
fn the_mount_table_shows_type_source_and_the_options_asked_for() {
    let mounted = Mounted::new(Probe::default(), 1);
    let line = mount_table_line(mounted.folder.path()).expect("in the table");
    assert!(line.starts_with("the,\\040source "), "{line}");
    for part in [
        " fuse.ploopfs ",
        "nosuid",
        "nodev",
        "noatime",
        "default_permissions",
        "allow_other",
        "max_read=1048576",
    ] {
        assert!(line.contains(part), "{part} in {line}");
    }
}

#[test]
fn a_folder_of_many_names_is_listed_once_each_in_order() {
    let mounted = Mounted::new(Probe { names: AtomicUsize::new(3000), ..Probe::default() }, 2);
    let names: Vec<_> = std::fs::read_dir(mounted.folder.path())
        .expect("the root opens")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    let want: Vec<_> = (0..3000).map(|i| std::ffi::OsString::from(format!("name-{i:05}"))).collect();
    assert_eq!(names, want);
}

#[test]
fn names_that_vanish_while_a_folder_is_read_do_not_shift_the_rest() {
    let mounted = Mounted::new(Probe { names: AtomicUsize::new(3000), ..Probe::default() }, 2);
    let mut entries = std::fs::read_dir(mounted.folder.path()).expect("the root opens");
    entries.next().expect("a first name").expect("readable");
    mounted.probe.first.store(2000, Ordering::Relaxed);
    let rest: Vec<_> = entries.map(|entry| entry.expect("an entry").file_name()).collect();
    let want: Vec<_> = (2000..3000).map(|i| std::ffi::OsString::from(format!("name-{i:05}"))).collect();
    // In front of those that stay: what was read before, once each.
    assert!(rest.ends_with(&want) && rest.len() < 2999, "{}", rest.len());
    assert!(rest.is_sorted() && rest.iter().collect::<std::collections::HashSet<_>>().len() == rest.len());
}

#[test]
fn changes_of_names_sizes_and_modes_are_eperm_and_errors_arrive_as_they_are() {
    let mounted = Mounted::new(Probe::default(), 2);
    let root = mounted.folder.path();
    let errno = |e: std::io::Error| e.raw_os_error();
    assert_eq!(File::create(root.join("new")).map(drop).map_err(errno), Err(Some(libc::EPERM)));
    assert_eq!(std::fs::create_dir(root.join("new")).map_err(errno), Err(Some(libc::EPERM)));
    assert_eq!(std::fs::remove_file(root.join("disk")).map_err(errno), Err(Some(libc::EPERM)));
    assert_eq!(std::fs::rename(root.join("disk"), root.join("d")).map_err(errno), Err(Some(libc::EPERM)));
    let disk = mounted.disk();
    assert_eq!(disk.set_len(5).map_err(errno), Err(Some(libc::EPERM)));
    assert_eq!(disk.sync_all().map_err(errno), Err(Some(libc::ENOSPC)));
    let mode = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&disk, mode, 512, 512).expect("the mode bits arrive");
    assert_eq!(rustix::fs::seek(&disk, rustix::fs::SeekFrom::Data(12345)), Ok(12345));
    assert_eq!(rustix::fs::seek(&disk, rustix::fs::SeekFrom::Hole(1)), Err(rustix::io::Errno::NXIO));
}

#[test]
fn stat_and_statfs_show_what_the_file_system_says_of_that_file() {
    let mounted = Mounted::new(Probe::default(), 2);
    let path = mounted.folder.path().join("disk");
    let status = std::fs::metadata(&path).expect("stat");
    assert_eq!((status.ino(), status.len(), status.blocks(), status.blksize()), (DISK, SIZE, 8, 1 << 20));
    assert_eq!((status.mtime(), status.mtime_nsec()), (1_000_000_000, 5));
    let space = rustix::fs::statvfs(&path).expect("statfs");
    assert_eq!((space.f_bsize, space.f_frsize, space.f_blocks), (4096, 4096, 102));
    assert_eq!((space.f_bfree, space.f_bavail), (50, 40));
}

#[test]
fn notifications_are_taken_by_the_kernel_and_harmless_after_the_end() {
    let mut mounted = Mounted::new(Probe::default(), 2);
    let disk = mounted.disk();
    let notifier = mounted.notifier.clone();
    notifier.attributes_changed(DISK);
    notifier.name_changed(1, OsStr::new("disk"));
    notifier.name_changed(1, OsStr::new("never seen"));
    drop(disk);
    unmount(mounted.folder.path(), true).expect("unmounted");
    mounted.join().expect("a clean end");
    notifier.attributes_changed(DISK);
}
