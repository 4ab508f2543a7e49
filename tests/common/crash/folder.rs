//! A real folder whose names are recorded with its files: live operations over several files, cut at every step of
//! theirs (`ploopfs::rules::Step`) and at every sync of a delta. What a cut leaves is laid into another folder and opened
//! there as any image is.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::DirEntryExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use ploopfs::format::descriptor::Descriptor;
use ploopfs::format::header::{Header, Version};
use ploopfs::image::diff;
use ploopfs::image::layers::{Direct, Layers, Opened, Opener};
use ploopfs::image::switch::switch;
use ploopfs::io::lock::Use;
use ploopfs::io::real::Access;
use ploopfs::progress::Progress;
use ploopfs::rules::{Step, Watching};
use ploopfs::vdisk::live::{Work, carry_out, carry_out_before_close, lower};
use ploopfs::vdisk::{Engine, Image, Level};

use super::campaign::Live;
use super::judge::{engine, sound, values};
use super::power::{Change, Keep, Rng, SECTOR, Unsynced, collapse};
use super::restored;
use super::world::{Host, Record, World, empty, lock};

const XML: &str = "DiskDescriptor.xml";
/// The base where it is a raw file.
const RAW: &str = "vm.raw";
/// As in the enumerator: a growth by four clusters moves data out of the BAT's way.
const CLUSTER: u64 = 1024;
const DISK: usize = 477;
const EXTEND: u64 = 2 * CLUSTER;
/// No round begins by itself.
const NEVER: u64 = 1_000_000;

/// Which number of the world each file of the real folder has.
#[derive(Default)]
struct Ids {
    by_inode: HashMap<u64, usize>,
    names: BTreeMap<String, usize>,
    /// Their content is recorded call by call, or was synced.
    known: BTreeSet<usize>,
}

/// The real folder and its record.
struct Site {
    path: PathBuf,
    record: Arc<Record>,
    ids: Mutex<Ids>,
}

impl Site {
    /// Lays `world`, of which everything is durable, into the empty folder `path`.
    fn new(path: &Path, world: &World) -> Arc<Site> {
        lay(path, &world.folder.durable, |n| world.files[n].durable.clone());
        let mut ids = Ids { known: (0..world.files.len()).collect(), ..Ids::default() };
        for (name, inode) in scan(path) {
            let number = world.folder.durable[&name];
            ids.by_inode.insert(inode, number);
            ids.names.insert(name, number);
        }
        let record = Record::new(world.clone(), Host::default());
        Arc::new(Site { path: path.to_owned(), record, ids: Mutex::new(ids) })
    }

    /// Something happened to the folder: what the world is from then on, and a cut.
    fn look(&self, step: Step<'_>) {
        let mut ids = lock(&self.ids);
        let mut world = lock(&self.record.world);
        self.look_at_names(&mut ids, &mut world);
        match step {
            Step::FileSynced(path) if path.parent() == Some(&self.path) => {
                let name = path.file_name().and_then(|name| name.to_str()).expect("a name of ours");
                let number = ids.names[name];
                world.files[number] = Unsynced::new(std::fs::read(path).expect("a file of ours"));
                ids.known.insert(number);
            }
            Step::FolderSynced(path) if path == self.path => {
                // The cut just before a sync is the one that loses most.
                self.record.cut(&world);
                world.folder.sync();
            }
            _ => {}
        }
        self.record.cut(&world);
    }

