//! What is handed out, and when: R2, R3 and R4.

use super::*;

fn job((): ()) -> Job {
    Box::new(|| ())
}

#[test]
fn nothing_is_handed_out_before_the_file_is_extended() {
    let alloc = Allocator::new(3, 1000, 64, Bits::default());
    let mut dues = Vec::new();
    assert_eq!(alloc.take((), job, |d| dues.push(d)), Alloc::Wait);
    assert_eq!(dues, [Due::Extend]);
    assert_eq!(alloc.extension(), (3, 67));
    assert_eq!(alloc.extended(67).len(), 1);
    assert_eq!(alloc.take((), job, |_| ()), Alloc::Got(3, ()));
    assert_eq!(alloc.take((), job, |_| ()), Alloc::Got(4, ()));
}

#[test]
fn a_cluster_given_back_is_scrubbed_before_it_is_reused() {
    let alloc = Allocator::new(0, 10, 1, Bits::default());
    alloc.take((), job, |_| ());
    alloc.extended(1);
    assert_eq!(alloc.take((), job, |_| ()), Alloc::Got(0, ()));
    alloc.give_back(0);
    let mut dues = Vec::new();
    assert_eq!(alloc.take((), job, |d| dues.push(d)), Alloc::Wait);
    assert!(dues.contains(&Due::Scrub));
    let batch = alloc.scrub_batch();
    assert_eq!(batch, [0]);
    alloc.scrubbed(&batch, true);
    assert_eq!(alloc.take((), job, |_| ()), Alloc::Got(0, ()));
}

#[test]
fn a_failed_extension_is_tried_again_with_one_cluster() {
    let alloc = Allocator::new(0, 1000, 64, Bits::default());
    alloc.take((), job, |_| ());
    assert_eq!(alloc.extension(), (0, 64));
    assert!(alloc.extension_failed().0);
    assert_eq!(alloc.extension(), (0, 1));
    let (again, waiting) = alloc.extension_failed();
    assert!(!again && waiting.len() == 1);
    assert_eq!(alloc.take((), job, |_| ()), Alloc::Full(()), "no retry goes on for ever");
    alloc.retry();
    assert_eq!(alloc.take((), job, |_| ()), Alloc::Wait);
}

#[test]
fn after_a_failure_each_extension_that_works_doubles_the_next_one() {
    let alloc = Allocator::new(0, 1000, 4, Bits::default());
    alloc.take((), job, |_| ());
    assert!(alloc.extension_failed().0);
    let mut made = Vec::new();
    for _ in 0..4 {
        let (from, to) = alloc.extension();
        made.push(to - from);
        alloc.extended(to);
    }
    assert_eq!(made, [1, 2, 4, 4]);
}

#[test]
fn the_fast_path_takes_a_cluster_only_while_nothing_is_due() {
    let alloc = Allocator::new(0, 1000, 4, Bits::default());
    assert_eq!(alloc.take_in_hand(), None, "the first extension is due");
    alloc.take((), job, |_| ());
    alloc.extended(4);
    assert_eq!((alloc.take_in_hand(), alloc.take_in_hand(), alloc.take_in_hand()), (Some(0), Some(1), None));
    let mut dues = Vec::new();
    assert_eq!(alloc.take((), job, |due| dues.push(due)), Alloc::Got(2, ()));
    assert_eq!(dues, [Due::Extend], "the queued path starts the next one");
    alloc.extended(8);
    alloc.give_back(0);
    assert_eq!(alloc.take_in_hand(), None, "a scrub is due");
}

#[test]
fn the_format_s_last_cluster_is_the_limit() {
    let alloc = Allocator::new(0, 2, 64, Bits::default());
    alloc.take((), job, |_| ());
    alloc.extended(alloc.extension().1);
    assert_eq!(alloc.take((), job, |_| ()), Alloc::Got(0, ()));
    assert_eq!(alloc.take((), job, |_| ()), Alloc::Got(1, ()));
    assert_eq!(alloc.take((), job, |_| ()), Alloc::Full(()));
}

#[test]
fn a_cluster_freed_after_it_was_reserved_is_not_handed_out_again() {
    let alloc = Allocator::new(10, 1000, 64, Bits::default());
    alloc.reserve(4);
    alloc.freed(&[2, 7], true);
    alloc.freed(&[3], false);
    alloc.give_back(1);
    alloc.put_back(0);
    alloc.scrubbed(&[2], true);
    assert_eq!(alloc.take_ready(), Some(7));
    assert_eq!(alloc.take_ready(), None);
    assert!(alloc.scrub_batch().is_empty());
}

#[test]
fn while_the_tail_is_cut_off_nothing_behind_its_end_is_handed_out() {
    let alloc = Allocator::new(6, 100, 4, Bits::default());
    alloc.freed(&[1, 4, 5], true);
    let cut = alloc.begin_cut().expect("nothing is under way");
    assert_eq!((cut.end, alloc.begin_cut(), alloc.begin_scrub()), (4, None, Scrubbing::Theirs));
    assert_eq!(alloc.take_ready(), Some(1), "what lies before the end is free all the same");
    assert_eq!(alloc.take((), job, |due| panic!("{due:?} is not due")), Alloc::Wait);
    assert_eq!(alloc.end_cut(cut, true).len(), 1);
    assert_eq!(alloc.take((), job, |_| ()), Alloc::Wait);
    assert_eq!(alloc.extension(), (4, 8), "the file is extended from its new end");
}

