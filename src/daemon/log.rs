//! The log of a mount: `.ploopfs/log` (under `/run` where the folder is read-only), or stderr with `-f`.
//!
//! Two files of 8 MiB at most. A thread that logs hands the line over and goes on: when the disk under the log
//! stands still, lines are dropped and counted, and no request waits. Until [`start_thread`] lines are written at
//! once, because the daemon has no thread before its sandbox.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::fs::{Mode, OFlags};

use crate::control::place::{ControlPlace, LOG};
use crate::error::{Error, Kind, Result, printable};
use crate::io::foreign;
use crate::io::rename::rename_over;
use crate::sync::plain::lock;

/// Length of one log file in bytes; with the older one, 16 MiB are the most that a mount keeps.
const MAX_FILE: u64 = 8 << 20;
/// Name of the older half.
const OLDER: &str = "log.1";
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

/// A file that is renamed and begun anew when it is long enough. It lies in a folder that others may own, so all goes by
/// the folder's descriptor, and a file that is not ours is never written.
#[derive(Debug)]
struct Rotating {
    dir: OwnedFd,
    file: File,
    len: u64,
    max: u64,
}

impl Rotating {
    fn open(dir: OwnedFd, max: u64) -> io::Result<Rotating> {
        let file = open_log(&dir)?;
        let len = file.metadata()?.len();
        Ok(Rotating { dir, file, len, max })
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.len > 0 && self.len + line.len() as u64 > self.max {
            self.rotate()?;
        }
        self.file.write_all(line)?;
        self.len += line.len() as u64;
        Ok(())
    }

    /// Where the older half cannot be kept (the folder's owner has put something in its way), it is given up: the log stays
    /// bounded, and goes on.
    fn rotate(&mut self) -> io::Result<()> {
        let moved = rename_over(self.dir.as_fd(), LOG.as_ref(), OLDER.as_ref());
        match moved.map_err(io::Error::from).and_then(|()| open_log(&self.dir)) {
            Ok(file) => {
                self.len = file.metadata()?.len();
                self.file = file;
            }
            Err(_) => {
                self.file.set_len(0)?;
                self.len = 0;
            }
        }
        Ok(())
    }
}

