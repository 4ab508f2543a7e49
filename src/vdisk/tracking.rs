//! Changed-block tracking of a live image: the dirty bitmap of the format extension (docs/format.md#format-extension)
//! is in memory while the image can be written, and in the file only while it is closed.
//!
//! A bitmap on disk may be trusted only as long as nothing has changed since it was written, whatever program reads it:
//! 1. it is read at the writable open, before the first change, from a file that says "closed as v2.1";
//! 2. the first change is preceded, durably, by a header that says "in use" and names no extension (`mark`);
//! 3. from then on each change sets its bits in memory, inside the gate, before it is made;
//! 4. at a clean close the bitmap is written behind the last cluster in use, and durable;
//! 5. then one sector says "closed as v2.1" and where the extension is (`mark`).
//!
//! 3 before 2 would leave a bitmap that a power cut makes untrue. 5 before 4 could name one that is not all there; what
//! the cut leaves of it has a checksum, its bits have none. After a crash between 2 and 5 there is no bitmap: the
//! tracking is lost, and everything counts as changed.

use super::changed::{Changed, MAX_BYTES};
use super::stack::Stack;
use super::{Image, Operating, Stage};
use crate::error::{Error, Kind, Result};
use crate::format::descriptor::Guid;
use crate::format::extension::{DirtyBitmap, TableEntry};
use crate::format::header::{CLOSED_V21, Header, SECTOR};
use crate::image::diff::ByteRange;
use crate::io::file::{HostFile, read_full, write_full};
use crate::sync::{Arc, lock};

/// Ranges in one answer: some MiB of JSON on the control socket, far below what it takes.
const MAX_RANGES: usize = 100_000;

/// Clusters up to ploop's largest: the extension takes a whole one, and its checksum is over all of it.
const MAX_CLUSTER: u64 = 64 << 20;

/// What has changed since the tracking began, or the first part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Names the moment since when; None: the disk is not tracked, and all of it counts as changed.
    pub uuid: Option<String>,
    /// Why it is not tracked.
    pub reason: Option<String>,
    /// Disk size in bytes.
    pub size: u64,
    /// Bytes of disk for each bit; 0 where it is not tracked.
    pub granularity: u64,
    /// Begin and length in bytes; ascending, none touching the next.
    pub ranges: Vec<ByteRange>,
    /// Where to go on, in bytes; None: these are all.
    pub next: Option<u64>,
}

impl Changes {
    /// Asks for part after part.
    pub fn whole(mut part: impl FnMut(u64) -> Result<Changes>) -> Result<Changes> {
        let mut all = part(0)?;
        while let Some(next) = all.next {
            let more = part(next)?;
            if more.uuid != all.uuid {
                // It ended meanwhile, or began anew: what was heard means nothing.
                all = part(0)?;
                continue;
            }
            for (begin, len) in more.ranges {
                match all.ranges.last_mut() {
                    Some((last, length)) if *last + *length == begin => *length += len,
                    _ => all.ranges.push((begin, len)),
                }
            }
            (all.next, all.size) = (more.next, more.size);
        }
        Ok(all)
    }

    /// Bytes in all ranges.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|(_, len)| len).sum()
    }
}

/// A uuid as QEMU prints it.
pub fn uuid_text(guid: Guid) -> String {
    guid.to_string().trim_matches(['{', '}']).to_owned()
}

impl Image {
    /// Begins to track changes: nothing has changed yet. `granularity` in bytes, a power of two; None: as fits. Returns
    /// the name of this moment. Blocks; not for runners or transport threads.
    pub fn start_tracking(self: &Arc<Self>, granularity: Option<u64>) -> Result<Guid> {
        let operating = self.begin_operation()?;
        let invalid = |why: String| Err(Error::at(Kind::Invalid, self.shown(), why));
        let disk = self.size();
        let granularity = granularity.unwrap_or_else(|| Changed::usual_granularity(disk));
        if self.stack().bat.is_none() {
            return Err(Error::at(Kind::Unsupported, self.path(), "a raw file has no place for a bitmap"));
        }
        if let Some(tracked) = &*self.operations.changed() {
            let why =
                format!("is tracked already, as {}; ploopfs cbt stop ends that", uuid_text(tracked.guid));
            return Err(Error::at(Kind::Exists, self.path(), why));
        }
        if !granularity.is_power_of_two() || granularity < SECTOR || granularity / SECTOR > 1 << 31 {
            return invalid(format!(
                "a granularity of {granularity} bytes; a power of two from 512 on is one"
            ));
        }
        let too_many =
            || invalid(format!("{granularity} bytes for each bit are too fine for this disk; take more"));
        if self.cluster > MAX_CLUSTER {
            return invalid("has clusters of more than 64 MiB, and cannot be tracked".into());
        }
        if !fits(disk, granularity) {
            return too_many();
        }
        let tracked = Changed::new(Guid::random(), disk, granularity);
        if extension(&tracked, self.cluster, Vec::new()).is_none() {
            return too_many();
        }
        self.mark_and_wait()?;
        // What was begun before is not tracked, and has ended when this returns.
        operating.sync_until_little()?;
        self.freeze();
        let guid = tracked.guid;
        operating.set_changed(Some(tracked));
        self.thaw();
        Ok(guid)
    }

