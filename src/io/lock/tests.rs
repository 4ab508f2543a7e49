//! The locks of an image's files against qemu, ploop, and each other.

use super::*;
use crate::Kind;
use crate::io::real::Access;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};

struct Image {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn image() -> Image {
    let dir = tempfile::tempdir().expect("temp folder");
    let path = dir.path().join("vm1.hds");
    let made = run("qemu-img", &["create", "-q", "-f", "parallels", text(&path), "16M"]);
    assert!(made.status.success(), "{made:?}");
    Image { _dir: dir, path }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temp paths are ASCII")
}

fn run(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().expect(program)
}

fn open(image: &Image, access: Access) -> Arc<RealFile> {
    Arc::new(RealFile::open(&image.path, access).expect("open"))
}

/// A process that keeps the image until its input is closed; killed if the test fails.
struct Running(Child, Option<ChildStdin>);

impl Running {
    fn start(program: &str, args: &[&str]) -> Running {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect(program);
        let stdin = child.stdin.take();
        Running(child, stdin)
    }

    /// qemu-io with the image open, as its first answer shows.
    fn qemu_io(image: &Image, options: &[&str]) -> Running {
        let mut args = vec!["-f", "parallels"];
        args.extend(options);
        args.push(text(&image.path));
        let mut running = Running::start("qemu-io", &args);
        running.1.as_mut().expect("piped").write_all(b"length\n").expect("ask");
        let out = running.0.stdout.as_mut().expect("piped");
        let mut seen = Vec::new();
        let mut byte = [0];
        while !String::from_utf8_lossy(&seen).contains("MiB") {
            assert_eq!(out.read(&mut byte).expect("read"), 1, "qemu-io ended: {seen:?}");
            seen.push(byte[0]);
        }
        running
    }

