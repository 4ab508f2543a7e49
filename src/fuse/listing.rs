//! The names of a folder, a portion at a time.
//!
//! The kernel reads a folder in portions and names each by an offset that it got before. The offset is the place of a name
//! ([`Name::next`]), which stays what it is when others come and go: nothing is skipped or named twice, and nothing is
//! kept for an open folder, however many programs have however large a one open.

use crate::fuse::ops::{Done, FileKind, FileSystem, Ino, Name};

/// The root of every mount.
const ROOT: Ino = 1;
/// The place of `..`; the folder's own names follow.
const DOTS: u64 = 2;
/// Most names of one portion: somewhat more than fit into what libc asks for at a time (32 KiB).
const PORTION: usize = 1024;

/// The names behind `offset`, `.` and `..` first, for `done`; there may be more. None: the end.
pub(crate) fn portion(fs: &dyn FileSystem, ino: Ino, offset: u64, done: Done<Vec<Name>>) {
    // `..` has the number of the root: what the kernel shows for it comes from its own tree.
    let dots = [dots(ino, ".", 1), dots(ROOT, "..", DOTS)];
    let mut names: Vec<Name> = dots.into_iter().filter(|name| name.next > offset).collect();
    let all = move |answer: super::ops::Answer<Vec<Name>>| {
        done(answer.map(|more| {
            names.extend(more);
            names
        }));
    };
    fs.readdir(ino, offset.max(DOTS), PORTION, Box::new(all));
}

fn dots(ino: Ino, name: &str, next: u64) -> Name {
    Name { ino, kind: FileKind::Folder, name: name.into(), next }
}
