//! The live set and the tree over real files, without a kernel: who is served, what opening and closing does to
//! an image, and what each operation answers.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use ploopfs::Kind;
use ploopfs::folder::{Folder, FolderOptions};
use ploopfs::format::header::{CLOSED, Header, IN_USE};
use ploopfs::fuse::ops::{
    Answer, Attr, Caller, Done, FileKind, FileSystem, Name, Now, OpenFlags, SetAttr, Whence,
};
use ploopfs::io::lock::{DeltaLock, Use};
use ploopfs::io::new_file::NewFile;
use ploopfs::io::real::{Access, RealFile};
use ploopfs::tree::{MountInfo, Tree};
use ploopfs::vdisk::{Engine, Options};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
/// Disk size of the images here.
const SIZE: u64 = 10 * MIB;
const ROOT: u64 = 1;
const NOBODY: Caller = Caller { uid: 0, gid: 0, pid: 0, request: 0 };

/// An empty v2 image of ten clusters.
fn image_bytes() -> Vec<u8> {
    let mut bytes = vec![0; MIB as usize];
    bytes[..16].copy_from_slice(b"WithouFreSpacExt");
    bytes[16] = 2;
    bytes[28..32].copy_from_slice(&2048u32.to_le_bytes());
    bytes[32..36].copy_from_slice(&10u32.to_le_bytes());
    bytes[36..44].copy_from_slice(&(SIZE / 512).to_le_bytes());
    bytes[48..52].copy_from_slice(&2048u32.to_le_bytes());
    bytes
}

fn make(temp: &TempDir, name: &str) -> PathBuf {
    let path = temp.path().join(name);
    fs::write(&path, image_bytes()).expect("the image is written");
    path
}

fn engine() -> Arc<Engine> {
    Engine::new(Options::default(), Box::new(|_| {}))
}

fn serve(temp: &TempDir) -> Arc<Folder> {
    Folder::open(temp.path(), &engine(), FolderOptions::default()).expect("the folder opens")
}

fn temp() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

fn served(folder: &Folder) -> Vec<String> {
    let images = folder.images().into_iter().filter(|i| i.served);
    images.map(|i| i.name.into_string().expect("ASCII")).collect()
}

fn header(path: &Path) -> Header {
    let mut head = [0; 64];
    File::open(path).and_then(|f| f.read_exact_at(&mut head, 0)).expect("the header can be read");
    Header::parse(&head).expect("the header is good")
}

/// Polls until `what` holds; the wording is for the failure.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn is_free(path: &Path) -> bool {
    let file = Arc::new(RealFile::open(path, Access::ReadOnly).expect("the image opens"));
    DeltaLock::acquire(file, Use::Writer).is_ok()
}

// ---- The folder ----

#[test]
fn a4_the_in_use_mark_stays_until_the_last_of_two_handles_is_closed() {
    let temp = temp();
    let path = make(&temp, "vm1.hds");
    let folder = serve(&temp);
    let a = folder.open_image("vm1", true).expect("opens");
    let b = folder.open_image("vm1", true).expect("opens");
    assert_eq!(header(&path).in_use, CLOSED, "nothing is marked before the first write");
    a.image().write_at(0, &[7; 4096]).expect("writes");
    assert_eq!(header(&path).in_use, IN_USE);
    drop(b);
    until("the release is counted", || folder.images()[0].openers == 1);
    assert_eq!(header(&path).in_use, IN_USE);
    assert!(!is_free(&path));
    drop(a);
    until("the image is closed", || folder.images()[0].mode == "closed");
    until("the lock is given back", || is_free(&path));
    assert_eq!(header(&path).in_use, CLOSED);
}

#[test]
fn an_image_is_locked_while_open_and_free_while_idle() {
    let temp = temp();
    let path = make(&temp, "vm1.hds");
    let folder = serve(&temp);
    assert!(is_free(&path));
    let open = folder.open_image("vm1", false).expect("opens");
    assert!(!is_free(&path));
    assert_eq!(folder.busy(), ["vm1"]);
    drop(open);
    until("the lock is given back", || is_free(&path));
    // Counted a moment after that.
    until("nothing is busy", || folder.busy().is_empty());
}

