//! Descriptors that go from one process of ours to another, beside the bytes of a connection.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

/// Sends `bytes`, and with the first of them a descriptor. The sender's own may be closed as soon as this returns: what is
/// on its way is open, and is closed with the connection when it is never received.
pub fn send(to: impl AsFd, mut bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let descriptors = descriptor.as_slice();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("there is no room for the descriptor"));
    }
    while !bytes.is_empty() {
        let parts = [IoSlice::new(bytes)];
        let sent = retry_on_intr(|| rustix::net::sendmsg(&to, &parts, &mut control, SendFlags::NOSIGNAL))?;
        bytes = bytes.get(sent..).unwrap_or_default();
        // Once is enough.
        control.clear();
    }
    Ok(())
}

/// The receiving end of a connection: its bytes, and the descriptor that came with them.
///
/// The kernel ends a read behind the bytes that a descriptor came with, so a line that was read is never ahead of its
/// descriptor, and no second descriptor comes before it can be asked for. It may be there before its line, when that was read
/// together with earlier ones.
#[derive(Debug)]
pub struct Receiving<S> {
    from: S,
    /// The last one. Earlier ones that were not taken are closed, as are more than one at once.
    came: Option<OwnedFd>,
}

impl<S: AsFd> Receiving<S> {
    /// Receives from `from`, of which nothing else reads.
    pub fn new(from: S) -> Receiving<S> {
        Receiving { from, came: None }
    }

    /// The descriptor that came with what was read, if one did.
    pub fn descriptor(&mut self) -> Option<OwnedFd> {
        self.came.take()
    }
}

impl<S: AsFd> Read for Receiving<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = retry_on_intr(|| {
            let mut parts = [IoSliceMut::new(buffer)];
            rustix::net::recvmsg(&self.from, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
        })?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
                self.came = descriptors.next();
            }
        }
        Ok(received.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_line_is_not_read_without_its_descriptor_and_the_next_one_has_none() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let file = tempfile::tempfile().expect("a file");
        send(&ours, b"first\nsecond\n", None).expect("sent");
        send(&ours, b"third\n", Some(file.as_fd())).expect("sent");
        send(&ours, b"fourth\n", None).expect("sent");
        drop(ours);
        let mut from = BufReader::new(Receiving::new(theirs));
        let mut lines = String::new();
        for _ in 0..3 {
            from.read_line(&mut lines).expect("a line");
        }
        assert_eq!(lines, "first\nsecond\nthird\n");
        let came = from.get_mut().descriptor().expect("the third has one");
        from.read_line(&mut lines).expect("a line");
        assert!(lines.ends_with("fourth\n") && from.get_mut().descriptor().is_none());
        let identity = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino));
        assert_eq!(identity(came.as_fd()), identity(file.as_fd()));
        let flags = rustix::io::fcntl_getfd(&came).expect("flags");
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        assert_eq!(from.read(&mut [0; 8]).expect("the end"), 0);
    }

    #[test]
    fn a_line_longer_than_the_connection_holds_arrives_whole() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let text = vec![b'x'; 3 << 20];
        let sent = text.clone();
        let sender = std::thread::spawn(move || {
            let file = tempfile::tempfile().expect("a file");
            send(&ours, &sent, Some(file.as_fd())).expect("sent");
        });
        let mut from = Receiving::new(theirs);
        let mut heard = Vec::new();
        from.read_to_end(&mut heard).expect("received");
        sender.join().expect("no panic");
        assert!(heard == text && from.descriptor().is_some());
    }
}
