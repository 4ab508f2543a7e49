//! Bugs that others shipped (docs/testing.md#bugs-of-others), each as a test on the real binary, named for what went
//! wrong there.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Mount, Run, make_v1, marked_in_use, ok, read_at, temp_dir, text};

const MIB: u64 = 1 << 20;

/// An image of 64 MiB that QEMU made, with clusters 1, 2 and 3 written (BAT entries 1 to 3 of the file).
fn image_of_qemu(folder: &Path) -> std::path::PathBuf {
    let delta = folder.join("vm1.hds");
    ok("qemu-img", &["create", "-q", "-f", "parallels", text(&delta), "64M"]);
    ok("qemu-io", &["-f", "parallels", "-c", "write -q -P 5 1M 3M", text(&delta)]);
    delta
}

/// Overwrites BAT entry `index`.
fn set_entry(delta: &Path, index: u64, value: u32) {
    let file = File::options().write(true).open(delta).expect("the delta");
    file.write_all_at(&value.to_le_bytes(), 64 + 4 * index).expect("an entry of the BAT");
}

/// `check` calls it damage, the mount lives, and a write is refused or kept away from the damage.
#[track_caller]
fn damage_is_found_and_never_written(delta: &Path, what: &str) {
    let found = Run::ploopfs().arg("check").arg(delta).run();
    assert_eq!(found.code(), Some(3), "{what}: {found}");
    let before = std::fs::read(delta).expect("the delta");
    let folder = delta.parent().expect("the folder");
    let mut mount = Mount::over(folder, &["--create", "other=8M"]);
    mount.open("other").write_all_at(&[1; 512], 0).expect("the other image works");
    if let Ok(file) = File::options().read(true).write(true).open(mount.flat("vm1")) {
        assert!(file.write_all_at(&[1; 4096], 40 * MIB).is_err(), "{what}: a damaged image was written");
    }
    mount.umount();
    assert!(std::fs::read(delta).expect("the delta") == before, "{what}: a damaged image was changed");
}

/// cloud-hypervisor d1868f638.
#[test]
fn a_bat_entry_that_points_into_the_header_is_damage() {
    require!("fuse", "qemu");
    let folder = temp_dir();
    make_v1(&folder.path().join("vm1.hds"), 64 * MIB, MIB, false);
    // Version 1 counts sectors: sector 8 lies inside the header's cluster.
    set_entry(&folder.path().join("vm1.hds"), 5, 8);
    damage_is_found_and_never_written(&folder.path().join("vm1.hds"), "entry into the header");
}

#[test]
fn a_bat_entry_past_the_end_of_the_file_is_damage() {
    require!("fuse", "qemu");
    let folder = temp_dir();
    let delta = image_of_qemu(folder.path());
    set_entry(&delta, 7, 1000);
    damage_is_found_and_never_written(&delta, "entry past the end");
}

#[test]
fn two_bat_entries_for_one_cluster_are_damage() {
    require!("fuse", "qemu");
    let folder = temp_dir();
    let delta = image_of_qemu(folder.path());
    set_entry(&delta, 9, 2);
    damage_is_found_and_never_written(&delta, "a doubled entry");
}

#[test]
fn a_misaligned_bat_entry_of_version_1_is_damage() {
    require!("fuse", "qemu");
    let folder = temp_dir();
    let delta = folder.path().join("vm1.hds");
    make_v1(&delta, 64 * MIB, MIB, false);
    ok("qemu-io", &["-f", "parallels", "-c", "write -q -P 5 1M 3M", text(&delta)]);
    set_entry(&delta, 1, 2048 + 3);
    damage_is_found_and_never_written(&delta, "a misaligned entry");
}