#[test]
fn after_a_cut_that_failed_the_tail_is_scrubbed_before_it_is_reused() {
    let alloc = Allocator::new(6, 100, 4, Bits::default());
    alloc.freed(&[4, 5], true);
    let cut = alloc.begin_cut().expect("nothing is under way");
    alloc.end_cut(cut, false);
    assert_eq!((alloc.take_ready(), alloc.begin_scrub()), (None, Scrubbing::Ours));
    assert_eq!(alloc.scrub_batch(), [4, 5]);
}

#[test]
fn what_the_file_grows_by_is_durable_after_a_sync_that_began_later() {
    let alloc = Allocator::new(6, 100, 4, Bits::default());
    assert_eq!(alloc.durable_end(), 0, "nothing is known of what was there");
    alloc.begin_sync();
    alloc.extended(10);
    alloc.synced();
    assert_eq!(alloc.durable_end(), 6);
    alloc.begin_sync();
    assert_eq!(alloc.durable_end(), 6, "not before it has ended");
    alloc.synced();
    assert_eq!(alloc.durable_end(), 10);
}

#[test]
fn a_tail_that_is_cut_off_is_durable_no_more_nor_after_the_sync_under_way() {
    let alloc = Allocator::new(6, 100, 4, Bits::default());
    alloc.begin_sync();
    alloc.synced();
    alloc.freed(&[4, 5], true);
    alloc.begin_sync();
    let cut = alloc.begin_cut().expect("nothing is under way");
    assert_eq!(alloc.durable_end(), 4);
    alloc.end_cut(cut, true);
    alloc.extended(8);
    alloc.synced();
    assert_eq!(alloc.durable_end(), 4);
}

#[test]
fn a_place_is_taken_only_before_the_cluster_that_moves() {
    let alloc = Allocator::new(9, 100, 4, Bits::default());
    alloc.freed(&[3, 6], true);
    assert_eq!((alloc.take_before(5), alloc.take_before(5), alloc.take_before(7)), (Some(3), None, Some(6)));
}

#[test]
fn what_is_held_is_handed_out_by_name_and_to_guests_only_when_the_file_cannot_grow() {
    let alloc = Allocator::new(9, 20, 4, Bits::default());
    alloc.freed(&[3, 6], true);
    let held = alloc.hold();
    held.only_before(5);
    assert_eq!(alloc.take((), job, |_| ()), Alloc::Got(6, ()), "behind what is held");
    assert_eq!((alloc.take_this(3), alloc.take_this(3), alloc.take_this(4)), (Some(3), None, None));
    alloc.put_back(3);
    assert_eq!(alloc.take((), job, |_| ()), Alloc::Wait);
    alloc.extended(alloc.extension().1);
    assert_eq!((alloc.take_ready(), alloc.take_ready_from(5)), (Some(9), Some(10)));
    alloc.take((), job, |_| ());
    assert!(alloc.extension_failed().0 && !alloc.extension_failed().0);
    let got: Vec<_> = std::iter::from_fn(|| alloc.take_ready()).collect();
    assert_eq!(got.last(), Some(&3), "{got:?}");
    alloc.put_back(3);
    drop(held);
    alloc.retry();
    assert_eq!(alloc.take_ready(), Some(3), "nothing is held any more");
}

#[test]
fn the_used_end_skips_free_clusters_at_the_tail() {
    let alloc = Allocator::new(5, 10, 64, Bits::default());
    alloc.freed(&[4, 2], true);
    assert_eq!(alloc.used_end(), 4);
    alloc.freed(&[3], false);
    assert_eq!(alloc.used_end(), 2);
    assert_eq!(alloc.used(), 2);
}

/// A hole that cannot be punched is no want of space.
#[test]
fn a_failed_scrub_does_not_stop_extensions() {
    let alloc = Allocator::new(0, 1000, 4, Bits::default());
    alloc.take((), job, |_| ());
    alloc.extended(1);
    assert_eq!(alloc.take((), job, |_| ()), Alloc::Got(0, ()));
    alloc.give_back(0);
    assert_eq!(alloc.take((), job, |_| ()), Alloc::Wait);
    alloc.extended(1);
    let batch = alloc.scrub_batch();
    alloc.scrubbed(&batch, false);
    let mut dues = Vec::new();
    assert_eq!(alloc.take((), job, |due| dues.push(due)), Alloc::Wait);
    assert_eq!(dues, [Due::Extend], "and the scrub is not tried again at once");
    alloc.extended(5);
    let mut dues = Vec::new();
    assert_eq!(alloc.take((), job, |due| dues.push(due)), Alloc::Got(1, ()));
    assert!(dues.contains(&Due::Scrub), "but with the next extension: {dues:?}");
}

#[test]
fn a_state_that_breaks_a_rule_is_not_sound() {
    let state = |change: fn(&mut State)| {
        let alloc = Allocator::new(6, 100, 4, Bits::default());
        let mut s = alloc.state();
        change(&mut s);
        s.is_sound()
    };
    assert!(state(|_| ()));
    assert!(!state(|s| s.next += 1), "R2: outside the file");
    assert!(!state(|s| s.made += 1), "the file was not made so long");
    assert!(!state(|s| s.durable = s.end + 1) && !state(|s| s.syncing = s.end + 1), "R3: a cut took it back");
    assert!(!state(|s| s.reserved = 7), "what is under the BAT can be handed out");
    assert!(!state(|s| s.next = u64::from(s.stale.insert(0)) - 1), "free, and never handed out");
    assert!(!state(|s| s.waiting.push(job(()))), "nothing will wake it");
    assert!(!state(|s| s.pace = 0), "an extension by nothing");
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "is free already")]
fn a_cluster_that_is_freed_twice_is_caught() {
    let alloc = Allocator::new(6, 100, 4, Bits::default());
    alloc.freed(&[4], true);
    alloc.give_back(4);
}
