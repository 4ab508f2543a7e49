//! Deaths of a daemon, without processes: at any host call the file and the ledger are what they are, and a successor opens
//! the image from them. Every write and discard that was acknowledged is there, the image goes on, and is sound.

#[path = "common/crash/watched.rs"]
#[allow(dead_code)] // another part of it is another test's
mod watched;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ploopfs::format::header::{Header, Version};
use ploopfs::image::check::check;
use ploopfs::image::level::read_header;
use ploopfs::io::file::HostFile;
use ploopfs::io::memory::MemoryFile;
use ploopfs::ledger::{Book, Ledger, Sizes, format};
use ploopfs::vdisk::{Engine, Image, Layout, Level, Options, rescue};
use watched::{HostCall, Watch, Watched};

const CLUSTER: u64 = 4096;
/// Three BAT pages.
const CLUSTERS: u64 = 2900;
const FILE: (u64, u64) = (1, 7);
/// Its folder, where it is a layered image's.
const OWNER: (u64, u64) = (1, 6);
const SIZES: Sizes = Sizes { numbers: 2, opens: 2, images: 2, pages: 6, snapshots: 2 };

type Memory = Arc<Vec<AtomicU64>>;
/// What was acknowledged, by cluster; the others are zero.
type Model = BTreeMap<u64, Vec<u8>>;

/// The switch of `rules` is the process's.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn engine() -> Arc<Engine> {
    // No entry reaches the file but by a flush.
    let options =
        Options { runners: 2, bat_delay: Duration::from_secs(600), extend: 64 << 10, ..Options::default() };
    Engine::new(options, Box::new(|_| ()))
}

fn memory() -> Memory {
    let bytes = SIZES.bytes().expect("a small ledger");
    let memory: Memory = Arc::new((0..bytes / 8).map(|_| AtomicU64::new(0)).collect());
    format(&*memory, SIZES).expect("room");
    memory
}

fn copy(memory: &Memory) -> Memory {
    Arc::new(memory.iter().map(|word| AtomicU64::new(word.load(Ordering::SeqCst))).collect())
}

/// xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// What a death leaves.
struct Death {
    /// Of the level below, where there is one.
    base: Option<Vec<u8>>,
    bytes: Vec<u8>,
    memory: Memory,
    acknowledged: Model,
    /// Clusters that the request under way may have changed.
    under_way: std::ops::Range<u64>,
}

/// Sees host calls, and keeps what a death at some of them would leave.
struct Dying {
    base: Option<Vec<u8>>,
    file: Arc<MemoryFile>,
    memory: Memory,
    state: Mutex<State>,
}

struct State {
    random: Random,
    acknowledged: Model,
    under_way: std::ops::Range<u64>,
    deaths: Vec<Death>,
}

impl Dying {
    fn die(&self, state: &mut State) {
        state.deaths.push(Death {
            base: self.base.clone(),
            bytes: self.file.to_bytes(),
            memory: copy(&self.memory),
            acknowledged: state.acknowledged.clone(),
            under_way: state.under_way.clone(),
        });
    }
}

impl Watch for Arc<Dying> {
    fn call(&self, call: HostCall<'_>, file: &dyn HostFile) -> io::Result<usize> {
        let reads = matches!(call, HostCall::Read { .. } | HostCall::ReadNowait { .. });
        let mut state = self.state.lock().expect("no panic");
        if !reads && state.random.below(4) == 0 {
            self.die(&mut state);
        }
        drop(state);
        call.carry_out(file)
    }
}

fn level(file: Arc<dyn HostFile>) -> Level {
    let header = read_header(&*file, Path::new("vm1.hds")).expect("a header");
    Level { file, path: "vm1.hds".into(), layout: Layout::Ploop(header) }
}

/// Opens as a folder does: by what is left, where something is.
fn open(
    engine: &Arc<Engine>,
    ledger: &Arc<Ledger>,
    base: Option<&[u8]>,
    file: Arc<dyn HostFile>,
) -> Result<Arc<Image>, String> {
    let book = Arc::new(Book::of(ledger, 1, OWNER, FILE));
    let mut levels: Vec<Level> =
        base.iter().map(|bytes| level(Arc::new(MemoryFile::from_bytes(bytes)))).collect();
    let level = level(file);
    levels.push(level.clone());
    let say = |e: ploopfs::Error| e.to_string();
    if book.left().is_none() {
        let image = Image::open(engine, "vm1", levels).map_err(say)?;
        image.keep_in(&book);
        book.begin();
        image.make_writable().map_err(say)?;
        return Ok(image);
    }
    let rescued = rescue(&level, &book, || level.file.sync_data()).map_err(say)?;
    let image = Image::open_beside(engine, "vm1", levels).map_err(say)?;
    image.keep_in(&book);
    image.go_on(&book, rescued).map_err(say)?;
    Ok(image)
}

