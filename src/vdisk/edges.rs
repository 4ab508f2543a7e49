//! What comes from outside while an image is in use, each as a test: a file that changes under us, a host that is full
//! for a while, a walk over a large disk, levels on different hosts.

use std::path::PathBuf;
use std::sync::mpsc;

use super::races::{CLUSTER, LONG, PAGE, bench, engine, until};
use super::{Image, Layout, Level, Mode, OnFull, Options};
use crate::error::Kind;
use crate::format::header::{HEADER_BYTES, Header, Version};
use crate::io::fault::{FaultFile, FaultPlan, Op};
use crate::io::file::HostFile;
use crate::io::memory::MemoryFile;
use crate::progress::Progress;
use crate::sync::Arc;

fn header() -> Header {
    Header::new(Version::V2, PAGE, CLUSTER).expect("fits the format")
}

/// An empty delta in memory, and a way to it that goes by a plan.
fn level(spec: &str) -> (Arc<MemoryFile>, Arc<FaultPlan>, Level) {
    let file = Arc::new(MemoryFile::from_bytes(&header().encode()));
    file.set_len(header().geometry().first).expect("memory grows");
    let plan = Arc::new(spec.parse::<FaultPlan>().expect("a plan"));
    let host: Arc<dyn HostFile> = Arc::new(FaultFile::new(file.clone(), plan.clone()));
    let level = Level { file: host, path: PathBuf::from("memory"), layout: Layout::Ploop(header()) };
    (file, plan, level)
}

/// A merge below makes its file longer and then enters the cluster: the length from before is no measure for the entry.
#[test]
fn a_bat_page_that_is_read_while_its_file_grows_is_not_damaged() {
    let (file, plan, level) = level("");
    let geometry = header().geometry();
    let image = Image::open(&engine(Options::default()), "memory", vec![level]).expect("opens");
    plan.set_delay(Op::Read, 500);
    let (reply, answer) = mpsc::channel();
    image.read(0, 512, Box::new(move |r| drop(reply.send(r))));
    until(|| plan.counters(Op::Read).running > 0);
    file.set_len(geometry.first + CLUSTER).expect("memory grows");
    file.write_at(&[7; 512], geometry.first).expect("written");
    let entry = geometry.entry(geometry.first).expect("an entry");
    file.write_at(&entry.to_le_bytes(), HEADER_BYTES).expect("written");
    plan.set_delay(Op::Read, 0);
    let data = answer.recv_timeout(LONG).expect("answered").expect("a healthy cluster");
    assert!(data.iter().all(|byte| *byte == 7));
}

/// What is written to a file that is another's by now is gone: no sync may say that it is there.
#[test]
fn an_image_that_is_overwritten_in_place_is_read_only_and_fails_its_syncs() {
    for cut in [true, false] {
        let b = bench(&engine(Options::default()), "");
        b.image.write_at(0, &[1; 512]).expect("space");
        b.image.flush_now().expect("durable");
        if cut {
            b.file.set_len(0).expect("cut");
        } else {
            b.file.write_at(&header().encode(), 0).expect("overwritten");
        }
        b.image.write_at(0, &[2; 512]).expect("it does not know yet");
        assert!(b.image.flush_now().is_err(), "cut: {cut}");
        assert_eq!(b.image.mode(), Mode::ReadOnly);
        assert!(b.image.failure().expect("why").to_string().contains("another program"));
        assert!(b.image.write_at(0, &[3; 512]).is_err() && b.image.flush_now().is_err());
        let theirs = b.file.to_bytes();
        assert!(b.image.close().is_err());
        assert!(b.file.to_bytes() == theirs, "it is not ours to close");
    }
}

#[test]
fn an_image_that_is_overwritten_in_place_before_its_first_change_is_not_changed() {
    let b = bench(&engine(Options::default()), "");
    let other = Header::new(Version::V2, PAGE, 2 * CLUSTER).expect("fits the format");
    b.file.write_at(&other.encode(), 0).expect("overwritten");
    let theirs = b.file.to_bytes();
    assert!(b.image.write_at(0, &[1; 512]).is_err());
    assert!(b.image.close().is_err() && b.file.to_bytes() == theirs);
}

#[test]
fn a_read_behind_the_end_of_a_file_that_was_cut_under_us_ends_the_writing() {
    let b = bench(&engine(Options::default()), "");
    b.image.write_at(0, &[1; 512]).expect("space");
    b.image.flush_now().expect("durable");
    b.file.set_len(header().geometry().first).expect("cut");
    assert_eq!(b.image.read_at(0, 512).expect_err("it is gone").kind(), Kind::Io);
    assert_eq!(b.image.mode(), Mode::ReadOnly);
    assert!(b.image.write_at(0, &[2; 512]).is_err() && b.image.flush_now().is_err());
}

