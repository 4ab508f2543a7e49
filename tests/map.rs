//! `ploopfs map`, with the real binary: beside QEMU, live and at rest, with snapshots, in bounded memory.

mod common;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{Mount, Rng, Run, temp_dir, text};
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn map(image: &Path) -> Vec<Value> {
    serde_json::from_str(&Run::ploopfs().arg("map").arg(image).arg("--json").ok()).expect("valid JSON")
}

fn number(range: &Value, field: &str) -> u64 {
    range[field].as_u64().unwrap_or_else(|| panic!("{field} of {range}"))
}

/// No gap, no overlap, from the disk's begin to its end.
fn assert_whole(ranges: &[Value], size: u64) {
    let mut at = 0;
    for range in ranges {
        assert_eq!(number(range, "start"), at, "{range}");
        assert!(number(range, "length") > 0, "{range}");
        at += number(range, "length");
    }
    assert_eq!(at, size);
}

/// Without the holes inside clusters, which QEMU does not look for: (start, length, offset) of what is mapped.
fn mapped(ranges: &[Value]) -> Vec<(u64, u64, u64)> {
    let mut all: Vec<(u64, u64, u64)> = Vec::new();
    for range in ranges.iter().filter(|range| range["present"] == true) {
        let (start, length, offset) =
            (number(range, "start"), number(range, "length"), number(range, "offset"));
        match all.last_mut() {
            Some((s, l, o)) if *s + *l == start && *o + *l == offset => *l += length,
            _ => all.push((start, length, offset)),
        }
    }
    all
}

fn fields(range: &Value) -> BTreeMap<String, Value> {
    range.as_object().expect("an object").clone().into_iter().collect()
}

#[test]
fn json_says_what_qemu_img_map_says_of_a_single_delta() {
    require!("qemu");
    let folder = temp_dir();
    for (seed, cluster) in [(1, "64K"), (2, "1M"), (3, "32K"), (4, "4M")] {
        let image = folder.path().join(format!("vm{seed}.hds"));
        Run::ploopfs().args(["create", text(&image), "--size", "200M", "--cluster", cluster]).ok();
        let mut rng = Rng::new(seed);
        let unit: u64 = cluster.trim_end_matches(['K', 'M']).parse().expect("a number");
        let unit = if cluster.ends_with('K') { unit << 10 } else { unit << 20 };
        let mut line = Run::new("qemu-io").args(["-f", "parallels"]);
        for _ in 0..30 {
            // Whole clusters: then there is no hole inside one.
            let start = rng.below(200 * MIB / unit - 4);
            line = line.arg("-c").arg(format!("write {} {}", start * unit, (1 + rng.below(4)) * unit));
        }
        line.arg(&image).ok();
        let theirs =
            Run::new("qemu-img").args(["map", "-f", "parallels", "--output=json", text(&image)]).ok();
        let theirs: Vec<Value> = serde_json::from_str(&theirs).expect("valid JSON");
        let ours = map(&image);
        assert!(ours.len() > 10, "{ours:?}");
        assert_eq!(ours.len(), theirs.len(), "{ours:?}\n{theirs:?}");
        for (ours, theirs) in ours.iter().zip(&theirs) {
            for (field, value) in fields(theirs) {
                assert_eq!(ours[&field], value, "{field}: {ours} {theirs}");
            }
        }
    }
}

#[test]
fn holes_inside_a_cluster_are_shown_where_qemu_sees_only_the_cluster() {
    require!("qemu");
    let folder = temp_dir();
    let image = folder.path().join("vm.hds");
    Run::ploopfs().args(["create", text(&image), "--size", "64M"]).ok();
    let writes = ["write 3M 4k", "write 9M 2M", "write 20672k 8k"].map(|write| ["-c", write]);
    Run::new("qemu-io").args(["-f", "parallels"]).args(writes.concat()).arg(&image).ok();
    let ours = map(&image);
    assert_whole(&ours, 64 * MIB);
    let theirs = Run::new("qemu-img").args(["map", "-f", "parallels", "--output=json", text(&image)]).ok();
    assert_eq!(mapped(&ours), mapped(&serde_json::from_str::<Vec<Value>>(&theirs).expect("valid JSON")));
    let first: Vec<u64> = ours.iter().filter(|r| r["data"] == true).map(|r| number(r, "length")).collect();
    assert_eq!(first.first(), Some(&4096), "{ours:?}");
    assert!(ours.iter().any(|r| r["present"] == true && r["zero"] == true), "{ours:?}");
}

