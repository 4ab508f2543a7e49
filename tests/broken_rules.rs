//! The crash and fault tests cannot pass by construction: with each of the rules R1 to R9 broken (feature
//! `break-rules`) they find a violation, and with none broken the same runs find none.
#![cfg(feature = "break-rules")]

mod common;
#[path = "common/crash/mod.rs"]
mod crash;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crash::campaign::{Campaign, Live, layers, one_file};
use crash::clones;
use crash::folder::{Op, clone_and_merge, enumerate, enumerate_raw};
use crash::images;
use crash::judge::{engine, judge_world};
use crash::power::Rng;
use crash::world::{Host, Record, World, empty};
use ploopfs::format::header::{Header, Version};
use ploopfs::rules::{Broken, Rule};
use ploopfs::vdisk::Image;

/// The switch is the process's: one rule at a time.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `test` with nothing broken, then with `rule` broken; returns what was found then.
#[track_caller]
fn found(rule: Rule, test: impl Fn(bool) -> Result<(), String>) -> String {
    let _alone = alone();
    if let Err(e) = test(false) {
        panic!("nothing is broken, and yet: {e}");
    }
    let broken = Broken::new(rule);
    // A broken build may meet its own assertions first: that is a finding as well.
    let result = catch_unwind(AssertUnwindSafe(|| test(true)));
    drop(broken);
    let what = match result {
        Ok(Ok(())) => panic!("{rule:?} is broken, and nothing shows it"),
        Ok(Err(what)) => what,
        Err(panic) => match panic.downcast::<String>() {
            Ok(text) => *text,
            Err(panic) => panic.downcast::<&str>().map_or_else(|_| "a panic".into(), |text| text.to_string()),
        },
    };
    println!("{rule:?} broken: {what}");
    what
}

/// The same for random histories; as many as find nothing while nothing is broken as a finding commonly takes.
#[track_caller]
fn found_by(rule: Rule, campaign: &Campaign) -> String {
    found(rule, |broken| {
        let histories = if broken { campaign.histories } else { 4 };
        Campaign { histories, ..campaign.clone() }.run().map(drop)
    })
}

#[test]
fn r1_a_mark_that_comes_after_the_first_change_is_caught() {
    let what = found_by(Rule::R1, &one_file());
    assert!(what.contains("not in use, but"), "{what}");
}

#[test]
fn r2_an_entry_that_is_ahead_of_the_file_s_end_is_caught() {
    let what = found_by(Rule::R2, &one_file());
    assert!(what.contains("the file ends at"), "{what}");
}

#[test]
fn r3_a_bat_written_before_its_data_is_synced_is_caught() {
    // The length of the new top's file is durable before: only data is missing, and hides that of the level below.
    let begin = |live: &Live| {
        (0..12).try_for_each(|n| live.write(8 * n, 8, 1 + n as u32, false))?;
        live.snapshot()?;
        live.write(0, 8, 20, false)
    };
    let go_on = |live: &Live| {
        (1..12).try_for_each(|n| live.write(8 * n, 8, 20 + n as u32, false))?;
        live.flush()
    };
    let what = found(Rule::R3, |_| cuts_of(40 * 4096, begin, go_on));
    assert!(what.contains("sector"), "{what}");
    let what = found_by(Rule::R3, &layers());
    // The sync that is left out also makes the file's length durable.
    assert!(what.contains("sector") || what.contains("the file ends at"), "{what}");
}

#[test]
fn r4_a_freed_cluster_that_is_reused_at_once_is_caught() {
    let what = found_by(Rule::R4, &one_file());
    assert!(what.contains("sector"), "{what}");
}

