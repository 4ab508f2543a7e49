//! What a live operation leaves when one of its steps fails, or when something comes between two of them; each as a
//! test.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::freeze::Uncommitted;
use super::{Done, Work, carry_out};
use crate::error::{Error, Kind, Result};
use crate::format::header::{Header, Version};
use crate::image::create::{CreatePlan, create};
use crate::image::layers::{Direct, Layers, Opened, Opener};
use crate::image::make_folder::make_folder;
use crate::io::fault::{FaultFile, FaultPlan, Op};
use crate::io::file::HostFile;
use crate::io::lock::Use;
use crate::io::memory::MemoryFile;
use crate::io::real::Access;
use crate::progress::Progress;
use crate::sync::Arc;
use crate::vdisk::{Engine, Image, Layout, Level, OnFull, Options};

const CLUSTER: u64 = 32 << 10;
const LONG: Duration = Duration::from_secs(20);

fn engine() -> Arc<Engine> {
    Engine::new(Options { on_full: OnFull::Error, ..Options::default() }, Box::new(|_| ()))
}

/// A layered image on real files, open.
struct Disk {
    folder: tempfile::TempDir,
    open: Option<(Arc<Image>, Arc<Layers>)>,
}

impl Disk {
    fn new() -> Disk {
        let folder = tempfile::tempdir().expect("tmp");
        let plan = CreatePlan { cluster: Some(CLUSTER), ..CreatePlan::thin(64 * CLUSTER) };
        create(&folder.path().join("vm"), &plan).expect("created");
        let images = std::fs::File::open(folder.path()).expect("opens");
        make_folder(images.as_fd(), folder.path(), "vm.hds".as_ref(), None).expect("a folder");
        let mut disk = Disk { folder, open: None };
        disk.reopen();
        disk
    }

    fn reopen(&mut self) {
        if let Some((image, _)) = self.open.take() {
            image.close().expect("closes");
        }
        let path = self.folder.path().join("vm");
        let dir = OwnedFd::from(std::fs::File::open(&path).expect("opens"));
        let (layers, levels) =
            Layers::open(dir, &path, Arc::new(Direct(Access::ReadWrite)), false).expect("opens");
        let image = Image::open(&engine(), "vm", levels).expect("opens");
        image.make_writable().expect("the BAT is sound");
        self.open = Some((image, layers));
    }

    fn image(&self) -> &Arc<Image> {
        &self.open.as_ref().expect("open").0
    }

    fn work(&self, work: &Work) -> Result<Done> {
        let (image, layers) = self.open.as_ref().expect("open");
        carry_out(image, Some(layers), work, &Progress::new())
    }

    fn snapshot(&self, label: &str) {
        self.work(&Work::Snapshot { label: Some(label.into()) }).expect("a snapshot");
    }

    fn delete(&self, snapshot: &str) -> Result<Done> {
        self.work(&Work::Delete { snapshot: snapshot.into() })
    }

    fn write(&self, cluster: u64, byte: u8) {
        self.image().write_at(cluster * CLUSTER, &vec![byte; CLUSTER as usize]).expect("written");
    }

    fn byte(&self, cluster: u64) -> u8 {
        self.image().read_at(cluster * CLUSTER, 1).expect("read")[0]
    }
}

/// The live disk would go on with files that the descriptor no longer has, and the next merge leave out what only
/// they hold.
#[test]
fn a_merge_below_the_top_that_failed_at_its_end_costs_the_next_merge_nothing() {
    let mut disk = Disk::new();
    (0..3).for_each(|cluster| disk.write(cluster, 1));
    disk.snapshot("a");
    (1..5).for_each(|cluster| disk.write(cluster, 2));
    disk.snapshot("c");
    (10..20).for_each(|cluster| disk.write(cluster, 3));
    assert_eq!(disk.byte(0), 1, "where it lies is cached");
    let busy = disk.image().begin_operation().expect("none is under way");
    assert_eq!(disk.delete("a").expect_err("the live disk cannot change its files").kind(), Kind::Busy);
    drop(busy);
    disk.delete("c").expect("merged");
    disk.reopen();
    let bytes: Vec<u8> = (0..6).map(|cluster| disk.byte(cluster)).collect();
    assert_eq!(bytes, [1, 2, 2, 2, 2, 0]);
}

