//! The threads: one for each ring, which never wait for anything but requests, and the helpers, to which they hand
//! what takes long.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};
use rustix::thread::CpuSet;

use super::device::Device;
use super::memory::Held;
use super::ring::Ring;
use super::serve::{Exchange, Server, Thread};
use super::wire;
use crate::error::{Error, Kind, Result};
use crate::io::process::spawn_thread;

/// From this size on, in bytes, the copies of a request cost far more than a hand-over, and two threads that copy are
/// faster than one: below the 512 KiB to which loop cuts, above the 128 KiB of read-ahead.
const LARGE: u32 = 256 << 10;

/// From this size on, in bytes, an answer is handed to the kernel before the next request is looked at: its reader
/// should not wait for the rest of a batch.
const PROMPT: u32 = 64 << 10;

/// How long a ring's thread pauses after a failure that it knows no answer to.
const PAUSE: Duration = Duration::from_millis(10);

fn failed(what: &str) -> impl Fn(std::io::Error) -> Error + '_ {
    move |e| Error::new(Kind::Io, format!("cannot start the thread {what}: {e}"))
}

enum Job {
    Serve(Held),
    Stop,
}

/// Threads that carry out what would hold up a ring.
pub(super) struct Helpers {
    threads: Vec<JoinHandle<()>>,
    bench: Bench,
}

/// Where work for the helpers is put.
#[derive(Clone)]
pub(super) struct Bench {
    jobs: Sender<Job>,
    /// Handed over and not yet carried out.
    waiting: Arc<AtomicUsize>,
}

impl Helpers {
    /// Starts `count` threads.
    pub(super) fn start(server: &Arc<Server>, count: usize) -> Result<Helpers> {
        // Unbounded, so that a ring's thread never waits; at most all entries of all rings.
        let (jobs, queue) = unbounded();
        let bench = Bench { jobs, waiting: Arc::default() };
        let mut helpers = Helpers { threads: Vec::new(), bench };
        for number in 0..count {
            let (server, queue, waiting) = (server.clone(), queue.clone(), helpers.bench.waiting.clone());
            let name = format!("ploopfs/t{number}");
            let thread = spawn_thread(&name, move || help(&server, &queue, &waiting));
            helpers.threads.push(thread.map_err(failed(&name))?);
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

fn help(server: &Server, queue: &Receiver<Job>, waiting: &AtomicUsize) {
    while let Ok(Job::Serve(held)) = queue.recv() {
        server.serve(held, Thread::Helper);
        waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Bench {
    fn is_in_use(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    fn hand_over(&self, held: Held) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
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
    /// The CPU to stay on; None: any.
    pub(super) cpu: Option<usize>,
    /// Dropped when this thread will not call the file system again.
    pub(super) at_work: Sender<()>,
}

impl Worker {
    /// Starts the thread of ring `number`. Nobody waits for its end: after that of the session it only takes back
    /// answers that are still owed, and the process need not live for that.
    pub(super) fn start(self, number: usize) -> Result<()> {
        let name = format!("ploopfs/q{number}");
        spawn_thread(&name, move || self.run()).map(drop).map_err(failed(&name))
    }

    fn run(self) {
        let Worker { mut ring, server, device, bench, cpu, at_work } = self;
        bind(cpu);
        if let Err(e) = ring.register(device) {
            log::error!("cannot give a ring to the kernel: {e}");
        }
        let mut at_work = Some(at_work);
        let mut batch = Vec::new();
        let mut said = false;
        while ring.is_live() {
            if let Err(e) = ring.wait(&mut batch) {
                if !std::mem::replace(&mut said, true) {
                    log::error!("a ring failed: {e}; trying again and again");
                }
                std::thread::sleep(PAUSE);
            }
            let mut left = batch.len();
            for held in batch.drain(..) {
                left -= 1;
                one(&mut ring, &server, &bench, held, left > 0);
            }
            if server.is_closed() {
                at_work.take();
            }
        }
    }
}

/// Stays on the CPU whose requests these are: they come with its caches warm.
fn bind(cpu: Option<usize>) {
    let Some(cpu) = cpu.filter(|cpu| *cpu < CpuSet::MAX_CPU) else { return };
    let mut only = CpuSet::new();
    only.set(cpu);
    if let Err(e) = rustix::thread::sched_setaffinity(None, &only) {
        // Outside of the CPUs that we may use, perhaps: it works from any.
        log::debug!("cannot stay on CPU {cpu}: {e}");
    }
}

/// Serves a request here, or hands it over: a write that may wait, always; a large one where others are under way, all
/// of them, because the kernel's half of the copying (payloads in, answers out) is done by this thread alone, while the
/// helpers do the file's half. A large one by itself is faster here.
fn one(ring: &mut Ring, server: &Server, bench: &Bench, held: Held, more: bool) {
    if server.is_closed() {
        return server.serve(held, Thread::Transport);
    }
    let weight = wire::weight(held.parts());
    let waits = weight.writes.is_some_and(|handle| server.writes_may_block(handle));
    let side_by_side = weight.bytes >= LARGE && (more || bench.is_in_use());
    if waits || side_by_side {
        return bench.hand_over(held);
    }
    server.serve(held, Thread::Transport);
    if weight.bytes >= PROMPT
        && let Err(e) = ring.flush()
    {
        // It stays among the answers; the next wait tries again, and says so.
        log::debug!("cannot hand an answer over: {e}");
    }
}
