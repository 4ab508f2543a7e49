//! A host file whose calls are seen, and perhaps refused or changed, before another file carries them out.

use std::fmt;
use std::io;
use std::sync::Arc;

use ploopfs::io::file::{HostFile, HostSpace, HostStatus, HostTraits};

/// A call that reads, changes or syncs the file; offsets and lengths in bytes.
pub enum HostCall<'a> {
    Read { buf: &'a mut [u8], at: u64 },
    ReadNowait { buf: &'a mut [u8], at: u64 },
    Write { data: &'a [u8], at: u64 },
    Punch { at: u64, len: u64 },
    SetLen(u64),
    SyncData,
    SyncAll,
}

impl HostCall<'_> {
    /// Does it. Returns the bytes moved, 0 for calls that move none.
    pub fn carry_out(self, file: &dyn HostFile) -> io::Result<usize> {
        match self {
            HostCall::Read { buf, at } => file.read_at(buf, at),
            HostCall::ReadNowait { buf, at } => file.read_at_nowait(buf, at),
            HostCall::Write { data, at } => file.write_at(data, at),
            HostCall::Punch { at, len } => file.punch(at, len).map(|()| 0),
            HostCall::SetLen(len) => file.set_len(len).map(|()| 0),
            HostCall::SyncData => file.sync_data().map(|()| 0),
            HostCall::SyncAll => file.sync_all().map(|()| 0),
        }
    }
}

/// Who sees the calls.
pub trait Watch: Send + Sync {
    /// Carries `call` out on `file`, or not.
    fn call(&self, call: HostCall<'_>, file: &dyn HostFile) -> io::Result<usize>;

    /// What the file is taken for, where that is not what it is.
    fn traits(&self, real: HostTraits) -> HostTraits {
        real
    }
}

/// The file that `watch` sees the calls of.
pub struct Watched<W> {
    pub file: Arc<dyn HostFile>,
    pub watch: W,
}

impl<W> std::ops::Deref for Watched<W> {
    type Target = W;
    fn deref(&self) -> &W {
        &self.watch
    }
}

impl<W> fmt::Debug for Watched<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Watched({:?})", self.file)
    }
}

impl<W: Watch> Watched<W> {
    fn call(&self, call: HostCall<'_>) -> io::Result<usize> {
        self.watch.call(call, &*self.file)
    }
}

impl<W: Watch> HostFile for Watched<W> {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        self.call(HostCall::Read { buf, at })
    }
    fn read_at_nowait(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        self.call(HostCall::ReadNowait { buf, at })
    }
    fn write_at(&self, data: &[u8], at: u64) -> io::Result<usize> {
        self.call(HostCall::Write { data, at })
    }
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.call(HostCall::SetLen(len)).map(drop)
    }
    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.call(HostCall::Punch { at, len }).map(drop)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.call(HostCall::SyncData).map(drop)
    }
    fn sync_all(&self) -> io::Result<()> {
        self.call(HostCall::SyncAll).map(drop)
    }
    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.file.seek_data(offset)
    }
    fn seek_hole(&self, offset: u64) -> io::Result<u64> {
        self.file.seek_hole(offset)
    }
    fn status(&self) -> io::Result<HostStatus> {
        self.file.status()
    }
    fn space(&self) -> io::Result<HostSpace> {
        self.file.space()
    }
    fn drop_cache(&self) -> io::Result<()> {
        self.file.drop_cache()
    }
    fn traits(&self) -> HostTraits {
        self.watch.traits(self.file.traits())
    }
}
