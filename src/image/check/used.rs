//! Which clusters of a file are referred to, in memory that is bounded whatever the file says.

/// File clusters looked at in one pass: a bitmap of 32 MiB, which holds 256 TiB of 1 MiB clusters. Larger files take
/// more passes, at most 16, since a BAT entry can name 2^32 clusters.
pub(super) const WINDOW: u64 = 1 << 28;

/// Which file clusters are referred to, one window at a time.
pub(super) struct Used {
    bits: Vec<u64>,
    pub(super) start: u64,
    total: u64,
    /// Clusters marked, over all windows.
    pub(super) count: u64,
}

impl Used {
    pub(super) fn new(total: u64) -> Used {
        // No more clusters than this can be named by an entry; the rest of the file is leaked anyway.
        let bits = vec![0; total.min(WINDOW).div_ceil(64) as usize];
        Used { bits, start: 0, total: total.min(1 << 32), count: 0 }
    }

    /// Marks a cluster; false when it was marked before. Clusters outside the window count as new.
    pub(super) fn mark(&mut self, cluster: u64) -> bool {
        let Some(index) = cluster.checked_sub(self.start).filter(|i| *i < WINDOW) else { return true };
        let Some(word) = self.bits.get_mut((index / 64) as usize) else { return true };
        let bit = 1 << (index % 64);
        if *word & bit != 0 {
            return false;
        }
        *word |= bit;
        self.count += 1;
        true
    }

    /// The runs of clusters of this window, below `end`, that were not marked: first and one past the last.
    pub(super) fn gaps(&self, end: u64) -> Vec<(u64, u64)> {
        let mut gaps: Vec<(u64, u64)> = Vec::new();
        let end = end.min(self.start + WINDOW);
        let mut at = self.start;
        while at < end {
            let index = at - self.start;
            // Clear bits of the word from here on, then how many in a row.
            let free = !self.bits[(index / 64) as usize] >> (index % 64);
            let rest = 64 - index % 64;
            let used = u64::from(free.trailing_zeros()).min(rest);
            let run = u64::from((!(free.checked_shr(used as u32).unwrap_or(0))).trailing_zeros());
            let (from, to) = ((at + used).min(end), (at + used + run.min(rest - used)).min(end));
            if from < to {
                match gaps.last_mut() {
                    Some(last) if last.1 == from => last.1 = to,
                    _ => gaps.push((from, to)),
                }
            }
            at = at.saturating_add(used + run.min(rest - used));
        }
        gaps
    }

    pub(super) fn next_window(&mut self) -> bool {
        self.start += WINDOW;
        self.bits.fill(0);
        self.start < self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_the_runs_of_clear_bits() {
        let mut used = Used::new(300);
        for cluster in [0, 1, 5, 63, 64, 130, 200] {
            used.mark(cluster);
        }
        assert_eq!(used.gaps(201), [(2, 5), (6, 63), (65, 130), (131, 200)]);
        assert_eq!(used.gaps(5), [(2, 5)]);
        assert_eq!(used.gaps(250).last(), Some(&(201, 250)));
        assert_eq!(Used::new(300).gaps(300), [(0, 300)]);
        assert!(Used::new(300).gaps(0).is_empty());
    }
}
