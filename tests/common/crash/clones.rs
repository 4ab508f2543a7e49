//! A real images folder in which clones are made, one or several at once, cut at every step of that
//! (`ploopfs::rules::Step`), with any of the names and contents lost that were not synced. What a cut leaves is laid into
//! another folder: there each clone is, whole, or is not, the origin is as it was, and the next mount leaves nothing lying about.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::DirEntryExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use ploopfs::image::clone::{Unmade, clone};
use ploopfs::image::create::{CreatePlan, create};
use ploopfs::image::layers::{Direct, Layers};
use ploopfs::image::make_folder::make_folder;
use ploopfs::image::names;
use ploopfs::io::real::Access;
use ploopfs::progress::Progress;
use ploopfs::rules::{Step, Watching};
use ploopfs::vdisk::live::{Work, carry_out};
use ploopfs::vdisk::{Engine, Image};

use super::judge::engine;
use super::power::Rng;
use super::world::{Names, lock};

/// States with a random part of what is unsynced, of each cut.
const RANDOM: usize = 12;
/// The image that is cloned.
const ORIGIN: &str = "vm";
/// What its snapshot `a` holds, in its first cluster and behind the second.
const HELD: [(u64, [u8; 512]); 2] = [(0, [7; 512]), (80 << 10, [9; 512])];

/// A file or a folder.
#[derive(Clone)]
enum Node {
    /// Its content, and whether that is durable: else it may be empty.
    File(Arc<Vec<u8>>, bool),
    Folder(Names),
}

/// What a cut sees. The first node is the images folder.
#[derive(Clone, Default)]
struct Tree(Vec<Node>);

/// What may be lost: a change of a folder's names, or the content of a file.
type Unsynced = (usize, Option<usize>);

impl Tree {
    fn unsynced(&self) -> Vec<Unsynced> {
        let of = |(number, node): (usize, &Node)| match node {
            Node::Folder(names) => (0..names.pending.len()).map(|n| (number, Some(n))).collect(),
            Node::File(_, false) => vec![(number, None)],
            Node::File(_, true) => Vec::new(),
        };
        self.0.iter().enumerate().flat_map(of).collect()
    }

    /// Makes `path` what is left of node `number`; `laid` has the files that have a name by now: the next one is a link.
    fn lay(
        &self,
        number: usize,
        path: &Path,
        keep: &dyn Fn(Unsynced) -> bool,
        laid: &mut HashMap<usize, PathBuf>,
    ) {
        match &self.0[number] {
            Node::File(bytes, durable) => {
                let done = match laid.get(&number) {
                    Some(first) => std::fs::hard_link(first, path),
                    None if *durable || keep((number, None)) => std::fs::write(path, &**bytes),
                    None => std::fs::write(path, ""),
                };
                done.expect("a file of ours");
                laid.insert(number, path.to_owned());
            }
            Node::Folder(names) => {
                std::fs::create_dir(path).expect("a folder of ours");
                for (name, node) in names.state(|change| keep((number, Some(change)))) {
                    self.lay(node, &path.join(name), keep, laid);
                }
            }
        }
    }
}

/// The folder and its record.
struct Site {
    path: PathBuf,
    numbers: HashMap<u64, usize>,
    /// What each folder holds now.
    now: HashMap<usize, BTreeMap<String, usize>>,
    tree: Tree,
    cuts: Vec<Tree>,
}

impl Site {
    /// All that is there is durable.
    fn new(path: &Path) -> Site {
        let tree = Tree(vec![Node::Folder(Names::default())]);
        let now = HashMap::from([(0, BTreeMap::new())]);
        let mut site = Site { path: path.to_owned(), numbers: HashMap::new(), now, tree, cuts: Vec::new() };
        site.look_at(0, path);
        site.sync_all();
        site
    }

    fn sync_all(&mut self) {
        for node in &mut self.tree.0 {
            match node {
                Node::File(_, durable) => *durable = true,
                Node::Folder(names) => names.sync(),
            }
        }
    }

    fn look(&mut self, step: Step<'_>) {
        let path = self.path.clone();
        self.look_at(0, &path);
        if !matches!(step, Step::Names) {
            // The cut just before a sync is the one that loses most.
            self.cuts.push(self.tree.clone());
        }
        match step {
            Step::Names => {}
            Step::HostSynced => self.sync_all(),
            Step::FileSynced(synced) | Step::FolderSynced(synced) => {
                let number = self.find(synced).expect("a path of ours");
                match &mut self.tree.0[number] {
                    Node::File(_, durable) => *durable = true,
                    Node::Folder(names) => names.sync(),
                }
            }
        }
        self.cuts.push(self.tree.clone());
    }

