//! Mapped files, and short host writes.

mod common;

use std::os::unix::fs::FileExt;

use common::{Mount, Run, ok, read_at, text};

#[test]
fn what_is_written_through_a_shared_map_is_read_back_by_read() {
    require!("fuse", "xfs");
    let mount = Mount::new(&["--create", "vm1=16M"]);
    let script =
        ["-c", "mmap -rw 1m 1m", "-c", "mwrite -S 0x5a 1052672 8192", "-c", "msync -s", "-c", "munmap"];
    Run::new("xfs_io").args(script).arg(mount.flat("vm1")).ok();
    let file = mount.open("vm1");
    assert_eq!(read_at(&file, 1_052_672, 8192).expect("a read"), vec![0x5a; 8192]);
    assert_eq!(read_at(&file, 1 << 20, 4096).expect("a read"), vec![0; 4096]);
}

#[test]
fn a_map_shows_what_was_written_before() {
    require!("fuse", "xfs");
    let mount = Mount::new(&["--create", "vm1=16M"]);
    mount.open("vm1").write_all_at(b"seen through the map", 4096).expect("a write");
    let script = ["-r", "-c", "mmap -r 0 1m", "-c", "mread -v 4096 20"];
    let shown = Run::new("xfs_io").args(script).arg(mount.flat("vm1")).ok();
    assert!(shown.contains("seen.through.the"), "{shown}");
}

#[test]
fn fio_verifies_what_it_wrote_through_a_map() {
    require!("fuse", "fio");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let job = ["--name=map", "--ioengine=mmap", "--rw=randwrite", "--bsrange=4k-64k", "--size=32M"];
    let file = format!("--filename={}", mount.flat("vm1").display());
    Run::new("fio").args(job).args(["--verify=crc32c", "--verify_fatal=1", &file]).limit(200).ok();
}

#[test]
fn a_map_survives_the_umount_of_its_image() {
    require!("fuse", "xfs", "qemu");
    let mut mount = Mount::new(&["--create", "vm1=16M"]);
    let script = ["-c", "mmap -rw 0 1m", "-c", "mwrite -S 0x77 0 65536", "-c", "munmap"];
    Run::new("xfs_io").args(script).arg(mount.flat("vm1")).ok();
    mount.umount();
    ok("qemu-img", &["check", "-f", "parallels", text(&mount.delta("vm1"))]);
    mount.start();
    assert_eq!(read_at(&mount.open("vm1"), 0, 65536).expect("a read"), vec![0x77; 65536]);
}

#[cfg(feature = "faults")]
mod short_writes {
    use super::common::{Loop, Rng, heavy};
    use super::*;

    /// All host writes move half of what they were asked to.
    fn mount_with_short_writes() -> Mount {
        let mut mount = Mount::new(&["--create", "vm1=64M"]);
        mount.umount();
        mount.set_args(&["--fault", "short=write:1:forever"]);
        mount.start();
        mount
    }

    #[test]
    fn a_short_host_write_never_becomes_a_lost_tail_of_the_flat_file() {
        require!("fuse");
        let mount = mount_with_short_writes();
        let file = mount.open("vm1");
        let mut rng = Rng::new(5);
        let data = rng.bytes(8 << 20);
        file.write_all_at(&data, 512 * 1021).expect("a write");
        file.sync_all().expect("fsync");
        assert!(read_at(&file, 512 * 1021, data.len()).expect("a read") == data, "a tail was lost");
    }

    #[test]
    fn a_short_host_write_never_becomes_a_lost_tail_of_a_loop_device() {
        require!("fuse", "loop", "fio");
        let _turn = heavy();
        for direct in [true, false] {
            let mount = mount_with_short_writes();
            let device = Loop::attach(&mount.flat("vm1"), direct);
            let file = format!("--filename={}", device.device().display());
            let job =
                ["--name=short", "--ioengine=libaio", "--direct=1", "--rw=randwrite", "--bsrange=512-1M"];
            let verify =
                ["--iodepth=8", "--verify=crc32c", "--verify_interval=512", "--verify_fatal=1", "--size=48M"];
            Run::new("fio").args(job).args(verify).arg(file).limit(200).ok();
            device.detach();
        }
    }
}
