//! `meta dump`, `restore` and `pack`.

use std::fs;
use std::os::unix::fs::FileExt;

use ploopfs::format::header::Version;

use crate::common::damage::Patient;
use crate::common::{Rng, Run, allocated, temp_dir};
use crate::{KIB, check};

#[test]
fn an_image_whose_map_was_overwritten_is_whole_again_after_a_restore() {
    let folder = temp_dir();
    let image = folder.path().join("vm.hds");
    for version in [Version::V1, Version::V2] {
        let patient = Patient::new(&image, version, 64 * KIB, 3000, &mut Rng::new(1));
        let good = patient.bytes();
        let dump = folder.path().join("vm.meta");
        fs::write(&dump, Run::ploopfs().args(["meta", "dump"]).arg(&image).ok()).expect("write");
        patient.file().write_all_at(&Rng::new(2).bytes(64 + 4 * 3000), 0).expect("damage");
        Run::ploopfs().args(["check"]).arg(&image).status(3);
        Run::ploopfs().args(["meta", "restore"]).args([&dump, &image]).ok();
        assert!(patient.bytes() == good, "{version}");
        fs::remove_file(&image).expect("remove");
    }
}

#[test]
fn a_dump_of_a_shorter_file_is_refused_and_changes_nothing() {
    let folder = temp_dir();
    let image = folder.path().join("vm.hds");
    let patient = Patient::new(&image, Version::V2, 64 * KIB, 40, &mut Rng::new(1));
    let dump = folder.path().join("vm.meta");
    fs::write(&dump, Run::ploopfs().args(["meta", "dump"]).arg(&image).ok()).expect("write");
    patient.file().set_len(100 * KIB).expect("truncate");
    let before = patient.bytes();
    let done = Run::ploopfs().args(["meta", "restore"]).args([&dump, &image]).status(2);
    assert!(done.stderr.contains("but the file ends at byte 102400"), "{done}");
    fs::write(&dump, "no dump").expect("write");
    Run::ploopfs().args(["meta", "restore"]).args([&dump, &image]).status(2);
    assert!(patient.bytes() == before);
}

#[test]
fn a_packed_image_checks_like_the_original_and_has_no_data() {
    let folder = temp_dir();
    let image = folder.path().join("vm.hds");
    let mut rng = Rng::new(1);
    let mut patient = Patient::new(&image, Version::V2, 64 * KIB, 400, &mut rng);
    assert!(patient.hurt(crate::common::damage::Damage::Double, &mut rng));
    let packed = folder.path().join("packed.hds");
    Run::ploopfs().args(["meta", "pack"]).args([&image, &packed]).ok();
    let ((status, original), (same, copy)) = (check(&image, &[]), check(&packed, &[]));
    assert_eq!((status, &original["findings"]), (same, &copy["findings"]), "{copy:#}");
    assert!(allocated(&packed) <= 64 * KIB, "{}", allocated(&packed));
    Run::ploopfs().args(["meta", "pack"]).args([&image, &packed]).status(1);
}

#[test]
fn a_layered_image_is_dumped_restored_and_packed_file_by_file() {
    let folder = temp_dir();
    let run = |args: &[&str]| Run::ploopfs().args(args).in_folder(folder.path()).ok();
    run(&["create", "vm", "--size", "64M"]);
    run(&["snapshot", "create", "vm", "a"]);
    let text = run(&["meta", "dump", "vm"]);
    assert_eq!(text.matches("\nend\n").count(), 2, "{text}");
    fs::write(folder.path().join("vm.meta"), &text).expect("write");
    run(&["meta", "restore", "vm.meta", "vm"]);
    run(&["check", "vm"]);
    run(&["meta", "pack", "vm", "packed"]);
    assert_eq!(
        run(&["snapshot", "list", "packed"]).lines().count(),
        run(&["snapshot", "list", "vm"]).lines().count()
    );
    run(&["check", "packed"]);
}

#[test]
fn a_raw_image_has_no_metadata() {
    let folder = temp_dir();
    Run::ploopfs().args(["create", "vm.raw", "--size", "1M"]).in_folder(folder.path()).ok();
    for args in [&["meta", "dump", "vm.raw"][..], &["meta", "pack", "vm.raw", "x"]] {
        let done = Run::ploopfs().args(args).in_folder(folder.path()).status(1);
        assert!(done.stderr.contains("no metadata"), "{done}");
    }
}

/// FAULTS 89: the first file had its new map when the second one's was refused.
#[test]
fn a_dump_of_two_files_is_put_back_into_both_or_into_none() {
    let folder = temp_dir();
    let image = folder.path().join("vm.hds");
    Patient::new(&image, Version::V2, 64 * KIB, 40, &mut Rng::new(1));
    Run::ploopfs().args(["snapshot", "create"]).arg(&image).arg("s").ok();
    let image = folder.path().join("vm");
    let dump = folder.path().join("vm.meta");
    fs::write(&dump, Run::ploopfs().args(["meta", "dump"]).arg(&image).ok()).expect("write");
    let base = fs::File::options().read(true).write(true).open(image.join("vm.hds")).expect("the base");
    // The first in the dump is damaged, and the second too short for its own map, which it gets in the dump.
    base.write_all_at(&[0xFF; 20], 64).expect("damage");
    let text = fs::read_to_string(&dump).expect("read");
    let (first, second) = text.split_at(text.rfind("format 1").expect("two dumps"));
    fs::write(&dump, format!("{first}{}", second.replace("\nend", "\nbat 39 1 9999 0\nend"))).expect("write");
    let before = fs::read(image.join("vm.hds")).expect("read");
    let done = Run::ploopfs().args(["meta", "restore"]).args([&dump, &image]).status(2);
    assert!(done.stderr.contains("reach to byte"), "{done}");
    assert!(fs::read(image.join("vm.hds")).expect("read") == before);
}

/// FAULTS 89: the last cluster had to begin in the file, and not to end there.
#[test]
fn a_dump_of_a_file_that_was_cut_inside_its_last_cluster_since_is_refused() {
    let folder = temp_dir();
    let image = folder.path().join("vm.hds");
    let patient = Patient::new(&image, Version::V2, 64 * KIB, 40, &mut Rng::new(1));
    let dump = folder.path().join("vm.meta");
    fs::write(&dump, Run::ploopfs().args(["meta", "dump"]).arg(&image).ok()).expect("write");
    let mut rng = Rng::new(2);
    let mut patient = patient;
    assert!(patient.hurt(crate::common::damage::Damage::Cut, &mut rng));
    let before = patient.bytes();
    let done = Run::ploopfs().args(["meta", "restore"]).args([&dump, &image]).status(2);
    assert!(done.stderr.contains("but the file ends at byte"), "{done}");
    assert!(patient.bytes() == before);
}