#[test]
fn an_image_that_got_its_name_when_it_was_finished_is_taken_in() {
    let temp = temp();
    let folder = serve(&temp);
    folder.start_watch().expect("watched");
    // Linked to its name, and not written and closed under it.
    let new = NewFile::begin(&temp.path().join("vm1.hds")).expect("begun");
    new.file().write_all_at(&image_bytes(), 0).expect("written");
    new.commit().expect("named");
    until("it is served", || served(&folder) == ["vm1"]);
}

#[test]
fn an_image_that_somebody_else_has_is_in_use_and_opens_when_it_is_free() {
    let temp = temp();
    let path = make(&temp, "vm1.hds");
    let folder = serve(&temp);
    let other = Arc::new(RealFile::open(&path, Access::ReadOnly).expect("opens"));
    let lock = DeltaLock::acquire(other, Use::Writer).expect("free");
    let refused = folder.open_image("vm1", false).err().expect("refused");
    assert_eq!(refused.kind(), Kind::InUse);
    drop(lock);
    folder.open_image("vm1", true).expect("opens");
}

#[test]
fn opens_that_race_with_closes_always_find_the_image_free() {
    let temp = temp();
    make(&temp, "vm1.hds");
    let folder = serve(&temp);
    thread::scope(|scope| {
        for i in 0..4 {
            let folder = &folder;
            scope.spawn(move || {
                for _ in 0..50 {
                    let open = folder.open_image("vm1", i % 2 == 0).expect("opens");
                    folder.images();
                    drop(open);
                }
            });
        }
    });
    until("everything is closed", || folder.images()[0].mode == "closed");
}

#[test]
fn a_damaged_table_keeps_the_image_readable_and_refuses_writers() {
    let temp = temp();
    let mut bytes = image_bytes();
    bytes[64..68].copy_from_slice(&1000u32.to_le_bytes());
    fs::write(temp.path().join("vm1.hds"), bytes).expect("written");
    let folder = serve(&temp);
    let reader = folder.open_image("vm1", false).expect("opens");
    let refused = folder.open_image("vm1", true).err().expect("refused");
    assert_eq!(refused.kind(), Kind::Damaged);
    assert_eq!(folder.images()[0].mode, "read-only");
    assert!(folder.images()[0].reason.is_some());
    reader.image().read_at(MIB, 512).expect("the rest is read");
}

#[test]
fn a_bad_header_leaves_out_one_image_and_says_why() {
    let temp = temp();
    make(&temp, "good.hds");
    fs::write(temp.path().join("bad.hds"), b"With").expect("written");
    let folder = serve(&temp);
    assert_eq!(served(&folder), ["good"]);
    let bad = &folder.images()[0];
    assert_eq!(bad.name, "bad");
    assert!(bad.reason.as_ref().expect("a reason").contains("damaged"), "{bad:?}");
}

#[test]
fn a_read_only_mount_opens_nothing_for_writing() {
    let temp = temp();
    make(&temp, "vm1.hds");
    let options = FolderOptions { read_only: true, ..FolderOptions::default() };
    let folder = Folder::open(temp.path(), &engine(), options).expect("the folder opens");
    assert_eq!(folder.open_image("vm1", true).err().expect("refused").kind(), Kind::ReadOnly);
    folder.open_image("vm1", false).expect("opens");
}

#[test]
fn a_folder_that_is_served_is_refused_to_a_second() {
    let temp = temp();
    let _first = serve(&temp);
    let second = Folder::open(temp.path(), &engine(), FolderOptions::default());
    assert_eq!(second.err().expect("refused").kind(), Kind::InUse);
}

#[test]
fn two_sources_with_one_name_are_not_served_until_one_goes() {
    let temp = temp();
    let file = make(&temp, "vm1.hds");
    File::create(temp.path().join("vm1.raw")).expect("created").set_len(MIB).expect("sized");
    let folder = serve(&temp);
    assert!(served(&folder).is_empty());
    assert_eq!(folder.images().len(), 2);
    fs::remove_file(file).expect("removed");
    folder.rescan_now().expect("looked");
    assert_eq!(served(&folder), ["vm1"]);
}

#[test]
fn a_rescan_takes_in_what_was_created_at_once() {
    let temp = temp();
    let folder = serve(&temp);
    folder.start_watch().expect("watched");
    make(&temp, ".vm1.new");
    fs::rename(temp.path().join(".vm1.new"), temp.path().join("vm1.hds")).expect("renamed");
    folder.rescan_now().expect("looked");
    assert_eq!(served(&folder), ["vm1"]);
    folder.stop_watch();
}