    fn look_at_names(&self, ids: &mut Ids, world: &mut World) {
        let mut names = BTreeMap::new();
        let mut by_inode = HashMap::new();
        for (name, inode) in scan(&self.path) {
            let number = *ids.by_inode.get(&inode).unwrap_or(&world.files.len());
            if number == world.files.len() {
                world.files.push(Unsynced::default());
            }
            if !ids.known.contains(&number) {
                // Written, but not synced: all of it may be lost.
                let data = std::fs::read(self.path.join(&name)).expect("a file of ours");
                world.files[number] = Unsynced::default();
                world.files[number].push(Change::SetLen(data.len() as u64));
                world.files[number].push(Change::Write { at: 0, data });
            }
            by_inode.insert(inode, number);
            names.insert(name, number);
        }
        let gone =
            ids.names.keys().filter(|name| !names.contains_key(*name)).map(|name| (name.clone(), None));
        let new = names.iter().filter(|(name, number)| ids.names.get(*name) != Some(*number));
        let change: Vec<_> = gone.chain(new.map(|(name, number)| (name.clone(), Some(*number)))).collect();
        if !change.is_empty() {
            world.folder.pending.push(change);
        }
        ids.names = names;
        ids.by_inode = by_inode;
    }
}

/// Opens the deltas of a site so that their changes are recorded.
struct Recording(Arc<Site>);

impl Opener for Recording {
    fn open(&self, dir: BorrowedFd<'_>, file: &Path, shown: &Path, used: Use) -> ploopfs::Result<Opened> {
        let opened = Direct(Access::ReadWrite).open(dir, file, shown, used)?;
        let mut ids = lock(&self.0.ids);
        let number = ids.names[file.to_str().expect("a name of ours")];
        ids.known.insert(number);
        Ok(Opened { file: self.0.record.recorded(number, opened.file), ..opened })
    }
}

/// Names and inodes of a folder, without lock files.
fn scan(path: &Path) -> Vec<(String, u64)> {
    let entries = std::fs::read_dir(path).expect("a folder of ours").map(|entry| entry.expect("an entry"));
    let name = |entry: &std::fs::DirEntry| entry.file_name().into_string().expect("names of ours are UTF-8");
    entries.map(|entry| (name(&entry), entry.ino())).filter(|(name, _)| !name.ends_with(".lck")).collect()
}

/// Makes `path` a folder with these names and nothing else.
fn lay(path: &Path, names: &BTreeMap<String, usize>, content: impl Fn(usize) -> Vec<u8>) {
    if path.exists() {
        std::fs::remove_dir_all(path).expect("a folder of ours");
    }
    std::fs::create_dir(path).expect("a folder of ours");
    for (name, number) in names {
        std::fs::write(path.join(name), content(*number)).expect("a file of ours");
    }
}

/// What is done to the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Part of one cluster and all of the next.
    Write,
    Fsync,
    Snapshot,
    DeleteOldest,
    DeleteNewest,
    /// Back to the newest snapshot.
    Switch,
    Grow,
    /// An incremental backup is restored above the newest snapshot, where the disk did not change since.
    Restore,
}

/// All of them.
pub const OPS: [Op; 8] = [
    Op::Write,
    Op::Fsync,
    Op::Snapshot,
    Op::DeleteOldest,
    Op::DeleteNewest,
    Op::Switch,
    Op::Grow,
    Op::Restore,
];

/// An image of a site while a history runs on it.
struct Run {
    site: Arc<Site>,
    engine: Arc<Engine>,
    open: Option<(Arc<Layers>, Arc<Image>)>,
    stamp: u32,
    /// A snapshot is deleted as at rest: what is done best with a closed disk is done then.
    closes: bool,
    _watching: Watching,
}

impl Run {
    fn start(engine: &Arc<Engine>, path: &Path, world: &World) -> Result<Run, String> {
        let stamp = 1000 * (1 + world.folder.snapshots.len() as u32);
        let site = Site::new(path, world);
        let seen = site.clone();
        let _watching = Watching::new(move |step| seen.look(step));
        let closes = world.folder.durable.contains_key(RAW);
        let mut run = Run { site, engine: engine.clone(), open: None, stamp, closes, _watching };
        run.open()?;
        Ok(run)
    }

    fn layers(&self) -> Result<(Arc<Layers>, Vec<Level>), String> {
        let dir = File::open(&self.site.path).map_err(|e| e.to_string())?;
        let opener = Arc::new(Recording(self.site.clone()));
        Layers::open(dir.into(), &self.site.path, opener, false).map_err(|e| format!("does not open: {e}"))
    }

