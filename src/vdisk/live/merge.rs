//! Merging the level below the top into it, or the top into that level, whichever copies less, while I/O goes on.
//!
//! There is one way to copy: up, into the top (`pull`). Where the lower file P has more than the top T, the two change
//! places first:
//!
//! ```text
//!   before            flip                          after
//!   T  a . c .        P  . B . D   (its a, c gone)   P  a B c D
//!   P  A B . D        T  a . c .
//! ```
//!
//! P's entries for what T maps are hidden, so taking them away changes nothing that any reader sees; then the two map
//! different clusters, and either order reads the same. ploop does the same and calls it a reverse merge
//! (docs/format.md#what-ploop-does).
//!
//! What comes first is in `work`: both files are judged and claimed, and the snapshot that P was is marked Temporary, so
//! that it is not read alone any more (`mark_deleted`). What comes last, too: P's file is removed.

use std::collections::BTreeSet;
use std::ops::Range;

use super::freeze::Uncommitted;
use crate::error::{Error, Kind, Result};
use crate::format::bat::PAGE_BYTES;
use crate::format::header::{Geometry, HEADER_BYTES, Header};
use crate::io::file::{read_full, write_full};
use crate::progress::Progress;
use crate::sync::{Arc, lock};
use crate::vdisk::mark::close_lower;
use crate::vdisk::operations::Operating;
use crate::vdisk::stack::{Stack, TopState};
use crate::vdisk::{Image, Layout, Level, scan};

/// Which way a merge goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The lower level's clusters are copied into the top's file, which stays.
    Up,
    /// The two change places first: the top's clusters are copied into the lower level's file, which stays.
    Flip,
}

/// A BAT piece read at a time: whole pages, large enough for few calls.
const PIECE: u64 = 256 * PAGE_BYTES;

impl Image {
    /// The direction that copies less for the two uppermost levels. `may_change`: nothing else depends on the lower
    /// file (R9). Reads both BATs.
    pub fn merge_direction(&self, may_change: bool) -> Result<Direction> {
        let stack = self.stack();
        let Some((_, lower)) = stack.top_down().nth(1) else { return Ok(Direction::Up) };
        let Some(of) = lower.geometry() else { return Ok(Direction::Up) };
        // A shorter BAT would have to grow before it can be the top's.
        if !may_change || of.entries != stack.geometry.entries || of.disk != stack.geometry.disk {
            return Ok(Direction::Up);
        }
        let (up, flip) = count(&stack, lower, &of)?;
        Ok(if flip < up { Direction::Flip } else { Direction::Up })
    }

    /// Makes the lower of the two uppermost levels the top:
    /// 1. the lower file P is marked in use, durably (R1);
    /// 2. everything is synced;
    /// 3. P's entries for clusters that the top maps, durably, are taken away, and that is made durable;
    /// 4. P is scanned: what no entry names is free; its free tail is cut off;
    /// 5. freeze: what the top mapped since 2 is durable, and is taken away from P as well, durably;
    /// 6. `commit` swaps the two in the descriptor: the point of no return;
    /// 7. swap the stack, thaw;
    /// 8. the old top's tail is cut off and its mark cleared.
    ///
    /// 3 before 2 could lose both copies of a cluster: the top's entry in the power cut, P's by this. 6 before 5
    /// would let P's old data show instead of the top's. 3 before 1 would change a file that says "clean".
    ///
    /// During 3 a BAT page that is loaded finds P's entry gone, and yet a power cut may bring it back: discards keep
    /// hiding it. A failed sync of P is final (R7), as one of the top is: P's entries read 0 from then on, whatever the
    /// disk has, so that a second attempt would take nothing away and go on to 6.
    ///
    /// A flip that is cancelled or fails before 6 for any other reason leaves P below the top, closed.
    pub fn flip(
        self: &Arc<Self>,
        progress: &Progress,
        commit: impl FnOnce() -> std::result::Result<(), Uncommitted>,
    ) -> Result<()> {
        let operating = self.begin_operation()?;
        self.mark_and_wait()?;
        let before = arc_swap::Guard::into_inner(self.stack());
        let (_, lower) = before.top_down().nth(1).expect("a merge has two levels");
        let (Layout::Ploop(header), Some(of)) = (&lower.layout, lower.geometry()) else {
            return Err(Error::at(Kind::Unsupported, &lower.path, "a raw base cannot become the top"));
        };
        let result = operating.flip_levels(&before, lower, header, &of, progress, commit);
        // Nothing fails after 6. What was taken away is durable before the file is cut off behind it (R2).
        if result.is_err() && self.failure().is_none() {
            let closed = operating.sync_lower(lower).and_then(|()| close_lower(lower, header));
            if let Err(e) = closed {
                log::warn!("{e}; its in-use mark stays until the image is opened again");
            }
        }
        result
    }

    /// Pulls the level below the top up into it and takes it out of the image:
    /// 1. every cluster that is read from there is copied, and the entries are durable;
    /// 2. freeze; 3. `commit` takes the level out of the descriptor; 4. swap the stack, thaw.
    ///
    /// The caller removes the file afterwards (R8: last). 3 before 1 would lose what was not copied yet.
    pub fn pull_out(
        self: &Arc<Self>,
        progress: &Progress,
        commit: impl FnOnce() -> std::result::Result<(), Uncommitted>,
    ) -> Result<()> {
        let operating = self.begin_operation()?;
        self.mark_and_wait()?;
        let (index, bytes) = {
            let stack = self.stack();
            let (index, lower) = stack.top_down().nth(1).expect("a merge has two levels");
            let bytes = match lower.geometry() {
                Some(of) => count(&stack, lower, &of)?.0 * self.cluster,
                None => self.size(),
            };
            (index, bytes)
        };
        progress.set_total(bytes);
        operating.pull_up(index, progress)?; // 1
        let frozen = operating.freeze_durably()?; // 2
        let next = self.stack().without(index, &self.engine.budget);
        operating.commit(commit)?; // 3
        frozen.swap(next);
        Ok(()) // 4
    }
}

