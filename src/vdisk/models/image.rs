//! One whole image over a file in memory: pios, rounds of flush with write-back, extensions, a close and a snapshot, on
//! pools whose threads are shuttle's.

use std::time::Duration;

use super::{Host, explore, finds};
use crate::error::Result;
use crate::format::header::{Header, SECTOR, Version};
use crate::progress::Progress;
use crate::sync::{Arc, Bug, Mutex, lock, thread};
use crate::vdisk::live::snapshot::TopPlan;
use crate::vdisk::{Engine, Image, Level, Options};

const CLUSTER: u64 = 4096;
const CLUSTERS: u64 = 8;

fn empty(in_use: bool) -> Arc<Host> {
    let header = Header::new(Version::V2, CLUSTERS * CLUSTER, CLUSTER).expect("fits the format");
    let header = if in_use { header.marked() } else { header };
    Host::new(&header.encode(), header.geometry().first)
}

fn open(host: &Arc<Host>) -> Arc<Image> {
    // Pages are written at once: the clock has no place in a model without time.
    let options = Options {
        runners: 2,
        bat_delay: Duration::ZERO,
        extend: 2 * CLUSTER,
        low_water: 0,
        ..Options::default()
    };
    let image =
        Image::open(&Engine::new(options, Box::new(|_| ())), "memory", vec![host.level()]).expect("opens");
    image.make_writable().expect("the BAT is sound");
    host.set_slow(true);
    image
}

/// The stamp of a sector in these bytes of a closed or broken-off image; 0 where nothing is mapped.
fn stamp_in(bytes: &[u8], offset: u64) -> u8 {
    let geometry = Header::parse(bytes).expect("a header").geometry();
    let at = 64 + 4 * (offset / CLUSTER) as usize;
    let entry = u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if entry == 0 {
        return 0;
    }
    let position = geometry.position(entry).expect("on the grid") + offset % CLUSTER;
    assert!(position + SECTOR <= bytes.len() as u64, "R2: the entry points behind the end of the file");
    bytes[position as usize]
}

fn write(image: &Arc<Image>, offset: u64, stamp: u8) -> Result<()> {
    image.write_at(offset, &[stamp; SECTOR as usize])
}

fn stamp_of(image: &Arc<Image>, offset: u64) -> u8 {
    let data = image.read_at(offset, SECTOR as usize).expect("reads");
    assert!(data.iter().all(|byte| *byte == data[0]), "half of a write");
    data[0]
}