/// rsync, borg and restic go by the time.
#[test]
fn a_discard_moves_the_time_of_the_last_change() {
    let b = bench(&engine(Options::default()), "");
    assert_eq!(b.image.last_write(), None);
    b.image.discard_at(0, CLUSTER).expect("nothing is mapped");
    let first = b.image.last_write().expect("as ext4 does");
    b.image.write_at(0, &[1; 512]).expect("space");
    for (at, len) in [(0, 512), (0, CLUSTER), (PAGE + 5, 100)] {
        let before = b.image.last_write().expect("written");
        std::thread::sleep(std::time::Duration::from_millis(2));
        b.image.discard_at(at, len).expect("discarded");
        assert!(b.image.last_write().expect("discarded") > before.max(first));
    }
    b.image.close().expect("closes");
}

#[test]
fn a_disk_that_becomes_larger_moves_the_time_of_the_last_change() {
    let b = bench(&engine(Options::default()), "");
    b.image.grow(17 * PAGE, &Progress::new()).expect("grown");
    assert!(b.image.last_write().is_some());
    b.image.close().expect("closes");
}

#[test]
fn a_freeze_does_not_wait_for_the_end_of_a_long_seek() {
    let b = bench(&engine(Options::default()), "");
    b.plan.set_delay(Op::Read, 200);
    let (reply, answer) = mpsc::channel();
    let walker = b.image.clone();
    // 16 pages of the map: 3.2 seconds.
    std::thread::spawn(move || reply.send(walker.seek_data(0)));
    until(|| b.plan.counters(Op::Read).running > 0);
    b.image.freeze();
    assert!(answer.try_recv().is_err(), "the walk waits outside with what is left");
    b.plan.set_delay(Op::Read, 0);
    b.image.thaw();
    assert_eq!(answer.recv_timeout(LONG).expect("answered").expect("walked"), None);
    assert_eq!(b.image.seek_hole(PAGE + 5).expect("walked"), PAGE + 5);
    b.image.close().expect("closes");
}

#[test]
fn a_freeze_does_not_wait_for_the_end_of_a_piece_of_the_map() {
    let b = bench(&engine(Options::default()), "");
    b.plan.set_delay(Op::Read, 200);
    let (reply, answer) = mpsc::channel();
    let walker = b.image.clone();
    std::thread::spawn(move || reply.send(walker.map_piece(0)));
    until(|| b.plan.counters(Op::Read).running > 0);
    b.image.freeze();
    b.plan.set_delay(Op::Read, 0);
    b.image.thaw();
    let piece = answer.recv_timeout(LONG).expect("answered").expect("a map");
    assert!(0 < piece.next && piece.next < 16 * PAGE, "{}", piece.next);
    assert_eq!(b.image.map_piece(piece.next).expect("goes on").next, 16 * PAGE);
    b.image.close().expect("closes");
}

/// A copy of the disk leaves out what the seek calls a hole.
#[test]
fn a_seek_waits_for_a_cluster_that_is_being_moved() {
    let b = bench(&engine(Options::default()), "");
    b.image.write_at(0, &[1; 512]).expect("space");
    assert!(b.image.locks.try_lock(0, super::locks::LockMode::Exclusive));
    let (reply, answer) = mpsc::channel();
    let walker = b.image.clone();
    std::thread::spawn(move || reply.send(walker.seek_data(0)));
    assert!(answer.recv_timeout(std::time::Duration::from_millis(200)).is_err(), "it waits");
    b.image.unlock(0, super::locks::LockMode::Exclusive);
    assert_eq!(answer.recv_timeout(LONG).expect("answered").expect("found"), Some(0));
    b.image.close().expect("closes");
}

/// Monitoring, and inline writes, would wait for an allocation that never comes.
#[test]
fn a_full_image_notices_that_there_is_space_though_the_guest_only_overwrites() {
    for on_full in [OnFull::Error, OnFull::Queue] {
        let timeout = Some(std::time::Duration::from_millis(100));
        let b = bench(&engine(Options { on_full, full_timeout: timeout, ..Options::default() }), "");
        b.image.write_at(0, &[1; 512]).expect("space");
        b.image.flush_now().expect("durable");
        b.plan.set_full(true);
        assert_eq!(b.image.write_at(CLUSTER, &[1; 512]).expect_err("full").kind(), Kind::NoSpace);
        assert_eq!(b.image.mode(), Mode::FullError);
        std::thread::sleep(std::time::Duration::from_millis(1500));
        assert_eq!(b.image.mode(), Mode::FullError, "there is no space yet");
        b.plan.set_full(false);
        until(|| {
            b.image.write_at(0, &[2; 512]).expect("overwritten");
            b.image.mode() == Mode::Write
        });
        b.image.close().expect("closes");
        assert!(b.file.to_bytes().len() as u64 <= header().geometry().first * 32 + CLUSTER);
    }
}

