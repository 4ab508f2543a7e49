//! Long work with an image, from the command line: by the daemon that serves it, live, else in this process under the
//! same locks. A bar on a terminal, nothing in a pipe; Ctrl-C cancels.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::cli::served::{self, Daemon};
use crate::cli::{out, size, target};
use crate::control::client::Client;
use crate::control::protocol::Amount;
use crate::disk::owner::{other_names, refuse_level};
use crate::disk::snapshots::{self, SnapshotLine};
use crate::disk::work as at_rest;
use crate::error::{Error, Kind, Result};
use crate::io::process::{is_ignored, spawn_detached};
use crate::progress::Progress;
use crate::vdisk::live::{Done, Work};
use crate::words::quoted;

/// How often work in this process is looked at: an even bar, and a Ctrl-C that is heard at once.
const LOOK: Duration = Duration::from_millis(100);

/// Options of every long command.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Pace {
    /// At most so much a second, such as 100M [default: as fast as it goes]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub rate: Option<u64>,
}

/// Who carries it out.
pub enum Executor {
    /// The daemon that serves the image under this name; and its other openers may go on.
    Live(Box<Daemon>, String),
    /// This process.
    Offline,
}

impl Executor {
    /// Who serves the image at `path`.
    pub fn of(path: &Path) -> Result<Executor> {
        let serving = served::serving(path)?;
        Ok(serving.map_or(Executor::Offline, |(daemon, image)| Executor::Live(Box::new(daemon), image.name)))
    }
}

/// Does `work` with the image at `path`, and waits for it.
pub fn carry_out(path: &Path, work: &Work, pace: Pace) -> Result<Done> {
    attempt(path, work, pace, watch_interrupts()?)
}

/// The same, also after a Ctrl-C: it clears up. A second one ends this process.
pub fn clear_up(path: &Path, work: &Work) -> Result<Done> {
    attempt(path, work, Pace { rate: None }, &TO_THE_END)
}

fn attempt(path: &Path, work: &Work, pace: Pace, interrupted: &AtomicBool) -> Result<Done> {
    // Before anything else: a daemon may serve the file under a name of its own.
    if !work.only_looks() {
        refuse_level(path)?;
        if let Some(names) = other_names(path) {
            out::say(&names);
        }
    }
    let mut place = Executor::of(path)?;
    let bar = Bar::new();
    let result = match &mut place {
        Executor::Live(daemon, name) => live(daemon, name, work, pace, interrupted, &bar),
        Executor::Offline => here(path, work, pace, interrupted, &bar),
    };
    bar.end();
    match result {
        Err(e) if e.kind() == Kind::Cancelled => Err(cancelled(path, work)),
        Err(e) if matches!(work, Work::Switch { .. }) && e.kind() == Kind::Busy => Err(busy(path, &e)),
        // The message names the snapshot that is open; who has the disk open does not matter.
        Err(e) if matches!(work, Work::Delete { .. } | Work::Merge { .. }) && e.kind() == Kind::Busy => {
            Err(e.with_kind(Kind::InUse))
        }
        other => other,
    }
}

/// Set by the first signal that ends a program, for the rest of this process.
static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();
/// Of work that clears up after an interrupted one, and is not itself interrupted.
static TO_THE_END: AtomicBool = AtomicBool::new(false);

/// The first Ctrl-C, and the end of the terminal likewise, cancels; the second ends this process at once. A signal that was
/// to be ignored from the start (nohup) stays ignored.
fn watch_interrupts() -> Result<&'static AtomicBool> {
    if let Some(watched) = INTERRUPTED.get() {
        return Ok(watched);
    }
    let interrupted = INTERRUPTED.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| !is_ignored(*signal)) {
        // The order matters: the first signal finds the flag unset, and then sets it.
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, interrupted.clone())
            .and_then(|_| signal_hook::flag::register(signal, interrupted.clone()))
            .map_err(|e| Error::new(Kind::Io, format!("cannot watch for Ctrl-C: {e}")))?;
    }
    Ok(interrupted)
}

/// True when the work of this process is to end.
pub fn is_interrupted() -> bool {
    INTERRUPTED.get().is_some_and(|interrupted| interrupted.load(Ordering::Relaxed))
}

fn live(
    daemon: &mut Daemon,
    name: &str,
    work: &Work,
    pace: Pace,
    interrupted: &AtomicBool,
    bar: &Bar,
) -> Result<Done> {
    let images = daemon.folder.clone();
    let mut asked = false;
    daemon.client.work(name, work, pace.rate, &mut |amount| {
        bar.show(amount);
        if interrupted.load(Ordering::Relaxed) && !asked {
            asked = true;
            // On a line of its own: this one waits for the end. Work that ended meanwhile needs no cancelling.
            if let Ok(Some(mut second)) = Client::find(&images) {
                let _ = second.cancel(name);
            }
        }
    })
}

