//! Files of the host, on its file systems and in memory.

use super::*;
use crate::io::file::{read_full, write_full};
use rustix::fs::Mode;

fn file_in(folder: &Path) -> (tempfile::TempDir, RealFile) {
    let dir = tempfile::tempdir_in(folder).expect("temp folder");
    let path = dir.path().join("delta.hds");
    File::create(&path).expect("create");
    let file = RealFile::open(&path, Access::ReadWrite).expect("open");
    (dir, file)
}

fn on_disk_and_in_memory() -> Vec<(tempfile::TempDir, RealFile)> {
    vec![file_in(Path::new("/tmp")), file_in(Path::new("/dev/shm"))]
}

#[test]
fn what_is_written_is_read_back_and_the_end_of_the_file_reads_nothing() {
    for (_dir, file) in on_disk_and_in_memory() {
        write_full(&file, b"ploop", 1_000_000).expect("write");
        let mut buf = [1u8; 8];
        assert_eq!(read_full(&file, &mut buf, 999_998).expect("read"), 7);
        assert_eq!(&buf[..7], b"\0\0ploop");
        assert_eq!(file.read_at(&mut buf, 1_000_005).expect("read"), 0);
        assert_eq!(file.len().expect("len"), 1_000_005);
    }
}

#[test]
fn a_punched_range_reads_zero_and_gives_host_space_back() {
    for (_dir, file) in on_disk_and_in_memory() {
        write_full(&file, &[7u8; 1 << 20], 0).expect("write");
        file.sync_all().expect("sync");
        let before = file.status().expect("status").blocks;
        // Beyond the end as well: the caller need not know where the file ends.
        file.punch(65536 - 100, 8 << 20).expect("punch");
        let status = file.status().expect("status");
        assert_eq!(status.len, 1 << 20, "the length stays");
        assert!(status.blocks < before / 4, "{} of {before} blocks left", status.blocks);
        let mut buf = [1u8; 200];
        read_full(&file, &mut buf, 65536 - 200).expect("read");
        assert_eq!((&buf[..100], &buf[100..]), (&[7u8; 100][..], &[0u8; 100][..]));
        file.punch(0, 0).expect("an empty range is no error");
    }
}

#[test]
fn seeking_finds_data_and_holes_and_the_end_of_the_file_is_a_hole() {
    for (_dir, file) in on_disk_and_in_memory() {
        file.set_len(4 << 20).expect("set_len");
        write_full(&file, &[1u8; 65536], 1 << 20).expect("write");
        assert_eq!(file.seek_data(0).expect("data"), Some(1 << 20));
        assert_eq!(file.seek_hole(1 << 20).expect("hole"), (1 << 20) + 65536);
        assert_eq!(file.seek_data(2 << 20).expect("data"), None);
        assert_eq!(file.seek_hole(5 << 20).expect("hole"), 4 << 20);
        write_full(&file, &[1u8; 4096], (4 << 20) - 4096).expect("write");
        assert_eq!(file.seek_hole((4 << 20) - 4096).expect("hole"), 4 << 20);
    }
}

#[test]
fn traits_are_those_of_the_host_file_system() {
    let (_dir, on_disk) = file_in(Path::new("/tmp"));
    let (_dir2, in_memory) = file_in(Path::new("/dev/shm"));
    assert!(!on_disk.traits().never_blocks && on_disk.traits().nowait_reads, "{on_disk:?}");
    assert!(in_memory.traits().never_blocks, "{in_memory:?}");
}

#[test]
fn a_nowait_read_of_what_is_cached_succeeds_and_of_what_is_not_says_eagain() {
    let (_dir, file) = file_in(Path::new("/tmp"));
    write_full(&file, &[5u8; 1 << 20], 0).expect("write");
    let mut buf = [0u8; 4096];
    assert_eq!(file.read_at_nowait(&mut buf, 8192).expect("cached"), 4096);
    assert_eq!(buf, [5u8; 4096]);
    file.sync_all().expect("sync");
    file.drop_cache().expect("drop");
    let cold = file.read_at_nowait(&mut buf, 512 << 10).expect_err("nothing is cached any more");
    assert_eq!(cold.raw_os_error(), Some(libc::EAGAIN));
    let wild = file.read_at_nowait(&mut buf, u64::MAX).expect_err("never the current position");
    assert_eq!(wild.raw_os_error(), Some(libc::EINVAL));
}

