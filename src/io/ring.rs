//! What our io_urings have in common.

use std::io;

use io_uring::register::Restriction;
use io_uring::squeue::EntryMarker;
use io_uring::{Builder, IoUring, cqueue};

/// IORING_ENTER_GETEVENTS: completions that wait for the thread are brought.
const GETEVENTS: u32 = 1;

/// Makes a ring with room for `room` submissions, which works from [`begin`] on. What can be submitted to it is bound to
/// `operations`, so that it is no way around the list of system calls of the sandbox.
pub fn bound<S: EntryMarker>(
    builder: &mut Builder<S, cqueue::Entry>,
    room: u32,
    operations: &[u8],
) -> io::Result<IoUring<S, cqueue::Entry>> {
    let ring = builder.setup_r_disabled().build(room)?;
    let mut list: Vec<_> = operations.iter().copied().map(Restriction::sqe_op).collect();
    ring.submitter().register_restrictions(&mut list)?;
    Ok(ring)
}

/// Switches a ring on. One that was made for a single issuer is the calling thread's from now on.
pub fn begin<S: EntryMarker>(ring: &IoUring<S, cqueue::Entry>) -> io::Result<()> {
    ring.submitter().register_enable_rings()
}

/// Hands over what was submitted and brings what is completed, without waiting.
pub fn look<S: EntryMarker>(ring: &mut IoUring<S, cqueue::Entry>) -> io::Result<()> {
    let submitted = ring.submission().len() as u32;
    // SAFETY: without an argument the call reads and writes nothing of ours but the ring itself; what the entries point to
    // was answered for when they were pushed.
    passing(unsafe { ring.submitter().enter::<libc::sigset_t>(submitted, 0, GETEVENTS, None) })
}

/// The outcome of a submission: a failure that passes by itself is none.
pub fn passing(result: io::Result<usize>) -> io::Result<()> {
    match result {
        Ok(_) => Ok(()),
        // EBUSY: completions wait to be taken first. ETIME: the wait had a limit.
        Err(e)
            if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME)) =>
        {
            Ok(())
        }
        Err(e) => Err(e),
    }
}
