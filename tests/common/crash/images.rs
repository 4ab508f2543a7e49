//! A real images folder, whose names are recorded with those in the images' own folders: an image gets another name or
//! goes, cut at every step of that (`ploopfs::rules::Step`). What a cut leaves is laid into another folder: there every
//! image is, whole, under its old name or its new one, or is gone where it was to go, and the next mount leaves nothing
//! lying about.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use ploopfs::folder::{Folder, FolderOptions};
use ploopfs::image::create::{CreatePlan, create};
use ploopfs::image::layers::{Direct, Layers};
use ploopfs::image::leave_folder::leave_folder;
use ploopfs::image::make_folder::make_folder;
use ploopfs::image::names;
use ploopfs::io::real::Access;
use ploopfs::progress::Progress;
use ploopfs::rules::{Step, Watching};
use ploopfs::vdisk::live::{Work, carry_out};
use ploopfs::vdisk::{Engine, Image};

use super::judge::engine;
use super::world::{Names, lock};

/// Unsynced changes of names of which every combination is tried.
const MOST: usize = 12;

/// What is done to the two images, one in a folder and one that is a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// To its other name, and back.
    Rename(Which),
    Remove(Which),
    /// As a mount begins.
    Sweep,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    Layered,
    Single,
}

/// All of them.
pub const OPS: [Op; 5] = [
    Op::Rename(Which::Layered),
    Op::Rename(Which::Single),
    Op::Remove(Which::Layered),
    Op::Remove(Which::Single),
    Op::Sweep,
];

/// The files that either image can be.
const PLACES: [[&str; 2]; 2] = [["a", "b"], ["x.hds", "y.hds"]];

/// A file or a folder.
#[derive(Clone)]
enum Node {
    /// Its content, which nothing here changes.
    File(Vec<u8>),
    Folder(Names),
}

/// What a cut sees.
#[derive(Clone)]
struct Tree {
    /// The first is the images folder.
    nodes: Vec<Node>,
    /// Where each of the two images may be; None: nowhere.
    places: [Vec<Option<&'static str>>; 2],
}

impl Tree {
    /// What lies in the folder `path`, all of it durable.
    fn read(path: &Path) -> Tree {
        let places = PLACES.map(|places| vec![Some(places[0])]);
        let mut tree = Tree { nodes: Vec::new(), places };
        tree.add(path);
        tree
    }

    fn add(&mut self, path: &Path) -> usize {
        let number = self.nodes.len();
        if path.is_dir() {
            self.nodes.push(Node::Folder(Names::default()));
            let durable =
                names_in(path).into_iter().map(|(name, _)| (name.clone(), self.add(&path.join(name))));
            self.nodes[number] = Node::Folder(Names { durable: durable.collect(), ..Names::default() });
        } else {
            self.nodes.push(Node::File(std::fs::read(path).expect("a file of ours")));
        }
        number
    }

    /// Makes `path` what is left of node `number` where `keep` wants that change of that folder.
    fn lay(&self, number: usize, path: &Path, keep: &dyn Fn(usize, usize) -> bool) {
        self.lay_once(number, path, keep, &mut HashMap::new());
    }

    /// `laid` has the files that have a name by now: the next one is a link.
    fn lay_once(
        &self,
        number: usize,
        path: &Path,
        keep: &dyn Fn(usize, usize) -> bool,
        laid: &mut HashMap<usize, PathBuf>,
    ) {
        match &self.nodes[number] {
            Node::File(bytes) => {
                let done = match laid.get(&number) {
                    Some(first) => std::fs::hard_link(first, path),
                    None => std::fs::write(path, bytes),
                };
                done.expect("a file of ours");
                laid.insert(number, path.to_owned());
            }
            Node::Folder(names) => {
                std::fs::create_dir(path).expect("a folder of ours");
                for (name, node) in names.state(|change| keep(number, change)) {
                    self.lay_once(node, &path.join(name), keep, laid);
                }
            }
        }
    }

