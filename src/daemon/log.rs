//! The log of a mount: `.ploopfs/log` (under `/run` where the folder is read-only), or stderr with `-f`.
//!
//! Two files of 8 MiB at most. A thread that logs hands the line over and goes on: when the disk under the log
//! stands still, lines are dropped and counted, and no request waits. Until [`start_thread`] lines are written at
//! once, because the daemon has no thread before its sandbox.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::error::{Error, Kind, Result};

/// Length of one log file in bytes; with the older one, 16 MiB are the most that a mount keeps.
const MAX_FILE: u64 = 8 << 20;
/// Lines on their way to the file. A burst of one line for each of some thousand images fits.
const MAX_WAITING: usize = 4096;

/// Where lines end up.
#[derive(Debug)]
enum Sink {
    Stderr,
    File(Rotating),
}

impl Sink {
    /// A line that cannot be written has nowhere else to go.
    fn put(&mut self, line: &[u8]) {
        let _ = match self {
            Sink::Stderr => io::stderr().write_all(line),
            Sink::File(file) => file.write(line),
        };
    }
}

/// A file that is renamed and begun anew when it is long enough.
#[derive(Debug)]
struct Rotating {
    path: PathBuf,
    file: File,
    len: u64,
    max: u64,
}

impl Rotating {
    fn open(path: &Path, max: u64) -> io::Result<Rotating> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)?;
        let len = file.metadata()?.len();
        Ok(Rotating { path: path.to_owned(), file, len, max })
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.len > 0 && self.len + line.len() as u64 > self.max {
            let mut older = self.path.clone().into_os_string();
            older.push(".1");
            fs::rename(&self.path, &older)?;
            *self = Rotating::open(&self.path, self.max)?;
        }
        self.file.write_all(line)?;
        self.len += line.len() as u64;
        Ok(())
    }
}

/// What goes to the log's thread.
enum Line {
    Text(Vec<u8>),
    /// Answered when everything before it is written.
    Flush(Sender<()>),
}

/// The way from `log`'s macros to the sink.
struct Pipe {
    /// Until the thread runs: the sink itself. Used by the one thread that there is then.
    sink: Arc<Slot>,
    way: Arc<Way>,
}

#[derive(Default)]
struct Way {
    /// Set once, when the thread starts.
    channel: OnceLock<Sender<Line>>,
    /// Lines that found the channel full.
    dropped: AtomicU64,
}

/// The sink between its two owners: the lines of the first moments, then the thread, which takes it out. The
/// lock is a leaf: nothing else is locked under it.
type Slot = Mutex<Option<Sink>>;

impl Write for Pipe {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.way.channel.get() {
            None => {
                if let Some(sink) = self.sink.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
                    sink.put(line);
                }
            }
            Some(channel) => {
                if channel.try_send(Line::Text(line.to_vec())).is_err() {
                    self.way.dropped.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The log of this process, once it has one.
static LOG: OnceLock<(Arc<Slot>, Arc<Way>)> = OnceLock::new();

/// Opens the log: a file, or stderr for None. Once per process; panics are logged from here on.
pub fn open(path: Option<&Path>) -> Result<()> {
    let sink = match path {
        None => Sink::Stderr,
        Some(path) => Sink::File(
            Rotating::open(path, MAX_FILE).map_err(|e| Error::io(&e, path, "cannot open the log"))?,
        ),
    };
    let slot = Arc::new(Mutex::new(Some(sink)));
    let way = Arc::new(Way::default());
    let pipe = Pipe { sink: slot.clone(), way: way.clone() };
    let started = env_logger::Builder::new()
        .filter_level(log::LevelFilter::Info)
        // fuser tells of every request at debug, and warns of what our own messages say better.
        .filter_module("fuser", log::LevelFilter::Error)
        .parse_env("PLOOPFS_LOG")
        .target(env_logger::Target::Pipe(Box::new(pipe)))
        .write_style(env_logger::WriteStyle::Never)
        .format_timestamp_millis()
        .format_target(false)
        .try_init();
    started.map_err(|e| Error::new(Kind::Io, format!("cannot start the log: {e}")))?;
    // Fails only where a log was opened before, and then `try_init` has failed already.
    let _ = LOG.set((slot, way));
    std::panic::set_hook(Box::new(|panic| {
        let thread = thread::current();
        log::error!("thread {} panicked: {panic}", thread.name().unwrap_or("without a name"));
    }));
    Ok(())
}

/// Hands the sink to a thread of its own.
pub fn start_thread() -> Result<()> {
    let Some((slot, way)) = LOG.get() else { return Ok(()) };
    let Some(sink) = slot.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(()) };
    let (sender, receiver) = bounded(MAX_WAITING);
    let counts = way.clone();
    crate::io::process::spawn_detached("ploopfs/log", move || write_out(sink, &receiver, &counts))?;
    // Set once: the slot was taken by us.
    let _ = way.channel.set(sender);
    Ok(())
}

fn write_out(mut sink: Sink, lines: &Receiver<Line>, way: &Way) {
    for line in lines {
        match line {
            Line::Text(text) => sink.put(&text),
            Line::Flush(done) => drop(done),
        }
        let dropped = way.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            sink.put(format!("[... {dropped} lines dropped, the log was too slow]\n").as_bytes());
        }
    }
}

/// Waits until what was logged so far is written, but not for long: a log that stands still must not keep the
/// process alive.
pub fn flush() {
    const PATIENCE: Duration = Duration::from_secs(2);
    let Some(channel) = LOG.get().and_then(|(_, way)| way.channel.get()) else { return };
    let (done, written) = bounded(0);
    if channel.send_timeout(Line::Flush(done), PATIENCE).is_ok() {
        // Disconnected is the answer: the thread drops its end.
        let _ = written.recv_timeout(PATIENCE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_keeps_two_files_of_bounded_length() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("log");
        let mut file = Rotating::open(&path, 100).expect("a new file");
        for n in 0..50 {
            file.write(format!("line number {n:03}\n").as_bytes()).expect("written");
        }
        assert!(fs::metadata(&path).expect("the newer half").len() <= 100);
        assert!(fs::metadata(dir.path().join("log.1")).expect("the older half").len() <= 100);
        assert_eq!(fs::read_dir(dir.path()).expect("the folder").count(), 2);
        assert!(fs::read_to_string(&path).expect("text").ends_with("line number 049\n"));
    }

    #[test]
    fn a_log_that_stands_still_drops_lines_and_blocks_nobody() {
        let way = Arc::new(Way::default());
        let (sender, _receiver) = bounded(2);
        way.channel.set(sender).expect("not set yet");
        let mut pipe = Pipe { sink: Arc::new(Mutex::new(Some(Sink::Stderr))), way: way.clone() };
        for _ in 0..5 {
            pipe.write_all(b"x\n").expect("never fails");
        }
        assert_eq!(way.dropped.load(Ordering::Relaxed), 3);
    }
}
