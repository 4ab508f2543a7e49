//! The `uring` transport: FUSE over io_uring (Linux 6.14), one ring and thread for each CPU, requests served on the thread
//! that got them, which stays on its CPU where that is best (see `affinity`). What would hold a ring up goes to helpers
//! (see `helpers`), large requests to carriers, which have rings of their own, small reads of the disk through the ring
//! itself (`ring`), and, as in every transport, what takes longer to the runners of the file system.
//!
//! An answer may come from any thread; it is handed to the kernel by a ring's own (a carrier's, or that of the entry's
//! home), because the next request of an entry is copied in the context of the thread that submitted it.
//!
//! /dev/fuse stays open beside the rings for what the kernel sends there only (see `messages`).

pub use cpus::PARKED;

mod affinity;
mod answer;
mod carriers;
mod cpus;
mod device;
mod exchange;
mod helpers;
mod lent;
mod memory;
mod messages;
mod queue;
mod ring;
mod serve;
pub mod wire;

use std::io;
use std::path::Path;
use std::sync::Arc;

use crossbeam_channel::{Receiver, bounded};
use rustix::thread::CpuSet;

use self::carriers::{Carrier, Load};
use self::device::{Device, Kernel};
use self::helpers::Helpers;
use self::memory::Entries;
use self::queue::Worker;
use self::ring::Ring;
use self::serve::SessionServer;
use crate::error::{Error, Kind, Result};
use crate::fuse::handshake::{self, Begun};
use crate::fuse::mount::DEVICE;
use crate::fuse::notify;
use crate::fuse::ops::FileSystem;
use crate::fuse::session::Connection;
use crate::fuse::settings::Settings;
use crate::io::process;

/// Whether the kernel's FUSE offers rings; the administrator's switch.
const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";

/// Carriers beyond one for each transport thread: where the host's lock of the file puts one to sleep, another copies. With
/// one, 1 MiB writes measured 1.06 of none, reads 1.08; a second one gained nothing.
const SPARE_CARRIERS: usize = 1;

/// A mounted folder whose handshake is done; see [`fuse::session::Session`](crate::fuse::session::Session).
pub(super) struct Session {
    device: Arc<Device>,
    /// With the CPU whose requests they get.
    rings: Vec<(Option<usize>, Ring)>,
    /// What the threads may run on, where it is known.
    cpus: Option<CpuSet>,
    carriers: Vec<Ring>,
    server: Arc<SessionServer>,
    helpers: usize,
}

/// One that serves.
pub(super) struct Serving {
    device: Arc<Device>,
    server: Arc<SessionServer>,
    sending: notify::Running,
    helpers: Helpers,
    /// By which the rings' threads are called.
    entries: Vec<Arc<Entries>>,
    load: Arc<Load>,
    over: Receiver<()>,
}

/// Whether this transport can be had here; if not, why, and what would help.
pub fn available() -> Result<()> {
    // Opening it loads the module, where it is one, and the switch with it.
    drop(std::fs::File::options().read(true).write(true).open(DEVICE));
    match std::fs::read_to_string(SWITCH) {
        Ok(text) if text.trim() == "Y" => {}
        Ok(_) => {
            let what = format!("FUSE over io_uring is switched off; switch it on with: echo Y > {SWITCH}");
            return Err(Error::new(Kind::Unsupported, what));
        }
        Err(_) if !Path::new("/sys/module").exists() => {
            let what = "/sys is not mounted, and the switch of FUSE over io_uring stands there: mount -t sysfs sysfs /sys";
            return Err(Error::new(Kind::Unsupported, what));
        }
        Err(_) => {
            let what = "this kernel has no FUSE over io_uring (Linux 6.14 with CONFIG_FUSE_IO_URING has)";
            return Err(Error::new(Kind::Unsupported, what));
        }
    }
    ring::make(&[&[cpus::Queue { id: 0, depth: 1 }]], 0).map(drop).map_err(|e| no_ring(&e))
}

fn no_ring(e: &io::Error) -> Error {
    let hint = match e.raw_os_error() {
        Some(libc::EPERM) => "; it may be switched off: sysctl kernel.io_uring_disabled=0",
        _ => "",
    };
    Error::new(Kind::Unsupported, format!("cannot make an io_uring: {}{hint}", crate::error::words(e)))
}