#[test]
fn a_file_that_is_moved_in_appears_after_it_was_still_and_goes_when_it_is_removed() {
    let temp = temp();
    let folder = serve(&temp);
    folder.start_watch().expect("watched");
    make(&temp, ".new");
    let moved = Instant::now();
    fs::rename(temp.path().join(".new"), temp.path().join("vm1.hds")).expect("renamed");
    until("the image appears", || !served(&folder).is_empty());
    assert!(moved.elapsed() >= Duration::from_secs(2), "{:?}", moved.elapsed());
    fs::remove_file(temp.path().join("vm1.hds")).expect("removed");
    until("the image goes", || served(&folder).is_empty());
}

#[test]
fn a_file_that_is_still_being_written_is_not_taken_in() {
    let temp = temp();
    let folder = serve(&temp);
    folder.start_watch().expect("watched");
    let mut file = File::create(temp.path().join("slow.hds")).expect("created");
    file.write_all(&image_bytes()).expect("written");
    // Another file that comes later is taken in, so the slow one was seen and passed over.
    make(&temp, ".other");
    fs::rename(temp.path().join(".other"), temp.path().join("other.hds")).expect("renamed");
    until("the other appears", || served(&folder) == ["other"]);
    folder.rescan_now().expect("looked");
    assert_eq!(served(&folder), ["other"]);
    drop(file);
    until("the slow one appears", || served(&folder) == ["other", "slow"]);
}

#[test]
fn an_open_image_stays_served_when_its_file_goes_and_goes_with_its_last_close() {
    let temp = temp();
    let path = make(&temp, "vm1.hds");
    let folder = serve(&temp);
    let open = folder.open_image("vm1", true).expect("opens");
    open.image().write_at(0, b"kept").expect("writes");
    fs::remove_file(&path).expect("removed");
    make(&temp, "vm1.hds");
    folder.rescan_now().expect("looked");
    let images = folder.images();
    assert_eq!(images.iter().filter(|i| i.served).count(), 1);
    assert!(images.iter().any(|i| !i.served), "the newcomer is left out: {images:?}");
    assert_eq!(&open.image().read_at(0, 4).expect("reads")[..], b"kept");
    let old = folder.find(OsStr::new("vm1")).expect("served").id();
    drop(open);
    until("the newcomer takes the name", || {
        folder.find(OsStr::new("vm1")).is_some_and(|entry| entry.id() != old)
    });
}

