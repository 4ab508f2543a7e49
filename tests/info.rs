//! What `ploopfs info` says of space, order and users, with the real binary.

mod common;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Mount, Run, temp_dir, text};
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn info(image: &Path) -> Value {
    serde_json::from_str(&Run::ploopfs().arg("info").arg(image).arg("--json").ok()).expect("valid JSON")
}

fn words(image: &Path) -> String {
    Run::ploopfs().arg("info").arg(image).ok()
}

#[test]
fn leaks_are_counted_and_the_command_that_gives_them_back_is_named() {
    let folder = temp_dir();
    let image = folder.path().join("vm.hds");
    Run::ploopfs().args(["create", text(&image), "--size", "16M"]).ok();
    assert_eq!(info(&image)["reclaimable"]["leaked"], 0);
    assert!(words(&image).contains("reclaimable: nothing leaked\n"));
    let file = OpenOptions::new().write(true).open(&image).expect("open");
    file.set_len(4 * MIB).expect("extend");
    file.write_all_at(b"x", MIB).expect("write");
    file.write_all_at(&2u32.to_le_bytes(), 64).expect("write");
    assert_eq!(info(&image)["reclaimable"]["leaked"], 2 * MIB);
    let said = words(&image);
    assert!(
        said.contains("reclaimable: 2 MiB leaked: ploopfs check") && said.contains("--repair\n"),
        "{said}"
    );
    assert!(said.contains("mode:        offline\n"), "{said}");
}

#[test]
fn fragmentation_counts_the_jumps_in_the_file() {
    let folder = temp_dir();
    let image = folder.path().join("vm.hds");
    Run::ploopfs().args(["create", text(&image), "--size", "16M"]).ok();
    let file = OpenOptions::new().write(true).open(&image).expect("open");
    file.set_len(17 * MIB).expect("extend");
    let fill = |entries: [u32; 5]| {
        for (cluster, entry) in entries.into_iter().enumerate() {
            file.write_all_at(&entry.to_le_bytes(), 64 + 4 * cluster as u64).expect("write");
        }
    };
    let level = |field: &str| info(&image)["levels"][0][field].clone();
    fill([1, 2, 0, 3, 4]);
    assert_eq!((level("pieces"), level("fragmentation")), (1.into(), 0.0.into()));
    fill([4, 3, 2, 1, 7]);
    assert_eq!((level("pieces"), level("fragmentation")), (5.into(), 100.0.into()));
    assert!(words(&image).contains("fragmented:  100%, in 5 pieces\n"), "{}", words(&image));
    fill([1, 2, 5, 6, 7]);
    assert_eq!((level("pieces"), level("fragmentation")), (2.into(), 25.0.into()));
}

#[test]
fn each_snapshot_says_what_deleting_it_frees_and_deleting_frees_that() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm=64M"]);
    let image = mount.images().join("vm");
    let write = |at: u64, clusters: u64| {
        let data = vec![7; (clusters * MIB) as usize];
        mount.open("vm").write_all_at(&data, at * MIB).expect("write");
    };
    let snapshot = |name: &str| {
        Run::ploopfs().args(["snapshot", "create", text(&image), name]).ok();
    };
    write(0, 8);
    snapshot("monday");
    write(2, 3);
    write(20, 1);
    snapshot("tuesday");
    write(20, 1);
    let freed = |info: &Value, name: &str| -> (u64, Value) {
        let all = info["reclaimable"]["snapshots"].as_array().expect("an array").clone();
        let one = all.into_iter().find(|freed| freed["name"] == name).expect("the snapshot");
        (one["reclaimable"].as_u64().expect("bytes"), one["why_not"].clone())
    };
    let live = info(&image);
    assert_eq!(freed(&live, "monday"), (3 * MIB, Value::Null));
    assert_eq!(freed(&live, "tuesday"), (MIB, Value::Null));
    assert!(live["reclaimable"]["leaked_unknown"].as_str().expect("why").contains("a mount serves it"));
    mount.umount();
    let before = info(&image);
    assert_eq!(before["reclaimable"]["leaked"], 0);
    assert_eq!(before["snapshots"][0]["exclusive"].as_u64().expect("bytes") / MIB, 9);
    let said = words(&image);
    assert!(said.contains("monday: 9 MiB of its own; deleting it frees 3 MiB\n"), "{said}");
    assert!(said.contains("in-use mark: clear\n") && said.contains("mode:        offline\n"), "{said}");
    Run::ploopfs().args(["snapshot", "delete", text(&image), "monday"]).ok();
    let (was, is) =
        (before["allocated"].as_u64().expect("bytes"), info(&image)["allocated"].as_u64().expect("bytes"));
    // The file that goes takes its own header and map along; a host that scatters it takes a block more for its own map.
    assert_eq!((was - is + MIB / 2) / MIB, 4, "{was} {is}");
}

#[test]
fn a_snapshot_that_two_others_stand_on_frees_nothing_and_says_why() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm=16M"]);
    let image = mount.images().join("vm");
    mount.open("vm").write_all_at(&vec![7; MIB as usize], 0).expect("write");
    for name in ["base", "left"] {
        Run::ploopfs().args(["snapshot", "create", text(&image), name]).ok();
    }
    Run::ploopfs().args(["snapshot", "switch", text(&image), "base"]).ok();
    mount.umount();
    let freed = info(&image)["reclaimable"]["snapshots"][0].clone();
    assert_eq!((&freed["name"], &freed["reclaimable"]), (&"base".into(), &0.into()), "{freed}");
    assert_eq!(freed["why_not"], "2 others stand on it");
}

#[test]
fn who_has_an_image_open_is_named_and_its_leaks_are_not_guessed() {
    require!("qemu", "fuse");
    let mut mount = Mount::new(&["--create", "vm=16M"]);
    let file = mount.open("vm");
    let live = info(&mount.delta("vm"));
    assert_eq!(live["mode"], "write");
    let me = format!("(pid {}", std::process::id());
    assert!(live["openers"][0].as_str().expect("a process").contains(&me), "{live}");
    drop(file);
    mount.umount();
    let image = mount.delta("vm");
    let qemu = common::qemu_holds(&image);
    let seen = info(&image);
    assert!(
        seen["holder"].as_str().is_some_and(|holder| holder.contains(&format!("pid {}", qemu.pid()))),
        "{seen}"
    );
    assert_eq!(seen["reclaimable"]["leaked_unknown"], "another process has it open", "{seen}");
    assert_eq!(seen["reclaimable"]["leaked"], Value::Null);
}
