//! The client's side of the NBD protocol (doc/proto.md of the NBD project: fixed newstyle negotiation, simple replies).

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

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
const REP_INFO: u32 = 3;
const REP_ERROR: u32 = 1 << 31;
/// What an information is about: the export's size, behind two bytes that say so.
const INFO_EXPORT: &[u8] = &[0, 0];
/// Longest answer to an option that is taken, in bytes; the one we need has 12.
const MAX_ANSWER: u32 = 4096;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;

/// A connection over which one request at a time is made.
#[derive(Debug)]
pub(super) struct Connection {
    stream: BufReader<UnixStream>,
    /// Size of the disk in bytes, as the server says it; 0: it does not.
    pub size: u64,
}

impl Connection {
    /// A connection on which nothing has been said yet.
    pub(super) fn new(stream: UnixStream) -> Connection {
        Connection { stream: BufReader::new(stream), size: 0 }
    }

    /// How long is waited for the server, whatever for; None: for ever.
    pub(super) fn patience(&self, limit: Option<Duration>) -> io::Result<()> {
        self.stream.get_ref().set_read_timeout(limit)?;
        self.stream.get_ref().set_write_timeout(limit)
    }

    /// True when the server has begun to speak; false when the time of [`patience`](Self::patience) was over first.
    /// Nothing of what it said is lost.
    pub(super) fn speaks(&mut self) -> io::Result<bool> {
        match self.stream.fill_buf() {
            Ok([]) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => Ok(true),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Says what must be said before the first request.
    pub(super) fn begin(&mut self) -> io::Result<()> {
        if self.u64()? != MAGIC || self.u64()? != OPTION_MAGIC {
            return Err(strange("it speaks another protocol"));
        }
        let flags = u32::from(self.u16()?);
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
        self.stream.get_mut().write_all(&words)?;
        loop {
            let (magic, option) = (self.u64()?, self.u32()?);
            let (kind, len) = (self.u32()?, self.u32()?);
            if magic != OPTION_REPLY_MAGIC || option != OPT_GO || len > MAX_ANSWER {
                return Err(strange("its answer is not understood"));
            }
            let mut answer = vec![0; len as usize];
            self.stream.read_exact(&mut answer)?;
            match kind {
                REP_ACK => return Ok(()),
                REP_INFO if answer.starts_with(INFO_EXPORT) => {
                    let size = answer[2..].first_chunk().ok_or_else(|| strange("its answer is too short"))?;
                    self.size = u64::from_be_bytes(*size);
                }
                kind if kind & REP_ERROR != 0 => return Err(strange("it refuses")),
                _ => {}
            }
        }
    }

    /// Reads all of `buf`; returns the server's error number, 0 if there is none.
    pub(super) fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<u32> {
        self.request(CMD_READ, offset, length(buf)?, &[])?;
        let error = self.reply(offset)?;
        if error == 0 {
            self.stream.read_exact(buf)?;
        }
        Ok(error)
    }

    /// Writes all of `buf`; returns the server's error number, 0 if there is none.
    pub(super) fn write(&mut self, offset: u64, buf: &[u8]) -> io::Result<u32> {
        self.request(CMD_WRITE, offset, length(buf)?, buf)?;
        self.reply(offset)
    }

    /// Makes durable what was written by all connections; returns the server's error number, 0 if there is none.
    pub(super) fn flush(&mut self) -> io::Result<u32> {
        self.request(CMD_FLUSH, 0, 0, &[])?;
        self.reply(0)
    }

    /// One request, without flags; the offset is its cookie, too.
    fn request(&mut self, command: u16, offset: u64, len: u32, payload: &[u8]) -> io::Result<()> {
        let mut words = REQUEST_MAGIC.to_be_bytes().to_vec();
        words.extend(0u16.to_be_bytes());
        words.extend(command.to_be_bytes());
        words.extend(offset.to_be_bytes());
        words.extend(offset.to_be_bytes());
        words.extend(len.to_be_bytes());
        self.stream.get_mut().write_all(&words)?;
        self.stream.get_mut().write_all(payload)
    }

    fn reply(&mut self, expected: u64) -> io::Result<u32> {
        let (magic, error, cookie) = (self.u32()?, self.u32()?, self.u64()?);
        match magic == REPLY_MAGIC && cookie == expected {
            true => Ok(error),
            false => Err(strange("its answer is not understood")),
        }
    }

    fn u16(&mut self) -> io::Result<u16> {
        let mut bytes = [0; 2];
        self.stream.read_exact(&mut bytes).map(|()| u16::from_be_bytes(bytes))
    }

    fn u32(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.stream.read_exact(&mut bytes).map(|()| u32::from_be_bytes(bytes))
    }

    fn u64(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.stream.read_exact(&mut bytes).map(|()| u64::from_be_bytes(bytes))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // A courtesy; a server that is gone needs none.
        let _ = self.request(CMD_DISC, 0, 0, &[]);
    }
}

fn length(buf: &[u8]) -> io::Result<u32> {
    u32::try_from(buf.len()).map_err(|_| strange("too much at once"))
}

fn strange(what: &str) -> io::Error {
    io::Error::other(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server's words, and the client's side of a connection to it.
    fn server(words: &[&[u8]]) -> (UnixStream, Connection) {
        let (mut server, client) = UnixStream::pair().expect("a pair");
        words.iter().for_each(|word| server.write_all(word).expect("room"));
        (server, Connection::new(client))
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

    /// The information about the export: a disk of 4 KiB.
    const EXPORT: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 1];

    #[test]
    fn a_server_is_greeted_and_its_bytes_and_its_errors_are_told_apart() {
        let words = [
            greeting(),
            answer(REP_INFO, &EXPORT),
            answer(REP_ACK, &[]),
            reply(0, 9, b"abc"),
            reply(5, 7, b""),
            reply(0, 8, b""),
            reply(28, 0, b""),
        ];
        let (mut server, mut connection) = server(&words.each_ref().map(|word| &word[..]));
        assert!(connection.speaks().expect("words"));
        connection.begin().expect("greeted");
        assert_eq!(connection.size, 4096);
        let mut buf = [0; 3];
        assert_eq!(connection.read(9, &mut buf).expect("answered"), 0);
        assert_eq!(&buf, b"abc");
        assert_eq!(connection.read(7, &mut buf).expect("answered"), 5);
        assert_eq!(connection.write(8, b"written").expect("answered"), 0);
        assert_eq!(connection.flush().expect("answered"), 28);
        drop(connection);
        let mut heard = Vec::new();
        server.read_to_end(&mut heard).expect("all of it");
        // Flags, the option, four requests, one with its bytes, and that it goes.
        assert_eq!(heard.len(), 4 + 16 + 6 + 5 * 28 + 7);
        assert_eq!(&heard[..4], 3u32.to_be_bytes());
    }

    #[test]
    fn a_server_that_answers_something_else_is_refused() {
        let cases: [&[&[u8]]; 7] = [
            &[b"SSH-2.0-OpenSSH_9.9....................."],
            &[&MAGIC.to_be_bytes(), &OPTION_MAGIC.to_be_bytes(), &[0, 0]],
            &[&greeting(), &answer(REP_ERROR | 6, b"no such export")],
            &[&greeting(), &answer(REP_INFO, &[0; 5000])],
            &[&greeting(), &answer(REP_INFO, &EXPORT[..5])],
            &[&greeting(), b"something else that is long enough"],
            &[b"NBD"],
        ];
        for (index, words) in cases.iter().enumerate() {
            let (server, mut connection) = server(words);
            drop(server);
            assert!(connection.begin().is_err(), "{index}");
        }
        let (_server, mut connection) = server(&[&greeting(), &answer(REP_ACK, &[]), &reply(0, 8, b"abc")]);
        connection.begin().expect("greeted");
        assert!(connection.read(9, &mut [0; 3]).is_err(), "an answer to another question");
    }

    #[test]
    fn a_silent_server_is_waited_for_as_long_as_was_said() {
        let (server, mut connection) = server(&[]);
        connection.patience(Some(Duration::from_millis(5))).expect("a limit");
        assert!(!connection.speaks().expect("nothing yet"));
        drop(server);
        assert!(connection.speaks().is_err());
    }
}
