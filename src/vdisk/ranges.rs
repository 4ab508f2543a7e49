//! The map of an image: where each part of the disk lies, piece by piece, also while it is in use.

use super::Image;
use super::bat::page::Place;
use super::stack::Stack;
use crate::error::{Error, Result};
use crate::format::bat::slot_of;
use crate::image::map::{At, Joiner, MapLevel, Piece, Range};
use crate::sync::Arc;

/// Clusters of one piece: 16 BAT pages, less where a freeze comes: who walks is inside the gate.
const CLUSTERS: u64 = 16 * 1024;
/// Ranges of one piece, about: a file with a hole in every block has 256 of them in a cluster.
const RANGES: usize = 1024;

impl Image {
    /// The map from byte `offset` (of the disk) on: at most some thousand ranges. Damaged entries are shown, not
    /// refused. Blocks: not for runners or transport threads.
    pub fn map_piece(self: &Arc<Self>, offset: u64) -> Result<Piece> {
        let _inside = self.enter_and_wait()?;
        let stack = self.stack();
        let order: Vec<u16> = stack.top_down().map(|(index, _)| index).collect();
        // Base first, as levels are counted.
        let number = |index: u16| order.iter().rev().position(|i| *i == index).unwrap_or_default() as u16;
        let mut levels = Vec::new();
        for (_, level) in stack.top_down() {
            let len = level.file.len().map_err(|e| Error::io(&e, &level.path, "cannot look at the file"))?;
            levels.insert(0, MapLevel { path: level.path.clone(), length: len });
        }
        let size = self.size();
        let mut ranges = Vec::new();
        let mut at = offset.min(size);
        let last = (at / self.cluster + CLUSTERS).saturating_mul(self.cluster).min(size);
        let mut joiner = Joiner::default();
        // A run of clusters that lie in one piece is asked for holes as a whole: what is written in order is one run.
        // A freeze waits for one BAT page, not for all of a piece: their loads may wait for the disk.
        let page = |at: u64| slot_of(at / self.cluster).0;
        let begun = page(at);
        while at < last && ranges.len() < RANGES && (page(at) == begun || !self.gate.is_closed()) {
            let (begin, place) = self.place_at(&stack, at)?;
            let length = (begin + self.cluster).min(size) - at;
            let place = match place {
                Place::None => At::Nowhere,
                Place::Damaged => At::Damaged,
                // The table's index for now: holes are looked for in its file.
                Place::At { level, position } => {
                    At::File { level, offset: position + (at - begin), hole: false }
                }
            };
            if let Some(run) = joiner.push(Range { start: at, length, at: place }) {
                self.split(&stack, run, &mut ranges)?;
            }
            at += length;
        }
        if let Some(run) = joiner.end() {
            self.split(&stack, run, &mut ranges)?;
        }
        for range in &mut ranges {
            if let At::File { level, .. } = &mut range.at {
                *level = number(*level);
            }
        }
        Ok(Piece { levels, size, cluster: self.cluster, ranges, next: at })
    }

    /// Splits a run at the holes of its file.
    fn split(&self, stack: &Stack, run: Range, ranges: &mut Vec<Range>) -> Result<()> {
        let At::File { level, offset, .. } = run.at else {
            ranges.push(run);
            return Ok(());
        };
        let file = &stack.level(level).file;
        let end = offset + run.length;
        let mut part = |from: u64, to: u64, hole: bool| {
            if from < to {
                let start = run.start + (from - offset);
                ranges.push(Range { start, length: to - from, at: At::File { level, offset: from, hole } });
            }
        };
        let mut at = offset;
        while at < end {
            let data = file.seek_data(at).map_err(|e| self.seek_error(&e))?;
            let data = data.unwrap_or(end).clamp(at, end);
            part(at, data, true);
            if data == end {
                break;
            }
            // A file that changes meanwhile must not keep us here: at least a byte a turn.
            let hole = file.seek_hole(data).map_err(|e| self.seek_error(&e))?.clamp(data + 1, end);
            part(data, hole, false);
            at = hole;
        }
        Ok(())
    }
}
