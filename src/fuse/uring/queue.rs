//! The threads of the kernel's queues, one for each, which never wait for anything but requests. Writes that may wait for the
//! host are for the helpers, large requests for the carriers (see there).

use std::sync::Arc;

use crossbeam_channel::Sender;
use rustix::thread::CpuSet;

use super::affinity::Affinity;
use super::carriers::{LARGE, Load};
use super::device::Device;
use super::helpers::{Bench, pause, sift};
use super::memory::{self, HeldEntry};
use super::ring::Ring;
use super::serve::{SessionServer, Thread};
use crate::error::Result;
use crate::io::process::{no_thread, spawn_thread};

/// From this size on, in bytes, an answer is handed to the kernel before the next request is looked at: its reader
/// should not wait for the rest of a batch.
const PROMPT: u32 = 64 << 10;

/// So many reads of a batch go to the disk at once: it should not stand idle until the batch is through, and each call to
/// the disk costs as much as a request.
const FILLS: usize = 4;

/// One ring and what its thread needs.
pub(super) struct Worker {
    pub(super) ring: Ring,
    pub(super) server: Arc<SessionServer>,
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
    /// Starts the thread of ring `number`. No thread waits for its end: after that of the session it only takes back
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
        let mut asked = 0;
        while ring.entries().are_live() {
            let limit = ring.make_room(asked, |act| affinity.at_home(act));
            if let Err(e) = ring.wait(&mut batch, limit) {
                pause(&e, &mut said);
            }
            asked = batch.first().map_or(asked, HeldEntry::ino);
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
fn one(ring: &mut Ring, server: &SessionServer, bench: &Bench, load: &Load, held: HeldEntry, more: bool) {
    let Some((held, bytes)) = sift(server, bench, held) else { return };
    if bytes >= LARGE && (more || load.is_under_way()) {
        return load.put(held);
    }
    server.serve(held, Thread::Sifted);
    if bytes >= PROMPT || memory::to_fill() >= FILLS {
        ring.prompt();
    }
}