/// cloud-hypervisor 53ee9ebb7: the dirty mark went with the first of several handles.
#[test]
fn the_in_use_mark_stays_while_another_handle_is_open() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let (first, second) = (mount.open("vm1"), mount.open("vm1"));
    first.write_all_at(&[1; 4096], 0).expect("a write");
    assert!(marked_in_use(&mount.delta("vm1")), "marked before the first change");
    drop(first);
    // The close is asynchronous; what must not happen has had its time.
    std::thread::sleep(Duration::from_millis(500));
    assert!(marked_in_use(&mount.delta("vm1")), "cleared by the first of two handles");
    second.write_all_at(&[2; 4096], 0).expect("a write");
    second.sync_all().expect("fsync");
    mount.kill();
    assert!(marked_in_use(&mount.delta("vm1")), "a killed daemon leaves the mark");
    mount.start();
    assert_eq!(read_at(&mount.open("vm1"), 0, 4096).expect("a read"), vec![2; 4096]);
}

/// cloud-hypervisor b68e7f3d9: cached metadata was not flushed.
#[test]
fn a_copy_of_the_file_after_an_fsync_passes_check_and_has_the_data() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let file = mount.open("vm1");
    for cluster in [9_u64, 3, 60] {
        file.write_all_at(&vec![cluster as u8; 700_000], cluster * MIB + 5000).expect("a write");
    }
    file.sync_all().expect("fsync");
    let folder = temp_dir();
    let copy = folder.path().join("copy.hds");
    ok("cp", &[text(&mount.delta("vm1")), text(&copy)]);
    Run::ploopfs().arg("check").arg(&copy).status(0);
    let second = Mount::over(folder.path(), &[]);
    for cluster in [9_u64, 3, 60] {
        let data = read_at(&second.open("copy"), cluster * MIB + 5000, 700_000).expect("a read");
        assert!(data == vec![cluster as u8; 700_000], "cluster {cluster} of the copy");
    }
}

/// cloud-hypervisor 1dfb02aaf: data went to the cluster's base, not to the sector's place in it.
#[test]
fn the_first_write_into_a_cluster_lands_at_its_own_sector_for_every_sector() {
    require!("fuse");
    let folder = temp_dir();
    let image = folder.path().join("vm1");
    Run::ploopfs().arg("create").arg(&image).args(["--size", "16M", "--cluster", "64K"]).ok();
    let mount = Mount::over(folder.path(), &[]);
    let file = mount.open("vm1");
    for sector in 0..128_u64 {
        file.write_all_at(&[sector as u8 + 1; 512], sector * 65536 + sector * 512).expect("a write");
    }
    for sector in 0..128_usize {
        let data = read_at(&file, sector as u64 * 65536, 65536).expect("a read");
        let mut wanted = vec![0; 65536];
        wanted[sector * 512..sector * 512 + 512].fill(sector as u8 + 1);
        assert!(data == wanted, "the first write at sector {sector} of a cluster");
    }
}

