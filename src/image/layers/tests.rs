//! Chains of real files: opened, refused, switched, cloned, made into folders.

use super::*;
use crate::format::header::Version;
use crate::image::clone::clone;
use crate::image::create::{CreatePlan, create};
use crate::image::kind::ImageKind;
use crate::image::levels::{disk_size, header_above};
use crate::image::make_folder::make_folder;
use crate::image::switch::switch;
use crate::io::file::read_full;
use crate::io::file::write_full;
use crate::progress::Progress;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

const MIB: u64 = 1 << 20;

struct Rig {
    folder: tempfile::TempDir,
}

impl Rig {
    /// images/vm/ with base and top, 8 MiB; one snapshot, labelled "one".
    fn new() -> (Rig, Guid) {
        let rig = Rig { folder: tempfile::tempdir().expect("tmp") };
        let images = rig.folder.path();
        create(&images.join("vm"), &CreatePlan::thin(8 * MIB)).expect("created");
        rig.make_folder("vm.hds");
        let guid = rig.snapshot("one");
        (rig, guid)
    }

    fn make_folder(&self, file: &str) {
        let images = File::open(self.folder.path()).expect("open");
        make_folder(images.as_fd(), self.folder.path(), file.as_ref(), None).expect("a folder");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn open_at(&self, name: &str) -> Result<(Arc<Layers>, Vec<Level>)> {
        let path = self.path(name);
        let dir = File::open(&path).expect("open");
        Layers::open(dir.into(), &path, Arc::new(Direct(Access::ReadWrite)), false)
    }

    fn open(&self) -> (Arc<Layers>, Vec<Level>) {
        self.open_at("vm").expect("opens")
    }

    /// As a live snapshot does it, without a guest.
    fn snapshot(&self, label: &str) -> Guid {
        let (layers, levels) = self.open();
        let guid = Guid::random();
        let mut next = layers.store().descriptor().clone();
        let header = header_above(&levels, &next, disk_size(&levels, &next)).expect("a header");
        let (file, _) = layers.add_delta(&header).expect("a delta");
        next.add_snapshot(guid, &file).expect("fresh");
        layers.store().set_label(guid, Some(label), None).expect("a label");
        layers.store().replace(next).and_then(Replaced::durable).expect("replaced");
        guid
    }

    fn files(&self, name: &str) -> usize {
        std::fs::read_dir(self.path(name)).expect("a folder").count()
    }

    fn edit(&self, from: &str, to: &str) {
        let xml = self.path("vm").join(DESCRIPTOR);
        let text = std::fs::read_to_string(&xml).expect("text");
        assert!(text.contains(from), "{from} is not in {text}");
        std::fs::write(xml, text.replace(from, to)).expect("write");
    }

    fn refused(&self, kind: Kind) -> String {
        let error = self.open_at("vm").map(|_| ()).expect_err("must be refused");
        assert_eq!(error.kind(), kind, "{error}");
        error.to_string()
    }
}

#[test]
fn a_chain_opens_base_first_and_is_locked_until_it_is_dropped() {
    let (rig, guid) = Rig::new();
    let (layers, levels) = rig.open();
    assert_eq!(levels.len(), 2);
    assert!(levels[0].path.ends_with("vm/vm.hds"), "{:?}", levels[0].path);
    assert_eq!(layers.chain(guid).expect("a chain").len(), 1);
    assert_eq!(layers.store().labels().name(guid), "one");
    assert_eq!(rig.open_at("vm").map(|_| ()).expect_err("in use").kind(), Kind::InUse);
    drop((layers, levels));
    rig.open();
}

#[test]
fn a_raw_base_gets_v2_deltas_and_keeps_its_bytes() {
    let rig = Rig { folder: tempfile::tempdir().expect("tmp") };
    let plan = CreatePlan { kind: Some(ImageKind::Raw), ..CreatePlan::thin(3 * MIB + 65536) };
    create(&rig.path("vm"), &plan).expect("created");
    // The guest may write anything there, the magic too.
    File::options()
        .write(true)
        .open(rig.path("vm.raw"))
        .expect("open")
        .write_all_at(b"WithouFreSpacExt", 0)
        .expect("w");
    rig.make_folder("vm.raw");
    let guid = rig.snapshot("one");
    let (layers, levels) = rig.open();
    assert!(matches!(levels[0].layout, Layout::Plain { .. }));
    let top = levels[1].geometry().expect("a delta");
    assert_eq!((top.version, top.cluster, top.disk), (Version::V2, 65536, 3 * MIB + 65536));
    switch(&layers, guid).expect("switched");
}

#[test]
fn the_tops_header_wins_over_the_descriptors_size() {
    let (rig, _) = Rig::new();
    rig.edit("16384", "8192");
    rig.open();
    let text = std::fs::read_to_string(rig.path("vm").join(DESCRIPTOR)).expect("text");
    assert!(text.contains("<Disk_size>16384<"), "{text}");
}

#[test]
fn chains_that_cannot_be_are_refused_with_the_reason() {
    let (rig, _) = Rig::new();
    let base = rig.path("vm").join("vm.hds");
    let good = std::fs::read(&base).expect("read");
    let write = |bytes: &[u8]| std::fs::write(&base, bytes).expect("write");
    let header = |version, disk, cluster| Header::new(version, disk, cluster).expect("a header").encode();
    let with = |head: [u8; 64]| {
        let mut bytes = good.clone();
        bytes[..64].copy_from_slice(&head);
        bytes
    };
    write(&with(header(Version::V1, 8 * MIB, MIB)));
    assert!(rig.refused(Kind::Damaged).contains("one version"));
    write(&with(header(Version::V2, 9 * MIB, MIB)));
    assert!(rig.refused(Kind::Damaged).contains("shorter"));
    write(&with(header(Version::V2, 8 * MIB, MIB / 2)));
    assert!(rig.refused(Kind::Damaged).contains("Blocksize"));
    write(b"short");
    rig.refused(Kind::Damaged);
    // A lower BAT may be shorter, and may be marked in use.
    let mut lower = Header::new(Version::V2, 4 * MIB, MIB).expect("a header");
    lower.in_use = crate::format::header::IN_USE;
    write(&with(lower.encode()));
    rig.open();
    write(&good);
    rig.edit("<File>vm.hds<", "<File>../../vm.hds<");
    assert!(rig.refused(Kind::NotPermitted).contains("--allow-outside"));
    rig.edit("<File>../../vm.hds<", "<File>link<");
    std::os::unix::fs::symlink("vm.hds", rig.path("vm").join("link")).expect("link");
    rig.refused(Kind::Invalid);
    std::fs::remove_file(rig.path("vm").join("link")).expect("remove");
    let top = std::fs::read_dir(rig.path("vm")).expect("list").flatten().map(|e| e.path());
    let top = top.into_iter().find(|p| p.to_string_lossy().contains(".hds.{")).expect("a top");
    std::fs::hard_link(top, rig.path("vm").join("link")).expect("link");
    // The lock sees it first: one file, two descriptors of ours.
    rig.open_at("vm").map(|_| ()).expect_err("one file twice");
}

#[test]
fn volumes_are_refused_by_name() {
    let (rig, _) = Rig::new();
    rig.edit("<StorageData>", "<StorageData><Volume><Parent>../p</Parent></Volume>");
    assert!(rig.refused(Kind::Unsupported).contains("volume"));
}

#[test]
fn a_switch_goes_back_keeps_the_size_and_leaves_no_file() {
    let (rig, guid) = Rig::new();
    rig.snapshot("two");
    let (layers, levels) = rig.open();
    assert_eq!(levels.len(), 3);
    drop(levels);
    let files = rig.files("vm");
    switch(&layers, guid).expect("switched");
    assert_eq!(rig.files("vm"), files);
    switch(&layers, Guid::random()).expect_err("no such snapshot");
    switch(&layers, Guid::TOP).expect_err("the live top");
    drop(layers);
    let (layers, levels) = rig.open();
    assert_eq!(levels.len(), 2);
    assert_eq!(disk_size(&levels, layers.store().descriptor()), 8 * MIB);
    assert_eq!(layers.store().descriptor().shots.len(), 3, "the other snapshot is still there");
    drop((layers, levels));
    assert_eq!(rig.files("vm"), files);
}

#[test]
fn a_file_put_where_a_removed_one_was_stays() {
    let (rig, guid) = Rig::new();
    let (layers, levels) = rig.open();
    let old = levels[1].path.clone();
    drop(levels);
    switch(&layers, guid).expect("switched");
    assert!(!old.exists());
    drop(layers);
    std::fs::write(&old, "brought back by hand").expect("write");
    rig.open();
    assert!(old.exists());
}

#[test]
fn a_clone_has_the_chain_the_labels_and_a_top_of_its_own() {
    let (rig, guid) = Rig::new();
    let (layers, levels) = rig.open();
    write_full(&*levels[0].file, &[7; 4096], MIB).expect("write");
    let to = rig.path("copy");
    clone(&layers, guid, std::slice::from_ref(&to), false, &Progress::new()).expect("cloned");
    let again =
        clone(&layers, guid, std::slice::from_ref(&to), false, &Progress::new()).expect_err("taken").error;
    assert_eq!(again.kind(), Kind::Exists);
    let shared = layers.is_shared("vm.hds").expect("known");
    // Where the host links, both images hold one file: one at a time.
    drop((layers, levels));
    let (copy, levels) = rig.open_at("copy").expect("opens");
    assert_eq!((levels.len(), copy.store().labels().name(guid)), (2, "one".to_owned()));
    let mut bytes = [0; 4096];
    read_full(&*levels[0].file, &mut bytes, MIB).expect("read");
    assert_eq!(bytes, [7; 4096]);
    assert_eq!(copy.is_shared("copy.hds").expect("known"), shared);
    assert!(!rig.path(".copy.new").exists());
    drop((copy, levels));
    rig.open();
}

#[test]
fn a_cancelled_clone_leaves_nothing() {
    let (rig, guid) = Rig::new();
    let (layers, _levels) = rig.open();
    let progress = Progress::new();
    progress.cancel();
    let error = clone(&layers, guid, &[rig.path("copy")], true, &progress).expect_err("cancelled").error;
    assert_eq!(error.kind(), Kind::Cancelled);
    assert_eq!(rig.files("."), 1);
}

#[test]
fn a_single_file_moves_into_a_folder_of_its_name_with_one_link() {
    let rig = Rig { folder: tempfile::tempdir().expect("tmp") };
    create(&rig.path("vm"), &CreatePlan::thin(MIB)).expect("created");
    // What a crash left goes first.
    std::fs::create_dir(rig.path(".vm.new")).expect("mkdir");
    std::fs::write(rig.path(".vm.new/vm.hds"), "old").expect("write");
    rig.make_folder("vm.hds");
    assert_eq!(rig.files("."), 1);
    let (layers, levels) = rig.open();
    assert_eq!(levels.len(), 1);
    assert!(!layers.is_shared("vm.hds").expect("known"));
    drop((layers, levels));

    create(&rig.path("other"), &CreatePlan::thin(MIB)).expect("created");
    std::fs::create_dir_all(rig.path("other/full")).expect("mkdir");
    let images = File::open(rig.folder.path()).expect("open");
    let error =
        make_folder(images.as_fd(), rig.folder.path(), "other.hds".as_ref(), None).expect_err("in the way");
    assert_eq!(error.kind(), Kind::Exists);
    assert!(rig.path("other.hds").exists() && !rig.path(".other.new").exists());
}

/// Review F12: its last steps failed once, and from then on the folder was "in the way".
#[test]
fn a_folder_that_was_made_of_the_file_but_not_to_the_end_is_gone_on_with() {
    let rig = Rig { folder: tempfile::tempdir().expect("tmp") };
    create(&rig.path("vm"), &CreatePlan::thin(MIB)).expect("created");
    std::fs::copy(rig.path("vm.hds"), rig.path("before")).expect("copied");
    rig.make_folder("vm.hds");
    std::fs::hard_link(rig.path("vm/vm.hds"), rig.path("vm.hds")).expect("as it was before step 5");
    rig.make_folder("vm.hds");
    assert!(!rig.path("vm.hds").exists() && !rig.path(".vm.new").exists());
    let (layers, _) = rig.open();
    assert!(!layers.is_shared("vm.hds").expect("known"));
    // Another file of that name is not taken for it.
    std::fs::rename(rig.path("before"), rig.path("vm.hds")).expect("renamed");
    let images = File::open(rig.folder.path()).expect("open");
    let error =
        make_folder(images.as_fd(), rig.folder.path(), "vm.hds".as_ref(), None).expect_err("in the way");
    assert_eq!(error.kind(), Kind::Exists);
    assert!(rig.path("vm.hds").exists());
}

/// The note of a step that ended is taken away at the next open, which needs space for a moment.
#[test]
fn an_image_opens_where_its_notes_and_its_size_cannot_be_written() {
    let (rig, _) = Rig::new();
    rig.edit("16384", "8192");
    let in_the_way = [".ploopfs.json.new", ".DiskDescriptor.xml.new"].map(|name| rig.path("vm").join(name));
    in_the_way.iter().for_each(|path| std::fs::create_dir(path).expect("made"));
    let (layers, levels) = rig.open();
    assert_eq!(disk_size(&levels, layers.store().descriptor()), 8 * MIB);
    drop((layers, levels));
    in_the_way.iter().for_each(|path| std::fs::remove_dir(path).expect("removed"));
    rig.open();
    let text = std::fs::read_to_string(rig.path("vm").join(DESCRIPTOR)).expect("text");
    assert!(text.contains("<Disk_size>16384<"), "{text}");
}

/// Without it the clone would be the file's only owner, and change it under its readers.
#[test]
fn a_file_that_a_clone_has_too_keeps_its_name_while_a_snapshot_is_read() {
    let (rig, guid) = Rig::new();
    let (layers, levels) = rig.open();
    let old = levels[1].path.clone();
    drop(levels);
    std::fs::hard_link(&old, rig.path("of-a-clone")).expect("linked");
    let reader = layers.begin_reading();
    switch(&layers, guid).expect("switched");
    assert!(old.exists(), "a reader may still use it");
    drop((reader, layers));
    rig.open();
    assert!(!old.exists(), "it goes at the next open");
}
