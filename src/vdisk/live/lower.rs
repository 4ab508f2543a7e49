//! A merge into a raw file. It has no map, so that it cannot take the place of the delta that stands on it (`merge` has
//! that way); it takes the delta's data instead, each cluster at its place on the disk. What is copied is what has changed
//! since the snapshot, and a disk without a snapshot is a raw file again. ploop and QEMU go the same way.
//!
//! 0. the snapshot that the raw file was is marked deleted, durably (`work`);
//! 1. the delta is looked through: a damaged entry is found before anything changes;
//! 2. the raw file gets the length of the delta's disk, and each cluster that the delta maps; what is a hole there becomes
//!    one;
//! 3. the raw file is synced, its length included;
//! 4. the descriptor gives the raw file to the delta's snapshot, or to the live disk: the point of no return;
//! 5. the delta's file goes, last (R8).
//!
//! Until 4 the delta hides whatever 2 has changed: the disk, and each snapshot that is left, reads the same whatever a
//! power cut keeps of it. So 2 may end at any byte, be begun anew, or be followed by a merge the other way, which copies
//! what the delta does not map. 2 before 0: a snapshot would show what was written after it. 4 before 3: a power cut could
//! leave the disk without what only the delta had. 5 before 4: it could bring back a descriptor that names the delta.
//!
//! An attempt behind a failed sync or a crash copies everything again: what an earlier one wrote is not trusted (R7).
//!
//! The delta must not change between 2 and 4. One below the top is frozen anyway, and its readers go on. A live
//! top is merged so only while its disk is closed and cannot be opened: see [`finish`].

use crate::error::{Error, Kind, Result};
use crate::format::descriptor::{Guid, Marker};
use crate::format::header::{CLOSED_V21, Geometry, HEADER_BYTES, Header, SECTOR};
use crate::image::layers::Layers;
use crate::io::file::{HostFile, read_full, write_full, write_zeroes};
use crate::progress::Progress;
use crate::rules::{Rule, broken};
use crate::vdisk::live::Work;
use crate::vdisk::live::merge::{pieces, read_bat};
use crate::vdisk::{Layout, Level, scan};

/// Bytes copied in one go.
const COPY: usize = 1 << 20;
/// Bytes after which the raw file is synced: as much as an image may have unsynced.
const UNSYNCED: u64 = 256 << 20;

/// The deleted raw base and the live top on it, where their merge is one that a closed disk is waited for.
pub fn waiting(layers: &Layers) -> Result<Option<(Guid, Guid)>> {
    let descriptor = layers.store().descriptor().clone();
    for parent in descriptor.unfinished() {
        if descriptor.children(parent) == [descriptor.top] && goes_down(layers, parent, descriptor.top)? {
            return Ok(Some((parent, descriptor.top)));
        }
    }
    Ok(None)
}

/// True when `work` comes to such a merge, or has left one: its disk had better be closed.
pub fn wants_closed(layers: &Layers, work: &Work) -> Result<bool> {
    if let Work::Delete { snapshot } | Work::Merge { snapshot } = work {
        let (descriptor, guid) = {
            let store = layers.store();
            (store.descriptor().clone(), store.find_snapshot(snapshot).ok())
        };
        if let Some(guid) = guid.filter(|guid| descriptor.children(*guid) == [descriptor.top]) {
            return goes_down(layers, guid, descriptor.top);
        }
    }
    Ok(waiting(layers)?.is_some())
}

/// Carries that merge out. The disk is closed, and is not opened meanwhile. False: `goes_on` said no, and it is not merged;
/// what was done until then counts for nothing, and harms nothing. Or it is to go the other way by now.
pub fn finish(layers: &Layers, progress: &Progress, goes_on: &dyn Fn() -> bool) -> Result<bool> {
    let _alone = layers.begin_operation()?;
    let Some((parent, child)) = waiting(layers)? else {
        // What was written since may have made the other way the shorter one.
        return Ok(layers.store().descriptor().unfinished().is_empty());
    };
    // Else a power cut could bring back a snapshot whose file is changed here.
    layers.store().redo_unsynced()?;
    layers.claim(&[parent, child])?;
    let merged = merge(layers, parent, child, progress, goes_on);
    layers.end_changing();
    let Some(gone) = merged? else { return Ok(false) };
    layers.remove(&gone)?;
    Ok(true)
}

