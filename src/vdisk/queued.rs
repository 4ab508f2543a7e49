//! Small reads that wait for the disk: they hold the gate and their clusters, and no thread. A transport with a ring of its
//! own carries them out itself ([`plan`]); for others there is the engine's ([`read`]).
//!
//! The order is that of a read pio: (1) inside the gate, (2) the clusters locked shared, (3) look-up, (4) the read, (5)
//! release both, (6) the answer. 5 before 4 would let a copy on write, a discard or a freeze change what is being read.
//! Whatever does not fit (a missing BAT page, a locked cluster, holes, several places) is a runner's, and so is what failed.

use bytes::Bytes;

use super::bat::page::Place;
use super::fast::{NOWHERE, Window};
use super::gate::Inside;
use super::locks::LockMode;
use super::pio;
use super::{Image, Reply};
use crate::io::planned::Planned;
use crate::io::reads::Read;
use crate::sync::Arc;

/// Longest read in bytes that is queued: what is longer is copied from the page cache by several threads at a time, where
/// here one would do it alone.
const LONGEST: usize = 64 << 10;

/// Reads; the range lies inside the disk and is not empty. For any thread.
pub(super) fn read(image: &Arc<Image>, offset: u64, len: usize, reply: Reply<Bytes>) {
    let planned = image.engine.reads().and_then(|reads| Some((reads, plan(image, offset, len, |_| ())?)));
    let Some((reads, planned)) = planned else {
        return pio::submit_read(image, offset, len, reply);
    };
    let image = Arc::clone(image);
    let done = move |data: Option<Bytes>| match data {
        Some(data) => reply(Ok(data)), // 6
        None => pio::submit_read(&image, offset, len, reply),
    };
    reads.submit(Read { planned, done: Box::new(done) }); // 4
}

/// Where the bytes of a read are, the range as for [`read`]; `end` is called when the clusters were released, with true
/// when all of them were read. None: it is a runner's. For any thread; never waits.
pub(super) fn plan(
    image: &Arc<Image>,
    offset: u64,
    len: usize,
    end: impl FnOnce(bool) + Send + 'static,
) -> Option<Planned> {
    if len > LONGEST {
        return None;
    }
    let mut held = HeldRead { image: Arc::clone(image), inside: image.gate.enter(1), first: 0, count: 0 }; // 1
    held.inside.as_ref()?;
    let stack = image.stack();
    let mut places = NOWHERE;
    let window = Window::lock(image, &stack, offset, len as u64, &mut places)?; // 2
    let mut found = None;
    window.all(|_, run| {
        found = Some((run.place, run.len)); // 3
        false
    });
    let Some((Place::At { level, position }, run)) = found else { return None };
    let file = &stack.level(level).file;
    if run < len as u64 {
        return None;
    }
    (held.first, held.count) = window.keep();
    Planned::new(Arc::clone(file), position, len, move |whole| {
        if whole {
            held.image.count_read(len);
        }
        drop(held); // 5
        end(whole);
    })
}

/// Locked clusters, and a place inside the gate; given back on drop.
struct HeldRead {
    image: Arc<Image>,
    inside: Option<Inside>,
    first: u64,
    count: usize,
}

