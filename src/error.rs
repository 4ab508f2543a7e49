//! The one error of the library: what happened, to which file, and which errno and exit status it means.
//!
//! [`Kind`] is what a caller may act on. The table in [`Kind::errno`] and [`Kind::exit_status`] is the only
//! place where kinds become numbers. An error is logged once, at the edge (transport, control socket, `main`).

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What went wrong, as far as a caller can act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// No such image, snapshot, file or mount.
    NotFound,
    /// The name is taken.
    Exists,
    /// Another process holds the image or the folder.
    InUse,
    /// The file is open or busy inside this mount.
    Busy,
    /// The bytes on disk contradict the format.
    Damaged,
    /// Legal, but not something this program or this host file system can do.
    Unsupported,
    /// The caller's argument is out of range or malformed.
    Invalid,
    /// The image or the mount cannot be written.
    ReadOnly,
    /// The host file system, or the format's address range, is full.
    NoSpace,
    /// Refused on purpose (size changes, renames and removals through the mount).
    NotPermitted,
    /// The caller may not do this.
    Access,
    /// Stopped because it was cancelled.
    Cancelled,
    /// A host operation failed.
    Io,
}

impl Kind {
    /// The errno that the kernel gets.
    pub fn errno(self) -> i32 {
        match self {
            Kind::NotFound => libc::ENOENT,
            Kind::Exists => libc::EEXIST,
            Kind::InUse | Kind::Busy => libc::EBUSY,
            Kind::Damaged => libc::EUCLEAN,
            Kind::Unsupported => libc::EOPNOTSUPP,
            Kind::Invalid => libc::EINVAL,
            Kind::ReadOnly => libc::EROFS,
            Kind::NoSpace => libc::ENOSPC,
            Kind::NotPermitted => libc::EPERM,
            Kind::Access => libc::EACCES,
            Kind::Cancelled => libc::ECANCELED,
            Kind::Io => libc::EIO,
        }
    }

    /// The exit status of a command that ends with this error (docs/design.md#errors).
    pub fn exit_status(self) -> u8 {
        match self {
            Kind::Invalid => 2,
            Kind::Damaged => 3,
            Kind::InUse => 4,
            _ => 1,
        }
    }

    /// The kind that an errno of the host stands for.
    pub fn of_errno(errno: i32) -> Kind {
        match errno {
            libc::ENOENT => Kind::NotFound,
            libc::EEXIST => Kind::Exists,
            libc::EBUSY | libc::ETXTBSY => Kind::Busy,
            libc::EOPNOTSUPP | libc::ENOSYS => Kind::Unsupported,
            libc::EROFS => Kind::ReadOnly,
            // EFBIG: a limit of the file's size is met (`ulimit -f`), or the host file system's own.
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Kind::NoSpace,
            libc::EPERM => Kind::NotPermitted,
            libc::EACCES => Kind::Access,
            _ => Kind::Io,
        }
    }
}

/// An error with its context. Cheap to clone: one failed sync answers many waiters.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

struct Inner {
    kind: Kind,
    /// The host's own errno where there was one, so that the kernel gets exactly it.
    errno: Option<i32>,
    file: Option<PathBuf>,
    /// Of a failed host operation: which one, in words.
    operation: Option<String>,
    /// Where in the file, in bytes.
    offset: Option<u64>,
    context: String,
    /// What it comes from, for callers that can do something about it.
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

/// The library's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error without a file; `context` says what happened and what to do next.
    pub fn new(kind: Kind, context: impl Into<String>) -> Error {
        Inner::new(kind, context.into()).into()
    }

    /// An error about `file`.
    pub fn at(kind: Kind, file: impl AsRef<Path>, context: impl Into<String>) -> Error {
        Inner { file: Some(file.as_ref().to_owned()), ..Inner::new(kind, context.into()) }.into()
    }

    /// A failed host operation; `doing` names it ("cannot write the BAT").
    pub fn io(source: &io::Error, file: impl AsRef<Path>, doing: impl fmt::Display) -> Error {
        Error::of_host(source, file.as_ref(), doing.to_string(), None)
    }

    /// The same, at byte `offset` of the file.
    pub fn io_at(source: &io::Error, file: impl AsRef<Path>, doing: impl fmt::Display, offset: u64) -> Error {
        Error::of_host(source, file.as_ref(), doing.to_string(), Some(offset))
    }

    fn of_host(source: &io::Error, file: &Path, operation: String, offset: Option<u64>) -> Error {
        let errno = source.raw_os_error();
        let place = offset.map(|offset| format!(" at byte {offset}")).unwrap_or_default();
        let context = format!("{operation}{place}: {}", words(source));
        let (file, operation) = (Some(file.to_owned()), Some(operation));
        let kind = errno.map_or(Kind::Io, Kind::of_errno);
        Inner { errno, file, operation, offset, ..Inner::new(kind, context) }.into()
    }