fn here(path: &Path, work: &Work, pace: Pace, interrupted: &AtomicBool, bar: &Bar) -> Result<Done> {
    let (image, work) = (path.to_owned(), work.clone());
    watch(path, pace, interrupted, bar, move |progress| at_rest::carry_out(&image, &work, progress))
}

/// Does long work of another sort in this process, with its bar and its Ctrl-C. `path` is for messages.
pub fn watched<T: Send + 'static>(
    path: &Path,
    pace: Pace,
    work: impl FnOnce(&Progress) -> Result<T> + Send + 'static,
) -> Result<T> {
    watched_with(path, pace, "nothing is left of it", work)
}

/// The same; `left` says what a cancelled one leaves.
pub fn watched_with<T: Send + 'static>(
    path: &Path,
    pace: Pace,
    left: &str,
    work: impl FnOnce(&Progress) -> Result<T> + Send + 'static,
) -> Result<T> {
    let interrupted = watch_interrupts()?;
    let bar = Bar::new();
    let result = watch(path, pace, interrupted, &bar, work);
    bar.end();
    // Whatever it failed with after that: it was on its way to its end.
    result.map_err(|e| match is_interrupted() {
        true => Error::at(Kind::Cancelled, path, format!("cancelled; {left}")),
        false => e,
    })
}

fn watch<T: Send + 'static>(
    path: &Path,
    pace: Pace,
    interrupted: &AtomicBool,
    bar: &Bar,
    work: impl FnOnce(&Progress) -> Result<T> + Send + 'static,
) -> Result<T> {
    let progress = Arc::new(Progress::with_rate(pace.rate));
    let (send, receive) = channel();
    let worker = progress.clone();
    // The receiver is gone only when this process ends.
    spawn_detached("ploopfs/work", move || drop(send.send(work(&worker))))?;
    loop {
        match receive.recv_timeout(LOOK) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::at(
                    Kind::Io,
                    path,
                    "the work was abandoned; `ploopfs check` shows its state",
                ));
            }
            Err(RecvTimeoutError::Timeout) => {
                let (done, total) = progress.so_far();
                bar.show(Amount { done, total });
                if interrupted.load(Ordering::Relaxed) {
                    progress.cancel();
                }
            }
        }
    }
}

/// The image at `path` as it is found after work with it, absolute: its first snapshot has made a file a folder, and its last
/// one may have made it a file again.
pub fn as_it_is(path: &Path) -> PathBuf {
    let found = target::find(path).unwrap_or_else(|_| path.to_owned());
    std::path::absolute(&found).unwrap_or(found)
}

/// The snapshots of the image at `path`, served or at rest.
pub fn snapshots(path: &Path) -> Result<Vec<SnapshotLine>> {
    match Executor::of(path)? {
        Executor::Live(mut daemon, name) => daemon.client.snapshots(&name),
        Executor::Offline => snapshots::of(path, false),
    }
}

/// What a cancelled command leaves behind, as the image says it.
fn cancelled(path: &Path, work: &Work) -> Error {
    let state = match work {
        Work::Delete { snapshot } | Work::Merge { snapshot } => match snapshots(path) {
            Ok(lines) if lines.iter().any(|l| l.is(snapshot) && !l.temporary) => {
                format!("the snapshot {snapshot} is there as before")
            }
            // It is listed by its GUID: the name is free.
            Ok(lines) if lines.iter().any(|l| l.temporary) => format!(
                "the snapshot {snapshot} is marked as deleted and not merged yet; nothing is lost, and this goes on: \
                 ploopfs snapshot delete {} {}",
                quoted(path),
                quoted(snapshot)
            ),
            Ok(_) => format!("too late: the snapshot {snapshot} is merged"),
            Err(e) => format!("what is left cannot be read now ({e})"),
        },
        Work::Clone { to, .. } => match &to[..] {
            [one] => format!("{} was not made", one.display()),
            all => format!("none of {} images was made", all.len()),
        },
        Work::Resize { .. } => "the disk has its old size".to_owned(),
        Work::Compact { .. } => "what was moved and freed until then stays so".to_owned(),
        Work::Finish => "what is left goes on at the next use".to_owned(),
        Work::Snapshot { .. } | Work::Switch { .. } | Work::Track { .. } | Work::Untrack => {
            "the image is as it was".to_owned()
        }
    };
    Error::at(Kind::Cancelled, path, format!("cancelled; {state}"))
}

/// The image is open: by whom.
fn busy(path: &Path, e: &Error) -> Error {
    let openers = served::image(path).ok().flatten().map(|live| live.openers).unwrap_or_default();
    if openers.is_empty() {
        return e.with_kind(Kind::InUse);
    }
    Error::new(Kind::InUse, format!("{e}; open by: {}", openers.join(", ")))
}

/// Shown on a terminal only, and only for work that takes a while.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Bar {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(5));
        let style =
            ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Bar(bar)
    }

    fn show(&self, amount: Amount) {
        if amount.total > 0 {
            self.0.set_length(amount.total);
            self.0.set_position(amount.done.min(amount.total));
        }
    }

    fn end(&self) {
        self.0.finish_and_clear();
    }
}