fn place(random: &mut Random) -> u64 {
    [0, 1010, 1020, 2040, 2890][random.below(5) as usize] + random.below(8)
}

fn empty() -> Vec<u8> {
    let header = Header::new(Version::V2, CLUSTERS * CLUSTER, CLUSTER).expect("a legal size");
    let mut bytes = header.encode().to_vec();
    bytes.resize(header.geometry().first as usize, 0);
    bytes
}

/// A level with some clusters, and what they hold.
fn lower(engine: &Arc<Engine>) -> (Vec<u8>, Model) {
    let file = Arc::new(MemoryFile::from_bytes(&empty()));
    let image = Image::open(engine, "base", vec![level(file.clone())]).expect("opens");
    image.make_writable().expect("sound");
    let clusters = (2..6).chain(1018..1026).chain([2043, 2045, 2891]);
    let model: Model = clusters.map(|cluster| (cluster, vec![254; CLUSTER as usize])).collect();
    model.iter().for_each(|(cluster, data)| image.write_at(cluster * CLUSTER, data).expect("written"));
    image.close().expect("closes");
    (file.to_bytes(), model)
}

/// Some requests, by every second seed over a lower level; what deaths at their host calls leave.
fn history(engine: &Arc<Engine>, seed: u64) -> Result<Vec<Death>, String> {
    let (base, below) = seed.is_multiple_of(2).then(|| lower(engine)).unzip();
    let (file, memory) = (Arc::new(MemoryFile::from_bytes(&empty())), memory());
    let ledger = Arc::new(Ledger::attach(Box::new(memory.clone())).expect("a ledger"));
    ledger.number(1, "vm1".as_ref(), OWNER);
    let random = || Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let state = State {
        random: random(),
        acknowledged: below.unwrap_or_default(),
        under_way: 0..0,
        deaths: Vec::new(),
    };
    let dying = Arc::new(Dying { base: base.clone(), file: file.clone(), memory, state: Mutex::new(state) });
    let image = open(engine, &ledger, base.as_deref(), Arc::new(Watched { file, watch: dying.clone() }))?;
    let mut random = random();
    for step in 0..40u64 {
        let first = place(&mut random);
        let act = random.below(8);
        let count = if act == 5 { 1 + random.below(4) } else { 1 };
        let clusters = first..(first + count).min(CLUSTERS);
        dying.state.lock().expect("no panic").under_way = clusters.clone();
        let filled = vec![1 + (step + seed) as u8 % 250; CLUSTER as usize];
        let done = match act {
            0..5 => image.write_at(first * CLUSTER, &filled),
            5 => image.discard_at(first * CLUSTER, (clusters.end - first) * CLUSTER),
            _ => image.flush_now(),
        };
        done.map_err(|e| e.to_string())?;
        let mut state = dying.state.lock().expect("no panic");
        match act {
            0..5 => drop(state.acknowledged.insert(first, filled)),
            5 => state.acknowledged.retain(|cluster, _| !clusters.contains(cluster)),
            _ => {}
        }
        state.under_way = 0..0;
        if random.below(8) == 0 {
            dying.die(&mut state);
        }
    }
    image.close().map_err(|e| e.to_string())?;
    let mut state = dying.state.lock().expect("no panic");
    Ok(std::mem::take(&mut state.deaths))
}

fn looks(image: &Arc<Image>, model: &Model, but: &std::ops::Range<u64>) -> Result<(), String> {
    for cluster in [0, 1010, 1020, 2040, 2890].into_iter().flat_map(|first| first..(first + 12).min(CLUSTERS))
    {
        let found = image.read_at(cluster * CLUSTER, CLUSTER as usize).map_err(|e| e.to_string())?;
        let wanted = model.get(&cluster).map_or(0, |bytes| bytes[0]);
        if !but.contains(&cluster) && found.iter().any(|byte| *byte != wanted) {
            return Err(format!("cluster {cluster} holds {} and not {wanted}", found[0]));
        }
    }
    Ok(())
}

