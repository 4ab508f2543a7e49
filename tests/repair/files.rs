//! Single files: every kind of damage, alone and mixed. Afterwards nothing is worse than a leak, QEMU agrees, what was not
//! damaged reads back as it was, what nothing refers to is kept, and a second repair has nothing to do.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ploopfs::format::header::{CLOSED_V21, Header, Version};
use serde_json::Value;

use crate::common::damage::{Damage, Patient};
use crate::common::{HostFs, Rng, Run, marked_in_use, number_from_env, temp_dir, text};
use crate::{KIB, check, require};

/// The whole disk, as QEMU reads it.
fn disk(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("out");
    Run::new("qemu-img").args(["convert", "-f", "parallels", "-O", "raw", text(image), text(&raw)]).ok();
    let bytes = fs::read(&raw).expect("what QEMU wrote");
    fs::remove_file(&raw).expect("remove");
    bytes
}

fn qemu_corruptions(image: &Path) -> u64 {
    let done = Run::new("qemu-img").args(["check", "-f", "parallels", "--output=json", text(image)]).run();
    let report: Value = serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {done}"));
    report["corruptions"].as_u64().unwrap_or(0)
}

fn lost_file(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".lost");
    name.into()
}

/// Repairs and demands all that a repair promises. Returns the report of the repair.
#[track_caller]
fn cure(patient: &Patient, what: &str) -> Value {
    let image = &patient.path;
    let before = patient.bytes();
    let (_, dry) = check(image, &["--repair", "--dry-run"]);
    assert!(patient.bytes() == before, "{what}: a dry run changed the file");
    assert!(!lost_file(image).exists(), "{what}: a dry run made a file");
    assert_eq!(dry["repaired"], 0, "{what}");

    let (status, report) = check(image, &["--repair"]);
    assert_eq!((status, &report["errors"]), (0, &Value::from(0)), "{what}: {report:#}");
    let steps = |value: &Value| value["steps"].as_array().expect("steps").len();
    assert!(steps(&report) >= steps(&dry), "{what}: {dry:#} {report:#}");
    let (status, after) = check(image, &[]);
    assert_eq!(
        (status, &after["errors"], &after["in_use"]),
        (0, &0.into(), &false.into()),
        "{what}: {after:#}"
    );
    assert_eq!(after["leaks"], 0, "{what}: {after:#}");
    assert_eq!(qemu_corruptions(image), 0, "{what}: {report:#}");
    let (found, wanted) = (disk(image), patient.wanted());
    assert_eq!(found.len(), wanted.len(), "{what}: {report:#}");
    let cluster = patient.header.geometry().cluster as usize;
    let differs = |i: &usize| found[i * cluster..][..cluster] != wanted[i * cluster..][..cluster];
    let wrong: Vec<usize> = (0..wanted.len() / cluster).filter(differs).collect();
    assert!(wrong.is_empty(), "{what}: guest clusters {wrong:?} differ: {report:#}");

    let cured = patient.bytes();
    let (status, again) = check(image, &["--repair"]);
    assert_eq!((status, &again["repaired"], steps(&again)), (0, &0.into(), 0), "{what}: {again:#}");
    assert!(patient.bytes() == cured, "{what}: a second repair changed the file");
    report
}

/// Demands that all that no entry names any more is in the file beside the image.
#[track_caller]
fn all_is_kept(patient: &Patient, what: &str) {
    let kept = fs::read(lost_file(&patient.path)).unwrap_or_else(|e| panic!("{what}: nothing was kept: {e}"));
    let geometry = patient.header.geometry();
    for (place, bytes) in patient.orphans() {
        let at = geometry.cluster_position(place) as usize;
        // A file that ended inside the cluster has no more of it.
        let there = kept.get(at..at + bytes.len());
        assert!(there == Some(&bytes[..]), "{what}: file cluster {place} is not kept");
    }
}