/// True when `child` is to be merged into the raw base `parent`, and not the other way round.
pub(super) fn goes_down(layers: &Layers, parent: Guid, child: Guid) -> Result<bool> {
    let descriptor = layers.store().descriptor().clone();
    // The other markers are ploop's, and speak of a base with a map.
    let sound = |guid| descriptor.shot(guid).is_some_and(|s| s.marker.is_none_or(|m| m == Marker::Temporary));
    let is_base = descriptor.shot(parent).is_some_and(|shot| shot.parent == Guid::NONE);
    if !is_base || ![parent, child].into_iter().all(sound) {
        return Ok(false);
    }
    let (base, delta) = (layers.level_of(parent)?, layers.level_of(child)?);
    // Another descriptor may have the file (R9); then the copy is made.
    Ok(base.geometry().is_none() && layers.may_change(parent)? && is_cheaper(&base, &delta)?)
}

/// True when a raw file can take what the delta on it holds, and that copies no more than the other way does. Reads the
/// delta's BAT, and looks where the raw file has holes.
pub fn is_cheaper(base: &Level, delta: &Level) -> Result<bool> {
    let Layout::Ploop(header) = &delta.layout else { return Ok(false) };
    let cannot = |e: std::io::Error| Error::io(&e, &base.path, "cannot look at it");
    let (status, of) = (base.file.status().map_err(cannot)?, header.geometry());
    // Shared with a clone; longer than its disk; or a raw file would forget what has changed since the last backup.
    if base.geometry().is_some() || status.links > 1 || status.len > of.disk || is_tracked(header) {
        return Ok(false);
    }
    let down = bytes_down(delta, &of)?;
    let mut up = 0;
    let mut data = Data { file: &*base.file, found: (0, 0) };
    for piece in pieces(&of, None) {
        if up >= down {
            break;
        }
        let first = (piece.start - HEADER_BYTES) / 4;
        for (cluster, entry) in (first..).zip(read_bat(delta, &of, &piece)?) {
            let (from, to) = (cluster * of.cluster, ((cluster + 1) * of.cluster).min(status.len));
            if entry == 0 && from < to && data.touches(from, to).map_err(cannot)? {
                up += of.cluster;
            }
            if up >= down {
                break;
            }
        }
    }
    Ok(down <= up)
}

/// It was closed with a bitmap of what has changed, which can be trusted.
fn is_tracked(header: &Header) -> bool {
    header.in_use == CLOSED_V21 && header.extension != 0
}

/// What a merge downwards copies at most.
fn bytes_down(delta: &Level, of: &Geometry) -> Result<u64> {
    let mut mapped = 0;
    for piece in pieces(of, None) {
        mapped += read_bat(delta, of, &piece)?.iter().filter(|entry| **entry != 0).count() as u64;
    }
    let status = delta.file.status().map_err(|e| Error::io(&e, &delta.path, "cannot look at it"))?;
    Ok((mapped * of.cluster).min(status.blocks * SECTOR))
}

/// Where a file has data, asked from its begin to its end.
struct Data<'a> {
    file: &'a dyn HostFile,
    /// The last piece that was found.
    found: (u64, u64),
}

impl Data<'_> {
    /// True when there is data in `[from, to)`. Never asked for less than before.
    fn touches(&mut self, from: u64, to: u64) -> std::io::Result<bool> {
        if self.found.1 <= from {
            self.found = match self.file.seek_data(from)? {
                Some(data) => (data, self.file.seek_hole(data)?.max(data + 1)),
                None => (u64::MAX, u64::MAX),
            };
        }
        Ok(self.found.0 < to)
    }
}

