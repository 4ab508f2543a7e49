//! The order of a file's clusters, and the moves that make it the order of the disk: numbers only, no I/O.
//!
//! The i-th cluster of the disk that has a place (its *rank* is i) belongs at file cluster i. A move copies, and a place
//! that was left is free only after a round (R4). So the moves come in rounds: each fills places that were free when it
//! began. A filled place frees the one where its cluster lay, which the next round fills, and so on: of a long chain of
//! clusters that lie in each other's places, each moves once, to where it stays. Where no place is free, one cluster
//! moves behind the end to begin a chain; so many at once, evenly over the file, that every round has enough to do.
//! (A window filled from front to back would have to empty itself first, and so move nearly every cluster twice.)

use std::collections::VecDeque;

use crate::error::Result;
use crate::vdisk::alloc::Bits;

/// No cluster lies at this place, or it is not known where this rank lies. The format has fewer clusters, and one fewer
/// than [`TAKEN`].
const NONE: u32 = u32::MAX;
/// A cluster lies at this place that is not part of the plan, and stays.
const TAKEN: u32 = u32::MAX - 1;

/// What putting the clusters in order gains, or has gained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pieces {
    /// Pieces before: how often the disk, read from front to back, jumps in the file, and once for the beginning.
    pub pieces: u64,
    /// And after.
    pub pieces_after: u64,
    /// Bytes that the host must have free meanwhile: the clusters of one round have two places.
    pub spare: u64,
}

/// Where the clusters of a disk lie, in the order of the disk.
#[derive(Default)]
pub(super) struct FileOrder {
    /// By rank.
    clusters: Vec<u32>,
    /// By rank; no two are the same.
    places: Vec<u32>,
    /// Those places.
    seen: Bits,
    /// Pieces so far.
    pub pieces: u64,
    /// Where the piece goes on.
    next: Option<u64>,
}

/// One move of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OrderStep {
    /// Which cluster.
    pub rank: usize,
    /// To this free place; None: to any behind the last that is taken.
    pub to: Option<u64>,
}

/// The moves that are left.
pub(super) struct Moves {
    /// By rank: where it lies.
    places: Vec<u32>,
    /// By place: which rank lies there.
    at: Vec<u32>,
    /// Places to fill: no cluster lies there, and the one that belongs there lies elsewhere.
    free: VecDeque<u32>,
    /// Places where chains begin, as [`walk`](Moves::walk) found them; another chain may have come there since.
    starts: std::vec::IntoIter<u32>,
    /// Moves in a round.
    at_a_time: usize,
}

/// The format has fewer clusters than 32 bits can count.
fn small(n: u64) -> u32 {
    u32::try_from(n).unwrap_or(NONE)
}

impl FileOrder {
    /// The next cluster of the disk lies at this file cluster; for the count of the pieces alone.
    pub(super) fn count(&mut self, place: u64) {
        self.pieces += u64::from(self.next != Some(place));
        self.next = Some(place + 1);
    }

    /// The next one to put in order. Where another was seen at the same place before, this one stays where it is: the look
    /// at the disk takes no locks, so that a cluster may be discarded behind it and its place be found in use again. Two
    /// at one place would send each other away for ever.
    pub(super) fn push(&mut self, cluster: u64, place: u64) {
        self.count(place);
        if !self.seen.insert(place) {
            return;
        }
        self.clusters.push(small(cluster));
        self.places.push(small(place));
    }

    /// Clusters to put in order.
    pub(super) fn len(&self) -> u64 {
        self.clusters.len() as u64
    }

    /// The plan for it, and which cluster has which rank.
    pub(super) fn plan(self, at_a_time: usize) -> (Moves, Vec<u32>) {
        (Moves::new(self.places, at_a_time), self.clusters)
    }

    /// What it would come to, with clusters of `cluster` bytes: how many moves, and the gain over `pieces` pieces. Asks
    /// `goes_on` before each round.
    pub(super) fn rehearse(
        self,
        at_a_time: usize,
        cluster: u64,
        pieces: u64,
        goes_on: impl Fn() -> Result<()>,
    ) -> Result<(u64, Pieces)> {
        let behind = self.len();
        let (mut plan, _) = self.plan(at_a_time);
        let (mut moves, mut most) = (0, 0);
        loop {
            goes_on()?;
            let round = plan.next_round();
            // Each moves once to its place, and before that at most once out of another's way.
            debug_assert!(moves <= 2 * behind, "{moves} moves of {behind} clusters");
            if round.is_empty() || moves > 2 * behind {
                break;
            }
            moves += round.len() as u64;
            most = most.max(round.len() as u64);
            round.iter().for_each(|step| plan.moved(step.rank, step.to.unwrap_or(behind)));
        }
        Ok((moves, Pieces { pieces, pieces_after: u64::from(behind > 0), spare: most * cluster }))
    }
}

