//! Space: what is discarded comes back to the host and reads as zero; what was never written is seen as a hole.

mod common;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use common::{Guest, Loop, Mount, Run, allocated, ok, punch, read_at, temp_dir, text, until};

const MIB: u64 = 1 << 20;

/// Space comes back after the round that makes the discard durable, at the latest a second later (`--bat-delay`).
const SOON: std::time::Duration = std::time::Duration::from_secs(10);

fn fill(file: &File, offset: u64, len: u64) {
    let block = vec![0xa5; MIB as usize];
    let mut at = offset;
    while at < offset + len {
        let step = (offset + len - at).min(MIB);
        file.write_all_at(&block[..step as usize], at).expect("a write through the mount");
        at += step;
    }
    file.sync_all().expect("fsync");
}

#[track_caller]
fn assert_all(file: &File, offset: u64, len: u64, value: u8) {
    let data = read_at(file, offset, len as usize).expect("a read through the mount");
    let wrong = data.iter().position(|&byte| byte != value);
    assert_eq!(wrong.map(|at| (offset + at as u64, data[at])), None, "expected {value:#x} everywhere");
}

/// A device over 64 MiB of 0xa5, then `blkdiscard` with `options` on a ragged range.
fn ragged_blkdiscard(options: &[&str]) {
    let mount = Mount::new(&["--create", "vm1=128M"]);
    let file = mount.open("vm1");
    fill(&file, 0, 64 * MIB);
    let full = allocated(&mount.delta("vm1"));
    assert!(full >= 64 * MIB);
    let device = Loop::attach(&mount.flat("vm1"), true);
    // One sector off a cluster's border at both ends, in different clusters.
    let (offset, len) = (5 * MIB - 512, 41 * MIB + 1536);
    let range = ["-o", &offset.to_string(), "-l", &len.to_string(), text(device.device())];
    Run::new("blkdiscard").args(options).args(range).ok();
    device.detach();
    assert_all(&file, 0, offset, 0xa5);
    assert_all(&file, offset, len, 0);
    assert_all(&file, offset + len, 64 * MIB - offset - len, 0xa5);
    file.sync_all().expect("fsync");
    let left = allocated(&mount.delta("vm1"));
    // The host's own extent tree may take a few blocks more than before.
    assert!(left <= full - 41 * MIB + 65536, "{left} of {full} bytes are left after a discard of 41 MiB");
}

#[test]
fn blkdiscard_with_ragged_ends_gives_the_space_back_and_reads_as_zero() {
    require!("fuse", "loop");
    ragged_blkdiscard(&[]);
}

#[test]
fn blkdiscard_z_with_ragged_ends_gives_the_space_back_and_reads_as_zero() {
    require!("fuse", "loop");
    ragged_blkdiscard(&["-z"]);
}

#[test]
fn a_hole_inside_one_cluster_gives_back_whole_host_blocks_only() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=16M"]);
    let file = mount.open("vm1");
    fill(&file, 0, 4 * MIB);
    let full = allocated(&mount.delta("vm1"));
    punch(&file, MIB + 1000, 600_000).expect("a punched hole");
    assert_all(&file, MIB, 1000, 0xa5);
    assert_all(&file, MIB + 1000, 600_000, 0);
    assert_all(&file, MIB + 601_000, MIB - 601_000, 0xa5);
    let left = allocated(&mount.delta("vm1"));
    assert!(left <= full - 590_000, "{left} of {full} bytes are left");
}

#[test]
fn a_discard_of_the_whole_disk_leaves_nothing_but_the_header() {
    require!("fuse", "loop", "qemu");
    let mut mount = Mount::new(&["--create", "vm1=1G"]);
    let file = mount.open("vm1");
    fill(&file, 0, 32 * MIB);
    fill(&file, 1000 * MIB, 24 * MIB);
    drop(file);
    let device = Loop::attach(&mount.flat("vm1"), true);
    ok("blkdiscard", &[text(device.device())]);
    device.detach();
    mount.umount();
    assert!(allocated(&mount.delta("vm1")) <= 2 * MIB);
    assert!(
        std::fs::metadata(mount.delta("vm1")).expect("the delta").len() <= 2 * MIB,
        "the tail is cut off"
    );
    ok("qemu-img", &["check", "-f", "parallels", text(&mount.delta("vm1"))]);
}

#[test]
fn fstrim_of_a_guest_gives_back_what_was_removed_in_it() {
    require!("fuse", "loop");
    let mount = Mount::new(&["--create", "vm1=1G"]);
    let device = Loop::attach(&mount.flat("vm1"), true);
    ok("mkfs.ext4", &["-q", "-F", text(device.device())]);
    let guest = Guest::mount(device.device(), "noatime");
    let big = guest.path().join("big");
    let file = File::create(&big).expect("a file in the guest");
    fill(&file, 0, 200 * MIB);
    drop(file);
    std::fs::write(guest.path().join("kept"), vec![7; 3_000_000]).expect("a file in the guest");
    ok("sync", &["-f", text(guest.path())]);
    let full = allocated(&mount.delta("vm1"));
    std::fs::remove_file(&big).expect("removal in the guest");
    // ext4 trims only what its journal has let go of.
    ok("sync", &["-f", text(guest.path())]);
    ok("fstrim", &[text(guest.path())]);
    let less = || allocated(&mount.delta("vm1")) + 190 * MIB <= full;
    assert!(until(SOON, less), "fstrim left {} of {full} bytes", allocated(&mount.delta("vm1")));
    assert_eq!(std::fs::read(guest.path().join("kept")).expect("the kept file"), vec![7; 3_000_000]);
    guest.umount();
    ok("e2fsck", &["-f", "-n", text(device.device())]);
    device.detach();
}

