//! Which requests were executed when a daemon died by its own fault, and what its successor does about it
//! (docs/restart.md#deaths).
//!
//! A request, or the opening of an image, is known by a number ([`Work`]) that stands in the ledger as long as a thread
//! executes it (`running`). What several deaths in a row have in common is executed apart, and then refused.

use std::collections::HashSet;
use std::sync::atomic::Ordering;

use super::Ledger;
use super::layout::{ALONE, APART, MOST_REFUSED, THREADS};

/// A request by its number, or the opening of an image. 0: nothing.
pub type Work = u64;

/// Numbers of requests do not have this bit (the kernel marks with it those that it sends again).
const OPENING: u64 = 1 << 63;

/// The opening of the image with this number.
pub fn opening(image: u64) -> Work {
    OPENING | image
}

/// It, in words.
pub fn spelled(work: Work) -> String {
    if work & OPENING != 0 {
        format!("the opening of image {}", work & !OPENING)
    } else {
        format!("request {work}")
    }
}

/// What the deaths so far say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Executed at the last death.
    pub suspects: HashSet<Work>,
    /// The suspects were executed at two deaths in a row: each is executed alone.
    pub apart: bool,
    /// Was alone at a death: never executed again.
    pub refused: Vec<Work>,
    /// That which the last death adds to them.
    pub convicted: Option<Work>,
}

impl Ledger {
    /// Judges the last death, once, and forgets what the dead daemon has executed. `faults`: so many in a row died by their own
    /// fault, the last one included; 0: that one did not.
    ///
    /// The order: (1) the verdict stands in the ledger; (2) what was executed is forgotten. 2 before 1: a daemon that dies
    /// between them would leave its successor nothing to judge by.
    pub fn judge_deaths(&self, faults: u32) -> Verdict {
        let executed: HashSet<Work> = (0..THREADS)
            .map(|place| self.word(self.layout.thread(place)).load(Ordering::Acquire))
            .filter(|work| *work != 0)
            .collect();
        let alone = self.death_word(ALONE).load(Ordering::Acquire);
        let before = self.verdict();
        let mut verdict = before.clone();
        if faults == 0 {
            // It was killed: that says nothing of what it did.
        } else if alone != 0 {
            verdict.suspects.remove(&alone);
            verdict.refused.retain(|work| *work != alone);
            verdict.refused.push(alone);
            verdict.convicted = Some(alone);
        } else {
            let both: HashSet<Work> = verdict.suspects.intersection(&executed).copied().collect();
            verdict.apart = faults > 1 && !both.is_empty();
            verdict.suspects = if verdict.apart { both } else { executed };
        }
        verdict.apart &= !verdict.suspects.is_empty();
        self.keep_verdict(&verdict); // 1
        self.death_word(ALONE).store(0, Ordering::Release);
        for place in 0..THREADS {
            let word = self.word(self.layout.thread(place));
            // A page that was never touched stays so.
            if word.load(Ordering::Relaxed) != 0 {
                word.store(0, Ordering::Release);
            }
        } // 2
        verdict
    }

    /// What stands there.
    pub fn verdict(&self) -> Verdict {
        let all = |words: std::ops::Range<usize>| {
            words.map(|at| self.word(at).load(Ordering::Acquire)).filter(|work| *work != 0)
        };
        Verdict {
            suspects: all(self.layout.suspects()).collect(),
            apart: self.death_word(APART).load(Ordering::Acquire) != 0,
            refused: all(self.layout.refused()).collect(),
            convicted: None,
        }
    }

    fn keep_verdict(&self, verdict: &Verdict) {
        let put = |words: std::ops::Range<usize>, all: &mut dyn Iterator<Item = Work>| {
            for at in words {
                let work = all.next().unwrap_or(0);
                if self.word(at).load(Ordering::Relaxed) != work {
                    self.word(at).store(work, Ordering::Release);
                }
            }
        };
        // Refused before it is no suspect any more: dead between the two, it is both.
        let first = verdict.refused.len().saturating_sub(MOST_REFUSED);
        put(self.layout.refused(), &mut verdict.refused[first..].iter().copied());
        put(self.layout.suspects(), &mut verdict.suspects.iter().copied());
        self.death_word(APART).store(u64::from(verdict.apart), Ordering::Release);
    }

