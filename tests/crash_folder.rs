//! Power cuts during operations over several files (R8), on a real folder whose names are recorded with its files: after
//! any step, with any of the unsynced names and contents lost, the image opens with the old state or the new one, every
//! snapshot that must be there is, an interrupted merge can be finished, and no file is left over. Likewise for images that
//! get another name, are removed or are cloned.
#![cfg(feature = "break-rules")]

mod common;
#[path = "common/crash/mod.rs"]
mod crash;

use std::time::Instant;

use crash::clones;
use crash::folder::{OPS, Op, clone_and_merge, enumerate, enumerate_raw};
use crash::images;

#[test]
fn every_power_cut_of_every_short_history_of_a_folder_leaves_the_disk_and_its_snapshots() {
    let (scratch, began) = (common::memory_dir(), Instant::now());
    let longest = if common::long() { 3 } else { 2 };
    match enumerate(scratch.path(), &OPS, longest) {
        Ok((histories, states)) => println!(
            "CRASH STATES {states} of {histories} histories over a folder in {} s",
            began.elapsed().as_secs()
        ),
        Err(e) => panic!("{e}"),
    }
}

/// FAULTS 70: what has changed goes down into a raw base, which alone is a snapshot until then.
#[test]
fn every_power_cut_of_every_short_history_over_a_raw_file_leaves_the_disk_and_its_snapshots() {
    let (scratch, began) = (common::memory_dir(), Instant::now());
    let of = [Op::Write, Op::Snapshot, Op::DeleteOldest, Op::DeleteNewest, Op::Switch, Op::Grow];
    let longest = if common::long() { 3 } else { 2 };
    match enumerate_raw(scratch.path(), &of, longest) {
        Ok((histories, states)) => println!(
            "CRASH STATES {states} of {histories} histories over a raw file in {} s",
            began.elapsed().as_secs()
        ),
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn every_power_cut_while_an_image_becomes_a_raw_file_again_leaves_it_once_and_whole() {
    match images::leave(common::memory_dir().path()) {
        Ok(states) => println!("CRASH STATES {states} of a folder that becomes a raw file"),
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn every_power_cut_while_images_are_renamed_or_removed_leaves_each_of_them_whole_or_gone_and_nothing_else() {
    let (scratch, began) = (common::memory_dir(), Instant::now());
    let longest = if common::long() { 4 } else { 3 };
    match images::enumerate(scratch.path(), &images::OPS, longest) {
        Ok((histories, states)) => println!(
            "CRASH STATES {states} of {histories} histories over an images folder in {} s",
            began.elapsed().as_secs()
        ),
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn every_power_cut_while_clones_are_made_leaves_each_of_them_whole_or_not_there_and_nothing_else() {
    let (scratch, began) = (common::memory_dir(), Instant::now());
    for names in [&["c1"][..], &["c1", "c2", "c3"]] {
        match clones::enumerate(scratch.path(), names) {
            Ok(states) => {
                println!("CRASH STATES {states} of {} clones in {} s", names.len(), began.elapsed().as_secs())
            }
            Err(e) => panic!("{e}"),
        }
    }
}

#[test]
fn clones_that_have_their_names_stay_where_the_next_name_is_taken_meanwhile_and_are_said_to_be_there() {
    clones::taken_between(common::memory_dir().path()).expect("as it was said");
}

#[test]
fn a_clone_keeps_its_content_while_its_origin_merges_the_file_they_share() {
    let scratch = common::memory_dir();
    clone_and_merge(scratch.path()).expect("the clone is as it was");
}