    fn open(&mut self) -> Result<(), String> {
        let (layers, levels) = self.layers()?;
        let image = Image::open(&self.engine, "folder", levels).map_err(|e| e.to_string())?;
        image.make_writable().map_err(|e| e.to_string())?;
        self.open = Some((layers, image));
        Ok(())
    }

    fn close(&mut self) -> Result<(), String> {
        if let Some((_, image)) = self.open.take() {
            image.close().map_err(|e| format!("cannot be closed: {e}"))?;
            lock(&self.site.record.world).allowed.iter_mut().for_each(collapse);
        }
        Ok(())
    }

    /// The oldest or the newest snapshot.
    fn label(&self, newest: bool) -> Option<String> {
        let world = lock(&self.site.record.world);
        let mut labels = world.folder.snapshots.keys();
        if newest { labels.next_back().cloned() } else { labels.next().cloned() }
    }

    /// From now on the snapshot must be there, or need not.
    fn must(&self, label: &str, must: bool) {
        if let Some(snapshot) = lock(&self.site.record.world).folder.snapshots.get_mut(label) {
            snapshot.1 = must;
        }
    }

    fn work(&self, work: &Work) -> Result<(), String> {
        let (layers, image) = self.open.as_ref().ok_or("closed")?;
        carry_out(image, Some(layers), work, &Progress::new()).map(drop).map_err(|e| format!("{work:?}: {e}"))
    }

    fn work_and_close(&mut self, work: &Work) -> Result<(), String> {
        let (layers, image) = self.open.as_ref().ok_or("closed")?;
        let layers = layers.clone();
        let done = carry_out_before_close(image, Some(&layers), work, &Progress::new());
        done.map_err(|e| format!("{work:?}: {e}"))?;
        self.close()?;
        lower::finish(&layers, &Progress::new(), &|| true).map_err(|e| format!("{work:?}: {e}"))?;
        drop(layers);
        self.open()
    }

    fn carry_out(&mut self, op: Op) -> Result<(), String> {
        let record = self.site.record.clone();
        match op {
            Op::Write | Op::Fsync | Op::Grow => {
                let (_, image) = self.open.as_ref().ok_or("closed")?;
                let live = Live { record: &record, image };
                self.stamp += 1;
                let done = match op {
                    Op::Write => live.write(1, 3, self.stamp, false),
                    Op::Fsync => live.flush(),
                    _ => {
                        let size = (image.size() + 4 * CLUSTER).next_multiple_of(CLUSTER);
                        lock(&record.world).allowed.resize(size as usize / SECTOR, vec![0]);
                        return self.work(&Work::Resize { size });
                    }
                };
                done.map_err(|e| e.to_string())
            }
            Op::Snapshot => {
                self.stamp += 1;
                let label = format!("s{}", self.stamp);
                let now = {
                    let mut world = lock(&record.world);
                    let last = |values: &Vec<u32>| *values.last().expect("a value");
                    let now: Vec<u32> = world.allowed.iter().map(last).collect();
                    world.folder.snapshots.insert(label.clone(), (now.clone(), false));
                    now
                };
                self.work(&Work::Snapshot { label: Some(label.clone()) })?;
                self.must(&label, true);
                lock(&record.world).allowed = now.into_iter().map(|value| vec![value]).collect();
                Ok(())
            }
            Op::DeleteOldest | Op::DeleteNewest => {
                let Some(label) = self.label(op == Op::DeleteNewest) else { return Ok(()) };
                self.must(&label, false);
                let work = Work::Delete { snapshot: label.clone() };
                if self.closes {
                    self.work_and_close(&work)?
                } else {
                    self.work(&work)?
                }
                lock(&record.world).folder.snapshots.remove(&label);
                Ok(())
            }
            Op::Switch => {
                let Some(label) = self.label(true) else { return Ok(()) };
                self.close()?;
                let then = {
                    let mut world = lock(&record.world);
                    let then = world.folder.snapshots[&label].0.clone();
                    for (i, values) in world.allowed.iter_mut().enumerate() {
                        values.push(then.get(i).copied().unwrap_or(0));
                    }
                    then
                };
                let (layers, levels) = self.layers()?;
                drop(levels);
                let guid = layers.store().find_snapshot(&label).map_err(|e| e.to_string())?;
                switch(&layers, guid).map_err(|e| format!("switch: {e}"))?;
                drop(layers);
                let mut world = lock(&record.world);
                for (i, values) in world.allowed.iter_mut().enumerate() {
                    *values = vec![then.get(i).copied().unwrap_or(0)];
                }
                drop(world);
                self.open()
            }
            Op::Restore => self.restore(),
        }
    }

