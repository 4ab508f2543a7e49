//! The helpers: threads to which the others hand writes that may wait for the host; and what the other threads share.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::exchange::Exchange;
use super::memory::HeldEntry;
use super::serve::{SessionServer, Thread};
use super::wire;
use crate::error::Result;
use crate::io::process::{no_thread, spawn_thread};

/// How long a thread pauses after a failure of its ring that it knows no answer to.
const PAUSE: Duration = Duration::from_millis(10);

enum Job {
    Serve(HeldEntry),
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
    pub(super) fn start(server: &Arc<SessionServer>, count: usize) -> Result<Helpers> {
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

fn help(server: &SessionServer, queue: &Receiver<Job>) {
    while let Ok(Job::Serve(held)) = queue.recv() {
        server.serve(held, Thread::Helper);
    }
}

impl Bench {
    pub(super) fn hand_over(&self, held: HeldEntry) {
        if let Err(unsent) = self.jobs.send(Job::Serve(held))
            && let Job::Serve(held) = unsent.into_inner()
        {
            // The helpers have ended, and with them the session.
            held.send(Err(crate::fuse::ops::Errno(libc::EIO)));
        }
    }
}

/// Sorts out what no ring's thread serves: what comes after the end, and writes that may wait, which go to the helpers.
/// None: done; else the request again, and how many bytes it reads or writes.
pub(super) fn sift(server: &SessionServer, bench: &Bench, held: HeldEntry) -> Option<(HeldEntry, u32)> {
    if server.is_closed() {
        server.serve(held, Thread::Transport);
        return None;
    }
    let weight = wire::weight(held.parts());
    held.weighs(weight.bytes);
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
