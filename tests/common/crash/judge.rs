//! What must hold of every state that a power cut leaves.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use ploopfs::format::header::{CLOSED_V21, Header};
use ploopfs::io::memory::MemoryFile;
use ploopfs::vdisk::{Engine, Image, Options};

use super::power::{SECTOR, read_stamp};
use super::world::{Allowed, World, level};

/// An engine for histories and judges: `delay` is the BAT's, in milliseconds; `extend` the extension step in bytes.
pub fn engine(delay: u64, extend: u64) -> Arc<Engine> {
    let bat_delay = Duration::from_millis(delay);
    let options = Options { runners: 4, bat_delay, extend, low_water: 0, ..Options::default() };
    Engine::new(options, Box::new(|_| ()))
}

/// Judges what a cut of `world` left of its files: the live disk, whose values are returned, and every snapshot.
pub fn judge_world(engine: &Arc<Engine>, world: &World, left: &[Vec<u8>]) -> Result<Vec<u32>, String> {
    let chain: Vec<&[u8]> = world.chain.iter().map(|n| &*left[*n]).collect();
    let raw = world.raw.is_some() && world.raw == world.chain.first().copied();
    let found = judge(engine, &chain, raw, &world.allowed)
        .map_err(|e| format!("live, chain {:?}: {e}", world.chain))?;
    for (top, then) in &world.snapshots {
        let Some(at) = world.chain.iter().position(|n| n == top) else { continue };
        judge(engine, &chain[..=at], raw, then)
            .map_err(|e| format!("snapshot {top} of chain {:?}: {e}", world.chain))?;
    }
    Ok(found)
}

/// The values of the disk that `files`, base first, make; or what is wrong with it. `raw`: the base has no header.
fn judge(engine: &Arc<Engine>, files: &[&[u8]], raw: bool, allowed: &Allowed) -> Result<Vec<u32>, String> {
    let deltas = usize::from(raw);
    for (i, bytes) in files.iter().enumerate().skip(deltas) {
        sound(bytes).map_err(|e| format!("level {i}: {e}"))?;
    }
    let kept: Vec<_> = files.iter().map(|bytes| Arc::new(MemoryFile::from_bytes(bytes))).collect();
    let levels = kept.iter().enumerate().map(|(i, file)| level(file.clone(), "state", i < deltas));
    let levels = levels.collect::<Result<Vec<_>, String>>()?;
    let image = Image::open(engine, "state", levels).map_err(|e| format!("does not open: {e}"))?;
    image.make_writable().map_err(|e| format!("cannot be written: {e}"))?;
    // What a crash left below the top is closed by the first writable open.
    for file in kept[..kept.len() - 1].iter().skip(deltas) {
        if header(&file.to_bytes())?.is_in_use() {
            return Err("a lower level still says in use".into());
        }
    }
    // A cut around a grow may leave the old size or the new one.
    let size = (image.size() as usize / SECTOR).min(allowed.len());
    let data = read(&image, size * SECTOR).map_err(|e| format!("cannot be read: {e}"))?;
    let mut values = Vec::with_capacity(size);
    for (sector, allowed) in allowed.iter().enumerate().take(size) {
        match read_stamp(&data[sector * SECTOR..(sector + 1) * SECTOR]) {
            Some(value) if allowed.contains(&value) => values.push(value),
            found => return Err(format!("sector {sector} holds {found:?}, allowed {allowed:?}")),
        }
    }
    Ok(values)
}

/// The first `len` bytes of the disk; once the BAT is loaded, on this thread where that can be.
fn read(image: &Arc<Image>, len: usize) -> ploopfs::Result<Vec<u8>> {
    image.read_at(0, len.min(SECTOR))?;
    let mut data = vec![0; len];
    match image.try_read(0, &mut data) {
        Some(Ok(n)) if n == len => Ok(data),
        _ => image.read_at(0, len).map(|bytes| bytes.to_vec()),
    }
}

fn header(bytes: &[u8]) -> Result<Header, String> {
    Header::parse(bytes.get(..64).unwrap_or(bytes)).map_err(|e| e.to_string())
}

/// Nothing is worse than a leak: every entry is on the grid and inside the file (R2), and no file cluster has two. One
/// that says it was closed cleanly has neither leaks behind its last cluster nor a tail (R1), but for a format extension.
pub fn sound(bytes: &[u8]) -> Result<(), String> {
    let header = header(bytes)?;
    let geometry = header.geometry();
    let mut used = BTreeSet::new();
    for i in 0..header.entries as usize {
        let entry = bytes.get(64 + 4 * i..68 + 4 * i).ok_or("the file ends inside its BAT")?;
        let entry = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
        if entry == 0 {
            continue;
        }
        let position = geometry.position(entry).ok_or_else(|| format!("entry {i} is off the grid"))?;
        if position + geometry.cluster > bytes.len() as u64 {
            return Err(format!("entry {i} names byte {position}, the file ends at {}", bytes.len()));
        }
        if !used.insert(position) {
            return Err(format!("entry {i} names byte {position}, as another does"));
        }
    }
    let end = used.last().map_or(geometry.first, |last| last + geometry.cluster);
    let end = match header.extension * SECTOR as u64 {
        at if header.in_use == CLOSED_V21 && at >= end => at + geometry.cluster,
        _ => end,
    };
    if header.is_in_use() || bytes.len() as u64 == end {
        return Ok(());
    }
    Err(format!("not in use, but {} bytes long instead of {end}", bytes.len()))
}

/// Every sector of the disk holds what `allowed` says of it.
pub fn values(image: &Arc<Image>, allowed: impl Fn(usize, u32) -> bool) -> Result<(), String> {
    let data = image.read_at(0, image.size() as usize).map_err(|e| format!("cannot be read: {e}"))?;
    for (sector, bytes) in data.chunks(SECTOR).enumerate() {
        if !read_stamp(bytes).is_some_and(|value| allowed(sector, value)) {
            return Err(format!("sector {sector} holds {:?}", read_stamp(bytes)));
        }
    }
    Ok(())
}
