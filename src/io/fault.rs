//! A host file that fails on demand, for tests and for `mount --fault SPEC` (feature `faults`, never released).
//!
//! ```text
//! SPEC    := ITEM { "," ITEM }
//! ITEM    := "delay=" KIND ":" MS               every operation of that kind takes MS milliseconds longer
//!          | "fail=" KIND ":" N ":" ERRNO [":forever"]
//!                                               the N-th (1 is the first) fails; forever: it and all later ones
//!          | "short=" KIND ":" N [":forever"]   the N-th read or write moves half of what was asked, at least 1
//!                                               byte
//!          | "full"                             writes and allocations fail with ENOSPC
//!          | "skip-sync"                        syncs report success and do nothing (the broken build that the
//!                                               power-cut test must catch)
//!          | "dies=" SIGNAL ":" KIND ":" PATH   where PATH is a file: an operation of that kind is carried out, the
//!                                               file is removed, and the process dies before it hears how that went
//!          | "ends=" SIGNAL ":" TEXT            what reads or writes data that begins so ends the process
//!          | "trigger=" PATH                    faults are active, and operations counted for N, only while PATH
//!                                               exists (the idea is nbdkit's)
//! KIND    := "read" | "write" | "punch" | "sync" | "set_len" | "any"
//! SIGNAL  := "SIGKILL" | "SIGSEGV" | "SIGABRT"
//! ERRNO   := "EIO" | "ENOSPC" | ... | a positive number
//! ```
//!
//! Where reads are delayed, a read that must not wait answers EAGAIN, so that the delay is met by a runner as a
//! slow disk would be. One plan may drive many files: it counts the operations of all of them.

use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use super::file::{HostFile, HostSpace, HostStatus, HostTraits, passed_on};
use super::process;

/// A kind of operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Reads, those that must not wait included.
    Read,
    /// Writes.
    Write,
    /// Punched holes.
    Punch,
    /// fdatasync and fsync.
    Sync,
    /// Changes of the length.
    SetLen,
}

/// The kinds by name, each at its own index.
const OPS: [(&str, Op); 5] = [
    ("read", Op::Read),
    ("write", Op::Write),
    ("punch", Op::Punch),
    ("sync", Op::Sync),
    ("set_len", Op::SetLen),
];

/// The errnos that a host file system is known to answer, by name.
const ERRNOS: [(&str, i32); 12] = [
    ("EIO", libc::EIO),
    ("ENOSPC", libc::ENOSPC),
    ("EDQUOT", libc::EDQUOT),
    ("EAGAIN", libc::EAGAIN),
    ("EROFS", libc::EROFS),
    ("EOPNOTSUPP", libc::EOPNOTSUPP),
    ("ENOMEM", libc::ENOMEM),
    ("EINVAL", libc::EINVAL),
    ("EFBIG", libc::EFBIG),
    ("EPERM", libc::EPERM),
    ("ESTALE", libc::ESTALE),
    ("ETIMEDOUT", libc::ETIMEDOUT),
];

/// What is to go wrong, shared by all files it drives.
#[derive(Debug, Default)]
pub struct FaultPlan {
    faults: Vec<Fault>,
    /// Extra time per kind, in milliseconds; 0 is none.
    delays: [AtomicU64; OPS.len()],
    full: AtomicBool,
    skip_sync: bool,
    trigger: Option<PathBuf>,
    /// What ends the process: by which signal, at which kind of operation, and the file that says so.
    deaths: Vec<(i32, Option<Op>, PathBuf)>,
    /// Data that ends it, and by which signal.
    endings: Vec<(i32, Vec<u8>)>,
    counts: [Count; OPS.len()],
}

#[derive(Debug)]
struct Fault {
    /// None is any kind.
    op: Option<Op>,
    /// Counted from 1.
    from: u64,
    forever: bool,
    what: What,
    seen: AtomicU64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Fail(i32),
    Short,
}

#[derive(Debug, Default)]
struct Count {
    started: AtomicU64,
    running: AtomicU64,
    peak: AtomicU64,
}

/// How many operations of one kind there were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Started so far.
    pub started: u64,
    /// In flight at this moment.
    pub running: u64,
    /// The most that were ever in flight at once.
    pub peak: u64,
}

impl FaultPlan {
    /// The operations of one kind so far, over all files of this plan.
    pub fn counters(&self, op: Op) -> Counters {
        let count = &self.counts[op as usize];
        Counters {
            started: count.started.load(SeqCst),
            running: count.running.load(SeqCst),
            peak: count.peak.load(SeqCst),
        }
    }

    /// How many operations failed or were short so far, by the N-th of their kind; those of a full disk are not counted.
    pub fn injected(&self) -> u64 {
        let of = |fault: &Fault| {
            let reached = (fault.seen.load(SeqCst) + 1).saturating_sub(fault.from);
            if fault.forever { reached } else { reached.min(1) }
        };
        self.faults.iter().map(of).sum()
    }