/// Two levels in memory, freshly opened; each maps clusters 1 to 3, the lower one 0 as well.
struct Chain {
    lower: Arc<FaultPlan>,
    below: Arc<MemoryFile>,
    top: Arc<MemoryFile>,
    image: Arc<Image>,
}

fn level(file: &Arc<MemoryFile>, plan: &Arc<FaultPlan>) -> Level {
    let mut head = [0; 64];
    file.read_at(&mut head, 0).expect("memory reads");
    let header = Header::parse(&head).expect("a header");
    let host: Arc<dyn HostFile> = Arc::new(FaultFile::new(file.clone(), plan.clone()));
    Level { file: host, path: PathBuf::from("memory"), layout: Layout::Ploop(header) }
}

fn chain(lower_faults: &str, top_faults: &str) -> Chain {
    let header = Header::new(Version::V2, 64 * CLUSTER, CLUSTER).expect("fits the format");
    let new = || {
        let file = Arc::new(MemoryFile::from_bytes(&header.encode()));
        file.set_len(u64::from(header.first_block) * 512).expect("memory grows");
        file
    };
    let none = Arc::new(FaultPlan::default());
    let (lower, top) = (new(), new());
    let write = |levels, clusters: std::ops::Range<u64>, byte| {
        let image = Image::open(&engine(), "memory", levels).expect("opens");
        image.make_writable().expect("sound");
        clusters.for_each(|c| image.write_at(c * CLUSTER, &[byte; CLUSTER as usize]).expect("written"));
        image.close().expect("closes");
    };
    write(vec![level(&lower, &none)], 0..4, 1);
    write(vec![level(&lower, &none), level(&top, &none)], 1..4, 2);
    let plan = |faults: &str| Arc::new(faults.parse::<FaultPlan>().expect("a plan"));
    let (lower_plan, top_plan) = (plan(lower_faults), plan(top_faults));
    let levels = vec![level(&lower, &lower_plan), level(&top, &top_plan)];
    let image = Image::open(&engine(), "memory", levels).expect("opens");
    image.make_writable().expect("sound");
    Chain { lower: lower_plan, below: lower, top, image }
}

/// The second attempt would find nothing to take away, sync without an error, and go on to the descriptor.
#[test]
fn after_a_failed_sync_of_the_lower_file_no_merge_goes_on() {
    for nth in 1..=3 {
        let chain = chain(&format!("fail=sync:{nth}:EIO"), "");
        let flip = || chain.image.flip(&Progress::new(), || Ok(()));
        flip().expect_err("a sync failed");
        assert!(chain.image.failure().is_some(), "sync {nth}: read-only until it is closed");
        flip().expect_err("and stays so");
        chain.image.close().expect_err("its mark stays");
    }
}

/// ploop refuses a chain with a level in use below the top, and would until our next open.
#[test]
fn a_flip_that_is_given_up_leaves_the_lower_file_closed() {
    let chain = chain("", "");
    let refused = || Err(Uncommitted::NotDone(Error::new(Kind::NoSpace, "no room for a descriptor")));
    chain.image.flip(&Progress::new(), refused).expect_err("not committed");
    let cancelled = Progress::new();
    cancelled.cancel();
    chain.image.flip(&cancelled, || Ok(())).expect_err("cancelled");
    assert!(chain.image.failure().is_none());
    let below = Header::parse(&chain.below.to_bytes()).expect("a header");
    assert!(!below.is_in_use());
    chain.image.close().expect("closes");
    let levels = vec![level(&chain.below, &chain.lower), level(&chain.top, &chain.lower)];
    let again = Image::open(&engine(), "memory", levels).expect("opens");
    let bytes: Vec<u8> = (0..5).map(|c| again.read_at(c * CLUSTER, 1).expect("read")[0]).collect();
    assert_eq!(bytes, [1, 2, 2, 2, 0]);
}

