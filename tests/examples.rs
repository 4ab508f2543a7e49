//! The programs of `examples/`: served, written, read back and mapped through the library alone.

mod common;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Mount, Rng, Run, marked_in_use, ok, temp_dir, text, until};

/// How long anything here may take on a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// An example, which `cargo test` builds beside the binary under test; None, and the reason printed, where only one
/// test file was built.
fn example(test: &str, name: &str) -> Option<PathBuf> {
    let program = Path::new(env!("CARGO_BIN_EXE_ploopfs")).with_file_name("examples").join(name);
    if !program.is_file() {
        println!("SKIPPED {test}: {name} is not built; run: cargo build --examples");
        return None;
    }
    Some(program)
}

/// A running program, ended when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended by itself, or the test failed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_image_is_served_written_read_and_mapped_through_the_library() {
    require!("fuse");
    let test = "an_image_is_served_written_read_and_mapped_through_the_library";
    let programs = ["serve", "open_and_read", "walk_map"].map(|name| example(test, name));
    let [Some(serve), Some(open_and_read), Some(walk_map)] = programs else { return };

    let folder = temp_dir();
    let images = folder.path().join("images");
    fs::create_dir(&images).expect("a folder");
    Run::ploopfs().args(["create", "--size", "64M"]).arg(images.join("vm1")).ok();
    let guard = Mount::adopt(&images, &folder.path().join("vdisks"));
    fs::create_dir(guard.point()).expect("a mount point");

    let mut command = Command::new(serve);
    command.arg(&images).arg(guard.point()).stdin(Stdio::null());
    let mut serving = Running(command.spawn().expect("the example"));
    assert!(until(SOON, || guard.is_mounted()), "`serve` does not mount");
    let data = Rng::new(7).bytes(2 << 20);
    let flat = OpenOptions::new().write(true).open(guard.flat("vm1")).expect("the flat file");
    flat.write_all_at(&data, 5 << 20).expect("written");
    drop(flat);
    ok("umount", &[guard.point()]);
    assert!(until(SOON, || serving.0.try_wait().is_ok_and(|status| status.is_some())), "`serve` goes on");
    assert!(serving.0.wait().is_ok_and(|status| status.success()));
    assert!(!marked_in_use(&guard.delta("vm1")));

    let read = Command::new(open_and_read).arg(images.join("vm1")).args(["5242879", "2097154"]).output();
    let read = read.expect("the example");
    assert!(read.status.success(), "{read:?}");
    assert!(
        read.stdout[1..=data.len()] == data[..] && read.stdout[0] == 0 && read.stdout.len() == data.len() + 2
    );

    let map = Run::new(&walk_map).arg(guard.delta("vm1")).ok();
    let ranges: Vec<Vec<u64>> = map
        .lines()
        .map(|line| line.split(' ').map(|number| number.parse().expect("a number")).collect())
        .collect();
    assert_eq!(ranges.iter().map(|range| range[1]).sum::<u64>(), 2 << 20, "{map}");
    let delta = fs::read(guard.delta("vm1")).expect("the file");
    for range in &ranges {
        let [disk, len, at] = [range[0], range[1], range[2]].map(|number| number as usize);
        let from = disk - (5 << 20);
        assert!(delta[at..at + len] == data[from..from + len], "{} {map}", text(&walk_map));
    }
}

#[test]
fn an_example_says_what_is_wrong_and_fails() {
    let test = "an_example_says_what_is_wrong_and_fails";
    let programs = ["open_and_read", "walk_map"].map(|name| example(test, name));
    let [Some(open_and_read), Some(walk_map)] = programs else { return };
    let folder = temp_dir();
    let raw = folder.path().join("a.raw");
    fs::write(&raw, [0; 4096]).expect("a file");
    let nothing = Run::new(open_and_read).arg(folder.path().join("nothing")).status(1);
    assert!(nothing.stderr.contains("nothing"), "{nothing}");
    let no_map = Run::new(walk_map).arg(&raw).status(1);
    assert!(no_map.stderr.contains("has no map"), "{no_map}");
}
