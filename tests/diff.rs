//! `ploopfs diff`, through the real binary: what it does not list is equal, byte for byte, offline and live.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Mount, Rng, Run, temp_dir, text};
use serde_json::Value;

const CLUSTER: u64 = 64 << 10;
const SIZE: u64 = 4 << 20;

fn ploopfs(folder: &Path) -> impl Fn(&[&str]) -> String + '_ {
    |args| Run::ploopfs().args(args).in_folder(folder).ok()
}

/// Begin and end of what `diff --json` lists.
fn listed(text: &str) -> Vec<(u64, u64)> {
    let value: Value = serde_json::from_str(text).expect("JSON");
    let number = |value: &Value| value.as_u64().expect("a number");
    let ranges = value["ranges"].as_array().expect("a list").iter();
    ranges.map(|r| (number(&r["start"]), number(&r["start"]) + number(&r["length"]))).collect()
}

/// The first cluster in which the two disks differ and that is not listed; the end of the shorter one counts as a
/// difference.
fn missed(a: &[u8], b: &[u8], ranges: &[(u64, u64)]) -> Option<u64> {
    let len = a.len().max(b.len()) as u64;
    let part = |disk: &[u8], from: u64| {
        let len = disk.len() as u64;
        disk[from.min(len) as usize..(from + CLUSTER).min(len) as usize].to_vec()
    };
    let listed = |cluster: u64| ranges.iter().any(|(begin, end)| (*begin..*end).contains(&cluster));
    let mut clusters = (0..len.div_ceil(CLUSTER)).map(|n| n * CLUSTER);
    clusters.find(|cluster| !listed(*cluster) && part(a, *cluster) != part(b, *cluster))
}

/// Writes, discards and writes of zeroes somewhere in the live disk.
fn churn(disk: &File, size: u64, rng: &mut Rng) {
    for _ in 0..8 {
        let offset = rng.below(size / 512) * 512;
        let len = (512 + rng.below(200) * 512).min(size - offset);
        match rng.below(4) {
            0 => common::punch(disk, offset, len).expect("punch"),
            1 => disk.write_all_at(&vec![0; len as usize], offset).expect("write"),
            _ => disk.write_all_at(&rng.bytes(len as usize), offset).expect("write"),
        }
    }
}

#[test]
fn what_is_not_listed_between_any_two_snapshots_is_equal_byte_for_byte() {
    require!("fuse");
    let folder = temp_dir();
    let images = folder.path().join("images");
    std::fs::create_dir(&images).expect("mkdir");
    let ok = ploopfs(&images);
    ok(&["create", "vm", "--size", "4M", "--cluster", "64K"]);
    let mut rng = Rng::new(6);
    let mut size = SIZE;
    let mut live = Vec::new();
    let mut mount = Mount::over(&images, &[]);
    let mut names: Vec<String> = Vec::new();
    for step in 0..6 {
        let file = File::options().read(true).write(true).open(mount.flat("vm")).expect("open");
        churn(&file, size, &mut rng);
        let name = format!("s{step}");
        ok(&["snapshot", "create", "vm", &name]);
        names.push(name);
        churn(&file, size, &mut rng);
        drop(file);
        match step {
            1 => {
                size += 3 * CLUSTER + 512;
                ok(&["resize", "vm", &size.to_string()]);
            }
            2 => {
                // A second branch of the tree.
                ok(&["snapshot", "switch", "vm", "s0"]);
                size = SIZE;
            }
            3 => drop(ok(&["snapshot", "delete", "vm", "s1"])),
            _ => {}
        }
        names.retain(|name| step != 3 || name != "s1");
        live = std::fs::read(mount.flat("vm")).expect("the disk");
    }
    let shown = mount.point().join(".snapshots/vm");
    let content = |name: &str| std::fs::read(shown.join(format!("{name}.img"))).expect("a snapshot");
    let disks: Vec<(String, Vec<u8>)> = names.iter().map(|name| (name.clone(), content(name))).collect();
    let compare = |how: &str| {
        for (a, before) in &disks {
            for (b, after) in &disks {
                let ranges = listed(&ok(&["diff", "vm", a, b, "--json"]));
                println!("{how}: {a} to {b}: {} ranges", ranges.len());
                assert_eq!(missed(before, after, &ranges), None, "{how}: {a} to {b}: {ranges:?}");
                // The comparison finds what a diff would leave out.
                assert_eq!(missed(before, after, &[]).is_none(), before == after);
                assert!(a != b || ranges.is_empty(), "a snapshot differs from itself");
            }
            let ranges = listed(&ok(&["diff", "vm", a, "--json"]));
            assert_eq!(missed(before, &live, &ranges), None, "{how}: {a} to the disk: {ranges:?}");
        }
    };
    assert!(disks.windows(2).all(|pair| pair[0].1 != pair[1].1), "the test changed nothing");
    compare("live");
    // Two snapshots with little between them: not everything is listed.
    let ranges = listed(&ok(&["diff", "vm", "s4", "s5", "--json"]));
    let sum: u64 = ranges.iter().map(|(begin, end)| end - begin).sum();
    assert!(sum > 0 && sum < size, "{sum}");
    mount.umount();
    compare("offline");
}

#[test]
fn what_was_just_written_to_the_live_disk_is_listed_before_it_is_synced() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm=64M", "--bat-delay", "60000"]);
    let file = File::options().read(true).write(true).open(mount.flat("vm")).expect("open");
    let ok = ploopfs(mount.images());
    ok(&["snapshot", "create", "vm", "a"]);
    file.write_all_at(b"x", 5 << 20).expect("write");
    let ranges = listed(&ok(&["diff", "vm", "a", "--json"]));
    assert_eq!(ranges, [(5 << 20, 6 << 20)]);
    let said = ok(&["diff", text(&mount.flat("vm")), "a"]);
    assert!(said.contains("1 MiB of 64 MiB may differ between a and the disk"), "{said}");
}

#[test]
fn diff_leaves_every_byte_alone_and_names_what_is_missing() {
    let folder = temp_dir();
    let ok = ploopfs(folder.path());
    ok(&["create", "vm", "--size", "4M"]);
    let fails =
        |status: i32, args: &[&str]| Run::ploopfs().args(args).in_folder(folder.path()).status(status).stderr;
    assert!(fails(1, &["diff", "vm", "a"]).contains("no snapshot a: this image has none"));
    ok(&["snapshot", "create", "vm", "a"]);
    let files = || {
        let entries = std::fs::read_dir(folder.path().join("vm")).expect("the image").flatten();
        let mut all: Vec<_> = entries
            .map(|e| (e.path(), std::fs::read(e.path()).ok(), e.metadata().and_then(|m| m.modified()).ok()))
            .collect();
        all.sort();
        all
    };
    let before = files();
    ok(&["diff", "vm", "a"]);
    assert!(fails(1, &["diff", "vm", "b"]).contains("there is no snapshot b; there is a"));
    assert!(fails(1, &["diff", "vm", "a", "b"]).contains("no snapshot b"));
    assert!(fails(1, &["diff", "nothing", "a"]).contains("no such image"));
    assert!(fails(2, &["diff", "vm@a", "a"]).contains("takes a whole image"));
    fails(2, &["diff", "vm"]);
    assert!(files() == before, "diff changed something");
    // A base that ends inside its BAT, or is empty.
    for length in [0, 10, 100] {
        std::fs::write(folder.path().join("vm/vm.hds"), vec![0; length]).expect("write");
        fails(3, &["diff", "vm", "a"]);
    }
}
