//! The daemon's start, in the order of docs/design.md#start, and its way to the end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::keeping::ToKeeper;
use super::link::{self, FromKeeper, Link};
use super::log;
use super::sandbox::{self, Borders};
use super::service::{DaemonIdentity, Desk};
use super::settings::{self, BACKGROUND, Settings};
use super::stop::Ending;
use super::wire::{self, Note};
use crate::control::place::ControlPlace;
use crate::control::server::ControlServer;
use crate::error::{Error, Kind, Result};
use crate::folder::{Folder, FolderOptions};
use crate::fuse::session::{self, Connection, Transport};
use crate::fuse::uring;
use crate::io::folder_lock::FolderLock;
use crate::io::heirs::{Estate, Fixture, Heirs, Keeping};
use crate::io::holder;
use crate::io::reads::Reads;
use crate::io::{foreign, process};
use crate::ledger::deaths::{self, Verdict};
use crate::ledger::running;
use crate::tree::{self, MountInfo, Restarts, Sandbox, Tree};
use crate::vdisk::Engine;

/// Descriptors that a mount should be able to have: two for each of some ten thousand images in use.
const DESCRIPTORS: u64 = 32_768;

/// The hidden command `daemon`: serves one folder; its settings come on standard input.
pub fn main() -> ExitCode {
    process::close_inherited();
    let mut keeper_says = link::from_keeper();
    match begin(&mut keeper_says).and_then(|settings| serve(settings, keeper_says)) {
        Ok(never) => match never {},
        Err(e) => {
            // A keeper that is gone passes nothing on.
            let _ = link::send(&wire::failure(&e));
            ExitCode::from(e.kind().exit_status())
        }
    }
}

fn begin(keeper_says: &mut FromKeeper) -> Result<Settings> {
    let settings: Option<Settings> = match wire::get(keeper_says) {
        // No connection: started by hand, from a shell.
        Err(e) if e.raw_os_error() == Some(libc::ENOTSOCK) => None,
        said => said.map_err(|e| Error::new(Kind::Io, format!("cannot read the settings: {e}")))?,
    };
    let settings = settings.ok_or_else(|| {
        Error::new(Kind::Invalid, "this command is started by `ploopfs mount`, not by hand")
    })?;
    // A name for `ps`; without it we are called "exe".
    let _ = process::name_this_thread("ploopfs");
    // What we make (log, socket, lock) is for this user alone.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    Ok(settings)
}