/// An image of 1 GiB with data at 3 MiB (1 MiB), 500 MiB (4 KiB) and at the very end (512 bytes).
fn sparse_image() -> Mount {
    let mount = Mount::new(&["--create", "vm1=1G"]);
    let file = mount.open("vm1");
    file.write_all_at(&vec![1; MIB as usize], 3 * MIB).expect("a write");
    file.write_all_at(&[2; 4096], 500 * MIB).expect("a write");
    file.write_all_at(&[3; 512], 1024 * MIB - 512).expect("a write");
    file.sync_all().expect("fsync");
    mount
}

#[test]
fn du_shows_what_the_image_takes_and_not_its_size() {
    require!("fuse");
    let mount = sparse_image();
    let shown = std::fs::metadata(mount.flat("vm1")).expect("stat");
    assert_eq!(shown.len(), 1 << 30);
    assert!(shown.blocks() * 512 >= MIB && shown.blocks() * 512 <= 8 * MIB, "{} blocks", shown.blocks());
}

#[test]
fn cp_sparse_copies_the_data_and_keeps_the_holes() {
    require!("fuse");
    let mount = sparse_image();
    let folder = temp_dir();
    for mode in ["auto", "always"] {
        let copy = folder.path().join(mode);
        ok("cp", &[&*format!("--sparse={mode}"), text(&mount.flat("vm1")), text(&copy)]);
        assert!(allocated(&copy) <= 8 * MIB, "cp --sparse={mode} wrote {} bytes", allocated(&copy));
        ok("cmp", &[text(&mount.flat("vm1")), text(&copy)]);
    }
}

#[test]
fn seek_data_and_seek_hole_find_every_extent_and_the_end() {
    use rustix::fs::{SeekFrom, seek};
    require!("fuse");
    let mount = sparse_image();
    let file = mount.open("vm1");
    let (mut at, mut found) = (0, 0);
    while let Ok(data) = seek(&file, SeekFrom::Data(at)) {
        let hole = seek(&file, SeekFrom::Hole(data)).expect("every extent ends");
        assert!(hole > data && hole <= 1 << 30);
        found += hole - data;
        at = hole;
    }
    assert!((MIB + 4096 + 512..=8 * MIB).contains(&found), "{found} bytes in extents");
    let end = 1024 * MIB;
    let near = |offset: u64| seek(&file, SeekFrom::Data(offset)).expect("data");
    assert!(near(2 * MIB) > 2 * MIB && near(2 * MIB) <= 3 * MIB);
    assert_eq!(near(3 * MIB + 10), 3 * MIB + 10, "inside an extent the answer is the offset itself");
    assert_eq!(seek(&file, SeekFrom::Hole(end - 1)).expect("the end is a hole"), end);
    assert_eq!(seek(&file, SeekFrom::Data(end)), Err(rustix::io::Errno::NXIO));
    assert_eq!(seek(&file, SeekFrom::Hole(end)), Err(rustix::io::Errno::NXIO));
}

#[test]
fn qemu_img_map_shows_the_same_extents() {
    require!("fuse", "qemu");
    let mount = sparse_image();
    let map = ok("qemu-img", &["map", "-f", "raw", "--output=json", text(&mount.flat("vm1"))]);
    let extents: serde_json::Value = serde_json::from_str(&map).expect("JSON of qemu-img");
    let data = extents.as_array().expect("a list").iter().filter(|extent| extent["data"] == true);
    let bytes: u64 = data.map(|extent| extent["length"].as_u64().expect("a length")).sum();
    assert!((MIB + 4096 + 512..=8 * MIB).contains(&bytes), "{bytes} bytes of data\n{map}");
}

#[test]
fn zeroes_written_to_a_hole_take_no_space() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=256M"]);
    let before = allocated(&mount.delta("vm1"));
    let file = mount.open("vm1");
    for cluster in 0..64 {
        file.write_all_at(&vec![0; MIB as usize], cluster * MIB).expect("a write of zeroes");
    }
    file.sync_all().expect("fsync");
    assert!(allocated(&mount.delta("vm1")) <= before + 64 * 1024);
}

#[test]
fn a_cluster_costs_what_was_written_to_it() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=256M"]);
    let before = allocated(&mount.delta("vm1"));
    let file = mount.open("vm1");
    for cluster in 0..64 {
        file.write_all_at(&[1; 4096], cluster * MIB + 8192).expect("a write");
    }
    file.sync_all().expect("fsync");
    let taken = allocated(&mount.delta("vm1")) - before;
    assert!(taken <= 64 * 16 * 1024, "{taken} bytes for 64 blocks of 4 KiB");
}

#[test]
fn the_loop_device_learns_the_hosts_block_size_as_its_discard_granularity() {
    require!("fuse", "loop");
    let mount = Mount::new(&["--create", "vm1=256M"]);
    let device = Loop::attach(&mount.flat("vm1"), true);
    let name = device.device().file_name().expect("a device name");
    let queue = Path::new("/sys/block").join(name).join("queue");
    let granularity =
        std::fs::read_to_string(queue.join("discard_granularity")).expect("a block device's queue");
    assert_eq!(granularity.trim(), "4096");
    device.detach();
}
