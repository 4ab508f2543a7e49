//! See `memory`.

use super::*;
use crate::fuse::ops::Errno;
use crate::fuse::uring::exchange::Exchange;

fn entries(depth: u32) -> Arc<Entries> {
    Arc::new(Entries::new(7, &[Queue { id: 3, depth }]).expect("memory"))
}

/// As if the kernel had just completed it.
fn held(entries: &Arc<Entries>, index: u32) -> HeldEntry {
    entries.begins(index);
    entries.goes(index);
    // SAFETY: no kernel knows these entries, and no test holds an index twice.
    unsafe { entries.came(index) }.expect("the kernel had it")
}

#[test]
fn a_queue_of_which_more_than_half_is_out_gets_more_entries_with_memory_of_their_own() {
    let entries = entries(4);
    entries.adopt_thread();
    let mut begun: Vec<_> = (0..4).map(|index| held(&entries, index)).collect();
    assert_eq!(entries.crowded().collect::<Vec<_>>(), [(0, 4, 0)]);
    begun.drain(2..).for_each(|held| held.send(Ok(0)));
    (2..4).for_each(|index| entries.goes(index));
    assert_eq!(entries.crowded().count(), 0, "half of it is no crowd");
    let added = entries.add(0).expect("memory");
    assert_eq!((added.clone(), entries.count()), (4..4 + ADDED, 4 + ADDED));
    assert!(added.clone().all(|index| entries.queue(index) == 3));
    for index in [4, 3 + ADDED] {
        let mut one = held(&entries, index);
        one.payload_mut().fill(index as u8);
        one.pretend(&[7; 40], &[], &[], 0);
        assert_eq!(one.parts().header[..40], [7; 40]);
        assert!(one.payload().iter().all(|byte| *byte == index as u8));
        begun.push(one);
    }
    assert!(begun[0].payload()[0] == 0 && begun[2].payload()[PAYLOAD - 1] == 4, "each has its own");
    let place = entries.places(4 + ADDED - 1).map(|place| place.iov_base as usize);
    assert_ne!(place, entries.places(3).map(|place| place.iov_base as usize));
    for full in 1.. {
        if entries.add(0).is_err() {
            assert_eq!(full * ADDED, MOST, "so many and no more");
            break;
        }
    }
    OWN.set(ptr::null());
}

#[test]
fn the_rings_thread_is_called_once_when_another_one_makes_a_queue_crowded() {
    let entries = entries(6);
    let begun: Vec<_> = (0..6).map(|index| held(&entries, index)).collect();
    let mut count = [0; 8];
    rustix::io::read(entries.wake(), &mut count).expect("called");
    assert_eq!(u64::from_ne_bytes(count), 1);
    assert_eq!(entries.crowded().count(), 1);
    begun.into_iter().for_each(|held| held.send(Ok(0)));
    assert_eq!(entries.answered().len(), 6);
}

#[test]
fn a_payload_size_beyond_the_room_is_no_payload() {
    let entries = entries(2);
    let mut held = held(&entries, 1);
    held.pretend(&[1; 40], &[2; 128], b"abcd", 4);
    assert_eq!(held.parts().payload, b"abcd");
    held.pretend(&[1; 40], &[2; 128], b"abcd", PAYLOAD as u32 + 1);
    assert_eq!(held.parts().payload, b"");
    held.pretend(&[1; 40], &[2; 128], b"abcd", u32::MAX);
    assert_eq!(held.parts().payload, b"");
}

#[test]
fn an_answer_from_another_thread_wakes_the_rings_thread_and_one_of_its_own_does_not() {
    let entries = entries(3);
    entries.adopt_thread();
    held(&entries, 0).send(Ok(0));
    let (second, third) = (held(&entries, 1), held(&entries, 2));
    let thread = std::thread::spawn(move || {
        second.send(Err(Errno(libc::EIO)));
        third.send(Ok(3));
    });
    thread.join().expect("no panic");
    let mut count = [0; 8];
    rustix::io::read(entries.wake(), &mut count).expect("called");
    assert_eq!(u64::from_ne_bytes(count), 1, "once for both");
    let mut answered = VecDeque::new();
    entries.take_answered(&mut answered);
    let places = answered.iter().map(|a| a.place).collect::<Vec<_>>();
    assert_eq!(places, [0, 1, 2].map(|index| EntryId { home: 7, index }));
    entries.take_answered(&mut answered);
    assert_eq!(answered.len(), 3, "each once");
    OWN.set(ptr::null());
}

