//! Where a command's bytes go that are no words: standard output, or another pipe that is named.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, SeekFrom};

use crate::cli::out;
use crate::error::{Error, Kind, Result};
use crate::progress::Progress;
use crate::transfer::disk::FlatDisk;
use crate::transfer::export;

/// How standard output is called in messages.
const NAME: &str = "standard output";
/// What means standard output, whatever it is.
const STDOUT: [&str; 4] = ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"];

/// Something that takes bytes in their order.
#[derive(Debug)]
pub(super) struct Pipe {
    file: File,
    /// For messages.
    name: PathBuf,
}

/// Standard output, past its buffer, which looks for ends of lines; `what` is not for a terminal, and `instead` says what
/// to do.
pub(super) fn stdout(what: &str, instead: &str) -> Result<File> {
    out::usable()?;
    let stdout = io::stdout();
    if stdout.is_terminal() {
        return Err(Error::new(Kind::Invalid, format!("{what} is not for a terminal; {instead}")));
    }
    let own = stdout.as_fd().try_clone_to_owned();
    own.map(File::from).map_err(|e| Error::io(&e, NAME, "cannot use it"))
}

/// The pipe that `path` means: - and its like are standard output; and what a shell makes of >(a command). None: it means
/// no pipe. `what` is not for a terminal.
pub(super) fn pipe(path: &Path, what: &str) -> Result<Option<Pipe>> {
    if STDOUT.iter().any(|name| path == Path::new(name)) {
        let file = stdout(what, "give it a file, or pipe it into a program")?;
        return Ok(Some(Pipe { file, name: NAME.into() }));
    }
    match path.metadata() {
        Ok(meta) if meta.file_type().is_fifo() || meta.file_type().is_char_device() => {
            let opened = File::options().write(true).custom_flags(libc::O_NOCTTY).open(path);
            let file = opened.map_err(|e| Error::io(&e, path, "cannot open for writing"))?;
            if file.is_terminal() {
                return Err(Error::at(
                    Kind::Invalid,
                    path,
                    format!("is a terminal, and {what} is not for one"),
                ));
            }
            Ok(Some(Pipe { file, name: path.to_owned() }))
        }
        _ => Ok(None),
    }
}

impl Pipe {
    /// For bytes of another sort.
    pub(super) fn into_file(self) -> File {
        self.file
    }

    /// Writes the bytes of `disk`. Where it is a new file (`> FILE`), what is zero stays a hole.
    pub(super) fn write_disk(&mut self, disk: &dyn FlatDisk, progress: &Progress) -> Result<()> {
        match self.is_new_file() {
            true => export::raw(disk, &self.file, &self.name, progress),
            false => export::pipe(disk, &mut self.file, &self.name, progress),
        }
    }

    /// The end: what can be made durable is.
    pub(super) fn finish(self) -> Result<()> {
        match self.file.sync_all() {
            Err(e) if !matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EROFS | libc::ENOTSUP)) => {
                Err(Error::io(&e, &self.name, "cannot sync"))
            }
            _ => Ok(()),
        }
    }

    /// An empty regular file in which bytes may be put anywhere.
    fn is_new_file(&self) -> bool {
        let empty = self.file.metadata().is_ok_and(|meta| meta.is_file() && meta.len() == 0);
        let at_begin = rustix::fs::seek(&self.file, SeekFrom::Current(0)).is_ok_and(|at| at == 0);
        let appends = rustix::fs::fcntl_getfl(&self.file).is_ok_and(|flags| flags.contains(OFlags::APPEND));
        empty && at_begin && !appends
    }
}
