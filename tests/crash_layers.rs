//! Power cuts in memory during live operations: snapshots, merges in both directions and growing. After any host
//! operation on any file, with any part of what was not synced lost in each, the chain that the descriptor names opens,
//! every sector of the live disk holds an allowed value, and every snapshot has what the disk had when it was taken.
//! Random histories over a chain; `common/crash` has the machinery.
//!
//! The descriptor itself is taken to change at once and durably, as `image::store` does it (with tests of its own).

#[path = "common/crash/mod.rs"]
mod crash;

use std::sync::atomic::Ordering;

use crash::campaign::{Campaign, FLIPS, layers};
use crash::world::Host;

#[test]
fn every_power_cut_during_live_operations_leaves_the_disk_and_its_snapshots() {
    match layers().with_environment().run() {
        Ok(states) => println!("CRASH STATES {states}"),
        Err(e) => panic!("{e}"),
    }
    assert!(FLIPS.load(Ordering::Relaxed) > 0, "no merge went the other way");
}

#[test]
fn a_sync_that_fails_during_live_operations_loses_nothing_that_an_earlier_one_saved() {
    let host = Host { failing_sync: 40, ..layers().host };
    match (Campaign { histories: 30, seed: 2, host, ..layers() }).run() {
        Ok(states) => println!("CRASH STATES {states}"),
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn live_operations_without_fdatasync_are_caught() {
    let host = Host { skip_sync: true, ..layers().host };
    Campaign { host, ..layers() }.run().expect_err("files that never sync must lose something");
}