#[test]
fn an_answer_given_for_all_rings_stays_on_the_thread_and_wakes_nobody() {
    let (own, others) = (entries(1), entries(2));
    own.adopt_thread();
    answering_here(|| held(&others, 1).send(Ok(0)));
    held(&others, 0).send(Ok(0));
    let mut answered = VecDeque::new();
    own.take_answered(&mut answered);
    assert_eq!(answered.iter().map(|a| a.place.index).collect::<Vec<_>>(), [1]);
    others.take_answered(&mut answered);
    assert_eq!(answered.iter().map(|a| a.place.index).collect::<Vec<_>>(), [1, 0]);
    OWN.set(ptr::null());
}

#[test]
fn an_entry_is_taken_over_once_and_the_last_that_ends_calls() {
    let entries = entries(2);
    assert!(!entries.are_live());
    (0..2).for_each(|index| entries.begins(index));
    // SAFETY: no kernel knows these entries; the second call takes nothing.
    let (first, second) = unsafe { (entries.came(1), entries.came(1)) };
    assert!(first.is_some() && second.is_none());
    assert!(!entries.ends(1), "it is ours");
    entries.goes(1);
    assert!(entries.ends(0) && entries.are_live() && entries.ends(1) && !entries.are_live());
    assert!(!entries.ends(2) && !entries.is_ours(2), "there is none");
    let mut count = [0; 8];
    rustix::io::read(entries.wake(), &mut count).expect("called");
}

/// Kilobytes of huge pages in the mapping of these entries.
fn huge(entries: &Entries) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").expect("our own");
    let (mut inside, mut sum) = (false, 0);
    for line in maps.lines() {
        let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
        if let Some(start) = range.and_then(|(start, _)| usize::from_str_radix(start, 16).ok()) {
            let base = entries.first.base.as_ptr() as usize;
            inside = (base..base + entries.first.len).contains(&start);
        } else if let (true, Some(rest)) = (inside, line.strip_prefix("AnonHugePages:")) {
            sum += rest.trim_end_matches("kB").trim().parse::<u64>().expect("a number");
        }
    }
    sum
}

#[test]
fn a_payload_keeps_its_content_when_it_is_put_into_huge_pages() {
    let entries = entries(4);
    let (mut small, mut large) = (held(&entries, 0), held(&entries, 2));
    small.payload_mut()[..4].copy_from_slice(b"abcd");
    large.payload_mut().fill(7);
    assert_eq!(huge(&entries), 0, "small requests take small pages");
    (0..2 * TRIES).for_each(|_| entries.make_huge(2));
    assert_eq!(&small.payload()[..4], b"abcd");
    assert!(large.payload().iter().all(|byte| *byte == 7));
    // None on a kernel without them, or without memory in one piece; two where the mapping does not begin at one.
    assert!(huge(&entries) <= 2 * (HUGE as u64 >> 10), "those of the entry only");
    assert_eq!(entries.first.entries[2].tries.load(Ordering::Relaxed), TRIES);
    entries.make_huge(9);
}

#[test]
fn a_place_is_known_again_by_its_mark() {
    let place = EntryId { home: 3, index: 1023 };
    assert_eq!(EntryId::marked(place.mark()), place);
}

#[test]
fn an_answer_carries_the_requests_number_its_errno_and_its_length() {
    let entries = entries(1);
    let mut request = held(&entries, 0);
    let mut header = [0; 40];
    header[8..16].copy_from_slice(&77u64.to_ne_bytes());
    request.pretend(&header, &[], &[], 0);
    assert_eq!(request.room(PAYLOAD + 1), None);
    request.send(Err(Errno(libc::ENOSPC)));
    let sent = held(&entries, 0);
    let error = i32::from_ne_bytes(sent.number(4));
    assert_eq!((error, u64::from_ne_bytes(sent.number(8))), (-libc::ENOSPC, 77));
    assert_eq!(u32::from_ne_bytes(sent.number(PAYLOAD_SIZE)), 0);
    sent.send(Ok(5));
    let sent = held(&entries, 0);
    assert_eq!(u32::from_ne_bytes(sent.number(PAYLOAD_SIZE)), 5);
    assert_eq!(u32::from_ne_bytes(sent.number(0)), 21);
}