/// A page that is loaded in the middle of the flip does not know what a power cut would bring back.
#[test]
fn a_discard_while_entries_are_taken_from_the_lower_level_unmaps_nothing() {
    let chain = chain("", "");
    chain.lower.set_delay(Op::Sync, 1500);
    std::thread::scope(|scope| {
        let flip = scope.spawn(|| chain.image.flip(&Progress::new(), || Ok(())));
        let deadline = Instant::now() + LONG;
        let syncs = || chain.lower.counters(Op::Sync);
        // The first is that of the mark, the second that of the entries.
        while (syncs().started, syncs().running) != (2, 1) {
            assert!(Instant::now() < deadline, "it never came");
            std::thread::yield_now();
        }
        chain.image.discard_at(2 * CLUSTER, CLUSTER).expect("discarded");
        chain.image.flush_now().expect("durable");
        assert_eq!((syncs().started, syncs().running), (2, 1), "still in the middle of it");
        let entry = &chain.top.to_bytes()[64 + 2 * 4..64 + 3 * 4];
        assert_ne!(entry, [0; 4], "a hole of the top hides what may come back");
        chain.lower.set_delay(Op::Sync, 0);
        flip.join().expect("no panic").expect("flips");
    });
    assert_eq!(chain.image.read_at(2 * CLUSTER, 1).expect("read")[0], 0);
    chain.image.close().expect("closes");
}

#[test]
fn no_operation_begins_on_a_closed_image() {
    let chain = chain("", "");
    chain.image.write_at(0, &[3; 512]).expect("space");
    chain.image.close().expect("closes");
    let closed = chain.top.to_bytes();
    let snapshot = chain.image.put_on_top(|_| unreachable!("the files may be another process's"), || Ok(()));
    snapshot.expect_err("closed");
    chain.image.grow(4096 * CLUSTER, &Progress::new()).expect_err("closed");
    assert!(chain.top.to_bytes() == closed);
}

#[test]
fn a_discard_that_once_found_no_space_asks_the_host_again_the_next_time() {
    // The mark cuts the tail; the extension for the hole over cluster 0 fails, and the shorter one as well.
    let chain = chain("", "fail=set_len:2:ENOSPC,fail=set_len:3:ENOSPC");
    assert_eq!(chain.image.discard_at(0, CLUSTER).expect_err("full").kind(), Kind::NoSpace);
    chain.image.discard_at(0, CLUSTER).expect("space is back");
    chain.image.close().expect("closes");
}

/// Opens files whose syncs are counted.
struct Counted(Arc<FaultPlan>);

impl Opener for Counted {
    fn open(&self, dir: BorrowedFd<'_>, file: &Path, shown: &Path, used: Use) -> Result<Opened> {
        let opened = Direct(Access::ReadWrite).open(dir, file, shown, used)?;
        Ok(Opened { file: Arc::new(FaultFile::new(opened.file.clone(), self.0.clone())), ..opened })
    }
}

/// The kernel reports a failed write once: a sync by an observer hears of it in the writer's place.
#[test]
fn a_snapshot_that_is_looked_at_syncs_no_file_that_may_have_a_writer() {
    let mut disk = Disk::new();
    disk.snapshot("one");
    let (image, layers) = disk.open.take().expect("open");
    let guid = layers.store().find_snapshot("one").expect("there");
    image.close().expect("closes");
    drop((image, layers));
    let path = disk.folder.path().join("vm");
    let base = path.join("vm.hds");
    let mut bytes = std::fs::read(&base).expect("read");
    let header = Header::parse(&bytes).expect("a header").marked();
    bytes[..64].copy_from_slice(&header.encode());
    std::fs::write(&base, bytes).expect("written");

    let plan = Arc::new(FaultPlan::default());
    let syncs = || plan.counters(Op::Sync).started;
    let dir = OwnedFd::from(std::fs::File::open(&path).expect("opens"));
    let (layers, levels) = Layers::open(dir, &path, Arc::new(Counted(plan.clone())), false).expect("opens");
    assert_eq!(syncs(), 1, "a delta found in use is not trusted when it is opened");
    let snapshot = layers.chain(guid).expect("a chain");
    Image::open_beside(&engine(), "vm@one", snapshot).expect("opens").close().expect("closes");
    assert_eq!(syncs(), 1);
    Image::open(&engine(), "vm", levels).expect("opens").close().expect("closes");
    assert_eq!(syncs(), 2, "who may write it looks again");
}
