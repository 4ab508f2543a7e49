//! The command line's side of the control socket.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::place::{ControlPlace, SOCKET};
use super::protocol::{Amount, Answer, Closed, Hello, ImageLine, Interim, MAX_ANSWER, Op, Request, VERSION};
use crate::disk::snapshots::SnapshotLine;
use crate::error::{Error, Kind, Result};
use crate::image::diff::Diff;
use crate::image::map::Piece;
use crate::io::foreign;
use crate::tree::Document;
use crate::vdisk::live::{Done, Work};
use crate::vdisk::tracking::Changes;

/// How long a daemon may take for an answer that needs no waiting. A rescan opens files, so it is generous.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long it may take to greet. That needs no file and no lock: a daemon that is slower has been stopped, or its
/// host is out of breath.
const GREETING: Duration = Duration::from_secs(10);

/// A connection to the daemon that serves a folder.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    socket: PathBuf,
    hello: Hello,
}

impl Client {
    /// The daemon of the folder `images`, if one lives. A socket without a daemon behind it counts as none; one on which
    /// another user answers is an error: the folder's owner can put his own there.
    pub fn find(images: &Path) -> Result<Option<Client>> {
        for place in ControlPlace::candidates(images) {
            let socket = place.path(SOCKET);
            let connected = connect(&place).map_err(|e| {
                Error::io(&e, &socket, "cannot reach the daemon, which may have been stopped")
            })?;
            let Some(stream) = connected else { continue };
            // Before the first word to it, and whatever it answers.
            let pid = trust(&stream, &socket)?;
            let mut client = Client { stream: BufReader::new(stream), socket, hello: Hello::default() };
            client.bound(Some(GREETING))?;
            let answer = match client.send(Op::Hello).and_then(|()| client.receive()) {
                Ok(Some(answer)) => answer,
                // It was just dying: no process is behind the socket any more.
                Ok(None) => continue,
                Err(e) if matches!(e.errno(), libc::ECONNRESET | libc::EPIPE) => continue,
                Err(e) => return Err(e),
            };
            client.hello = answer.hello.ok_or_else(|| client.odd("no greeting in the answer"))?;
            client.hello.pid = pid;
            client.bound(Some(PATIENCE))?;
            return Ok(Some(client));
        }
        Ok(None)
    }

    /// What the daemon said of itself.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// The images of the folder, as the daemon sees them.
    pub fn list(&mut self) -> Result<Vec<ImageLine>> {
        self.ask(Op::List)?.images.ok_or_else(|| self.odd("no images in the answer"))
    }

    /// Makes the daemon look at its folder; what was made there is shown when this returns.
    pub fn rescan(&mut self) -> Result<()> {
        self.ask(Op::Rescan { made: None }).map(drop)
    }

    /// The same after `file` was made there, which is complete.
    pub fn take_in(&mut self, file: &OsStr) -> Result<()> {
        // What is no text waits until it was still for a while.
        self.ask(Op::Rescan { made: file.to_str().map(str::to_owned) }).map(drop)
    }

    /// The snapshots of an image, by its name without `.img`.
    pub fn snapshots(&mut self, image: &str) -> Result<Vec<SnapshotLine>> {
        let answer = self.ask(Op::Snapshots { image: image.to_owned() })?;
        let lines = answer.snapshots.ok_or_else(|| self.odd("no snapshots in the answer"))?;
        Ok(lines.into_iter().map(SnapshotLine::from).collect())
    }

    /// The live counters.
    pub fn stats(&mut self) -> Result<Document> {
        let stats = self.ask(Op::Stats)?.stats;
        stats.map(Document::from).ok_or_else(|| self.odd("no counters in the answer"))
    }

    /// A piece of the map of an image, or of a snapshot of it, from byte `offset` of the disk on.
    pub fn map(&mut self, image: &str, snapshot: Option<&str>, offset: u64) -> Result<Piece> {
        let (image, snapshot) = (image.to_owned(), snapshot.map(str::to_owned));
        let map = self.ask(Op::Map { image, snapshot, offset })?.map;
        map.map(Piece::from).ok_or_else(|| self.odd("no map in the answer"))
    }