    /// Every unsynced change: its folder, and which it is there.
    fn pending(&self) -> Vec<(usize, usize)> {
        let folders = self.nodes.iter().enumerate().filter_map(|(number, node)| match node {
            Node::Folder(names) => Some((number, names.pending.len())),
            Node::File(_) => None,
        });
        folders.flat_map(|(number, changes)| (0..changes).map(move |change| (number, change))).collect()
    }
}

/// Names and inodes in a folder, without lock files.
fn names_in(path: &Path) -> Vec<(String, u64)> {
    let entries = std::fs::read_dir(path).expect("a folder of ours").map(|entry| entry.expect("an entry"));
    let named = entries.map(|entry| {
        let name = entry.file_name().into_string().expect("names of ours are UTF-8");
        (name, entry.metadata().expect("stat").ino())
    });
    named.filter(|(name, _)| !name.ends_with(".lck")).collect()
}

/// Names and contents of a folder.
fn contents(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |name: &str| std::fs::read(path.join(name)).expect("a file of ours");
    names_in(path).into_iter().map(|(name, _)| (name.clone(), read(&name))).collect()
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
    fn new(path: &Path, tree: &Tree) -> Site {
        empty(path);
        tree.lay(0, path, &|_, _| true);
        let (numbers, now) = (HashMap::new(), HashMap::new());
        let mut site = Site { path: path.to_owned(), numbers, now, tree: tree.clone(), cuts: Vec::new() };
        site.number(0, path);
        site
    }

    fn number(&mut self, number: usize, path: &Path) {
        self.numbers.insert(std::fs::metadata(path).expect("stat").ino(), number);
        let Node::Folder(names) = &self.tree.nodes[number] else { return };
        let names = names.durable.clone();
        names.iter().for_each(|(name, node)| self.number(*node, &path.join(name)));
        self.now.insert(number, names);
    }

    fn look(&mut self, step: Step<'_>) {
        let path = self.path.clone();
        self.look_at(0, &path);
        if let Step::FolderSynced(synced) = step {
            // The cut just before a sync is the one that loses most.
            self.cuts.push(self.tree.clone());
            let number = match synced == path {
                true => Some(0),
                false => synced.file_name().and_then(|name| self.now[&0].get(name.to_str()?)).copied(),
            };
            if let Some(Node::Folder(names)) = number.map(|number| &mut self.tree.nodes[number]) {
                names.sync();
            }
        }
        self.cuts.push(self.tree.clone());
    }

    fn look_at(&mut self, number: usize, path: &Path) {
        let Node::Folder(_) = &self.tree.nodes[number] else { return };
        let found = names_in(path).into_iter().map(|(name, inode)| (name, self.numbers[&inode]));
        let found: BTreeMap<String, usize> = found.collect();
        let before = self.now.insert(number, found.clone()).expect("a folder we know");
        let gone = before.keys().filter(|name| !found.contains_key(*name)).map(|name| (name.clone(), None));
        let new = found.iter().filter(|(name, node)| before.get(*name) != Some(*node));
        let change: Vec<_> = gone.chain(new.map(|(name, node)| (name.clone(), Some(*node)))).collect();
        if let (Node::Folder(names), false) = (&mut self.tree.nodes[number], change.is_empty()) {
            names.pending.push(change);
        }
        found.iter().for_each(|(name, node)| self.look_at(*node, &path.join(name)));
    }
}

/// Carries `op` out in the folder at `path`.
fn act(site: &Arc<Mutex<Site>>, path: &Path, op: Op) -> Result<(), String> {
    let dir = File::open(path).map_err(|e| e.to_string())?;
    let (Op::Rename(which) | Op::Remove(which)) = op else {
        names::sweep(dir.as_fd(), path);
        return Ok(());
    };
    let place = lock(site).tree.places[which as usize][0];
    let Some(old) = place else { return Ok(()) };
    let other = PLACES[which as usize].into_iter().find(|place| *place != old);
    let new = if matches!(op, Op::Rename(_)) { other } else { None };
    lock(site).tree.places[which as usize] = vec![place, new];
    let stem = |file: &'static str| file.trim_end_matches(".hds");
    let done = match new {
        Some(new) => names::rename(dir.as_fd(), path, old.as_ref(), stem(old).as_ref(), stem(new).as_ref()),
        None => names::remove(dir.as_fd(), path, old.as_ref()),
    };
    done.map_err(|e| e.to_string())?;
    let mut site = lock(site);
    site.tree.places[which as usize] = vec![new];
    // A cut now: what was answered is durable.
    let tree = site.tree.clone();
    site.cuts.push(tree);
    Ok(())
}

/// Judges the folder that a cut left.
fn judge(path: &Path, cut: &Tree, whole: &[BTreeMap<String, Vec<u8>>; 2]) -> Result<(), String> {
    let mut kept = Vec::new();
    for ((names, allowed), whole) in PLACES.iter().zip(&cut.places).zip(whole) {
        let found: Vec<_> = names.iter().copied().filter(|name| path.join(name).exists()).collect();
        if found.len() > 1 || !allowed.contains(&found.first().copied()) {
            return Err(format!("found {found:?} of what may be {allowed:?}"));
        }
        if let Some(name) = found.first() {
            let image = path.join(name);
            let there = match image.is_dir() {
                true => contents(&image),
                false => [(String::new(), std::fs::read(&image).map_err(|e| e.to_string())?)].into(),
            };
            if there != *whole {
                return Err(format!("{name} holds {:?} of {:?}", there.keys(), whole.keys()));
            }
            kept.push(*name);
        }
    }
    names::sweep(File::open(path).map_err(|e| e.to_string())?.as_fd(), path);
    match names_in(path).into_iter().find(|(name, _)| !kept.contains(&name.as_str())) {
        Some((name, _)) => Err(format!("{name} is left over")),
        None => Ok(()),
    }
}

/// Judges every combination of what a cut may leave.
fn judge_states(
    path: &Path,
    cut: &Tree,
    judge: impl Fn(&Path, &Tree) -> Result<(), String>,
) -> Result<u64, String> {
    let pending = cut.pending();
    if pending.len() > MOST {
        return Err(format!("{} changes are not synced: too many to try", pending.len()));
    }
    for mask in 0..1u64 << pending.len() {
        let kept = |change: &(usize, usize)| {
            pending.iter().position(|other| other == change).is_some_and(|bit| mask & 1 << bit != 0)
        };
        empty(path);
        cut.lay(0, path, &|folder, change| kept(&(folder, change)));
        judge(path, cut).map_err(|e| format!("{e}; kept {mask:b} of {pending:?}"))?;
    }
    Ok(1 << pending.len())
}

fn empty(path: &Path) {
    if path.exists() {
        std::fs::remove_dir_all(path).expect("a folder of ours");
    }
}

/// Two images, one of them with two snapshots.
fn prepared(path: &Path) -> Result<Tree, String> {
    std::fs::create_dir(path).map_err(|e| e.to_string())?;
    let made = || -> ploopfs::Result<()> {
        for name in ["a", "x"] {
            create(&path.join(name), &CreatePlan { cluster: Some(32 << 10), ..CreatePlan::thin(1 << 20) })?;
        }
        let images = File::open(path).expect("the folder");
        let folder = make_folder(images.as_fd(), path, "a.hds".as_ref(), None)?;
        let opener = Arc::new(Direct(Access::ReadWrite));
        let (layers, levels) = Layers::open(folder, &path.join("a"), opener, false)?;
        let image = Image::open(&engine(1_000_000, 65536), "a", levels)?;
        image.make_writable()?;
        for stamp in 0..2 {
            image.write_at(0, &[stamp; 512])?;
            carry_out(&image, Some(&layers), &Work::Snapshot { label: None }, &Progress::new())?;
        }
        image.close()
    };
    made().map_err(|e| e.to_string())?;
    Ok(Tree::read(path))
}

/// Every history of up to `longest` of the operations `of`, in folders under `scratch`; returns the histories and the
/// states judged.
pub fn enumerate(scratch: &Path, of: &[Op], longest: usize) -> Result<(u64, u64), String> {
    let (first, site, state) = (scratch.join("first"), scratch.join("site"), scratch.join("state"));
    let start = prepared(&first)?;
    let single = std::fs::read(first.join(PLACES[1][0])).map_err(|e| e.to_string())?;
    let whole = [contents(&first.join(PLACES[0][0])), [(String::new(), single)].into()];
    empty(&first);
    let (mut histories, mut states, mut last) = (0, 0, vec![Vec::new()]);
    for _ in 0..longest {
        last =
            last.iter().flat_map(|ops: &Vec<Op>| of.iter().map(|op| [&ops[..], &[*op]].concat())).collect();
        for ops in &last {
            histories += 1;
            let here = Arc::new(Mutex::new(Site::new(&site, &start)));
            let seen = here.clone();
            let watching = Watching::new(move |step| lock(&seen).look(step));
            for op in ops {
                // What came before is the history without this operation.
                lock(&here).cuts.clear();
                act(&here, &site, *op).map_err(|e| format!("{ops:?}: {e}"))?;
            }
            drop(watching); // The judge's steps are not the history's.
            let cuts = std::mem::take(&mut lock(&here).cuts);
            for (i, cut) in cuts.iter().enumerate() {
                states += judge_states(&state, cut, |path, cut| judge(path, cut, &whole))
                    .map_err(|e| format!("{ops:?}, cut {i}: {e}"))?;
            }
        }
    }
    Ok((histories, states))
}

/// A layered image without snapshots becomes the raw file that it is. After every cut the next mount shows it once, with
/// its bytes, and finishes what was begun; returns the states judged.
pub fn leave(scratch: &Path) -> Result<u64, String> {
    let (first, site, state) = (scratch.join("first"), scratch.join("site"), scratch.join("state"));
    let bytes: Vec<u8> = (0..65536u32).map(|n| (n >> 8) as u8 ^ 0x5a).collect();
    let made = || -> std::io::Result<()> {
        std::fs::create_dir(&first)?;
        std::fs::write(first.join("r.raw"), &bytes)?;
        make_folder(File::open(&first)?.as_fd(), &first, "r.raw".as_ref(), None)
            .map_err(std::io::Error::other)?;
        std::fs::write(first.join("r/ploopfs.json"), "{\"version\":1}")
    };
    made().map_err(|e| e.to_string())?;
    let start = Tree::read(&first);
    empty(&first);
    let here = Arc::new(Mutex::new(Site::new(&site, &start)));
    let seen = here.clone();
    let watching = Watching::new(move |step| lock(&seen).look(step));
    let left = || -> ploopfs::Result<_> {
        let images = File::open(&site).expect("the folder");
        let folder = File::open(site.join("r")).expect("the image");
        let opener = Arc::new(Direct(Access::ReadWrite));
        let (layers, _) = Layers::open(folder.into(), &site.join("r"), opener, false)?;
        leave_folder(images.as_fd(), &site, "r".as_ref(), &layers)
    };
    let left = left().map_err(|e| e.to_string())?;
    drop(watching); // The judge's steps are not the history's.
    if left != Some("r.raw".into()) || names_in(&site).len() != 1 {
        return Err(format!("{left:?} of {:?}", names_in(&site)));
    }
    let (engine, cuts) = (engine(1_000_000, 65536), std::mem::take(&mut lock(&here).cuts));
    let mut states = 0;
    for (i, cut) in cuts.iter().enumerate() {
        states += judge_states(&state, cut, |path, _| judge_left(&engine, path, &bytes))
            .map_err(|e| format!("cut {i}: {e}"))?;
    }
    Ok(states)
}

/// The next mount, and one command.
fn judge_left(engine: &Arc<Engine>, path: &Path, bytes: &[u8]) -> Result<(), String> {
    let folder = Folder::open(path, engine, FolderOptions::default()).map_err(|e| e.to_string())?;
    names::sweep(folder.dir(), path);
    let content = || {
        let open = folder.open_image("r", true).map_err(|e| format!("does not open: {e}"))?;
        let found = open.image().read_at(0, bytes.len() + 1).map_err(|e| e.to_string())?;
        if *found == *bytes { Ok(()) } else { Err("holds something else".to_owned()) }
    };
    content()?;
    let served = folder.entries().len();
    folder.work("r", &Work::Finish, &Progress::new()).map_err(|e| format!("cannot be finished: {e}"))?;
    content()?;
    folder.close_all();
    drop(folder);
    let left: Vec<String> = names_in(path).into_iter().map(|(name, _)| name).collect();
    match left.iter().filter(|name| *name != ".ploopfs").collect::<Vec<_>>()[..] {
        [only] if only == "r.raw" && served == 1 => Ok(()),
        _ => Err(format!("{left:?} are left, {served} of them were served")),
    }
}
