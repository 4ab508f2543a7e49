//! The daemon's side of the control socket. Whatever a client sends, or fails to send, harms nothing: clients are
//! few at a time, lines are bounded, silence has an end.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::place::{ControlPlace, SOCKET};
use super::protocol::{Amount, Answer, Interim, MAX_REQUEST, Op, VERSION, parse_request};
use crate::error::{Error, Kind, Result};
use crate::io::foreign;
use crate::io::heirs::{Fixture, Heirs};
use crate::io::process::{spawn_detached as spawn, spawn_or_run};

/// Clients at a time; each costs a thread. Most commands are short, but `umount` and the client of a long piece of
/// work keep theirs: enough that many images are worked on at once, and one more client can cancel.
const MAX_CLIENTS: usize = 64;
/// Connections that wait for a daemon to be there: commands give up after some seconds.
const MAX_WAITING: i32 = 128;
/// How long a client may say nothing, or not take its answer. A command speaks at once.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the daemon does with requests. Called from the threads of the clients, so it may block.
pub trait Service: Send + Sync + 'static {
    /// Carries out `op` for `caller`.
    fn serve(&self, op: Op, caller: &dyn Peer) -> Answer;
}

/// The client that asked, for requests that take their time.
pub trait Peer {
    /// True when the client hung up.
    fn gone(&self) -> bool;
    /// Reports how far the work has come. That it does not listen is noticed by [`gone`](Self::gone).
    fn report(&self, progress: Amount);
}

impl Peer for &UnixStream {
    fn gone(&self) -> bool {
        hung_up(self)
    }

    fn report(&self, progress: Amount) {
        let line = serde_json::to_vec(&Interim { v: VERSION, progress });
        // A client that takes nothing in is cut off: half a line would spoil those behind it.
        let sent = line.map_err(io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            let mut out: &UnixStream = self;
            out.write_all(&line)
        });
        if sent.is_err() {
            let _ = self.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// A bound socket on which no client is answered yet. Binding belongs before the first thread, serving behind it.
#[derive(Debug)]
pub struct ControlServer {
    listener: UnixListener,
}

impl ControlServer {
    /// Binds the socket of `place`, or goes on with that of a daemon before, on which clients wait already. The caller holds
    /// the folder's lock: what lies there is a dead daemon's.
    pub fn bind(place: &ControlPlace, heirs: &Heirs) -> Result<ControlServer> {
        let fail = |e: &io::Error| Error::io(e, place.path(SOCKET), "cannot bind the control socket");
        if let Some(socket) = heirs.take_fixture(Fixture::Socket) {
            // Again: clients ask the kernel who answers, and that is the process which listened last.
            rustix::net::listen(&socket, MAX_WAITING).map_err(|e| fail(&e.into()))?;
            return Ok(ControlServer { listener: UnixListener::from(socket) });
        }
        match rustix::fs::unlinkat(place, SOCKET, AtFlags::empty()) {
            Err(e) if e != Errno::NOENT => return Err(fail(&e.into())),
            _ => {}
        }
        let listener = UnixListener::bind(place.short(SOCKET)).map_err(|e| fail(&e))?;
        // By its descriptor: the folder's owner may have put a link in the place of the name.
        let socket = foreign::socket_in(place, SOCKET).map_err(|e| fail(&e))?;
        let own = format!("/proc/self/fd/{}", socket.as_raw_fd());
        std::fs::set_permissions(own, std::fs::Permissions::from_mode(0o600)).map_err(|e| fail(&e))?;
        heirs.keep_fixture(Fixture::Socket, &listener);
        Ok(ControlServer { listener })
    }

    /// Answers clients from now on, on threads of its own, until the process ends.
    pub fn start(self, service: Arc<dyn Service>) -> Result<Clients> {
        let clients = Arc::new(AtomicUsize::new(0));
        let count = Clients(clients.clone());
        let accept = move || {
            for client in self.listener.incoming() {
                match client {
                    Ok(client) => admit(client, &service, &clients),
                    // Out of descriptors, mostly: waiting is all that helps.
                    Err(_) => thread::sleep(Duration::from_millis(100)),
                }
            }
        };
        spawn("ploopfs/control", accept)?;
        Ok(count)
    }
}

/// How many clients are connected.
#[derive(Clone, Debug)]
pub struct Clients(Arc<AtomicUsize>);

impl Clients {
    /// The number at this moment.
    pub fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counts a client as long as it lives.
struct Seat(Arc<AtomicUsize>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn admit(client: UnixStream, service: &Arc<dyn Service>, clients: &Arc<AtomicUsize>) {
    let seats = clients.fetch_add(1, Ordering::Relaxed);
    let seat = Seat(clients.clone());
    if let Err(e) = trust(&client).and_then(|()| patience(&client)) {
        refuse(client, &e);
    } else if seats >= MAX_CLIENTS {
        refuse(client, &Error::new(Kind::Busy, "the daemon talks to too many clients, try again"));
    } else {
        let service = service.clone();
        let body = move || {
            let _seat = seat;
            talk(client, &*service);
        };
        // Without a thread the others wait: better than an `umount` that is hung up on.
        spawn_or_run("ploopfs/client", body);
    }
}

/// Only our own user and root may give orders; the mode of the socket says so too, but it can be changed.
fn trust(client: &UnixStream) -> Result<()> {
    let peer = rustix::net::sockopt::socket_peercred(client)
        .map_err(|e| Error::new(Kind::Access, format!("cannot find out who asks: {e}")))?;
    if peer.uid.is_root() || peer.uid == rustix::process::geteuid() {
        return Ok(());
    }
    Err(Error::new(Kind::Access, "only the user who mounted it, and root, may ask"))
}

fn patience(client: &UnixStream) -> Result<()> {
    let set = client.set_read_timeout(Some(PATIENCE)).and_then(|()| client.set_write_timeout(Some(PATIENCE)));
    set.map_err(|e| Error::new(Kind::Io, format!("cannot bound the wait for a client: {e}")))
}

/// The client may be gone already; then the refusal is lost, and is no loss.
fn refuse(mut client: UnixStream, e: &Error) {
    let _ = send(&mut client, &Answer::failed(e));
}

fn send(client: &mut UnixStream, answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    client.write_all(&line)
}

/// One client from its first line to its end.
fn talk(client: UnixStream, service: &dyn Service) {
    let Ok(mut out) = client.try_clone() else { return };
    let mut reader = BufReader::new(&client);
    let mut line = Vec::new();
    loop {
        line.clear();
        let limit = MAX_REQUEST as u64 + 1;
        match (&mut reader).take(limit).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if line.last() != Some(&b'\n') {
            if line.len() > MAX_REQUEST {
                refuse(
                    out,
                    &Error::new(Kind::Invalid, format!("a request is at most {MAX_REQUEST} bytes long")),
                );
            }
            return;
        }
        let answer = match parse_request(&line) {
            Ok(op) => service.serve(op, &&client),
            Err(e) => Answer::failed(&e),
        };
        if send(&mut out, &answer).is_err() {
            return;
        }
    }
}

/// True when the client closed its end.
fn hung_up(client: &UnixStream) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(client, PollFlags::RDHUP)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    poll(&mut fds, Some(&at_once)).is_ok() && fds[0].revents().intersects(gone)
}
