//! A set of file clusters, one bit each.

/// A set of file clusters: one bit each, lowest first.
#[derive(Default)]
pub struct Bits {
    words: Vec<u64>,
    count: u64,
    /// No bit is set in the words before this one, so that taking the lowest does not search from 0 each time.
    from: usize,
}

impl Bits {
    /// Adds `n`; false when it was there already.
    pub fn insert(&mut self, n: u64) -> bool {
        let (word, bit) = ((n / 64) as usize, 1 << (n % 64));
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        let fresh = self.words[word] & bit == 0;
        self.words[word] |= bit;
        self.count += u64::from(fresh);
        self.from = self.from.min(word);
        fresh
    }

    /// True when `n` is in the set.
    pub fn contains(&self, n: u64) -> bool {
        self.words.get((n / 64) as usize).is_some_and(|w| w & 1 << (n % 64) != 0)
    }

    /// Removes and returns the lowest.
    pub fn take_lowest(&mut self) -> Option<u64> {
        self.take_from(0)
    }

    /// Removes and returns the lowest of those from `n` on.
    pub fn take_from(&mut self, n: u64) -> Option<u64> {
        while self.words.get(self.from) == Some(&0) {
            self.from += 1;
        }
        let first = usize::try_from(n / 64).unwrap_or(usize::MAX).max(self.from);
        for at in first..self.words.len() {
            let below = if at as u64 == n / 64 { n % 64 } else { 0 };
            let word = self.words[at] & (u64::MAX << below);
            if word != 0 {
                let member = at as u64 * 64 + u64::from(word.trailing_zeros());
                self.remove(member);
                return Some(member);
            }
        }
        None
    }

    /// Takes out `n`; false when it was not there.
    pub fn remove(&mut self, n: u64) -> bool {
        let there = self.contains(n);
        if there {
            self.words[(n / 64) as usize] &= !(1 << (n % 64));
            self.count -= 1;
        }
        there
    }

    /// Every member, lowest first.
    pub fn iter(&self) -> impl Iterator<Item = u64> {
        self.words.iter().enumerate().flat_map(|(i, word)| {
            (0..64).filter(move |bit| word & 1 << bit != 0).map(move |bit| i as u64 * 64 + bit)
        })
    }

    /// Takes out all below `n`.
    pub fn remove_below(&mut self, n: u64) {
        let keep: Vec<u64> = self.iter().filter(|member| *member >= n).collect();
        *self = Bits::default();
        keep.into_iter().for_each(|member| {
            self.insert(member);
        });
    }

    /// Takes out all from `n` on.
    pub fn remove_from(&mut self, n: u64) {
        let gone: Vec<u64> = self.iter().filter(|member| *member >= n).collect();
        gone.iter().for_each(|member| self.words[(member / 64) as usize] &= !(1 << (member % 64)));
        self.count -= gone.len() as u64;
    }

    /// The same set, each member less by `n`; none is smaller.
    pub fn moved_down(&self, n: u64) -> Bits {
        let mut moved = Bits::default();
        self.iter().for_each(|member| {
            moved.insert(member - n);
        });
        moved
    }

    /// Size of the set.
    pub fn len(&self) -> u64 {
        self.count
    }

    /// True for the empty set.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_emptied_from_the_front_is_not_searched_again() {
        let mut bits = Bits::default();
        (0..640).for_each(|n| assert!(bits.insert(n)));
        assert!((0..640).all(|n| bits.take_from(0) == Some(n)));
        assert_eq!((bits.take_from(0), bits.from), (None, 10));
        bits.insert(70);
        assert_eq!((bits.take_from(71), bits.take_from(0)), (None, Some(70)));
    }
}
