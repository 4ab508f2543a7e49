//! QEMU writes, ploopfs reads, and the reverse, on the same image, against a plain file kept in step.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Mount, Rng, Run, heavy, make_v1, ok, punch, temp_dir, text};

/// 63 sectors and 504 sectors are seen in the wild; the rest are powers of two from the smallest up.
const CLUSTERS: [u64; 6] = [63 * 512, 32 << 10, 64 << 10, 504 * 512, 1 << 20, 4 << 20];

/// A random range of at most 300 KiB, in sectors of the disk.
fn range(rng: &mut Rng, size: u64) -> (u64, u64) {
    let sectors = size / 512;
    let len = 1 + rng.below(600.min(sectors));
    (rng.below(sectors - len + 1) * 512, len * 512)
}

/// Writes the same pattern through qemu-io to the image and to the plain file.
fn qemu_writes(rng: &mut Rng, delta: &Path, plain: &File, size: u64) {
    let mut script = Vec::new();
    for _ in 0..12 {
        let (offset, len) = range(rng, size);
        let value = 1 + rng.below(255) as u8;
        script.extend(["-c".to_owned(), format!("write -q -P {value} {offset} {len}")]);
        plain.write_all_at(&vec![value; len as usize], offset).expect("a plain write");
    }
    Run::new("qemu-io").args(["-f", "parallels"]).args(&script).arg(delta).ok();
}

/// Writes and punches through the mount, the same to the plain file.
fn we_write(rng: &mut Rng, flat: &File, plain: &File, size: u64) {
    for _ in 0..30 {
        let (offset, len) = range(rng, size);
        if rng.below(4) == 0 {
            punch(flat, offset, len).expect("a hole through the mount");
            plain.write_all_at(&vec![0; len as usize], offset).expect("a plain write");
        } else {
            let data = rng.bytes(len as usize);
            flat.write_all_at(&data, offset).expect("a write through the mount");
            plain.write_all_at(&data, offset).expect("a plain write");
        }
    }
}

fn one_seed(seed: u64) {
    let mut rng = Rng::new(seed);
    let cluster = CLUSTERS[rng.below(CLUSTERS.len() as u64) as usize];
    let version1 = !seed.is_multiple_of(2);
    // Whole clusters: QEMU's own tools stumble over a last one that is cut.
    let size = (3 + rng.below(40)) * cluster;
    let what =
        format!("seed {seed}: version {}, clusters of {cluster}, {size} bytes", 2 - u32::from(version1));
    let folder = temp_dir();
    let images = folder.path().join("images");
    std::fs::create_dir(&images).expect("a folder");
    let delta = images.join("vm1.hds");
    if version1 {
        make_v1(&delta, size, cluster, rng.below(2) == 1);
    } else {
        let options = format!("cluster_size={cluster}");
        ok("qemu-img", &["create", "-q", "-f", "parallels", "-o", &options, text(&delta), &size.to_string()]);
    }
    let path = folder.path().join("plain.raw");
    let plain = File::options().read(true).write(true).create_new(true).open(&path).expect("the plain file");
    plain.set_len(size).expect("a sparse file");

    for round in 0..3 {
        qemu_writes(&mut rng, &delta, &plain, size);
        let mut mount = Mount::over(&images, &[]);
        let same = Run::new("cmp").args([&mount.flat("vm1"), &path]).run();
        assert!(same.success(), "{what}, round {round}, written by QEMU: {same}");
        let flat = mount.open("vm1");
        we_write(&mut rng, &flat, &plain, size);
        let same = Run::new("cmp").args([&mount.flat("vm1"), &path]).run();
        assert!(same.success(), "{what}, round {round}, read back: {same}");
        drop(flat);
        mount.umount();
        for check in [
            Run::new("qemu-img").args(["check", "-f", "parallels"]).arg(&delta),
            Run::new("qemu-img").args(["compare", "-f", "parallels", "-F", "raw"]).args([&delta, &path]),
            Run::ploopfs().arg("check").arg(&delta),
        ] {
            let done = check.run();
            assert!(done.success(), "{what}, round {round}, written by us: {done}");
        }
    }
}