impl Operating<'_> {
    /// All that was taken away from P is durable.
    fn sync_lower(&self, lower: &Level) -> Result<()> {
        lower.file.sync_data().map_err(|e| {
            let e = Error::io(&e, &lower.path, "fdatasync failed; the merge cannot go on");
            self.fail(&e);
            e
        })?;
        self.set_lower_may_return(false);
        Ok(())
    }

    /// The steps of [`flip`](Image::flip).
    fn flip_levels(
        &self,
        before: &Stack,
        lower: &Level,
        header: &Header,
        of: &Geometry,
        progress: &Progress,
        commit: impl FnOnce() -> std::result::Result<(), Uncommitted>,
    ) -> Result<()> {
        let io = |e: std::io::Error| Error::io(&e, &lower.path, "cannot prepare the merge");
        let header = header.marked();
        write_full(&*lower.file, &header.encode(), 0).map_err(io)?; // 1
        self.sync_lower(lower)?;
        let watch = self.flusher.watch_pages();
        self.flush_now()?; // 2
        let durable = || self.sync_data(before);
        self.set_lower_may_return(true);
        take_away_hidden(before, lower, of, None, durable, |_| ())?; // 3
        self.sync_lower(lower)?;
        let mut found = scan::scan(lower, of)?; // 4
        lower.file.set_len(of.cluster_position(found.end)).map_err(io)?;
        progress.check()?;
        let frozen = self.freeze_durably()?; // 5
        let freed = |entry: u32| {
            if let Some(position) = of.position(entry) {
                found.free.insert(of.file_cluster(position));
            }
        };
        self.set_lower_may_return(true);
        take_away_hidden(before, lower, of, Some(&watch.pages()), durable, freed)?;
        self.sync_lower(lower)?;
        let state = TopState::default();
        *lock(&state.header) = Some(header);
        let _ = state.allocator.set(self.new_allocator(of, found));
        let next = before.flipped(header, state);
        self.commit(commit)?; // 6
        let old = frozen.swap(next);
        drop(frozen); // 7
        if let Err(e) = self.unmark(&old, None) {
            log::warn!("{e}; its in-use mark stays until the image is opened again"); // 8
        }
        Ok(())
    }
}

/// Takes away every entry of `lower` for a cluster that `stack`'s top maps on disk, in all pages or in those given.
/// `durable` is called between looking and changing: what was seen of the top is on disk for good. `gone` hears of
/// each entry.
fn take_away_hidden(
    stack: &Stack,
    lower: &Level,
    of: &Geometry,
    only: Option<&BTreeSet<u64>>,
    mut durable: impl FnMut() -> Result<()>,
    mut gone: impl FnMut(u32),
) -> Result<()> {
    let top = stack.top();
    for piece in pieces(of, only) {
        let mut own = read_bat(lower, of, &piece)?;
        let upper = read_bat(top, &stack.geometry, &piece)?;
        let hidden: Vec<usize> = (0..own.len()).filter(|i| own[*i] != 0 && upper[*i] != 0).collect();
        if hidden.is_empty() {
            continue;
        }
        durable()?;
        for i in &hidden {
            gone(std::mem::take(&mut own[*i]));
        }
        // From the first change to the last: the header, before all entries, has one writer (R5).
        let (first, last) = (hidden[0], hidden[hidden.len() - 1]);
        let bytes: Vec<u8> = own[first..=last].iter().flat_map(|entry| entry.to_le_bytes()).collect();
        let at = piece.start + 4 * first as u64;
        write_full(&*lower.file, &bytes, at)
            .map_err(|e| Error::io_at(&e, &lower.path, "cannot write the BAT", at))?;
    }
    Ok(())
}

/// What the two uppermost BATs have: clusters that only the lower maps, and those that the top maps.
fn count(stack: &Stack, lower: &Level, of: &Geometry) -> Result<(u64, u64)> {
    let (mut only_lower, mut of_top) = (0, 0);
    for piece in pieces(of, None) {
        let (own, upper) = (read_bat(lower, of, &piece)?, read_bat(stack.top(), &stack.geometry, &piece)?);
        for (own, upper) in own.iter().zip(&upper) {
            only_lower += u64::from(*upper == 0 && *own != 0);
            of_top += u64::from(*upper != 0);
        }
    }
    Ok((only_lower, of_top))
}

/// Byte ranges of the BAT, each at most [`PIECE`] long: all of it, or single pages.
pub(super) fn pieces(of: &Geometry, only: Option<&BTreeSet<u64>>) -> Vec<Range<u64>> {
    let end = of.bat_end();
    let cut = |start: u64, len: u64| start.max(HEADER_BYTES)..(start + len).min(end);
    let all = match only {
        Some(pages) => pages.iter().map(|page| cut(page * PAGE_BYTES, PAGE_BYTES)).collect::<Vec<_>>(),
        None => (0..end.div_ceil(PIECE)).map(|i| cut(i * PIECE, PIECE)).collect(),
    };
    all.into_iter().filter(|range| range.start < range.end).collect()
}

/// The entries in a byte range of a level's BAT; what lies behind its end is 0.
pub(super) fn read_bat(level: &Level, of: &Geometry, range: &Range<u64>) -> Result<Vec<u32>> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    let inside = of.bat_end().saturating_sub(range.start).min(bytes.len() as u64) as usize;
    read_full(&*level.file, &mut bytes[..inside], range.start)
        .map_err(|e| Error::io_at(&e, &level.path, "cannot read the BAT", range.start))?;
    Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}
