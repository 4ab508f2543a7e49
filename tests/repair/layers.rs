//! Images of several files: each repaired by itself, what a crash interrupted finished, descriptor and files made to agree.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ploopfs::format::descriptor::{Descriptor, Guid, Marker};
use ploopfs::format::header::{Header, IN_USE};
use ploopfs::image::layers::{Direct, Layers};
use ploopfs::io::real::Access;
use ploopfs::vdisk::{Engine, Image, Options};
use serde_json::Value;
use tempfile::TempDir;

use crate::common::{Rng, Run, temp_dir};
use crate::{KIB, check};

const MIB: usize = 1 << 20;
const XML: &str = "vm/DiskDescriptor.xml";

/// An image of three levels: `old`, `new` and the live top, each with data of its own.
struct Layered {
    folder: TempDir,
    disk: Vec<u8>,
}

impl Layered {
    fn new() -> Layered {
        let mut layered = Layered { folder: temp_dir(), disk: vec![0; 8 * MIB] };
        layered.run(&["create", "vm", "--size", "8M", "--cluster", "64K"]);
        layered.run(&["snapshot", "create", "vm", "old"]);
        let mut rng = Rng::new(1);
        // Into the top, and then a snapshot makes a lower level of it.
        layered.write(&mut rng, 0..40);
        layered.run(&["snapshot", "create", "vm", "new"]);
        layered.write(&mut rng, 20..60);
        layered
    }

