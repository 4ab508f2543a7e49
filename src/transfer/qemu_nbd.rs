//! The disk in a file of another program's format, read and written at will: by a `qemu-nbd` of our own, to which we are
//! connected before it starts. No name of its socket is left by then, so that nothing remains whatever ends us, and
//! no other process can connect.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use super::nbd::Connection;
use super::pieces::HANDS;
use super::qemu::{absolute, cannot_run, ours, refused, said};
use crate::error::{Error, Kind, Result};
use crate::format::descriptor::Guid;
use crate::progress::Progress;
use crate::sync::plain::lock;

const PROGRAM: &str = "qemu-nbd";
/// What a shell ends with that does not find the program.
const NOT_FOUND: i32 = 127;
/// Starts the program with the listening socket, which comes as standard input, as systemd hands sockets on
/// (sd_listen_fds(3)): on descriptor 3, with the process' own number, which only the process itself knows.
const START: &str = r#"LISTEN_PID=$$ LISTEN_FDS=1; export LISTEN_PID LISTEN_FDS; exec "$@" 3<&0 </dev/null"#;
/// How often is looked whether it is still wanted, and whether it has ended.
const LOOK: Duration = Duration::from_millis(20);
/// After this it will never speak, nor end. A slow disk may take seconds to open or close a file.
const PATIENCE: Duration = Duration::from_secs(60);
/// After this it will never answer: longer than the kernel waits for a disk.
const ANSWER: Duration = Duration::from_secs(300);

/// A file that qemu-nbd reads or writes for us. Dropped, the program is ended.
#[derive(Debug)]
pub(super) struct QemuNbd {
    /// The file, for messages.
    path: PathBuf,
    child: Child,
    /// What the program says before it ends.
    said: Option<JoinHandle<Vec<u8>>>,
    /// As many as threads that copy. Each is held by one thread as long as it asks and hears; each a leaf.
    connections: Vec<Mutex<Connection>>,
    /// Whose turn it is where all are in use.
    turn: AtomicUsize,
}

impl QemuNbd {
    /// Opens `file`, which is of `format`, with what it stands on, for reading.
    pub(super) fn reading(file: &Path, format: &str, progress: &Progress) -> Result<QemuNbd> {
        QemuNbd::start(file, format, &["--read-only"], file, progress)
    }

    /// Opens `file`, which is of `format`, for writing; `shown` is for messages.
    pub(super) fn writing(file: &Path, format: &str, shown: &Path, progress: &Progress) -> Result<QemuNbd> {
        QemuNbd::start(file, format, &[], shown, progress)
    }

    fn start(file: &Path, format: &str, how: &[&str], shown: &Path, progress: &Progress) -> Result<QemuNbd> {
        let cannot = |e: io::Error| Error::new(Kind::Io, format!("cannot make a socket for {PROGRAM}: {e}"));
        let (listener, streams) = connected().map_err(cannot)?;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", START, "sh", PROGRAM, "--shared", &HANDS.to_string(), "--format", format]);
        command.args(how).arg(absolute(file)?);
        command.stdin(Stdio::from(OwnedFd::from(listener))).stdout(Stdio::null()).stderr(Stdio::piped());
        let spawned = ours(&mut command).spawn();
        // Ours of the listening socket goes with it: when the program ends, its connections do.
        drop(command);
        let mut child = spawned.map_err(|e| cannot_run(PROGRAM, &e))?;
        let said = child.stderr.take().map(|stderr| std::thread::spawn(move || said(stderr)));
        let mut nbd = QemuNbd {
            path: shown.to_owned(),
            child,
            said,
            connections: Vec::new(),
            turn: AtomicUsize::new(0),
        };
        for stream in streams {
            let mut connection = Connection::new(stream);
            nbd.greet(&mut connection, progress)?;
            nbd.connections.push(Mutex::new(connection));
        }
        Ok(nbd)
    }