#[test]
fn only_regular_files_are_opened_and_the_message_says_what_was_found() {
    let dir = tempfile::tempdir().expect("temp folder");
    let (pipe, link, regular) = (dir.path().join("p"), dir.path().join("l"), dir.path().join("r"));
    File::create(&regular).expect("create");
    std::os::unix::fs::symlink(&regular, &link).expect("link");
    rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).expect("mkfifo");
    let cases = [(pipe.as_path(), "a named pipe"), (&link, "a symbolic link"), (dir.path(), "a folder")];
    for (path, what) in cases {
        let error = RealFile::open(path, Access::Widest).expect_err(what);
        assert_eq!(error.kind(), Kind::Invalid);
        assert!(error.to_string().contains(what), "{error}");
    }
    let null = RealFile::open("/dev/null", Access::Widest).expect_err("a device");
    assert!(null.to_string().contains("a character device"), "{null}");
    let none = RealFile::open(dir.path().join("none"), Access::Widest).expect_err("missing");
    assert_eq!(none.kind(), Kind::NotFound);
    let folder = File::open(dir.path()).expect("open folder");
    RealFile::open_at(&folder, "r", Access::ReadWrite).expect("by name in a folder");
}

#[test]
fn the_widest_access_is_writable_where_the_host_allows_it() {
    let dir = tempfile::tempdir().expect("temp folder");
    let path = dir.path().join("f");
    File::create(&path).expect("create");
    assert!(RealFile::open(&path, Access::Widest).expect("open").writable());
    assert!(!RealFile::open(&path, Access::ReadOnly).expect("open").writable());
    // A running program cannot be opened for writing, not even by root.
    let program = dir.path().join("sleep");
    std::fs::copy("/bin/sleep", &program).expect("copy");
    let mut child = std::process::Command::new(&program).arg("60").spawn().expect("run");
    let widest = RealFile::open(&program, Access::Widest);
    let strict = RealFile::open(&program, Access::ReadWrite);
    child.kill().expect("kill");
    child.wait().expect("wait");
    assert!(!widest.expect("falls back to reading").writable());
    assert_eq!(strict.expect_err("busy").kind(), Kind::Busy);
}

/// A mounted ramfs, which has no `fallocate` at all.
struct Ramfs(tempfile::TempDir);

impl Drop for Ramfs {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn a_host_that_cannot_punch_is_asked_once() {
    let dir = Ramfs(tempfile::tempdir().expect("temp folder"));
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("none", dir.0.path(), "ramfs", flags, None).expect("mount ramfs");
    let path = dir.0.path().join("f");
    File::create(&path).expect("create");
    let file = RealFile::open(&path, Access::ReadWrite).expect("open");
    assert!(file.traits().never_blocks);
    for _ in 0..2 {
        let error = file.punch(0, 4096).expect_err("ramfs punches nothing");
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
        assert!(file.cannot_punch.load(Relaxed), "remembered");
    }
}

#[test]
fn status_and_space_are_those_of_fstat_and_statfs() {
    let (dir, file) = file_in(Path::new("/tmp"));
    let meta = std::fs::metadata(dir.path().join("delta.hds")).expect("stat");
    use std::os::unix::fs::MetadataExt;
    let status = file.status().expect("status");
    assert_eq!((status.dev, status.ino, status.links), (meta.dev(), meta.ino(), 1));
    assert_eq!((status.mode, status.mtime.0), (meta.mode() & 0o7777, meta.mtime()));
    let space = file.space().expect("space");
    assert!(space.total > space.free && space.free >= space.available && space.total > 1 << 30);
}
