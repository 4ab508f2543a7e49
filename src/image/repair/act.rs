//! Carrying a plan out. See [`repair`](super::repair) for the order and its reasons.

use std::path::Path;

use super::lost::LostFile;
use super::plan::{Double, RepairPlan};
use crate::error::{Error, Kind, Result};
use crate::format::header::{CLOSED, FLAG_EMPTY, Geometry, HEADER_BYTES, Header, IN_USE};
use crate::io::file::{HostFile, read_full, write_full};
use crate::io::share::clone_range;

/// So much is kept beside the image before its place is given back, and then the next: the space that a repair needs
/// on the way.
const BATCH: u64 = 64 << 20;
/// Copied at a time.
const PIECE: u64 = 1 << 20;

/// The file, and how messages name it.
#[derive(Clone, Copy, Debug)]
pub(super) struct RepairTarget<'a> {
    pub file: &'a dyn HostFile,
    pub path: &'a Path,
}

impl RepairTarget<'_> {
    fn io(&self, doing: &'static str) -> impl Fn(std::io::Error) -> Error {
        move |e| Error::io(&e, self.path, doing)
    }
}

/// Steps 1 to 7 of a repair.
pub(super) fn carry_out(plan: &RepairPlan, image: &RepairTarget<'_>, lost: &mut LostFile<'_>) -> Result<()> {
    let geometry = plan.header.geometry();
    if plan.keep_first {
        keep(plan, image, lost, false)?; // 2, but for the punches
    }
    mark(&plan.header, image)?; // 1
    if plan.doubtful {
        keep(plan, image, lost, true)?; // 2
    }
    let cleared: Vec<(u64, u32)> = plan.wrong.iter().map(|wrong| (wrong.cluster, 0)).collect();
    write_entries(image, &cleared)?; // 3
    if plan.len != plan.good_len() {
        image.file.set_len(plan.good_len()).map_err(image.io("cannot set the file's length"))?; // 4
    }
    if !plan.doubles.is_empty() {
        let entries = copy(plan, &geometry, image)?; // 5
        write_entries(image, &entries)?; // 6
    }
    if !plan.doubtful {
        for (from, to, _) in &plan.leaks {
            punch(image, geometry.cluster_position(*from), geometry.cluster_position(*to))?; // 7
        }
    }
    image.file.sync_all().map_err(image.io("cannot sync"))
}

/// Step 1.
fn mark(header: &Header, image: &RepairTarget<'_>) -> Result<()> {
    let marked = Header { in_use: IN_USE, ..header.marked() };
    write_header(&Header { extension: header.extension, ..marked }, image)
}

fn write_header(header: &Header, image: &RepairTarget<'_>) -> Result<()> {
    let mut now = [0; HEADER_BYTES as usize];
    let got = read_full(image.file, &mut now, 0).map_err(image.io("cannot read the header"))?;
    if got < now.len() || now != header.encode() {
        write_full(image.file, &header.encode(), 0).map_err(image.io("cannot write the header"))?;
    }
    // Also when it was there: a mark that is only in the page cache is none.
    image.file.sync_data().map_err(image.io("cannot sync the header"))
}

/// Step 2: every run of clusters that nothing refers to, and the tail. `free`: gives them back as well; what was kept in
/// an earlier call is not kept twice.
fn keep(plan: &RepairPlan, image: &RepairTarget<'_>, lost: &mut LostFile<'_>, free: bool) -> Result<()> {
    let geometry = plan.header.geometry();
    let mut waiting: Vec<(u64, u64)> = Vec::new();
    let mut kept = 0;
    let inside = plan.leaks.iter().map(|(from, to, _)| (*from, *to));
    let inside = inside.map(|(from, to)| (geometry.cluster_position(from), geometry.cluster_position(to)));
    for (from, to) in inside.chain([(plan.good_len(), plan.len)]) {
        let mut at = from;
        while at < to {
            let end = (at + BATCH).min(to);
            if !(free && plan.keep_first) {
                kept += lost.keep(at, end)?;
            }
            waiting.push((at, end));
            at = end;
            if free && kept >= BATCH {
                lost.sync()?;
                waiting.drain(..).try_for_each(|(from, to)| punch(image, from, to))?;
                kept = 0;
            }
        }
    }
    lost.sync()?;
    if !free {
        return Ok(());
    }
    waiting.into_iter().try_for_each(|(from, to)| punch(image, from, to))
}