/// Never returns once the mount works: the process ends with it.
///
/// Order: (1) the log, because everything after it may have to complain; (2) the locks, because what follows
/// belongs to one daemon alone: the socket of a living one must not be unlinked; (3) the socket, so that a mount
/// that can be seen can be asked; (4) the mount, which the keeper makes, and its handshake; (5) the hygiene and the watch
/// on the folder, which the sandbox would forbid; (6) the sandbox; threads inherit both, so (7) the first thread comes
/// after them; (8) readiness, when every thread that the mount cannot do without is there and requests are served.
fn serve(settings: Settings, mut keeper_says: FromKeeper) -> Result<std::convert::Infallible> {
    let ledger = settings.restart_timeout().map(|_| link::ledger(&mut keeper_says)).transpose()?;
    let (transport, fallen_back) = match &ledger {
        // What the kernel gave to a ring is lost with the daemon.
        Some(_) => (Transport::Fuse, None),
        None => transport(settings.transport)?,
    };
    // A successor has all that there is before it opens anything: what it opened itself would be without the locks.
    let handed = settings.takes_over.then(|| link::handed(&mut keeper_says)).transpose()?;
    let (mut connection, estate) = handed.map_or_else(
        || (None, Estate::default()),
        |handed| (Some((handed.connection, handed.device)), handed.estate),
    );
    let heirs = match &ledger {
        Some(_) => Arc::new(Heirs::new(to_keeper()?, estate)),
        None => Arc::default(),
    };
    // Its path may mean another folder by now.
    let dir = match heirs.take_fixture(Fixture::Folder) {
        Some(dir) => dir,
        None => open_images(settings.images())?,
    };
    let place = ControlPlace::make(&dir, settings.images())?;
    log::open((!settings.foreground).then_some(&place))?;
    if let Some(ledger) = &ledger {
        let verdict = ledger.judge_deaths(settings.faults);
        say_verdict(&verdict);
        running::watch(ledger, verdict);
    }

    let restarts = Arc::new(Restarts::default());
    restarts.set(settings.restarts, 0);
    let link = Arc::new(Link::new(restarts.clone()));
    // An open that finds a lock is answered before the holder is looked for.
    holder::name_later();
    let mut options = settings.engine();
    if transport == Transport::Uring {
        // A quarter of it may be parked: never more than half of one queue.
        options.background = options.background.min(4 * uring::PARKED);
    }
    let engine = Engine::new(options, link.listener());
    match Reads::new() {
        Ok(reads) => engine.queue_reads(reads),
        // Forbidden (kernel.io_uring_disabled), or too old a kernel.
        Err(e) => ::log::info!("no io_uring for reads that wait for a disk ({e}): threads wait instead"),
    }
    let note = settings.mountpoint().display().to_string();
    // A folder that cannot be written holds no lock; what stands for it under /run does.
    let outside = (!place.is_inside())
        .then(|| FolderLock::acquire(&place, settings.images(), &note, true, &heirs))
        .transpose()?;
    let options = FolderOptions {
        read_only: settings.read_only,
        note,
        allow_outside: settings.allow_outside,
        direct: settings.direct,
        heirs: heirs.clone(),
        left_open: ledger.as_ref().map(|ledger| tree::left_open(ledger.found())).unwrap_or_default(),
        ledger: ledger.clone(),
        #[cfg(feature = "faults")]
        wrap: settings.fault.as_deref().map(faults).transpose()?,
    };
    let ledger_kept = ledger.is_some();
    let folder = Folder::open_at(dir, settings.images(), &engine, options)?;

    let server = ControlServer::bind(&place, &heirs)?;

    let root = rustix::process::geteuid().is_root();
    let mut device = None;
    let confined = Arc::new(OnceLock::new());
    let tree = Tree::new(
        folder.clone(),
        engine.clone(),
        mount_info(&settings, transport, confined.clone(), restarts.clone()),
    );
    let session = session::over(
        transport,
        tree.clone(),
        settings.mountpoint(),
        &session::Settings {
            threads: settings.threads,
            allow_other: settings.lets_others_in(),
            read_only: settings.read_only,
            fs_name: settings.images.clone(),
            max_background: BACKGROUND,
            passthrough: settings.passthrough,
            asked: settings.asked.clone(),
        },
        || {
            let (descriptors, number) = match connection.take() {
                Some(handed) => handed,
                None => {
                    let handed = link::mounted(&mut keeper_says)?;
                    (handed.connection, handed.device)
                }
            };
            device = Some(number);
            Ok(Connection { descriptors, ledger })
        },
    )?;

    folder.announce_to(tree::announcer(session.notifier()));

    let mut refused = process::harden(DESCRIPTORS);
    if ledger_kept {
        refused.extend(process::keep_out_of_core_files().err());
    }
    let mut notes: Vec<String> = process::in_one_line(&refused).into_iter().collect();
    notes.extend(fallen_back.map(|why| format!("FUSE over io_uring, using /dev/fuse: {why}")));
    notes.extend(place.without_room());
    notes.extend(settings.no_restart.clone());
    if !root {
        let why = match settings.allow_other {
            true => "not running as root: no loop device can use the mount",
            false => "not running as root: only this user can see the mount, and no loop device can use it",
        };
        notes.insert(0, why.into());
    }
    if settings.passthrough {
        match session.passes_through() {
            true if root => folder.pass_through(),
            true => notes.push("passthrough: only root has it; raw images are served as others are".into()),
            false => {
                let why = "this kernel has none (Linux 6.9 with CONFIG_FUSE_PASSTHROUGH has)";
                notes.push(format!("passthrough: {why}; raw images are served as others are"));
            }
        }
    }

    let watched = folder.prepare_watch();
    let active = if settings.sandbox {
        let (own, anywhere, passthrough) = (place.as_fd(), settings.allow_outside, settings.passthrough);
        let (active, missing) =
            sandbox::enter(Borders { images: folder.dir(), own, anywhere, transport, passthrough })?;
        notes.extend(missing);
        active
    } else {
        Sandbox::default()
    };
    // Set here alone.
    let _ = confined.set(active);

    let keeper = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get().unsigned_abs());
    let ending = Arc::new(Ending::new(settings.clone(), folder.clone(), link.clone()));
    log::start_thread()?;
    engine.start()?;
    ::log::info!(
        "ploopfs {}: {} on {} (transport {}), process {}",
        env!("CARGO_PKG_VERSION"),
        settings.images().display(),
        settings.mountpoint().display(),
        transport.name(),
        std::process::id()
    );
    ::log::info!("sandbox: {active}");
    for note in &notes {
        ::log::warn!("{note}");
    }
    watch_signals(&ending)?;
    ending.start()?;
    link.start(keeper_says)?;
    if active.landlock || active.seccomp {
        link.confine();
    }
    if settings.takes_over {
        // Before anything of the folder is changed: what an operation has left is finished behind it, by the watch.
        tree.restore()?;
    }
    let place = DaemonIdentity { keeper, device, restarts };
    let desk = Desk::new(settings.clone(), folder.clone(), ending.clone(), place, active, transport);
    let clients = server.start(Arc::new(desk))?;
    let started = folder.start_watch();
    if let Err(e) = watched.and(started) {
        ::log::warn!("{e}; new images are seen at the next mount");
    }
    // Behind this no thread is needed that might not be had: what finds none later is done by those there are.
    let serving = session.start()?;
    let ready = link::send(&Note::Ready { notes });
    ready.map_err(|e| Error::new(Kind::Io, format!("the keeper is gone: {e}")))?;

    if let Err(e) = serving.wait() {
        ::log::error!("the connection to the kernel ended with an error: {e}");
    }
    let closed = ending.close_all();
    // Held to here: the socket under /run is ours as long as it is answered.
    drop(outside);
    ending.exit(&closed, &|| clients.count())
}

