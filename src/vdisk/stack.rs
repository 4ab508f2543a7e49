//! The delta files under an image at one moment. A live operation makes a new stack and swaps it in while the gate is
//! closed and everything inside has left; so what is inside the gate sees one stack from beginning to end.
//!
//! A cached place names its level by its index in `table`, which never changes while the level is part of the image:
//! a snapshot adds one, a merge takes one out, and nothing is renumbered.

use std::sync::OnceLock;

use super::alloc::Allocator;
use super::bat::budget::Budget;
use super::bat::cache::{BatCache, Lookup};
use super::bat::page::Place;
use super::nowait::NoWaitReads;
use super::scan::Scan;
use super::{Layout, Level, nowait};
use crate::error::{Error, Kind, Result};
use crate::format::header::{Geometry, Header, Version};
use crate::image::level::raw_cluster;
use crate::io::poison::Poison;
use crate::sync::{Arc, Mutex};

/// Levels of a chain, the top included: as the kernel target has it, with room in the 12 bits of a place.
pub(crate) const MAX_LEVELS: usize = 250;

/// Indexes of one table: a cached place has 12 bits for them.
const MAX_INDEXES: usize = 4000;

/// The levels of an image, and what belongs to the writable one.
pub(super) struct Stack {
    table: Vec<Option<Level>>,
    /// Indexes into the table, base first.
    order: Vec<u16>,
    /// The top's; for raw, one that maps every byte to itself.
    pub geometry: Geometry,
    /// None for a raw top.
    pub bat: Option<Arc<BatCache>>,
    /// The top's own state; outlives the stack while the top stays the same.
    pub state: Arc<TopState>,
    /// How each level of the table is read on a thread that does not wait.
    reads: Vec<NoWaitReads>,
    /// The top never waits for a device: writes go there alone.
    pub never_blocks: bool,
    /// Something lies below the lowest level that this stack does not have: two levels of a longer chain are merged.
    is_part: bool,
}

/// What only the writable level has.
#[derive(Default)]
pub(super) struct TopState {
    /// The header as it should be on disk; None for raw. Held across every write of bytes 0 to 4095 (R5).
    /// Before the pages of the BAT.
    pub header: Mutex<Option<Header>>,
    /// What the scan found, until the mark turns it into the allocator. A leaf.
    pub scan: Mutex<Option<Scan>>,
    /// From the mark on.
    pub allocator: OnceLock<Allocator>,
}

impl Stack {
    /// A stack over `levels`, base first, and an empty cache. Refuses levels that do not fit each other.
    pub(super) fn new(levels: Vec<Level>, budget: &Arc<Budget>) -> Result<Stack> {
        let Some(top) = levels.last() else {
            return Err(Error::new(Kind::Invalid, "an image has at least one level"));
        };
        if levels.len() > MAX_LEVELS {
            let context = format!("{} levels; more than {MAX_LEVELS} are not served", levels.len());
            return Err(Error::at(Kind::Unsupported, &top.path, context));
        }
        let (header, geometry) = match &top.layout {
            Layout::Ploop(header) => (Some(*header), header.geometry()),
            layout @ (Layout::Raw | Layout::Plain { .. }) => {
                let len = top.file.len().map_err(|e| Error::io(&e, &top.path, "cannot open the image"))?;
                let cluster = match layout {
                    Layout::Plain { cluster } => *cluster,
                    _ => raw_cluster(len),
                };
                (None, Geometry { version: Version::V2, cluster, entries: 0, disk: len, first: 0 })
            }
        };
        for (i, level) in levels.iter().enumerate() {
            check_level(level, i, &geometry)?;
        }
        let state = Arc::new(TopState { header: Mutex::new(header), ..TopState::default() });
        let parts =
            Parts { table: Vec::new(), order: Vec::new(), geometry, bat: None, state, is_part: false };
        let parts = parts.numbered_anew(levels).poisoned_top();
        Ok(if header.is_some() { parts.empty_cache(budget) } else { parts }.build())
    }

    /// What this stack has, to change some of it.
    fn parts(&self) -> Parts {
        let Stack { table, order, geometry, bat, state, .. } = self;
        Parts {
            table: table.clone(),
            order: order.clone(),
            geometry: *geometry,
            bat: bat.clone(),
            state: Arc::clone(state),
            is_part: false,
        }
    }