/// Gives space back. A host that cannot loses it until the image writes there: nothing is wrong with the image.
fn punch(image: &RepairTarget<'_>, from: u64, to: u64) -> Result<()> {
    match image.file.punch(from, to.saturating_sub(from)) {
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
        other => other.map_err(image.io("cannot give back space")),
    }
}

/// Steps 3 and 6: entries, side by side in one write, and durable.
fn write_entries(image: &RepairTarget<'_>, entries: &[(u64, u32)]) -> Result<()> {
    let mut sorted = entries.to_vec();
    sorted.sort_unstable();
    for run in sorted.chunk_by(|a, b| a.0 + 1 == b.0) {
        let bytes: Vec<u8> = run.iter().flat_map(|(_, entry)| entry.to_le_bytes()).collect();
        write_full(image.file, &bytes, HEADER_BYTES + 4 * run[0].0)
            .map_err(image.io("cannot write the BAT"))?;
    }
    if sorted.is_empty() {
        return Ok(());
    }
    image.file.sync_data().map_err(image.io("cannot sync the BAT"))
}

/// Step 5: a copy for each second owner, behind the last cluster in use, durable. Returns the entries that name them.
fn copy(plan: &RepairPlan, geometry: &Geometry, image: &RepairTarget<'_>) -> Result<Vec<(u64, u32)>> {
    let end = geometry.cluster_position(plan.end + plan.doubles.len() as u64);
    let copied = (|| {
        image.file.set_len(end)?;
        for (i, Double { shared, .. }) in plan.doubles.iter().enumerate() {
            let to = geometry.cluster_position(plan.end + i as u64);
            copy_cluster(image.file, geometry.cluster_position(*shared), to, geometry.cluster)?;
        }
        image.file.sync_data()
    })();
    if let Err(e) = copied {
        // Best effort: what no entry names yet is a leak.
        let _ = image.file.set_len(plan.good_len());
        let doing = "cannot copy the clusters that are used twice (the rest is repaired; make room, and repair again)";
        return Err(Error::io(&e, image.path, doing));
    }
    let entry = |(i, double): (usize, &Double)| {
        let entry = geometry.entry(geometry.cluster_position(plan.end + i as u64));
        let why = "the format has no number for another cluster";
        Ok((double.cluster, entry.ok_or_else(|| Error::at(Kind::NoSpace, image.path, why))?))
    };
    plan.doubles.iter().enumerate().map(entry).collect()
}

fn copy_cluster(file: &dyn HostFile, from: u64, to: u64, len: u64) -> std::io::Result<()> {
    if clone_range(file, from, file, to, len)? {
        return Ok(());
    }
    let mut buffer = vec![0; PIECE.min(len) as usize];
    let mut done = 0;
    while done < len {
        let want = (len - done).min(PIECE) as usize;
        let got = read_full(file, &mut buffer[..want], from + done)?;
        // The new part of the file is zero.
        if buffer[..got].iter().any(|byte| *byte != 0) {
            write_full(file, &buffer[..got], to + done)?;
        }
        done += want as u64;
    }
    Ok(())
}

/// Step 8: the header as a clean close leaves it; as it was, where nothing that the guest sees was touched.
pub(super) fn close(header: &Header, empty: bool, as_it_was: bool, image: &RepairTarget<'_>) -> Result<()> {
    if as_it_was {
        return write_header(header, image);
    }
    let flags = if header.flags == u32::MAX { 0 } else { header.flags & !FLAG_EMPTY };
    let flags = if empty { flags | FLAG_EMPTY } else { flags };
    write_header(&Header { in_use: CLOSED, flags, ..*header }, image)
}
