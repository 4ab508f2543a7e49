//! The SQLite loop: a history, in which host operation N fails, for N = 1, 2, ... until nothing fails any more.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ploopfs::Result;
use ploopfs::io::memory::MemoryFile;
use ploopfs::vdisk::{ImageEvent, Mode, OnFull, Options};

use super::rig::{CLUSTER, Call, Rig, SECTOR, empty_file, options};

const CLUSTERS: u64 = 24;
const SECTORS: u64 = CLUSTERS * CLUSTER / SECTOR;
/// Runs at once. Most of their time is spent waiting (retries, timeouts), so far more than there are CPUs.
const AT_ONCE: u64 = 24;

#[derive(Clone, Copy)]
enum Op {
    /// First sector, sectors, stamp (0: zeroes).
    Write(u64, u64, u32),
    Durable(u64, u64, u32),
    Discard(u64, u64),
    Flush,
    Read(u64, u64),
}

/// Eight sectors are a cluster.
const HISTORY: [Op; 19] = [
    Op::Write(0, 8, 1),  // allocates, a whole cluster
    Op::Write(19, 2, 2), // allocates, inside a cluster
    Op::Read(0, 40),
    Op::Write(30, 30, 3), // several clusters, ragged at both ends
    Op::Flush,
    Op::Write(2, 3, 4),   // in place
    Op::Write(100, 8, 0), // zeroes to a hole
    Op::Durable(104, 8, 5),
    Op::Discard(32, 16), // whole clusters
    Op::Discard(1, 2),   // ragged
    Op::Read(0, SECTORS),
    Op::Write(64, 32, 6), // allocates while freed clusters wait for their round
    Op::Flush,
    Op::Write(120, 40, 7), // reuses what was freed, and extends
    Op::Durable(33, 4, 8),
    Op::Discard(60, 50),
    Op::Write(0, 8, 9),
    Op::Flush,
    Op::Write(160, 24, 10), // for the close to save
];

/// The histories: with PLOOPFS_LONG=1 ten of them, nine by chance.
fn histories() -> Vec<Vec<Op>> {
    let long = std::env::var("PLOOPFS_LONG").is_ok_and(|n| n != "0");
    let by_chance = (1..if long { 10 } else { 1 }).map(by_chance);
    std::iter::once(HISTORY.to_vec()).chain(by_chance).collect()
}

/// As long as the one above, and with something left for the close to save.
fn by_chance(seed: u64) -> Vec<Op> {
    let mut state = seed;
    // Knuth's MMIX: the upper bits are good enough to pick by.
    let mut below = move |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    let mut history = Vec::new();
    for number in 1..HISTORY.len() as u32 {
        let at = below(SECTORS);
        let n = 1 + below((SECTORS - at).min(40));
        history.push(match below(10) {
            0..4 => Op::Write(at, n, number),
            4 => Op::Write(at, n, 0),
            5 => Op::Durable(at, n, number),
            6 | 7 => Op::Discard(at, n),
            8 => Op::Flush,
            _ => Op::Read(at, n),
        });
    }
    history.push(Op::Write(below(SECTORS - 8), 8, HISTORY.len() as u32));
    history
}

/// For every sector, what it may hold: now, and on the file (any value since the last sync that worked).
struct Model {
    now: Vec<Vec<u32>>,
    file: Vec<Vec<u32>>,
}

impl Model {
    fn wrote(&mut self, at: u64, n: u64, value: u32, result: &Result<()>) {
        for s in at as usize..(at + n) as usize {
            if result.is_ok() {
                self.now[s].clear();
            }
            self.now[s].push(value);
            self.file[s].push(value);
        }
    }

    fn check(&self, rig: &Rig, allowed: &[Vec<u32>], at: u64, n: u64) -> bool {
        let Ok(data) = rig.read(at * SECTOR, n * SECTOR) else { return false };
        for (i, sector) in data.chunks(SECTOR as usize).enumerate() {
            let s = at as usize + i;
            let value = u32::from_le_bytes(sector[..4].try_into().expect("four bytes"));
            assert!(sector.chunks(4).all(|c| c == value.to_le_bytes()), "sector {s} is torn");
            assert!(allowed[s].contains(&value), "sector {s} holds {value}, allowed {:?}", allowed[s]);
        }
        true
    }
}

