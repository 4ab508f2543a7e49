//! A layered image on real files against plain vectors: snapshots, deletions, merges, switches, clones, growing, writes
//! and discards in any order, reopened at random. Every snapshot, and every clone, has what it had.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use ploopfs::format::descriptor::Descriptor;
use ploopfs::image::create::{CreatePlan, create};
use ploopfs::image::kind::{DESCRIPTOR, ImageKind};
use ploopfs::image::layers::{Direct, Layers};
use ploopfs::image::make_folder::make_folder;
use ploopfs::image::switch::switch;
use ploopfs::io::real::Access;
use ploopfs::progress::Progress;
use ploopfs::vdisk::live::{Work, carry_out, carry_out_before_close, lower};
use ploopfs::vdisk::{Engine, Image, Options};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

#[derive(Clone, Debug)]
enum Op {
    Write {
        at: u64,
        len: u64,
        byte: u8,
    },
    Discard {
        at: u64,
        len: u64,
    },
    Snapshot,
    /// Closed: the image is closed behind it, and what was left for that is done.
    Delete {
        which: prop::sample::Index,
        closed: bool,
    },
    Merge {
        which: prop::sample::Index,
    },
    Switch {
        which: prop::sample::Index,
    },
    Clone {
        which: prop::sample::Index,
        live: bool,
    },
    Grow {
        by: u64,
    },
    Reopen,
}

fn op() -> impl Strategy<Value = Op> {
    let which = any::<prop::sample::Index>();
    let at = 0..3 * MIB;
    let len = prop_oneof![3 => 1..20_000u64, 1 => 1..700_000u64];
    prop_oneof![
        8 => (at.clone(), len.clone(), any::<u8>()).prop_map(|(at, len, byte)| Op::Write { at, len, byte }),
        4 => (at, len).prop_map(|(at, len)| Op::Discard { at, len }),
        5 => Just(Op::Snapshot),
        3 => (which.clone(), any::<bool>()).prop_map(|(which, closed)| Op::Delete { which, closed }),
        1 => which.clone().prop_map(|which| Op::Merge { which }),
        1 => which.clone().prop_map(|which| Op::Switch { which }),
        1 => (which, any::<bool>()).prop_map(|(which, live)| Op::Clone { which, live }),
        1 => (1..900_000u64).prop_map(|by| Op::Grow { by }),
        2 => Just(Op::Reopen),
    ]
}

/// An image that is open, and what it should hold.
struct Disk {
    folder: PathBuf,
    engine: Arc<Engine>,
    open: Option<(Arc<Image>, Arc<Layers>)>,
    live: Vec<u8>,
    snapshots: BTreeMap<String, Vec<u8>>,
    clones: Vec<(PathBuf, Vec<u8>)>,
}

impl Disk {
    fn new(dir: &Path, kind: ImageKind, cluster: Option<u64>, size: u64) -> Disk {
        let plan = CreatePlan { kind: Some(kind), cluster, ..CreatePlan::thin(size) };
        let made = create(&dir.join("vm"), &plan).expect("created");
        let file = made.path.file_name().expect("a name");
        make_folder(open_folder(dir).as_fd(), dir, file, None).expect("made");
        let mut disk = Disk {
            folder: dir.join("vm"),
            engine: Engine::new(Options::default(), Box::new(|_| ())),
            open: None,
            live: vec![0; made.size as usize],
            snapshots: BTreeMap::new(),
            clones: Vec::new(),
        };
        disk.reopen();
        disk
    }

    fn parts(&self) -> (&Arc<Image>, &Arc<Layers>) {
        let (image, layers) = self.open.as_ref().expect("open");
        (image, layers)
    }