/// Takes over, and once more after another death; then a clean end.
fn succeed(engine: &Arc<Engine>, death: &Death) -> Result<(), String> {
    let file = Arc::new(MemoryFile::from_bytes(&death.bytes));
    let mut model = death.acknowledged.clone();
    let ledger = Arc::new(Ledger::attach(Box::new(death.memory.clone())).map_err(|e| e.to_string())?);
    let image = open(engine, &ledger, death.base.as_deref(), file.clone())?;
    looks(&image, &model, &death.under_way).map_err(|what| format!("after a takeover {what}"))?;
    for cluster in [5, 1015, 2899] {
        image.write_at(cluster * CLUSTER, &[251; CLUSTER as usize]).map_err(|e| e.to_string())?;
        model.insert(cluster, vec![251; CLUSTER as usize]);
    }
    // The dead one's image is not closed: its file is not looked at again.
    let (again, memory) = (Arc::new(MemoryFile::from_bytes(&file.to_bytes())), copy(&death.memory));
    let ledger = Arc::new(Ledger::attach(Box::new(memory.clone())).map_err(|e| e.to_string())?);
    let second = open(engine, &ledger, death.base.as_deref(), again.clone())?;
    looks(&second, &model, &death.under_way).map_err(|what| format!("after a second takeover {what}"))?;
    second.close().map_err(|e| e.to_string())?;
    second.leave_book();
    let left = Ledger::attach(Box::new(memory)).map_err(|e| e.to_string())?;
    if !left.found().images.is_empty() || !left.found().nonsense.is_empty() {
        return Err(format!("a clean close leaves {:?}", left.found()));
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("vm1.hds");
    std::fs::write(&path, again.to_bytes()).expect("written");
    let report = check(&path).map_err(|e| e.to_string())?;
    if report.errors > 0 || report.in_use {
        return Err(format!("the file is not sound: {report:?}"));
    }
    drop(image);
    Ok(())
}

fn campaign(histories: u64) -> Result<usize, String> {
    let (engine, mut deaths) = (engine(), 0);
    for seed in 1..=histories {
        for death in history(&engine, seed)? {
            succeed(&engine, &death).map_err(|what| format!("history {seed}, death {deaths}: {what}"))?;
            deaths += 1;
        }
    }
    Ok(deaths)
}

#[test]
fn what_was_acknowledged_is_there_after_a_death_at_any_host_call() {
    let _alone = alone();
    let long = std::env::var_os("PLOOPFS_LONG").is_some();
    match campaign(if long { 600 } else { 40 }) {
        Ok(deaths) => println!("DEATHS {deaths}"),
        Err(what) => panic!("{what}"),
    }
}

#[test]
fn an_image_whose_sync_failed_at_the_takeover_reads_as_it_was_and_is_not_written_any_more() {
    let _alone = alone();
    let engine = engine();
    let deaths = history(&engine, 5).expect("nothing fails");
    let death = deaths.iter().rfind(|death| death.under_way.is_empty() && !death.acknowledged.is_empty());
    let death = death.expect("a death between two requests");
    let (file, memory) = (Arc::new(MemoryFile::from_bytes(&death.bytes)), copy(&death.memory));
    // The second successor hears nothing, and knows of it all the same (L5).
    for heard in [Some(libc::EIO), None] {
        let before = file.to_bytes();
        let ledger = Arc::new(Ledger::attach(Box::new(memory.clone())).expect("a ledger"));
        let (book, host) = (Arc::new(Book::of(&ledger, 1, OWNER, FILE)), file.clone() as Arc<dyn HostFile>);
        let level = level(host);
        let sync = || heard.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)));
        let rescued = rescue(&level, &book, sync).expect("it makes sense");
        let image = Image::open_beside(&engine, "vm1", vec![level]).expect("opens");
        image.keep_in(&book);
        image.go_on(&book, rescued).expect("it is read");
        looks(&image, &death.acknowledged, &(0..0)).expect("as it was");
        image.write_at(0, &[1; 512]).expect_err("read-only");
        image.flush_now().expect_err("what was written may be lost");
        assert!(file.to_bytes() == before, "nothing is written");
    }
}

#[cfg(feature = "break-rules")]
mod broken {
    use super::*;
    use ploopfs::rules::{Broken, Rule};

    #[track_caller]
    fn found(rule: Rule) -> String {
        let _alone = alone();
        let _broken = Broken::new(rule);
        campaign(40).expect_err("the rule is broken, and nothing shows it")
    }

    #[test]
    fn l1_an_entry_that_is_in_memory_only_is_caught() {
        let what = found(Rule::L1);
        assert!(what.contains("holds 0"), "{what}");
    }

    #[test]
    fn l2_a_page_that_is_given_back_before_its_copy_is_durable_is_caught() {
        let what = found(Rule::L2);
        assert!(what.contains("holds 0") || what.contains("and not 0"), "{what}");
    }
}
