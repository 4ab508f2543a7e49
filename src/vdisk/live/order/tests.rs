//! Moves that put clusters in order: how many, and that they end.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// Carries the plan out on a file: every step finds its place free since the last round. Returns moves and rounds.
fn carry_out(places: &[u64], at_a_time: usize) -> (u64, u64) {
    let n = places.len() as u64;
    let mut order = FileOrder::default();
    places.iter().enumerate().for_each(|(i, place)| order.push(3 * i as u64, *place));
    let (mut plan, clusters) = order.plan(at_a_time);
    assert!(clusters.iter().enumerate().all(|(rank, cluster)| *cluster as usize == 3 * rank));
    let mut used: BTreeSet<u64> = places.iter().copied().collect();
    let outside = |used: &BTreeSet<u64>| used.range(n..).count();
    let most = outside(&used).max(at_a_time);
    let (mut moves, mut rounds) = (0, 0);
    loop {
        let round = plan.next_round();
        if round.is_empty() {
            break;
        }
        assert!(round.len() <= at_a_time);
        let mut left = Vec::new();
        for step in round {
            let behind = || (n..).find(|place| !used.contains(place)).expect("endless");
            let to = step.to.unwrap_or_else(behind);
            left.push(plan.place(step.rank));
            assert!(used.insert(to), "{step:?}: the place is not free");
            plan.moved(step.rank, to);
            moves += 1;
        }
        left.iter().for_each(|place| assert!(used.remove(place)));
        assert!(outside(&used) <= most, "no more is outside at a time");
        rounds += 1;
    }
    assert!((0..n).all(|rank| plan.place(rank as usize) == rank), "all is in order");
    assert!(used.into_iter().eq(0..n));
    (moves, rounds)
}

fn shuffled(len: u64, range: u64) -> impl Strategy<Value = Vec<u64>> {
    Just((0..range).collect::<Vec<_>>()).prop_shuffle().prop_map(move |mut all| {
        all.truncate(len as usize);
        all
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_order_with_and_without_gaps_becomes_the_disk_s_in_at_most_two_moves_a_cluster(
        (places, n) in (1..200u64, 0..50u64)
            .prop_flat_map(|(n, gaps)| (shuffled(n, n + gaps), Just(n))),
        at_a_time in 1..80usize,
    ) {
        let (moves, _) = carry_out(&places, at_a_time);
        prop_assert!(moves <= 2 * n);
    }
}

#[test]
fn what_is_in_order_is_not_moved() {
    assert_eq!(carry_out(&[], 4), (0, 0));
    assert_eq!(carry_out(&(0..100).collect::<Vec<_>>(), 4), (0, 0));
}

#[test]
fn a_long_chain_moves_each_cluster_once_and_a_few_twice() {
    // The first cluster was written last.
    let n = 10_000;
    let places: Vec<u64> = (0..n).map(|i| if i == 0 { n - 1 } else { i - 1 }).collect();
    let (moves, rounds) = carry_out(&places, 64);
    assert!(moves <= n + 64 && rounds <= n / 64 + 3, "{moves} moves in {rounds} rounds");
}

#[test]
fn a_random_order_takes_little_more_than_one_move_for_each_cluster() {
    let n = 10_000;
    let mut places: Vec<u64> = (0..n).collect();
    let mut random = 1u64;
    for i in (1..places.len()).rev() {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        places.swap(i, (random >> 33) as usize % (i + 1));
    }
    let (moves, rounds) = carry_out(&places, 64);
    assert!(moves <= n + n / 20 && rounds <= n / 40, "{moves} moves in {rounds} rounds");
    let pairs: Vec<u64> = (0..n).map(|i| i ^ 1).collect();
    let (moves, rounds) = carry_out(&pairs, 64);
    assert!(moves == n * 3 / 2 && rounds <= 2 * n / 64, "{moves} moves in {rounds} rounds");
}

#[test]
fn a_rehearsal_counts_the_same_moves_and_changes_nothing() {
    let places = [7, 3, 9, 0, 1];
    let mut order = FileOrder::default();
    places.iter().for_each(|place| order.push(0, *place));
    assert_eq!(order.pieces, 4);
    let (moves, gain) = order.rehearse(2, 1000, 4, || Ok(())).expect("it goes on");
    assert_eq!(moves, carry_out(&places, 2).0);
    assert_eq!(gain, Pieces { pieces: 4, pieces_after: 1, spare: 2000 });
    let nothing = FileOrder::default().rehearse(2, 1000, 0, || Ok(())).expect("it goes on");
    assert_eq!(nothing, (0, Pieces::default()));
    let cancelled = || Err(crate::Error::new(crate::Kind::Cancelled, "cancelled"));
    assert!(FileOrder::default().rehearse(2, 1000, 0, cancelled).is_err());
}

#[test]
fn clusters_that_go_and_places_that_are_taken_leave_the_rest_in_order() {
    for at_a_time in 1..6 {
        let mut order = FileOrder::default();
        let n = 12;
        (0..n).for_each(|i| order.push(i, (5 * i + 3) % n));
        let (mut plan, _) = order.plan(at_a_time);
        let (mut steps, mut gone, mut taken) = (0, None, None);
        loop {
            let round = plan.next_round();
            if round.is_empty() {
                break;
            }
            for step in round {
                steps += 1;
                assert!(steps < 100, "it comes to an end");
                match step.to {
                    _ if steps == 2 => {
                        gone = Some(step.rank);
                        plan.gone(step.rank);
                    }
                    Some(place) if taken.is_none() => {
                        taken = Some(place);
                        plan.taken(place);
                    }
                    to => plan.moved(step.rank, to.unwrap_or(n)),
                }
            }
        }
        for rank in (0..n as usize).filter(|rank| gone != Some(*rank) && taken != Some(*rank as u64)) {
            assert_eq!(plan.place(rank), rank as u64);
        }
    }
}

/// A walk without locks: the guest discards one cluster, and another takes its place before the walk comes there.
#[test]
fn a_place_that_is_seen_twice_does_not_make_the_moves_endless() {
    for places in [&[3, 3][..], &[2, 0, 2, 1], &[1, 5, 5, 5, 0], &[0, 0, 1, 1]] {
        let mut order = FileOrder::default();
        places.iter().enumerate().for_each(|(i, place)| order.push(i as u64, *place));
        let behind = order.len();
        let (mut plan, _) = order.plan(2);
        let mut moves = 0;
        loop {
            let round = plan.next_round();
            if round.is_empty() {
                break;
            }
            moves += round.len();
            assert!(moves <= 2 * places.len(), "{places:?}");
            round.iter().for_each(|step| plan.moved(step.rank, step.to.unwrap_or(behind)));
        }
    }
}
