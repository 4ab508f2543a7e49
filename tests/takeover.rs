//! Deaths of a daemon, without processes: at any host call the file and the ledger are what they are, and a successor opens
//! the image from them. Every write and discard that was acknowledged is there, the image goes on, and is sound.

#[path = "common/crash/mod.rs"]
mod crash;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crash::campaign::Live;
use crash::judge::judge_world;
use crash::power::Rng;
use crash::watched::{HostCall, Watch, Watched};
use crash::world::{self, Host, Record, World};
use ploopfs::format::header::{Header, Version};
use ploopfs::image::check::check;
use ploopfs::image::level::read_header;
use ploopfs::io::file::HostFile;
use ploopfs::io::memory::MemoryFile;
use ploopfs::ledger::{Book, Ledger, Sizes, format};
use ploopfs::vdisk::{Engine, Image, Layout, Level, Options, rescue};

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
    Image::go_on(engine, "vm1", levels, &book, rescued).map_err(say)
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
        let image = Image::go_on(&engine, "vm1", vec![level], &book, rescued).expect("it is read");
        looks(&image, &death.acknowledged, &(0..0)).expect("as it was");
        image.write_at(0, &[1; 512]).expect_err("read-only");
        image.flush_now().expect_err("what was written may be lost");
        assert!(file.to_bytes() == before, "nothing is written");
    }
}

/// A host file that is full: nothing is written, not even where there was space.
#[derive(Default)]
struct Full(std::sync::atomic::AtomicBool);

impl Watch for Arc<Full> {
    fn call(&self, call: HostCall<'_>, file: &dyn HostFile) -> io::Result<usize> {
        match call {
            HostCall::Write { .. } if self.0.load(Ordering::SeqCst) => {
                Err(io::Error::from_raw_os_error(libc::ENOSPC))
            }
            call => call.carry_out(file),
        }
    }
}