/// What the deaths of other daemons mean for what they did.
fn say_verdict(verdict: &Verdict) {
    if let Some(work) = verdict.convicted {
        ::log::error!(
            "{} ended a daemon that did nothing else: it gets EIO from now on",
            deaths::spelled(work)
        );
    }
    if verdict.apart {
        let mut all: Vec<_> = verdict.suspects.iter().map(|work| deaths::spelled(*work)).collect();
        all.sort();
        ::log::warn!("two daemons in a row died over {}: executed apart from now on", all.join(", "));
    }
}

/// Where open files are kept for a successor.
fn to_keeper() -> Result<Arc<dyn Keeping>> {
    let to = ToKeeper::new().map_err(|e| Error::new(Kind::Io, format!("the line to the keeper: {e}")))?;
    Ok(Arc::new(to))
}

/// The one descriptor of the folder, through which all of it is reached: its path may be another user's to change.
fn open_images(images: &Path) -> Result<OwnedFd> {
    foreign::resolved_folder(images).map_err(|e| match e.raw_os_error() {
        Some(libc::ELOOP | libc::ENOTDIR) => {
            Error::at(Kind::Invalid, images, "was replaced by a link just now; mount it again")
        }
        _ => Error::io(&e, images, "cannot open the images folder"),
    })
}

/// Files that fail as `--fault SPEC` says.
#[cfg(feature = "faults")]
fn faults(spec: &str) -> Result<crate::folder::Wrap> {
    use crate::io::fault::{FaultFile, FaultPlan};
    let plan: FaultPlan = spec.parse().map_err(|e| Error::new(Kind::Invalid, format!("--fault: {e}")))?;
    let plan = Arc::new(plan);
    Ok(Arc::new(move |file| Arc::new(FaultFile::new(file, plan.clone()))))
}

/// The transport to use; why not the better one, where that was for us to choose.
fn transport(wanted: settings::WantedTransport) -> Result<(Transport, Option<Error>)> {
    match wanted {
        settings::WantedTransport::Auto => Ok(Transport::best()),
        settings::WantedTransport::Fuse => Ok((Transport::Fuse, None)),
        settings::WantedTransport::Uring => uring::available().map(|()| (Transport::Uring, None)),
    }
}

fn mount_info(
    settings: &Settings,
    transport: Transport,
    sandbox: Arc<OnceLock<Sandbox>>,
    restarts: Arc<Restarts>,
) -> MountInfo {
    MountInfo {
        mountpoint: settings.mountpoint().to_owned(),
        transport: transport.name(),
        manage: settings.manage,
        sandbox,
        restarts,
    }
}

/// Signals come as requests to end, on a thread of their own.
fn watch_signals(ending: &Arc<Ending>) -> Result<()> {
    let failed = |e: io::Error| Error::new(Kind::Io, format!("cannot watch for signals: {e}"));
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(failed)?;
    let ending = ending.clone();
    let body = move || signals.forever().for_each(|signal| ending.request(name_of(signal)));
    process::spawn_detached("ploopfs/signals", body)
}

fn name_of(signal: i32) -> &'static str {
    match signal {
        SIGINT => "SIGINT",
        SIGHUP => "SIGHUP",
        _ => "SIGTERM",
    }
}
