//! What our io_urings have in common.

use std::io;

use io_uring::register::Restriction;
use io_uring::squeue::EntryMarker;
use io_uring::{Builder, IoUring, cqueue};

/// Makes a ring with room for `room` submissions. What can be submitted to it is bound to `operations`, so that it is no way
/// around the list of system calls of the sandbox.
pub fn bound<S: EntryMarker>(
    builder: &mut Builder<S, cqueue::Entry>,
    room: u32,
    operations: &[u8],
) -> io::Result<IoUring<S, cqueue::Entry>> {
    let ring = builder.setup_r_disabled().build(room)?;
    let mut list: Vec<_> = operations.iter().copied().map(Restriction::sqe_op).collect();
    ring.submitter().register_restrictions(&mut list)?;
    ring.submitter().register_enable_rings()?;
    Ok(ring)
}

/// The outcome of a submission: a failure that passes by itself is none.
pub fn passing(result: io::Result<usize>) -> io::Result<()> {
    match result {
        Ok(_) => Ok(()),
        // EBUSY: completions wait to be taken first.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => Ok(()),
        Err(e) => Err(e),
    }
}