    /// Ends the tracking. Blocks; not for runners or transport threads.
    pub fn stop_tracking(self: &Arc<Self>) -> Result<()> {
        let operating = self.begin_operation()?;
        if self.operations.changed().is_none() {
            return Err(Error::at(Kind::NotFound, self.path(), "is not tracked"));
        }
        self.mark_and_wait()?;
        operating.set_changed(None);
        Ok(())
    }

    /// What has changed, from byte `start` on. Everything that was answered before is in it. Blocks.
    pub fn changes(self: &Arc<Self>, start: u64) -> Changes {
        let (tracked, reason) = self.tracked_or_why();
        let size = self.size();
        let Some(tracked) = tracked else {
            let ranges = if start < size { vec![(start, size - start)] } else { Vec::new() };
            return Changes { reason, size, ranges, ..Changes::default() };
        };
        let (ranges, next) = tracked.ranges(start, MAX_RANGES);
        let (uuid, granularity) = (Some(uuid_text(tracked.guid)), tracked.granularity);
        Changes { uuid, reason: None, size: tracked.disk, granularity, ranges, next }
    }

    fn tracked_or_why(self: &Arc<Self>) -> (Option<Arc<Changed>>, Option<String>) {
        if let Some(tracked) = &*self.operations.changed() {
            return (Some(Arc::clone(tracked)), None);
        }
        let mut read = Ok(());
        // What makes the image writable reads the bitmap first; behind that the file's is not looked at again.
        if self.stage() == Stage::ReadOnly {
            let operating = self.wait_to_operate();
            if self.stage() == Stage::ReadOnly {
                read = operating.load_tracking(&self.stack());
            }
        }
        match &*self.operations.changed() {
            Some(tracked) => (Some(Arc::clone(tracked)), None),
            None => (None, Some(read.err().unwrap_or_else(|| self.why_not_tracked()))),
        }
    }

    fn why_not_tracked(&self) -> String {
        let Some(header) = *lock(&self.stack().state.header) else {
            return "a raw file cannot be tracked".into();
        };
        let stale = header.extension != 0;
        match self.stage() {
            Stage::Marked => {
                "no tracking was started, or it was lost when the image was not closed cleanly".into()
            }
            _ if header.is_in_use() => {
                "the image was not closed cleanly: if it was tracked, that is lost".into()
            }
            _ if stale && header.in_use != CLOSED_V21 => {
                "another program has changed the image: its tracking is lost".into()
            }
            _ if stale => "the bitmap in the file cannot be trusted".into(),
            _ => "no tracking was started, or it was lost when the image was not closed cleanly".into(),
        }
    }

    /// A part of the disk changes: before it does, inside the gate.
    pub(super) fn changes_at(&self, offset: u64, len: u64) {
        if let Some(changed) = &*self.operations.changed() {
            changed.set(offset, len);
        }
    }
}

impl Operating<'_> {
    /// Reads the bitmap of an image that was not changed since it was closed, if it has one. Err: why it cannot be
    /// used. Before the first change.
    pub(super) fn load_tracking(&self, stack: &Stack) -> std::result::Result<(), String> {
        let Some(header) = *lock(&stack.state.header) else { return Ok(()) };
        if header.in_use != CLOSED_V21 || header.extension == 0 || self.operations.changed().is_some() {
            return Ok(());
        }
        let changed = read(&*stack.top().file, &header)?;
        self.set_changed(Some(changed));
        Ok(())
    }

    /// The disk has `disk` bytes now. While frozen.
    pub(super) fn tracking_grows(&self, disk: u64) {
        let changed = self.operations.changed();
        let Some(old) = &*changed else { return };
        if fits(disk, old.granularity) {
            self.set_changed(Some(old.grown(disk)));
        } else {
            log::warn!(
                "{}: the disk is too large now for its changed-block bitmap, which is lost",
                self.name
            );
            self.set_changed(None);
        }
    }
}

/// The bits of such a disk are not too many to be held.
fn fits(disk: u64, granularity: u64) -> bool {
    Changed::bytes(disk, granularity) <= MAX_BYTES
}

