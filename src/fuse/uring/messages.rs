//! Requests that come over /dev/fuse beside the rings: forgotten look-ups, interrupts, and what comes before every queue has
//! an entry.

use std::io;
use std::sync::Arc;

use super::device::Device;
use super::exchange::Exchange;
use super::serve::{SessionServer, Thread};
use super::wire::{self, Parts};
use crate::fuse::MAX_WRITE;
use crate::fuse::ops::{Answer, Errno};

/// Room for a message: the largest write and what stands in front of it.
const MESSAGE: usize = MAX_WRITE as usize + 4096;

/// Serves what comes here until the connection has ended.
pub(super) fn serve(device: &Arc<Device>, server: &SessionServer) -> io::Result<()> {
    let mut buffer = vec![0; MESSAGE];
    loop {
        match device.read(&mut buffer) {
            Ok(message) => {
                let message =
                    Message { device: device.clone(), request: message.to_vec(), answer: Vec::new() };
                server.serve(message, Thread::Transport);
            }
            // ECONNABORTED: the administrator's abort.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ECONNABORTED)) => {
                return Ok(());
            }
            // ENOENT: the request was interrupted before we had it.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::ENOENT)) => {}
            Err(e) => return Err(e),
        }
    }
}

/// A request that came over /dev/fuse.
struct Message {
    device: Arc<Device>,
    request: Vec<u8>,
    answer: Vec<u8>,
}

impl Exchange for Message {
    fn parts(&self) -> Parts<'_> {
        // What cannot be taken apart has no header, and so is malformed to what reads on.
        wire::split(&self.request).unwrap_or(Parts { header: &[], operation: &[], payload: &[] })
    }

    fn room(&mut self, len: usize) -> Option<&mut [u8]> {
        if len > MAX_WRITE as usize {
            return None;
        }
        self.answer.resize(len, 0);
        Some(&mut self.answer)
    }

    fn send(self, outcome: Answer<usize>) {
        let Ok(header) = wire::header(&self.request) else { return };
        let sent = match outcome {
            Ok(len) => self.device.write(header.unique, 0, &[&self.answer[..len]]),
            Err(Errno(errno)) => self.device.write(header.unique, -errno, &[]),
        };
        match sent {
            Ok(()) => {}
            // ENOENT: the requester is gone (or it is the interrupt of a request on a ring, where the kernel does not
            // look for it); ENODEV: the mount is gone.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => {}
            Err(e) => log::warn!("the kernel refused an answer: {e}"),
        }
    }

    fn forget(self) {}
}