#[test]
fn the_end_closes_every_image_whoever_has_it_and_opens_nothing_more() {
    let temp = temp();
    let (a, b) = (make(&temp, "a.hds"), make(&temp, "b.hds"));
    make(&temp, "idle.hds");
    let folder = serve(&temp);
    let opens: Vec<_> = ["a", "b"].map(|n| folder.open_image(n, true).expect("opens")).into();
    opens.iter().for_each(|o| o.image().write_at(0, &[1; 512]).expect("writes"));
    assert!(folder.sync_all().iter().all(|(_, result)| result.is_ok()));
    let closed = folder.close_all();
    assert_eq!(closed.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert!(closed.iter().all(|(_, result)| result.is_ok()));
    for path in [&a, &b] {
        assert_eq!(header(path).in_use, CLOSED);
        assert!(is_free(path));
    }
    assert!(opens[0].image().read_at(0, 512).is_err());
    assert_eq!(folder.open_image("idle", false).err().expect("refused").kind(), Kind::Busy);
    drop(opens);
    assert!(folder.close_all().is_empty());
}

/// Over a file that fails or is slow on demand: `cargo test --features faults --test live_set`.
#[cfg(feature = "faults")]
mod with_faults {
    use super::*;
    use ploopfs::io::fault::{FaultFile, FaultPlan, Op};
    use ploopfs::progress::Progress;
    use ploopfs::vdisk::live::Work;

    fn serve_with(temp: &TempDir, plan: &Arc<FaultPlan>) -> Arc<Folder> {
        let plan = plan.clone();
        let wrap = Arc::new(move |file| Arc::new(FaultFile::new(file, plan.clone())) as _);
        let options = FolderOptions { wrap: Some(wrap), ..FolderOptions::default() };
        Folder::open(temp.path(), &engine(), options).expect("the folder opens")
    }

    #[test]
    fn r7_an_image_whose_sync_failed_is_read_only_until_everybody_has_closed_it() {
        let temp = temp();
        let path = make(&temp, "vm1.hds");
        let trigger = temp.path().join(".trigger");
        let plan = format!("fail=sync:1:EIO:forever,trigger={}", trigger.display());
        let plan = Arc::new(plan.parse().expect("a plan"));
        let folder = serve_with(&temp, &plan);
        let open = folder.open_image("vm1", true).expect("opens");
        open.image().write_at(0, &[1; 4096]).expect("writes");
        fs::write(&trigger, "").expect("armed");
        open.image().flush_now().expect_err("the sync fails");
        fs::remove_file(&trigger).expect("disarmed");
        let image = &folder.images()[0];
        assert_eq!(image.mode, "read-only");
        assert!(image.reason.as_ref().expect("a reason").contains("no longer be written"), "{image:?}");
        assert_eq!(folder.open_image("vm1", true).err().expect("refused").kind(), Kind::ReadOnly);
        drop(open);
        until("the image is closed", || folder.images()[0].mode == "closed");
        assert_eq!(header(&path).in_use, IN_USE, "a close that failed leaves the mark");
        assert!(folder.images()[0].reason.is_some());
        folder.open_image("vm1", true).expect("opens anew");
    }

    /// Its write may land in what the next holder of the lock has put there.
    #[test]
    fn an_operation_that_a_forced_end_did_not_wait_for_keeps_the_image_locked() {
        let temp = temp();
        let path = make(&temp, "vm1.hds");
        let plan = Arc::new(FaultPlan::default());
        let folder = serve_with(&temp, &plan);
        let open = folder.open_image("vm1", true).expect("opens");
        plan.set_delay(Op::Read, 6000);
        let worker = folder.clone();
        let work = Work::Compact { dry_run: false, defrag: false };
        let operation = thread::spawn(move || worker.work("vm1", &work, &Progress::new()));
        until("the host hangs", || plan.counters(Op::Read).running > 0);
        let closed = folder.close_all();
        assert!(closed[0].1.is_err() && plan.counters(Op::Read).running > 0, "{closed:?}");
        assert!(!is_free(&path), "its files are locked as long as it has them");
        plan.set_delay(Op::Read, 0);
        operation.join().expect("no panic").expect_err("it was closed");
        drop(open);
        until("its last user is gone", || is_free(&path));
        assert_eq!(header(&path).in_use, CLOSED, "nothing was changed");
    }

    #[test]
    fn an_open_waits_for_a_slow_close_and_a_release_waits_for_nothing() {
        let temp = temp();
        make(&temp, "vm1.hds");
        let plan: Arc<FaultPlan> = Arc::new("delay=sync:1".parse().expect("a plan"));
        let folder = serve_with(&temp, &plan);
        let open = folder.open_image("vm1", true).expect("opens");
        open.image().write_at(0, &[1; 4096]).expect("writes");
        plan.set_delay(Op::Sync, 500);
        let begun = Instant::now();
        drop(open);
        let released = begun.elapsed();
        let open = folder.open_image("vm1", true).expect("opens, and is not in use");
        assert!(begun.elapsed() >= Duration::from_millis(500), "the close syncs first");
        assert!(released < Duration::from_millis(250), "{released:?}");
        assert_eq!(&open.image().read_at(0, 4096).expect("reads")[..], [1; 4096]);
    }
}

// ---- The tree ----

struct Mount {
    _temp: TempDir,
    path: PathBuf,
    folder: Arc<Folder>,
    tree: Arc<Tree>,
}

fn mount() -> Mount {
    let temp = temp();
    let path = make(&temp, "vm1.hds");
    let engine = engine();
    let folder = Folder::open(temp.path(), &engine, FolderOptions::default()).expect("the folder opens");
    let info = MountInfo {
        mountpoint: "/mnt/x".into(),
        transport: "fuse",
        manage: false,
        sandbox: Arc::default(),
        restarts: Arc::default(),
    };
    let tree = Tree::new(folder.clone(), engine, info);
    Mount { _temp: temp, path, folder, tree }
}

/// Waits for an answer.
fn ask<T: Send + 'static>(act: impl FnOnce(Done<T>)) -> Answer<T> {
    let (send, receive) = mpsc::channel();
    act(Box::new(move |answer| send.send(answer).expect("the test waits")));
    receive.recv_timeout(Duration::from_secs(20)).expect("an answer")
}