    /// Makes the host file system full, or gives it space again.
    pub fn set_full(&self, full: bool) {
        self.full.store(full, SeqCst);
    }

    /// Changes the extra time of one kind, in milliseconds; 0 ends it.
    pub fn set_delay(&self, op: Op, ms: u64) {
        self.delays[op as usize].store(ms, SeqCst);
    }

    /// Ends the process where `data` is such.
    fn may_end(&self, data: &[u8]) {
        if let Some((signal, _)) = self.endings.iter().find(|(_, text)| data.starts_with(text)) {
            process::die_of(*signal);
        }
    }

    fn active(&self) -> bool {
        self.trigger.as_ref().is_none_or(|path| path.exists())
    }

    fn delay(&self, op: Op) -> u64 {
        self.delays[op as usize].load(SeqCst)
    }

    /// Counts one operation, makes it wait or fail as planned, and says whether it is to be short.
    fn enter(&self, op: Op) -> io::Result<Running<'_>> {
        let count = &self.counts[op as usize];
        count.started.fetch_add(1, SeqCst);
        let now = count.running.fetch_add(1, SeqCst) + 1;
        count.peak.fetch_max(now, SeqCst);
        let mut running = Running { count, short: false, skip: false, death: None };
        if !self.active() {
            return Ok(running);
        }
        match self.delay(op) {
            0 => {}
            ms => thread::sleep(Duration::from_millis(ms)),
        }
        let dies =
            |(_, of, path): &&(i32, Option<Op>, PathBuf)| of.is_none_or(|of| of == op) && path.exists();
        running.death = self.deaths.iter().find(dies).map(|(signal, _, path)| (*signal, path.as_path()));
        if self.full.load(SeqCst) && op == Op::Write {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        running.skip = self.skip_sync && op == Op::Sync;
        let mut failure = None;
        // Every fault counts every operation, also one that another fault ends.
        for fault in self.faults.iter().filter(|fault| fault.op.is_none_or(|o| o == op)) {
            let nth = fault.seen.fetch_add(1, SeqCst) + 1;
            if nth == fault.from || (fault.forever && nth > fault.from) {
                match fault.what {
                    What::Fail(errno) => failure = failure.or(Some(errno)),
                    What::Short => running.short = true,
                }
            }
        }
        match failure {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(running),
        }
    }
}

/// One operation in flight.
struct Running<'a> {
    count: &'a Count,
    short: bool,
    skip: bool,
    /// Its end is the process's, where the file can be removed.
    death: Option<(i32, &'a Path)>,
}

impl Running<'_> {
    /// How many of `len` bytes may be moved.
    fn cut(&self, len: usize) -> usize {
        if self.short { (len / 2).max(len.min(1)) } else { len }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Some((signal, path)) = self.death
            && rustix::fs::unlinkat(rustix::fs::CWD, path, rustix::fs::AtFlags::empty()).is_ok()
        {
            process::die_of(signal);
        }
        self.count.running.fetch_sub(1, SeqCst);
    }
}

impl FromStr for FaultPlan {
    type Err = String;

    fn from_str(spec: &str) -> Result<FaultPlan, String> {
        let mut plan = FaultPlan::default();
        for item in spec.split(',').filter(|item| !item.is_empty()) {
            let (name, value) = item.split_once('=').unwrap_or((item, ""));
            let parts: Vec<&str> = value.split(':').collect();
            match (name, parts.as_slice()) {
                ("full", [""]) => plan.set_full(true),
                ("skip-sync", [""]) => plan.skip_sync = true,
                ("dies", [signal, kind, path @ ..]) if !path.is_empty() => {
                    plan.deaths.push((signal_of(item, signal)?, kind_of(item, kind)?, path.join(":").into()));
                }
                ("ends", [signal, text]) if !text.is_empty() => {
                    plan.endings.push((signal_of(item, signal)?, text.as_bytes().to_vec()));
                }
                ("trigger", _) if !value.is_empty() => plan.trigger = Some(PathBuf::from(value)),
                ("delay", [kind, ms]) => {
                    let ms = ms.parse().map_err(|_| format!("'{item}': '{ms}' is not in milliseconds"))?;
                    match kind_of(item, kind)? {
                        Some(op) => plan.set_delay(op, ms),
                        None => OPS.iter().for_each(|(_, op)| plan.set_delay(*op, ms)),
                    }
                }
                ("fail", [kind, nth, errno, rest @ ..]) => {
                    plan.faults.push(fault(item, kind, nth, What::Fail(errno_of(item, errno)?), rest)?);
                }
                ("short", [kind, nth, rest @ ..]) => {
                    let short = fault(item, kind, nth, What::Short, rest)?;
                    if !matches!(short.op, Some(Op::Read | Op::Write)) {
                        return Err(format!("'{item}': only a read or a write can be short"));
                    }
                    plan.faults.push(short);
                }
                _ => {
                    return Err(format!(
                        "'{item}' is not a fault; use delay=KIND:MS, fail=KIND:N:ERRNO[:forever], \
                         short=KIND:N[:forever], full, skip-sync, dies=SIGNAL:KIND:PATH, ends=SIGNAL:TEXT or \
                         trigger=PATH"
                    ));
                }
            }
        }
        Ok(plan)
    }
}

