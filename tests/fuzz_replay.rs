//! What the fuzz targets have met, again on every run: each file of `fuzz/corpus`, and a few hundred inputs near it.

mod fuzz_bodies;

use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use fuzz_bodies::{Body, TARGETS};

/// The committed inputs of a target, by name.
fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("a readable folder").path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), std::fs::read(path).expect("a readable file"))).collect()
}

fn run(body: Body, what: &str, input: &[u8]) {
    if catch_unwind(|| body(input)).is_err() {
        let kept = std::env::temp_dir().join("ploopfs-fuzz-finding");
        let said =
            std::fs::write(&kept, input).map_or_else(|e| e.to_string(), |()| kept.display().to_string());
        panic!("{what} fails (the message is above); the input: {said}");
    }
}

fn replay(target: &str) {
    let body = TARGETS.iter().find(|(name, _)| *name == target).expect("a target").1;
    let inputs = corpus(target);
    assert!(!inputs.is_empty(), "{target} has no corpus");
    for (path, input) in &inputs {
        run(body, &path.display().to_string(), input);
    }
    // xorshift: the same neighbours on every run, unless another seed is asked for.
    let seed = std::env::var("PLOOPFS_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(1_u64);
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut below = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize % n.max(1)
    };
    let long = std::env::var("PLOOPFS_LONG").is_ok_and(|n| n != "0");
    let count = if long { 20_000 } else { 300 };
    for n in 0..count {
        let (path, input) = &inputs[below(inputs.len())];
        let mut near = input.clone();
        for _ in 0..1 + below(4) {
            let at = below(near.len().min(512));
            match below(4) {
                0 if !near.is_empty() => near[at] = below(256) as u8,
                1 if !near.is_empty() => near[at] ^= 1 << below(8),
                2 => near.truncate(at),
                _ => near.insert(at.min(near.len()), [0, 1, 0x7f, 0xff][below(4)]),
            }
        }
        run(body, &format!("{} changed, number {n}", path.display()), &near);
    }
    println!("REPLAYED {target}: {} inputs, {count} near them", inputs.len());
}

#[test]
fn the_corpus_of_header_bat_finds_nothing() {
    replay("header_bat");
}

#[test]
fn the_corpus_of_extension_finds_nothing() {
    replay("extension");
}

#[test]
fn the_corpus_of_descriptor_finds_nothing() {
    replay("descriptor");
}

#[test]
fn the_corpus_of_control_protocol_finds_nothing() {
    replay("control_protocol");
}

#[test]
fn the_corpus_of_operations_finds_nothing() {
    replay("operations");
}

#[test]
fn the_corpus_of_uring_wire_finds_nothing() {
    replay("uring_wire");
}

#[test]
fn the_corpus_of_ledger_finds_nothing() {
    replay("ledger");
}