    /// Nothing is executed apart any more.
    pub(super) fn end_apart(&self) {
        self.death_word(APART).store(0, Ordering::Release);
    }

    /// `work` is executed, and nothing else; 0: no longer.
    pub(super) fn alone(&self, work: Work) {
        self.death_word(ALONE).store(work, Ordering::Release);
    }

    fn death_word(&self, word: u64) -> &std::sync::atomic::AtomicU64 {
        self.word(self.layout.death(word))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Sizes, format};
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    fn ledger() -> Arc<Ledger> {
        let sizes = Sizes { numbers: 1, opens: 1, images: 1, pages: 1, snapshots: 1 };
        let words = sizes.bytes().expect("small") / 8;
        let memory: Vec<AtomicU64> = (0..words).map(|_| AtomicU64::new(0)).collect();
        format(&memory, sizes).expect("room");
        Arc::new(Ledger::attach(Box::new(memory)).expect("a ledger"))
    }

    /// A daemon dies while it executes these.
    fn dies(ledger: &Ledger, executed: &[Work], alone: Work, faults: u32) -> Verdict {
        for (place, work) in (0..).zip(executed) {
            ledger.word(ledger.layout.thread(place)).store(*work, Ordering::Relaxed);
        }
        ledger.alone(alone);
        ledger.judge_deaths(faults)
    }

    #[test]
    fn what_two_deaths_have_in_common_is_executed_apart_and_what_was_alone_at_the_third_is_refused() {
        let ledger = ledger();
        assert!(!dies(&ledger, &[2, 4, 6], 0, 1).apart);
        let second = dies(&ledger, &[4, 8, 6], 0, 2);
        assert_eq!((second.suspects, second.apart), (HashSet::from([4, 6]), true));
        let third = dies(&ledger, &[6], 6, 3);
        assert_eq!((third.convicted, third.refused), (Some(6), vec![6]));
        // What is left of them stays apart: it may be as bad.
        assert_eq!((third.suspects, third.apart), (HashSet::from([4]), true));
        let fourth = dies(&ledger, &[4], 4, 4);
        assert_eq!((fourth.refused, fourth.apart), (vec![6, 4], false));
    }

    #[test]
    fn a_daemon_that_was_killed_accuses_nothing() {
        let ledger = ledger();
        dies(&ledger, &[2, 4], 0, 1);
        let killed = dies(&ledger, &[2, 4], 4, 0);
        assert_eq!((killed.apart, killed.convicted), (false, None));
        // And acquits nothing.
        assert!(dies(&ledger, &[4], 0, 2).apart);
        assert_eq!(dies(&ledger, &[4], 4, 0).convicted, None);
        assert!(ledger.verdict().apart);
        assert_eq!(dies(&ledger, &[4], 4, 3).convicted, Some(4));
    }

    #[test]
    fn a_death_at_the_start_begins_anew() {
        let ledger = ledger();
        dies(&ledger, &[4], 0, 1);
        assert!(!dies(&ledger, &[], 0, 2).apart);
        assert!(!dies(&ledger, &[4], 0, 3).apart);
        assert!(dies(&ledger, &[4], 0, 4).apart);
    }

    #[test]
    fn a_death_is_judged_once() {
        let ledger = ledger();
        dies(&ledger, &[4], 0, 1);
        // The successor was killed before it did anything: what it found is as it was.
        assert_eq!(ledger.judge_deaths(0).suspects, HashSet::from([4]));
    }

    #[test]
    fn the_last_ones_that_were_refused_are_kept() {
        let ledger = ledger();
        for work in 1..=70 {
            dies(&ledger, &[work], work, 3);
        }
        let refused = ledger.verdict().refused;
        assert_eq!((refused.len(), refused.first(), refused.last()), (64, Some(&7), Some(&70)));
    }
}
