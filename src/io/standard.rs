//! Standard input and output as the program's caller has left them. One that was closed is no longer seen in `main`: the
//! runtime opens /dev/null in its place, where a backup would go without a trace; and it takes EBADF, the answer for one
//! that was opened the other way round, for success. So both are looked at before the runtime begins.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::io::Errno;

/// A bit each for what can be used: 1 to read standard input, 2 to write standard output.
static USABLE: AtomicU8 = AtomicU8::new(BOTH);
const INPUT: u8 = 1;
const OUTPUT: u8 = 2;
const BOTH: u8 = INPUT | OUTPUT;

/// Run by the C library before `main`, and with it before Rust's runtime.
#[used]
// SAFETY: the section is a table of such functions. This one uses nothing that the runtime sets up: it makes two system
// calls, and stores a byte.
#[unsafe(link_section = ".init_array")]
static AT_START: extern "C" fn() = look;

extern "C" fn look() {
    let way = |fd: libc::c_int| {
        // SAFETY: a number that is not open is refused with EBADF; nothing is changed.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
        // A descriptor that is a mere place is neither read nor written.
        (flags >= 0 && flags & libc::O_PATH == 0).then_some(flags & libc::O_ACCMODE)
    };
    let input = way(libc::STDIN_FILENO).is_some_and(|way| way != libc::O_WRONLY);
    let output = way(libc::STDOUT_FILENO).is_some_and(|way| way != libc::O_RDONLY);
    USABLE.store(if input { INPUT } else { 0 } | if output { OUTPUT } else { 0 }, Ordering::Relaxed);
}

/// EBADF where standard input was closed when the program began, or cannot be read.
pub fn input() -> io::Result<()> {
    usable(INPUT)
}

/// EBADF where standard output was closed when the program began, or cannot be written.
pub fn output() -> io::Result<()> {
    usable(OUTPUT)
}

fn usable(bit: u8) -> io::Result<()> {
    match USABLE.load(Ordering::Relaxed) & bit {
        0 => Err(Errno::BADF.into()),
        _ => Ok(()),
    }
}
