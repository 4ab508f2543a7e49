//! The file system exerciser: random reads, writes, maps, holes and syncs against its own copy.

mod common;

use std::path::Path;

use common::{Loop, Mount, Run, heavy, number_from_env, temp_dir, text};

/// Block mode: an image never changes its size. `align` is the smallest unit of the target.
fn exercise(target: &Path, align: u32, seed: u64) {
    let _turn = heavy();
    let folder = temp_dir();
    let config = folder.path().join("fsx.toml");
    let settings = format!(
        "flen = 8388608\nblockmode = true\nnosizechecks = true\n\
         [opsize]\nmax = 262144\nmin = 0\nalign = {align}\n\
         [weights]\nclose_open = 0\ntruncate = 0\ninvalidate = 1\nread = 10\nwrite = 10\nmapread = 5\nmapwrite = 5\n\
         fsync = 0.3\nfdatasync = 0.3\npunch_hole = 5\nsendfile = 2\nposix_fadvise = 1\n"
    );
    std::fs::write(&config, settings).expect("the configuration");
    let operations = number_from_env("PLOOPFS_FSX_OPS", 6000).to_string();
    let seed = seed.to_string();
    let args =
        ["-q", "-f", text(&config), "-P", text(folder.path()), "-N", &operations, "-S", &seed, text(target)];
    Run::new("fsx").args(args).limit(400).ok();
}

#[test]
fn fsx_finds_nothing_wrong_with_the_flat_file() {
    require!("fuse", "fsx");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    exercise(&mount.flat("vm1"), 1, 11);
}

#[test]
fn fsx_finds_nothing_wrong_with_a_loop_device_with_direct_io() {
    require!("fuse", "loop", "fsx");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let device = Loop::attach(&mount.flat("vm1"), true);
    exercise(device.device(), 512, 12);
    device.detach();
}

#[test]
fn fsx_finds_nothing_wrong_with_a_loop_device_without_direct_io() {
    require!("fuse", "loop", "fsx");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let device = Loop::attach(&mount.flat("vm1"), false);
    exercise(device.device(), 512, 13);
    device.detach();
}