    /// What differs between two snapshots of an image, from byte `start` on; `to` None is the live disk.
    pub fn diff(&mut self, image: &str, from: &str, to: Option<&str>, start: u64) -> Result<Diff> {
        let (image, from, to) = (image.to_owned(), from.to_owned(), to.map(str::to_owned));
        let answer = self.ask(Op::Diff { image, from, to, start })?;
        answer.diff.map(Diff::from).ok_or_else(|| self.odd("no ranges in the answer"))
    }

    /// What has changed on an image's disk since its tracking began, from byte `start` on.
    pub fn changes(&mut self, image: &str, start: u64) -> Result<Changes> {
        let answer = self.ask(Op::Changes { image: image.to_owned(), start })?;
        answer.changes.map(Changes::from).ok_or_else(|| self.odd("no changes in the answer"))
    }

    /// Ends the work that goes on with an image.
    pub fn cancel(&mut self, image: &str) -> Result<()> {
        self.ask(Op::Cancel { image: image.to_owned() }).map(drop)
    }

    /// Has something done with an image and waits for it; `watch` hears several times a second how far it is. `rate`
    /// in bytes per second.
    pub fn work(
        &mut self,
        image: &str,
        work: &Work,
        rate: Option<u64>,
        watch: &mut dyn FnMut(Amount),
    ) -> Result<Done> {
        self.send(Op::Work { image: image.to_owned(), work: work.clone().into(), rate })?;
        loop {
            let line = self.line()?;
            if line.is_empty() {
                let what =
                    "the daemon hung up before the work was done; `ploopfs info` shows what came of it";
                return Err(Error::at(Kind::Io, &self.socket, what));
            }
            match serde_json::from_slice::<Interim>(&line) {
                Ok(interim) => watch(interim.progress),
                Err(_) => return Ok(self.understand(&line)?.done.unwrap_or_default().into()),
            }
        }
    }

    /// Asks how it will have ended; [`WaitingClient::end`] then waits for the answer.
    pub fn wait(mut self) -> Result<WaitingClient> {
        self.bound(None)?;
        self.send(Op::Wait)?;
        Ok(WaitingClient(self))
    }

    /// Bounds the wait for every answer, and for a place to put a request; None: for ever.
    fn bound(&self, patience: Option<Duration>) -> Result<()> {
        let stream = self.stream.get_ref();
        let bounded = stream.set_read_timeout(patience).and_then(|()| stream.set_write_timeout(patience));
        bounded.map_err(|e| Error::io(&e, &self.socket, "cannot bound the wait for the daemon"))
    }

    /// The daemon took too long, or the connection broke.
    fn silent(&self, e: &io::Error) -> Error {
        if !matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) {
            return Error::io(e, &self.socket, "no answer from the daemon");
        }
        let peer = sockopt::socket_peercred(self.stream.get_ref());
        let what = match peer.map(|peer| peer.pid.as_raw_nonzero()) {
            Ok(pid) => format!(
                "the daemon (process {pid}) does not answer; if it was stopped: kill -CONT {pid}; to give it up: kill -9 {pid}"
            ),
            Err(_) => "the daemon does not answer".to_owned(),
        };
        Error::at(Kind::Io, &self.socket, what)
    }

    fn odd(&self, what: &str) -> Error {
        Error::at(Kind::Io, &self.socket, format!("the daemon answers oddly: {what}"))
    }

    fn ask(&mut self, op: Op) -> Result<Answer> {
        self.send(op)?;
        match self.receive()? {
            Some(answer) => Ok(answer),
            None => Err(Error::at(Kind::Io, &self.socket, "the daemon hung up")),
        }
    }

    fn send(&mut self, op: Op) -> Result<()> {
        let mut line = serde_json::to_vec(&Request { v: VERSION, op })
            .map_err(|e| Error::at(Kind::Io, &self.socket, format!("cannot write the request: {e}")))?;
        line.push(b'\n');
        let sent = self.stream.get_mut().write_all(&line);
        sent.map_err(|e| Error::io(&e, &self.socket, "cannot reach the daemon"))
    }

    /// One answer; None when the daemon hung up.
    fn receive(&mut self) -> Result<Option<Answer>> {
        let line = self.line()?;
        if line.is_empty() {
            return Ok(None);
        }
        self.understand(&line).map(Some)
    }

    /// One line; empty when the daemon hung up.
    fn line(&mut self) -> Result<Vec<u8>> {
        let mut line = Vec::new();
        let read = (&mut self.stream).take(MAX_ANSWER as u64).read_until(b'\n', &mut line);
        read.map_err(|e| self.silent(&e))?;
        Ok(line)
    }

    fn understand(&self, line: &[u8]) -> Result<Answer> {
        let answer: Answer = serde_json::from_slice(line).map_err(|e| self.odd(&e.to_string()))?;
        if answer.ok {
            return Ok(answer);
        }
        let kind = kind_of(&answer);
        let why = answer.error.unwrap_or_else(|| "the daemon refused without a reason".to_owned());
        Err(Error::new(kind, why))
    }
}

