//! A snapshot: what is there is frozen as a lower level, and writes go to a new, empty top.

use super::freeze::Uncommitted;
use crate::error::{Error, Kind, Result};
use crate::format::header::Version;
use crate::io::file::write_full;
use crate::sync::{Arc, lock};
use crate::vdisk::scan::Scan;
use crate::vdisk::stack::TopState;
use crate::vdisk::{Image, Layout, Level, Stage};

/// What the new top must be.
#[derive(Clone, Copy, Debug)]
pub struct TopPlan {
    /// Disk size in bytes.
    pub disk: u64,
    /// Cluster size in bytes.
    pub cluster: u64,
    /// v1 or v2; over a raw base, v2.
    pub version: Version,
    /// The header says in use from the beginning.
    pub in_use: bool,
}

impl Image {
    /// Puts a new top over what is there (R8):
    /// 1. `make` creates the new top, in use, durable under its name;
    /// 2. freeze: everything acknowledged is durable in the old top;
    /// 3. `commit` renames the descriptor and syncs the folder: the point of no return;
    /// 4. swap the stack, thaw;
    /// 5. the old top's free tail is cut off and its mark cleared.
    ///
    /// 1 in the freeze would hold up the guest for a file's creation; 3 before 2 could leave acknowledged, synced
    /// writes above the cut, in a file that is not yet part of the image after a crash; 4 before 3 would send
    /// writes to a top that a crash takes away; 5 before 4 would clear the mark of a file that is still written.
    ///
    /// Blocks; not for runners or transport threads.
    pub fn put_on_top(
        self: &Arc<Self>,
        make: impl FnOnce(TopPlan) -> Result<Level>,
        commit: impl FnOnce() -> std::result::Result<(), Uncommitted>,
    ) -> Result<()> {
        let operating = self.begin_operation()?;
        if let Some(e) = self.failure() {
            return Err(e);
        }
        if self.operations.changed().is_some() && self.stage() == Stage::Unmarked {
            // What was tracked belongs to the disk: its close writes it into the new top, which is in use for that.
            self.mark_and_wait()?;
        }
        let in_use = self.stage() == Stage::Marked;
        let geometry = self.stack().geometry;
        let plan =
            TopPlan { disk: geometry.disk, cluster: geometry.cluster, version: geometry.version, in_use };
        let mut level = make(plan)?; // 1
        let Layout::Ploop(header) = &mut level.layout else {
            return Err(Error::at(Kind::Invalid, &level.path, "a raw file cannot be put on top"));
        };
        let frozen = operating.freeze_durably()?; // 2
        let stage = self.stage();
        if stage == Stage::Marked && !in_use {
            // The first write came between: the mark is one sector and one sync more in the freeze.
            *header = header.marked();
            write_full(&*level.file, &header.encode(), 0)
                .and_then(|()| level.file.sync_data())
                .map_err(|e| Error::io(&e, &level.path, "cannot mark the new top in use"))?;
        }
        let header = *header;
        let state = TopState::default();
        *lock(&state.header) = Some(header);
        let nothing = Scan::default();
        match stage {
            Stage::Marked => drop(state.allocator.set(self.new_allocator(&header.geometry(), nothing))),
            Stage::Unmarked => *lock(&state.scan) = Some(nothing),
            Stage::ReadOnly => {}
        }
        let next = self.stack().with_top(level, state, &self.engine.budget)?;
        operating.commit(commit)?; // 3
        let old = frozen.swap(next);
        drop(frozen); // 4
        if stage == Stage::Marked
            && let Err(e) = operating.unmark(&old, None)
        {
            // Nothing is lost: all of it was durable at 2, and the next open finishes this.
            log::warn!("{e}; its in-use mark stays until the image is opened again"); // 5
        }
        Ok(())
    }
}