/// Five seeds per test, so that they run side by side and a failure names its few.
fn seeds(first: u64) {
    let _turn = heavy();
    (first..first + 5).for_each(one_seed);
}

#[test]
fn qemu_and_ploopfs_read_what_the_other_wrote_seeds_1_to_5() {
    require!("fuse", "qemu");
    seeds(1);
}

#[test]
fn qemu_and_ploopfs_read_what_the_other_wrote_seeds_6_to_10() {
    require!("fuse", "qemu");
    seeds(6);
}

#[test]
fn qemu_and_ploopfs_read_what_the_other_wrote_seeds_11_to_15() {
    require!("fuse", "qemu");
    seeds(11);
}

#[test]
fn qemu_and_ploopfs_read_what_the_other_wrote_seeds_16_to_20() {
    require!("fuse", "qemu");
    seeds(16);
}

#[test]
fn every_cluster_size_that_create_offers_is_clean_to_qemu() {
    require!("fuse", "qemu");
    let folder = temp_dir();
    for cluster in ["32K", "64K", "256K", "1M", "4M", "64M"] {
        let image = folder.path().join(format!("c{cluster}"));
        Run::ploopfs().arg("create").arg(&image).args(["--size", "1G", "--cluster", cluster]).ok();
        let delta = image.with_extension("hds");
        ok("qemu-img", &["check", "-f", "parallels", text(&delta)]);
        ok("qemu-io", &["-f", "parallels", "-c", "write -q -P 9 123M 1M", text(&delta)]);
    }
    let mut mount = Mount::over(folder.path(), &[]);
    for cluster in ["32K", "64K", "256K", "1M", "4M", "64M"] {
        let data = common::read_at(&mount.open(&format!("c{cluster}")), 123 << 20, 1 << 20).expect("a read");
        assert!(data == vec![9; 1 << 20], "clusters of {cluster}");
    }
    mount.umount();
}

#[test]
fn an_image_that_qemu_did_not_close_is_served_and_written() {
    require!("fuse", "qemu");
    let folder = temp_dir();
    let delta = folder.path().join("vm1.hds");
    ok("qemu-img", &["create", "-q", "-f", "parallels", text(&delta), "64M"]);
    ok("qemu-io", &["-f", "parallels", "-c", "write -q -P 5 1M 2M", text(&delta)]);
    // What a killed QEMU leaves: the in-use mark, and space ahead of need behind the last cluster.
    let file = File::options().write(true).open(&delta).expect("the delta");
    file.write_all_at(&0x746F_6E59_u32.to_le_bytes(), 44).expect("the mark");
    file.set_len(file.metadata().expect("stat").len() + (128 << 20)).expect("a longer file");
    drop(file);
    Run::ploopfs().arg("check").arg(&delta).status(0);
    let mut mount = Mount::over(folder.path(), &[]);
    let flat = mount.open("vm1");
    assert_eq!(common::read_at(&flat, 1 << 20, 2 << 20).expect("a read"), vec![5; 2 << 20]);
    flat.write_all_at(&[6; 4096], 40 << 20).expect("a write");
    drop(flat);
    mount.umount();
    ok("qemu-img", &["check", "-f", "parallels", text(&delta)]);
}

#[test]
fn a_disk_whose_last_cluster_is_cut_is_served_to_its_last_sector() {
    require!("fuse", "qemu");
    let folder = temp_dir();
    let delta = folder.path().join("vm1.hds");
    ok("qemu-img", &["create", "-q", "-f", "parallels", text(&delta), "100000256"]);
    let mut mount = Mount::over(folder.path(), &[]);
    let flat = mount.open("vm1");
    let size = flat.metadata().expect("stat").len();
    assert_eq!(size, 100_000_256);
    flat.write_all_at(&[8; 512], size - 512).expect("a write at the end");
    assert!(flat.write_all_at(&[8; 512], size).is_err(), "there is nothing behind the end");
    assert_eq!(common::read_at(&flat, size - 512, 512).expect("a read"), vec![8; 512]);
    drop(flat);
    mount.umount();
    Run::ploopfs().arg("check").arg(&delta).status(0);
}
