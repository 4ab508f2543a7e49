//! One session of fuser for each transport thread, all of one connection, each on a descriptor of its own.
//!
//! A session of fuser begins by reading an INIT, and the kernel sends one for the whole connection. So INIT is read before
//! (`fuse/handshake`), and each session is made over a pair of sockets in which a copy waits. All answer the same; the
//! first answer goes to the kernel. A second message waits there for the session's thread: a FORGET of an inode that no
//! kernel knows, which nothing answers. It calls us on that thread, where we name it, say that it is there and hold it
//! until all are; then the descriptor of the connection takes the socket's place, and what the thread reads next is the
//! kernel's. So every thread exists before the first request is served, and the sandbox need not open /dev/fuse.
//!
//! **L7** What a daemon before has read and not answered is sent again when its handles are known, and before a thread
//! reads.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, sockopt};

use super::bridge::Bridge;
use super::door::{Door, Entrance, HELLO, Said};
use crate::error::{Error, Kind, Result};
use crate::fuse::MAX_WRITE;
use crate::io::connection::{self, Slot};
use crate::io::process::{no_thread, spawn_thread};
use crate::rules::{Rule, broken};

/// FUSE_FORGET, and the length of its message: fuse_in_header and fuse_forget_in.
const FORGET: u32 = 2;
const FORGET_LEN: usize = 48;

/// Room for what a write has before its data.
const HEADERS: usize = 4096;

/// Room for an answer to INIT, which has 80 bytes.
const ANSWER: usize = 4096;

/// How long all threads may take to come: on a machine that starts none for so long nothing else works either.
const COMING: Duration = Duration::from_secs(30);

/// A session that has had its handshake and whose thread has not been started.
pub(super) struct Made {
    fuser: fuser::Session<Bridge>,
    door: std::sync::Arc<Door>,
    slot: Slot,
    connection: OwnedFd,
}

/// Makes a session that is to serve `connection`, from the kernel's message `init`. Also returns its answer to that. `kept`:
/// a request that it has read outlives this process.
pub(super) fn make(
    bridge: Bridge,
    init: &[u8],
    connection: OwnedFd,
    config: fuser::Config,
    kept: bool,
) -> io::Result<(Made, Vec<u8>)> {
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::io::write(&ours, init)?;
    say_hello(&ours, kept)?;
    let (door, acl) = (bridge.door.clone(), config.acl);
    let fuser = fuser::Session::from_fd(bridge, theirs, acl, config)?;
    let mut answer = vec![0; ANSWER];
    let (len, _) = rustix::net::recv(&ours, &mut answer[..], RecvFlags::DONTWAIT)?;
    answer.truncate(len);
    let slot = Slot::of(fuser.as_fd())?;
    // `ours` ends here; what it sent stays to be read.
    Ok((Made { fuser, door, slot, connection }, answer))
}

/// Sends the second message. Where requests are `kept`, it is as long as the longest of them, or as the system lets it be:
/// then all pages of the thread's buffer are there. A request that the kernel copies into a page that is not, for a thread
/// that is being killed, ends with EIO (seen; fuse_dev_do_read); into one that is, it is copied, and sent again.
fn say_hello(to: &OwnedFd, kept: bool) -> io::Result<()> {
    let lens = [MAX_WRITE as usize + HEADERS, 512 << 10, 192 << 10];
    if kept {
        // Root alone may send so much at once; what others may is tried.
        let _ = sockopt::set_socket_send_buffer_size_force(to, 2 * lens[0])
            .or_else(|_| sockopt::set_socket_send_buffer_size(to, 2 * lens[0]));
    }
    if kept && lens.iter().any(|len| rustix::io::write(to, &hello(*len)).is_ok()) {
        return Ok(());
    }
    rustix::io::write(to, &hello(FORGET_LEN)).map(drop).map_err(io::Error::from)
}

/// What lies behind its end nothing looks at.
fn hello(len: usize) -> Vec<u8> {
    let mut message = vec![0; len];
    message[..4].copy_from_slice(&(FORGET_LEN as u32).to_ne_bytes());
    message[4..8].copy_from_slice(&FORGET.to_ne_bytes());
    message[16..24].copy_from_slice(&HELLO.to_ne_bytes());
    message
}

impl Made {
    /// For notifications; works once the session serves.
    pub(super) fn notifier(&self) -> fuser::Notifier {
        self.fuser.notifier()
    }
}

