//! Power cuts in memory: after any host operation, with any part of what was not synced lost, the image opens,
//! its BAT is sound, every sector holds an allowed value, and what an fsync or an O_DSYNC write acknowledged is there.
//! Random histories on one file; `common/crash` has the machinery.

#[path = "common/crash/mod.rs"]
mod crash;

use crash::campaign::{Campaign, one_file};
use crash::world::Host;

#[test]
fn every_power_cut_leaves_a_sound_image_with_all_that_was_synced() {
    match one_file().with_environment().run() {
        Ok(states) => println!("CRASH STATES {states}"),
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn a_sync_that_fails_loses_nothing_that_an_earlier_one_saved() {
    let host = Host { failing_sync: 20, ..one_file().host };
    match (Campaign { histories: 30, seed: 2, host, ..one_file() }).run() {
        Ok(states) => println!("CRASH STATES {states}"),
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn a_build_without_fdatasync_is_caught() {
    let host = Host { skip_sync: true, ..one_file().host };
    Campaign { host, ..one_file() }.run().expect_err("a file that never syncs must lose something");
}