fn open_log(dir: &OwnedFd) -> io::Result<File> {
    let file = foreign::own_file(dir, LOG, OFlags::WRONLY | OFlags::APPEND, true)?;
    // It may be older, and readable for others.
    rustix::fs::fchmod(&file, Mode::RUSR | Mode::WUSR)?;
    Ok(file)
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
    /// Takes one whole record, and makes one line of it.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let record = String::from_utf8_lossy(line);
        let text = printable(record.strip_suffix('\n').unwrap_or(&record)) + "\n";
        match self.way.channel.get() {
            None => {
                if let Some(sink) = lock(&self.sink).as_mut() {
                    sink.put(text.as_bytes());
                }
            }
            Some(channel) => {
                if channel.try_send(Line::Text(text.into())).is_err() {
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
static OPENED: OnceLock<(Arc<Slot>, Arc<Way>)> = OnceLock::new();

/// Opens the log: the file in a place, or stderr for None. Once per process; panics are logged from here on.
pub(super) fn open(place: Option<&ControlPlace>) -> Result<()> {
    let sink = match place {
        None => Sink::Stderr,
        Some(place) => {
            let dir = place.as_fd().try_clone_to_owned();
            let file = dir.and_then(|dir| Rotating::open(dir, MAX_FILE));
            Sink::File(file.map_err(|e| Error::io(&e, place.path(LOG), "cannot open the log"))?)
        }
    };
    let slot = Arc::new(Mutex::new(Some(sink)));
    let way = Arc::new(Way::default());
    let pipe = Pipe { sink: slot.clone(), way: way.clone() };
    let started = env_logger::Builder::new()
        .filter_level(log::LevelFilter::Info)
        // fuser logs every request at debug, and warns of what our own messages say better.
        .filter_module("fuser", log::LevelFilter::Error)
        .parse_env("PLOOPFS_LOG")
        .target(env_logger::Target::Pipe(Box::new(pipe)))
        .write_style(env_logger::WriteStyle::Never)
        .format_timestamp_millis()
        .format_target(false)
        .try_init();
    started.map_err(|e| Error::new(Kind::Io, format!("cannot start the log: {e}")))?;
    // Fails only where a log was opened before, and then `try_init` has failed already.
    let _ = OPENED.set((slot, way));
    std::panic::set_hook(Box::new(|panic| {
        let thread = thread::current();
        log::error!("thread {} panicked: {panic}", thread.name().unwrap_or("without a name"));
    }));
    Ok(())
}

/// Hands the sink to a thread of its own.
pub(super) fn start_thread() -> Result<()> {
    let Some((slot, way)) = OPENED.get() else { return Ok(()) };
    let Some(sink) = lock(slot).take() else { return Ok(()) };
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
pub(super) fn flush() {
    const PATIENCE: Duration = Duration::from_secs(2);
    let Some(channel) = OPENED.get().and_then(|(_, way)| way.channel.get()) else { return };
    let (done, written) = bounded(0);
    if channel.send_timeout(Line::Flush(done), PATIENCE).is_ok() {
        // Disconnected is the answer: the thread drops its end.
        let _ = written.recv_timeout(PATIENCE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    fn opened(dir: &Path) -> OwnedFd {
        File::open(dir).expect("opens").into()
    }

    #[test]
    fn a_log_whose_older_half_is_in_the_way_stays_bounded_and_writes_no_other_file() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (path, other) = (dir.path().join(LOG), dir.path().join("other"));
        fs::create_dir_all(dir.path().join(OLDER).join("full")).expect("a folder in the way");
        fs::write(&other, "precious").expect("written");
        let mut file = Rotating::open(opened(dir.path()), 100).expect("a new file");
        for n in 0..50 {
            file.write(format!("line number {n:03}\n").as_bytes()).expect("written");
        }
        assert!(fs::metadata(&path).expect("there").len() <= 100);
        // While it is open, its name is given to another file.
        fs::remove_dir_all(dir.path().join(OLDER)).expect("removed");
        fs::remove_file(&path).expect("removed");
        std::os::unix::fs::symlink("other", &path).expect("a link");
        for n in 0..50 {
            file.write(format!("line number {n:03}\n").as_bytes()).expect("written");
        }
        assert_eq!(fs::read_to_string(&other).expect("there"), "precious");
        assert!(path.symlink_metadata().expect("there").is_file());
    }

    #[test]
    fn the_log_keeps_two_files_of_bounded_length() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join(LOG);
        let mut file = Rotating::open(opened(dir.path()), 100).expect("a new file");
        for n in 0..50 {
            file.write(format!("line number {n:03}\n").as_bytes()).expect("written");
        }
        assert!(fs::metadata(&path).expect("the newer half").len() <= 100);
        assert!(fs::metadata(dir.path().join("log.1")).expect("the older half").len() <= 100);
        assert_eq!(fs::read_dir(dir.path()).expect("the folder").count(), 2);
        assert!(fs::read_to_string(&path).expect("text").ends_with("line number 049\n"));
    }

    #[test]
    fn a_name_with_control_characters_stays_one_line_and_drives_no_terminal() {
        let (sender, receiver) = bounded(2);
        let way = Arc::new(Way::default());
        way.channel.set(sender).expect("not set yet");
        let mut pipe = Pipe { sink: Arc::new(Mutex::new(None)), way };
        pipe.write_all(b"[WARN ] a\x1b]0;owned\x07\n[ERROR] forged\xff\x9b\n").expect("never fails");
        let Ok(Line::Text(text)) = receiver.try_recv() else { panic!("no line") };
        let text = String::from_utf8(text).expect("made printable");
        assert_eq!(text, "[WARN ] a\\u{1b}]0;owned\\u{7}\\n[ERROR] forged\u{fffd}\u{fffd}\n");
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