/// Sessions that serve.
pub(super) struct Threads {
    said: Receiver<Said>,
    count: usize,
    /// How those ended that did so while others started.
    ended: Vec<io::Result<()>>,
}

/// Starts the thread of each session, and returns when all serve. An error: none of them does.
///
/// The order: (1) all threads are there; (2) the kernel sends again what another daemon had read; (3) the word to go on. 3
/// before 1 would have requests served by a mount that then fails for want of a thread. 3 before 2: a request that was just
/// read would be sent again, and run twice at once.
pub(super) fn start(sessions: Vec<Made>, resend: Option<OwnedFd>) -> Result<Threads> {
    let count = sessions.len();
    let (say, said) = bounded(3 * count);
    let (start, go) = bounded(count);
    for (number, made) in sessions.into_iter().enumerate() {
        let Made { fuser, door, slot, connection } = made;
        let entrance = Entrance { number, slot, connection, say: say.clone(), go: go.clone() };
        door.open(entrance);
        let say = say.clone();
        // fuser starts the thread that serves itself, and `run` waits for its end.
        let name = format!("ploopfs/w{number}");
        spawn_thread(&name, move || drop(say.send(Said::Ended(fuser.run())))).map_err(no_thread(&name))?;
    }
    drop((say, go));
    let next = || {
        let late = |_| Error::new(Kind::Io, "the transport threads do not start: the system is overloaded");
        said.recv_timeout(COMING).map_err(late)
    };
    let failed = no_thread("for requests");
    for _ in 0..count {
        if let Said::Serves(result) | Said::Ended(result) = next()? {
            return Err(failed(result.err().unwrap_or_else(|| io::Error::other("it ended at once"))));
        }
    } // 1
    let again = || match &resend {
        Some(connection) => connection::resend(connection.as_fd()).map_err(|e| {
            Error::io(&e, connection::DEVICE, "the kernel does not send requests again (Linux 6.10 does)")
        }),
        None => Ok(()),
    };
    if !broken(Rule::L7) {
        again()?;
    } // 2
    for _ in 0..count {
        // Room for all; and each of them waits.
        let _ = start.send(());
    } // 3
    let mut ended = Vec::new();
    let mut serving = 0;
    while serving < count {
        match next()? {
            Said::Serves(Ok(())) => serving += 1,
            Said::Serves(Err(e)) => return Err(failed(e)),
            // Unmounted already.
            Said::Ended(result) => ended.push(result),
            Said::Here => {}
        }
    }
    if broken(Rule::L7) {
        // So that they have read something.
        std::thread::sleep(Duration::from_millis(100));
        again()?;
    }
    Ok(Threads { said, count, ended })
}

impl Threads {
    /// Returns when the last session has ended, with the first error.
    pub(super) fn wait(self) -> io::Result<()> {
        let Threads { said, count, ended } = self;
        let later = said.iter().filter_map(|said| match said {
            Said::Ended(result) => Some(result),
            Said::Here | Said::Serves(_) => None,
        });
        let mut served = Ok(());
        let mut left = count;
        for result in ended.into_iter().chain(later).take(count) {
            left -= 1;
            match result {
                Ok(()) => {}
                // The administrator's abort; fuser takes it for an error.
                Err(e) if e.raw_os_error() == Some(libc::ECONNABORTED) => {}
                Err(e) => {
                    log::error!("a transport thread has ended: {e}; {left} go on");
                    served = served.and(Err(e));
                }
            }
        }
        served
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Said by a session's thread, as far as `start` hears it.
    fn hears(all: Vec<Said>) -> Threads {
        let (say, said) = bounded(all.len());
        let count = all.iter().filter(|said| matches!(said, Said::Ended(_))).count();
        all.into_iter().for_each(|one| say.send(one).expect("there is room"));
        Threads { said, count, ended: Vec::new() }
    }

    #[test]
    fn the_end_is_the_end_of_all_sessions_and_its_first_error_is_told() {
        let error = |errno| Said::Ended(Err(io::Error::from_raw_os_error(errno)));
        let ended = hears(vec![Said::Ended(Ok(())), error(libc::EIO), error(libc::EPERM)]).wait();
        assert_eq!(ended.expect_err("one failed").raw_os_error(), Some(libc::EIO));
        hears(vec![error(libc::ECONNABORTED), Said::Ended(Ok(()))]).wait().expect("an abort is an end");
    }
}
