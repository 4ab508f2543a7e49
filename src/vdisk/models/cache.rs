//! The BAT cache: loads, pins, evictions and rounds beside each other; no entry is lost, and "nothing is dirty" is true.

use std::sync::Mutex;

use super::{Host, explore, finds};
use crate::format::bat::{PAGE_BYTES, cluster_of, slot_of};
use crate::format::header::{Header, Version};
use crate::io::file::HostFile;
use crate::sync::mpsc::{Sender, channel};
use crate::sync::plain::lock;
use crate::sync::{Arc, Bug, thread};
use crate::vdisk::bat::budget::Budget;
use crate::vdisk::bat::cache::{BatCache, Copy, Loading, Lookup};
use crate::vdisk::bat::load::read_page;
use crate::vdisk::bat::page::Place;
use crate::vdisk::runner::Job;
use crate::vdisk::stack::Stack;

const CLUSTER: u64 = 4096;
/// More than the least budget, which is 16 pages.
const PAGES: u64 = 20;

struct Rig {
    host: Arc<Host>,
    budget: Arc<Budget>,
    stack: Stack,
    /// What copies said is free, in the order in which they became durable.
    freed: Mutex<Vec<u64>>,
}

fn first_of(page: u64) -> u64 {
    cluster_of(page, 0).expect("no page 0 here")
}

impl Rig {
    fn new() -> Arc<Rig> {
        let header =
            Header::new(Version::V2, (PAGES * 1024 - 16) * CLUSTER, CLUSTER).expect("fits the format");
        let host = Host::new(&header.encode(), header.geometry().first + 100 * CLUSTER);
        let budget = Arc::new(Budget::new(0));
        let stack = Stack::new(vec![host.level()], &budget).expect("one level");
        let rig = Arc::new(Rig { host, budget, stack, freed: Mutex::default() });
        // One below the budget, so that the next pages push each other out.
        (1..16).for_each(|page| rig.load(first_of(page)));
        rig.host.set_slow(true);
        rig
    }

    fn bat(&self) -> &Arc<BatCache> {
        self.stack.bat.as_ref().expect("a ploop top")
    }

    fn load(&self, cluster: u64) {
        let (reply, heard) = channel();
        let later = |reply: Sender<()>| -> Job { Box::new(move || reply.send(()).expect("it waits")) };
        match self.bat().load_or_queue(cluster, reply, later) {
            Loading::Loaded(_) => {}
            Loading::Queued => heard.recv().expect("the loader reports"),
            Loading::Mine(_) => {
                let (waiting, loaded) = self.bat().load(cluster, |page| read_page(page, &self.stack));
                waiting.into_iter().for_each(|job| drop(thread::spawn(job)));
                loaded.expect("memory reads");
            }
        }
    }

    /// Enters `position` for a cluster that no other thread touches.
    fn allocate(&self, cluster: u64, position: u64) {
        loop {
            match self.bat().lookup_to_allocate(cluster, 0) {
                Lookup::Miss => self.load(cluster),
                Lookup::Found(Place::None) => break,
                Lookup::Found(other) => panic!("cluster {cluster} is {other:?}"),
            }
        }
        thread::yield_now();
        self.bat().set(cluster, 0, position);
        self.says_the_truth(cluster, position);
    }

    /// Takes the entry away again.
    fn unmap(&self, cluster: u64) {
        while !self.bat().pin(cluster) {
            self.load(cluster);
        }
        self.bat().unmap(cluster, 1, &[cluster]);
        self.bat().unpin(cluster);
        self.says_the_truth(cluster, 0);
    }

    /// What an fsync relies on: when no page is dirty, the entry is on disk.
    fn says_the_truth(&self, cluster: u64, position: u64) {
        if self.bat().dirty_pages() == 0 {
            assert_eq!(
                self.on_disk(cluster),
                position,
                "nothing is dirty, and cluster {cluster} is not written"
            );
        }
    }

    fn on_disk(&self, cluster: u64) -> u64 {
        let (page, slot) = slot_of(cluster);
        let mut entry = [0; 4];
        self.host.file.read_at(&mut entry, page * PAGE_BYTES + 4 * slot as u64).expect("memory reads");
        u64::from(u32::from_le_bytes(entry)) * CLUSTER
    }

    /// A round; its copies are written, or (`fails`) the first of them is not.
    fn round(&self, mut fails: bool) -> usize {
        let copies = self.bat().copy_dirty(0, &self.stack.geometry);
        let count = copies.len();
        for copy in copies {
            if std::mem::take(&mut fails) {
                thread::yield_now();
                self.bat().not_written(copy);
                continue;
            }
            let Copy { page, bytes, freed, moved, .. } = copy;
            assert!(moved.is_empty(), "nothing is compacted here");
            self.host.write_at(&bytes, u64::from(page) * PAGE_BYTES).expect("memory writes");
            self.bat().written(page);
            lock(&self.freed).extend(freed);
        }
        count
    }
}

fn everything_at_once() {
    let rig = Rig::new();
    let spawn = |body: fn(&Rig)| {
        let rig = rig.clone();
        thread::spawn(move || body(&rig))
    };
    let position = |n: u64| rig.stack.geometry.first + n * CLUSTER;
    let threads = [
        spawn(|rig| {
            let at = |n: u64| rig.stack.geometry.first + n * CLUSTER;
            rig.allocate(first_of(1), at(1));
            rig.allocate(first_of(17), at(2));
        }),
        spawn(|rig| {
            let at = |n: u64| rig.stack.geometry.first + n * CLUSTER;
            rig.allocate(first_of(1) + 1, at(3));
            rig.allocate(first_of(17) + 1, at(4));
            rig.unmap(first_of(1) + 1);
        }),
        spawn(|rig| (18..PAGES).for_each(|page| rig.load(first_of(page)))),
        spawn(|rig| {
            rig.round(true);
            rig.round(false);
        }),
    ];
    threads.into_iter().for_each(|t| t.join().expect("no panic"));
    while rig.round(false) > 0 {}
    assert_eq!(rig.bat().dirty_pages(), 0);
    assert!(!rig.budget.dirty_full());
    let expected = [(1, 0, position(1)), (1, 1, 0), (17, 0, position(2)), (17, 1, position(4))];
    for (page, slot, position) in expected {
        assert_eq!(rig.on_disk(first_of(page) + slot), position, "entry {slot} of page {page}");
        rig.load(first_of(page));
        let place = if position == 0 { Place::None } else { Place::At { level: 0, position } };
        assert_eq!(rig.bat().lookup(first_of(page) + slot), Lookup::Found(place));
    }
    assert_eq!(
        *rig.freed.lock().expect("no panic"),
        [first_of(1) + 1],
        "freed once, by a page that was written"
    );
    assert!(rig.budget.loaded() <= 16 + 1, "{} pages are loaded", rig.budget.loaded());
    let budget = rig.budget.clone();
    drop(rig);
    assert_eq!(budget.loaded(), 0, "pages are counted in and out alike");
}

#[test]
fn no_entry_is_lost_between_loads_evictions_and_rounds() {
    explore(6000, everything_at_once);
}

#[test]
fn a_page_that_is_called_clean_too_early_is_found() {
    finds(Bug::CleanWhateverCame, 20_000, everything_at_once);
}