    /// Waits until it speaks, or has ended.
    fn greet(&mut self, connection: &mut Connection, progress: &Progress) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        let mut heard = connection.patience(Some(LOOK));
        while heard.is_ok() {
            progress.check()?;
            match connection.speaks() {
                Ok(true) => break,
                Ok(false) if Instant::now() < end => {}
                Ok(false) => heard = Err(io::ErrorKind::TimedOut.into()),
                Err(e) => heard = Err(e),
            }
        }
        let heard = heard.and_then(|()| connection.patience(Some(ANSWER))).and_then(|()| connection.begin());
        heard.map_err(|e| match self.ended(progress) {
            Ok(status) => self.refused(status),
            Err(_) => self.lost(&e),
        })
    }

    /// Size of the disk in bytes.
    pub(super) fn size(&self) -> u64 {
        self.connections.first().map_or(0, |first| lock(first).size)
    }

    /// Reads all of `buf` at byte `offset`, from any thread.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let errno = self.connection().read(offset, buf).map_err(|e| self.lost(&e))?;
        self.answered(errno, || format!("cannot read byte {offset}"))
    }

    /// Writes all of `buf` at byte `offset`, from any thread.
    pub(super) fn write(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let errno = self.connection().write(offset, buf).map_err(|e| self.lost(&e))?;
        self.answered(errno, || format!("cannot write byte {offset}"))
    }

    /// Ends what was written: 1. it is made durable; 2. the program, without connections, closes the file and ends.
    ///
    /// Without 2 the file could lack what its format writes at its end.
    pub(super) fn finish(mut self, progress: &Progress) -> Result<()> {
        // 1.
        let errno = self.connection().flush().map_err(|e| self.lost(&e))?;
        self.answered(errno, || "cannot make it durable".to_owned())?;
        // 2.
        self.connections.clear();
        let status = self.ended(progress)?;
        if status.success() { Ok(()) } else { Err(self.refused(status)) }
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        let free = self.connections.iter().find_map(|connection| connection.try_lock().ok());
        free.unwrap_or_else(|| {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed);
            lock(&self.connections[turn % self.connections.len()])
        })
    }

    /// `errno` is the program's answer; 0: it did what was asked.
    fn answered(&self, errno: u32, asked: impl FnOnce() -> String) -> Result<()> {
        if errno == 0 {
            return Ok(());
        }
        // The protocol's numbers are those of Linux.
        let e = io::Error::from_raw_os_error(errno.try_into().unwrap_or(libc::EIO));
        Err(Error::io(&e, &self.path, format!("{PROGRAM} {}", asked())))
    }

    /// Waits until the program has ended, which it is about to.
    fn ended(&mut self, progress: &Progress) -> Result<ExitStatus> {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Ok(status),
                Ok(None) if Instant::now() < end => {}
                Ok(None) => return Err(self.lost(&io::ErrorKind::TimedOut.into())),
                Err(e) => return Err(self.lost(&e)),
            }
            progress.check()?;
            std::thread::sleep(LOOK);
        }
    }

    /// It has ended: why, in its own words.
    fn refused(&mut self, status: ExitStatus) -> Error {
        if status.code() == Some(NOT_FOUND) {
            return cannot_run(PROGRAM, &io::ErrorKind::NotFound.into());
        }
        let said = self.said.take().and_then(|said| said.join().ok()).unwrap_or_default();
        refused(PROGRAM, &self.path, &said)
    }

    fn lost(&self, e: &io::Error) -> Error {
        let what = format!("{PROGRAM}, which opened it, does not answer: {}", crate::error::words(e));
        Error::at(Kind::Io, &self.path, what)
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        // What it wrote counts only once it was finished. It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(said) = self.said.take() {
            let _ = said.join();
        }
    }
}

/// A listening socket without a name, and connections to it that it has not taken yet: 1. a folder that is ours alone; 2.
/// the socket in it; 3. the connections; 4. both names go.
fn connected() -> io::Result<(UnixListener, Vec<UnixStream>)> {
    let places = [std::env::temp_dir(), "/run".into(), "/dev/shm".into()];
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for place in places {
        let folder = place.join(format!(".ploopfs-{}", Guid::random()));
        // 1.
        if let Err(e) = std::fs::DirBuilder::new().mode(0o700).create(&folder) {
            last = e;
            continue;
        }
        let made = in_folder(&folder);
        // 4. It is empty: others may put nothing there.
        let _ = std::fs::remove_dir(&folder);
        match made {
            Ok(made) => return Ok(made),
            Err(e) => last = e,
        }
    }
    Err(last)
}

fn in_folder(folder: &Path) -> io::Result<(UnixListener, Vec<UnixStream>)> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::open(folder, flags, Mode::empty())?;
    // A socket's path is short: through the folder's descriptor.
    let path = PathBuf::from(format!("/proc/self/fd/{}/nbd", opened.as_raw_fd()));
    // 2.
    let listener = UnixListener::bind(&path)?;
    // 3.
    let streams: io::Result<Vec<_>> = (0..HANDS).map(|_| UnixStream::connect(&path)).collect();
    // 4.
    std::fs::remove_file(&path)?;
    Ok((listener, streams?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_has_no_name_by_the_time_it_is_used() {
        let (listener, streams) = connected().expect("a socket");
        assert_eq!(streams.len(), HANDS);
        let address = listener.local_addr().expect("it was bound");
        assert!(!address.as_pathname().expect("a path").exists());
        listener.accept().expect("a connection waits");
    }
}
