//! Slow operations really are in flight at once: a disk of 50 ms per read serves 16 at a time.
#![cfg(feature = "faults")]

mod common;

use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Loop, Mount, Run, heavy, sh, text};

/// 320 reads of 50 ms take 1.0 s when 16 are in flight, 2.0 s when 8 are, 16 s one after the other. A noisy machine
/// only adds to it, so the best of three runs counts.
const READS: u64 = 320;
const LIMIT_MS: u64 = 1600;

/// An image of 64 written MiB whose reads take 50 ms each.
fn slow_image() -> Mount {
    let mut mount = Mount::new(&["--create", "vm1=64M"]);
    let file = mount.open("vm1");
    for cluster in 0..64 {
        file.write_all_at(&vec![cluster as u8 + 1; 1 << 20], cluster << 20).expect("a write");
    }
    drop(file);
    mount.umount();
    mount.set_args(&["--fault", "delay=read:50"]);
    mount.start();
    mount
}

/// Milliseconds that fio took for random reads of 4 KiB, `READS` in all unless `options` say otherwise.
fn time_of_reads(file: &Path, options: &[&str]) -> u64 {
    let job = ["--name=slow", "--rw=randread", "--bs=4k", "--direct=1", "--output-format=json"];
    let number = format!("--number_ios={READS}");
    let report = Run::new("fio")
        .arg(format!("--filename={}", file.display()))
        .args(job)
        .arg(number)
        .args(options)
        .ok();
    let json = report.find('{').expect("fio prints JSON");
    let report: serde_json::Value = serde_json::from_str(&report[json..]).expect("fio's JSON");
    let read = &report["jobs"][0]["read"];
    assert_eq!(read["total_ios"], READS, "{read}");
    read["runtime"].as_u64().expect("a runtime")
}

/// Fails unless 16 reads were in flight at once, in the best of three runs.
#[track_caller]
fn sixteen_in_flight(file: &Path, options: &[&str]) {
    let mut best = u64::MAX;
    for _ in 0..3 {
        best = best.min(time_of_reads(file, options));
        if best < LIMIT_MS {
            break;
        }
    }
    assert!((900..LIMIT_MS).contains(&best), "{READS} reads of 50 ms, 16 at a time, took {best} ms");
    println!("{READS} reads of 50 ms, 16 at a time: {best} ms");
}

#[test]
fn sixteen_slow_reads_are_in_flight_through_libaio() {
    require!("fuse", "fio");
    let _turn = heavy();
    let mount = slow_image();
    sixteen_in_flight(&mount.flat("vm1"), &["--ioengine=libaio", "--iodepth=16"]);
}

#[test]
fn sixteen_slow_reads_are_in_flight_through_loop_with_direct_io() {
    require!("fuse", "loop", "fio");
    let _turn = heavy();
    let mount = slow_image();
    let device = Loop::attach(&mount.flat("vm1"), true);
    sixteen_in_flight(device.device(), &["--ioengine=libaio", "--iodepth=16"]);
    device.detach();
}

#[test]
fn sixteen_threads_with_plain_reads_do_not_wait_for_each_other() {
    require!("fuse", "fio");
    let _turn = heavy();
    let mount = slow_image();
    let options = ["--ioengine=psync", "--numjobs=16", "--number_ios=20", "--group_reporting=1", "--thread"];
    sixteen_in_flight(&mount.flat("vm1"), &options);
}

#[test]
fn a_slow_image_does_not_slow_down_its_neighbours_small_reads_to_its_own_pace() {
    require!("fuse", "fio");
    let _turn = heavy();
    let mount = slow_image();
    // Half of the pool at most belongs to one image, so stat and readdir answer while 64 reads queue.
    let flat = mount.flat("vm1");
    let point = text(mount.point()).to_owned();
    let began = std::time::Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| time_of_reads(&flat, &["--ioengine=libaio", "--iodepth=64"]));
        for _ in 0..20 {
            sh(&format!("ls -l {point} >/dev/null && stat -f {point} >/dev/null"));
        }
    });
    assert!(began.elapsed().as_secs() < 20, "stat and readdir took {:?}", began.elapsed());
}
