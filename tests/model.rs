//! A live image against a plain vector: random operations from concurrent submitters, random reopening.

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::lanes::{LANES, Op, SECTOR, apply, check, empty_image, op, owned};
use ploopfs::format::header::{FLAG_EMPTY, Header, Version};
use ploopfs::io::file::HostFile;
use ploopfs::io::memory::MemoryFile;
use ploopfs::vdisk::{Engine, Image, Layout, Level, Options};
use proptest::prelude::*;

fn open(engine: &Arc<Engine>, file: &Arc<MemoryFile>) -> Arc<Image> {
    let mut bytes = [0; 64];
    file.read_at(&mut bytes, 0).expect("memory reads");
    let header = Header::parse(&bytes).expect("the header is well-formed");
    assert!(!header.is_in_use(), "a clean close clears the mark");
    let file: Arc<dyn HostFile> = file.clone();
    let level = Level { file, path: PathBuf::from("memory"), layout: Layout::Ploop(header) };
    let image = Image::open(engine, "memory", vec![level]).expect("opens");
    image.make_writable().expect("the BAT is sound");
    image
}

fn engine(bat_delay: u64) -> Arc<Engine> {
    let options = Options {
        runners: 4,
        bat_delay: Duration::from_millis(bat_delay),
        // The smallest cache there is: pages are evicted and loaded all the time.
        bat_cache: 0,
        ..Options::default()
    };
    Engine::new(options, Box::new(|event| eprintln!("event: {event}")))
}

/// What `check` would find on the closed file: entries inside it, none twice; and no leak, since nothing crashed.
fn sound(file: &MemoryFile) {
    let bytes = file.to_bytes();
    let header = Header::parse(&bytes[..64]).expect("header");
    let geometry = header.geometry();
    let mut seen = std::collections::BTreeSet::new();
    for i in 0..header.entries as usize {
        let entry = u32::from_le_bytes(bytes[64 + 4 * i..68 + 4 * i].try_into().expect("four bytes"));
        if entry != 0 {
            let position = geometry.position(entry).expect("on the grid");
            assert!(position + geometry.cluster <= bytes.len() as u64, "entry {i} is inside the file");
            assert!(seen.insert(position), "entry {i} is not used twice");
        }
    }
    let end = seen.last().map_or(geometry.first, |last| last + geometry.cluster);
    assert_eq!(bytes.len() as u64, end, "the file ends behind the last cluster in use");
    assert_eq!(header.flags & FLAG_EMPTY != 0, seen.is_empty(), "Empty says whether the BAT is empty");
}

fn run(version: Version, cluster_sectors: u32, late: u64, delay: u64, rounds: &[Vec<Vec<Op>>], disk: u64) {
    let file = empty_image(version, cluster_sectors, disk, late);
    let engine = engine(delay);
    let mut model = vec![0; (disk * SECTOR) as usize];
    for round in rounds {
        let image = open(&engine, &file);
        let models: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0u64..)
                .zip(round)
                .map(|(lane, ops)| {
                    let (image, mut model) = (&image, model.clone());
                    scope.spawn(move || {
                        for op in ops {
                            apply(image, &mut model, lane, op, disk);
                        }
                        model
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().expect("no submitter panics")).collect()
        });
        for (lane, theirs) in (0u64..).zip(&models) {
            for (offset, len) in owned(lane, 0, disk, disk) {
                let range = offset as usize..(offset + len) as usize;
                model[range.clone()].copy_from_slice(&theirs[range]);
            }
        }
        check(&image, &model, 0, disk * SECTOR);
        image.close().expect("closes");
        sound(&file);
    }
    let image = open(&engine, &file);
    check(&image, &model, 0, disk * SECTOR);
    // 16 pages is the least a cache holds; every loader may be one over while it evicts.
    assert!(engine.cached_pages() <= 16 + 4 + LANES, "{} pages are cached", engine.cached_pages());
    image.close().expect("closes");
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("PLOOPFS_MODEL_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(40),
        max_shrink_iters: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn concurrent_submitters_agree_with_a_plain_vector(
        v2 in any::<bool>(),
        cluster in prop::sample::select(vec![63u32, 64, 128, 504, 2048]),
        late in 0..3u64,
        delay in prop::sample::select(vec![0u64, 3, 1000]),
        // Not a multiple of any cluster: the last one is partial.
        rounds in prop::collection::vec(
            prop::collection::vec(prop::collection::vec(op(5001), 1..25), LANES as usize), 1..4),
    ) {
        let version = if v2 { Version::V2 } else { Version::V1 };
        run(version, cluster, late, delay, &rounds, 5001);
    }

    /// Clusters of a sector or two: 40 BAT pages, of which 16 fit the cache, and data right behind the BAT's end.
    #[test]
    fn pages_come_and_go_under_load(
        v2 in any::<bool>(),
        cluster in 1u32..3,
        delay in prop::sample::select(vec![0u64, 1000]),
        rounds in prop::collection::vec(
            prop::collection::vec(prop::collection::vec(op(40_001), 1..25), LANES as usize), 1..3),
    ) {
        let version = if v2 { Version::V2 } else { Version::V1 };
        run(version, cluster, 0, delay, &rounds, 40_001);
    }
}