#[test]
fn every_kind_of_damage_alone_is_repaired_and_only_what_was_hit_is_lost() {
    require!("qemu");
    let folder = temp_dir();
    let mut done = 0;
    for version in [Version::V1, Version::V2] {
        for (number, damage) in Damage::ALL.into_iter().enumerate() {
            let what = format!("{version} {damage:?}");
            let mut rng = Rng::new(number as u64);
            let image = folder.path().join(format!("{version}-{number}.hds"));
            let mut patient = Patient::new(&image, version, 64 * KIB, 40, &mut rng);
            if !patient.hurt(damage, &mut rng) {
                continue;
            }
            let (status, _) = check(&image, &[]);
            let harmless =
                damage.is_harmless() || damage == Damage::FirstLow && version == Version::V1 && status == 0;
            assert_eq!(status == 0, harmless, "{what}: {status}");
            let report = cure(&patient, &what);
            assert!(report["repaired"].as_u64() > Some(0), "{what}: {report:#}");
            let lost: u64 = report["lost"]
                .as_array()
                .expect("lost")
                .iter()
                .filter_map(|range| range["len"].as_u64())
                .sum();
            let cut = patient.cut.map_or(0, |(_, left)| 64 * KIB - left);
            assert_eq!(lost, patient.lost.len() as u64 * 64 * KIB + cut, "{what}: {report:#}");
            if !patient.lost.is_empty() || !patient.shared.is_empty() {
                all_is_kept(&patient, &what);
            } else {
                assert!(!lost_file(&image).exists(), "{what}: something was kept: {report:#}");
            }
            done += 1;
        }
    }
    assert!(done >= 32, "{done}");
}

#[test]
fn any_mix_of_damage_is_repaired() {
    require!("qemu");
    let folder = temp_dir();
    let rounds = number_from_env("PLOOPFS_REPAIR_ROUNDS", 60);
    let seed = number_from_env("PLOOPFS_SEED", 1);
    for round in seed..seed + rounds {
        let mut rng = Rng::new(round);
        let version = if rng.below(3) == 0 { Version::V1 } else { Version::V2 };
        let cluster = [32 * KIB, 64 * KIB, 1024 * KIB][rng.below(3) as usize];
        let image = folder.path().join(format!("mix-{round}.hds"));
        let mut patient = Patient::new(&image, version, cluster, 20 + rng.below(30), &mut rng);
        let mut hurt = Vec::new();
        for _ in 0..1 + rng.below(6) {
            let damage = Damage::ALL[rng.below(Damage::ALL.len() as u64) as usize];
            let second =
                damage.is_of_the_header() && hurt.iter().any(|done: &Damage| done.is_of_the_header());
            if !second && patient.hurt(damage, &mut rng) {
                hurt.push(damage);
            }
        }
        let what = format!("seed {round}: {version}, {cluster}, {hurt:?}");
        cure(&patient, &what);
        if !patient.lost.is_empty() || !patient.shared.is_empty() {
            all_is_kept(&patient, &what);
        }
        let _ = fs::remove_file(lost_file(&image));
        fs::remove_file(&image).expect("remove");
    }
    println!("REPAIRED {rounds} mixes");
}

#[test]
fn a_header_that_nothing_proves_is_refused_with_the_reason_and_nothing_changes() {
    let folder = temp_dir();
    let image = folder.path().join("vm.hds");
    let patient = Patient::new(&image, Version::V2, 64 * KIB, 40, &mut Rng::new(1));
    // Version, cluster, entries and size at once: too many unknowns.
    patient.file().write_all_at(&[0; 64], 0).expect("a write");
    let before = patient.bytes();
    for options in [&["--repair"][..], &["--repair", "--dry-run"]] {
        let done = Run::ploopfs().arg("check").args(options).arg(&image).status(3);
        assert!(done.stderr.contains("vm.hds: cannot be repaired: m_Sig"), "{done}");
    }
    assert!(patient.bytes() == before);
}

