//! Reads at the disk: all are answered, none waits for others' answers.

use super::*;
use crate::io::file::{HostFile, write_full};
use crate::io::real::{Access, RealFile};
use std::sync::mpsc;
use std::time::Duration;

/// As long as anything here may take on a loaded machine.
const LONG: Duration = Duration::from_secs(60);

/// In /var/tmp: reads in memory are never queued.
fn file(len: u64) -> (tempfile::TempDir, Arc<dyn HostFile>) {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let path = dir.path().join("delta.hds");
    std::fs::File::create(&path).expect("created");
    let file = RealFile::open(&path, Access::ReadWrite).expect("opens");
    for page in 0..len.div_ceil(4096) {
        let n = (len - page * 4096).min(4096) as usize;
        write_full(&file, &vec![page as u8; n], page * 4096).expect("written");
    }
    (dir, Arc::new(file))
}

fn queue() -> Option<Reads> {
    match Reads::new() {
        Ok(reads) => Some(reads),
        Err(e) => {
            println!("SKIPPED queued reads: this system has no io_uring: {e}");
            None
        }
    }
}

fn read(file: &Arc<dyn HostFile>, offset: u64, len: usize, done: ReadDone) -> Read {
    let planned = Planned::new(file.clone(), offset, len, |_| ()).expect("the disk of a test");
    Read { planned, done }
}

#[test]
fn more_reads_than_fit_at_a_time_all_come_back_with_their_bytes() {
    let (Some(reads), (_dir, file)) = (queue(), file(1 << 20)) else { return };
    file.sync_all().expect("synced");
    file.drop_cache().expect("dropped");
    let (tx, rx) = mpsc::channel();
    for n in 0..4 * u64::from(DEPTH) {
        let (tx, page) = (tx.clone(), n % 256);
        let done = Box::new(move |data: Option<Bytes>| tx.send((page, data)).expect("the test waits"));
        reads.submit(read(&file, page * 4096, 4096, done));
    }
    for _ in 0..4 * DEPTH {
        let (page, data) = rx.recv_timeout(LONG).expect("an answer");
        assert!(data.expect("read").iter().all(|byte| u64::from(*byte) == page));
    }
}

#[test]
fn what_comes_while_many_are_answered_goes_to_the_disk_before_the_last_answer() {
    let (Some(reads), (_dir, file)) = (queue(), file(16 * 4096)) else { return };
    let reads = Arc::new(reads);
    let (release, held) = mpsc::channel::<()>();
    let (send, heard) = mpsc::channel();
    let hold = send.clone();
    let done = Box::new(move |_: Option<Bytes>| {
        hold.send(0).expect("the test waits");
        let _ = held.recv();
    });
    reads.submit(read(&file, 0, 4096, done));
    heard.recv_timeout(LONG).expect("it holds");
    // These are cached, and so complete together.
    for n in 0..6 {
        let (send, its_file, queue) = (send.clone(), file.clone(), reads.clone());
        let done = Box::new(move |_: Option<Bytes>| match n {
            0 => queue.submit(read(&its_file, 4096, 4096, Box::new(|_| ()))),
            5 => send.send(queue.shared.lock().waiting.len()).expect("the test waits"),
            _ => {}
        });
        reads.submit(read(&file, 4096, 4096, done));
    }
    drop(release);
    assert_eq!(heard.recv_timeout(LONG).expect("an answer"), 0, "waiting while others are answered");
}

#[test]
fn a_read_across_the_end_of_the_file_is_given_back() {
    let (Some(reads), (_dir, file)) = (queue(), file(6000)) else { return };
    let (tx, rx) = mpsc::channel();
    let done = Box::new(move |data: Option<Bytes>| tx.send(data.is_some()).expect("the test waits"));
    reads.submit(read(&file, 4096, 4096, done));
    assert!(!rx.recv_timeout(LONG).expect("an answer"));
}

#[test]
fn a_queue_that_ends_answers_what_it_has_and_its_thread_goes() {
    let (Some(reads), (_dir, file)) = (queue(), file(1 << 20)) else { return };
    let shared = Arc::downgrade(&reads.shared);
    let (tx, rx) = mpsc::channel();
    for page in 0..256 {
        let tx = tx.clone();
        let done = Box::new(move |data: Option<Bytes>| tx.send(data.is_some()).expect("the test waits"));
        reads.submit(read(&file, page * 4096, 4096, done));
    }
    drop(reads);
    for _ in 0..256 {
        assert!(rx.recv_timeout(LONG).expect("an answer"));
    }
    let deadline = std::time::Instant::now() + LONG;
    while shared.upgrade().is_some() {
        assert!(std::time::Instant::now() < deadline, "the thread ends");
        std::thread::yield_now();
    }
}

#[test]
fn an_answer_that_panics_costs_no_other_one() {
    let (Some(reads), (_dir, file)) = (queue(), file(4096)) else { return };
    let panics = Box::new(|_: Option<Bytes>| panic!("on purpose"));
    reads.submit(read(&file, 0, 4096, panics));
    let (tx, rx) = mpsc::channel();
    let done = Box::new(move |data: Option<Bytes>| tx.send(data.is_some()).expect("the test waits"));
    reads.submit(read(&file, 0, 4096, done));
    assert!(rx.recv_timeout(LONG).expect("an answer"));
}
