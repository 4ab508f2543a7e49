//! A look at the whole image before anything moves: what compacting would free, and what would move.

use crate::error::{Error, Kind, Result};
use crate::format::bat::{PAGE_SLOTS, cluster_of, slot_of};
use crate::progress::Progress;
use crate::vdisk::alloc::Bits;
use crate::vdisk::bat::page::Place;
use crate::vdisk::live::order::{FileOrder, Pieces};
use crate::vdisk::operations::Operating;
use crate::vdisk::stack::Stack;
use crate::vdisk::zero::is_zero;

/// Bytes of a cluster looked at first: data is nearly always seen in them, and a cluster costs one small read.
const FIRST_LOOK: usize = 4096;
/// Bytes of a cluster looked at from then on.
const PIECE: usize = 256 << 10;

/// What compacting gains, or has gained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gain {
    /// Bytes of the live disk's own file before.
    pub length: u64,
    /// And after.
    pub length_after: u64,
    /// Bytes that it takes on the host before.
    pub allocated: u64,
    /// And after; before the work an estimate.
    pub allocated_after: u64,
    /// Clusters of zeroes that are freed, or become holes.
    pub zero_clusters: u64,
    /// Moves of clusters; putting them in order may move one twice.
    pub moved_clusters: u64,
    /// Where they are put in order: what comes of that.
    pub defrag: Option<Pieces>,
}

/// What a look at the whole image found.
pub(super) struct Survey {
    pub gain: Gain,
    /// Guest clusters that read as zero and take space, or a place in the file, for it.
    pub zero: Vec<u64>,
}

impl Operating<'_> {
    /// Length of the top's file, and what it takes on the host, in bytes.
    pub(super) fn own_file(&self) -> Result<(u64, u64)> {
        let stack = self.stack();
        let top = stack.top();
        let status = top.file.status().map_err(|e| Error::io(&e, &top.path, "cannot look at it"))?;
        Ok((status.len, status.blocks * 512))
    }

    pub(super) fn stopped(&self, progress: &Progress) -> Result<()> {
        if self.is_closing() {
            return Err(self.closed_error());
        }
        progress.check()
    }

    /// Looks at every cluster that the top maps. Without locks: what changes meanwhile is looked at again before anything
    /// is done with it. `stays`: collects what stays, to be put in order.
    pub(super) fn survey(&self, progress: &Progress, mut stays: Option<FileOrder>) -> Result<Survey> {
        let stack = arc_swap::Guard::into_inner(self.stack());
        if stack.bat.is_none() {
            let why = "is raw: there is nothing to move in it (`fallocate --dig-holes` frees its zeroes)";
            return Err(Error::at(Kind::Unsupported, self.shown(), why));
        }
        let (length, allocated) = self.own_file()?;
        let (mut used, mut own, mut zero, mut freed) = (Bits::default(), 0, Vec::new(), 0);
        let mut before = FileOrder::default();
        let clusters = stack.geometry.clusters();
        let mut first = 0;
        while first < clusters {
            self.stopped(progress)?;
            for (cluster, position, hides) in self.own_clusters(&stack, first, clusters)? {
                let len = self.cluster_len(cluster);
                let file_cluster = stack.geometry.file_cluster(position);
                let data = data_bytes(&stack, position, len)?;
                let is_zero = data == 0 || self.reads_zero(&stack, position, len)?;
                before.count(file_cluster);
                // Another was seen there before: one of the two is there no more.
                if (!is_zero || hides) && used.insert(file_cluster) {
                    own += 1;
                    if let Some(stays) = &mut stays {
                        stays.push(cluster, file_cluster);
                    }
                }
                if is_zero && hides {
                    freed += data;
                }
                if is_zero && (!hides || data > 0) {
                    zero.push(cluster);
                }
            }
            first = cluster_of(slot_of(first).0 + 1, 0).unwrap_or(clusters);
        }
        // What lies in no cluster that stays and takes space is punched or cut off.
        let end = length.saturating_sub(stack.geometry.first).div_ceil(self.cluster);
        for free in (0..end.min(stack.geometry.file_clusters())).filter(|n| !used.contains(*n)) {
            self.stopped(progress)?;
            freed += data_bytes(&stack, stack.geometry.cluster_position(free), self.cluster)?;
        }
        let (moved_clusters, defrag) = match stays {
            None => (used.iter().filter(|n| *n >= own).count() as u64, None),
            Some(stays) => {
                let goes_on = || self.stopped(progress);
                let (moves, pieces) =
                    stays.rehearse(self.at_a_time(), self.cluster, before.pieces, goes_on)?;
                (moves, Some(pieces))
            }
        };
        let gain = Gain {
            length,
            length_after: stack.geometry.cluster_position(own).min(length),
            allocated,
            allocated_after: allocated.saturating_sub(freed),
            zero_clusters: zero.len() as u64,
            moved_clusters,
            defrag,
        };
        Ok(Survey { gain, zero })
    }

    /// The clusters in the page of `first` that the top maps, from there on: guest cluster, position, and whether it hides
    /// data of a lower level.
    pub(super) fn own_clusters(
        &self,
        stack: &Stack,
        first: u64,
        clusters: u64,
    ) -> Result<Vec<(u64, u64, bool)>> {
        let _inside = self.enter_and_wait()?;
        let Some(bat) = &stack.bat else { return Ok(Vec::new()) };
        let (_, slot) = slot_of(first);
        let mut places = vec![Place::None; (PAGE_SLOTS - slot).min((clusters - first) as usize)];
        while !bat.lookup_run(first, &mut places) {
            self.load_and_wait(stack, first)?;
        }
        let mut hides = vec![false; places.len()];
        bat.hidden_run(first, &mut hides);
        let top = stack.top_index();
        let own = places.iter().zip(hides).enumerate().filter_map(|(i, (place, hides))| match place {
            Place::At { level, position } if *level == top => Some((first + i as u64, *position, hides)),
            _ => None,
        });
        Ok(own.collect())
    }

    /// True when `len` bytes of the top at `position` are zeroes.
    pub(super) fn reads_zero(&self, stack: &Stack, position: u64, len: u64) -> Result<bool> {
        if stack.is_hole(stack.top_index(), position, len)? {
            return Ok(true);
        }
        let mut buf = vec![0; PIECE.min(len as usize)];
        let (mut at, mut step) = (0, FIRST_LOOK);
        while at < len {
            let n = (len - at).min(step as u64) as usize;
            self.read_level(stack, stack.top_index(), position + at, &mut buf[..n])?;
            if !is_zero(&buf[..n]) {
                return Ok(false);
            }
            at += n as u64;
            step = PIECE;
        }
        Ok(true)
    }
}

/// Bytes of data, and not of holes, in `len` bytes of the top at `position`.
fn data_bytes(stack: &Stack, position: u64, len: u64) -> Result<u64> {
    let top = stack.top();
    let io = |e: std::io::Error| Error::io(&e, &top.path, "cannot look for holes");
    let (mut at, end, mut data) = (position, position + len, 0);
    while at < end {
        let Some(begin) = top.file.seek_data(at).map_err(io)?.filter(|begin| *begin < end) else { break };
        at = top.file.seek_hole(begin).map_err(io)?.clamp(begin + 1, end);
        data += at - begin;
    }
    Ok(data)
}