/// What serves requests from here on is run soon after it is woken: a submitter that still runs when its answer comes has
/// not been put to sleep, and is not woken on another, idle CPU, which in a virtual machine costs more than the request.
/// Measured with a slice of 100 us instead of 2.8 ms, on 2 CPUs: 4k QD1 reads 1.37, writes 1.45, loop QD32 1.18 and 1.10,
/// QD4 0.9, all else 1.0 to 1.1. On /dev/fuse, whose threads are not bound to CPUs, QD1 falls to 0.65.
fn soon() {
    if let Err(e) = process::run_soon() {
        log::debug!("threads run when their turn comes: {e}");
    }
}

/// Mounts, by `connect`, and answers the kernel's INIT. Asks for what the threads of the session inherit, and makes all
/// rings and their memory, because a sandbox would not let it later; starts no thread. Requests wait until
/// [`Session::start`].
pub(super) fn begin(
    fs: Arc<dyn FileSystem>,
    mountpoint: &Path,
    settings: &Settings,
    connect: impl FnOnce() -> Result<Connection>,
) -> Result<Begun<Session>> {
    available()?;
    soon();
    let cpus = process::note_cpus();
    let plans = cpus::plan();
    let queues: Vec<_> = plans.iter().map(|plan| &*plan.queues).collect();
    let (rings, carriers) =
        ring::make(&queues, settings.threads + SPARE_CARRIERS).map_err(|e| no_ring(&e))?;
    let rings = plans.iter().map(|plan| plan.cpu).zip(rings).collect();
    // Requests that the kernel gave to a ring are lost with their daemon: nothing is kept.
    let own = connect()?.descriptors.into_iter().next();
    let own = own.ok_or_else(|| Error::new(Kind::Io, "there is no connection to the kernel"))?;
    let device = Arc::new(Device::new(own));
    let passes_through = device
        .handshake(settings.max_background, settings.passthrough)
        .map_err(|e| handshake::failed(&e, mountpoint))?;
    let helpers = settings.threads;
    let server = Arc::new(SessionServer::new(fs, helpers, Some(device.clone())));
    let kernel = Box::new(Kernel(device.clone()));
    let session = Session { device, rings, cpus, carriers, server, helpers };
    Ok(Begun { session, kernel, passes_through })
}

impl Session {
    /// Starts the session's threads; all there are when it returns, and requests are served. The order: helpers and
    /// carriers before the rings' threads, because the kernel sends requests as soon as each of its queues has an entry.
    pub(super) fn start(self, sending: notify::Running) -> Result<Serving> {
        let Session { device, rings, cpus, carriers, server, helpers } = self;
        let helpers = Helpers::start(&server, helpers)?;
        // Nothing is sent through it: it is over when every thread has dropped its end.
        let (at_work, over) = bounded::<()>(0);
        let load = Arc::new(Load::new(&carriers));
        let mut entries = Vec::new();
        for (number, ring) in carriers.into_iter().enumerate() {
            let (server, device, bench, load) =
                (server.clone(), device.clone(), helpers.bench(), load.clone());
            Carrier { ring, server, device, bench, load, at_work: at_work.clone() }.start(number)?;
        }
        for (number, (cpu, ring)) in rings.into_iter().enumerate() {
            entries.push(ring.entries().clone());
            let (server, device, bench, load) =
                (server.clone(), device.clone(), helpers.bench(), load.clone());
            Worker { ring, server, device, bench, load, cpu, cpus, at_work: at_work.clone() }
                .start(number)?;
        }
        Ok(Serving { device, server, sending, helpers, entries, load, over })
    }
}

impl Serving {
    /// Serves what comes over /dev/fuse until the connection has ended, then reports that to the file system.
    ///
    /// The end: (1) /dev/fuse says so; (2) the server closes: what comes still is answered with EIO; (3) the rings'
    /// threads are called, and waited for until each has seen it; (4) the helpers finish. Only then (5) the file system
    /// hears of it, because no operation may follow.
    pub(super) fn wait(self) -> io::Result<()> {
        let Serving { device, server, sending, helpers, entries, load, over } = self;
        let served = messages::serve(&device, &server); // 1
        drop(sending);
        server.close(); // 2
        entries.iter().for_each(|ring| ring.call());
        load.call();
        let _ = over.recv(); // 3
        helpers.join(); // 4
        server.ended(); // 5
        served
    }
}