    fn restore(&mut self) -> Result<(), String> {
        let Some(base) = self.label(true) else { return Ok(()) };
        self.close()?;
        let (layers, levels) = self.layers()?;
        let top = levels.last().ok_or("no top")?;
        if diff::is_empty(top).map_err(|e| e.to_string())? {
            self.stamp += 1;
            let label = format!("s{}", self.stamp);
            let guid = layers.store().find_snapshot(&base).map_err(|e| e.to_string())?;
            let now = {
                let mut world = lock(&self.site.record.world);
                let mut now = world.folder.snapshots[&base].0.clone();
                restored::change(&mut now, self.stamp);
                for (i, values) in world.allowed.iter_mut().enumerate() {
                    values.push(now.get(i).copied().unwrap_or(0));
                }
                world.folder.snapshots.insert(label.clone(), (now.clone(), false));
                now
            };
            let stream = restored::stream(guid, &label, now.len() as u64 * 512, self.stamp);
            restored::apply(stream, &layers, &levels)?;
            self.must(&label, true);
            let mut world = lock(&self.site.record.world);
            world.allowed = now.into_iter().map(|value| vec![value]).collect();
        }
        drop((levels, layers));
        self.open()
    }

    /// Closes it, all of it durable; what is there now.
    fn world(mut self) -> Result<World, String> {
        self.close()?;
        let mut world = lock(&self.site.record.world).clone();
        world.files.iter_mut().for_each(Unsynced::sync_all);
        world.folder.sync();
        Ok(world)
    }
}

/// Judges what is in the folder `path`: the live disk and its snapshots, now and when interrupted merges are done;
/// `closed`: as at rest.
fn judge(engine: &Arc<Engine>, path: &Path, world: &World, closed: bool) -> Result<(), String> {
    let dir = File::open(path).map_err(|e| e.to_string())?;
    let opener = Arc::new(Direct(Access::ReadWrite));
    let opened = Layers::open(dir.into(), path, opener, false);
    let (layers, levels) = opened.map_err(|e| format!("does not open: {e}"))?;
    let deltas = levels.iter().filter(|level| level.geometry().is_some());
    let deltas = deltas.map(|level| level.path.clone()).collect::<Vec<_>>();
    for file in deltas {
        sound(&std::fs::read(&file).map_err(|e| e.to_string())?)
            .map_err(|e| format!("{}: {e}", file.display()))?;
    }
    let image = Image::open(engine, "state", levels).map_err(|e| format!("does not open: {e}"))?;
    image.make_writable().map_err(|e| format!("cannot be written: {e}"))?;
    let allowed = |sector: usize, value| world.allowed.get(sector).is_none_or(|a| a.contains(&value));
    values(&image, allowed).map_err(|e| format!("live: {e}"))?;
    let mut found = BTreeSet::new();
    let guids: Vec<_> = layers.store().snapshots().collect();
    for guid in guids {
        let label = layers.store().labels().name(guid);
        let Some((then, _)) = world.folder.snapshots.get(&label) else {
            return Err(format!("snapshot {label} should not be there"));
        };
        let chain = layers.chain(guid).map_err(|e| format!("snapshot {label}: {e}"))?;
        let image = Image::open(engine, "state", chain).map_err(|e| format!("snapshot {label}: {e}"))?;
        values(&image, |sector, value| then.get(sector) == Some(&value))
            .map_err(|e| format!("snapshot {label}: {e}"))?;
        found.insert(label);
    }
    let missing = world.folder.snapshots.iter().find(|(label, (_, must))| *must && !found.contains(*label));
    if let Some((label, _)) = missing {
        return Err(format!("snapshot {label} is gone"));
    }
    let unfinished = || !layers.store().descriptor().unfinished().is_empty();
    let cannot = |e| format!("an interrupted merge cannot be finished: {e}");
    let shown = |image: &Arc<Image>| {
        values(image, allowed).map_err(|e| format!("live, after the merge was finished: {e}"))
    };
    if closed && unfinished() {
        carry_out_before_close(&image, Some(&layers), &Work::Finish, &Progress::new()).map_err(cannot)?;
        image.close().map_err(|e| format!("cannot be closed: {e}"))?;
        lower::finish(&layers, &Progress::new(), &|| true).map_err(cannot)?;
        let levels = layers.live_chain().map_err(cannot)?;
        let image = Image::open(engine, "state", levels).map_err(cannot)?;
        shown(&image)?;
        image.close().map_err(|e| format!("cannot be closed: {e}"))?;
    } else if unfinished() {
        carry_out(&image, Some(&layers), &Work::Finish, &Progress::new()).map_err(cannot)?;
        shown(&image)?;
    }
    if unfinished() {
        return Err("a deleted snapshot stays".into());
    }
    image.close().map_err(|e| format!("cannot be closed: {e}"))?;
    let left = scan(path)
        .into_iter()
        .find(|(name, _)| name.starts_with("vm.") && !layers.store().descriptor().names(name));
    left.map_or(Ok(()), |(name, _)| Err(format!("{name} is left over")))
}