/// Every power cut of what `then` does to a new file, extended `extend` bytes at a time, in which all that `first` does is
/// durable.
fn cuts_of(
    extend: u64,
    first: impl Fn(&Live) -> ploopfs::Result<()>,
    then: impl Fn(&Live) -> ploopfs::Result<()>,
) -> Result<(), String> {
    let engine = engine(1000, extend);
    let header = Header::new(Version::V2, 40 * 4096, 4096).expect("a legal size");
    let world = World::new(vec![empty(header, false)], vec![vec![0]; 40 * 8]);
    let record = Record::new(world, Host { every: 1, ..Host::default() });
    let image = Image::open(&engine, "crash", record.levels()).map_err(|e| e.to_string())?;
    let live = Live { record: &record, image: &image };
    let done = image.make_writable().and_then(|()| {
        first(&live)?;
        live.flush()?;
        record.take_cuts();
        then(&live)?;
        image.close()
    });
    done.map_err(|e| e.to_string())?;
    let mut rng = Rng(1);
    for cut in record.take_cuts() {
        for _ in 0..4 {
            judge_world(&engine, &cut, &cut.left(&mut rng))?;
        }
    }
    Ok(())
}

#[test]
fn r4_a_place_that_a_defragmentation_fills_before_its_round_is_caught() {
    let back_to_front =
        |live: &Live| (0..12).rev().try_for_each(|n| live.write(8 * n, 8, 1 + n as u32, false));
    let what = found(Rule::R4, |_| cuts_of(2 * 4096, back_to_front, |live: &Live| live.defrag()));
    assert!(what.contains("sector") || what.contains("as another does"), "{what}");
}

#[test]
fn r5_a_bat_page_with_entries_of_lower_levels_is_caught() {
    found_by(Rule::R5, &layers());
}

#[test]
fn r6_an_fsync_that_joins_a_running_round_is_caught() {
    // Syncs that take a while, so that an fsync meets a round that runs.
    let host = Host { sync_takes: Duration::from_micros(300), ..one_file().host };
    let what = found_by(Rule::R6, &Campaign { host, ..one_file() });
    // A lost entry; where the close lost it, the file is longer than its BAT says.
    assert!(what.contains("sector") || what.contains("bytes long instead of"), "{what}");
}

#[test]
fn r7_a_failed_sync_that_is_forgotten_is_caught() {
    let host = Host { failing_sync: 20, ..one_file().host };
    found_by(Rule::R7, &Campaign { host, ..one_file() });
}

#[test]
fn r8_a_descriptor_that_names_a_new_file_before_it_is_synced_is_caught() {
    let scratch = common::memory_dir();
    let what = found(Rule::R8, |_| enumerate(scratch.path(), &[Op::Snapshot], 1).map(drop));
    assert!(what.contains("does not open"), "{what}");
}

#[test]
fn r8_a_step_that_goes_on_before_the_folder_is_synced_is_caught() {
    let scratch = common::memory_dir();
    found(Rule::R8, |_| enumerate(scratch.path(), &[Op::DeleteOldest], 1).map(drop));
}

#[test]
fn r8_a_file_that_goes_before_its_image_is_durably_gone_is_caught() {
    let scratch = common::memory_dir();
    let remove = [images::Op::Remove(images::Which::Layered)];
    let what = found(Rule::R8, |_| images::enumerate(scratch.path(), &remove, 1).map(drop));
    assert!(what.contains("a holds"), "{what}");
}

#[test]
fn r8_a_clone_that_has_its_name_before_its_files_are_synced_is_caught() {
    let scratch = common::memory_dir();
    for names in [&["c1"][..], &["c1", "c2"]] {
        let what = found(Rule::R8, |_| clones::enumerate(scratch.path(), names).map(drop));
        assert!(what.contains("does not open"), "{what}");
    }
}

#[test]
fn r8_a_folder_that_goes_before_the_file_beside_it_is_durable_is_caught() {
    let scratch = common::memory_dir();
    found(Rule::R8, |_| images::leave(scratch.path()).map(drop));
}

#[test]
fn r3_a_raw_base_that_takes_the_disk_before_its_data_is_synced_is_caught() {
    let scratch = common::memory_dir();
    let what = found(Rule::R3, |_| enumerate_raw(scratch.path(), &[Op::DeleteOldest], 2).map(drop));
    assert!(what.contains("sector"), "{what}");
}

#[test]
fn r9_a_change_of_a_file_that_another_descriptor_names_is_caught() {
    found(Rule::R9, |_| clone_and_merge(common::memory_dir().path()));
}