#[test]
fn a_live_image_and_its_snapshots_are_mapped_as_they_lie_on_disk_afterwards() {
    require!("fuse");
    let mut mount = Mount::new(&["--create", "vm=64M"]);
    let write = |at: u64, clusters: u64| {
        let data = vec![7; (clusters * MIB) as usize];
        mount.open("vm").write_all_at(&data, at * MIB).expect("write");
    };
    write(0, 4);
    let image = mount.images().join("vm");
    Run::ploopfs().args(["snapshot", "create", text(&image), "monday"]).ok();
    write(2, 1);
    write(40, 2);
    let at = |level: &str| image.with_file_name(format!("vm{level}"));
    let live = map(&mount.flat("vm"));
    assert_whole(&live, 64 * MIB);
    let seen: Vec<(u64, u64, u64, u64)> = live
        .iter()
        .filter(|r| r["data"] == true)
        .map(|r| {
            (number(r, "start") / MIB, number(r, "length") / MIB, number(r, "level"), number(r, "depth"))
        })
        .collect();
    assert_eq!(seen, [(0, 2, 0, 1), (2, 1, 1, 0), (3, 1, 0, 1), (40, 2, 1, 0)]);
    let snapshot = map(&mount.point().join(".snapshots/vm/monday.img"));
    assert_eq!(snapshot, map(&at("@monday")));
    assert_eq!(mapped(&snapshot).len(), 1);
    let missing = Run::ploopfs().arg("map").arg(at("@tuesday")).status(1);
    assert!(missing.stderr.contains("there is no snapshot tuesday"), "{missing}");
    mount.umount();
    assert_eq!(map(&image), live, "the paths too");
    assert_eq!(map(&at("@monday")), snapshot);
    Run::ploopfs().arg("map").arg(at("@tuesday")).status(1);
}

/// Commands compared a name that is no UTF-8 with the daemon's text of it, and found the image in use by a stranger: our
/// own daemon.
#[test]
fn an_image_in_use_whose_name_is_no_text_is_found_by_commands_by_both_its_names() {
    require!("fuse");
    let name = |ending: &str| OsString::from_vec([&b"caf\xe9"[..], ending.as_bytes()].concat());
    let mut mount = Mount::new(&["--create", "vm=8M"]);
    mount.umount();
    let image = mount.images().join(name(".hds"));
    fs::rename(mount.images().join("vm.hds"), &image).expect("renamed");
    let mount = Mount::over(mount.images(), &[]);
    let shown = mount.point().join(name(".img"));
    let disk = OpenOptions::new().read(true).write(true).open(&shown).expect("opened");
    disk.write_all_at(&[7; 4096], 0).expect("written");
    let seen = [map(&image), map(&shown)];
    assert_whole(&seen[0], 8 * MIB);
    assert_eq!(mapped(&seen[0]), [(0, MIB, MIB)]);
    assert_eq!(seen[0], seen[1]);
    let info = Run::ploopfs().arg("info").arg(&image).ok();
    assert!(info.contains("write") && info.contains(&std::process::id().to_string()), "{info}");
    Run::ploopfs().arg("resize").arg(&shown).arg("16M").ok();
    assert_whole(&map(&image), 16 * MIB);
}

#[test]
fn a_map_while_it_is_written_tells_what_is_not_on_disk_yet_and_keeps_nobody_out() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm=64M", "--bat-delay", "60000"]);
    let file = mount.open("vm");
    file.write_all_at(&vec![1; MIB as usize], 5 * MIB).expect("write");
    let header = fs::read(mount.delta("vm")).expect("read");
    assert!(header[64..4096].iter().all(|byte| *byte == 0), "the map on disk knows nothing yet");
    let ranges = map(&mount.delta("vm"));
    assert_eq!(mapped(&ranges).iter().map(|m| (m.0, m.1)).collect::<Vec<_>>(), [(5 * MIB, MIB)]);
    file.write_all_at(&vec![1; MIB as usize], 6 * MIB).expect("write");
    drop(file);
    assert!(common::until(std::time::Duration::from_secs(10), || mount.mode("vm") == "closed"));
}

#[test]
fn a_disk_of_16_tib_is_mapped_in_little_memory() {
    require!("qemu");
    let folder = temp_dir();
    let image = folder.path().join("big.hds");
    Run::ploopfs().args(["create", text(&image), "--size", "16T", "--cluster", "1M"]).ok();
    let writes = ["write 15T 64k", "write 7T 1M", "write 0 4k"].map(|write| ["-c", write]);
    Run::new("qemu-io").args(["-f", "parallels"]).args(writes.concat()).arg(&image).ok();
    let program = env!("CARGO_BIN_EXE_ploopfs");
    // The BAT alone has 64 MiB.
    for form in ["--json", "--picture"] {
        let done =
            Run::new("prlimit").args(["--data=24000000", program, "map", text(&image), form]).limit(120);
        let out = done.ok();
        if form == "--json" {
            let ranges: Vec<Value> = serde_json::from_str(&out).expect("valid JSON");
            assert_whole(&ranges, 16 << 40);
            let starts: Vec<u64> = mapped(&ranges).iter().map(|m| m.0).collect();
            assert_eq!(starts, [0, 7 << 40, 15 << 40]);
        } else {
            assert!(out.contains("\nA character is 21.3 GiB"), "{out}");
        }
    }
}

