//! Requests that the ring itself fills from a file.

use super::*;
use crate::io::file::HostFile;
use crate::io::planned::Planned;
use crate::io::real::{Access, RealFile};
use std::sync::mpsc;

const PAGE: usize = 4096;

/// A ring of two entries that no kernel knows, and a file on a disk, each page full of its number.
struct Bench {
    ring: Ring,
    file: Arc<dyn HostFile>,
    _dir: tempfile::TempDir,
}

fn bench() -> Option<Bench> {
    let mut rings = match make(&[&[Queue { id: 0, depth: 2 }]], 0) {
        Ok((rings, _)) => rings,
        Err(e) => {
            println!("SKIPPED reads on a ring: this system has no io_uring: {e}");
            return None;
        }
    };
    // In /var/tmp: what is in memory is never read this way.
    let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let path = dir.path().join("disk");
    std::fs::write(&path, (0..16 * PAGE).map(|at| (at / PAGE) as u8).collect::<Vec<_>>()).expect("written");
    let file = Arc::new(RealFile::open(&path, Access::ReadWrite).expect("opens"));
    let ring = rings.pop().expect("one was asked for");
    begin(&ring.ring).expect("a new ring");
    ring.own.adopt_thread();
    Some(Bench { ring, file, _dir: dir })
}

impl Bench {
    /// As if the kernel had sent a request.
    fn request(&self, index: u32) -> HeldEntry {
        self.ring.own.begins(index);
        // SAFETY: no kernel knows these entries, and no test takes one twice.
        unsafe { self.ring.own.came(index) }.expect("it is the kernel's")
    }

    fn plan(&self, page: usize) -> (Planned, mpsc::Receiver<bool>) {
        let (end, ended) = mpsc::channel();
        let at = (page * PAGE) as u64;
        let plan = Planned::new(self.file.clone(), at, PAGE, move |whole| end.send(whole).expect("awaited"));
        (plan.expect("a file on a disk"), ended)
    }

    /// Until the kernel has completed all reads: what comes again.
    fn wait(&mut self) -> Vec<HeldEntry> {
        let mut batch = Vec::new();
        while self.ring.filling.iter().any(Option::is_some) {
            self.ring.wait(&mut batch, None).expect("the ring works");
        }
        batch
    }
}

#[test]
fn a_request_is_filled_from_the_file_and_then_answered() {
    let Some(mut b) = bench() else { return };
    let held = b.request(1);
    assert!(held.can_fill());
    let (plan, ended) = b.plan(5);
    held.fill(plan);
    b.ring.commit().expect("submitted");
    assert!(ended.try_recv().is_err(), "the kernel has it: what it reads must stay where it is");
    assert!(b.wait().is_empty());
    assert!(ended.recv().expect("the end"));
    let room = b.ring.own.places(1)[1].iov_base.cast::<u8>();
    // SAFETY: the payload of entry 1, which is answered and which no kernel has.
    assert!(unsafe { std::slice::from_raw_parts(room, PAGE) }.iter().all(|byte| *byte == 5));
    b.ring.own.take_answered(&mut b.ring.answered);
    let answered = b.ring.answered.drain(..).map(|a| a.place.index).collect::<Vec<_>>();
    assert_eq!(answered, [1]);
}

#[test]
fn a_request_whose_read_fails_comes_again_and_is_not_filled_twice() {
    let Some(mut b) = bench() else { return };
    let (plan, ended) = b.plan(12);
    b.file.set_len(12 * PAGE as u64 + 100).expect("cut");
    b.request(0).fill(plan);
    b.ring.commit().expect("submitted");
    let again = b.wait();
    assert_eq!(again.iter().map(|held| (held.index(), held.can_fill())).collect::<Vec<_>>(), [(0, false)]);
    assert!(!ended.recv().expect("the end"), "not all of it was read");
    b.ring.own.take_answered(&mut b.ring.answered);
    assert!(b.ring.answered.is_empty());
}

#[test]
fn only_the_thread_of_an_entrys_home_fills_it() {
    let Some(b) = bench() else { return };
    let held = b.request(0);
    std::thread::spawn(move || assert!(!held.can_fill())).join().expect("no other thread does");
}
