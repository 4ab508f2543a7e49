//! Races and failures of one image, each as a test: closes, rounds, space and the shared budget.

use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::live::snapshot::TopPlan;
use super::locks::LockMode;
use super::{Engine, Image, Layout, Level, Mode, OnFull, Options};
use crate::error::{Kind, Result};
use crate::format::header::{FLAG_EMPTY, Header, Version};
use crate::io::fault::{FaultFile, FaultPlan, Op};
use crate::io::file::HostFile;
use crate::io::memory::MemoryFile;
use crate::sync::{Arc, AtomicBool, Mutex, Ordering, lock};

pub(super) const CLUSTER: u64 = 32 << 10;
/// Guest bytes that one BAT page maps.
pub(super) const PAGE: u64 = 1024 * CLUSTER;
pub(super) const LONG: Duration = Duration::from_secs(20);

pub(super) struct ImageBench {
    pub file: Arc<MemoryFile>,
    pub plan: Arc<FaultPlan>,
    pub image: Arc<Image>,
}

pub(super) fn engine(options: Options) -> Arc<Engine> {
    Engine::new(options, Box::new(|_| ()))
}

pub(super) fn bench(engine: &Arc<Engine>, faults: &str) -> ImageBench {
    let header = Header::new(Version::V2, 16 * PAGE, CLUSTER).expect("fits the format");
    let file = Arc::new(MemoryFile::from_bytes(&header.encode()));
    file.set_len(u64::from(header.first_block) * 512).expect("memory grows");
    let plan = Arc::new(faults.parse::<FaultPlan>().expect("a plan"));
    let host: Arc<dyn HostFile> = Arc::new(FaultFile::new(file.clone(), plan.clone()));
    let level = Level { file: host, path: PathBuf::from("memory"), layout: Layout::Ploop(header) };
    let image = Image::open(engine, "memory", vec![level]).expect("opens");
    image.make_writable().expect("the BAT is sound");
    ImageBench { file, plan, image }
}

pub(super) fn later(image: &Arc<Image>, offset: u64) -> mpsc::Receiver<Result<()>> {
    let (reply, answer) = mpsc::channel();
    image.write(offset, vec![1; 512].into(), false, Box::new(move |r| drop(reply.send(r))));
    answer
}

pub(super) fn until(mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !holds() {
        assert!(Instant::now() < deadline, "it never came");
        std::thread::yield_now();
    }
}

#[test]
fn after_a_close_that_failed_nothing_more_is_written() {
    for delay in [0, 20] {
        let engine = engine(Options {
            bat_delay: Duration::from_millis(delay),
            on_full: OnFull::Error,
            ..Options::default()
        });
        let b = bench(&engine, "");
        let round_under_way = b.image.clone();
        b.image.write_at(0, &[7; 512]).expect("space");
        until(|| round_under_way.stats().dirty_pages == 0);
        // Data of the next cluster gets in; its BAT page meets a full host.
        b.plan.set_delay(Op::Sync, 50);
        b.image.write_at(4 * CLUSTER, &[8; 512]).expect("space");
        b.plan.set_full(true);
        assert_eq!(b.image.close().expect_err("the BAT has no space").kind(), Kind::NoSpace);
        let closed = b.file.to_bytes();
        b.plan.set_full(false);
        assert!(b.image.flush_now().is_err(), "what was not written is not durable");
        // Longer than any deadline of a BAT page.
        std::thread::sleep(Duration::from_millis(1300));
        assert!(b.file.to_bytes() == closed, "the file belongs to the next opener");
    }
}

#[test]
fn after_a_close_a_thaw_opens_nothing() {
    let b = bench(&engine(Options::default()), "");
    b.image.write_at(0, &[7; 512]).expect("space");
    b.image.freeze();
    b.image.close().expect("closes");
    b.image.thaw();
    let closed = b.file.to_bytes();
    assert!(b.image.write_at(0, &[8; 512]).is_err());
    assert!(b.image.try_write(0, &[8; 512]).is_none_or(|r| r.is_err()));
    assert!(b.file.to_bytes() == closed);
}