#[test]
fn the_picture_fits_a_screen_however_many_levels_there_are() {
    require!("fuse");
    let mut mount = Mount::in_memory(&["--create", "vm=2G"]);
    let image = mount.images().join("vm");
    for level in 0..20u64 {
        let block = vec![1; 4096];
        (0..40).for_each(|i| {
            mount.open("vm").write_all_at(&block, ((i * 41 + level * 7) % 2048) * MIB).expect("write")
        });
        Run::ploopfs()
            .args(["snapshot", "create", text(&image), &format!("a-long-name-of-a-snapshot-{level}")])
            .ok();
    }
    let draw = |image: &Path| Run::ploopfs().arg("map").arg(image).arg("--picture").ok();
    for picture in [draw(&image), draw(&mount.point().join(".snapshots/vm/a-long-name-of-a-snapshot-2.img"))]
    {
        assert!(picture.lines().count() <= 24, "{picture}");
        assert!(picture.lines().all(|line| line.chars().count() <= 80), "{picture}");
        assert!(picture.is_ascii() && !picture.contains('\u{1b}'), "no colours in a pipe: {picture}");
    }
    let picture = draw(&image);
    assert!(picture.contains("other levels") && picture.contains("a-long-name"), "{picture}");
    mount.umount();
}

#[test]
fn an_svg_is_well_formed_and_replaces_nothing() {
    let folder = temp_dir();
    let at = |name: &str| folder.path().join(name);
    Run::ploopfs().args(["create", text(&at("a&b<c>.hds")), "--size", "1G"]).ok();
    let draw = |to: &Path| Run::ploopfs().arg("map").arg(at("a&b<c>")).arg("--svg").arg(to);
    assert_eq!(draw(&at("x.svg")).ok(), "");
    let svg = fs::read_to_string(at("x.svg")).expect("the picture");
    let mut reader = quick_xml::Reader::from_str(&svg);
    let mut squares = 0;
    loop {
        match reader.read_event().expect("well-formed") {
            quick_xml::events::Event::Eof => break,
            quick_xml::events::Event::Empty(tag) if tag.name().as_ref() == "rect" => squares += 1,
            _ => {}
        }
    }
    assert!(squares > 512, "{squares}");
    assert_eq!(draw(Path::new("-")).ok(), svg);
    fs::write(at("mine"), "precious").expect("write");
    for taken in ["mine", "a&b<c>.hds"] {
        let before = fs::read(at(taken)).expect("read");
        assert!(draw(&at(taken)).status(1).stderr.contains("nothing is replaced"));
        assert_eq!(fs::read(at(taken)).expect("read"), before);
    }
    draw(&at("no/such/folder.svg")).status(1);
    let names = fs::read_dir(folder.path()).expect("read").count();
    assert_eq!(names, 3, "nothing half-made is left");
    for bad in [&["--json", "--picture"][..], &["--json", "--svg", "y"], &["--svg"]] {
        Run::ploopfs().arg("map").arg(at("a&b<c>")).args(bad).status(2);
    }
}

#[test]
fn damaged_entries_are_shown_and_do_not_end_the_map() {
    let folder = temp_dir();
    let image = folder.path().join("vm.hds");
    Run::ploopfs().args(["create", text(&image), "--size", "16M"]).ok();
    let file = OpenOptions::new().write(true).open(&image).expect("open");
    file.write_all_at(&77u32.to_le_bytes(), 64 + 4 * 3).expect("write");
    let ranges = map(&image);
    assert_whole(&ranges, 16 * MIB);
    let bad: Vec<_> = ranges.iter().filter(|r| r["damaged"] == true).map(|r| number(r, "start")).collect();
    assert_eq!(bad, [3 * MIB]);
    assert!(Run::ploopfs().arg("map").arg(&image).ok().contains("damaged"));
    assert!(Run::ploopfs().arg("map").arg(&image).arg("--picture").ok().contains("...!...."));
}

#[test]
fn a_reader_that_stops_in_the_middle_of_a_long_map_is_no_failure() {
    let folder = temp_dir();
    let image = folder.path().join("vm.hds");
    Run::ploopfs().args(["create", text(&image), "--size", "2G", "--cluster", "32K"]).ok();
    let file = OpenOptions::new().write(true).open(&image).expect("open");
    file.set_len(4 << 30).expect("extend");
    // Every second entry: 32768 ranges and as many holes between.
    let first = 64 + 2 * (1u32 << 16) * 4;
    let bat: Vec<u8> = (0..1u32 << 16)
        .flat_map(|i| if i % 2 == 0 { first.div_ceil(32768) + i } else { 0 }.to_le_bytes())
        .collect();
    file.write_all_at(&bat, 64).expect("write");
    for form in [&[][..], &["--json"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ploopfs"));
        command.arg("map").arg(&image).args(form).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("ploopfs starts");
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
        stdout.read_line(&mut line).expect("a line");
        drop(stdout);
        let done = child.wait_with_output().expect("wait");
        assert_eq!((done.status.code(), &done.stderr[..]), (Some(0), &b""[..]), "{form:?}");
    }
    assert!(map(&image).len() > 60_000);
}

#[test]
fn an_image_that_somebody_else_has_open_is_not_mapped() {
    require!("qemu");
    let folder = temp_dir();
    let image = folder.path().join("vm.hds");
    Run::ploopfs().args(["create", text(&image), "--size", "16M"]).ok();
    let _qemu = common::qemu_holds(&image);
    assert_eq!(Run::ploopfs().arg("map").arg(&image).run().code(), Some(4));
}