impl Moves {
    fn new(places: Vec<u32>, at_a_time: usize) -> Moves {
        let mut at = vec![NONE; places.len()];
        for (rank, place) in places.iter().enumerate() {
            if let Some(at) = at.get_mut(*place as usize) {
                *at = rank as u32;
            }
        }
        let free = (0..at.len()).filter(|place| at[*place] == NONE).map(|place| place as u32).collect();
        Moves { places, at, free, starts: Vec::new().into_iter(), at_a_time: at_a_time.max(1) }
    }

    /// Where `rank` lies.
    pub(super) fn place(&self, rank: usize) -> u64 {
        self.places[rank].into()
    }

    /// The moves of the next round, none of which needs another; empty: all is in order. What came of each is said before
    /// the next round, and by then the places that were left are free.
    pub(super) fn next_round(&mut self) -> Vec<OrderStep> {
        let mut steps = Vec::new();
        while steps.len() < self.at_a_time
            && let Some(place) = self.free.pop_front()
        {
            let wanted = place as usize;
            if self.at[wanted] == NONE && self.places[wanted] != NONE {
                steps.push(OrderStep { rank: wanted, to: Some(place.into()) });
            }
        }
        // Half a round still costs a round's syncs; to begin new chains each time one ends would be moves for nothing.
        if steps.len() <= self.at_a_time / 2 {
            self.make_room(self.at_a_time - steps.len(), &mut steps);
        }
        steps
    }

    /// Begins up to `count` chains, and one at least where any is needed.
    fn make_room(&mut self, count: usize, steps: &mut Vec<OrderStep>) {
        let mut begun = 0;
        let mut walked = false;
        while begun < count {
            let Some(place) = self.starts.next() else {
                if begun > 0 || walked {
                    return;
                }
                walked = true;
                self.starts = self.walk();
                continue;
            };
            if self.is_misplaced(place) {
                steps.push(OrderStep { rank: self.at[place as usize] as usize, to: None });
                begun += 1;
            }
        }
    }

    /// Where chains begin. The places that lie in each other's way form cycles; each is walked once, in the order in which
    /// a chain would come along. A cycle needs one chain. A long one gets more, evenly along it, so that all cycles together
    /// have as many as a round has moves: side by side, they would soon end in each other.
    fn walk(&self) -> std::vec::IntoIter<u32> {
        let mut visited = Bits::default();
        let mut walk = Vec::new();
        for start in 0..self.at.len() as u32 {
            let (mut place, mut along) = (start, 0);
            while self.is_misplaced(place) && visited.insert(place.into()) {
                walk.push((place, along));
                (place, along) = (self.places[place as usize], along + 1);
            }
        }
        let apart = walk.len().div_ceil(self.at_a_time).max(1);
        let starts = walk.into_iter().filter(|(_, along)| along % apart == 0);
        starts.map(|(place, _)| place).collect::<Vec<_>>().into_iter()
    }

    /// True when the one at this place must leave it, and has no free place to go to.
    fn is_misplaced(&self, place: u32) -> bool {
        let rank = self.at.get(place as usize).copied().unwrap_or(NONE);
        rank < TAKEN && rank != place && self.places[place as usize] != NONE && self.at[rank as usize] != NONE
    }

    /// `rank` lies at `to` now.
    pub(super) fn moved(&mut self, rank: usize, to: u64) {
        let from = std::mem::replace(&mut self.places[rank], small(to));
        if let Some(at) = self.at.get_mut(to as usize) {
            *at = rank as u32;
        }
        self.left(from);
    }

    /// `rank` is not where it was: the guest has discarded it.
    pub(super) fn gone(&mut self, rank: usize) {
        let from = std::mem::replace(&mut self.places[rank], NONE);
        self.left(from);
    }

    /// The place `to` cannot be had: another cluster has it.
    pub(super) fn taken(&mut self, to: u64) {
        self.at[to as usize] = TAKEN;
    }

    fn left(&mut self, place: u32) {
        let Some(at) = self.at.get_mut(place as usize) else { return };
        *at = NONE;
        if self.places[place as usize] != NONE {
            self.free.push_back(place);
        }
    }
}

#[cfg(test)]
mod tests;