    /// The same error, which comes from `source`.
    #[must_use]
    pub fn because(&self, source: impl std::error::Error + Send + Sync + 'static) -> Error {
        Inner { source: Some(Arc::new(source)), ..self.0.again() }.into()
    }

    /// The same error, seen as another kind.
    pub fn with_kind(&self, kind: Kind) -> Error {
        Inner { kind, errno: None, source: None, ..self.0.again() }.into()
    }

    /// The same error, with more to say: behind a semicolon.
    #[must_use]
    pub fn and(&self, more: impl fmt::Display) -> Error {
        Inner { context: format!("{}; {more}", self.0.context), ..self.0.again() }.into()
    }

    /// What a caller may act on.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The errno that the kernel gets: the host's own, else the kind's.
    pub fn errno(&self) -> i32 {
        self.0.errno.unwrap_or_else(|| self.0.kind.errno())
    }

    /// True when it says something of the host's state at that moment, and nothing of the file: no descriptors or memory
    /// left, a device or a server that did not answer. Asked again, the host may well do it.
    pub fn is_passing(&self) -> bool {
        self.0.errno.is_some_and(is_passing)
    }

    /// The file it happened to.
    pub fn file(&self) -> Option<&Path> {
        self.0.file.as_deref()
    }

    /// The host's operation that failed, in words ("cannot write the BAT"); None where none did.
    pub fn operation(&self) -> Option<&str> {
        self.0.operation.as_deref()
    }

    /// Where in the file it happened, in bytes, where that is known.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }
}

impl Inner {
    fn new(kind: Kind, context: String) -> Inner {
        Inner { kind, errno: None, file: None, operation: None, offset: None, context, source: None }
    }

    fn again(&self) -> Inner {
        Inner {
            file: self.file.clone(),
            operation: self.operation.clone(),
            context: self.context.clone(),
            source: self.source.clone(),
            ..*self
        }
    }
}

impl From<Inner> for Error {
    fn from(inner: Inner) -> Error {
        Error(Arc::new(inner))
    }
}

/// `text` with control characters made visible: file names come from elsewhere, and must neither drive a terminal nor begin
/// a line of their own in a log.
pub fn printable(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

/// Want of space, in whatever words the host says it.
pub fn is_full(e: &std::io::Error) -> bool {
    e.raw_os_error().is_some_and(|errno| Kind::of_errno(errno) == Kind::NoSpace)
}

/// True when this errno of the host says something of its state at that moment: see [`Error::is_passing`].
pub fn is_passing(errno: i32) -> bool {
    matches!(
        errno,
        libc::EMFILE
            | libc::ENFILE
            | libc::ENOMEM
            | libc::ENOBUFS
            | libc::EIO
            | libc::EINTR
            | libc::EAGAIN
            | libc::EBUSY
            | libc::ETIMEDOUT
            | libc::ESTALE
            | libc::EHOSTDOWN
            | libc::EHOSTUNREACH
            | libc::ENOTCONN
            | libc::ECONNABORTED
            | libc::EREMOTEIO
    )
}

/// The host's error in words alone: "(os error 2)" behind them means nothing to a user.
pub fn words(error: &io::Error) -> String {
    let text = error.to_string();
    match text.rsplit_once(" (os error ") {
        Some((words, _)) => words.to_owned(),
        None => text,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.file {
            Some(file) => write!(f, "{}: {}", file.display(), self.0.context),
            None => f.write_str(&self.0.context),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({}): {self}", self.0.kind, self.errno())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn std::error::Error + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_host_operation_is_also_data() {
        let failed = io::Error::from_raw_os_error(libc::ENOSPC);
        let e = Error::io_at(&failed, "/images/vm1.hds", "cannot write", 4096);
        assert_eq!(e.to_string(), "/images/vm1.hds: cannot write at byte 4096: No space left on device");
        assert_eq!((e.operation(), e.offset(), e.errno()), (Some("cannot write"), Some(4096), libc::ENOSPC));
        let other = e.with_kind(Kind::Damaged);
        assert_eq!(
            (other.operation(), other.offset(), other.kind()),
            (e.operation(), e.offset(), Kind::Damaged)
        );
    }

    #[test]
    fn control_characters_in_a_name_are_made_visible() {
        assert_eq!(printable("a\x1b[2Jb\nc\u{9b}d"), "a\\u{1b}[2Jb\\nc\\u{9b}d");
    }
}