fn errno<T: std::fmt::Debug>(answer: Answer<T>) -> i32 {
    answer.expect_err("refused").0
}

impl Mount {
    fn find_in(&self, folder: u64, name: &str) -> Answer<Attr> {
        ask(|done| self.tree.lookup(NOBODY, folder, name.as_ref(), done))
    }

    fn stat(&self, ino: u64) -> Answer<Attr> {
        ask(|done| self.tree.getattr(ino, done))
    }

    fn names(&self, ino: u64, after: u64, most: usize) -> Vec<Name> {
        ask(|done| self.tree.readdir(ino, after, most, done)).expect("listed")
    }

    fn find(&self, name: &str) -> Answer<Attr> {
        self.find_in(ROOT, name)
    }

    fn open(&self, name: &str, raw: i32) -> Answer<u64> {
        let ino = self.find(name)?.ino;
        ask(|done| self.tree.open(NOBODY, ino, OpenFlags { raw }, done)).map(|opened| opened.handle)
    }

    fn vm1(&self, raw: i32) -> u64 {
        self.open("vm1.img", raw).expect("opens")
    }

    /// As a transport does it: first at once, then later.
    fn write(&self, handle: u64, offset: u64, data: &[u8], raw: i32) -> Answer<usize> {
        let flags = OpenFlags { raw };
        match self.tree.write_now(handle, offset, data, flags) {
            Now::Done(answer) => answer,
            Now::Later => {
                let data = Bytes::copy_from_slice(data);
                ask(|done| self.tree.write_later(handle, offset, data, flags, done))
            }
        }
    }

    fn read(&self, handle: u64, offset: u64, len: usize) -> Answer<Vec<u8>> {
        let mut buf = vec![0xEE; len];
        match self.tree.read_now(handle, offset, &mut buf) {
            Now::Done(answer) => answer.map(|n| buf[..n].to_vec()),
            Now::Later => ask(|done| self.tree.read_later(handle, offset, len, done)).map(|b| b.to_vec()),
        }
    }

    fn punch(&self, handle: u64, offset: u64, len: u64, mode: i32) -> Answer<()> {
        ask(|done| self.tree.fallocate(handle, offset, len, mode, done))
    }
}

#[test]
fn the_root_shows_images_and_our_own_folder() {
    let mount = mount();
    let names: Vec<_> = mount.names(ROOT, 2, 100).into_iter().map(|n| n.name).collect();
    assert_eq!(names, [".ploopfs", ".snapshots", "vm1.img"]);
    assert_eq!(mount.stat(ROOT).expect("stat").kind, FileKind::Folder);
    assert_eq!(errno(mount.find("vm1")), libc::ENOENT);
    assert_eq!(errno(mount.find("nothing.img")), libc::ENOENT);
    assert_eq!(errno(mount.stat(999)), libc::ENOENT);
}

#[test]
fn stat_shows_the_disk_and_the_delta_files_owner_mode_and_space() {
    let mount = mount();
    fs::set_permissions(&mount.path, fs::Permissions::from_mode(0o640)).expect("chmod");
    let (attr, host) = (mount.find("vm1.img").expect("stat"), fs::metadata(&mount.path).expect("stat"));
    assert_eq!((attr.size, attr.blocks, attr.mode), (SIZE, host.blocks(), 0o640));
    assert_eq!((attr.uid, attr.gid, attr.block_size), (host.uid(), host.gid(), 1 << 20));
    assert_eq!(attr.mtime, host.modified().expect("a time"));
    let handle = mount.vm1(libc::O_RDWR);
    mount.write(handle, 0, &[1; 4096], 0).expect("writes");
    let after = mount.find("vm1.img").expect("stat");
    assert_eq!(after.ino, attr.ino);
    assert!(after.mtime > attr.mtime);
    assert_eq!(ask(|done| mount.tree.statfs(attr.ino, done)).expect("statfs").block_size, 4096);
}

