//! A full host: parked writes, the modes, and the way back (docs/design.md#a-full-host).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ploopfs::Kind;
use ploopfs::format::header::IN_USE;
use ploopfs::vdisk::{Engine, ImageEvent, Mode, Options};

use super::rig::{
    CLUSTER, Call, Pending, Rig, SECTOR, empty_file, errno, failing_at_once, header, options, until,
};

/// An image with clusters 0 to 3 full of 1, synced.
fn started(options: Options) -> Rig {
    let rig = Rig::new(options);
    for n in 0..4 {
        rig.fill(n, 1).expect("writes");
    }
    rig.flush().expect("syncs");
    rig
}

/// Data that is not written yet finds no room on the host: clusters already written do. Returns the switch.
fn full(rig: &Rig) -> Arc<AtomicBool> {
    let used: Vec<u64> = (0..40).filter_map(|n| rig.entry(n)).collect();
    let (is_data, switch) = (rig.is_data(), Arc::new(AtomicBool::new(true)));
    let on = Arc::clone(&switch);
    rig.file.rule(move |call| match call {
        Call::Write { at, .. } if is_data(call) && on.load(Ordering::SeqCst) => {
            let inside = used.iter().any(|u| (*u..u + CLUSTER).contains(&at));
            if inside { Ok(()) } else { errno(libc::ENOSPC) }
        }
        _ => Ok(()),
    });
    switch
}

fn count(rig: &Rig, which: fn(&ImageEvent) -> bool) -> usize {
    rig.events().iter().filter(|e| which(e)).count()
}

fn is_full(event: &ImageEvent) -> bool {
    matches!(event, ImageEvent::Full { .. })
}

fn is_space(event: &ImageEvent) -> bool {
    matches!(event, ImageEvent::Space { .. })
}

fn no_space(pending: &Pending<()>) {
    assert_eq!(pending.answer().expect_err("no space").kind(), Kind::NoSpace);
}

#[test]
fn a_write_without_space_is_parked_everything_else_goes_on_and_it_ends_when_space_is_back() {
    let rig = started(options());
    let switch = full(&rig);
    let parked: Vec<_> = (10..13).map(|n| rig.start_fill(n, n as u8)).collect();
    until("three parked writes", || rig.image.stats().queued == 3);
    assert_eq!(rig.image.mode(), Mode::FullQueue);
    rig.fill(1, 5).expect("a write in place");
    assert_eq!(rig.byte(1), 5);
    rig.flush().expect("an fsync does not wait for them");
    rig.image.freeze();
    rig.image.thaw();
    assert!(parked[0].waits());
    let calls = rig.file.log().len();
    switch.store(false, Ordering::SeqCst);
    parked.iter().for_each(|w| w.answer().expect("space is back"));
    let places: Vec<u64> = {
        rig.flush().expect("syncs");
        (10..13).filter_map(|n| rig.entry(n)).collect()
    };
    let written: Vec<u64> = rig.file.log()[calls..]
        .iter()
        .filter_map(|(call, ok)| match call {
            Call::Write { at, .. } if *ok && places.contains(at) => Some(*at),
            _ => None,
        })
        .collect();
    // One tries whether there is space; where that works, the others run side by side.
    assert_eq!((written.len(), written.first()), (3, places.first()), "the first that came, then the others");
    assert!(places.iter().all(|place| written.contains(place)), "{written:x?}, {places:x?}");
    assert_eq!((count(&rig, is_full), count(&rig, is_space)), (1, 1));
    assert_eq!((rig.image.mode(), rig.image.stats().queued), (Mode::Write, 0));
    rig.close();
}

