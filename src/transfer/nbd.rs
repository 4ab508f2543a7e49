//! The disk in a file of another program's format, read at will: a `qemu-nbd` of our own, and the client's side of the NBD
//! protocol (doc/proto.md of the NBD project: fixed newstyle negotiation, simple replies).

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::pieces::HANDS;
use super::qemu::{absolute, cannot_run, ours, refused, said};
use crate::error::{Error, Kind, Result};
use crate::progress::Progress;

const PROGRAM: &str = "qemu-nbd";
/// How often it is asked whether it listens: it begins within some milliseconds.
const LOOK: Duration = Duration::from_millis(5);
/// After this it will never listen. A slow disk may take seconds to open a file.
const PATIENCE: Duration = Duration::from_secs(60);

/// "NBDMAGIC": the server's first words.
const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": behind it, and in front of every option.
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
/// Both sides: options are answered. And: no padding behind the handshake.
const FIXED_NEWSTYLE: u32 = 1;
const NO_ZEROES: u32 = 2;
/// Option: begin with the export of this name, which is empty.
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_ERROR: u32 = 1 << 31;
/// Longest answer to an option that is taken, in bytes; the one we need has 12.
const MAX_ANSWER: u32 = 4096;
const CMD_READ: u16 = 0;
const CMD_DISC: u16 = 2;

/// A file that qemu-nbd reads for us. Dropped, both the program and its socket go.
#[derive(Debug)]
pub struct Nbd {
    /// The file that is read, for messages.
    path: PathBuf,
    socket: PathBuf,
    child: Child,
    /// What the program says before it ends.
    said: Option<JoinHandle<Vec<u8>>>,
    /// As many as threads that copy. Each is held by one thread as long as it asks and hears; leaves.
    connections: Vec<Mutex<Connection>>,
    /// Whose turn it is where all are in use.
    turn: AtomicUsize,
}

impl Nbd {
    /// Opens `file`, which is of `format`, with what it stands on. The socket `socket` is made for it, and gone when this
    /// returns; its path is about 100 bytes long at most.
    pub fn open(file: &Path, format: &str, socket: PathBuf, progress: &Progress) -> Result<Nbd> {
        let mut command = Command::new(PROGRAM);
        command.args(["--read-only", "--shared", &HANDS.to_string(), "--format", format, "--socket"]);
        command.arg(&socket).arg(absolute(file)?);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = ours(&mut command).spawn().map_err(|e| cannot_run(PROGRAM, &e))?;
        let said = child.stderr.take().map(|stderr| std::thread::spawn(move || said(stderr)));
        let path = file.to_owned();
        let mut nbd = Nbd { path, socket, child, said, connections: Vec::new(), turn: AtomicUsize::new(0) };
        for _ in 0..HANDS {
            let new = nbd.connect(progress)?;
            nbd.connections.push(Mutex::new(new));
        }
        // Nobody else needs it, and whatever ends us now leaves none.
        nbd.remove_socket();
        Ok(nbd)
    }

    /// Waits until it listens, or has ended.
    fn connect(&mut self, progress: &Progress) -> Result<Connection> {
        let end = Instant::now() + PATIENCE;
        loop {
            progress.check()?;
            match UnixStream::connect(&self.socket) {
                Ok(stream) => return Connection::begin(stream).map_err(|e| self.lost(&e)),
                Err(e) if Instant::now() > end => return Err(self.lost(&e)),
                Err(_) => {}
            }
            if self.child.try_wait().is_ok_and(|status| status.is_some()) {
                let said = self.said.take().and_then(|said| said.join().ok()).unwrap_or_default();
                return Err(refused(PROGRAM, &self.path, &said));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Reads all of `buf` at byte `offset`, from any thread.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let free = self.connections.iter().find_map(|connection| connection.try_lock().ok());
        let mut connection = free.unwrap_or_else(|| {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed);
            self.connections[turn % HANDS].lock().unwrap_or_else(PoisonError::into_inner)
        });
        match connection.read(offset, buf).map_err(|e| self.lost(&e))? {
            0 => Ok(()),
            // The protocol's numbers are those of Linux.
            errno => {
                let e = io::Error::from_raw_os_error(errno.try_into().unwrap_or(libc::EIO));
                Err(Error::io(&e, &self.path, format!("{PROGRAM} cannot read byte {offset}")))
            }
        }
    }

    fn remove_socket(&self) {
        // The program may have removed it; what is left goes with the folder.
        let _ = std::fs::remove_file(&self.socket);
    }

    fn lost(&self, e: &io::Error) -> Error {
        let what = format!("{PROGRAM}, which reads it, does not answer: {}", crate::error::words(e));
        Error::at(Kind::Io, &self.path, what)
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        // It only reads: nothing is lost by ending it. It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.remove_socket();
        if let Some(said) = self.said.take() {
            let _ = said.join();
        }
    }
}

#[derive(Debug)]
struct Connection(BufReader<UnixStream>);

impl Connection {
    /// Says what must be said before the first request.
    fn begin(stream: UnixStream) -> io::Result<Connection> {
        let mut new = Connection(BufReader::new(stream));
        if new.u64()? != MAGIC || new.u64()? != OPTION_MAGIC {
            return Err(strange("it speaks another protocol"));
        }
        let flags = u32::from(new.u16()?);
        if flags & FIXED_NEWSTYLE == 0 {
            return Err(strange("it is too old"));
        }
        let mut words = (flags & (FIXED_NEWSTYLE | NO_ZEROES)).to_be_bytes().to_vec();
        // The name's length, and the number of questions: none.
        let export = [0; 6];
        words.extend(OPTION_MAGIC.to_be_bytes());
        words.extend(OPT_GO.to_be_bytes());
        words.extend((export.len() as u32).to_be_bytes());
        words.extend(export);
        new.0.get_mut().write_all(&words)?;
        loop {
            let (magic, option) = (new.u64()?, new.u32()?);
            let (kind, len) = (new.u32()?, new.u32()?);
            if magic != OPTION_REPLY_MAGIC || option != OPT_GO || len > MAX_ANSWER {
                return Err(strange("its answer is not understood"));
            }
            // The size and what it can do: qemu-img has said the one, and reading is enough.
            new.bytes(&mut vec![0; len as usize])?;
            match kind {
                REP_ACK => return Ok(new),
                kind if kind & REP_ERROR != 0 => return Err(strange("it refuses")),
                _ => {}
            }
        }
    }