#[test]
fn what_is_written_is_read_back_and_reads_end_at_the_end() {
    let mount = mount();
    let handle = mount.vm1(libc::O_RDWR);
    for (offset, raw) in [(4096, 0), (SIZE - 512, 0), (5 * MIB - 256, libc::O_DSYNC)] {
        assert_eq!(mount.write(handle, offset, &[9; 512], raw), Ok(512));
        assert_eq!(mount.read(handle, offset, 512).expect("reads"), [9; 512]);
    }
    assert_eq!(mount.read(handle, SIZE - 512, 4096).expect("reads").len(), 512);
    assert!(mount.read(handle, SIZE, 4096).expect("reads").is_empty());
    assert!(mount.read(handle, u64::MAX - 5, 4096).expect("reads").is_empty());
    assert_eq!(ask(|done| mount.tree.fsync(handle, done)), Ok(()));
}

#[test]
fn a_write_across_the_end_fails_whole() {
    let mount = mount();
    let handle = mount.vm1(libc::O_RDWR);
    for offset in [SIZE - 256, SIZE, u64::MAX - 100] {
        assert_eq!(errno(mount.write(handle, offset, &[9; 512], 0)), libc::ENOSPC);
        let late = |done| {
            mount.tree.write_later(handle, offset, Bytes::from_static(&[9; 512]), OpenFlags { raw: 0 }, done);
        };
        assert_eq!(errno(ask(late)), libc::ENOSPC);
    }
    assert_eq!(mount.read(handle, SIZE - 256, 256).expect("reads"), [0; 256]);
}

#[test]
fn a_handle_for_reading_changes_nothing() {
    let mount = mount();
    let _writer = mount.vm1(libc::O_RDWR);
    let handle = mount.vm1(libc::O_RDONLY);
    assert_eq!(errno(mount.write(handle, 0, b"x", 0)), libc::EBADF);
    assert_eq!(errno(mount.punch(handle, 0, 4096, 3)), libc::EBADF);
    assert_eq!(ask(|done| mount.tree.fsync(handle, done)), Ok(()));
}

#[test]
fn a_released_handle_is_gone_and_the_image_closes() {
    let mount = mount();
    let handle = mount.vm1(libc::O_RDWR);
    mount.write(handle, 0, b"x", 0).expect("writes");
    mount.tree.release(handle);
    assert_eq!(errno(mount.read(handle, 0, 1)), libc::EBADF);
    until("the image closes", || mount.folder.images()[0].mode == "closed");
    assert_eq!(header(&mount.path).in_use, CLOSED);
}

#[test]
fn size_owner_and_mode_are_refused_and_times_are_taken() {
    let mount = mount();
    let ino = mount.find("vm1.img").expect("found").ino;
    let set = |change| ask(|done| mount.tree.setattr(NOBODY, ino, change, done));
    let none = SetAttr::default();
    for size in [0, SIZE - 1, SIZE + 1] {
        assert_eq!(errno(set(SetAttr { size: Some(size), ..none })), libc::EPERM);
    }
    assert_eq!(errno(set(SetAttr { mode: Some(0o600), ..none })), libc::EPERM);
    assert_eq!(errno(set(SetAttr { uid: Some(1), ..none })), libc::EPERM);
    assert_eq!(errno(set(SetAttr { gid: Some(1), ..none })), libc::EPERM);
    assert_eq!(set(SetAttr { size: Some(SIZE), ..none }).expect("nothing to do").size, SIZE);
    set(SetAttr { times: true, ..none }).expect("taken");
    assert_eq!(mount.tree.change_name(NOBODY, ROOT, "x.img".as_ref()).expect_err("refused").0, libc::EPERM);
}

#[test]
fn a_mode_or_owner_that_is_there_already_is_no_change() {
    let mount = mount();
    fs::set_permissions(&mount.path, fs::Permissions::from_mode(0o640)).expect("chmod");
    let attr = mount.find("vm1.img").expect("found");
    let set = |ino, change| ask(|done| mount.tree.setattr(NOBODY, ino, change, done));
    let none = SetAttr::default();
    // As the kernel sends it: with the bits that say "regular file".
    set(attr.ino, SetAttr { mode: Some(0o100_640), ..none }).expect("cp -p");
    set(attr.ino, SetAttr { uid: Some(attr.uid), gid: Some(attr.gid), ..none }).expect("chown");
    set(attr.ino, SetAttr { mode: Some(0o640), times: true, ..none }).expect("tar");
    let root = mount.stat(ROOT).expect("stat");
    set(ROOT, SetAttr { mode: Some(u32::from(root.mode)), ..none }).expect("a folder, too");
    assert_eq!(errno(set(attr.ino, SetAttr { mode: Some(0o104_640), ..none })), libc::EPERM);
}