#[test]
fn an_image_in_use_is_refused_with_status_4_and_nothing_changes() {
    require!("qemu");
    let folder = temp_dir();
    let image = folder.path().join("vm.hds");
    let mut patient = Patient::new(&image, Version::V2, 64 * KIB, 40, &mut Rng::new(1));
    assert!(patient.hurt(Damage::Leak, &mut Rng::new(2)) || patient.hurt(Damage::Tail, &mut Rng::new(2)));
    let before = patient.bytes();
    let held = ploopfs::io::real::RealFile::open(&image, ploopfs::io::real::Access::ReadOnly).expect("open");
    let lock =
        ploopfs::io::lock::DeltaLock::acquire(std::sync::Arc::new(held), ploopfs::io::lock::Use::Writer)
            .expect("free");
    for options in [&["--repair"][..], &["--repair", "--dry-run"]] {
        let done = Run::ploopfs().arg("check").args(options).arg(&image).status(4);
        assert!(done.stderr.contains("in use"), "{done}");
    }
    assert!(patient.bytes() == before);
    drop(lock);
    Run::ploopfs().args(["check", "--repair"]).arg(&image).ok();
}

#[test]
fn leaks_alone_are_given_back_without_touching_the_bitmap_of_what_changed() {
    let folder = temp_dir();
    let image = folder.path().join("vm.hds");
    let mut rng = Rng::new(3);
    let mut patient = Patient::new(&image, Version::V2, 64 * KIB, 40, &mut rng);
    let geometry = patient.header.geometry();
    // An empty extension behind the last cluster, closed as v2.1: ploop's "trust it".
    let place = geometry.cluster_position(patient.file_clusters);
    let file = patient.file();
    file.set_len(place + geometry.cluster).expect("extend");
    file.write_all_at(&0xAB23_4CEF_23DC_EA87_u64.to_le_bytes(), place).expect("a write");
    patient.file_clusters += 1;
    patient.header = Header { in_use: CLOSED_V21, extension: place / 512, ..patient.header };
    file.write_all_at(&patient.header.encode(), 0).expect("a write");
    assert!(patient.hurt(Damage::Tail, &mut rng));
    let (status, report) = check(&image, &["--repair"]);
    assert_eq!((status, &report["leaks"]), (0, &0.into()), "{report:#}");
    assert_eq!(Header::parse(&patient.bytes()), Ok(patient.header), "{report:#}");
    // Damage makes it untrue.
    assert!(patient.hurt(Damage::PastEnd, &mut rng));
    let (status, report) = check(&image, &["--repair"]);
    assert_eq!((status, &report["errors"]), (0, &0.into()), "{report:#}");
    assert_eq!(Header::parse(&patient.bytes()).map(|h| (h.in_use, h.extension)), Ok((0, 0)));
}

#[test]
fn the_number_of_repairs_is_that_of_the_faults_found() {
    let folder = temp_dir();
    let image = folder.path().join("vm.hds");
    let mut rng = Rng::new(5);
    let mut patient = Patient::new(&image, Version::V2, 64 * KIB, 40, &mut rng);
    for damage in [Damage::PastEnd, Damage::AllOnes, Damage::Double, Damage::Leak, Damage::Tail, Damage::Mark]
    {
        assert!(patient.hurt(damage, &mut rng), "{damage:?}");
    }
    let (_, before) = check(&image, &[]);
    let (_, dry) = check(&image, &["--repair", "--dry-run"]);
    let (_, after) = check(&image, &["--repair"]);
    let faults = before["errors"].as_u64().zip(before["leaks"].as_u64()).map(|(e, l)| e + l + 1);
    assert_eq!(after["repaired"].as_u64(), faults, "{before:#} {after:#}");
    assert_eq!(dry["would_repair"].as_u64(), faults, "{dry:#}");
}