/// What a cut may leave of names and contents: the names one by one, each with nothing and with any of the content.
fn judge_states(engine: &Arc<Engine>, path: &Path, cut: &World, rng: &mut Rng) -> Result<u64, String> {
    let n = cut.folder.pending.len();
    let mut kept: BTreeSet<Vec<bool>> = BTreeSet::new();
    kept.insert(vec![false; n]);
    kept.insert(vec![true; n]);
    for one in 0..n {
        kept.insert((0..n).map(|i| i == one).collect());
        kept.insert((0..n).map(|i| i != one).collect());
    }
    let mut states = 0;
    for names in &kept {
        let names = cut.folder.state(|n| names[n]);
        let unsynced = names.values().any(|n| cut.files[*n].pending() > 0);
        for keep in [Keep::Nothing, Keep::Random].into_iter().take(1 + usize::from(unsynced)) {
            let left: Vec<Vec<u8>> = cut.files.iter().map(|file| file.state(keep, rng)).collect();
            lay(path, &names, |n| left[n].clone());
            states += 1;
            judge(engine, path, cut, states % 2 == 0).map_err(|e| {
                let lost = cut.folder.pending.clone();
                format!("{e}; left {:?} of {:?} and {lost:?}", names.keys(), cut.folder.durable.keys())
            })?;
        }
    }
    Ok(states)
}

/// An image in a folder, on which two snapshots stand; `raw`: over a raw file.
fn prepared(engine: &Arc<Engine>, path: &Path, raw: bool) -> Result<World, String> {
    let header = Header::new(Version::V2, DISK as u64 * 512, CLUSTER).expect("a legal size");
    let (file, base) = if raw { (RAW, vec![0; DISK * 512]) } else { ("vm.hds", empty(header, false)) };
    let xml = Descriptor::new(header.disk_sectors, header.cluster_sectors, file, raw).to_xml();
    let mut world = World::new(vec![base, xml], vec![vec![0]; DISK]);
    world.folder.durable = [(file.to_owned(), 0), (XML.to_owned(), 1)].into();
    let mut run = Run::start(engine, path, &world)?;
    let write = |run: &Run, at, n, value| {
        let (_, image) = run.open.as_ref().ok_or("closed")?;
        let live = Live { record: &run.site.record, image };
        live.write(at, n, value, false).map_err(|e| e.to_string())
    };
    write(&run, 0, 10, 1)?;
    write(&run, DISK - 1, 1, 2)?;
    run.carry_out(Op::Snapshot)?;
    write(&run, 2, 1, 3)?;
    run.carry_out(Op::Snapshot)?;
    write(&run, 7, 1, 4)?;
    run.world()
}

