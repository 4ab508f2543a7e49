//! A repair that is cut off: by a power cut, which keeps or drops what was not synced, and by a host that fails. The next
//! repair finishes it, and nothing that was there is gone: neither of the disk, nor of what no entry refers to.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ploopfs::format::header::{Header, IN_USE, Version};
use ploopfs::image::paths::Located;
use ploopfs::image::repair::{HeaderFacts, RepairOutcome, repair_open};
use ploopfs::io::file::HostFile;
use ploopfs::io::memory::MemoryFile;

use crate::KIB;
use crate::common::damage::{Damage, Patient};
use crate::common::{Rng, memory_dir, number_from_env, temp_dir};
use crate::watched::{HostCall, Watch, Watched};

const SECTOR: usize = 512;

/// One change of the file, or the sync that makes all before it durable.
#[derive(Clone, Debug)]
enum Op {
    Write { at: u64, data: Vec<u8> },
    SetLen(u64),
    Punch { at: u64, len: u64 },
    Sync,
}

/// Keeps what was done to a file in memory, and fails where it is told to.
struct Tape {
    live: Arc<MemoryFile>,
    ops: Mutex<Vec<Op>>,
    fail_at: Option<usize>,
}

impl Tape {
    fn new(bytes: &[u8], fail_at: Option<usize>) -> Arc<Watched<Tape>> {
        let live = Arc::new(MemoryFile::from_bytes(bytes));
        let watch = Tape { live: live.clone(), ops: Mutex::default(), fail_at };
        Arc::new(Watched { file: live, watch })
    }

