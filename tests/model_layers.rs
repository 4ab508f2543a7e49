//! Live operations against a plain vector: snapshots, merges in both directions, growing, compaction and defragmentation, while submitters write,
//! read and discard; reopened at random. Every snapshot still has what the disk had when it was taken.

mod common;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::lanes::{LANES, Op, SECTOR, apply, check, empty_image, op, owned};
use ploopfs::format::header::{FLAG_EMPTY, Header, IN_USE, Version};
use ploopfs::io::file::HostFile;
use ploopfs::io::memory::MemoryFile;
use ploopfs::progress::Progress;
use ploopfs::vdisk::live::merge::Direction;
use ploopfs::vdisk::live::snapshot::TopPlan;
use ploopfs::vdisk::{Engine, Image, Layout, Level, Options};
use proptest::prelude::*;

/// The image's files, base first, as a descriptor would have them.
type Chain = Mutex<Vec<Arc<MemoryFile>>>;

fn level(file: &Arc<MemoryFile>) -> Level {
    let mut bytes = [0; 64];
    file.read_at(&mut bytes, 0).expect("memory reads");
    let layout = Header::parse(&bytes).map_or(Layout::Raw, Layout::Ploop);
    let file: Arc<dyn HostFile> = file.clone();
    Level { file, path: PathBuf::from("memory"), layout }
}

fn open(engine: &Arc<Engine>, chain: &[Arc<MemoryFile>]) -> Arc<Image> {
    Image::open(engine, "memory", chain.iter().map(level).collect()).expect("opens")
}

fn new_top(plan: TopPlan, chain: &Mutex<Option<Arc<MemoryFile>>>) -> ploopfs::Result<Level> {
    let mut header = Header::new(plan.version, plan.disk, plan.cluster).expect("a legal size");
    header.in_use = if plan.in_use { IN_USE } else { header.in_use };
    if plan.in_use {
        header.flags &= !FLAG_EMPTY;
    }
    let file = Arc::new(MemoryFile::from_bytes(&header.encode()));
    file.set_len(header.geometry().first).expect("memory grows");
    *chain.lock().expect("no panic") = Some(file.clone());
    Ok(level(&file))
}

#[derive(Clone, Debug)]
enum Live {
    Snapshot,
    Merge { up: bool },
    Grow { sectors: u64 },
    Compact,
    Defrag,
}

fn live() -> impl Strategy<Value = Live> {
    prop_oneof![
        3 => Just(Live::Snapshot),
        3 => any::<bool>().prop_map(|up| Live::Merge { up }),
        1 => (1..3000u64).prop_map(|sectors| Live::Grow { sectors }),
        2 => Just(Live::Compact),
        2 => Just(Live::Defrag),
    ]
}

/// One live operation. Returns true for a snapshot.
fn carry_out(image: &Arc<Image>, chain: &Chain, what: &Live) -> bool {
    let progress = Progress::new();
    let depth = chain.lock().expect("no panic").len();
    match *what {
        Live::Snapshot => {
            let made = Mutex::new(None);
            image
                .put_on_top(
                    |plan| new_top(plan, &made),
                    || {
                        let top = made.lock().expect("no panic").take().expect("made before");
                        chain.lock().expect("no panic").push(top);
                        Ok(())
                    },
                )
                .expect("a snapshot");
            return true;
        }
        Live::Merge { up } if depth > 1 => {
            let same = image.merge_direction(true).expect("two BATs");
            let raw = matches!(level(&chain.lock().expect("no panic")[depth - 2]).layout, Layout::Raw);
            if !up && same == Direction::Flip && !raw {
                let swap = || {
                    chain.lock().expect("no panic").swap(depth - 2, depth - 1);
                    Ok(())
                };
                image.flip(&progress, swap).expect("a flip");
            }
            let take_out = || {
                chain.lock().expect("no panic").remove(depth - 2);
                Ok(())
            };
            image.pull_out(&progress, take_out).expect("a merge");
        }
        Live::Merge { .. } => {}
        Live::Compact | Live::Defrag
            if matches!(
                level(chain.lock().expect("no panic").last().expect("a top")).layout,
                Layout::Raw
            ) => {}
        Live::Compact => {
            image.compact(&progress).expect("a compaction");
        }
        Live::Defrag => {
            image.defrag(&progress).expect("a defragmentation");
        }
        Live::Grow { sectors } => {
            let size = image.size() + sectors * SECTOR;
            let grown = image.grow(size, &progress).expect("more room");
            assert!(grown >= size && image.size() == grown);
        }
    }
    false
}

/// What `check` would find in one closed delta.
fn sound(file: &Arc<MemoryFile>) {
    let Layout::Ploop(header) = level(file).layout else { return };
    let geometry = header.geometry();
    assert!(!header.is_in_use(), "a clean close, or the end of an operation, clears the mark");
    let bytes = file.to_bytes();
    let mut seen = std::collections::BTreeSet::new();
    for i in 0..header.entries as usize {
        let entry = u32::from_le_bytes(bytes[64 + 4 * i..68 + 4 * i].try_into().expect("four bytes"));
        if entry != 0 {
            let position = geometry.position(entry).expect("on the grid");
            assert!(position + geometry.cluster <= bytes.len() as u64, "entry {i} is inside the file");
            assert!(seen.insert(position), "entry {i} is not used twice");
        }
    }
    assert!(bytes[64 + 4 * header.entries as usize..geometry.first as usize].iter().all(|b| *b == 0));
}