#[test]
fn a_first_write_that_finds_its_cluster_locked_leaves_the_lock_to_its_holder() {
    let b = bench(&engine(Options::default()), "");
    b.image.write_at(0, &[1; 512]).expect("marked and extended");
    assert!(b.image.locks.try_lock(3, LockMode::Exclusive));
    assert!(b.image.try_write(3 * CLUSTER, &[1; 512]).is_none());
    assert!(!b.image.locks.try_lock(3, LockMode::Shared), "it is still held");
    b.image.unlock(3, LockMode::Exclusive);
    assert!(matches!(b.image.try_write(3 * CLUSTER, &[1; 512]), Some(Ok(()))), "all it needs is at hand");
    assert!(b.image.read_at(3 * CLUSTER, 512).expect("read").iter().all(|byte| *byte == 1));
    b.image.close().expect("closes");
}

#[test]
fn an_extension_that_once_found_no_space_is_tried_again_by_the_next_write() {
    // The mark cuts the tail; the extension fails, the shorter one as well, the next one works.
    let faults = "fail=set_len:2:ENOSPC,fail=set_len:3:ENOSPC";
    let b = bench(&engine(Options { on_full: OnFull::Error, ..Options::default() }), faults);
    assert_eq!(b.image.write_at(0, &[1; 512]).expect_err("full").kind(), Kind::NoSpace);
    b.image.write_at(0, &[1; 512]).expect("space is back");
    assert_eq!(b.image.mode(), Mode::Write);
    b.image.close().expect("closes");
}

#[test]
fn a_mark_that_finds_no_space_is_parked_like_any_write() {
    let b = bench(&engine(Options::default()), "fail=write:1:ENOSPC");
    let answer = later(&b.image, 0);
    answer.recv_timeout(LONG).expect("answered").expect("written when space was back");
    b.image.close().expect("closes");
}

/// Two images that share the smallest cache; the first has dirtied its share, and never writes by itself.
fn crowded(faults: &str) -> (ImageBench, ImageBench) {
    let options = Options { bat_cache: 0, bat_delay: Duration::from_secs(3600), ..Options::default() };
    let engine = engine(options);
    let (a, b) = (bench(&engine, faults), bench(&engine, ""));
    for page in 0..8 {
        a.image.write_at(page * PAGE, &[1; 512]).expect("space");
    }
    assert!(engine.budget.dirty_full());
    (a, b)
}

fn nothing_comes<T>(answer: &mpsc::Receiver<T>) {
    assert!(answer.recv_timeout(Duration::from_millis(100)).is_err(), "it waits");
}

#[test]
fn an_allocation_waits_for_the_dirty_pages_of_another_image_without_spinning() {
    let (a, b) = crowded("");
    let answer = later(&b.image, 0);
    nothing_comes(&answer);
    assert!(b.plan.counters(Op::Sync).started < 10, "no round after round");
    a.image.flush_now().expect("durable");
    answer.recv_timeout(LONG).expect("woken").expect("written");
}

#[test]
fn a_discard_waits_for_clean_pages_too() {
    let (a, b) = crowded("");
    let (reply, answer) = mpsc::channel();
    b.image.discard(0, CLUSTER, Box::new(move |r| drop(reply.send(r))));
    // The first change of an image marks it in use; the discard itself waits.
    nothing_comes(&answer);
    a.image.flush_now().expect("durable");
    answer.recv_timeout(LONG).expect("woken").expect("discarded");
}

#[test]
fn freeze_and_close_do_not_wait_for_dirty_pages_of_another_image() {
    let (_a, b) = crowded("");
    let answer = later(&b.image, 0);
    nothing_comes(&answer);
    let (reply, closed) = mpsc::channel();
    let image = b.image.clone();
    std::thread::spawn(move || {
        image.freeze();
        image.thaw();
        let _ = reply.send(image.close());
    });
    closed.recv_timeout(LONG).expect("the close ends").expect("closes");
    assert!(answer.recv_timeout(LONG).expect("answered").is_err());
}

#[test]
fn the_dirty_pages_of_an_image_that_failed_keep_nobody_waiting() {
    // One sync marks it; the next one fails.
    let (a, b) = crowded("fail=sync:2:EIO:forever");
    let answer = later(&b.image, 0);
    nothing_comes(&answer);
    assert!(a.image.flush_now().is_err());
    answer.recv_timeout(LONG).expect("woken").expect("written");
}