    fn close(&mut self) {
        if let Some((image, layers)) = self.open.take() {
            image.close().expect("closes");
            drop(layers);
        }
        let descriptor = std::fs::read(self.folder.join(DESCRIPTOR)).expect("there");
        let descriptor = Descriptor::parse(&descriptor).expect("whole");
        for delta in &descriptor.deltas {
            check(&self.folder.join(&delta.file), delta.plain);
        }
        // Nothing lies there that nobody names.
        let named = |name: &str| descriptor.deltas.iter().any(|d| d.file == name);
        for entry in std::fs::read_dir(&self.folder).expect("reads") {
            let name = entry.expect("reads").file_name().into_string().expect("UTF-8");
            assert!(
                named(&name)
                    || name == DESCRIPTOR
                    || name == "ploopfs.json"
                    || name.starts_with('.')
                    || name.ends_with(".lck"),
                "{name}"
            );
        }
    }

    fn reopen(&mut self) {
        if self.open.is_some() {
            self.close();
        }
        let dir = open_folder(&self.folder);
        let (layers, chain) =
            Layers::open(dir, &self.folder, Arc::new(Direct(Access::Widest)), false).expect("opens");
        let image = Image::open(&self.engine, "vm", chain).expect("opens");
        image.make_writable().expect("sound");
        self.open = Some((image, layers));
    }

    fn work(&self, work: Work) -> ploopfs::Result<ploopfs::vdisk::live::Done> {
        let (image, layers) = self.parts();
        carry_out(image, Some(layers), &work, &Progress::new())
    }

    fn delete_and_close(&mut self, work: &Work) {
        let (image, layers) = self.open.take().expect("open");
        carry_out_before_close(&image, Some(&layers), work, &Progress::new()).expect("deleted");
        image.close().expect("closes");
        let merged = lower::finish(&layers, &Progress::new(), &|| true).expect("merged");
        drop(layers);
        self.reopen();
        if !merged {
            // What was not in the file's map yet has made the other way the shorter one.
            self.work(Work::Finish).expect("merged");
        }
        assert!(self.parts().1.store().descriptor().unfinished().is_empty());
    }

    fn pick(&self, which: &prop::sample::Index) -> Option<String> {
        let names: Vec<&String> = self.snapshots.keys().collect();
        (!names.is_empty()).then(|| which.get(&names).to_string())
    }

    fn apply(&mut self, op: &Op) {
        let size = self.live.len() as u64;
        match op {
            Op::Write { at, len, byte } => {
                let at = at % size;
                let len = (*len).min(size - at);
                let data: Vec<u8> =
                    (0..len).map(|i| if *byte == 0 { 0 } else { byte ^ (i >> 9) as u8 | 1 }).collect();
                self.parts().0.write_at(at, &data).expect("writes");
                self.live[at as usize..(at + len) as usize].copy_from_slice(&data);
            }
            Op::Discard { at, len } => {
                let at = at % size;
                let len = (*len).min(size - at);
                self.parts().0.discard_at(at, len).expect("discards");
                self.live[at as usize..(at + len) as usize].fill(0);
            }
            Op::Snapshot => {
                let label = format!("s{}", self.snapshots.len() * 100 + self.clones.len());
                if self.snapshots.contains_key(&label) {
                    return;
                }
                let done = self.work(Work::Snapshot { label: Some(label.clone()) }).expect("a snapshot");
                assert_eq!(done.name, Some(label.clone()));
                self.snapshots.insert(label, self.live.clone());
            }
            Op::Delete { which, closed } => {
                if let Some(name) = self.pick(which) {
                    let work = Work::Delete { snapshot: name.clone() };
                    if *closed {
                        self.delete_and_close(&work);
                    } else {
                        self.work(work).expect("deleted");
                    }
                    self.snapshots.remove(&name);
                }
            }
            Op::Merge { which } => {
                if let Some(name) = self.pick(which)
                    && self.work(Work::Merge { snapshot: name.clone() }).is_ok()
                {
                    self.snapshots.remove(&name);
                }
            }
            Op::Switch { which } => {
                if let Some(name) = self.pick(which) {
                    self.close();
                    let dir = open_folder(&self.folder);
                    let (layers, chain) =
                        Layers::open(dir, &self.folder, Arc::new(Direct(Access::Widest)), false)
                            .expect("opens");
                    drop(chain);
                    let guid = layers.store().find_snapshot(&name).expect("there");
                    switch(&layers, guid).expect("switched");
                    drop(layers);
                    let size = self.live.len();
                    self.live = self.snapshots[&name].clone();
                    self.live.resize(size, 0);
                    self.reopen();
                }
            }
            Op::Clone { which, live } => {
                let to = self.folder.with_file_name(format!("clone{}", self.clones.len()));
                let snapshot = self.pick(which).filter(|_| !live);
                let content =
                    snapshot.as_ref().map_or(self.live.clone(), |name| self.snapshots[name].clone());
                let work = Work::Clone { snapshot: snapshot.clone(), to: vec![to.clone()], copy: false };
                let done = self.work(work).expect("cloned");
                if let (None, Some(note)) = (snapshot, done.note) {
                    let name = note.rsplit(' ').next().expect("the snapshot's name").to_owned();
                    self.snapshots.insert(name, self.live.clone());
                }
                self.clones.push((to, content));
            }
            Op::Grow { by } => {
                let done = self.work(Work::Resize { size: size + by }).expect("grown");
                let size = done.size.expect("a size");
                assert!(size >= self.live.len() as u64 + by);
                self.live.resize(size as usize, 0);
            }
            Op::Reopen => self.reopen(),
        }
    }

