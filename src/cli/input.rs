//! What a command reads: a file that is named, or standard input. The wait for a pipe ends with a Ctrl-C.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::cli::work::is_interrupted;
use crate::error::{Error, Kind, Result};
use crate::io::standard;
use crate::transfer::disk::FlatFile;

/// How often a wait for a pipe asks whether it is still wanted.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Read at once where the reader asks for little: one system call's worth.
const BUFFER: usize = 1 << 20;

/// What was opened.
pub(super) enum Input {
    /// Can be read anywhere, and has a length.
    Disk(FlatFile),
    /// Comes once, from here on; and its name for messages.
    Pipe(Box<dyn Read + Send>, String),
}

/// Opens `file`, where - is standard input; `what` must not come from a terminal.
pub(super) fn open(file: &Path, what: &str) -> Result<Input> {
    if file == Path::new("-") {
        return stdin(what);
    }
    let is_pipe = |kind: std::fs::FileType| kind.is_fifo() || kind.is_char_device() || kind.is_socket();
    match file.metadata() {
        // /dev/stdin, and what a shell makes of <(a command).
        Ok(meta) if is_pipe(meta.file_type()) => {
            let opened = File::open(file).map_err(|e| Error::io(&e, file, "cannot open"))?;
            refuse_terminal(&opened, what)?;
            Ok(Input::Pipe(Box::new(Pipe(opened.into())), file.to_string_lossy().into_owned()))
        }
        _ => FlatFile::open(file).map(Input::Disk),
    }
}

/// How standard input is called in messages.
const NAME: &str = "standard input";

/// Standard input to be read from here to its end, and its name for messages; `what` must not come from a terminal.
pub(super) fn stdin_to_end(what: &str) -> Result<(Box<dyn Read + Send>, String)> {
    let file = own_stdin(what)?;
    Ok((Box::new(io::BufReader::with_capacity(BUFFER, Pipe(file.into()))), NAME.to_owned()))
}

fn own_stdin(what: &str) -> Result<File> {
    let closed = |e| {
        Error::io(&e, NAME, format!("is closed, or not open for reading, and {what} was to come from there"))
    };
    standard::input().map_err(closed)?;
    let stdin = io::stdin();
    refuse_terminal(&stdin, what)?;
    let own = stdin.as_fd().try_clone_to_owned();
    own.map(File::from).map_err(|e| Error::io(&e, NAME, "cannot use it"))
}

fn stdin(what: &str) -> Result<Input> {
    let file = own_stdin(what)?;
    let kind = file.metadata().map_err(|e| Error::io(&e, NAME, "cannot use it"))?.file_type();
    // Of a file of which a part was read before, the rest comes like a pipe.
    let at_begin = rustix::fs::seek(&file, SeekFrom::Current(0)).is_ok_and(|at| at == 0);
    match at_begin && (kind.is_file() || kind.is_block_device()) {
        true => FlatFile::of(file, Path::new(NAME)).map(Input::Disk),
        false => Ok(Input::Pipe(Box::new(Pipe(file.into())), NAME.to_owned())),
    }
}

fn refuse_terminal(file: &impl IsTerminal, what: &str) -> Result<()> {
    if file.is_terminal() {
        return Err(Error::new(Kind::Invalid, format!("{what} does not come from a terminal; give a file")));
    }
    Ok(())
}

/// Past the buffer of standard input, which other readers would miss.
struct Pipe(OwnedFd);

impl Read for Pipe {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&LOOK)) {
                Ok(0) if is_interrupted() => {
                    return Err(io::Error::other("cancelled while nothing came"));
                }
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => match rustix::io::read(&self.0, &mut *buf) {
                    // Another reader of it was quicker.
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    other => return Ok(other?),
                },
                Err(e) => return Err(e.into()),
            }
        }
    }
}