#[test]
fn a_freeze_does_not_wait_for_the_end_of_a_long_discard() {
    let b = bench(&engine(Options::default()), "");
    let clusters = 1024;
    (0..clusters).for_each(|c| b.image.write_at(c * CLUSTER, &[7; 512]).expect("space"));
    b.plan.set_delay(crate::io::fault::Op::Punch, 300);
    let (reply, answer) = mpsc::channel();
    b.image.discard(0, clusters * CLUSTER, Box::new(move |r| drop(reply.send(r))));
    until(|| b.plan.counters(crate::io::fault::Op::Punch).running > 0);
    b.image.freeze();
    assert!(answer.try_recv().is_err(), "it waits outside with what is left");
    b.plan.set_delay(crate::io::fault::Op::Punch, 0);
    b.image.thaw();
    answer.recv_timeout(LONG).expect("answered").expect("discarded");
    assert!((0..clusters).all(|c| b.image.read_at(c * CLUSTER, 1).expect("read")[0] == 0));
    b.image.close().expect("closes");
}

/// An empty delta that fits `plan`.
fn new_top(plan: TopPlan) -> Result<Level> {
    let header = Header::new(plan.version, plan.disk, plan.cluster).expect("fits the format");
    let header = if plan.in_use { header.marked() } else { header };
    let file = MemoryFile::from_bytes(&header.encode());
    file.set_len(u64::from(header.first_block) * 512).expect("memory grows");
    Ok(Level { file: Arc::new(file), path: PathBuf::from("top"), layout: Layout::Ploop(header) })
}

/// It would sync the old top, and call durable what was written to the new one.
#[test]
fn a_round_under_way_ends_before_a_snapshot_swaps_the_top() {
    let b = bench(&engine(Options::default()), "");
    b.image.write_at(0, &[7; 512]).expect("space");
    let round_may_end = Arc::new(AtomicBool::new(false));
    let commit = || {
        // Everything is durable; a round that was wanted before comes now, and stands still in its middle.
        let (reply, held) = mpsc::channel();
        let (image, may_end) = (b.image.clone(), round_may_end.clone());
        std::thread::spawn(move || {
            let in_its_way = lock(&image.flusher.watched);
            reply.send(()).expect("the test waits");
            std::thread::sleep(Duration::from_millis(100));
            may_end.store(true, Ordering::SeqCst);
            drop(in_its_way);
        });
        held.recv().expect("the thread runs");
        b.image.start_round();
        Ok(())
    };
    b.image.put_on_top(new_top, commit).expect("a snapshot");
    assert!(round_may_end.load(Ordering::SeqCst), "the swap waited");
    b.image.close().expect("closes");
}

#[test]
fn a_top_that_is_marked_in_the_freeze_does_not_say_that_it_is_empty() {
    let b = bench(&engine(Options::default()), "");
    let file = Mutex::new(None);
    let make = |plan| {
        let level = new_top(plan)?;
        *lock(&file) = Some(level.file.clone());
        // The first write of all comes between the new file and the freeze.
        b.image.write_at(0, &[7; 512])?;
        Ok(level)
    };
    b.image.put_on_top(make, || Ok(())).expect("a snapshot");
    let mut bytes = [0; 64];
    lock(&file).take().expect("made").read_at(&mut bytes, 0).expect("memory reads");
    let header = Header::parse(&bytes).expect("a header");
    assert!(header.is_in_use() && header.flags & FLAG_EMPTY == 0, "{header:?}");
    b.image.close().expect("closes");
}

#[test]
fn a_file_of_eight_exbibytes_takes_no_memory_for_its_length() {
    let mut header = Header::new(Version::V1, 64 << 20, 1 << 20).expect("fits the format");
    header.in_use = 0;
    let file = Arc::new(MemoryFile::from_bytes(&header.encode()));
    file.set_len(i64::MAX as u64).expect("memory grows");
    let host: Arc<dyn HostFile> = file;
    let level = Level { file: host, path: PathBuf::from("memory"), layout: Layout::Ploop(header) };
    let image = Image::open(&engine(Options::default()), "memory", vec![level]).expect("opens");
    image.make_writable().expect("an empty BAT is sound");
}

/// A raw image whose first sync fails.
fn raw_that_cannot_sync() -> Arc<Image> {
    let plan = Arc::new("fail=sync:1:EIO".parse::<FaultPlan>().expect("a plan"));
    let memory = Arc::new(MemoryFile::from_bytes(&[0; 1 << 20]));
    let host: Arc<dyn HostFile> = Arc::new(FaultFile::new(memory, plan));
    let level = Level { file: host, path: PathBuf::from("memory"), layout: Layout::Raw };
    let image = Image::open(&engine(Options::default()), "memory", vec![level]).expect("opens");
    image.make_writable().expect("raw");
    image
}