    fn verify(&mut self) {
        let (image, layers) = self.parts();
        assert_eq!(image.size(), self.live.len() as u64);
        same(image, &self.live, "the live disk");
        for (name, content) in &self.snapshots {
            let guid = layers.store().find_snapshot(name).expect("there");
            let levels = layers.chain(guid).expect("a chain");
            let snapshot = Image::open(&self.engine, name, levels).expect("opens");
            assert_eq!(snapshot.size(), content.len() as u64, "{name}");
            same(&snapshot, content, name);
            snapshot.close().expect("closes");
        }
        self.close();
        for (folder, content) in std::mem::take(&mut self.clones) {
            let dir = open_folder(&folder);
            let (layers, chain) =
                Layers::open(dir, &folder, Arc::new(Direct(Access::Widest)), false).expect("opens");
            let image = Image::open(&self.engine, "clone", chain).expect("opens");
            same(&image, &content, &folder.to_string_lossy());
            image.make_writable().expect("sound");
            image.write_at(0, &[1; 1000]).expect("a clone is a disk of its own");
            image.close().expect("closes");
            drop(layers);
        }
        self.reopen();
        same(self.parts().0, &self.live, "the live disk after its clones were written");
        self.close();
    }
}

fn open_folder(path: &Path) -> OwnedFd {
    std::fs::File::open(path).expect("opens").into()
}

fn same(image: &Arc<Image>, content: &[u8], what: &str) {
    let data = image.read_at(0, content.len()).expect("reads");
    if let Some(at) = (0..content.len()).find(|i| data[*i] != content[*i]) {
        panic!("{what}: byte {at} is {:#x}, expected {:#x}", data[at], content[at]);
    }
}

/// QEMU's own check finds nothing in a closed delta.
fn check(path: &Path, plain: bool) {
    let head = std::fs::read(path).expect("reads");
    if !head.starts_with(b"WithouFreSpacExt") {
        assert!(plain, "{} has no header", path.display());
        return;
    }
    let Ok(out) = Command::new("qemu-img").args(["check", "-f", "parallels"]).arg(path).output() else {
        return;
    };
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{}: {text}", path.display());
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("PLOOPFS_MODEL_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(24),
        max_shrink_iters: 150,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_layered_image_agrees_with_plain_vectors(
        raw in prop::bool::weighted(0.3),
        cluster in prop::sample::select(vec![32u64 << 10, 64 << 10, MIB]),
        size in 1..3 * MIB,
        ops in prop::collection::vec(op(), 1..40),
    ) {
        let dir = tempfile::tempdir_in("/dev/shm").expect("tmp");
        let (kind, cluster) = if raw { (ImageKind::Raw, None) } else { (ImageKind::Ploop, Some(cluster)) };
        let mut disk = Disk::new(dir.path(), kind, cluster, size);
        for op in &ops {
            disk.apply(op);
        }
        disk.verify();
    }
}