    fn finish(mut self) {
        drop(self.1.take());
        self.0.wait().expect("wait");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What QEMU says of a command on the image: done, or kept out by a lock.
fn qemu_may(image: &Image, options: &[&str], command: &str) -> bool {
    let mut args = options.to_vec();
    args.extend(["-f", "parallels", "-c", command, text(&image.path)]);
    let said = run("qemu-io", &args);
    let words = String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success() || words.contains("lock"), "{said:?}");
    said.status.success()
}

#[test]
fn while_we_write_a_delta_qemu_opens_it_neither_for_writing_nor_for_reading() {
    let image = image();
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let lock = DeltaLock::acquire(open(&image, access), Use::Writer).expect("lock");
        assert!(lock.held());
        assert!(!qemu_may(&image, &[], "write 0 512"));
        assert!(!qemu_may(&image, &["-r"], "read 0 512"));
        let refused = run("qemu-img", &["check", "-f", "parallels", text(&image.path)]);
        assert!(!refused.status.success(), "{refused:?}");
        drop(lock);
        assert!(qemu_may(&image, &[], "write 0 512"));
    }
}

#[test]
fn while_we_read_a_delta_qemu_may_read_it_and_not_write_it() {
    let image = image();
    let lock = DeltaLock::acquire(open(&image, Access::ReadOnly), Use::Reader).expect("lock");
    assert!(qemu_may(&image, &["-r"], "read 0 512"));
    assert!(!qemu_may(&image, &[], "write 0 512"));
    drop(lock);
    assert!(qemu_may(&image, &[], "write 0 512"));
}

#[test]
fn while_qemu_writes_the_image_we_are_refused_and_name_it() {
    let image = image();
    let qemu = Running::qemu_io(&image, &[]);
    for used in [Use::Reader, Use::Writer] {
        let error = DeltaLock::acquire(open(&image, Access::ReadWrite), used).expect_err("in use");
        assert_eq!(error.kind(), Kind::InUse);
        let expected = format!("qemu-io (pid {}", qemu.0.id());
        assert!(error.to_string().contains(&expected), "{error}");
    }
    qemu.finish();
    DeltaLock::acquire(open(&image, Access::ReadWrite), Use::Writer).expect("free again");
}

#[test]
fn while_qemu_reads_the_image_we_may_read_it_and_not_write_it() {
    let image = image();
    let qemu = Running::qemu_io(&image, &["-r"]);
    let reader = DeltaLock::acquire(open(&image, Access::ReadOnly), Use::Reader).expect("two readers");
    let expected = format!("qemu-io (pid {}", qemu.0.id());
    let error = reader.begin_writing().expect_err("QEMU reads");
    assert!(error.to_string().contains(&expected), "{error}");
    drop(reader);
    let error = DeltaLock::acquire(open(&image, Access::ReadWrite), Use::Writer).expect_err("in use");
    assert!(error.to_string().contains(&expected), "{error}");
    qemu.finish();
    DeltaLock::acquire(open(&image, Access::ReadWrite), Use::Writer).expect("free again");
}

/// Reading took the lock of a writer: a check during a nightly export failed.
#[test]
fn two_readers_pass_and_a_writer_passes_neither_of_them() {
    let image = image();
    let one = DeltaLock::acquire(open(&image, Access::ReadOnly), Use::Reader).expect("lock");
    let two = DeltaLock::acquire(open(&image, Access::ReadOnly), Use::Reader).expect("beside it");
    let write = || DeltaLock::acquire(open(&image, Access::ReadWrite), Use::Writer);
    assert_eq!(write().expect_err("two readers").kind(), Kind::InUse);
    drop(one);
    assert_eq!(write().expect_err("one reader").kind(), Kind::InUse);
    drop(two);
    let writer = write().expect("free");
    let read = || DeltaLock::acquire(open(&image, Access::ReadOnly), Use::Reader);
    assert_eq!(read().expect_err("a writer").kind(), Kind::InUse);
    writer.end_writing();
    let reader = read().expect("it writes no more");
    assert_eq!(writer.begin_writing().expect_err("a reader").kind(), Kind::InUse);
    assert_eq!(writer.used(), Use::Reader);
    let other = read().expect("a failed attempt keeps no reader out");
    drop((reader, other));
    writer.begin_writing().expect("alone");
    assert_eq!(read().expect_err("a writer").kind(), Kind::InUse);
}

#[test]
fn a_qemu_that_writes_and_shares_everything_keeps_us_out_and_one_that_reads_so_does_not() {
    let image = image();
    let path = text(&image.path);
    let sharing = Running::qemu_io(&image, &["-r", "-U"]);
    DeltaLock::acquire(open(&image, Access::ReadWrite), Use::Writer)
        .expect("who reads with -U accepts changes");
    sharing.finish();

    // QEMU's byte for "write in use" alone, as share-rw=on leaves it.
    let other = RealFile::open(&image.path, Access::ReadOnly).expect("open");
    set(&other, libc::F_RDLCK, (101, 1)).expect("lock");
    let error = DeltaLock::acquire(open(&image, Access::ReadWrite), Use::Writer).expect_err(path);
    assert_eq!(error.kind(), Kind::InUse);
}

#[test]
fn a_writer_is_refused_beside_any_user_until_that_lets_go() {
    let image = image();
    for (first, second) in
        [(Use::Reader, Use::Writer), (Use::Writer, Use::Reader), (Use::Writer, Use::Writer)]
    {
        let lock = DeltaLock::acquire(open(&image, Access::ReadOnly), first).expect("lock");
        let error = DeltaLock::acquire(open(&image, Access::ReadWrite), second).expect_err("in use");
        assert_eq!(error.kind(), Kind::InUse);
        drop(lock);
        DeltaLock::acquire(open(&image, Access::ReadWrite), second).expect("free again");
    }
}

#[test]
fn closing_another_descriptor_of_the_file_does_not_lose_the_lock() {
    let image = image();
    let _lock = DeltaLock::acquire(open(&image, Access::ReadWrite), Use::Writer).expect("lock");
    drop(File::open(&image.path).expect("open"));
    DeltaLock::acquire(open(&image, Access::ReadWrite), Use::Writer).expect_err("still held");
}

#[test]
fn of_many_that_lock_at_once_at_most_one_wins() {
    let image = image();
    for _ in 0..20 {
        let won: Vec<_> = thread::scope(|scope| {
            let tries: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| DeltaLock::acquire(open(&image, Access::ReadWrite), Use::Writer).ok())
                })
                .collect();
            tries.into_iter().filter_map(|t| t.join().expect("no panic")).collect()
        });
        assert!(won.len() <= 1, "{won:?}");
    }
}

#[test]
fn a_long_operation_is_a_range_of_its_own_that_ploop_looks_at_first() {
    let image = image();
    let lock = DeltaLock::acquire(open(&image, Access::ReadWrite), Use::Writer).expect("lock");
    let long = lock.begin_long().expect("long");
    let other = RealFile::open(&image.path, Access::ReadOnly).expect("open");
    assert!(held_by_another(&other, &[LONG]).expect("test"));
    drop(long);
    assert!(!held_by_another(&other, &[LONG]).expect("test"));
    assert!(held_by_another(&other, &[IN_USE]).expect("test"), "the ordinary lock is still there");
}

#[test]
fn the_ploop_tool_is_kept_out_and_named() {
    let image = image();
    // ploop's own protocol, with POSIX locks, from another process; the tool itself needs its kernel
    // module to stay on an image for longer than a check takes.
    let script = "import fcntl,struct,sys; f=open(sys.argv[1],'rb'); \
                  fcntl.fcntl(f, fcntl.F_SETLK, struct.pack('hhqqi', fcntl.F_RDLCK, 0, 200, 5, 0)); \
                  print('held', flush=True); sys.stdin.read()";
    let mut ploop = Running::start("python3", &["-c", script, text(&image.path)]);
    let mut said = [0; 4];
    ploop.0.stdout.as_mut().expect("piped").read_exact(&mut said).expect("held");
    let error = DeltaLock::acquire(open(&image, Access::ReadWrite), Use::Writer).expect_err("in use");
    assert!(error.to_string().contains(&format!("(pid {}", ploop.0.id())), "{error}");
    ploop.finish();
    DeltaLock::acquire(open(&image, Access::ReadWrite), Use::Writer).expect("free again");
}