fn fault(item: &str, kind: &str, nth: &str, what: What, rest: &[&str]) -> Result<Fault, String> {
    let forever = match rest {
        [] => false,
        ["forever"] => true,
        _ => return Err(format!("'{item}': only 'forever' may follow")),
    };
    let from = nth.parse().ok().filter(|n| *n > 0);
    let from = from.ok_or_else(|| format!("'{item}': '{nth}' is not a count; 1 is the first"))?;
    Ok(Fault { op: kind_of(item, kind)?, from, forever, what, seen: AtomicU64::new(0) })
}

/// None is "any".
fn kind_of(item: &str, kind: &str) -> Result<Option<Op>, String> {
    if kind == "any" {
        return Ok(None);
    }
    let found = OPS.iter().find(|(name, _)| *name == kind);
    found.map(|(_, op)| Some(*op)).ok_or_else(|| format!("'{item}': '{kind}' is no kind of operation"))
}

fn signal_of(item: &str, name: &str) -> Result<i32, String> {
    match name {
        "SIGKILL" => Ok(libc::SIGKILL),
        "SIGSEGV" => Ok(libc::SIGSEGV),
        "SIGABRT" => Ok(libc::SIGABRT),
        _ => Err(format!("'{item}': '{name}' is no signal that ends a process here")),
    }
}

fn errno_of(item: &str, errno: &str) -> Result<i32, String> {
    let named = ERRNOS.iter().find(|(name, _)| *name == errno).map(|(_, number)| *number);
    let number = named.or_else(|| errno.parse().ok().filter(|n| (1..4096).contains(n)));
    number.ok_or_else(|| format!("'{item}': '{errno}' is no known errno; a number does as well"))
}

/// A host file that a [`FaultPlan`] makes slow, short or broken.
#[derive(Debug)]
pub struct FaultFile {
    file: Arc<dyn HostFile>,
    plan: Arc<FaultPlan>,
}

impl FaultFile {
    /// Puts `plan` between the caller and `file`.
    pub fn new(file: Arc<dyn HostFile>, plan: Arc<FaultPlan>) -> FaultFile {
        FaultFile { file, plan }
    }
}

impl HostFile for FaultFile {
    passed_on! {
        fn len(&self) -> io::Result<u64>;
        fn seek_data(&self, offset: u64) -> io::Result<Option<u64>>;
        fn seek_hole(&self, offset: u64) -> io::Result<u64>;
        fn status(&self) -> io::Result<HostStatus>;
        fn space(&self) -> io::Result<HostSpace>;
        fn drop_cache(&self) -> io::Result<()>;
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let running = self.plan.enter(Op::Read)?;
        let len = running.cut(buf.len());
        let read = self.file.read_at(&mut buf[..len], offset)?;
        self.plan.may_end(&buf[..read]);
        Ok(read)
    }

    fn read_at_nowait(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let inner = self.file.traits();
        let would_wait = self.plan.delay(Op::Read) > 0 && self.plan.active();
        if would_wait || !(inner.nowait_reads || inner.never_blocks) {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
        let running = self.plan.enter(Op::Read)?;
        let len = running.cut(buf.len());
        let read = match inner.nowait_reads {
            true => self.file.read_at_nowait(&mut buf[..len], offset),
            false => self.file.read_at(&mut buf[..len], offset),
        }?;
        self.plan.may_end(&buf[..read]);
        Ok(read)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        let running = self.plan.enter(Op::Write)?;
        self.plan.may_end(data);
        self.file.write_at(&data[..running.cut(data.len())], offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let _running = self.plan.enter(Op::SetLen)?;
        self.file.set_len(len)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let _running = self.plan.enter(Op::Punch)?;
        self.file.punch(offset, len)
    }

    fn sync_data(&self) -> io::Result<()> {
        let running = self.plan.enter(Op::Sync)?;
        if running.skip { Ok(()) } else { self.file.sync_data() }
    }

    fn sync_all(&self) -> io::Result<()> {
        let running = self.plan.enter(Op::Sync)?;
        if running.skip { Ok(()) } else { self.file.sync_all() }
    }

    /// A file that may be made slow blocks, whatever stands behind it.
    fn traits(&self) -> HostTraits {
        if OPS.iter().any(|(_, op)| self.plan.delay(*op) > 0) {
            HostTraits { nowait_reads: true, never_blocks: false, device: 0 }
        } else {
            self.file.traits()
        }
    }
}

#[cfg(test)]
mod tests;