    /// The node of this path.
    fn find(&self, path: &Path) -> Option<usize> {
        let inside = path.strip_prefix(&self.path).ok()?;
        inside
            .components()
            .try_fold(0, |folder, name| self.now.get(&folder)?.get(name.as_os_str().to_str()?).copied())
    }

    fn look_at(&mut self, number: usize, path: &Path) {
        let mut found = BTreeMap::new();
        for entry in std::fs::read_dir(path).expect("a folder of ours") {
            let entry = entry.expect("an entry");
            let name = entry.file_name().into_string().expect("names of ours are UTF-8");
            if name.ends_with(".lck") {
                continue;
            }
            let node = *self.numbers.entry(entry.ino()).or_insert(self.tree.0.len());
            let inner = path.join(&name);
            if inner.is_dir() {
                if node == self.tree.0.len() {
                    self.tree.0.push(Node::Folder(Names::default()));
                    self.now.insert(node, BTreeMap::new());
                }
                self.look_at(node, &inner);
            } else if !matches!(self.tree.0.get(node), Some(Node::File(_, true))) {
                let content = Node::File(Arc::new(std::fs::read(&inner).expect("a file of ours")), false);
                match self.tree.0.get_mut(node) {
                    Some(there) => *there = content,
                    None => self.tree.0.push(content),
                }
            }
            found.insert(name, node);
        }
        let before = self.now.insert(number, found.clone()).expect("a folder we know");
        let gone = before.keys().filter(|name| !found.contains_key(*name)).map(|name| (name.clone(), None));
        let new = found.iter().filter(|(name, node)| before.get(*name) != Some(*node));
        let change: Vec<_> = gone.chain(new.map(|(name, node)| (name.clone(), Some(*node)))).collect();
        if let (Node::Folder(names), false) = (&mut self.tree.0[number], change.is_empty()) {
            names.pending.push(change);
        }
    }
}

/// An image with a snapshot, and a live disk that holds something else.
fn prepare(engine: &Arc<Engine>, path: &Path) -> ploopfs::Result<()> {
    std::fs::create_dir(path).expect("a folder of ours");
    create(&path.join(ORIGIN), &CreatePlan { cluster: Some(32 << 10), ..CreatePlan::thin(256 << 10) })?;
    let images = File::open(path).expect("the folder");
    make_folder(images.as_fd(), path, "vm.hds".as_ref(), None)?;
    let (layers, image) = open(engine, &path.join(ORIGIN))?;
    image.make_writable()?;
    for (at, bytes) in HELD {
        image.write_at(at, &bytes)?;
    }
    carry_out(&image, Some(&layers), &Work::Snapshot { label: Some("a".into()) }, &Progress::new())?;
    image.write_at(0, &[1; 512])?;
    image.close()?;
    drop((layers, image));
    // An open for writing drops the notes of what has ended.
    open(engine, &path.join(ORIGIN)).map(drop)
}

fn open(engine: &Arc<Engine>, folder: &Path) -> ploopfs::Result<(Arc<Layers>, Arc<Image>)> {
    let dir = File::open(folder).map_err(|e| ploopfs::Error::io(&e, folder, "does not open"))?;
    let (layers, levels) = Layers::open(dir.into(), folder, Arc::new(Direct(Access::ReadWrite)), false)?;
    let image = Image::open(engine, "state", levels)?;
    Ok((layers, image))
}