#[test]
fn a_sync_of_a_file_that_the_kernel_may_write_syncs_it_though_nothing_was_written_through_us() {
    let image = raw_that_cannot_sync();
    image.flush_now().expect("nothing to sync");
    let memory = std::sync::Arc::new(MemoryFile::new());
    let backing = crate::io::backing::Backing::new(memory, "memory".into(), std::sync::Arc::default());
    let backing = std::sync::Arc::new(backing);
    image.pass_through(backing.clone());
    assert_eq!(image.flush_now().expect_err("the host was asked").kind(), Kind::Io);

    // Where the kernel did not take it, nothing has changed.
    let image = raw_that_cannot_sync();
    assert!(backing.register(|_| Ok(std::sync::Arc::new(()))).is_none(), "memory has no descriptor");
    image.pass_through(backing);
    image.flush_now().expect("nothing to sync");
}

/// An image that syncs only when it is asked to.
fn synced_when_asked(options: Options) -> ImageBench {
    let never = Duration::from_secs(3600);
    bench(&engine(Options { bat_delay: never, ..options }), "")
}

/// How many syncs of the host's file it takes to make `change` durable.
fn syncs_for(b: &ImageBench, change: impl FnOnce(&Arc<Image>) -> Result<()>) -> u64 {
    change(&b.image).expect("space");
    let before = b.plan.counters(Op::Sync).started;
    b.image.flush_now().expect("durable");
    b.plan.counters(Op::Sync).started - before
}

/// How many it takes when the round's entries find no space.
fn syncs_of_a_full_round(b: &ImageBench) -> u64 {
    let before = b.plan.counters(Op::Sync).started;
    b.plan.set_full(true);
    assert_eq!(b.image.flush_now().expect_err("full").kind(), Kind::NoSpace);
    b.plan.set_full(false);
    b.plan.counters(Op::Sync).started - before
}

#[test]
fn first_writes_in_space_that_is_durably_there_take_one_sync() {
    let b = synced_when_asked(Options::default());
    assert_eq!(syncs_for(&b, |image| image.write_at(0, &[1; 512])), 2, "the file has just grown");
    assert_eq!(syncs_for(&b, |image| image.write_at(CLUSTER, &[1; 512])), 1);
    assert_eq!(syncs_for(&b, |image| image.write_at(CLUSTER, &[2; 512])), 1, "mapped");
    b.image.close().expect("closes");
}

#[test]
fn entries_behind_the_durable_end_of_the_file_wait_for_a_sync() {
    let b = synced_when_asked(Options { extend: 4 * CLUSTER, ..Options::default() });
    syncs_for(&b, |image| image.write_at(0, &[1; 512]));
    let eight = |image: &Arc<Image>| (1..9).try_for_each(|n| image.write_at(n * CLUSTER, &[1; 512]));
    assert_eq!(syncs_for(&b, eight), 2);
    b.image.close().expect("closes");
}

#[test]
fn a_cluster_that_was_unmapped_and_what_changes_with_it_wait_for_a_sync() {
    let b = synced_when_asked(Options::default());
    syncs_for(&b, |image| image.write_at(0, &[1; 512]));
    let other = |image: &Arc<Image>| {
        image.discard_at(0, CLUSTER)?;
        image.write_at(CLUSTER, &[1; 512])
    };
    assert_eq!(syncs_for(&b, other), 2);
    assert_eq!(syncs_for(&b, |image| image.write_at(2 * CLUSTER, &[1; 512])), 1, "and no longer than that");
    b.image.close().expect("closes");
}

#[test]
fn data_whose_entries_find_no_space_is_synced_all_the_same() {
    let b = synced_when_asked(Options { on_full: OnFull::Error, ..Options::default() });
    syncs_for(&b, |image| image.write_at(0, &[1; 512]));
    b.image.write_at(CLUSTER, &[1; 512]).expect("space");
    assert_eq!(syncs_of_a_full_round(&b), 1);
    b.image.close().expect("closes");
}

#[test]
fn after_a_round_that_failed_what_had_to_wait_for_a_sync_still_does() {
    let b = synced_when_asked(Options { on_full: OnFull::Error, ..Options::default() });
    syncs_for(&b, |image| image.write_at(0, &[1; 512]));
    b.image.discard_at(0, CLUSTER).expect("punched");
    assert_eq!(syncs_of_a_full_round(&b), 1, "before the entries, which then find no space");
    assert_eq!(syncs_for(&b, |image| image.write_at(CLUSTER, &[1; 512])), 2);
    b.image.close().expect("closes");
}

