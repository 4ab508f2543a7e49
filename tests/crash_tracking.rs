//! Power cuts of an image whose changes are tracked: whatever is left, a bitmap that is trusted names every sector that is
//! not what it was when the tracking began; an image that was closed cleanly is still tracked when it opens again; and no
//! rule of the others is broken. Random histories on one file, and over a chain with snapshots, merges and growth.

#[path = "common/crash/mod.rs"]
mod crash;

use std::sync::atomic::Ordering;

use crash::campaign::{Campaign, layers, one_file};
use crash::tracked::{LOST, TRUSTED};
use crash::world::Host;

fn run(campaign: Campaign) {
    match campaign.run() {
        Ok(states) => println!("CRASH STATES {states}"),
        Err(e) => panic!("{e}"),
    }
    let (trusted, lost) = (TRUSTED.load(Ordering::Relaxed), LOST.load(Ordering::Relaxed));
    println!("bitmaps trusted {trusted}, lost {lost}");
    assert!(trusted > 50 && lost > 50, "both must be met to tell something");
}

#[test]
fn a_bitmap_that_a_power_cut_leaves_names_every_change() {
    run(Campaign { tracked: true, ..one_file() }.with_environment());
}

#[test]
fn a_bitmap_that_a_power_cut_leaves_names_every_change_also_over_live_operations() {
    run(Campaign { tracked: true, ..layers() }.with_environment());
}

#[test]
fn a_sync_that_fails_leaves_no_bitmap_that_lies() {
    let host = Host { failing_sync: 20, ..one_file().host };
    run(Campaign { tracked: true, histories: 30, seed: 2, host, ..one_file() });
}
