//! Changes that are tracked: what a bitmap that is left on disk must say.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ploopfs::io::memory::MemoryFile;
use ploopfs::vdisk::tracking::Changes;
use ploopfs::vdisk::{Engine, Image};

use super::power::SECTOR;
use super::world::{Allowed, World, level};

/// States that were judged with a bitmap that is trusted.
pub static TRUSTED: AtomicU64 = AtomicU64::new(0);
/// States in which the tracking was lost.
pub static LOST: AtomicU64 = AtomicU64::new(0);

/// The moment since when changes are tracked.
#[derive(Clone, Default)]
pub struct Since {
    /// Its name; None: they are not tracked.
    uuid: Option<String>,
    /// What every sector held then.
    then: Vec<u32>,
}

impl Since {
    /// An open, writable image must be tracked since the same moment; or it is from now on.
    pub fn begin(&mut self, image: &Arc<Image>, allowed: &Allowed) -> Result<(), String> {
        let changes = image.changes(0);
        if changes.uuid != self.uuid {
            return Err(format!("tracked since {:?} instead of {:?}", changes.uuid, self.uuid));
        }
        if self.uuid.is_none() {
            // Pieces of two sectors.
            image.start_tracking(Some(1024)).map_err(|e| format!("cannot be tracked: {e}"))?;
            self.uuid = image.changes(0).uuid;
            self.then = allowed.iter().map(|values| values[0]).collect();
        }
        Ok(())
    }

    /// Judges the bitmap that a cut left, on a disk on which these values were found. True: it is trusted.
    pub fn judge(
        &self,
        engine: &Arc<Engine>,
        cut: &World,
        left: &[Vec<u8>],
        found: &[u32],
    ) -> Result<bool, String> {
        if self.uuid.is_none() {
            return Ok(false);
        }
        let file =
            |n: &usize| level(Arc::new(MemoryFile::from_bytes(&left[*n])), "state", cut.raw == Some(*n));
        let levels = cut.chain.iter().map(file).collect::<Result<Vec<_>, String>>()?;
        let image = Image::open(engine, "state", levels).map_err(|e| format!("does not open: {e}"))?;
        let changes = image.changes(0);
        if changes.uuid.is_none() {
            LOST.fetch_add(1, Ordering::Relaxed);
            return Ok(false);
        }
        if changes.uuid != self.uuid {
            return Err(format!("tracked since {:?} instead of {:?}", changes.uuid, self.uuid));
        }
        TRUSTED.fetch_add(1, Ordering::Relaxed);
        for (sector, now) in found.iter().enumerate() {
            let then = self.then.get(sector).copied().unwrap_or(0);
            if *now != then && !says(&changes, sector) {
                return Err(format!(
                    "sector {sector} held {then} and holds {now}, which the bitmap does not say"
                ));
            }
        }
        Ok(true)
    }
}

/// True when the sector counts as changed.
fn says(changes: &Changes, sector: usize) -> bool {
    let at = (sector * SECTOR) as u64;
    changes.ranges.iter().any(|(begin, len)| (*begin..begin + len).contains(&at))
}