    /// The stack with `level` on top, and a state of its own. What is cached stays: no entry changes its level.
    pub(super) fn with_top(&self, level: Level, state: TopState, budget: &Arc<Budget>) -> Result<Stack> {
        if self.order.len() >= MAX_LEVELS {
            let context = format!("{MAX_LEVELS} levels already; delete a snapshot first");
            return Err(Error::at(Kind::Unsupported, &self.top().path, context));
        }
        let Some(geometry) = level.geometry() else {
            return Err(Error::at(Kind::Invalid, &level.path, "a raw file can only be the base"));
        };
        check_level(self.top(), self.order.len() - 1, &geometry)?;
        // An index is not used again while the cache lives: slots behind the disk's end may still name it, and would be
        // written as the new top's. When they run out, everything is numbered anew over an empty cache.
        let numbers_last = self.table.len() < MAX_INDEXES;
        let keeps = numbers_last && self.bat.as_ref().is_some_and(|bat| bat.covers(geometry.entries));
        let below = self.parts();
        let below = if numbers_last { below } else { below.numbered_anew(self.bottom_up().cloned()) };
        let parts = below.with_top(level).poisoned_top().geometry(geometry).state(state);
        Ok(if keeps { parts } else { parts.empty_cache(budget) }.build())
    }

    /// The stack without the level `index`, from which nothing is read any more.
    pub(super) fn without(&self, index: u16, budget: &Arc<Budget>) -> Stack {
        // Holes of a base are not copied and still cached as its own; and what hid only the base hides nothing now.
        let keeps = self.bat.is_some() && !self.is_base(index);
        let parts = self.parts().without(index);
        if keeps { parts } else { parts.empty_cache(budget) }.build()
    }

    /// The stack with its two uppermost levels in the other order. They map different clusters, so that nothing
    /// cached changes. `header` and `state` are those of the new top.
    pub(super) fn flipped(&self, header: Header, state: TopState) -> Stack {
        let parts = self.parts().flipped().top_header(header).poisoned_top().state(state);
        Parts { is_part: self.is_part, ..parts }.build()
    }

    /// The same top over other lower levels (base first), which another operation merged: read anew.
    pub(super) fn over(&self, lower: Vec<Level>, budget: &Arc<Budget>) -> Result<Stack> {
        for (i, level) in lower.iter().enumerate() {
            check_level(level, i, &self.geometry)?;
        }
        let levels = lower.into_iter().chain([self.top().clone()]);
        Ok(self.parts().numbered_anew(levels).empty_cache(budget).build())
    }

    /// The same levels, with a top that has grown: `header` is its new one.
    pub(super) fn grown(&self, header: Header, state: TopState, budget: &Arc<Budget>) -> Stack {
        self.parts().top_header(header).state(state).empty_cache(budget).build()
    }

    /// The same raw file, `size` bytes long now. Its clusters stay what they were: locks go by them.
    pub(super) fn grown_raw(&self, size: u64) -> Stack {
        self.parts().geometry(Geometry { disk: size, ..self.geometry }).build()
    }

    /// Index of the writable level.
    pub(super) fn top_index(&self) -> u16 {
        *self.order.last().expect("a stack has a top")
    }

    /// The writable level.
    pub(super) fn top(&self) -> &Level {
        self.level(self.top_index())
    }

    /// How the level that a place names is read on a thread that does not wait.
    pub(super) fn reads_of(&self, index: u16) -> NoWaitReads {
        self.reads[usize::from(index)]
    }

    /// The level a place names.
    pub(super) fn level(&self, index: u16) -> &Level {
        self.table[usize::from(index)].as_ref().expect("a place names a level of its stack")
    }

    fn bottom_up(&self) -> impl Iterator<Item = &Level> {
        self.order.iter().map(|index| self.level(*index))
    }

    /// Indexes and levels from the top down.
    pub(super) fn top_down(&self) -> impl Iterator<Item = (u16, &Level)> {
        self.order.iter().rev().map(|index| (*index, self.level(*index)))
    }

    /// These levels are some out of the middle of a chain.
    pub(super) fn into_part(self) -> Stack {
        Stack { is_part: true, ..self }
    }

    /// True for the level below which there is nothing.
    pub(super) fn is_base(&self, index: u16) -> bool {
        !self.is_part && self.order.first() == Some(&index)
    }

    /// Where a guest cluster lies.
    pub(super) fn place(&self, cluster: u64) -> Lookup {
        match &self.bat {
            Some(bat) => bat.lookup(cluster),
            None => Lookup::Found(self.raw_place(cluster)),
        }
    }