/// A stop whose limit is over waits for no lock: what holds the operation may hang for good.
#[test]
fn a_close_does_not_wait_for_an_operation_that_never_ends() {
    let b = bench(&engine(Options::default()), "");
    b.image.write_at(0, &[1; 512]).expect("space");
    let hangs = b.image.begin_operation().expect("none is under way");
    let (reply, closed) = mpsc::channel();
    let image = b.image.clone();
    std::thread::spawn(move || reply.send(image.close()));
    let e = closed.recv_timeout(LONG).expect("the close ends").expect_err("its mark stays");
    assert!(e.to_string().contains("in-use mark"), "{e}");
    drop(hangs);
    assert_eq!(b.image.stats().dirty_pages, 0, "what was acknowledged is durable");
    assert!(b.image.write_at(0, &[2; 512]).is_err());
}

/// A host that takes long to sync would hold up a snapshot for as long as it holds up the writes.
#[test]
fn a_freeze_does_not_wait_for_writes_that_wait_for_a_sync() {
    let b = bench(&engine(Options::default()), "delay=sync:1");
    b.image.write_at(0, &[1; 512]).expect("marked");
    b.plan.set_delay(Op::Sync, 3000);
    b.image.touched(super::BOUND);
    until(|| b.plan.counters(Op::Sync).running > 0 && b.image.flusher.unsynced() == 0);
    b.image.touched(super::BOUND);
    let answer = later(&b.image, 0);
    until(|| b.image.flusher.throttled() == 1);
    let syncs = b.plan.counters(Op::Sync);
    b.image.freeze();
    assert_eq!(b.plan.counters(Op::Sync), syncs, "that sync is still under way");
    b.plan.set_delay(Op::Sync, 1);
    b.image.thaw();
    answer.recv_timeout(LONG).expect("woken").expect("written");
    b.image.close().expect("closes");
}

/// Its pages wait for the host, and keep no others waiting.
#[test]
fn the_dirty_pages_of_an_image_whose_host_is_full_keep_no_other_image_waiting() {
    let (a, b) = crowded("");
    a.plan.set_full(true);
    let (reply, flushed) = mpsc::channel();
    a.image.flush(Box::new(move |r| drop(reply.send(r))));
    until(|| a.image.mode() == Mode::FullQueue);
    later(&b.image, 0).recv_timeout(LONG).expect("it does not wait").expect("written");
    a.plan.set_full(false);
    flushed.recv_timeout(LONG).expect("answered").expect("durable");
    a.image.close().expect("closes");
    b.image.close().expect("closes");
}

/// Each would sleep on one of the threads that all images sync with.
#[test]
fn rounds_that_wait_for_space_keep_no_thread_from_other_images() {
    let engine = engine(Options::default());
    let full: Vec<ImageBench> = (0..64).map(|_| bench(&engine, "")).collect();
    for b in &full {
        b.image.write_at(0, &[1; 512]).expect("space");
        b.plan.set_full(true);
        b.image.flush(Box::new(|_| ()));
    }
    until(|| full.iter().all(|b| b.image.mode() == Mode::FullQueue));
    let other = bench(&engine, "");
    // It needs the threads for its extension, too.
    later(&other.image, 0).recv_timeout(LONG).expect("it does not wait for them").expect("space");
    let (reply, answer) = mpsc::channel();
    other.image.flush(Box::new(move |r| drop(reply.send(r))));
    answer.recv_timeout(LONG).expect("it does not wait for them").expect("durable");
    for b in &full {
        b.plan.set_full(false);
        b.image.flush_now().expect("durable");
        b.image.close().expect("closes");
    }
}

#[test]
fn an_fsync_on_a_full_host_waits_for_space_no_longer_than_it_may() {
    let timeout = Some(Duration::from_millis(1500));
    let b = bench(&engine(Options { full_timeout: timeout, ..Options::default() }), "");
    b.image.write_at(0, &[1; 512]).expect("space");
    b.plan.set_full(true);
    let begun = Instant::now();
    assert_eq!(b.image.flush_now().expect_err("full").kind(), Kind::NoSpace);
    assert!(begun.elapsed() >= Duration::from_millis(1400), "{:?}", begun.elapsed());
    b.plan.set_full(false);
    b.image.flush_now().expect("space is back");
    b.image.close().expect("closes");
}
