//! Copying a cluster from a lower level into a fresh cluster of the top, before it changes (R3).
//!
//! The caller holds the cluster's exclusive lock and has a file cluster that is known to be zero; the entry is set
//! only after the copy and the caller's own data are written. Where the lower level has a hole, or only zeroes,
//! nothing is copied: the fresh cluster reads as zero already. Where the host shares extents, no data moves.

use std::io;
use std::ops::Range;

use super::stack::Stack;
use super::zero::is_zero;
use super::{Image, Layout};
use crate::error::{Error, Kind, Result, is_full};
use crate::io::file::{read_full, write_full};
use crate::io::share;
use crate::sync::Arc;

/// Bytes copied at a time.
const PIECE: usize = 256 << 10;
/// Zeroes are left out in this unit: the block of common host file systems.
const BLOCK: usize = 4096;

/// What came of a copy.
pub(super) enum Copied {
    /// What is outside the skipped range is there; the skipped range is still zero.
    Rest,
    /// The whole cluster is there, with the old data in the skipped range.
    Whole,
}

/// Why a copy failed: the reader's side is final, the writer's may be want of space.
pub(super) enum CopyError {
    Read(Error),
    Write(io::Error),
}

impl Stack {
    /// True when `len` bytes at `position` of a level's file take no space there, and so read as zero.
    pub(super) fn is_hole(&self, level: u16, position: u64, len: u64) -> Result<bool> {
        let level = self.level(level);
        let data = level.file.seek_data(position);
        let data = data.map_err(|e| Error::io(&e, &level.path, "cannot look for holes"))?;
        Ok(data.is_none_or(|at| at >= position + len))
    }
}

impl Image {
    /// Copies the cluster at `from` (level, byte position), `len` bytes of which belong to the disk, to byte `to` of
    /// the top, without what lies in `skip` (bytes inside the cluster).
    pub(super) fn copy_cluster(
        self: &Arc<Self>,
        stack: &Stack,
        from: (u16, u64),
        to: u64,
        len: u64,
        skip: Range<u64>,
    ) -> std::result::Result<Copied, CopyError> {
        if skip.start == 0 && skip.end >= len {
            return Ok(Copied::Rest); // All of it is overwritten.
        }
        let (level, position) = (stack.level(from.0), from.1);
        // A hole costs one call and no copy.
        if stack.is_hole(from.0, position, len).map_err(CopyError::Read)? {
            return Ok(Copied::Rest);
        }
        let top = stack.top();
        if share::clone_range(&*level.file, position, &*top.file, to, stack.geometry.cluster)
            .map_err(CopyError::Write)?
        {
            self.touched(len);
            return Ok(Copied::Whole);
        }
        let mut buf = vec![0; PIECE.min(len as usize)];
        for part in [0..skip.start.min(len), skip.end.min(len)..len] {
            let mut at = part.start;
            while at < part.end {
                let n = (part.end - at).min(PIECE as u64) as usize;
                let piece = &mut buf[..n];
                self.read_level(stack, from.0, position + at, piece).map_err(CopyError::Read)?;
                self.write_data_of(stack, piece, to + at).map_err(CopyError::Write)?;
                at += n as u64;
            }
        }
        Ok(Copied::Rest)
    }

    /// A failed copy as the error of a caller that does not wait for space.
    pub(super) fn copy_failed(&self, stack: &Stack, e: CopyError) -> Error {
        match e {
            CopyError::Read(e) => e,
            CopyError::Write(e) if is_full(&e) => self.no_space(),
            CopyError::Write(e) => Error::io(&e, &stack.top().path, "cannot copy a cluster"),
        }
    }

    /// Writes the blocks of `piece` that are not zero into space that is.
    fn write_data_of(self: &Arc<Self>, stack: &Stack, piece: &[u8], to: u64) -> io::Result<()> {
        let file = &*stack.top().file;
        let mut at = 0;
        for run in piece.chunks(BLOCK).collect::<Vec<_>>().chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let len: usize = run.iter().map(|block| block.len()).sum();
            if !is_zero(run[0]) {
                let written = write_full(file, &piece[at..at + len], to + at as u64);
                // Counted also when it failed: part of it may be there, and must be synced.
                self.touched(len as u64);
                written?;
            }
            at += len;
        }
        Ok(())
    }

    /// Reads all of `buf` from a level's file. What lies behind the end of a raw file is zero; a delta that ends
    /// inside a mapped cluster is an error, never a loop (K2).
    pub(super) fn read_level(
        self: &Arc<Self>,
        stack: &Stack,
        index: u16,
        position: u64,
        buf: &mut [u8],
    ) -> Result<()> {
        let level = stack.level(index);
        let got = read_full(&*level.file, buf, position)
            .map_err(|e| Error::io_at(&e, &level.path, "cannot read", position))?;
        if got == buf.len() {
            return Ok(());
        }
        match level.layout {
            Layout::Raw | Layout::Plain { .. } => {
                buf[got..].fill(0);
                Ok(())
            }
            Layout::Ploop(_) => {
                let end = position + got as u64;
                self.ends_early(stack, index, end);
                let context = format!("the file ends at byte {end}, inside a cluster that the BAT maps");
                Err(Error::at(Kind::Io, &level.path, context))
            }
        }
    }
}