/// A takeover on a full host, another one there, and a third when there is space again.
fn succeed_on_a_full_host(engine: &Arc<Engine>, death: &Death) -> Result<(), String> {
    let file = Arc::new(MemoryFile::from_bytes(&death.bytes));
    let full = Arc::new(Full::default());
    full.0.store(true, Ordering::SeqCst);
    let (mut memory, mut model) = (copy(&death.memory), death.acknowledged.clone());
    let mut images = Vec::new();
    for round in 0..3 {
        let ledger = Arc::new(Ledger::attach(Box::new(memory.clone())).map_err(|e| e.to_string())?);
        if !ledger.found().nonsense.is_empty() || ledger.found().images.iter().any(|i| i.nonsense.is_some()) {
            return Err(format!("round {round} leaves nonsense: {:?}", ledger.found()));
        }
        let host = Arc::new(Watched { file: file.clone() as Arc<dyn HostFile>, watch: full.clone() });
        if round == 2 {
            full.0.store(false, Ordering::SeqCst);
        }
        let image = open(engine, &ledger, death.base.as_deref(), host)?;
        looks(&image, &model, &death.under_way).map_err(|what| format!("in round {round} {what}"))?;
        if round < 2 {
            // What the dead one does in its ledger from here on is not seen.
            memory = copy(&memory);
            images.push(image);
            continue;
        }
        for cluster in [5, 1015, 2899] {
            image.write_at(cluster * CLUSTER, &[251; CLUSTER as usize]).map_err(|e| e.to_string())?;
            model.insert(cluster, vec![251; CLUSTER as usize]);
        }
        looks(&image, &model, &death.under_way)?;
        image.close().map_err(|e| e.to_string())?;
        image.leave_book();
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("vm1.hds");
    std::fs::write(&path, file.to_bytes()).expect("written");
    let report = check(&path).map_err(|e| e.to_string())?;
    if report.errors > 0 || report.in_use {
        return Err(format!("the file is not sound: {report:?}"));
    }
    Ok(())
}

#[test]
fn entries_that_a_full_host_does_not_take_are_read_and_written_when_there_is_space() {
    let _alone = alone();
    let (engine, mut deaths) = (engine(), 0);
    for seed in 1..=16 {
        for death in history(&engine, seed).expect("nothing fails") {
            succeed_on_a_full_host(&engine, &death)
                .unwrap_or_else(|what| panic!("history {seed}, death {deaths}: {what}"));
            deaths += 1;
        }
    }
    println!("DEATHS {deaths}");
}

/// The daemon lives for some calls more.
struct Mortal {
    /// Calls left that change or sync something; protects what is copied at the last one.
    left: Mutex<(u64, Option<Memory>)>,
    memory: Memory,
}

impl Mortal {
    fn dies(&self) {
        let mut left = self.left.lock().expect("no panic");
        left.0 = 0;
        left.1.get_or_insert_with(|| copy(&self.memory));
    }
}

impl Watch for Arc<Mortal> {
    fn call(&self, call: HostCall<'_>, file: &dyn HostFile) -> io::Result<usize> {
        let reads = matches!(call, HostCall::Read { .. } | HostCall::ReadNowait { .. });
        // Held across the call: what other threads enter meanwhile comes behind it.
        let mut left = self.left.lock().expect("no panic");
        if left.0 == 0 {
            left.1.get_or_insert_with(|| copy(&self.memory));
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        left.0 -= u64::from(!reads);
        call.carry_out(file)
    }
}

/// Sectors of the disk that a history with power cuts uses: those of three BAT pages would make too many states.
const SMALL: u64 = 24;

/// A daemon dies, its successor, too, perhaps inside of its takeover, and so on; from the first death on, the power fails at
/// every host call. Returns how many states were judged.
fn power_cuts(engine: &Arc<Engine>, seed: u64) -> Result<usize, String> {
    let sectors = (CLUSTER / 512) as usize;
    let header = Header::new(Version::V2, SMALL * CLUSTER, CLUSTER).expect("a legal size");
    let files = vec![world::empty(header, false)];
    let record = Record::new(
        World::new(files, vec![vec![0]; SMALL as usize * sectors]),
        Host { every: 1, ..Host::default() },
    );
    let (mut random, mut memory) = (Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1), memory());
    let (mut stamp, mut judged, mut images, mut resent) = (0, 0, Vec::new(), None);
    for life in 0..4u64 {
        let ledger = Arc::new(Ledger::attach(Box::new(memory.clone())).map_err(|e| e.to_string())?);
        if life == 0 {
            ledger.number(1, "vm1".as_ref(), OWNER);
        }
        let calls = if life == 3 { u64::MAX } else { random.below(if life == 0 { 40 } else { 14 }) + 1 };
        let mortal = Arc::new(Mortal { left: Mutex::new((calls, None)), memory: memory.clone() });
        let recorded = record.level(0).file;
        let host = Arc::new(Watched { file: recorded, watch: mortal.clone() });
        // One that dies inside of it opens nothing.
        let opened = open(engine, &ledger, None, host);
        let dead = || mortal.left.lock().expect("no panic").0 == 0;
        if let Err(what) = &opened
            && !dead()
        {
            return Err(format!("life {life}: {what}"));
        }
        if let Ok(image) = &opened {
            let live = Live { record: &record, image };
            for _ in 0..if life == 3 { 12 } else { 40 } {
                // What was not answered is sent again.
                let (first, act, stamp) = resent.take().unwrap_or_else(|| {
                    stamp += 1;
                    (random.below(SMALL) as usize * sectors, random.below(32), stamp)
                });
                let done = match act {
                    0..12 => live.write(first, sectors, stamp, false),
                    12..16 => live.write(first + 1, 2, stamp, false),
                    16..20 => live.write(first, 1, stamp, true),
                    20..25 => live.discard(first, sectors),
                    25..31 => live.flush(),
                    _ if life < 3 => {
                        mortal.dies();
                        break;
                    }
                    _ => Ok(()),
                };
                match done {
                    Err(_) if dead() => {
                        resent = Some((first, act, stamp));
                        break;
                    }
                    done => done.map_err(|e| format!("life {life}: {e}"))?,
                }
            }
            if life == 3 {
                image.close().map_err(|e| e.to_string())?;
            }
        }
        mortal.dies();
        memory = mortal.left.lock().expect("no panic").1.take().expect("it is dead");
        images.push(opened);
        let mut rng = Rng(seed);
        let cuts = record.take_cuts();
        // Before the first death it is a history as any other (crash_enumerate.rs).
        for cut in cuts.iter().filter(|_| life > 0) {
            for _ in 0..3 {
                judge_world(engine, cut, &cut.left(&mut rng))
                    .map_err(|e| format!("seed {seed}, life {life}: {e}"))?;
                judged += 1;
            }
        }
    }
    Ok(judged)
}

#[test]
fn a_power_cut_during_and_after_takeovers_leaves_what_was_synced() {
    let _alone = alone();
    let (engine, long) = (engine(), std::env::var_os("PLOOPFS_LONG").is_some());
    let mut judged = 0;
    for seed in 1..=if long { 3000 } else { 10 } {
        judged += power_cuts(&engine, seed).unwrap_or_else(|what| panic!("{what}"));
    }
    println!("STATES {judged}");
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

    #[test]
    fn l5_a_failure_that_no_successor_hears_of_is_caught() {
        let _alone = alone();
        let _broken = Broken::new(Rule::L5);
        let engine = engine();
        let deaths = history(&engine, 5).expect("nothing fails");
        let death = deaths.iter().rfind(|death| !death.acknowledged.is_empty()).expect("a death");
        let (file, memory) = (Arc::new(MemoryFile::from_bytes(&death.bytes)), copy(&death.memory));
        for (heard, failed) in [(Some(libc::EIO), true), (None, false)] {
            let ledger = Arc::new(Ledger::attach(Box::new(memory.clone())).expect("a ledger"));
            let book = Arc::new(Book::of(&ledger, 1, OWNER, FILE));
            let level = level(file.clone());
            let sync = || heard.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)));
            let rescued = rescue(&level, &book, sync).expect("it makes sense");
            let image = Image::go_on(&engine, "vm1", vec![level], &book, rescued).expect("it is read");
            // The second one should know, and does not.
            assert_eq!(image.failure().is_some(), failed);
        }
    }

    #[test]
    fn r3_entries_that_are_written_before_their_data_is_synced_are_caught_at_a_takeover() {
        let _alone = alone();
        let _broken = Broken::new(Rule::R3);
        let engine = engine();
        let what = (1..=10).try_for_each(|seed| power_cuts(&engine, seed).map(drop));
        println!("R3 broken: {}", what.expect_err("it is broken, and nothing shows it"));
    }
}
