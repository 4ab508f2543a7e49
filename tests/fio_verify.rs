//! fio writes, trims and reads back with crc32c sums, 16 requests deep, 512 bytes to 256 KiB.

mod common;

use std::path::Path;

use common::{Loop, Mount, Run, heavy};

/// What both jobs share. `verify_interval` puts a sum into every sector, so that a torn request is found.
fn fio(file: &Path) -> Run {
    let common = [
        "--direct=1",
        "--group_reporting=0",
        "--verify_fatal=1",
        "--verify_interval=512",
        "--bsrange=512-256k",
        "--blockalign=512",
        "--iodepth=16",
    ];
    // fio leaves its verification state in the working folder.
    Run::new("fio")
        .arg(format!("--filename={}", file.display()))
        .args(common)
        .in_folder(&std::env::temp_dir())
        .limit(300)
}

#[test]
fn every_trimmed_and_rewritten_block_of_a_loop_device_verifies() {
    require!("fuse", "loop", "fio");
    let _turn = heavy();
    let mount = Mount::new(&["--create", "vm1=512M"]);
    let device = Loop::attach(&mount.flat("vm1"), true);
    for seed in 1..=2 {
        // trimwrite trims each block, then writes it: a discard that arrives late eats what was written.
        let job =
            ["--name=trimwrite", "--rw=randtrimwrite", "--ioengine=libaio", "--verify=crc32c", "--size=256M"];
        fio(device.device()).args(job).arg(format!("--randseed={seed}")).ok();
    }
    device.detach();
}

#[test]
fn verified_writes_of_a_loop_device_survive_discards_beside_them() {
    require!("fuse", "loop", "fio");
    let _turn = heavy();
    let mount = Mount::new(&["--create", "vm1=512M"]);
    let device = Loop::attach(&mount.flat("vm1"), true);
    let write = ["--name=write", "--rw=randrw", "--ioengine=libaio", "--verify=crc32c", "--size=192M"];
    let trim =
        ["--name=trim", "--rw=randtrim", "--ioengine=libaio", "--offset=192M", "--size=64M", "--iodepth=4"];
    let bound = ["--bsrange=512-4M", "--time_based=1", "--runtime=5"];
    fio(device.device()).args(write).args(trim).args(bound).ok();
    device.detach();
}

#[test]
fn verified_writes_of_the_flat_file_survive_punched_holes_beside_them() {
    require!("fuse", "fio");
    let _turn = heavy();
    let mount = Mount::new(&["--create", "vm1=512M"]);
    let write = ["--name=write", "--rw=randrw", "--ioengine=libaio", "--verify=crc32c", "--size=192M"];
    // fio's own trim is for block devices; its falloc engine punches holes.
    let punch = ["--name=punch", "--rw=randtrim", "--ioengine=falloc", "--offset=192M", "--size=64M"];
    let bound = ["--time_based=1", "--runtime=5"];
    fio(&mount.flat("vm1")).args(write).args(punch).args(bound).ok();
}