/// Connects to the socket of a place; None: no process listens there. An error: one listens and accepts no connection.
fn connect(place: &ControlPlace) -> io::Result<Option<UnixStream>> {
    // The name may be a link to some other program's socket; a descriptor of the socket itself is none.
    let Ok(socket) = foreign::socket_in(place, SOCKET) else { return Ok(None) };
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{}", socket.as_raw_fd()))?;
    let stream = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // With its queue full, connecting waits as long as sending may.
    sockopt::set_socket_timeout(&stream, Timeout::Send, Some(GREETING))?;
    match retry_on_intr(|| net::connect(&stream, &address)) {
        Ok(()) => Ok(Some(UnixStream::from(stream))),
        Err(Errno::AGAIN) => Err(Errno::TIMEDOUT.into()),
        Err(_) => Ok(None),
    }
}

/// The process that listens, if it is root's or ours. The kernel names it, as it was when it began to listen.
fn trust(stream: &UnixStream, socket: &Path) -> Result<u32> {
    let peer = sockopt::socket_peercred(stream)
        .map_err(|e| Error::io(&e.into(), socket, "cannot find out who answers here"))?;
    let pid = peer.pid.as_raw_nonzero().get().unsigned_abs();
    if peer.uid.is_root() || peer.uid == rustix::process::geteuid() {
        return Ok(pid);
    }
    let owner = peer.uid.as_raw();
    let what = format!(
        "process {pid} of user {owner} answers here, who is neither root nor you, and is not believed; a mount of that \
         user is his to work with: sudo -u '#{owner}' ploopfs ..."
    );
    Err(Error::at(Kind::Access, socket, what))
}

/// The kind of a failure that the daemon reported; the other way round than [`Answer::failed`].
fn kind_of(answer: &Answer) -> Kind {
    match (answer.status, answer.errno) {
        (2, _) => Kind::Invalid,
        (3, _) => Kind::Damaged,
        (4, _) => Kind::InUse,
        (_, libc::ECANCELED) => Kind::Cancelled,
        // A daemon that says none.
        (_, 0) => Kind::Io,
        (_, errno) => Kind::of_errno(errno),
    }
}

/// A daemon that was asked to report its end.
#[derive(Debug)]
pub struct WaitingClient(Client);

impl WaitingClient {
    /// True when there is an answer, or the daemon hung up, within `limit`.
    pub fn is_over(&self, limit: Duration) -> bool {
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        let mut fds = [PollFd::new(self.0.stream.get_ref(), PollFlags::IN)];
        // Interrupted: asked again by the caller.
        poll(&mut fds, Some(&limit)).is_ok_and(|ready| ready > 0)
    }

    /// Waits until every image was closed. None: the daemon died without a word.
    pub fn end(mut self) -> Result<Option<Vec<Closed>>> {
        match self.0.receive() {
            Ok(answer) => Ok(answer.map(|a| a.closed.unwrap_or_default())),
            // A killed daemon resets the connection.
            Err(e) if e.kind() == Kind::Io => Ok(None),
            Err(e) => Err(e),
        }
    }
}