#[test]
fn on_a_full_host_what_fits_in_place_is_repaired_and_what_needs_room_waits_for_it() {
    require!("loop", "ext4", "qemu");
    let host = HostFs::new("ext4", 64 << 20);
    let image = host.path().join("vm.hds");
    let mut rng = Rng::new(7);
    let mut patient = Patient::new(&image, Version::V2, 64 * KIB, 100, &mut rng);
    for damage in [Damage::Leak, Damage::Tail, Damage::Mark] {
        assert!(patient.hurt(damage, &mut rng), "{damage:?}");
    }
    let ballast = host.path().join("ballast");
    Run::new("dd").args(["if=/dev/zero", &format!("of={}", text(&ballast)), "bs=64k"]).run();
    let (status, report) = check(&image, &["--repair"]);
    assert_eq!((status, &report["errors"], &report["leaks"]), (0, &0.into(), &0.into()), "{report:#}");
    assert!(!marked_in_use(&image));

    // What was just given back is taken again: a copy of a cluster has no room.
    Run::new("dd").args(["if=/dev/zero", &format!("of={}", text(&host.path().join("more"))), "bs=4k"]).run();
    assert!(patient.hurt(Damage::Double, &mut rng));
    let done = Run::ploopfs().args(["check", "--repair"]).arg(&image).status(1);
    assert!(done.stderr.contains("room"), "{done}");
    fs::remove_file(&ballast).expect("remove");
    patient.leaked.clear();
    cure_after_room(&patient);
}

/// The dry run before, and the file that was begun, are not looked at.
fn cure_after_room(patient: &Patient) {
    let _ = fs::remove_file(lost_file(&patient.path));
    cure(patient, "with room again");
    let (_, report) = check(&patient.path, &[]);
    assert_eq!(report["errors"], 0, "{report:#}");
}

#[test]
fn a_file_that_ends_before_its_data_is_made_whole_when_nothing_was_in_it_and_refused_otherwise() {
    let folder = temp_dir();
    let image = folder.path().join("vm.hds");
    let patient = Patient::new(&image, Version::V2, 64 * KIB, 40, &mut Rng::new(1));
    patient.file().set_len(40 * KIB).expect("truncate");
    Run::ploopfs().args(["check", "--repair"]).arg(&image).status(3);
    // The same without an entry: an empty disk.
    patient.file().write_all_at(&[0; 160], 64).expect("a write");
    let (status, report) = check(&image, &["--repair"]);
    assert_eq!((status, &report["errors"]), (0, &0.into()), "{report:#}");
    assert_eq!(image.metadata().expect("stat").len(), 64 * KIB);
    assert!(report["lost"].as_array().is_some_and(Vec::is_empty), "{report:#}");
}

#[test]
fn any_rubbish_in_a_header_is_repaired_or_refused_and_never_takes_the_program_down() {
    let folder = temp_dir();
    let image = folder.path().join("vm.hds");
    let mut rng = Rng::new(number_from_env("PLOOPFS_SEED", 1));
    let path = image.as_path();
    for round in 0..number_from_env("PLOOPFS_REPAIR_ROUNDS", 60) {
        let patient = Patient::new(path, Version::V2, 64 * KIB, 40, &mut rng);
        let from = rng.below(60);
        let len = 1 + rng.below(64 - from) as usize;
        let rubbish = if rng.below(4) == 0 { vec![0xFF; len] } else { rng.bytes(len) };
        patient.file().write_all_at(&rubbish, from).expect("a write");
        let before = patient.bytes();
        let done = Run::ploopfs().args(["check", "--repair"]).arg(path).run();
        assert!(matches!(done.code(), Some(0 | 3)), "round {round}, {len} bytes at {from}: {done}");
        if done.code() == Some(3) {
            assert!(patient.bytes() == before, "round {round}: refused, and changed all the same: {done}");
        }
        fs::remove_file(path).expect("remove");
        let _ = fs::remove_file(lost_file(path));
    }
}
