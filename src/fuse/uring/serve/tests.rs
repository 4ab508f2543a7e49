//! Every request is answered exactly once, whatever it holds.

use super::*;
use crate::fuse::ops::{Answer, Attr, Caller, FileKind, Ino, Name, SetAttr, Space, Whence};
use crate::fuse::uring::wire::Parts;
use std::ffi::OsStr;
use std::sync::Mutex;
use std::time::SystemTime;

/// Answers everything, some of it later, and panics where a test wants it.
struct Anything;

fn attr(ino: Ino) -> Attr {
    let (kind, mtime) = (FileKind::File, SystemTime::UNIX_EPOCH);
    Attr { ino, kind, size: 9, blocks: 1, mode: 0o600, links: 1, uid: 0, gid: 0, block_size: 4096, mtime }
}

impl FileSystem for Anything {
    fn lookup(&self, _: Caller, _: Ino, _: &OsStr, done: Done<Attr>) {
        done(Ok(attr(2)));
    }
    fn forget(&self, _: Ino, _: u64) {}
    fn getattr(&self, ino: Ino, done: Done<Attr>) {
        assert_ne!(ino, 666, "the trap of the test");
        done(Ok(attr(ino)));
    }
    fn setattr(&self, _: Caller, _: Ino, _: SetAttr, done: Done<Attr>) {
        done(Err(Errno(libc::EPERM)));
    }
    fn readdir(&self, _: Ino, after: u64, most: usize, done: Done<Vec<Name>>) {
        let name = |next| Name { ino: 3, kind: FileKind::File, name: format!("n{next}").into(), next };
        done(Ok((after.saturating_add(1)..103).take(most).map(name).collect()));
    }
    fn statfs(&self, _: Ino, done: Done<Space>) {
        done(Err(Errno(libc::EIO)));
    }
    fn change_name(&self, _: Caller, _: Ino, _: &OsStr) -> Answer<()> {
        Ok(())
    }
    fn open(&self, _: Caller, ino: Ino, _: OpenFlags, done: Done<Opened>) {
        done(Ok(Opened { handle: ino, direct: true, backing: None }));
    }
    fn release(&self, _: Handle) {}
    fn read_now(&self, _: Handle, _: u64, buf: &mut [u8]) -> Now<usize> {
        buf.fill(1);
        Now::Done(Ok(buf.len()))
    }
    fn read_later(&self, _: Handle, _: u64, _: usize, done: Done<Bytes>) {
        done(Ok(Bytes::new()));
    }
    fn write_now(&self, _: Handle, _: u64, _: &[u8], _: OpenFlags) -> Now<usize> {
        Now::Later
    }
    fn write_later(&self, _: Handle, _: u64, data: Bytes, _: OpenFlags, done: Done<usize>) {
        done(Ok(data.len()));
    }
    fn fsync(&self, _: Handle, done: Done<()>) {
        // Lost, as by a bug: the requester gets an error.
        drop(done);
    }
    fn fallocate(&self, _: Handle, _: u64, _: u64, _: i32, done: Done<()>) {
        done(Ok(()));
    }
    fn lseek(&self, _: Handle, offset: u64, _: Whence, done: Done<u64>) {
        done(Ok(offset));
    }
}

/// A request in parts, and the list of what was answered to it.
struct Sheet {
    parts: [Vec<u8>; 3],
    room: Vec<u8>,
    answers: Arc<Mutex<Vec<Answer<usize>>>>,
}

impl Exchange for Sheet {
    fn parts(&self) -> Parts<'_> {
        let [header, operation, payload] = &self.parts;
        Parts { header, operation, payload }
    }
    fn room(&mut self, len: usize) -> Option<&mut [u8]> {
        self.room.get_mut(..len)
    }
    fn send(self, outcome: Answer<usize>) {
        assert!(outcome.is_ok_and(|len| len <= self.room.len()) || outcome.is_err());
        self.answers.lock().expect("no panic under it").push(outcome);
    }
    fn forget(self) {
        self.send(Ok(0));
    }
}

fn answers(
    server: &SessionServer,
    opcode: u32,
    ino: Ino,
    operation: &[u8],
    payload: &[u8],
) -> Vec<Answer<usize>> {
    let mut header = vec![0; 40];
    header[4..8].copy_from_slice(&opcode.to_ne_bytes());
    header[16..24].copy_from_slice(&ino.to_ne_bytes());
    let answers = Arc::<Mutex<Vec<Answer<usize>>>>::default();
    let parts = [header, operation.to_vec(), payload.to_vec()];
    server.serve(Sheet { parts, room: vec![0; 4096], answers: answers.clone() }, Thread::Transport);
    let answers = answers.lock().expect("no panic under it");
    answers.clone()
}

#[test]
fn any_rubbish_is_answered_exactly_once() {
    let server = SessionServer::new(Arc::new(Anything), 1, None);
    let mut state = 88_172_645_463_325_252_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for opcode in 0..70 {
        for _ in 0..50 {
            let mut bytes = |len: usize| (0..len).map(|_| next() as u8 & 0x83).collect::<Vec<u8>>();
            let (operation, payload) = (bytes(128), bytes(64));
            let cut = next() as usize;
            for (o, p) in [(128, 64), (cut % 128, 64), (128, cut % 64), (0, 0)] {
                let answers = answers(&server, opcode, 5, &operation[..o], &payload[..p]);
                assert_eq!(answers.len(), 1, "opcode {opcode}, {o} and {p} bytes");
            }
        }
    }
}

#[test]
fn a_panic_and_a_lost_answer_are_eio() {
    let server = SessionServer::new(Arc::new(Anything), 1, None);
    assert_eq!(answers(&server, 3, 666, &[0; 16], &[]), [Err(Errno(libc::EIO))], "GETATTR");
    assert_eq!(answers(&server, 3, 5, &[0; 16], &[]), [Ok(104)], "GETATTR");
    assert_eq!(answers(&server, 20, 5, &[0; 16], &[]), [Err(Errno(libc::EIO))], "FSYNC");
}

#[test]
fn a_read_larger_than_the_room_is_refused() {
    let server = SessionServer::new(Arc::new(Anything), 1, None);
    let mut read = [0; 40];
    read[16..20].copy_from_slice(&4096u32.to_ne_bytes());
    assert_eq!(answers(&server, 15, 5, &read, &[]), [Ok(4096)]);
    read[16..20].copy_from_slice(&4097u32.to_ne_bytes());
    assert_eq!(answers(&server, 15, 5, &read, &[]), [Err(Errno(libc::EINVAL))]);
}

#[test]
fn after_the_end_nothing_reaches_the_file_system() {
    let server = SessionServer::new(Arc::new(Anything), 1, None);
    server.close();
    assert_eq!(answers(&server, 3, 5, &[0; 16], &[]), [Err(Errno(libc::EIO))]);
}