#[test]
fn the_counters_are_their_owners_until_he_says_otherwise() {
    let mount = mount();
    let own = mount.find(".ploopfs").expect("found").ino;
    for name in ["stats.json", "metrics"] {
        let attr = mount.find_in(own, name).expect("found");
        assert_eq!(attr.mode, 0o400);
        let set = |change| ask(|done| mount.tree.setattr(NOBODY, attr.ino, change, done));
        let change = SetAttr { mode: Some(0o440), gid: Some(7), ..SetAttr::default() };
        let changed = set(change).expect("changed");
        assert_eq!((changed.mode, changed.gid), (0o440, 7));
        assert_eq!(
            (mount.stat(attr.ino).expect("stat").mode, mount.stat(own).expect("stat").mode),
            (0o440, 0o755)
        );
        assert_eq!(errno(set(SetAttr { mode: Some(0o640), ..change })), libc::EPERM);
    }
}

#[test]
fn a_listing_goes_on_behind_its_place_whoever_comes_and_goes_meanwhile() {
    let temp = temp();
    for n in 0..10 {
        make(&temp, &format!("vm{n}.hds"));
    }
    let engine = engine();
    let folder = Folder::open(temp.path(), &engine, FolderOptions::default()).expect("the folder opens");
    let info = MountInfo {
        mountpoint: "/mnt/x".into(),
        transport: "fuse",
        manage: false,
        sandbox: Arc::default(),
        restarts: Arc::default(),
    };
    let tree = Tree::new(folder.clone(), engine, info);
    let mount = Mount { path: temp.path().to_owned(), _temp: temp, folder, tree };
    let first = mount.names(ROOT, 2, 5);
    assert_eq!(first.len(), 5);
    // One that was named goes, one that was not yet, and one comes.
    for gone in [&first[2].name, &"vm8.img".into()] {
        let file = gone.to_str().expect("ASCII").replace(".img", ".hds");
        fs::remove_file(mount.path.join(file)).expect("removed");
    }
    fs::write(mount.path.join("aaa.hds"), image_bytes()).expect("written");
    mount.folder.rescan_now().expect("looked");
    let mut all: Vec<_> = first.iter().map(|n| n.name.clone()).collect();
    let mut after = first[4].next;
    while let Some(last) = mount.names(ROOT, after, 2).last() {
        all.extend(mount.names(ROOT, after, 2).into_iter().map(|n| n.name));
        after = last.next;
    }
    let mut want: Vec<std::ffi::OsString> = vec![".ploopfs".into(), ".snapshots".into(), "aaa.img".into()];
    want.extend((0..10).filter(|n| *n != 8).map(|n| format!("vm{n}.img").into()));
    all.sort();
    assert_eq!(all, want);
}

#[test]
fn punches_and_zeroes_read_as_zero_and_other_modes_are_unsupported() {
    let mount = mount();
    let handle = mount.vm1(libc::O_RDWR);
    for mode in [0x3, 0x11, 0x10] {
        mount.write(handle, 0, &[5; 8192], 0).expect("writes");
        mount.punch(handle, 1000, 5000, mode).expect("punched");
        let read = mount.read(handle, 0, 8192).expect("reads");
        assert!(read[..1000].iter().all(|b| *b == 5) && read[6000..].iter().all(|b| *b == 5));
        assert!(read[1000..6000].iter().all(|b| *b == 0), "mode {mode:#x}");
    }
    assert_eq!(mount.punch(handle, SIZE - 512, 1 << 30, 3), Ok(()));
    assert_eq!(mount.punch(handle, SIZE, 512, 3), Ok(()));
    assert_eq!(errno(mount.punch(handle, SIZE - 512, 1024, 0x10)), libc::EOPNOTSUPP);
    for mode in [0, 1, 2, 0x8] {
        assert_eq!(errno(mount.punch(handle, 0, 512, mode)), libc::EOPNOTSUPP);
    }
    assert_eq!(errno(mount.punch(handle, 0, 0, 3)), libc::EINVAL);
}

