//! Other names for files and folders: how R8's renames are made, and the only place where they and hard links are.
//! `clippy.toml` refuses the calls everywhere else. A new file gets its name by [`new_file`](super::new_file).
//!
//! None of these syncs the folder: when that has to be is the caller's numbered order.
#![expect(clippy::disallowed_methods, reason = "the home of renames")]

use std::ffi::OsStr;
use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, RenameFlags};
use rustix::io::{Errno, Result, retry_on_intr};

/// Renames `from` to `to`, and replaces a file, or an empty folder, of that name.
pub fn rename_over(dir: BorrowedFd<'_>, from: &OsStr, to: &OsStr) -> Result<()> {
    retry_on_intr(|| rustix::fs::renameat(dir, from, dir, to))
}

/// Renames the folder `from`; EEXIST or ENOTEMPTY where `to` is there. Hosts that know no better replace an empty folder.
pub fn rename_new_folder(dir: BorrowedFd<'_>, from: &OsStr, to: &OsStr) -> Result<()> {
    without_replacing(dir, from, to, || rustix::fs::renameat(dir, from, dir, to))
}

/// Renames the file `from`; EEXIST where `to` is there. On hosts that know no better: 1. a hard link, which replaces
/// nothing; 2. the old name removed. A crash between the two leaves one file with two names; 2 before 1 would lose it.
pub fn rename_new_file(dir: BorrowedFd<'_>, from: &OsStr, to: &OsStr) -> Result<()> {
    without_replacing(dir, from, to, || {
        rustix::fs::linkat(dir, from, dir, to, AtFlags::empty())?; // 1
        rustix::fs::unlinkat(dir, from, AtFlags::empty()) // 2
    })
}

/// Gives the file `name` of `from` a second name, `new` in `to`; EEXIST where that is there. A link is followed to no other
/// file. What is done to a file with two names is done under both: R9.
pub fn link(from: BorrowedFd<'_>, name: &OsStr, to: BorrowedFd<'_>, new: &OsStr) -> Result<()> {
    rustix::fs::linkat(from, name, to, new, AtFlags::empty())
}

fn without_replacing(
    dir: BorrowedFd<'_>,
    from: &OsStr,
    to: &OsStr,
    otherwise: impl Fn() -> Result<()>,
) -> Result<()> {
    match rustix::fs::renameat_with(dir, from, dir, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => otherwise(),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::os::fd::AsFd;

    #[test]
    fn a_rename_to_a_new_name_replaces_neither_a_file_nor_a_full_folder() {
        let temp = tempfile::tempdir().expect("a folder");
        let at = |name: &str| temp.path().join(name);
        let dir = File::open(temp.path()).expect("the folder");
        let (a, b) = (OsStr::new("a"), OsStr::new("b"));
        fs::write(at("a"), "a").expect("written");
        fs::write(at("b"), "b").expect("written");
        assert_eq!(rename_new_file(dir.as_fd(), a, b), Err(Errno::EXIST));
        assert_eq!(fs::read(at("b")).expect("read"), b"b");
        rename_over(dir.as_fd(), a, b).expect("renamed");
        assert!(!at("a").exists() && fs::read(at("b")).expect("read") == b"a");

        fs::create_dir(at("c")).expect("made");
        fs::create_dir(at("d")).expect("made");
        fs::write(at("d/x"), "x").expect("written");
        let (c, d) = (OsStr::new("c"), OsStr::new("d"));
        assert!(matches!(rename_new_folder(dir.as_fd(), c, d), Err(Errno::EXIST | Errno::NOTEMPTY)));
        rename_new_folder(dir.as_fd(), d, OsStr::new("e")).expect("renamed");
        assert!(!at("d").exists() && at("e/x").exists());
    }
}