    fn ops(&self) -> MutexGuard<'_, Vec<Op>> {
        self.ops.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watch for Tape {
    fn call(&self, call: HostCall<'_>, file: &dyn HostFile) -> io::Result<usize> {
        let op = match &call {
            HostCall::Read { .. } | HostCall::ReadNowait { .. } => return call.carry_out(file),
            HostCall::Write { data, at } => Op::Write { at: *at, data: data.to_vec() },
            HostCall::SetLen(len) => Op::SetLen(*len),
            HostCall::Punch { at, len } => Op::Punch { at: *at, len: *len },
            HostCall::SyncData | HostCall::SyncAll => Op::Sync,
        };
        let mut ops = self.ops();
        if self.fail_at == Some(ops.len()) {
            ops.push(Op::Sync);
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let moved = call.carry_out(file)?;
        ops.push(op);
        Ok(moved)
    }
}

/// Repairs the image on `tape`; what is kept goes beside `image`.
fn repair(tape: &Arc<Watched<Tape>>, image: &Path) -> ploopfs::Result<RepairOutcome> {
    let file: Arc<dyn HostFile> = tape.clone();
    repair_open(&Located::of(image)?, &file, &HeaderFacts::default(), false)
}

/// What a power cut before operation `cut` may leave: everything before the last sync, and of the rest what chance keeps,
/// a write sector by sector.
fn state(start: &[u8], ops: &[Op], cut: usize, rng: &mut Rng) -> Vec<u8> {
    let synced = ops[..cut].iter().rposition(|op| matches!(op, Op::Sync)).unwrap_or(0);
    let file = MemoryFile::from_bytes(start);
    for (index, op) in ops[..cut].iter().enumerate() {
        let certain = index < synced;
        let done = match op {
            Op::Sync => Ok(()),
            Op::SetLen(len) if certain || rng.below(2) == 0 => file.set_len(*len),
            Op::Punch { at, len } if certain || rng.below(2) == 0 => file.punch(*at, *len),
            Op::Write { at, data } => {
                // The header is 64 bytes and shares a sector with the first entries; whole sectors reach the disk.
                let first = (SECTOR - *at as usize % SECTOR).min(data.len());
                let mut from = 0;
                let mut to = first;
                while from < data.len() {
                    if certain || rng.below(2) == 0 {
                        file.write_at(&data[from..to], at + from as u64).expect("memory writes");
                    }
                    (from, to) = (to, (to + SECTOR).min(data.len()));
                }
                Ok(())
            }
            _ => Ok(()),
        };
        done.expect("memory does not fail");
    }
    file.to_bytes()
}

/// Every file that kept something.
fn kept(folder: &Path) -> Vec<Vec<u8>> {
    let entries = std::fs::read_dir(folder).expect("the folder").map(|entry| entry.expect("readable").path());
    let lost = entries.filter(|path| path.to_string_lossy().contains(".lost"));
    lost.map(|path| std::fs::read(path).expect("read")).collect()
}

/// Demands that the image in `bytes` is sound and has the disk that it should have, and that nothing that no entry names
/// is gone.
fn judge(patient: &Patient, bytes: &[u8], folder: &Path, what: &str) {
    let header = Header::parse(bytes).unwrap_or_else(|bad| panic!("{what}: {bad}"));
    let geometry = header.geometry();
    assert!(header.in_use != IN_USE, "{what}: marked");
    let wanted = patient.wanted();
    assert_eq!(geometry.disk, wanted.len() as u64, "{what}");
    let cluster = geometry.cluster as usize;
    let mut owners = BTreeMap::new();
    for guest in 0..wanted.len() / cluster {
        let at = 64 + 4 * guest;
        let entry = u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let zeroes = vec![0; cluster];
        let found = match entry {
            0 => &zeroes[..],
            entry => {
                let position = geometry.position(entry).unwrap_or_else(|| panic!("{what}: entry {entry:#x}"));
                assert_eq!(owners.insert(position, guest), None, "{what}: two owners");
                &bytes[position as usize..][..cluster]
            }
        };
        assert!(found == &wanted[guest * cluster..][..cluster], "{what}: guest cluster {guest}");
    }
    let kept = kept(folder);
    for (place, content) in patient.orphans() {
        let at = geometry.cluster_position(place) as usize;
        let beside = kept.iter().any(|kept| kept.get(at..at + cluster) == Some(&content[..]));
        assert!(beside, "{what}: file cluster {place} is gone");
    }
}

/// A damaged image, in a folder of its own.
fn damaged(folder: &Path, seed: u64) -> (Patient, PathBuf) {
    let mut rng = Rng::new(seed);
    let image = folder.join(format!("{seed}.hds"));
    let version = if seed.is_multiple_of(4) { Version::V1 } else { Version::V2 };
    let mut patient = Patient::new(&image, version, 16 * KIB, 24, &mut rng);
    let field = [Damage::FirstHigh, Damage::Kind, Damage::Magic, Damage::Mark][rng.below(4) as usize];
    // Never all of them: what one leaves behind must not hide that another was forgotten.
    let entries = [Damage::PastEnd, Damage::Double, Damage::AllOnes];
    let some = entries.into_iter().filter(|_| rng.below(3) == 0).collect::<Vec<_>>();
    let hurt: Vec<Damage> = [Damage::Leak, Damage::Tail, field]
        .into_iter()
        .chain(some)
        .filter(|damage| patient.hurt(*damage, &mut rng))
        .collect();
    if hurt.iter().all(|damage| damage.is_harmless()) {
        // Mere leaks are given back.
        patient.leaked.clear();
    }
    (patient, image)
}

#[test]
fn after_a_power_cut_at_any_operation_the_next_repair_finishes_and_nothing_is_gone() {
    let folder = temp_dir();
    let mut states = 0;
    for seed in 1..=number_from_env("PLOOPFS_REPAIR_CRASHES", 16) {
        let (patient, image) = damaged(folder.path(), seed);
        let start = patient.bytes();
        let whole = memory_dir();
        let tape = Tape::new(&start, None);
        repair(&tape, &whole.path().join("vm.hds")).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        judge(&patient, &tape.live.to_bytes(), whole.path(), &format!("seed {seed}"));
        let ops = tape.ops().clone();
        let mut rng = Rng::new(seed);
        for cut in 0..=ops.len() {
            for _ in 0..2 {
                let what = format!("seed {seed}, cut at operation {cut} of {}", ops.len());
                // What was kept is durable before its place is given back: as far as the first repair had come.
                let beside = memory_dir();
                let first = Tape::new(&start, Some(cut));
                let _ = repair(&first, &beside.path().join("vm.hds"));
                let left = Tape::new(&state(&start, &ops, cut, &mut rng), None);
                repair(&left, &beside.path().join("vm.hds")).unwrap_or_else(|e| panic!("{what}: {e}"));
                judge(&patient, &left.live.to_bytes(), beside.path(), &what);
                states += 1;
            }
        }
        std::fs::remove_file(image).expect("remove");
    }
    println!("REPAIR CRASH STATES {states}");
}

#[test]
fn whatever_operation_of_the_host_fails_the_next_repair_finishes_and_nothing_is_gone() {
    let folder = temp_dir();
    let mut faults = 0;
    for seed in 101..=100 + number_from_env("PLOOPFS_REPAIR_CRASHES", 16) {
        let (patient, image) = damaged(folder.path(), seed);
        for fail_at in 0.. {
            let what = format!("seed {seed}, operation {fail_at} fails");
            let beside = memory_dir();
            let tape = Tape::new(&patient.bytes(), Some(fail_at));
            let failed = repair(&tape, &beside.path().join("vm.hds"));
            if tape.ops().len() <= fail_at {
                failed.unwrap_or_else(|e| panic!("{what}: {e}"));
                break;
            }
            // The first is the sync of what is in the cache: old failures are not ours.
            assert!(failed.is_err() || fail_at == 0, "{what}: success was reported");
            let next = Tape::new(&tape.live.to_bytes(), None);
            repair(&next, &beside.path().join("vm.hds")).unwrap_or_else(|e| panic!("{what}: {e}"));
            judge(&patient, &next.live.to_bytes(), beside.path(), &what);
            faults += 1;
        }
        std::fs::remove_file(image).expect("remove");
    }
    println!("REPAIR FAULTS {faults}");
}