/// Steps 1 to 4. Returns the delta's file, which is to be removed; None: `goes_on` said no, and nothing has happened that
/// shows.
pub(super) fn merge(
    layers: &Layers,
    parent: Guid,
    child: Guid,
    progress: &Progress,
    goes_on: &dyn Fn() -> bool,
) -> Result<Option<String>> {
    let (base, delta) = (layers.level_of(parent)?, layers.level_of(child)?);
    let Some(of) = delta.geometry() else {
        return Err(Error::at(Kind::Damaged, &delta.path, "is raw, and lies on a raw file"));
    };
    scan::scan(&delta, &of)?; // 1
    progress.set_total(bytes_down(&delta, &of)?);
    if !(Copy { base: &base, delta: &delta, of, progress, goes_on }).all()? {
        return Ok(None);
    } // 2
    let cannot = |e: std::io::Error| Error::io(&e, &base.path, "fsync failed; the merge cannot go on");
    if !broken(Rule::R3) {
        base.file.sync_all().map_err(cannot)?; // 3
    }
    let mut store = layers.store();
    if child != store.descriptor().top {
        // It is as long by now, whatever comes of 4.
        store.set_length(child, of.disk)?;
    }
    let mut next = store.descriptor().clone();
    let survivor = next.delta(parent).map(|delta| delta.file.clone()).unwrap_or_default();
    let gone = next
        .remove_merged(parent, child, &survivor)
        .map_err(|bad| Error::at(Kind::Damaged, store.path(), bad.to_string()))?;
    store.replace(next)?.durable()?; // 4
    Ok(Some(gone))
}

/// Step 2.
struct Copy<'a> {
    base: &'a Level,
    delta: &'a Level,
    of: Geometry,
    progress: &'a Progress,
    goes_on: &'a dyn Fn() -> bool,
}

impl Copy<'_> {
    /// False: it was broken off.
    fn all(&self) -> Result<bool> {
        let (base, of) = (self.base, &self.of);
        let cannot = |e: std::io::Error| Error::io(&e, &base.path, "cannot make it as long as the disk");
        if base.file.len().map_err(cannot)? < of.disk {
            base.file.set_len(of.disk).map_err(cannot)?;
        }
        let (mut buf, mut unsynced) = (vec![0; COPY], 0);
        for piece in pieces(of, None) {
            let first = (piece.start - HEADER_BYTES) / 4;
            for (cluster, entry) in (first..).zip(read_bat(self.delta, of, &piece)?) {
                // Entries behind the disk's end hold nothing of it.
                let len = of.cluster.min(of.disk.saturating_sub(cluster * of.cluster));
                if entry == 0 || len == 0 {
                    continue;
                }
                self.progress.check()?;
                if !(self.goes_on)() {
                    return Ok(false);
                }
                let at = of.position(entry).ok_or_else(|| self.damaged("an entry has changed"))?;
                unsynced += self.cluster(at, cluster * of.cluster, len, &mut buf)?;
                if unsynced >= UNSYNCED {
                    base.file.sync_data().map_err(|e| Error::io(&e, &base.path, "fdatasync failed"))?;
                    unsynced = 0;
                }
            }
        }
        Ok(true)
    }

    /// Copies `len` bytes at `at` of the delta to `to` of the raw file; how many of them were data.
    fn cluster(&self, at: u64, to: u64, len: u64, buf: &mut [u8]) -> Result<u64> {
        let reading = |e: std::io::Error| Error::io(&e, &self.delta.path, format!("cannot read byte {at}"));
        let writing = |e: std::io::Error| Error::io(&e, &self.base.path, format!("cannot write byte {to}"));
        let (mut from, end, mut copied) = (at, at + len, 0);
        while from < end {
            // The disk's last cluster may end behind the file: a hole like any other.
            let data = self.delta.file.seek_data(from).map_err(reading)?.map_or(end, |data| data.min(end));
            if data > from {
                zero(&*self.base.file, to + (from - at), data - from).map_err(writing)?;
                from = data;
                continue;
            }
            let hole = self.delta.file.seek_hole(from).map_err(reading)?.clamp(from + 1, end);
            while from < hole {
                let want = (hole - from).min(buf.len() as u64) as usize;
                if read_full(&*self.delta.file, &mut buf[..want], from).map_err(reading)? < want {
                    return Err(self.damaged("became shorter while it was merged"));
                }
                write_full(&*self.base.file, &buf[..want], to + (from - at)).map_err(writing)?;
                from += want as u64;
                copied += want as u64;
                self.progress.add_while(want as u64, self.goes_on);
            }
        }
        Ok(copied)
    }

    fn damaged(&self, why: &str) -> Error {
        Error::at(Kind::Damaged, &self.delta.path, why)
    }
}

/// Makes a range read as zero.
fn zero(file: &dyn HostFile, at: u64, len: u64) -> std::io::Result<()> {
    match file.punch(at, len) {
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => write_zeroes(file, at, len),
        punched => punched,
    }
}

#[cfg(test)]
mod tests;