/// A host that is full has many images, and each could fill half of the cache with pages that are not written.
#[test]
fn the_dirty_pages_of_all_full_images_together_take_half_of_the_cache_at_most() {
    let delay = std::time::Duration::from_secs(3600);
    // 16 pages.
    let engine = engine(Options { bat_cache: 0, bat_delay: delay, ..Options::default() });
    let full: Vec<_> = (0..3).map(|_| bench(&engine, "")).collect();
    for b in &full {
        for page in 0..14 {
            b.image.write_at(page * PAGE, &[1; 512]).expect("space");
            b.image.flush_now().expect("durable");
        }
    }
    for b in &full {
        b.plan.set_full(true);
        b.image.discard_at(0, CLUSTER).expect("a hole takes no space");
        b.image.flush(Box::new(|_| ()));
        until(|| b.image.mode() == Mode::FullQueue);
    }
    let refused =
        |b: &super::races::ImageBench| (1..14).any(|page| b.image.discard_at(page * PAGE, CLUSTER).is_err());
    assert!(full.iter().all(refused), "no image takes more than its share");
    let dirty: u64 = full.iter().map(|b| b.image.stats().dirty_pages).sum();
    assert!(dirty <= 8 + 2, "{dirty} of 16 pages");
    for b in &full {
        b.plan.set_full(false);
        b.image.flush_now().expect("space is back");
        b.image.close().expect("closes");
    }
}

/// As many requests as may be parked hold gigabytes where each is large.
#[test]
fn what_waits_for_space_is_bounded_in_bytes() {
    const MIB: usize = 1 << 20;
    let header = Header::new(Version::V2, 256 << 20, MIB as u64).expect("fits the format");
    let file = Arc::new(MemoryFile::from_bytes(&header.encode()));
    file.set_len(header.geometry().first).expect("memory grows");
    let plan = Arc::new(FaultPlan::default());
    let host: Arc<dyn HostFile> = Arc::new(FaultFile::new(file, plan.clone()));
    let level = Level { file: host, path: PathBuf::from("memory"), layout: Layout::Ploop(header) };
    let image = Image::open(&engine(Options::default()), "memory", vec![level]).expect("opens");
    image.make_writable().expect("sound");
    image.write_at(0, &[1; 512]).expect("marked");
    plan.set_full(true);
    let data = bytes::Bytes::from(vec![1; MIB]);
    let (reply, refused) = mpsc::channel();
    for n in 1..=140 {
        let reply = reply.clone();
        image.write(
            n * MIB as u64,
            data.clone(),
            false,
            Box::new(move |r| {
                let _ = reply.send(r.is_err());
            }),
        );
    }
    let most = (crate::io::buffers::PARKED_OF_ONE >> 20) as usize;
    for _ in most..140 - 1 {
        assert!(refused.recv_timeout(LONG).expect("at once"), "it does not wait");
    }
    assert!(image.stats().queued >= most as u64 - 1 && refused.try_iter().count() <= 1);
    plan.set_full(false);
    until(|| image.mode() == Mode::Write && image.stats().queued == 0);
    image.close().expect("closes");
}

/// One level in memory over one on a disk: each is read as it can be.
#[test]
fn a_level_on_a_slow_host_takes_the_fast_path_from_no_other() {
    let (base, _, below) = level("");
    let geometry = header().geometry();
    base.set_len(geometry.first + CLUSTER).expect("memory grows");
    base.write_at(&[7; CLUSTER as usize], geometry.first).expect("written");
    let entry = geometry.entry(geometry.first).expect("an entry");
    base.write_at(&entry.to_le_bytes(), HEADER_BYTES).expect("written");
    // A delay of writes makes it a disk that can be read without waiting, as ext4 is.
    let (_, _, top) = level("delay=write:1");
    let image = Image::open(&engine(Options::default()), "memory", vec![below, top]).expect("opens");
    image.make_writable().expect("sound");
    image.write_at(CLUSTER, &[8; 512]).expect("space");
    let mut buf = [0; 512];
    image.read_at(0, 512).expect("its page is loaded");
    assert_eq!(image.try_read(0, &mut buf).expect("from memory").expect("read"), 512);
    assert_eq!(buf, [7; 512]);
    assert_eq!(image.try_read(CLUSTER, &mut buf).expect("from the disk's cache").expect("read"), 512);
    assert_eq!(buf, [8; 512]);
    image.close().expect("closes");
}

/// The guest stands still in the freeze for as long as the rest of its data takes to the disk.
#[test]
fn what_is_dirty_is_synced_before_the_tracking_freezes_the_image() {
    let b = bench(&engine(Options::default()), "");
    b.image.write_at(0, &[1; 512]).expect("space");
    b.image.touched(2 << 20);
    b.image.start_tracking(None).expect("tracked");
    assert!(b.image.flusher.unsynced() < 1 << 20);
    b.image.close().expect("closes");
}