/// Two writers, each with fsyncs; one shares a cluster with the other.
fn writers_with_fsync() {
    let host = empty(false);
    let image = open(&host);
    let threads: Vec<_> = (0..2u64)
        .map(|n| {
            let (host, image) = (host.clone(), image.clone());
            thread::spawn(move || {
                for (round, cluster) in [(0, 0), (1, 1 + n)] {
                    let (offset, stamp) = (cluster * CLUSTER + n * SECTOR, (10 * (n + 1) + round) as u8);
                    write(&image, offset, stamp).expect("space");
                    image.flush_now().expect("syncs");
                    assert_eq!(stamp_in(&host.durable(), offset), stamp, "R6: fsync came back too early");
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().expect("no panic"));
    image.close().expect("closes");
    assert!(host.durable() == host.file.to_bytes(), "a clean close is durable");
}

/// One sector is written, discarded and written again; others look, and write beside it.
fn discard_in_between() {
    let host = empty(false);
    let image = open(&host);
    let reader = image.clone();
    let look = thread::spawn(move || {
        let seen: Vec<u8> = (0..2).map(|_| stamp_of(&reader, 0)).collect();
        let legal = |stamps: &[u8]| matches!(stamps, [0, 0..=2] | [1, 0..=2] | [2, 2]);
        assert!(legal(&seen), "{seen:?}");
    });
    let beside = image.clone();
    let neighbour = thread::spawn(move || {
        write(&beside, 7 * SECTOR, 9).expect("space");
        beside.flush_now().expect("syncs");
    });
    write(&image, 0, 1).expect("space");
    image.discard_at(0, CLUSTER).expect("discards");
    write(&image, 0, 2).expect("space");
    look.join().expect("no panic");
    neighbour.join().expect("no panic");
    assert_eq!(stamp_of(&image, 0), 2);
    assert!(matches!(stamp_of(&image, 7 * SECTOR), 0 | 9));
    image.close().expect("closes");
    assert_eq!(stamp_in(&host.durable(), 0), 2);
}

/// A close under a writer: what was acknowledged is there, and nothing comes after it.
fn close_under_load() {
    let host = empty(false);
    let image = open(&host);
    let writer = image.clone();
    let written = thread::spawn(move || (1..=3).take_while(|stamp| write(&writer, 0, *stamp).is_ok()).last());
    image.close().expect("closes");
    let closed = host.file.to_bytes();
    assert!(host.durable() == closed, "a clean close is durable");
    let last = written.join().expect("no panic").unwrap_or(0);
    assert!(host.file.to_bytes() == closed, "nothing is written after a close");
    assert_eq!(stamp_in(&closed, 0), last, "the last write that was acknowledged");
    assert!(!Header::parse(&closed).expect("a header").is_in_use());
}

/// A snapshot; returns its new top.
fn put_on_top(image: &Arc<Image>, commit: impl FnOnce()) -> Arc<Host> {
    let top: Mutex<Option<Arc<Host>>> = Mutex::new(None);
    let make = |plan: TopPlan| -> Result<Level> {
        let new = empty(plan.in_use);
        let level = new.level();
        new.set_slow(true);
        *lock(&top) = Some(new);
        Ok(level)
    };
    let commit = || {
        commit();
        Ok(())
    };
    image.put_on_top(make, commit).expect("a snapshot");
    lock(&top).take().expect("made")
}

/// A snapshot under a writer and a reader.
fn snapshot_under_load() {
    let host = empty(false);
    let image = open(&host);
    let writer = image.clone();
    let written = thread::spawn(move || (1..=3).for_each(|stamp| write(&writer, 0, stamp).expect("space")));
    let reader = image.clone();
    let look = thread::spawn(move || {
        let seen: Vec<u8> = (0..2).map(|_| stamp_of(&reader, 0)).collect();
        assert!(seen.is_sorted(), "time went back: {seen:?}");
    });
    let mut frozen = 0;
    let top = put_on_top(&image, || frozen = stamp_in(&host.durable(), 0));
    assert_eq!(stamp_in(&host.file.to_bytes(), 0), frozen, "the lower level stands still");
    written.join().expect("no panic");
    look.join().expect("no panic");
    assert_eq!(stamp_of(&image, 0), 3);
    image.close().expect("closes");
    assert_eq!(stamp_in(&host.file.to_bytes(), 0), frozen);
    let last = if frozen == 3 { 0 } else { 3 };
    assert_eq!(stamp_in(&top.durable(), 0), last, "what came later is in the new top");
}

/// The two levels become one, in whichever of them it is, under a writer and a reader.
fn merge_under_load(flip: bool) {
    let host = empty(false);
    let image = open(&host);
    host.set_slow(false);
    write(&image, 0, 1).expect("space");
    write(&image, CLUSTER, 7).expect("space");
    let top = put_on_top(&image, || ());
    host.set_slow(true);
    let writer = image.clone();
    let written =
        thread::spawn(move || (2..=3).for_each(|stamp| write(&writer, SECTOR, stamp).expect("space")));
    let reader = image.clone();
    let look = thread::spawn(move || {
        for _ in 0..2 {
            assert_eq!(stamp_of(&reader, 0), 1, "not copied on write");
            assert_eq!(stamp_of(&reader, CLUSTER), 7, "lost in the merge");
        }
    });
    let progress = Progress::new();
    if flip {
        image.flip(&progress, || Ok(())).expect("a flip");
    }
    image.pull_out(&progress, || Ok(())).expect("a merge");
    written.join().expect("no panic");
    look.join().expect("no panic");
    image.close().expect("closes");
    let one = if flip { host.durable() } else { top.durable() };
    let stamps = [0, SECTOR, CLUSTER].map(|offset| stamp_in(&one, offset));
    assert_eq!(stamps, [1, 3, 7], "one file has everything");
}

#[test]
fn a_merge_under_load_loses_nothing() {
    explore(1000, || merge_under_load(false));
    explore(1000, || merge_under_load(true));
}

#[test]
fn an_fsync_covers_all_that_was_acknowledged_before_it() {
    explore(2000, writers_with_fsync);
}

#[test]
fn reads_see_a_sector_as_some_order_of_writes_and_discards_leaves_it() {
    explore(2000, discard_in_between);
}

#[test]
fn a_close_under_load_keeps_what_was_acknowledged() {
    explore(2000, close_under_load);
}

#[test]
fn a_snapshot_under_load_stands_still() {
    explore(2000, snapshot_under_load);
}

#[test]
fn an_fsync_that_joins_a_running_round_is_found() {
    finds(Bug::JoinRunningRound, 20_000, writers_with_fsync);
}