/// Reads the bitmap of a file that was closed as v2.1.
fn read(file: &dyn HostFile, header: &Header) -> std::result::Result<Changed, String> {
    let geometry = header.geometry();
    let cluster = geometry.cluster;
    let io = |e: std::io::Error| format!("the changed-block bitmap cannot be read: {e}");
    let len = file.len().map_err(io)?;
    if cluster > MAX_CLUSTER {
        return Err("an extension of more than 64 MiB is not read".into());
    }
    // Whole clusters behind the BAT, inside the file: nothing of the size that a header claims is taken on trust.
    let position = |sector: u64| {
        let at = sector.checked_mul(SECTOR).filter(|at| *at >= geometry.first)?;
        at.checked_add(cluster).filter(|end| *end <= len).map(|_| at)
    };
    let mut bytes = vec![0; cluster as usize];
    let at = position(header.extension).ok_or("the format extension does not lie in the file")?;
    read_full(file, &mut bytes, at).map_err(io)?;
    let bitmap = DirtyBitmap::from_extension(&bytes, header.disk_sectors)?;
    let granularity = u64::from(bitmap.granularity) * SECTOR;
    if !fits(geometry.disk, granularity) {
        return Err(format!("a bitmap of {} bytes is too large", Changed::bytes(geometry.disk, granularity)));
    }
    let changed = Changed::new(Guid::from_bytes(bitmap.uuid), geometry.disk, granularity);
    let bits = Changed::bytes(geometry.disk, granularity);
    for (i, entry) in bitmap.table.iter().enumerate() {
        let begin = i as u64 * cluster;
        let bytes = &mut bytes[..(bits - begin).min(cluster) as usize];
        match entry {
            TableEntry::Clear => continue,
            TableEntry::Set => bytes.fill(u8::MAX),
            TableEntry::At(sector) => {
                let at = position(*sector).ok_or("a cluster of the bitmap does not lie in the file")?;
                read_full(file, bytes, at).map_err(io)?;
            }
        }
        changed.load(begin, bytes);
    }
    Ok(changed)
}

/// Writes the bitmap behind byte `end` of the top's file, which ends there: the clusters of bits that are neither clear
/// nor set, then the extension, in one cluster each. Not synced. Returns the extension's sector.
pub(super) fn write(changed: &Changed, stack: &Stack, end: u64) -> Result<u64> {
    let top = stack.top();
    let cluster = stack.geometry.cluster;
    let failed = |e: std::io::Error| Error::io(&e, &top.path, "cannot write the changed-block bitmap");
    let bits = Changed::bytes(changed.disk, changed.granularity);
    let mut table = Vec::new();
    let mut at = end;
    let mut begin = 0;
    let mut buffer = vec![0; bits.min(cluster) as usize];
    while begin < bits {
        let piece = &mut buffer[..(bits - begin).min(cluster) as usize];
        changed.store(begin, piece);
        let is_set = |(i, byte): (usize, &u8)| *byte == changed.full_byte(begin + i as u64);
        table.push(if piece.iter().all(|byte| *byte == 0) {
            TableEntry::Clear
        } else if piece.iter().enumerate().all(is_set) {
            TableEntry::Set
        } else {
            top.file.set_len(at + cluster).map_err(failed)?;
            write_full(&*top.file, piece, at).map_err(failed)?;
            at += cluster;
            TableEntry::At((at - cluster) / SECTOR)
        });
        begin += cluster;
    }
    let bytes = extension(changed, cluster, table).ok_or_else(|| {
        Error::at(Kind::Invalid, &top.path, "the changed-block bitmap has become too large")
    })?;
    top.file.set_len(at + cluster).map_err(failed)?;
    // The rest of the cluster is a hole of the file.
    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    write_full(&*top.file, &bytes[..used], at).map_err(failed)?;
    Ok(at / SECTOR)
}

/// The extension cluster; None where it is too small. An empty table stands for one that is all clear.
fn extension(changed: &Changed, cluster: u64, mut table: Vec<TableEntry>) -> Option<Vec<u8>> {
    let entries = DirtyBitmap::entries(changed.disk, changed.granularity, cluster);
    table.resize(usize::try_from(entries).ok()?, TableEntry::Clear);
    let granularity = u32::try_from(changed.granularity / SECTOR).ok()?;
    let (uuid, disk_sectors) = (changed.guid.to_bytes(), changed.disk / SECTOR);
    DirtyBitmap { uuid, disk_sectors, granularity, table }.to_extension(cluster)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_put_together_and_those_of_another_tracking_are_not() {
        let tracked = || Changes { size: 10 << 20, granularity: 65536, ..Changes::default() };
        let part = |uuid: &str, ranges: &[(u64, u64)], next| Changes {
            uuid: Some(uuid.into()),
            ranges: ranges.to_vec(),
            next,
            ..tracked()
        };
        let mut answers = vec![
            part("a", &[(0, 1)], Some(1)),
            part("b", &[(1, 1)], None),
            part("b", &[(0, 2), (4, 1)], Some(5)),
            part("b", &[(5, 1), (8, 1)], None),
        ]
        .into_iter();
        let mut starts = Vec::new();
        let all = Changes::whole(|start| {
            starts.push(start);
            Ok(answers.next().expect("no more is asked"))
        });
        assert_eq!(all.expect("all of them").ranges, [(0, 2), (4, 2), (8, 1)]);
        assert_eq!(starts, [0, 1, 0, 5]);
    }
}