impl Drop for HeldRead {
    fn drop(&mut self) {
        for cluster in self.first..self.first + self.count as u64 {
            self.image.unlock(cluster, LockMode::Shared);
        }
        if let Some(inside) = self.inside.take() {
            self.image.gate.leave(inside);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::file::HostFile;
    use crate::io::reads::Reads;
    use crate::io::real::{Access, RealFile};
    use crate::vdisk::{Engine, Layout, Level, Options};
    use std::sync::mpsc;
    use std::time::Duration;

    const LONG: Duration = Duration::from_secs(60);
    const PAGE: usize = 4096;

    struct Bench {
        _dir: tempfile::TempDir,
        file: Arc<dyn HostFile>,
        engine: Arc<Engine>,
        image: Arc<Image>,
    }

    /// A raw image of 1 MiB on a disk (reads in memory are never queued), each page full of its number.
    fn bench() -> Option<Bench> {
        let reads = match Reads::new() {
            Ok(reads) => reads,
            Err(e) => {
                println!("SKIPPED queued reads: this system has no io_uring: {e}");
                return None;
            }
        };
        let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
        let path = dir.path().join("disk.raw");
        let bytes: Vec<u8> = (0..256 * PAGE).map(|at| (at / PAGE) as u8).collect();
        std::fs::write(&path, bytes).expect("written");
        let file: Arc<dyn HostFile> = Arc::new(RealFile::open(&path, Access::ReadWrite).expect("opens"));
        let engine = Engine::new(Options::default(), Box::new(|_| ()));
        engine.queue_reads(reads);
        let level = Level { file: file.clone(), path, layout: Layout::Raw };
        let image = Image::open(&engine, "disk", vec![level]).expect("opens");
        Some(Bench { _dir: dir, file, engine, image })
    }

    impl Bench {
        fn later(&self, offset: u64, len: usize) -> mpsc::Receiver<Bytes> {
            let (reply, answer) = mpsc::channel();
            read(&self.image, offset, len, Box::new(move |r| reply.send(r.expect("read")).expect("awaited")));
            answer
        }

        /// Nothing that is queued comes back until the sender is used or dropped.
        fn hold(&self) -> mpsc::Sender<()> {
            let (release, held) = mpsc::channel();
            let (reply, holding) = mpsc::channel();
            let done = Box::new(move |_: Option<Bytes>| {
                reply.send(()).expect("awaited");
                let _ = held.recv();
            });
            let reads = self.engine.reads().expect("it has them");
            let planned = Planned::new(self.file.clone(), 0, PAGE, |_| ()).expect("the disk of a test");
            reads.submit(Read { planned, done });
            holding.recv_timeout(LONG).expect("it holds");
            release
        }
    }

    #[test]
    fn a_queued_read_holds_its_cluster_and_the_gate_until_it_is_answered() {
        let Some(b) = bench() else { return };
        let release = b.hold();
        let answer = b.later(5 * PAGE as u64, PAGE);
        assert!(!b.image.locks.try_lock(0, LockMode::Exclusive), "no writer changes what is being read");
        assert!(b.image.locks.try_lock(0, LockMode::Shared), "others may read it");
        b.image.unlock(0, LockMode::Shared);
        assert_eq!(b.image.gate.inside(), 1, "a freeze waits for it");
        drop(release);
        assert!(answer.recv_timeout(LONG).expect("an answer").iter().all(|byte| *byte == 5));
        assert!(b.image.locks.try_lock(0, LockMode::Exclusive), "it is released before the answer");
        b.image.unlock(0, LockMode::Exclusive);
        assert_eq!(b.image.gate.inside(), 0);
        b.image.close().expect("closes");
    }

    #[test]
    fn a_queued_read_that_failed_is_done_again_by_a_runner() {
        let Some(b) = bench() else { return };
        let release = b.hold();
        let answer = b.later(200 * PAGE as u64, PAGE);
        b.file.set_len(100 * PAGE as u64).expect("cut");
        drop(release);
        assert!(
            answer.recv_timeout(LONG).expect("an answer").iter().all(|byte| *byte == 0),
            "behind its end"
        );
        b.image.close().expect("closes");
    }

    #[test]
    fn a_read_of_a_locked_cluster_waits_for_the_lock_and_then_for_the_disk() {
        let Some(b) = bench() else { return };
        assert!(b.image.locks.try_lock(0, LockMode::Exclusive));
        let answer = b.later(0, PAGE);
        assert!(answer.try_recv().is_err());
        b.image.unlock(0, LockMode::Exclusive);
        assert_eq!(answer.recv_timeout(LONG).expect("an answer").len(), PAGE);
        b.image.close().expect("closes");
    }
}
