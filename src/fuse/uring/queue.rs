//! The threads: one for each of the kernel's queues, which never waits for anything but requests, and the helpers, to
//! which writes are handed that may wait for the host. Large requests are for the carriers (see `carriers`).

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};
use rustix::thread::CpuSet;

use super::affinity::Affinity;
use super::carriers::{LARGE, Load};
use super::device::Device;
use super::memory::{self, Held};
use super::ring::Ring;
use super::serve::{Exchange, Server, Thread};
use super::wire;
use crate::error::Result;
use crate::io::process::{no_thread, spawn_thread};

/// From this size on, in bytes, an answer is handed to the kernel before the next request is looked at: its reader
/// should not wait for the rest of a batch.
const PROMPT: u32 = 64 << 10;

/// So many reads of a batch go to the disk at once: it should not stand idle until the batch is through, and each call to
/// the disk costs as much as a request.
const FILLS: usize = 4;

/// How long a thread pauses after a failure of its ring that it knows no answer to.
const PAUSE: Duration = Duration::from_millis(10);

enum Job {
    Serve(Held),
    Stop,
}

/// Threads that may wait.
pub(super) struct Helpers {
    threads: Vec<JoinHandle<()>>,
    bench: Bench,
}

/// Where work for the helpers is put.
#[derive(Clone)]
pub(super) struct Bench {
    jobs: Sender<Job>,
}

impl Helpers {
    /// Starts `count` threads.
    pub(super) fn start(server: &Arc<Server>, count: usize) -> Result<Helpers> {
        // Unbounded, so that a ring's thread never waits; at most all entries of all rings.
        let (jobs, queue) = unbounded();
        let mut helpers = Helpers { threads: Vec::new(), bench: Bench { jobs } };
        for number in 0..count {
            let (server, queue) = (server.clone(), queue.clone());
            let name = format!("ploopfs/t{number}");
            let thread = spawn_thread(&name, move || help(&server, &queue));
            helpers.threads.push(thread.map_err(no_thread(&name))?);
        }
        Ok(helpers)
    }

    /// A way to hand work over.
    pub(super) fn bench(&self) -> Bench {
        self.bench.clone()
    }

    /// Ends the threads when all that was handed over is done.
    pub(super) fn join(self) {
        for _ in &self.threads {
            let _ = self.bench.jobs.send(Job::Stop);
        }
        for thread in self.threads {
            if thread.join().is_err() {
                log::error!("a transport thread panicked");
            }
        }
    }
}

fn help(server: &Server, queue: &Receiver<Job>) {
    while let Ok(Job::Serve(held)) = queue.recv() {
        server.serve(held, Thread::Helper);
    }
}

impl Bench {
    pub(super) fn hand_over(&self, held: Held) {
        if let Err(unsent) = self.jobs.send(Job::Serve(held))
            && let Job::Serve(held) = unsent.into_inner()
        {
            // The helpers have ended, and with them the session.
            held.send(Err(crate::fuse::ops::Errno(libc::EIO)));
        }
    }
}

/// One ring and what its thread needs.
pub(super) struct Worker {
    pub(super) ring: Ring,
    pub(super) server: Arc<Server>,
    pub(super) device: Arc<Device>,
    pub(super) bench: Bench,
    pub(super) load: Arc<Load>,
    /// The CPU whose requests these are; None: several.
    pub(super) cpu: Option<usize>,
    /// All that it may run on, where that is known.
    pub(super) cpus: Option<CpuSet>,
    /// Dropped when this thread will not call the file system again.
    pub(super) at_work: Sender<()>,
}

impl Worker {
    /// Starts the thread of ring `number`. Nobody waits for its end: after that of the session it only takes back
    /// answers that are still owed, and the process need not live for that.
    pub(super) fn start(self, number: usize) -> Result<()> {
        let name = format!("ploopfs/q{number}");
        spawn_thread(&name, move || self.run()).map(drop).map_err(no_thread(&name))
    }

    fn run(self) {
        let Worker { mut ring, server, device, bench, load, cpu, cpus, at_work } = self;
        let mut affinity = Affinity::new(cpu, cpus);
        if let Err(e) = ring.register(device) {
            log::error!("cannot give a ring to the kernel: {e}");
        }
        let mut at_work = Some(at_work);
        let mut batch = Vec::new();
        let mut said = false;
        while ring.entries().are_live() {
            let limit = ring.make_room(|| server.has_parked());
            if let Err(e) = ring.wait(&mut batch, limit) {
                pause(&e, &mut said);
            }
            ring.entries().set_busy(true);
            affinity.saw(batch.len() + ring.fills(), || ring.others_are_busy());
            let mut left = batch.len();
            for held in batch.drain(..) {
                left -= 1;
                one(&mut ring, &server, &bench, &load, held, left > 0);
            }
            ring.entries().set_busy(false);
            if server.is_closed() {
                at_work.take();
            }
        }
        // It may have been the last: then they end too.
        load.call();
    }
}

/// Serves a request here, or hands it over: a write that may wait, always; a large one where others are under way. A
/// large one by itself is faster here.
fn one(ring: &mut Ring, server: &Server, bench: &Bench, load: &Load, held: Held, more: bool) {
    let Some((held, bytes)) = sift(server, bench, held) else { return };
    if bytes >= LARGE && (more || load.is_under_way()) {
        return load.put(held);
    }
    server.serve(held, Thread::Sifted);
    if bytes >= PROMPT || memory::to_fill() >= FILLS {
        ring.prompt();
    }
}

/// Sorts out what no ring's thread serves: what comes after the end, and writes that may wait, which go to the helpers.
/// None: done; else the request again, and how many bytes it reads or writes.
pub(super) fn sift(server: &Server, bench: &Bench, held: Held) -> Option<(Held, u32)> {
    if server.is_closed() {
        server.serve(held, Thread::Transport);
        return None;
    }
    let weight = wire::weight(held.parts());
    if weight.writes.is_some_and(|handle| server.writes_may_block(handle)) {
        bench.hand_over(held);
        return None;
    }
    Some((held, weight.bytes))
}

/// Lets some time pass after a failure of a ring that has no answer, and says so the first time.
pub(super) fn pause(e: &std::io::Error, said: &mut bool) {
    if !std::mem::replace(said, true) {
        log::error!("a ring failed: {e}; trying again and again");
    }
    std::thread::sleep(PAUSE);
}
