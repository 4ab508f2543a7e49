//! One image's storm is not another image's delay: 4k reads of image B while image A is busy.

mod common;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{HostFs, Mount, Run, heavy, number_from_env, punch, until};

const MIB: u64 = 1 << 20;

/// 99th percentile in milliseconds of 4k random reads of `file` for `seconds`.
fn p99_of_reads(file: &Path, seconds: u64) -> f64 {
    let job = ["--name=b", "--rw=randread", "--bs=4k", "--direct=1", "--ioengine=libaio", "--iodepth=1"];
    let bound = ["--time_based=1", "--output-format=json", &format!("--runtime={seconds}")];
    let report = Run::new("fio").arg(format!("--filename={}", file.display())).args(job).args(bound).ok();
    let json = report.find('{').expect("fio prints JSON");
    let report: serde_json::Value = serde_json::from_str(&report[json..]).expect("fio's JSON");
    let latency = &report["jobs"][0]["read"]["clat_ns"]["percentile"]["99.000000"];
    latency.as_f64().expect("a percentile") / 1e6
}

/// Prints the figure; it is a demand only where PLOOPFS_TIMING says that the machine is quiet enough to ask.
fn judge(storm: &str, p99: f64) {
    println!("FAIRNESS {storm}: 4k read p99 of the other image {p99:.3} ms (limit 20 ms)");
    if number_from_env("PLOOPFS_TIMING", 0) != 0 {
        assert!(p99 < 20.0, "{storm}: p99 {p99} ms");
    }
}

/// Image b with 32 MiB of data, image a of 4 GiB with 4 KiB in every cluster.
fn two_images() -> Mount {
    let mount = Mount::new(&["--create", "a=4G", "--create", "b=64M"]);
    let (a, b) = (mount.open("a"), mount.open("b"));
    for cluster in 0..32 {
        b.write_all_at(&vec![7; MIB as usize], cluster * MIB).expect("a write");
    }
    for cluster in 0..4096 {
        a.write_all_at(&[1; 4096], cluster * MIB).expect("a write");
    }
    a.sync_all().expect("fsync");
    b.sync_all().expect("fsync");
    mount
}

/// Runs `storm` on image a, again and again, while b is measured.
fn measure(name: &str, storm: impl Fn(&std::fs::File) + Send + Sync) {
    let _turn = heavy();
    let mount = two_images();
    let over = AtomicBool::new(false);
    let a = mount.open("a");
    let p99 = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                storm(&a);
            }
        });
        let p99 = p99_of_reads(&mount.flat("b"), 4);
        over.store(true, Ordering::SeqCst);
        p99
    });
    judge(name, p99);
}

#[test]
fn reads_of_one_image_go_on_while_another_is_punched_over_4_gib() {
    require!("fuse", "fio");
    measure("4 GiB punch", |a| {
        for part in 0..16 {
            a.write_all_at(&[1; 4096], part * 256 * MIB).expect("a write");
        }
        punch(a, 0, 4096 * MIB).expect("a hole of 4 GiB");
    });
}

#[test]
fn reads_of_one_image_go_on_in_an_fsync_storm_of_another() {
    require!("fuse", "fio");
    measure("fsync storm", |a| {
        std::thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || {
                    a.write_all_at(&[2; 4096], thread * 64 * MIB).expect("a write");
                    a.sync_all().expect("fsync");
                });
            }
        });
    });
}

#[test]
fn reads_of_one_image_go_on_while_another_is_written_from_end_to_end() {
    require!("fuse", "fio");
    let data = vec![3; MIB as usize];
    measure("sequential writer", |a| {
        for cluster in 0..512 {
            a.write_all_at(&data, cluster * MIB).expect("a write");
        }
        punch(a, 0, 512 * MIB).expect("a hole");
    });
}

#[test]
fn reads_of_one_image_go_on_while_another_is_full_with_a_queue() {
    require!("fuse", "loop", "fio");
    let _turn = heavy();
    let host = HostFs::new("ext4", 256 * MIB);
    let images = host.path().join("images");
    let mount = Mount::over(&images, &["--create", "a=1G", "--create", "b=64M", "--full-timeout", "30"]);
    let b = mount.open("b");
    for cluster in 0..32 {
        b.write_all_at(&vec![7; MIB as usize], cluster * MIB).expect("a write");
    }
    b.sync_all().expect("fsync");
    let p99 = std::thread::scope(|scope| {
        let a = mount.open("a");
        scope.spawn(move || {
            // Fills the host, then hangs in the queue until the timeout answers ENOSPC.
            let data = vec![9; MIB as usize];
            let refused = (0..1024).find_map(|cluster| a.write_all_at(&data, cluster * MIB).err());
            assert_eq!(refused.and_then(|error| error.raw_os_error()), Some(libc::ENOSPC));
        });
        assert!(
            until(Duration::from_secs(60), || mount.mode("a").to_lowercase().contains("full")),
            "never full"
        );
        p99_of_reads(&mount.flat("b"), 4)
    });
    judge("full with a queue", p99);
}