/// Clones the snapshot to these names while every step goes to `seen`.
fn make(path: &Path, names: &[&str], seen: impl Fn(Step<'_>) + 'static) -> Result<(), Unmade> {
    let folder = path.join(ORIGIN);
    let dir = File::open(&folder).expect("the image");
    let opener = Arc::new(Direct(Access::ReadWrite));
    let none = |error| Unmade { made: 0, error };
    let (layers, _levels) = Layers::open(dir.into(), &folder, opener, false).map_err(none)?;
    let guid = layers.store().find_snapshot("a").map_err(none)?;
    let to: Vec<PathBuf> = names.iter().map(|name| path.join(name)).collect();
    let _watching = Watching::new(seen);
    clone(&layers, guid, &to, false, &Progress::new())
}

/// The disk opens, can be written, and holds what the snapshot held; `live`: the origin's disk has something else in front.
fn whole(engine: &Arc<Engine>, folder: &Path, live: bool) -> Result<(), String> {
    let shown = |e: ploopfs::Error| format!("does not open: {e}");
    let (layers, image) = open(engine, folder).map_err(shown)?;
    image.make_writable().map_err(shown)?;
    for (at, bytes) in HELD {
        let wanted = if live && at == 0 { [1; 512] } else { bytes };
        if *image.read_at(at, 512).map_err(shown)? != wanted {
            return Err(format!("{} holds something else at {at}", folder.display()));
        }
    }
    image.close().map_err(shown)?;
    layers.store().find_snapshot("a").map(drop).map_err(shown)
}

/// Judges the folder that a cut left; `must`: the clones were answered.
fn judge(engine: &Arc<Engine>, path: &Path, names: &[&str], must: bool) -> Result<(), String> {
    let mut kept = vec![ORIGIN];
    for name in names.iter().filter(|name| path.join(name).exists()) {
        whole(engine, &path.join(name), false)?;
        kept.push(name);
    }
    if must && kept.len() <= names.len() {
        return Err(format!("only {kept:?} are there"));
    }
    whole(engine, &path.join(ORIGIN), true)?;
    names::sweep(File::open(path).map_err(|e| e.to_string())?.as_fd(), path);
    let left = std::fs::read_dir(path).map_err(|e| e.to_string())?.flatten();
    let mut left = left.map(|entry| entry.file_name().to_string_lossy().into_owned());
    left.find(|name| !kept.contains(&&**name)).map_or(Ok(()), |name| Err(format!("{name} is left over")))
}

/// What a cut may leave: nothing of what is unsynced, all of it, one alone, all but one, and parts by chance.
fn states(unsynced: &[Unsynced], rng: &mut Rng) -> Vec<Vec<Unsynced>> {
    let mut states = vec![Vec::new(), unsynced.to_vec()];
    for one in unsynced {
        states.push(vec![*one]);
        states.push(unsynced.iter().filter(|other| *other != one).copied().collect());
    }
    let mut part = || unsynced.iter().filter(|_| rng.below(2) == 0).copied().collect();
    states.extend((0..RANDOM).map(|_| part()));
    states.sort();
    states.dedup();
    states
}

fn empty(path: &Path) {
    if path.exists() {
        std::fs::remove_dir_all(path).expect("a folder of ours");
    }
}

/// Makes clones of these names in folders under `scratch`; returns the states judged.
pub fn enumerate(scratch: &Path, names: &[&str]) -> Result<u64, String> {
    let (site, state) = (scratch.join("site"), scratch.join("state"));
    let (engine, mut rng) = (engine(1_000_000, 65536), Rng(1 + names.len() as u64));
    empty(&site);
    prepare(&engine, &site).map_err(|e| e.to_string())?;
    let here = Arc::new(Mutex::new(Site::new(&site)));
    let seen = here.clone();
    make(&site, names, move |step| lock(&seen).look(step)).map_err(|unmade| unmade.error.to_string())?;
    let mut cuts = std::mem::take(&mut lock(&here).cuts);
    // A cut now: what was answered is durable.
    cuts.push(lock(&here).tree.clone());
    let mut judged = 0;
    for (n, cut) in cuts.iter().enumerate() {
        for kept in states(&cut.unsynced(), &mut rng) {
            empty(&state);
            cut.lay(0, &state, &|one| kept.contains(&one), &mut HashMap::new());
            judged += 1;
            judge(&engine, &state, names, n + 1 == cuts.len())
                .map_err(|e| format!("{names:?}, cut {n} of {}: {e}; kept {kept:?}", cuts.len()))?;
        }
    }
    Ok(judged)
}

/// Another program takes the second of three names while the clones are being made: the first stays, and is whole; nothing
/// else is left; what that program made is untouched.
pub fn taken_between(scratch: &Path) -> Result<(), String> {
    let (site, engine) = (scratch.join("site"), engine(1_000_000, 65536));
    prepare(&engine, &site).map_err(|e| e.to_string())?;
    let theirs = site.join("c2");
    let take = move |step: Step<'_>| {
        if matches!(step, Step::HostSynced) {
            std::fs::create_dir(&theirs).and_then(|()| std::fs::write(theirs.join("x"), "x")).expect("made");
        }
    };
    let Err(Unmade { made, error }) = make(&site, &["c1", "c2", "c3"], take) else {
        return Err("a name that was taken was given".into());
    };
    let said = error.to_string();
    let wanted = format!("1 of 3 images is made, and stays: {}", site.join("c1").display());
    if made != 1 || !said.contains("c2: has just been made by another") || !said.ends_with(&wanted) {
        return Err(format!("{made}: {said}"));
    }
    whole(&engine, &site.join("c1"), false)?;
    let mut left: Vec<_> = std::fs::read_dir(&site).map_err(|e| e.to_string())?.flatten().collect();
    left.sort_by_key(|entry| entry.file_name());
    let left: Vec<_> = left.iter().map(|entry| entry.file_name().into_string().unwrap_or_default()).collect();
    match std::fs::read(site.join("c2/x")) {
        Ok(x) if x == b"x" && left == ["c1", "c2", ORIGIN] => Ok(()),
        other => Err(format!("{left:?} are left; {other:?}")),
    }
}