/// A closed delta that was compacted when all was quiet is as long as what it maps.
fn has_no_gaps(file: &Arc<MemoryFile>) {
    let Layout::Ploop(header) = level(file).layout else { return };
    let bytes = file.to_bytes();
    let entries = bytes[64..64 + 4 * header.entries as usize].chunks(4);
    let used = entries.filter(|entry| *entry != [0; 4]).count() as u64;
    let geometry = header.geometry();
    assert_eq!(bytes.len() as u64, geometry.first + used * geometry.cluster, "{used} clusters are in use");
}

/// What the submitters do, the live operations meanwhile, and whether a snapshot is taken when all is quiet.
type Round = (Vec<Vec<Op>>, Vec<Live>, bool);

fn run(first: &Arc<MemoryFile>, bat_delay: u64, rounds: &[Round], mut disk: u64) {
    let options = Options {
        runners: 4,
        bat_delay: Duration::from_millis(bat_delay),
        bat_cache: 0,
        ..Options::default()
    };
    let engine = Engine::new(options, Box::new(|event| eprintln!("event: {event}")));
    let chain: Chain = Mutex::new(vec![first.clone()]);
    let mut model = vec![0; (disk * SECTOR) as usize];
    // Quiet snapshots: the file that was the top, and what the disk had.
    let mut quiet: Vec<(Arc<MemoryFile>, Vec<u8>)> = Vec::new();
    for (lanes, lives, snapshot) in rounds {
        let image = open(&engine, &chain.lock().expect("no panic"));
        image.make_writable().expect("the BAT is sound");
        let models: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0u64..)
                .zip(lanes)
                .map(|(lane, ops)| {
                    let (image, mut model) = (&image, model.clone());
                    scope.spawn(move || {
                        for op in ops.iter().filter(|op| !matches!(op, Op::Freeze)) {
                            apply(image, &mut model, lane, op, disk);
                        }
                        model
                    })
                })
                .collect();
            for what in lives {
                carry_out(&image, &chain, what);
            }
            threads.into_iter().map(|t| t.join().expect("no submitter panics")).collect()
        });
        for (lane, theirs) in (0u64..).zip(&models) {
            for (offset, len) in owned(lane, 0, disk, disk) {
                let range = offset as usize..(offset + len) as usize;
                model[range.clone()].copy_from_slice(&theirs[range]);
            }
        }
        model.resize(image.size() as usize, 0);
        disk = image.size() / SECTOR;
        check(&image, &model, 0, disk * SECTOR);
        let kept = |file: &Arc<MemoryFile>, chain: &Chain| {
            let chain = chain.lock().expect("no panic");
            chain[..chain.len() - 1].iter().any(|f| Arc::ptr_eq(f, file))
        };
        // A merge ends the snapshot that either of its files was.
        if lives.iter().any(|l| matches!(l, Live::Merge { .. })) {
            quiet.clear();
        }
        if *snapshot {
            let top = chain.lock().expect("no panic").last().expect("a top").clone();
            if carry_out(&image, &chain, &Live::Snapshot) {
                quiet.push((top, model.clone()));
            }
        }
        let top = chain.lock().expect("no panic").last().expect("a top").clone();
        let compact = matches!(level(&top).layout, Layout::Ploop(_)).then(|| image.compact(&Progress::new()));
        let compact = compact.transpose().expect("a compaction when all is quiet");
        check(&image, &model, 0, disk * SECTOR);
        image.close().expect("closes");
        if compact.is_some() {
            has_no_gaps(&top);
        }
        let files = chain.lock().expect("no panic").clone();
        files.iter().for_each(sound);
        for (top, content) in quiet.iter().filter(|(file, _)| kept(file, &chain)) {
            let depth = files.iter().position(|f| Arc::ptr_eq(f, top)).expect("kept") + 1;
            let snapshot = open(&engine, &files[..depth]);
            assert_eq!(snapshot.size(), content.len() as u64);
            check(&snapshot, content, 0, content.len() as u64);
            snapshot.close().expect("closes");
        }
    }
    let image = open(&engine, &chain.lock().expect("no panic"));
    check(&image, &model, 0, disk * SECTOR);
    image.close().expect("closes");
}

fn rounds() -> impl Strategy<Value = Vec<Round>> {
    let lanes = prop::collection::vec(prop::collection::vec(op(5001), 1..20), LANES as usize);
    prop::collection::vec((lanes, prop::collection::vec(live(), 0..5), any::<bool>()), 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("PLOOPFS_MODEL_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(40),
        max_shrink_iters: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn snapshots_merges_and_growing_under_load_agree_with_a_plain_vector(
        v2 in any::<bool>(),
        cluster in prop::sample::select(vec![1u32, 8, 63, 64, 128, 504, 2048]),
        late in 0..3u64,
        delay in prop::sample::select(vec![0u64, 3, 1000]),
        rounds in rounds(),
    ) {
        let version = if v2 { Version::V2 } else { Version::V1 };
        run(&empty_image(version, cluster, 5001, late), delay, &rounds, 5001);
    }

    #[test]
    fn a_raw_base_under_deltas_agrees_with_a_plain_vector(
        sectors in prop::sample::select(vec![5001u64, 64 * 80, 2048 * 3]),
        delay in prop::sample::select(vec![0u64, 1000]),
        rounds in rounds(),
    ) {
        let file = Arc::new(MemoryFile::new());
        file.set_len(sectors * SECTOR).expect("memory grows");
        run(&file, delay, &rounds, sectors.min(5001));
    }
}
