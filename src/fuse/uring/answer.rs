//! Answers to the kernel, in its own structures (uapi/linux/fuse.h).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::{SystemTime, UNIX_EPOCH};

use zerocopy::{Immutable, IntoBytes};

use crate::fuse::ops::{Attr, FileKind, Name, Opened, Space};
use crate::fuse::{NAME_MAX, TTL};

/// FOPEN_DIRECT_IO, FOPEN_NOFLUSH, FOPEN_PARALLEL_DIRECT_WRITES: no page cache for images (loop and qemu have their
/// own), no FLUSH at close, parallel writes.
const IMAGE_OPEN: u32 = 1 | 1 << 5 | 1 << 6;

/// FOPEN_NOFLUSH, FOPEN_PASSTHROUGH; FOPEN_DIRECT_IO would bring reads and writes back to us.
const PASSED_OPEN: u32 = 1 << 5 | 1 << 7;

/// In front of every answer.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct OutHeader {
    /// Of the whole answer, in bytes.
    pub(super) len: u32,
    /// 0, a negated errno, or the code of a notification.
    pub(super) error: i32,
    /// Which request; 0 for a notification.
    pub(super) unique: u64,
}

/// Length of [`OutHeader`] in bytes.
pub(super) const HEADER: usize = size_of::<OutHeader>();

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct AttrFields {
    ino: u64,
    size: u64,
    blocks: u64,
    seconds: [u64; 3],
    nanoseconds: [u32; 3],
    mode: u32,
    links: u32,
    uid: u32,
    gid: u32,
    rdev: u32,
    block_size: u32,
    flags: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct AttrOut {
    valid: u64,
    valid_nanoseconds: u32,
    dummy: u32,
    attr: AttrFields,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct EntryOut {
    nodeid: u64,
    generation: u64,
    entry_valid: u64,
    attr_valid: u64,
    entry_valid_nanoseconds: u32,
    attr_valid_nanoseconds: u32,
    attr: AttrFields,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct OpenOut {
    handle: u64,
    open_flags: u32,
    backing: i32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct WriteOut {
    size: u32,
    padding: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct StatFsOut {
    blocks: u64,
    free: u64,
    available: u64,
    files: u64,
    files_free: u64,
    block_size: u32,
    name_max: u32,
    fragment: u32,
    padding: u32,
    spare: [u32; 6],
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Dirent {
    ino: u64,
    next: u64,
    name_len: u32,
    kind: u32,
}

fn mode_of(kind: FileKind) -> u32 {
    match kind {
        FileKind::File => libc::S_IFREG,
        FileKind::Folder => libc::S_IFDIR,
    }
}

/// Seconds and nanoseconds since 1970, the seconds as the kernel's signed number.
fn time(at: SystemTime) -> (u64, u32) {
    match at.duration_since(UNIX_EPOCH) {
        Ok(after) => (after.as_secs(), after.subsec_nanos()),
        Err(before) => {
            let before = before.duration();
            let (seconds, nanoseconds) = (before.as_secs(), before.subsec_nanos());
            match nanoseconds {
                0 => (seconds.wrapping_neg(), 0),
                n => (seconds.wrapping_add(1).wrapping_neg(), 1_000_000_000 - n),
            }
        }
    }
}

fn fields(a: &Attr) -> AttrFields {
    // Mounted noatime; and nothing but content changes here.
    let (seconds, nanoseconds) = time(a.mtime);
    AttrFields {
        ino: a.ino,
        size: a.size,
        blocks: a.blocks,
        seconds: [seconds; 3],
        nanoseconds: [nanoseconds; 3],
        mode: mode_of(a.kind) | u32::from(a.mode),
        links: a.links,
        uid: a.uid,
        gid: a.gid,
        rdev: 0,
        block_size: a.block_size,
        flags: 0,
    }
}

/// The answer of GETATTR and SETATTR.
pub(super) fn attr(a: &Attr) -> AttrOut {
    AttrOut { valid: TTL.as_secs(), valid_nanoseconds: TTL.subsec_nanos(), dummy: 0, attr: fields(a) }
}

/// The answer of LOOKUP. Inode numbers are never reused within a mount, so one generation is enough.
pub(super) fn entry(a: &Attr) -> EntryOut {
    known(a.ino, a)
}

fn known(nodeid: u64, a: &Attr) -> EntryOut {
    let (seconds, nanoseconds) = (TTL.as_secs(), TTL.subsec_nanos());
    EntryOut {
        nodeid,
        generation: 0,
        entry_valid: seconds,
        attr_valid: seconds,
        entry_valid_nanoseconds: nanoseconds,
        attr_valid_nanoseconds: nanoseconds,
        attr: fields(a),
    }
}

/// The answer of OPEN.
pub(super) fn opened(o: &Opened) -> OpenOut {
    OpenOut { handle: o.handle, open_flags: if o.direct { IMAGE_OPEN } else { 0 }, backing: 0 }
}

/// The answer of OPEN of a file that the kernel passes through to this registration.
pub(super) fn passed(o: &Opened, backing: i32) -> OpenOut {
    OpenOut { handle: o.handle, open_flags: PASSED_OPEN, backing }
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct CreateOut {
    entry: EntryOut,
    open: OpenOut,
}

/// The answer of CREATE.
pub(super) fn created((a, o): (Attr, Opened)) -> CreateOut {
    CreateOut { entry: entry(&a), open: opened(&o) }
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct XattrOut {
    size: u32,
    padding: u32,
}

/// The answer of GETXATTR and LISTXATTR to a caller that asks how long it is.
pub(super) fn length(bytes: usize) -> XattrOut {
    XattrOut { size: u32::try_from(bytes).unwrap_or(u32::MAX), padding: 0 }
}

/// The answer of COPY_FILE_RANGE, whose 32 bits end at a whole page, as the kernel cuts it: the program that
/// copies asks again for the rest.
pub(super) fn copied(bytes: u64) -> WriteOut {
    WriteOut { size: u32::try_from(bytes).unwrap_or(!4095), padding: 0 }
}

/// The answer of WRITE: that many bytes.
pub(super) fn written(bytes: usize) -> WriteOut {
    // At most MAX_WRITE bytes were asked for.
    WriteOut { size: u32::try_from(bytes).unwrap_or(u32::MAX), padding: 0 }
}

/// The answer of STATFS.
pub(super) fn space(s: &Space) -> StatFsOut {
    StatFsOut {
        blocks: s.blocks,
        free: s.free,
        available: s.available,
        files: s.files,
        files_free: s.files_free,
        block_size: s.block_size,
        name_max: NAME_MAX,
        fragment: s.block_size,
        padding: 0,
        spare: [0; 6],
    }
}

/// The answer of READDIR, name by name into its place.
pub(super) struct NamesOut<'a> {
    room: &'a mut [u8],
    used: usize,
}

impl NamesOut<'_> {
    /// Nothing yet in `room`.
    pub(super) fn new(room: &mut [u8]) -> NamesOut<'_> {
        NamesOut { room, used: 0 }
    }

    /// True when a name of this length would still fit.
    pub(super) fn fits(&self, name: &OsStr) -> bool {
        size(name) <= self.room.len() - self.used
    }

    /// Adds a name. To be called while it [`fits`](Self::fits); else nothing happens.
    pub(super) fn add(&mut self, n: &Name) {
        let size = size(&n.name);
        let Some(place) = self.room.get_mut(self.used..self.used + size) else { return };
        place.fill(0);
        let kind = mode_of(n.kind) >> 12;
        let dirent = Dirent { ino: n.ino, next: n.next, name_len: n.name.len() as u32, kind };
        let (front, rest) = place.split_at_mut(size_of::<Dirent>());
        front.copy_from_slice(dirent.as_bytes());
        rest[..n.name.len()].copy_from_slice(n.name.as_bytes());
        self.used += size;
    }

    /// Bytes used.
    pub(super) fn used(&self) -> usize {
        self.used
    }
}

fn size(name: &OsStr) -> usize {
    (size_of::<Dirent>() + name.len()).next_multiple_of(8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn structures_are_as_long_as_the_kernels() {
        assert_eq!((HEADER, size_of::<AttrOut>(), size_of::<EntryOut>()), (16, 104, 128));
        assert_eq!((size_of::<StatFsOut>(), size_of::<Dirent>(), size_of::<OpenOut>()), (80, 24, 16));
        assert_eq!((size_of::<CreateOut>(), size_of::<XattrOut>()), (144, 8));
    }

    #[test]
    fn images_are_opened_direct_parallel_and_without_flush() {
        assert_eq!(IMAGE_OPEN, 97);
    }

    #[test]
    fn times_before_1970_are_negative_seconds_and_positive_nanoseconds() {
        assert_eq!(time(UNIX_EPOCH + Duration::new(3, 4)), (3, 4));
        assert_eq!(time(UNIX_EPOCH - Duration::new(3, 0)), (3u64.wrapping_neg(), 0));
        assert_eq!(time(UNIX_EPOCH - Duration::new(3, 1)), (4u64.wrapping_neg(), 999_999_999));
    }

    #[test]
    fn names_are_packed_in_steps_of_8_until_the_room_is_full() {
        let mut room = [0xff; 70];
        let mut names = NamesOut::new(&mut room);
        let n = Name { ino: 5, kind: FileKind::Folder, name: "vm".into(), next: 7 };
        let mut fitted = 0;
        while names.fits(&n.name) {
            fitted += 1;
            names.add(&n);
        }
        assert_eq!((fitted, names.used()), (2, 64));
        names.add(&n);
        assert_eq!(names.used(), 64);
        assert_eq!(&room[24..32], b"vm\0\0\0\0\0\0");
        assert_eq!((room[20], room[64]), (4, 0xff));
    }
}
