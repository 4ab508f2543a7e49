//! What ploopfs-semantics(7) says, done to a real mount. Its numbers and names are put in from the code (src/cli/man.rs);
//! here is what it says of errors, of limits, and of a killed daemon.

mod common;

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Mount, Run};
use rustix::fs::FallocateFlags;

/// The entry of the page's ERRORS section for an errno.
fn page_of(errno: &str) -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("man/ploopfs-semantics.7");
    let page = fs::read_to_string(page).expect("the page");
    let errors =
        page.split(".SH ERRORS").nth(1).and_then(|part| part.split("\n.SH ").next()).expect("ERRORS");
    let mut entries = errors.split("\n.TP\n.B ").skip(1);
    let entry = entries.find(|entry| entry.lines().next() == Some(errno));
    entry.unwrap_or_else(|| panic!("the page says nothing of {errno}")).replace('\n', " ")
}

/// `result` failed with the errno of this name, and the page says so with `words`.
#[track_caller]
fn fails<T>(result: io::Result<T>, errno: (&str, i32), words: &str) {
    assert_eq!(result.err().and_then(|e| e.raw_os_error()), Some(errno.1), "{words}");
    let entry = page_of(errno.0);
    assert!(entry.contains(words), "the page of {} does not say '{words}': {entry}", errno.0);
}

const EPERM: (&str, i32) = ("EPERM", libc::EPERM);
const EROFS: (&str, i32) = ("EROFS", libc::EROFS);
const EBUSY: (&str, i32) = ("EBUSY", libc::EBUSY);
const ENOSPC: (&str, i32) = ("ENOSPC", libc::ENOSPC);
const EOPNOTSUPP: (&str, i32) = ("EOPNOTSUPP", libc::EOPNOTSUPP);

#[test]
fn a_change_of_names_or_size_in_the_mount_is_refused_as_the_page_says() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let (flat, other) = (mount.flat("vm1"), mount.flat("vm2"));
    let file = mount.open("vm1");
    fails(file.set_len(128 << 20), EPERM, "change of size");
    fails(fs::File::create(&other), EPERM, "new file");
    fails(fs::rename(&flat, &other), EPERM, "rename");
    fails(fs::remove_file(&flat), EPERM, "removal");
    fails(file.write_at(b"xy", (64 << 20) - 1), ENOSPC, "across the end");
    let allocate = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 1 << 20);
    fails(allocate.map_err(io::Error::from), EOPNOTSUPP, "set space aside");
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 0, 1 << 20).expect("punching works");
    drop(file);
    mount.umount();
}

#[test]
fn what_cannot_be_opened_for_writing_says_erofs_as_the_page_does() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    Run::ploopfs().args(["snapshot", "create"]).arg(mount.images().join("vm1")).arg("then").ok();
    let snapshot = mount.point().join(".snapshots/vm1/then.img");
    // Its permission bits say so, too, but root is not asked for those.
    fails(OpenOptions::new().write(true).open(snapshot), EROFS, "file is a snapshot");
    mount.umount();
    mount.set_args(&["-r"]);
    mount.start();
    fails(OpenOptions::new().write(true).open(mount.flat("vm1")), EROFS, "mount is read-only");
    mount.umount();
}

#[test]
fn an_image_that_another_process_has_says_ebusy_as_the_page_does() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let delta = mount.delta("vm1");
    let theirs = std::sync::Arc::new(
        ploopfs::io::real::RealFile::open(&delta, ploopfs::io::real::Access::ReadWrite).expect("the file"),
    );
    let lock = ploopfs::io::lock::DeltaLock::acquire(theirs, ploopfs::io::lock::Use::Writer).expect("free");
    fails(OpenOptions::new().write(true).open(mount.flat("vm1")), EBUSY, "Another process has the image");
    drop(lock);
    drop(mount.open("vm1"));
    mount.umount();
}

#[test]
fn what_was_synced_before_kill_9_is_there_after_the_same_mount_line() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let file = mount.open("vm1");
    file.write_all_at(b"synced", 5 << 20).expect("written");
    file.sync_all().expect("synced");
    mount.kill();
    assert!(!mount.is_mounted(), "the keeper takes the mount point away");
    assert!(file.read_at(&mut [0; 4096], 0).is_err(), "who had it open gets errors");
    drop(file);
    mount.start();
    let mut found = [0; 6];
    mount.open("vm1").read_exact_at(&mut found, 5 << 20).expect("read");
    assert_eq!(&found, b"synced");
    mount.umount();
}

#[test]
fn a_snapshot_name_may_be_as_long_as_the_page_says_and_no_longer() {
    let folder = common::temp_dir();
    let image = folder.path().join("vm1");
    Run::ploopfs().args(["create", "--size", "64M"]).arg(&image).ok();
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("man/ploopfs-semantics.7");
    let page = fs::read_to_string(page).expect("the page");
    let longest = page.lines().find_map(|line| line.split_once(" characters: letters")).expect("the limit").0;
    let longest: usize = longest.parse().expect("a number");
    let create = |len: usize| {
        Run::ploopfs().args(["snapshot", "create"]).arg(&image).arg("a".repeat(len)).run().success()
    };
    assert!(create(longest) && !create(longest + 1));
}

#[test]
fn new_space_reads_as_zeroes_and_zeroes_written_there_store_nothing() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let before = common::allocated(&mount.delta("vm1"));
    let file = mount.open("vm1");
    file.write_all_at(&vec![0; 8 << 20], 1 << 20).expect("written");
    file.sync_all().expect("synced");
    assert_eq!(common::read_at(&file, 0, 1 << 20).expect("read"), vec![0; 1 << 20]);
    drop(file);
    mount.umount();
    assert_eq!(common::allocated(&mount.delta("vm1")), before);
}