#[test]
fn a_parked_write_fails_after_the_timeout_and_the_mode_turns() {
    let rig = started(Options { full_timeout: Some(Duration::from_secs(1)), ..options() });
    let switch = full(&rig);
    let parked = [rig.start_fill(10, 1), rig.start_fill(11, 1)];
    parked.iter().for_each(no_space);
    assert_eq!(rig.image.mode(), Mode::FullError);
    let begun = Instant::now();
    no_space(&rig.start_fill(12, 1));
    assert!(begun.elapsed() < Duration::from_millis(700), "the next one fails at once");
    switch.store(false, Ordering::SeqCst);
    rig.fill(13, 7).expect("space is back");
    assert_eq!(rig.image.mode(), Mode::Write);
    assert_eq!((count(&rig, is_full), count(&rig, is_space)), (1, 1));
    rig.close();
}

#[test]
fn a_write_without_space_fails_at_once_where_that_was_asked_for() {
    let rig = started(failing_at_once());
    let switch = full(&rig);
    no_space(&rig.start_fill(10, 1));
    no_space(&rig.start_fill(11, 1));
    assert_eq!((rig.image.mode(), rig.image.stats().queued), (Mode::FullError, 0));
    assert_eq!(count(&rig, is_full), 1);
    rig.fill(1, 5).expect("a write in place");
    switch.store(false, Ordering::SeqCst);
    rig.fill(10, 2).expect("space is back");
    assert_eq!(rig.image.mode(), Mode::Write);
    assert_eq!([rig.byte(10), rig.byte(11)], [2, 0]);
    rig.close();
}

#[test]
fn writes_work_again_after_an_extension_failed_where_nothing_is_parked() {
    let rig = started(failing_at_once());
    let full = Arc::new(AtomicBool::new(true));
    let on = Arc::clone(&full);
    rig.file.rule(move |call| match call {
        Call::SetLen(_) if on.load(Ordering::SeqCst) => errno(libc::ENOSPC),
        _ => Ok(()),
    });
    let failed = (4..40).find(|n| rig.fill(*n, 1).is_err()).expect("the file cannot grow");
    full.store(false, Ordering::SeqCst);
    // The one that asks may still be told no; it is what makes the file tried again.
    until("space", || rig.fill(failed, 1).is_ok());
    assert_eq!(rig.image.mode(), Mode::Write);
    rig.close();
}

#[test]
fn an_extension_that_does_not_fit_is_tried_with_one_cluster() {
    let rig = started(Options { extend: 16 * CLUSTER, ..failing_at_once() });
    let limit = rig.geometry.first + 36 * CLUSTER;
    rig.file.rule(move |call| match call {
        Call::SetLen(len) if len > limit => errno(libc::ENOSPC),
        _ => Ok(()),
    });
    for n in 4..36 {
        rig.fill(n, 2).expect("it fits");
    }
    no_space(&rig.start_fill(36, 2));
    rig.close();
}

#[test]
fn a_sixteenth_of_the_background_requests_is_parked_and_the_rest_fails() {
    let rig = started(Options { background: 64, ..options() });
    let switch = full(&rig);
    let parked: Vec<_> = (10..14).map(|n| rig.start_fill(n, 1)).collect();
    until("four parked writes", || rig.image.stats().queued == 4);
    no_space(&rig.start_fill(14, 1));
    until("the four, one of which may just be tried again", || rig.image.stats().queued == 4);
    switch.store(false, Ordering::SeqCst);
    parked.iter().for_each(|w| w.answer().expect("space is back"));
    rig.close();
}

#[test]
fn a_quarter_of_the_background_requests_is_parked_over_all_images() {
    let engine = Engine::new(Options { background: 16, ..options() }, Box::new(|_| ()));
    let rigs: Vec<Rig> =
        (0..5).map(|_| Rig::open_with(empty_file(40), "", &engine, Arc::default()).expect("opens")).collect();
    rigs.iter().for_each(|rig| rig.fill(0, 1).and_then(|()| rig.flush()).expect("writes"));
    let switches: Vec<_> = rigs.iter().map(full).collect();
    let parked: Vec<_> = rigs[..4].iter().map(|rig| rig.start_fill(9, 1)).collect();
    until("one parked write each", || rigs[..4].iter().all(|rig| rig.image.stats().queued == 1));
    no_space(&rigs[4].start_fill(9, 1));
    switches.iter().for_each(|s| s.store(false, Ordering::SeqCst));
    parked.iter().for_each(|w| w.answer().expect("space is back"));
    rigs.iter().for_each(Rig::close);
}