/// cloud-hypervisor vhdx: the table was read one entry at a time.
#[test]
fn a_disk_of_a_tebibyte_is_mounted_and_first_read_in_a_moment() {
    require!("fuse");
    let folder = temp_dir();
    Run::ploopfs().arg("create").arg(folder.path().join("big")).args(["--size", "4T"]).ok();
    let began = Instant::now();
    let mount = Mount::over(folder.path(), &[]);
    let file = mount.open("big");
    assert_eq!(read_at(&file, (4 << 40) - 4096, 4096).expect("a read at the end"), vec![0; 4096]);
    let took = began.elapsed();
    println!("mount, open and first read of 4 TiB: {took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    let began = Instant::now();
    file.write_all_at(&[1; 4096], 3 << 40).expect("the first write, which scans the BAT");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

/// rublk: flush was sync_file_range. The broken build is caught in tests/power_cut.rs; here is the system call.
#[test]
fn an_fsync_of_the_image_reaches_the_delta_as_a_real_sync() {
    require!("fuse", "loop");
    let host = common::HostFs::new("ext4", 128 * MIB);
    let images = host.path().join("images");
    let mount = Mount::over(&images, &["--create", "vm1=64M"]);
    let file = mount.open("vm1");
    file.write_all_at(&[1; 4096], 0).expect("a write");
    file.sync_all().expect("fsync");
    let data = std::fs::read(host.backing()).expect("the host's disk");
    // The block is on the device itself, not only in the host's page cache.
    assert!(data.chunks_exact(1024).any(|block| block == [1; 1024]), "the device never saw the data");
}

#[cfg(feature = "faults")]
mod with_faults {
    use super::common::{Rng, punch};
    use super::*;

    fn mount_with_fault(spec: &str) -> Mount {
        let mut mount = Mount::new(&["--create", "vm1=64M"]);
        let file = mount.open("vm1");
        for cluster in 0..16 {
            file.write_all_at(&vec![cluster as u8 + 1; MIB as usize], cluster * MIB).expect("a write");
        }
        drop(file);
        mount.umount();
        mount.set_args(&["--fault", spec]);
        mount.start();
        mount
    }

    /// A round of everything; errors are allowed, wrong data is not.
    fn use_everything(mount: &Mount) {
        let Ok(file) = File::options().read(true).write(true).open(mount.flat("vm1")) else { return };
        for cluster in 0..16_u64 {
            if let Ok(data) = read_at(&file, cluster * MIB, 4096) {
                assert!(data == vec![cluster as u8 + 1; 4096], "cluster {cluster} shows something else");
            }
        }
        let _ = file.write_all_at(&vec![0x77; 2 * MIB as usize], 30 * MIB);
        let _ = file.sync_all();
        let _ = punch(&file, 32 * MIB, 3 * MIB);
        let _ = punch(&file, 15 * MIB + 4096, 8192);
        let _ = file.sync_all();
    }

    /// rublk: an EIO ended the daemon.
    #[test]
    fn every_host_operation_may_fail_once_and_the_daemon_lives_and_the_image_is_undamaged() {
        require!("fuse");
        let mut faults = 0;
        for kind in ["read", "write", "punch", "sync", "set_len", "any"] {
            for number in [1, 2, 3, 5, 8, 13] {
                // The file is served healthy; the fault begins with the trigger.
                let folder = temp_dir();
                let trigger = folder.path().join("trigger");
                let spec = format!("fail={kind}:{number}:EIO,trigger={}", trigger.display());
                let mut mount = mount_with_fault(&spec);
                std::fs::write(&trigger, "").expect("the trigger");
                use_everything(&mount);
                assert!(mount.is_mounted() && mount.pid() > 0, "{spec}: the daemon died");
                std::fs::remove_file(&trigger).expect("the trigger");
                use_everything(&mount);
                mount.umount();
                let done = Run::ploopfs().arg("check").arg(mount.delta("vm1")).run();
                assert!(done.success(), "{spec}: {done}");
                faults += 1;
            }
        }
        println!("FAULTS {faults}");
    }

    /// cloud-hypervisor e737d61a0: errors of a deallocation were swallowed.
    #[test]
    fn a_punch_that_the_host_refuses_still_reads_as_zero_or_is_reported() {
        require!("fuse");
        for errno in ["EIO", "EOPNOTSUPP"] {
            let mount = mount_with_fault(&format!("fail=punch:1:{errno}:forever"));
            let file = mount.open("vm1");
            for (offset, len) in [(2 * MIB, MIB), (4 * MIB + 4096, 8192), (6 * MIB - 512, 2 * MIB)] {
                if punch(&file, offset, len).is_ok() {
                    let data = read_at(&file, offset, len as usize).expect("a read");
                    assert!(
                        data.iter().all(|&byte| byte == 0),
                        "{errno}: success was reported, old data is read"
                    );
                }
            }
            let data = read_at(&file, 10 * MIB, MIB as usize).expect("a read");
            assert!(data == vec![11; MIB as usize], "a neighbour changed");
        }
        println!("FAULTS 2");
    }

    /// cloud-hypervisor 64c1bb3bf and qcow2-rs: the punch arrived after the cluster had a new owner.
    #[test]
    fn a_slow_punch_never_eats_what_was_written_into_reused_space() {
        require!("fuse");
        let mount = mount_with_fault("delay=punch:30");
        let file = mount.open("vm1");
        let mut rng = Rng::new(4);
        let mut owner = [0_u8; 64];
        for (cluster, value) in owner.iter_mut().take(16).enumerate() {
            *value = cluster as u8 + 1;
        }
        for round in 0..40_u8 {
            let gone = rng.below(64);
            let born = rng.below(64);
            std::thread::scope(|scope| {
                scope.spawn(|| punch(&file, gone * MIB, MIB).expect("a hole"));
                if born != gone {
                    let data = vec![round + 100; MIB as usize];
                    file.write_all_at(&data, born * MIB).expect("a write");
                }
            });
            owner[gone as usize] = 0;
            if born != gone {
                owner[born as usize] = round + 100;
            }
            if round % 8 == 7 {
                file.sync_all().expect("fsync");
            }
        }
        for (cluster, value) in owner.iter().enumerate() {
            let data = read_at(&file, cluster as u64 * MIB, MIB as usize).expect("a read");
            assert!(data.iter().all(|byte| byte == value), "cluster {cluster} is not all {value}");
        }
    }

    /// cloud-hypervisor a5e145bde: a failed step left one cluster with two owners.
    #[test]
    fn whichever_write_fails_no_cluster_gets_two_owners() {
        require!("fuse");
        let mut faults = 0;
        for number in 1..=12 {
            let mut mount = mount_with_fault(&format!("fail=write:{number}:EIO"));
            let file = mount.open("vm1");
            for cluster in 20..30_u64 {
                let _ = file.write_all_at(&[cluster as u8; 4096], cluster * MIB + 512);
            }
            let _ = file.sync_all();
            drop(file);
            mount.umount();
            let done = Run::ploopfs().arg("check").arg(mount.delta("vm1")).run();
            assert!(done.success(), "write {number} failed: {done}");
            faults += 1;
        }
        println!("FAULTS {faults}");
    }

    /// R7: after a failed sync nothing is promised any more, and everybody hears of it.
    #[test]
    fn after_a_failed_fsync_the_image_is_read_only_and_every_later_fsync_fails() {
        require!("fuse");
        let folder = temp_dir();
        let trigger = folder.path().join("trigger");
        let mount = mount_with_fault(&format!("fail=sync:1:EIO,trigger={}", trigger.display()));
        let file = mount.open("vm1");
        file.write_all_at(&[1; 4096], 40 * MIB).expect("a write");
        file.sync_all().expect("a sync before the fault");
        std::fs::write(&trigger, "").expect("the trigger");
        let _ = file.write_all_at(&[2; 4096], 41 * MIB);
        assert!(file.sync_all().is_err(), "the failed sync is reported");
        std::fs::remove_file(&trigger).expect("the trigger");
        assert!(file.sync_all().is_err(), "a later fsync must not pretend that all is well");
        let refused = file.write_all_at(&[3; 4096], 42 * MIB).expect_err("the image is read-only");
        assert!(matches!(refused.raw_os_error(), Some(libc::EROFS | libc::EIO)), "{refused}");
        assert_eq!(read_at(&file, 3 * MIB, 4096).expect("a read"), vec![4; 4096]);
        assert!(mount.mode("vm1").to_lowercase().contains("read"), "mode {}", mount.mode("vm1"));
        println!("FAULTS 1");
    }

    #[test]
    fn a_bat_write_that_fails_for_a_moment_is_retried() {
        require!("fuse");
        let folder = temp_dir();
        let trigger = folder.path().join("trigger");
        let spec = format!("fail=write:2:EIO,trigger={}", trigger.display());
        let mut mount = mount_with_fault(&spec);
        let file = mount.open("vm1");
        file.write_all_at(&[1; 4096], 40 * MIB).expect("a write");
        file.sync_all().expect("fsync");
        std::fs::write(&trigger, "").expect("the trigger");
        // Write 1 is the data, write 2 the page of the BAT.
        file.write_all_at(&[2; 4096], 41 * MIB).expect("a write");
        file.sync_all().expect("the page is written again");
        std::fs::remove_file(&trigger).expect("the trigger");
        drop(file);
        mount.umount();
        Run::ploopfs().arg("check").arg(mount.delta("vm1")).status(0);
        mount.set_args(&[]);
        mount.start();
        assert_eq!(read_at(&mount.open("vm1"), 41 * MIB, 4096).expect("a read"), vec![2; 4096]);
        println!("FAULTS 1");
    }
}
