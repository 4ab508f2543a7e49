//! An image at rest is judged before anything is done with it, by every command and by the mount: a file that was cut off,
//! a disk that is not what its bytes look like, a name that a descriptor cannot hold, a chain without one of its files.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use common::{Folder, Mount, text, until};
use ploopfs::format::descriptor::Descriptor;
use ploopfs::format::header::{HEADER_BYTES, Header, Version};
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// Long for a busy 2-core machine.
const SOON: Duration = Duration::from_secs(30);

/// An image of `disk` bytes in clusters of 1 MiB whose guest clusters `mapped` lie one behind the other, each full of 0xAB;
/// `lacks` bytes of its end are missing.
fn image(path: &Path, disk: u64, mapped: &[u64], lacks: u64) {
    let header = Header::new(Version::V2, disk, MIB).expect("a header");
    let geometry = header.geometry();
    let file = File::create(path).expect("create");
    file.write_all_at(&header.encode(), 0).expect("write");
    for (place, cluster) in mapped.iter().enumerate() {
        let at = geometry.cluster_position(place as u64);
        let entry = geometry.entry(at).expect("fits").to_le_bytes();
        file.write_all_at(&entry, HEADER_BYTES + 4 * cluster).expect("write");
        file.write_all_at(&vec![0xAB; MIB as usize], at).expect("write");
    }
    let end = geometry.cluster_position(mapped.len() as u64);
    file.set_len(end - lacks).expect("length");
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

/// All files of the folder with their content, but for our notes: an open for writing drops those of what has ended.
fn content(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in folder.read_dir().expect("the folder") {
        let path = entry.expect("an entry").path();
        let name = text(&path).to_owned();
        if path.is_dir() && !name.ends_with(".ploopfs") {
            all.extend(content(&path));
        } else if path.is_file() && !name.ends_with(".lck") && !name.ends_with("ploopfs.json") {
            all.push((name, fs::read(&path).expect("readable")));
        }
    }
    all.sort();
    all
}

/// FAULTS 2: offline commands read zeroes there, and the first that wrote made the file whole.
#[test]
fn a_file_cut_off_inside_a_mapped_cluster_is_damage_to_every_command_and_stays_it() {
    // Inside the last cluster, at its very beginning, and a whole cluster short.
    for lacks in [300_000, MIB - 1, MIB] {
        let folder = Folder::new();
        image(&folder.path("vm.hds"), 64 * MIB, &[0, 5], lacks);
        let before = content(folder.0.path());
        for args in [
            &["export", "vm", "out"][..],
            &["backup", "vm", "-o", "out"],
            &["compact", "vm"],
            &["compact", "--defrag", "vm"],
            &["resize", "vm", "1G"],
            &["cbt", "start", "vm"],
            &["snapshot", "create", "vm", "s"],
            &["clone", "vm", "new"],
        ] {
            let said = folder.fails(3, args);
            assert!(content(folder.0.path()) == before, "{lacks}: {args:?} changed something: {said}");
        }
        let found = json(&folder.run(&["check", "vm", "--json"]).stdout);
        assert_eq!((&found["errors"], &found["leaks"]), (&1.into(), &0.into()), "{lacks}: {found:#}");
        let list = json(&folder.ok(&["list", ".", "--json"]));
        let reason = list["images"][0]["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("damaged") && reason.contains("BAT entry 5"), "{lacks}: {list:#}");
    }
}

/// FAULTS 2: only a repair makes it whole, and says what the guest has lost.
#[test]
fn a_repair_of_a_cut_file_names_the_lost_bytes_and_only_then_it_is_whole() {
    let folder = Folder::new();
    image(&folder.path("vm.hds"), 64 * MIB, &[0, 5], 300_000);
    let said = folder.ok(&["check", "--repair", "vm", "--json"]);
    let lost = &json(&said)["lost"];
    let offset = 6 * MIB - 300_000;
    assert_eq!((&lost[0]["offset"], &lost[0]["len"]), (&offset.into(), &300_000.into()), "{said}");
    folder.ok(&["check", "vm"]);
    folder.ok(&["export", "vm", "out"]);
}

/// FAULTS 2: the same below the top, where a merge, a snapshot or a copy spread it.
#[test]
fn a_base_that_was_cut_off_is_neither_merged_nor_copied_nor_written_over() {
    for lacks in [300_000, MIB] {
        let folder = Folder::new();
        image(&folder.path("vm.hds"), 64 * MIB, &[0, 5], 0);
        for name in ["a", "b"] {
            folder.ok(&["snapshot", "create", "vm", name]);
        }
        let base = File::options().write(true).open(folder.path("vm/vm.hds")).expect("open");
        base.set_len(3 * MIB - lacks).expect("cut");
        let before = content(folder.0.path());
        for args in [
            &["export", "vm", "out"][..],
            &["export", "vm@a", "out"],
            &["backup", "vm@a", "-o", "out"],
            // Its snapshot could not be deleted again.
            &["backup", "vm", "-o", "out"],
            &["snapshot", "create", "vm", "c"],
            &["compact", "vm"],
            &["merge", "vm", "a"],
            &["snapshot", "delete", "vm", "a"],
            &["clone", "vm@b", "new"],
        ] {
            let said = folder.fails(3, args);
            assert!(content(folder.0.path()) == before, "{lacks}: {args:?} changed something: {said}");
        }
        let list = json(&folder.ok(&["list", ".", "--json"]));
        assert!(list["images"][0]["reason"].as_str().is_some_and(|r| r.contains("damaged")), "{list:#}");
        folder.fails(3, &["check", "vm"]);
    }
}

/// FAULTS 2: the mount showed it as sound, and one write anywhere made it whole.
#[test]
fn a_mounted_cut_file_can_be_read_but_for_what_it_lacks_and_cannot_be_written() {
    require!("fuse");
    let folder = Folder::new();
    image(&folder.path("vm.hds"), 64 * MIB, &[0, 5], 300_000);
    let before = content(folder.0.path());
    let mut mount = Mount::over(folder.0.path(), &[]);
    let list = json(&folder.ok(&["list", ".", "--json"]));
    assert!(list["images"][0]["reason"].as_str().is_some_and(|r| r.contains("damaged")), "{list:#}");
    File::options().write(true).open(mount.flat("vm")).expect_err("not to be written");
    let flat = File::open(mount.flat("vm")).expect("to be read");
    let mut bytes = [0; 4096];
    flat.read_exact_at(&mut bytes, 0).expect("what is there");
    assert_eq!(bytes, [0xAB; 4096]);
    flat.read_exact_at(&mut bytes, 6 * MIB - 4096).expect_err("what is lost");
    drop(flat);
    mount.umount();
    assert!(content(folder.0.path()) == before);
}

/// The other way round: a disk whose last cluster is partial needs no more of its file than the disk has.
#[test]
fn a_file_that_ends_with_the_disk_inside_its_last_partial_cluster_is_whole() {
    let folder = Folder::new();
    image(&folder.path("vm.hds"), 63 * MIB + 512 * 7, &[0, 63], MIB - 512 * 7);
    folder.ok(&["check", "vm"]);
    folder.ok(&["export", "vm", "out"]);
    let out = fs::read(folder.path("out")).expect("read");
    assert_eq!(out.len() as u64, 63 * MIB + 512 * 7);
    assert!(out.ends_with(&[0xAB; 512 * 7]));
    folder.ok(&["snapshot", "create", "vm", "s"]);
    folder.ok(&["export", "vm@s", "again"]);
    assert!(fs::read(folder.path("again")).expect("read") == out);
}

/// A descriptor for one raw file of `disk` bytes with clusters of `blocksize` sectors.
fn plain(folder: &Path, disk: u64, blocksize: u32) -> Vec<u8> {
    fs::create_dir(folder).expect("a folder");
    let xml = Descriptor::new(disk / 512, blocksize, "win.hds", true).to_xml();
    fs::write(folder.join("DiskDescriptor.xml"), xml).expect("write");
    let file = File::create(folder.join("win.hds")).expect("create");
    file.set_len(disk).expect("length");
    file.write_all_at(&[7; 100_000], 0).expect("write");
    file.write_all_at(&[9; 512], disk - 512).expect("write");
    fs::read(folder.join("win.hds")).expect("read")
}

/// FAULTS 7: the new top had the clusters that would fit the file's length, and the disk never opened again.
#[test]
fn a_snapshot_of_a_plain_disk_has_the_clusters_of_its_descriptor() {
    for (disk, blocksize) in [(8 * MIB + 65536, 2048), (8 * MIB, 63), (8 * MIB, 4096), (8 * MIB, 2048)] {
        let folder = Folder::new();
        let reference = plain(&folder.path("win.hdd"), disk, blocksize);
        folder.ok(&["snapshot", "create", "win.hdd", "one"]);
        folder.ok(&["check", "win.hdd"]);
        for (image, out) in [("win.hdd", "live"), ("win.hdd@one", "snapshot")] {
            folder.ok(&["export", image, out]);
            assert!(fs::read(folder.path(out)).expect("read") == reference, "{disk} {blocksize} {out}");
        }
    }
}

/// FAULTS 7: `check` compared the deltas with each other, and none with the descriptor.
#[test]
fn check_compares_every_header_with_the_blocksize_of_the_descriptor() {
    let folder = Folder::new();
    image(&folder.path("vm.hds"), 8 * MIB, &[0], 0);
    folder.ok(&["snapshot", "create", "vm", "one"]);
    let xml = folder.path("vm/DiskDescriptor.xml");
    let text = fs::read_to_string(&xml).expect("read");
    fs::write(&xml, text.replace("<Blocksize>2048<", "<Blocksize>1024<")).expect("write");
    folder.fails(3, &["export", "vm", "out"]);
    let done = folder.run(&["check", "vm"]);
    assert!(!done.success() && done.stdout.contains("Blocksize"), "{done}");
}

/// FAULTS 8: they were mounted writable, and nothing spoke of it.
#[test]
fn a_disk_that_is_encrypted_or_padded_is_not_served_and_list_and_info_say_why() {
    require!("fuse");
    let folder = Folder::new();
    for (name, from, to) in [
        ("plain", "", ""),
        (
            "secret",
            "</Disk_Parameters>",
            "<Encryption><Engine>{12345678-1234-1234-1234-123456789abc}</Engine></Encryption></Disk_Parameters>",
        ),
        ("padded", "<Padding>0<", "<Padding>1<"),
    ] {
        let path = folder.path(&format!("{name}.hdd"));
        fs::create_dir(&path).expect("a folder");
        image(&path.join("disk.hds"), 8 * MIB, &[0], 0);
        let xml = String::from_utf8(Descriptor::new(8 * MIB / 512, 2048, "disk.hds", false).to_xml())
            .expect("text");
        fs::write(path.join("DiskDescriptor.xml"), xml.replacen(from, to, 1)).expect("write");
    }
    let before = content(folder.0.path());
    let mut mount = Mount::over(folder.0.path(), &[]);
    assert!(mount.flat("plain").exists());
    for mounted in [true, false] {
        if !mounted {
            mount.umount();
        }
        let list = json(&folder.ok(&["list", ".", "--json"]));
        for (name, word) in [("secret", "is encrypted"), ("padded", "Padding = 1")] {
            assert!(!mount.flat(name).exists());
            let row = list["images"].as_array().expect("rows").iter().find(|row| row["name"] == name);
            let reason = row.and_then(|row| row["reason"].as_str()).unwrap_or_default();
            assert!(reason.contains(word), "{name}: {list:#}");
            let info = folder.ok(&["info", &format!("{name}.hdd")]);
            assert!(info.contains(word), "{info}");
        }
    }
    for args in [
        &["snapshot", "create", "secret.hdd", "s"][..],
        &["export", "secret.hdd", "out"],
        &["compact", "padded.hdd"],
    ] {
        folder.fails(1, args);
    }
    assert!(content(folder.0.path()) == before);
}

/// FAULTS 9: the folder was made, and nothing opened it any more.
#[test]
fn an_image_whose_name_no_descriptor_can_hold_stays_a_file_that_opens() {
    for name in [" lead", "\u{1}ctl", "a\u{7f}\u{2}b"] {
        let folder = Folder::new();
        image(&folder.path(&format!("{name}.hds")), 8 * MIB, &[0], 0);
        image(&folder.path("vm.hds"), 8 * MIB, &[0], 0);
        let before = content(folder.0.path());
        for args in [&["snapshot", "create", name, "s"][..], &["clone", name, "new"]] {
            folder.fails(2, args);
            assert!(content(folder.0.path()) == before, "{name:?} {args:?}");
        }
        folder.ok(&["export", name, "out"]);
        fs::remove_file(folder.path(&format!("{name}.hds"))).expect("remove");
        folder.ok(&["snapshot", "create", "vm", "s"]);
        let before = content(folder.0.path());
        for image in ["vm@s", "vm"] {
            folder.fails(2, &["clone", image, name]);
            assert!(content(folder.0.path()) == before, "{name:?} {image}");
        }
    }
}

/// FAULTS 67: the descriptor alone was looked at.
#[test]
fn a_chain_without_one_of_its_files_is_left_out_and_comes_back_with_it() {
    require!("fuse");
    let folder = Folder::new();
    for name in ["gone", "empty", "garbled"] {
        image(&folder.path(&format!("{name}.hds")), 8 * MIB, &[0], 0);
        folder.ok(&["snapshot", "create", name, "s"]);
    }
    let (base, away) = (folder.path("gone/gone.hds"), folder.path(".away"));
    fs::rename(&base, &away).expect("move");
    fs::write(folder.path("empty/empty.hds"), "").expect("write");
    fs::write(folder.path("garbled/garbled.hds"), [1; 4096]).expect("write");
    let reason = |name: &str| -> String {
        let list = json(&folder.ok(&["list", ".", "--json"]));
        let row = list["images"].as_array().expect("rows").iter().find(|row| row["name"] == name).cloned();
        row.and_then(|row| row["reason"].as_str().map(str::to_owned)).unwrap_or_default()
    };
    let list_says_why = || {
        assert!(reason("gone").contains("is missing"), "{}", reason("gone"));
        assert!(reason("empty").contains("is empty"), "{}", reason("empty"));
        assert!(reason("garbled").contains("m_Sig"), "{}", reason("garbled"));
    };
    list_says_why();
    let mut mount = Mount::over(folder.0.path(), &[]);
    list_says_why();
    assert!(!mount.flat("gone").exists() && !mount.flat("empty").exists());
    // A damage that only an open finds is the image's, and no wrong name.
    let opened = File::open(mount.flat("garbled")).expect_err("damaged");
    assert_eq!(opened.raw_os_error(), Some(117), "EUCLEAN: {opened}");
    fs::rename(&away, &base).expect("back");
    assert!(until(SOON, || mount.flat("gone").exists()), "the image does not come back with its file");
    mount.umount();
}