#[test]
fn freed_clusters_wake_parked_writes_without_waiting_for_the_bat_s_delay() {
    // An hour until the BAT is written by itself.
    let rig = started(options());
    let _switch = full(&rig);
    let parked = rig.start_fill(10, 9);
    until("a parked write", || rig.image.stats().queued == 1);
    rig.discard(2 * CLUSTER, CLUSTER).expect("discards");
    parked.answer().expect("the host is full, but a cluster is free");
    assert_eq!((rig.byte(10), rig.byte(2)), (9, 0));
    rig.close();
}

#[test]
fn parked_writes_that_were_woken_in_vain_keep_their_order() {
    let rig = started(options());
    let _switch = full(&rig);
    let mut parked = Vec::new();
    for n in 10..14 {
        parked.push(rig.start_fill(n, n as u8));
        // One by one: side by side they would be parked in any order.
        until("it to be parked", || rig.image.stats().queued == n - 9);
    }
    // Room for one, twice: each time the one that has waited longest gets it.
    for (turn, n) in [(0, 10), (1, 11)] {
        rig.discard(turn * CLUSTER, CLUSTER).expect("discards");
        parked[turn as usize].answer().expect("a cluster is free");
        assert_eq!(rig.byte(n), n as u8);
        until("the others to be parked again", || rig.image.stats().queued == 3 - turn);
    }
    rig.image.close().expect("closes");
    no_longer(&parked[2..]);
}

fn no_longer(parked: &[Pending<()>]) {
    for write in parked {
        write.answer().expect_err("the image is closed");
    }
}

#[test]
fn close_fails_parked_writes_and_saves_the_rest() {
    let rig = started(options());
    let _switch = full(&rig);
    let parked = [rig.start_fill(10, 1), rig.start_fill(11, 1)];
    until("two parked writes", || rig.image.stats().queued == 2);
    rig.close();
    no_longer(&parked);
    assert_eq!(rig.reopened().byte(0), 1);
}

#[test]
fn a_sync_failure_fails_parked_writes() {
    let rig = started(options());
    let is_data = rig.is_data();
    let broken = Arc::new(AtomicBool::new(false));
    let on = Arc::clone(&broken);
    rig.file.rule(move |call| match call {
        Call::Sync if on.load(Ordering::SeqCst) => errno(libc::EIO),
        _ if is_data(call) && !on.load(Ordering::SeqCst) => errno(libc::ENOSPC),
        _ => Ok(()),
    });
    let parked = rig.start_fill(10, 1);
    until("a parked write", || rig.image.stats().queued == 1);
    broken.store(true, Ordering::SeqCst);
    rig.flush().expect_err("the sync fails");
    parked.answer().expect_err("nothing stays parked on a read-only image");
    assert_eq!(rig.image.mode(), Mode::ReadOnly);
    assert_eq!(header(&rig.memory).in_use, IN_USE);
}

#[test]
fn a_write_in_place_may_find_no_space_either_and_is_parked() {
    let rig = started(options());
    let (is_data, full) = (rig.is_data(), Arc::new(AtomicBool::new(true)));
    let on = Arc::clone(&full);
    rig.file.rule(
        move |call| if is_data(call) && on.load(Ordering::SeqCst) { errno(libc::ENOSPC) } else { Ok(()) },
    );
    assert!(rig.image.try_write(0, &[7; 512]).is_none(), "the queue decides");
    let parked = rig.start_write(0, vec![7; SECTOR as usize], false);
    until("a parked write", || rig.image.stats().queued == 1);
    assert_eq!(rig.image.mode(), Mode::FullQueue);
    assert_eq!(rig.byte(0), 1);
    full.store(false, Ordering::SeqCst);
    parked.answer().expect("space is back");
    assert_eq!(rig.read(0, SECTOR).expect("reads"), vec![7; SECTOR as usize]);
    assert_eq!(rig.image.mode(), Mode::Write);
    rig.close();
}

