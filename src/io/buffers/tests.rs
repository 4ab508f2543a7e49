//! Which writes wait for room, and which are refused.

use super::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

fn buffers() -> &'static Buffers {
    Box::leak(Box::new(Buffers { state: Mutex::new(State::new()), freed: Condvar::new() }))
}

#[derive(Clone, Default)]
struct Image(u64, Arc<AtomicU64>);

impl Writer for Image {
    fn id(&self) -> u64 {
        self.0
    }
    fn completed(&self) -> u64 {
        self.1.load(Ordering::Relaxed)
    }
}

impl Buffers {
    fn copy(&'static self, data: &[u8]) -> Bytes {
        self.room(&Image::default(), data.len()).expect("room").copy(data)
    }

    /// As much as this image gets without waiting.
    fn fill(&'static self, of: &Image) -> Vec<Room> {
        std::iter::from_fn(|| match self.ask(of, LARGE) {
            Asked::Taken(room) => Some(room),
            Asked::Full | Asked::Hung(_) => None,
        })
        .collect()
    }

    /// As if nothing of the image had been completed for so long.
    fn quiet_for(&self, of: &Image, time: Duration) {
        let mut state = self.lock();
        let account = state.images.as_mut().and_then(|images| images.get_mut(&of.0)).expect("it waits");
        account.completed = Some(of.completed());
        account.since = Instant::now().checked_sub(time).expect("the machine runs for longer");
    }
}

#[test]
fn what_is_copied_is_the_same_whatever_its_size() {
    let buffers = buffers();
    for len in [0, 1, SMALL, SMALL + 1, LARGE, LARGE + 5] {
        let data: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        let copy = buffers.copy(&data);
        assert_eq!(buffers.lock().out, len);
        assert!(copy == data, "{len} bytes");
    }
    let state = buffers.lock();
    assert_eq!((state.out, state.spare.len()), (0, 1), "one mapping served both");
}

#[test]
fn large_writes_wait_while_too_much_waits_and_small_ones_do_not() {
    let buffers = buffers();
    let data = vec![1; LARGE];
    let mut held: Vec<Bytes> = (0..(LIMIT - RESERVE) / LARGE).map(|_| buffers.copy(&data)).collect();
    let small = buffers.copy(&data[..SMALL]);
    drop(small);
    let (send, taken) = mpsc::channel();
    std::thread::spawn(move || send.send(buffers.copy(&vec![2; LARGE])));
    assert!(taken.recv_timeout(Duration::from_millis(100)).is_err(), "it waits");
    held.pop();
    assert_eq!(taken.recv_timeout(Duration::from_secs(20)).expect("it goes on")[0], 2);
    drop(held);
    let state = buffers.lock();
    assert_eq!((state.out, state.spare.len()), (0, SPARE), "the others are given back");
}

#[test]
fn an_image_that_holds_all_it_can_leaves_the_others_room_for_their_own() {
    let buffers = buffers();
    let one = Image(1, Arc::default());
    let first = buffers.fill(&one);
    assert_eq!(first.len() * LARGE, LIMIT - RESERVE);
    let others: Vec<_> = (2..=5).map(|id| buffers.fill(&Image(id, Arc::default()))).collect();
    assert!(others.iter().all(|held| held.len() * LARGE == OWN), "each what is its own");
    // All of it is out: one write of each image goes on all the same.
    assert_eq!(buffers.lock().out, LIMIT);
    assert_eq!(buffers.fill(&Image(6, Arc::default())).len(), 1);
    drop((first, others));
    assert_eq!(buffers.lock().out, 0);
}

#[test]
fn a_write_of_an_image_whose_host_hangs_is_refused_at_once_and_of_one_that_goes_on_it_waits() {
    let buffers = buffers();
    let (hangs, slow) = (Image(1, Arc::default()), Image(2, Arc::default()));
    let mut held = buffers.fill(&hangs);
    let other = buffers.fill(&slow);
    buffers.quiet_for(&hangs, HUNG / 2);
    assert!(matches!(buffers.ask(&hangs, LARGE), Asked::Full), "not yet");
    buffers.quiet_for(&hangs, HUNG + LOOK);
    buffers.quiet_for(&slow, HUNG + LOOK);
    slow.1.fetch_add(1, Ordering::Relaxed);
    assert!(matches!(buffers.ask(&slow, LARGE), Asked::Full), "something was completed");
    let first = buffers.room(&hangs, LARGE).map(drop).expect_err("its host hangs");
    assert!(first.news && first.since >= HUNG && first.held == LIMIT - RESERVE, "{first:?}");
    let second = buffers.room(&hangs, LARGE).map(drop).expect_err("and still does");
    assert!(!second.news, "said once");
    assert!(buffers.room(&hangs, SMALL).is_ok(), "small ones are taken");
    // The host goes on: so does the image, and the next time is news.
    held.truncate(held.len() - OWN / LARGE - 1);
    let again = buffers.room(&hangs, LARGE).expect("room");
    assert!(matches!(buffers.ask(&hangs, LARGE), Asked::Full));
    buffers.quiet_for(&hangs, HUNG);
    assert!(matches!(buffers.ask(&hangs, LARGE), Asked::Hung(Hung { news: true, .. })));
    drop((again, held, other));
    assert!(buffers.lock().images.as_ref().is_some_and(HashMap::is_empty));
}

#[test]
fn data_that_is_kept_counts_as_what_is_copied_does() {
    let buffers = buffers();
    let room = buffers.room(&Image::default(), LARGE).expect("room");
    let kept = room.keep(Bytes::from(vec![3; LARGE]));
    let part = kept.slice(5..);
    drop(kept);
    assert_eq!((buffers.lock().out, part[0]), (LARGE, 3));
    drop(part);
    assert_eq!(buffers.lock().out, 0);
}