#[test]
fn seeks_find_data_and_holes_and_end_with_the_disk() {
    let mount = mount();
    let handle = mount.vm1(libc::O_RDWR);
    mount.write(handle, 3 * MIB, &vec![1; MIB as usize], 0).expect("writes");
    let seek = |offset, whence| ask(|done| mount.tree.lseek(handle, offset, whence, done));
    assert_eq!(seek(0, Whence::Data), Ok(3 * MIB));
    assert_eq!(seek(0, Whence::Hole), Ok(0));
    assert_eq!(seek(3 * MIB, Whence::Hole), Ok(4 * MIB));
    assert_eq!(errno(seek(4 * MIB, Whence::Data)), libc::ENXIO);
    assert_eq!(seek(SIZE - 1, Whence::Hole), Ok(SIZE - 1));
    assert_eq!(errno(seek(SIZE, Whence::Hole)), libc::ENXIO);
    assert_eq!(errno(seek(SIZE, Whence::Data)), libc::ENXIO);
}

#[test]
fn the_counters_are_json_and_one_handle_reads_one_moment() {
    let mount = mount();
    let image = mount.vm1(libc::O_RDWR);
    mount.write(image, 0, &[1; 4096], 0).expect("writes");
    let own = mount.find(".ploopfs").expect("found").ino;
    let ino = mount.find_in(own, "stats.json").expect("found").ino;
    let open = |raw| ask(|done| mount.tree.open(NOBODY, ino, OpenFlags { raw }, done));
    assert_eq!(errno(open(libc::O_RDWR)), libc::EPERM);
    let handle = open(libc::O_RDONLY).expect("opens").handle;
    let text = mount.read(handle, 0, 1 << 20).expect("reads");
    mount.write(image, 0, &[1; 4096], 0).expect("writes");
    assert_eq!(mount.read(handle, 0, 1 << 20).expect("reads"), text);
    let json: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    assert_eq!(json["pid"], std::process::id());
    assert_eq!(json["transport"], "fuse");
    assert_eq!(json["images"]["vm1"]["mode"], "write");
    assert_eq!(json["images"]["vm1"]["writes"], 1);
    assert!(json["images"]["vm1"]["dirty_pages"].is_u64() && json["images"]["vm1"]["queued"].is_u64());
}

#[test]
fn an_image_that_comes_back_has_another_inode_number() {
    let mount = mount();
    let before = mount.find("vm1.img").expect("found").ino;
    let away = mount.path.with_file_name(".away");
    fs::rename(&mount.path, &away).expect("renamed");
    mount.folder.rescan_now().expect("looked");
    assert_eq!(errno(mount.find("vm1.img")), libc::ENOENT);
    assert_eq!(errno(mount.stat(before)), libc::ENOENT);
    fs::rename(&away, &mount.path).expect("renamed");
    mount.folder.rescan_now().expect("looked");
    assert_ne!(mount.find("vm1.img").expect("found").ino, before);
}

#[test]
fn opens_are_refused_with_the_errno_of_their_reason() {
    let mount = mount();
    assert_eq!(errno(ask(|done| mount.tree.open(NOBODY, ROOT, OpenFlags { raw: 0 }, done))), libc::EISDIR);
    mount.folder.refuse_new_opens();
    assert_eq!(errno(mount.open("vm1.img", libc::O_RDWR)), libc::EBUSY);
}

#[test]
fn images_whose_names_are_no_text_have_each_a_name_in_the_counters_and_in_the_list() {
    use std::os::unix::ffi::OsStrExt;
    let temp = temp();
    for name in [&b"a\xff.hds"[..], b"a\xfe.hds", b"b.hds"] {
        fs::write(temp.path().join(OsStr::from_bytes(name)), image_bytes()).expect("written");
    }
    let folder = serve(&temp);
    let info = MountInfo {
        mountpoint: "/mnt/x".into(),
        transport: "fuse",
        manage: false,
        sandbox: Arc::default(),
        restarts: Arc::default(),
    };
    let document = ploopfs::tree::document(&folder, &info);
    let names: Vec<&str> = document.images.keys().map(String::as_str).collect();
    assert_eq!(names, ["a\\xfe", "a\\xff", "b"]);
    // And by that name a command finds it.
    let open = folder.open_image("a\\xfe", false).expect("opens");
    assert_eq!(open.entry().name().as_bytes(), b"a\xfe");
    assert_eq!(folder.busy(), ["a\\xfe"]);
}