    fn run(&self, args: &[&str]) {
        Run::ploopfs().args(args).in_folder(self.folder.path()).ok();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn image(&self) -> PathBuf {
        self.path("vm")
    }

    fn descriptor(&self) -> Descriptor {
        Descriptor::parse(&fs::read(self.path(XML)).expect("read")).expect("a descriptor")
    }

    fn put(&self, descriptor: &Descriptor) {
        fs::write(self.path(XML), descriptor.to_xml()).expect("write");
    }

    /// The files, base first.
    fn files(&self) -> Vec<PathBuf> {
        let descriptor = self.descriptor();
        let chain = descriptor.chain(descriptor.top).expect("a chain");
        let file = |guid: &Guid| self.image().join(&descriptor.delta(*guid).expect("a delta").file);
        chain.iter().map(file).collect()
    }

    fn open<T>(&self, act: impl FnOnce(&Arc<Image>) -> T) -> T {
        let dir = File::open(self.image()).expect("the folder");
        let opener = Arc::new(Direct(Access::Widest));
        let (_layers, chain) = Layers::open(dir.into(), &self.image(), opener, false).expect("opens");
        let engine = Engine::new(Options::default(), Box::new(|_| ()));
        let image = Image::open(&engine, "vm", chain).expect("opens");
        image.make_writable().expect("sound");
        let result = act(&image);
        image.close().expect("closes");
        result
    }

    fn write(&mut self, rng: &mut Rng, clusters: std::ops::Range<usize>) {
        let cluster = 64 * KIB as usize;
        let bytes = rng.bytes(clusters.len() * cluster);
        let at = clusters.start * cluster;
        self.disk[at..at + bytes.len()].copy_from_slice(&bytes);
        self.open(|image| image.write_at(at as u64, &bytes).expect("writes"));
    }

    fn read(&self) -> Vec<u8> {
        self.open(|image| image.read_at(0, self.disk.len()).expect("reads").to_vec())
    }

    /// Repairs, checks, repairs again; returns the report of the first.
    #[track_caller]
    fn cure(&self) -> Value {
        let before = self.state();
        let (_, dry) = check(&self.image(), &["--repair", "--dry-run"]);
        assert!(self.state() == before, "a dry run changed something: {dry:#}");
        let (status, report) = check(&self.image(), &["--repair"]);
        assert_eq!((status, &report["errors"], &report["leaks"]), (0, &0.into(), &0.into()), "{report:#}");
        let steps = |value: &Value| value["steps"].as_array().expect("steps").len();
        assert_eq!(steps(&report), steps(&dry), "{dry:#}{report:#}");
        assert_eq!(report["repaired"], dry["would_repair"], "{dry:#}{report:#}");
        let cured = self.state();
        let (status, again) = check(&self.image(), &["--repair"]);
        assert_eq!((status, &again["repaired"]), (0, &0.into()), "{again:#}");
        assert!(self.state() == cured, "a second repair changed something: {again:#}");
        report
    }

    /// Every file of the folder with its content, but for locks.
    fn state(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let entries = fs::read_dir(self.image()).expect("the folder");
        let mut files: Vec<_> = entries
            .map(|entry| entry.expect("readable").path())
            .filter(|path| path.extension().is_none_or(|suffix| suffix != "lck"))
            .map(|path| (path.clone(), fs::read(path).expect("read")))
            .collect();
        files.sort();
        files
    }
}

fn put(file: &Path, at: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(file).and_then(|f| f.write_all_at(bytes, at)).expect("a write");
}

fn header(file: &Path) -> Header {
    Header::parse(&fs::read(file).expect("read")).expect("a header")
}

#[test]
fn a_sound_image_needs_no_repair_and_is_left_alone() {
    let layered = Layered::new();
    let before = layered.state();
    let (status, report) = check(&layered.image(), &["--repair"]);
    assert_eq!((status, &report["repaired"]), (0, &0.into()), "{report:#}");
    assert!(layered.state() == before);
    assert!(layered.read() == layered.disk);
}

#[test]
fn damage_to_a_lower_level_is_repaired_and_the_levels_above_are_whole() {
    let layered = Layered::new();
    let files = layered.files();
    // Guest cluster 5 is in the middle level only.
    put(&files[1], 64 + 4 * 5, &7777_u32.to_le_bytes());
    let report = layered.cure();
    assert_eq!(report["lost"][0]["offset"], 5 * 64 * KIB, "{report:#}");
    let lost = 5 * 64 * KIB as usize..6 * 64 * KIB as usize;
    let data = layered.disk[lost.clone()].to_vec();
    let mut wanted = layered.disk.clone();
    wanted[lost].fill(0);
    assert!(layered.read() == wanted);
    let kept = fs::read(PathBuf::from(format!("{}.lost", files[1].display()))).expect("kept");
    assert!(kept.windows(data.len()).step_by(512).any(|window| window == data), "the data is not kept");
}

#[test]
fn a_header_is_restored_from_what_descriptor_and_other_levels_say() {
    let layered = Layered::new();
    for file in layered.files() {
        let good = header(&file);
        // Magic, type, CHS and clusters; or the size as well, which for the top the descriptor has.
        let gone = if file == layered.files()[2] { 36 } else { 20 };
        put(&file, 0, &vec![0; gone]);
        let (status, report) = check(&layered.image(), &["--repair"]);
        assert_eq!((status, &report["errors"]), (0, &0.into()), "{report:#}");
        let now = header(&file);
        assert_eq!(
            (now.version, now.cluster_sectors, now.entries, now.disk_sectors, now.first_block),
            (good.version, good.cluster_sectors, good.entries, good.disk_sectors, good.first_block)
        );
    }
    assert!(layered.read() == layered.disk);
}

#[test]
fn a_deleted_snapshot_that_was_not_merged_is_merged() {
    let layered = Layered::new();
    let mut descriptor = layered.descriptor();
    let lowest = descriptor.chain(descriptor.top).expect("a chain")[1];
    descriptor.set_marker(lowest, Some(Marker::Temporary)).expect("there");
    layered.put(&descriptor);
    put(&layered.files()[1], 44, &IN_USE.to_le_bytes());
    let report = layered.cure();
    assert_eq!(layered.files().len(), 2, "{report:#}");
    assert!(layered.read() == layered.disk);
}

#[test]
fn left_over_marks_of_every_level_are_cleared() {
    let layered = Layered::new();
    for file in layered.files() {
        put(&file, 44, &IN_USE.to_le_bytes());
    }
    let report = layered.cure();
    assert_eq!(report["repaired"], 3, "{report:#}");
    assert!(layered.files().iter().all(|file| !header(file).is_in_use()));
    assert!(layered.read() == layered.disk);
}

#[test]
fn where_descriptor_and_top_differ_in_size_the_top_wins() {
    let layered = Layered::new();
    let mut descriptor = layered.descriptor();
    let right = descriptor.disk_sectors;
    descriptor.set_size(right / 2);
    layered.put(&descriptor);
    let report = layered.cure();
    assert_eq!((layered.descriptor().disk_sectors, &report["repaired"]), (right, &1.into()), "{report:#}");
    assert!(layered.read() == layered.disk);
}

#[test]
fn where_descriptor_and_all_files_differ_in_the_cluster_the_files_win() {
    let layered = Layered::new();
    let mut descriptor = layered.descriptor();
    descriptor.cluster_sectors *= 2;
    layered.put(&descriptor);
    let (status, report) = check(&layered.image(), &["--repair"]);
    assert_eq!((status, &report["repaired"]), (0, &1.into()), "{report:#}");
    assert_eq!(layered.descriptor().cluster_sectors, 128);
    assert!(layered.read() == layered.disk);
}

#[test]
fn a_file_that_a_crashed_operation_left_is_removed() {
    let layered = Layered::new();
    let left = layered.image().join("vm.hds.left");
    fs::write(&left, "half a delta").expect("write");
    let notes = layered.image().join("ploopfs.json");
    let mut text: Value = serde_json::from_slice(&fs::read(&notes).expect("read")).expect("JSON");
    text["passing"] = serde_json::json!(["vm.hds.left"]);
    fs::write(&notes, text.to_string()).expect("write");
    let report = layered.cure();
    assert_eq!(report["repaired"], 1, "{report:#}");
    assert!(!left.exists());
}

#[test]
fn a_missing_file_is_damage_that_no_repair_hides() {
    let layered = Layered::new();
    fs::remove_file(&layered.files()[1]).expect("remove");
    let before = layered.state();
    let (status, report) = check(&layered.image(), &["--repair"]);
    assert_eq!((status, &report["repaired"]), (3, &0.into()), "{report:#}");
    assert!(layered.state() == before);
}

#[test]
fn one_level_in_use_by_somebody_stops_the_repair_before_it_begins() {
    let layered = Layered::new();
    let files = layered.files();
    put(&files[0], 44, &IN_USE.to_le_bytes());
    let held = ploopfs::io::real::RealFile::open(&files[2], Access::ReadOnly).expect("open");
    let _lock =
        ploopfs::io::lock::DeltaLock::acquire(Arc::new(held), ploopfs::io::lock::Use::Writer).expect("free");
    let before = layered.state();
    Run::ploopfs().args(["check", "--repair"]).arg(layered.image()).status(4);
    assert!(layered.state() == before);
}