#[test]
fn the_first_write_of_an_image_is_parked_when_the_mark_finds_no_space() {
    let rig = Rig::open(empty_file(40), "full", options()).expect("opens");
    let parked = rig.start_fill(0, 7);
    until("a parked write", || rig.image.stats().queued == 1);
    assert_eq!(rig.image.mode(), Mode::FullQueue);
    rig.plan.set_full(false);
    parked.answer().expect("space is back");
    rig.close();
}

#[test]
fn a_bat_write_without_space_is_the_mode_and_not_a_failure() {
    let rig = started(options());
    let (is_bat, full) = (rig.is_bat(), Arc::new(AtomicBool::new(true)));
    let on = Arc::clone(&full);
    rig.file.rule(
        move |call| if is_bat(call) && on.load(Ordering::SeqCst) { errno(libc::ENOSPC) } else { Ok(()) },
    );
    rig.fill(10, 2).expect("the data fits");
    let flush = rig.start_flush();
    until("the mode", || rig.image.mode() == Mode::FullQueue);
    assert!(flush.waits());
    full.store(false, Ordering::SeqCst);
    flush.answer().expect("space is back");
    assert_eq!(rig.image.mode(), Mode::Write);
    assert_eq!((count(&rig, is_full), count(&rig, is_space)), (1, 1));
    rig.close();
}

#[test]
fn a_bat_write_without_space_fails_the_fsync_once_per_request_where_writes_fail_at_once() {
    let rig = Rig::new(Options { bat_delay: Duration::ZERO, ..failing_at_once() });
    let (is_bat, full) = (rig.is_bat(), Arc::new(AtomicBool::new(true)));
    let (on, tries) = (Arc::clone(&full), Arc::new(AtomicU64::new(0)));
    let counted = Arc::clone(&tries);
    rig.file.rule(move |call| {
        if is_bat(call) && on.load(Ordering::SeqCst) {
            counted.fetch_add(1, Ordering::SeqCst);
            return errno(libc::ENOSPC);
        }
        Ok(())
    });
    rig.fill(10, 2).expect("the data fits");
    assert_eq!(rig.flush().expect_err("the entry does not").kind(), Kind::NoSpace);
    assert_eq!(rig.image.mode(), Mode::FullError);
    std::thread::sleep(Duration::from_millis(300));
    assert!(tries.load(Ordering::SeqCst) < 10, "nobody spins on a full host");
    assert_eq!(count(&rig, is_full), 1, "and it is told once");
    full.store(false, Ordering::SeqCst);
    rig.flush().expect("space is back");
    assert_eq!(rig.image.mode(), Mode::Write);
    rig.close();
}

#[test]
fn close_ends_while_allocations_wait_for_pages_that_no_space_can_clean() {
    // 16 pages are the least a cache holds, 8 of them may be dirty; one entry in each of 12 pages is wanted.
    let clusters = 12 * 1024;
    let rig = Rig::open(empty_file(clusters), "", Options { bat_cache: 0, ..options() }).expect("opens");
    let is_bat = rig.is_bat();
    rig.file.rule(move |call| if is_bat(call) { errno(libc::ENOSPC) } else { Ok(()) });
    let writes: Vec<_> = (0..11).map(|page| rig.start_fill(page * 1024 + 100, 1)).collect();
    until("the mode", || rig.image.mode() == Mode::FullQueue);
    let image = Arc::clone(&rig.image);
    let closed = Pending::start(move |reply| drop(std::thread::spawn(move || reply(image.close()))));
    closed.answer().expect_err("the BAT cannot be written");
    for write in writes {
        let _ = write.answer();
    }
}