/// Every history of up to `longest` of the operations `of`, in folders under `scratch`; returns the histories and the
/// states judged.
pub fn enumerate(scratch: &Path, of: &[Op], longest: usize) -> Result<(u64, u64), String> {
    enumerate_over(scratch, of, longest, false)
}

/// The same over a raw file, and with a disk that is closed when a snapshot is deleted.
pub fn enumerate_raw(scratch: &Path, of: &[Op], longest: usize) -> Result<(u64, u64), String> {
    enumerate_over(scratch, of, longest, true)
}

fn enumerate_over(scratch: &Path, of: &[Op], longest: usize, raw: bool) -> Result<(u64, u64), String> {
    let engine = engine(NEVER, EXTEND);
    let (site, state) = (scratch.join("site"), scratch.join("state"));
    let start = prepared(&engine, &site, raw)?;
    let mut all: Vec<Vec<Op>> = Vec::new();
    let mut last = vec![Vec::new()];
    for _ in 0..longest {
        last =
            last.iter().flat_map(|ops: &Vec<Op>| of.iter().map(|op| [&ops[..], &[*op]].concat())).collect();
        all.extend(last.iter().cloned());
    }
    let mut states = 0;
    for ops in &all {
        let mut rng = Rng(ops.iter().fold(1, |seed, op| seed * 16 + *op as u64));
        let mut run = Run::start(&engine, &site, &start)?;
        for (i, op) in ops.iter().enumerate() {
            if i + 1 == ops.len() {
                // What came before is the history without this operation.
                run.site.record.take_cuts();
            }
            run.carry_out(*op).map_err(|e| format!("{ops:?}: {e}"))?;
        }
        run.close()?;
        let cuts = run.site.record.take_cuts();
        drop(run); // The judge's steps are not the history's.
        for (i, cut) in cuts.iter().enumerate() {
            states +=
                judge_states(&engine, &state, cut, &mut rng).map_err(|e| format!("{ops:?}, cut {i}: {e}"))?;
        }
    }
    Ok((all.len() as u64, states))
}

/// A clone that shares a file with its origin (a hard link) still has what it had when the origin merges that file away:
/// below another snapshot, and then below the top.
pub fn clone_and_merge(scratch: &Path) -> Result<(), String> {
    let engine = engine(NEVER, EXTEND);
    let (site, clone) = (scratch.join("site"), scratch.join("clone"));
    let start = prepared(&engine, &site, false)?;
    let mut run = Run::start(&engine, &site, &start)?;
    let label = run.label(false).ok_or("there is no snapshot")?;
    let (then, _) = start.folder.snapshots[&label].clone();
    run.work(&Work::Clone { snapshot: Some(label), to: vec![clone.clone()], copy: false })?;
    for (deleted, op) in [Op::DeleteOldest, Op::DeleteNewest].into_iter().enumerate() {
        run.carry_out(op)?;
        run.close()?; // A file has one user at a time.
        let dir = File::open(&clone).map_err(|e| e.to_string())?;
        let opener = Arc::new(Direct(Access::ReadOnly));
        let opened = Layers::open(dir.into(), &clone, opener, false);
        let (layers, levels) = opened.map_err(|e| format!("the clone does not open: {e}"))?;
        let image = Image::open(&engine, "clone", levels).map_err(|e| format!("the clone: {e}"))?;
        values(&image, |sector, value| then.get(sector) == Some(&value))
            .map_err(|e| format!("the clone, {} merges later: {e}", deleted + 1))?;
        drop((image, layers));
        run.open()?;
    }
    run.close()
}