    /// Where a guest cluster of a raw top lies.
    pub(super) fn raw_place(&self, cluster: u64) -> Place {
        Place::At { level: self.top_index(), position: cluster * self.geometry.cluster }
    }

    /// The top's allocator.
    pub(super) fn allocator(&self) -> &Allocator {
        self.state.allocator.get().expect("only marked images allocate and free")
    }
}

/// A stack that is being made: a step changes one part of it, and [`build`](Parts::build) probes its files.
struct Parts {
    table: Vec<Option<Level>>,
    order: Vec<u16>,
    geometry: Geometry,
    bat: Option<Arc<BatCache>>,
    state: Arc<TopState>,
    is_part: bool,
}

impl Parts {
    /// These levels, base first. Numbers change: only an [`empty_cache`](Parts::empty_cache) fits them.
    fn numbered_anew(self, levels: impl IntoIterator<Item = Level>) -> Parts {
        let table: Vec<_> = levels.into_iter().map(Some).collect();
        let order = (0..table.len() as u16).collect();
        Parts { table, order, ..self }
    }

    /// `level` above all, under the next number.
    fn with_top(mut self, level: Level) -> Parts {
        self.order.push(self.table.len() as u16);
        self.table.push(Some(level));
        self
    }

    fn without(mut self, index: u16) -> Parts {
        self.table[usize::from(index)] = None;
        self.order.retain(|i| *i != index);
        self
    }

    /// The two uppermost levels change places.
    fn flipped(mut self) -> Parts {
        let top = self.order.len() - 1;
        self.order.swap(top, top - 1);
        self
    }

    fn top_mut(&mut self) -> Option<&mut Level> {
        let top = self.order.last()?;
        self.table[usize::from(*top)].as_mut()
    }

    /// The top has this header, and the disk its geometry.
    fn top_header(mut self, header: Header) -> Parts {
        if let Some(top) = self.top_mut() {
            top.layout = Layout::Ploop(header);
        }
        self.geometry(header.geometry())
    }

    /// R7 where no caller gets around it: after a failed sync the new top's file itself refuses every change.
    fn poisoned_top(mut self) -> Parts {
        if let Some(top) = self.top_mut() {
            top.file = Arc::new(Poison::new(Arc::clone(&top.file)));
        }
        self
    }

    fn geometry(self, geometry: Geometry) -> Parts {
        Parts { geometry, ..self }
    }

    fn state(self, state: TopState) -> Parts {
        Parts { state: Arc::new(state), ..self }
    }

    /// Nothing cached, and a slot for each page of the BAT that the geometry has.
    fn empty_cache(self, budget: &Arc<Budget>) -> Parts {
        let bat = Some(BatCache::new(Arc::clone(budget), self.geometry.entries));
        Parts { bat, ..self }
    }

    fn build(self) -> Stack {
        let Parts { table, order, geometry, bat, state, is_part } = self;
        let probed = |level: &Option<Level>| level.as_ref().map_or(NoWaitReads::Wait, nowait::probe);
        let reads: Vec<_> = table.iter().map(probed).collect();
        let top = order.last().and_then(|top| table[usize::from(*top)].as_ref());
        let never_blocks = top.is_some_and(|top| top.file.traits().never_blocks);
        Stack { table, order, geometry, bat, state, reads, never_blocks, is_part }
    }
}

/// A level at height `index` under (or as) a top of this geometry.
fn check_level(level: &Level, index: usize, top: &Geometry) -> Result<()> {
    let refuse = |why: String| Err(Error::at(Kind::Damaged, &level.path, why));
    let Some(own) = level.geometry() else {
        if index == 0 {
            return Ok(());
        }
        return refuse("a raw file can only be the base of a chain".into());
    };
    if own.cluster != top.cluster {
        return refuse(format!("clusters of {} bytes below a top with {}", own.cluster, top.cluster));
    }
    if own.version != top.version {
        return refuse(format!("version {:?} below a top of {:?}", own.version, top.version));
    }
    if own.clusters() > top.clusters() {
        return refuse(format!("a disk of {} bytes below a top with {}", own.disk, top.disk));
    }
    let len = level.file.len().map_err(|e| Error::io(&e, &level.path, "cannot open the image"))?;
    if own.bat_end() > len {
        return refuse(format!(
            "the file ends at byte {len}, inside the BAT, which ends at byte {}",
            own.bat_end()
        ));
    }
    Ok(())
}