/// One run; returns how many faults were injected.
fn run(history: &[Op], spec: &str, options: Options) -> u64 {
    let forever = spec.ends_with("forever");
    let Ok(rig) = Rig::open(empty_file(CLUSTERS), spec, options) else {
        return 1; // The fault met the opening, which said so.
    };
    let zeroes = vec![vec![0]; SECTORS as usize];
    let mut model = Model { now: zeroes.clone(), file: zeroes };
    for &op in history {
        match op {
            Op::Write(at, n, value) | Op::Durable(at, n, value) => {
                let durable = matches!(op, Op::Durable(..));
                let data = value.to_le_bytes().repeat((n * SECTOR / 4) as usize);
                let inline = if durable { None } else { rig.image.try_write(at * SECTOR, &data) };
                let result = inline.unwrap_or_else(|| rig.start_write(at * SECTOR, data, durable).answer());
                model.wrote(at, n, value, &result);
                if durable && result.is_ok() {
                    model.file.clone_from(&model.now);
                }
            }
            Op::Discard(at, n) => {
                let result = rig.discard(at * SECTOR, n * SECTOR);
                model.wrote(at, n, 0, &result);
            }
            Op::Flush => {
                if rig.flush().is_ok() {
                    model.file.clone_from(&model.now);
                }
            }
            Op::Read(at, n) => {
                let read = model.check(&rig, &model.now, at, n);
                assert!(read || failed(&rig) > 0, "a read fails only when the host does");
            }
        }
    }
    if !forever {
        assert!(model.check(&rig, &model.now, 0, SECTORS) || failed(&rig) == 1, "reads go on");
    }
    let sync_failed = rig.file.log().iter().any(|(call, ok)| *call == Call::Sync && !ok);
    let said = rig.events().iter().filter(|e| matches!(e, ImageEvent::ReadOnly { .. })).count();
    if sync_failed {
        assert_eq!((rig.image.mode(), said), (Mode::ReadOnly, 1), "a failed sync is final");
        rig.flush().expect_err("and every later fsync fails");
    } else if !forever {
        assert!(rig.image.mode() != Mode::ReadOnly && said == 0, "one failed call is not the end");
    }
    let closed = rig.image.close();
    if sync_failed {
        closed.as_ref().expect_err("a close after a failed sync says so");
    }
    rig.read(0, SECTOR).expect_err("closed");
    let injected = failed(&rig);
    let left = if closed.is_ok() { &model.now } else { &model.file };
    let file = MemoryFile::from_bytes(&rig.memory.to_bytes());
    // What is left opens, is sound, holds what it must, and can be used and closed.
    let again =
        Rig::open(file, "", super::rig::options()).expect("opens, with no double use, nothing out of range");
    assert!(model.check(&again, left, 0, SECTORS));
    for cluster in 0..CLUSTERS {
        again.fill(cluster, 0x77).expect("writes again");
    }
    assert!((0..CLUSTERS).all(|cluster| again.byte(cluster) == 0x77));
    again.close();
    injected
}

/// Host calls that failed or were short.
fn failed(rig: &Rig) -> u64 {
    let failed = rig.file.log().iter().filter(|(_, ok)| !ok).count();
    failed as u64 + rig.file.shorts()
}

/// Runs `fault` with N in place of `#` for N = 1, 2, ...
fn every_n(number: usize, history: &[Op], fault: &str, options: &Options) -> u64 {
    let total = AtomicU64::new(0);
    let mut n = 1;
    loop {
        let reached = std::thread::scope(|scope| {
            let runs: Vec<_> = (n..n + AT_ONCE)
                .map(|n| {
                    let (spec, options) = (fault.replace('#', &n.to_string()), options.clone());
                    let name = format!("history {number}, {spec} {:?}", options.on_full);
                    let thread = std::thread::Builder::new().name(name);
                    thread.spawn_scoped(scope, move || run(history, &spec, options)).expect("a thread")
                })
                .collect();
            let faults: Vec<u64> = runs.into_iter().map(|r| r.join().expect("no run fails")).collect();
            total.fetch_add(faults.iter().sum(), Ordering::Relaxed);
            faults.iter().all(|n| *n > 0)
        });
        if !reached {
            return total.into_inner();
        }
        n += AT_ONCE;
    }
}

fn all(faults: &[&str], options: &Options) {
    let mut count = 0;
    for (number, history) in histories().iter().enumerate() {
        count += faults.iter().map(|fault| every_n(number, history, fault, options)).sum::<u64>();
    }
    println!("FAULTS {count}");
}

fn queue(timeout: Duration) -> Options {
    Options { on_full: OnFull::Queue, full_timeout: Some(timeout), ..options() }
}

fn fail() -> Options {
    Options { on_full: OnFull::Error, ..options() }
}

#[test]
fn the_engine_survives_every_host_call_failing_once_with_eio() {
    all(&["fail=any:#:EIO"], &fail());
}

#[test]
fn the_engine_survives_the_host_failing_for_good_from_any_call_on() {
    all(&["fail=any:#:EIO:forever", "fail=any:#:ENOSPC:forever"], &fail());
}

#[test]
fn the_engine_survives_every_kind_of_call_failing_for_good() {
    let kinds = ["fail=punch:#:EIO:forever", "fail=read:#:EIO:forever", "fail=set_len:#:EIO:forever"];
    all(&kinds, &fail());
    all(&["fail=write:#:EIO:forever", "fail=sync:#:EIO:forever"], &fail());
}

#[test]
fn the_engine_survives_a_host_that_is_full_once_or_for_good_and_fails_writes() {
    all(&["fail=any:#:ENOSPC", "fail=write:#:ENOSPC:forever", "fail=set_len:#:ENOSPC:forever"], &fail());
}

#[test]
fn the_engine_survives_a_host_that_is_full_once_or_for_good_and_queues_writes() {
    let options = queue(Duration::from_secs(1));
    all(&["fail=any:#:ENOSPC", "fail=write:#:ENOSPC:forever"], &options);
}

#[test]
fn short_reads_and_writes_never_lose_a_tail() {
    all(&["short=write:#", "short=write:#:forever", "short=read:#", "short=read:#:forever"], &fail());
}