    /// Reads all of `buf`; returns the server's error number, 0 if there is none.
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<u32> {
        let len = u32::try_from(buf.len()).map_err(|_| strange("too much at once"))?;
        self.request(CMD_READ, offset, len)?;
        let (magic, error, cookie) = (self.u32()?, self.u32()?, self.u64()?);
        if magic != REPLY_MAGIC || cookie != offset {
            return Err(strange("its answer is not understood"));
        }
        if error == 0 {
            self.bytes(buf)?;
        }
        Ok(error)
    }

    /// One request, without flags; the offset is its cookie, too.
    fn request(&mut self, command: u16, offset: u64, len: u32) -> io::Result<()> {
        let mut words = REQUEST_MAGIC.to_be_bytes().to_vec();
        words.extend(0u16.to_be_bytes());
        words.extend(command.to_be_bytes());
        words.extend(offset.to_be_bytes());
        words.extend(offset.to_be_bytes());
        words.extend(len.to_be_bytes());
        self.0.get_mut().write_all(&words)
    }

    fn bytes(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_exact(buf)
    }

    fn u16(&mut self) -> io::Result<u16> {
        let mut bytes = [0; 2];
        self.bytes(&mut bytes).map(|()| u16::from_be_bytes(bytes))
    }

    fn u32(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.bytes(&mut bytes).map(|()| u32::from_be_bytes(bytes))
    }

    fn u64(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.bytes(&mut bytes).map(|()| u64::from_be_bytes(bytes))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // A courtesy; a server that is gone needs none.
        let _ = self.request(CMD_DISC, 0, 0);
    }
}

fn strange(what: &str) -> io::Error {
    io::Error::other(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server's words, and the client's side of a connection to it.
    fn server(words: &[&[u8]]) -> (UnixStream, UnixStream) {
        let (mut server, client) = UnixStream::pair().expect("a pair");
        words.iter().for_each(|word| server.write_all(word).expect("room"));
        (server, client)
    }

    fn greeting() -> Vec<u8> {
        [&MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &3u16.to_be_bytes()].concat()
    }

    fn answer(kind: u32, data: &[u8]) -> Vec<u8> {
        let head = [OPT_GO, kind, data.len() as u32].map(u32::to_be_bytes).concat();
        [&OPTION_REPLY_MAGIC.to_be_bytes()[..], &head, data].concat()
    }

    fn reply(error: u32, cookie: u64, data: &[u8]) -> Vec<u8> {
        let head = [REPLY_MAGIC, error].map(u32::to_be_bytes).concat();
        [&head, &cookie.to_be_bytes()[..], data].concat()
    }

    #[test]
    fn a_server_is_greeted_and_its_bytes_and_its_errors_are_told_apart() {
        let words =
            [greeting(), answer(3, &[0; 12]), answer(REP_ACK, &[]), reply(0, 9, b"abc"), reply(5, 7, b"")];
        let (mut server, client) = server(&words.each_ref().map(|word| &word[..]));
        let mut connection = Connection::begin(client).expect("greeted");
        let mut buf = [0; 3];
        assert_eq!(connection.read(9, &mut buf).expect("answered"), 0);
        assert_eq!(&buf, b"abc");
        assert_eq!(connection.read(7, &mut buf).expect("answered"), 5);
        drop(connection);
        let mut heard = Vec::new();
        server.read_to_end(&mut heard).expect("all of it");
        // Flags, the option, two reads, and that it goes.
        assert_eq!(heard.len(), 4 + 16 + 6 + 3 * 28);
        assert_eq!(&heard[..4], 3u32.to_be_bytes());
    }

    #[test]
    fn a_server_that_answers_something_else_is_refused() {
        let cases: [&[&[u8]]; 6] = [
            &[b"SSH-2.0-OpenSSH_9.9....................."],
            &[&MAGIC.to_be_bytes(), &OPTION_MAGIC.to_be_bytes(), &[0, 0]],
            &[&greeting(), &answer(REP_ERROR | 6, b"no such export")],
            &[&greeting(), &answer(3, &[0; 5000])],
            &[&greeting(), b"something else that is long enough"],
            &[b"NBD"],
        ];
        for (index, words) in cases.iter().enumerate() {
            let (server, client) = server(words);
            drop(server);
            assert!(Connection::begin(client).is_err(), "{index}");
        }
        let (_server, client) = server(&[&greeting(), &answer(REP_ACK, &[]), &reply(0, 8, b"abc")]);
        let mut connection = Connection::begin(client).expect("greeted");
        assert!(connection.read(9, &mut [0; 3]).is_err(), "an answer to another question");
    }
}
