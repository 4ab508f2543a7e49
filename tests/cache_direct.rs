//! `mount --cache direct`: what is written and read is right, and the host's page cache stays empty.

mod common;

use std::path::Path;

use common::{HostFs, Loop, Mount, Run, heavy, ok, temp_dir, text};

/// Bytes of a file that the host has in its page cache.
fn cached(file: &Path) -> u64 {
    ok("fincore", &["-b", "-n", "-o", "RES", text(file)]).trim().parse().expect("a number")
}

fn fio(file: &Path, sizes: &str) -> Run {
    Run::new("fio")
        .arg(format!("--filename={}", file.display()))
        .args(["--name=direct", "--rw=randrw", "--ioengine=libaio", "--iodepth=16", "--direct=1"])
        .args(["--verify=crc32c", "--verify_fatal=1", "--verify_interval=512", "--size=96M"])
        .arg(format!("--bsrange={sizes}"))
        .in_folder(&std::env::temp_dir())
        .limit(300)
}

#[test]
fn requests_of_whole_pages_leave_nothing_in_the_page_cache_and_verify() {
    require!("fuse", "loop", "fio", "fincore");
    let _turn = heavy();
    for kind in ["ext4", "xfs"] {
        let host = HostFs::new(kind, 1 << 30);
        let mut mount =
            Mount::over(&host.path().join("images"), &["--create", "vm1=128M", "--cache", "direct"]);
        fio(&mount.flat("vm1"), "4k-256k").arg("--blockalign=4k").ok();
        let delta = mount.delta("vm1");
        assert!(cached(&delta) < 1 << 20, "{kind}: {} bytes of the delta are cached", cached(&delta));
        mount.umount();
        ok("qemu-img", &["check", "-q", "-f", "parallels", text(&delta)]);
    }
}

#[test]
fn requests_of_single_sectors_verify_beside_others_and_through_another_mount() {
    require!("fuse", "loop", "fio");
    let _turn = heavy();
    let folder = temp_dir();
    let images = folder.path().join("images");
    let mut mount = Mount::over(&images, &["--create", "vm1=128M", "--cache", "direct"]);
    let device = Loop::attach(&mount.flat("vm1"), true);
    fio(device.device(), "512-64k").arg("--blockalign=512").ok();
    let through = ok("cksum", &[text(device.device())]);
    device.detach();
    mount.umount();
    mount.set_args(&[]);
    mount.start();
    let flat = mount.flat("vm1");
    let sum = |said: &str| said.split(' ').take(2).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(sum(&ok("cksum", &[text(&flat)])), sum(&through));
    mount.umount();
}

#[test]
fn a_host_in_memory_is_served_all_the_same() {
    require!("fuse");
    let folder = common::memory_dir();
    let mount = Mount::over(&folder.path().join("images"), &["--create", "vm1=16M", "--cache", "direct"]);
    let file = mount.open("vm1");
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 5000], 4000).expect("written");
    assert_eq!(common::read_at(&file, 4000, 5000).expect("read"), [7; 5000]);
}

/// Names of the threads of a mount's daemon.
fn threads(mount: &Mount) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", mount.pid())).expect("it runs");
    let name = |task: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(task.ok()?.path().join("comm")).ok().map(|name| name.trim().to_owned())
    };
    tasks.filter_map(name).collect()
}

#[test]
fn on_rings_of_its_own_the_transport_reads_from_the_disk_without_another_thread() {
    require!("fuse", "fio", "uring");
    let _turn = heavy();
    let folder = temp_dir();
    for cache in ["page", "direct"] {
        let images = folder.path().join(cache);
        let mut mount =
            Mount::over(&images, &["--create", "vm1=128M", "--cache", cache, "--transport", "uring"]);
        fio(&mount.flat("vm1"), "4k-4k").args(["--rw=randwrite", "--do_verify=0"]).ok();
        let delta = mount.delta("vm1");
        // As good as a restart of the host.
        ok("sync", &[text(&delta)]);
        ok("dd", &[&*format!("if={}", delta.display()), "iflag=nocache", "count=0", "status=none"]);
        assert!(cached(&delta) < 1 << 20, "{cache}: {} bytes of the delta are cached", cached(&delta));
        // The first read after an open finds no BAT page: it is a runner's, and whatever comes while the page is being
        // loaded may be queued on the engine's own ring, which starts its thread. Alone it goes before all others.
        let open = mount.open("vm1");
        common::read_at(&open, 0, 4096).expect("read");
        fio(&mount.flat("vm1"), "4k-4k").args(["--rw=randwrite", "--verify_only=1"]).ok();
        drop(open);
        assert!(!threads(&mount).iter().any(|name| name == "ploopfs/disk"), "{:?}", threads(&mount));
        mount.umount();
    }
}
