//! A descriptor that is replaced, and what a crash left beside it.

use super::*;

struct Rig {
    folder: tempfile::TempDir,
}

impl Rig {
    fn new() -> Rig {
        let folder = tempfile::tempdir().expect("tmp");
        std::fs::write(folder.path().join(DESCRIPTOR), Descriptor::new(2048, 2048, "vm.hds", false).to_xml())
            .expect("write");
        std::fs::write(folder.path().join("vm.hds"), "x").expect("write");
        Rig { folder }
    }

    fn open(&self) -> Store {
        let dir = File::open(self.folder.path()).expect("open");
        Store::open(dir.into(), self.folder.path(), Use::Writer, &Arc::default()).expect("a store")
    }

    fn has(&self, name: &str) -> bool {
        self.folder.path().join(name).exists()
    }

    fn make(&self, name: &str) {
        std::fs::write(self.folder.path().join(name), "x").expect("write");
    }
}

#[test]
fn a_replaced_descriptor_is_read_back_and_nothing_is_left_beside_it() {
    let rig = Rig::new();
    let mut store = rig.open();
    let (mut next, snapshot) = (store.descriptor().clone(), Guid::random());
    next.add_snapshot(snapshot, "f1").expect("fresh");
    store.set_label(snapshot, Some("one"), Some(7)).expect("a good label");
    store.replace(next.clone()).and_then(Replaced::durable).expect("replaced");
    let (read, labels) = Store::read(store.dir(), store.path()).expect("read");
    assert_eq!((&read.deltas, &read.shots), (&next.deltas, &next.shots));
    assert_eq!((labels.name(snapshot), labels.taken(snapshot)), ("one".into(), Some(7)));
    assert!(!rig.has(".DiskDescriptor.xml.new") && !rig.has(".ploopfs.json.new"));
    store.set_label(snapshot, None, None).expect("taken away");
    assert_eq!(store.labels().label(snapshot), None);
}

#[test]
fn a_store_has_one_user() {
    let rig = Rig::new();
    let store = rig.open();
    let again = File::open(rig.folder.path()).expect("open");
    assert_eq!(
        Store::open(again.into(), rig.folder.path(), Use::Writer, &Arc::default()).expect_err("taken").kind(),
        Kind::InUse
    );
    drop(store);
    rig.open();
}

#[test]
fn what_a_crash_left_goes_at_the_next_open_and_nothing_else_does() {
    let rig = Rig::new();
    let mut store = rig.open();
    // Dropped by a replace, and made for a step that never came to its descriptor.
    let mut next = store.descriptor().clone();
    next.add_snapshot(Guid::random(), "f1").expect("fresh");
    store.note(&["f1", "f2"]).expect("noted");
    rig.make("f1");
    rig.make("f2");
    rig.make("mine");
    store.replace(next).and_then(Replaced::durable).expect("replaced");
    drop(store);
    let mut store = rig.open();
    store.clean_up().expect("cleaned");
    assert!(rig.has("f1") && rig.has("vm.hds") && rig.has("mine") && !rig.has("f2"));

    let mut next = store.descriptor().clone();
    let base = next.chain(next.top).expect("a chain")[0];
    next.remove_merged(base, Guid::TOP, "f1").expect("merged");
    store.replace(next).and_then(Replaced::durable).expect("replaced");
    store.remove("f1").expect_err("in use");
    drop(store);
    rig.open().clean_up().expect("cleaned");
    assert!(rig.has("f1") && rig.has("mine") && !rig.has("vm.hds"));
}

#[test]
fn a_descriptor_that_would_not_be_read_is_not_written() {
    let rig = Rig::new();
    let mut store = rig.open();
    let mut bad = store.descriptor().clone();
    bad.top = Guid::random();
    store.replace(bad).expect_err("no such top");
    drop(store);
    rig.open();
}

#[test]
fn a_link_in_the_descriptors_place_is_refused() {
    let rig = Rig::new();
    let xml = rig.folder.path().join(DESCRIPTOR);
    std::fs::rename(&xml, rig.folder.path().join("other")).expect("rename");
    std::os::unix::fs::symlink("other", &xml).expect("link");
    let dir = File::open(rig.folder.path()).expect("open");
    let error = Store::read(dir.as_fd(), rig.folder.path()).expect_err("a link");
    assert_eq!(error.kind(), Kind::Invalid);
}
