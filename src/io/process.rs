//! What a process that serves block devices asks of the kernel for itself. All of it may be refused where root's
//! powers are cut; then the mount goes on, and the caller says once what is missing ([`Refused`]).

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::mm::MlockAllFlags;
use rustix::process::{Resource, Rlimit, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets, CpuSet};

use crate::error::{Error, Kind};
use crate::sync::plain::lock;

/// From this size on, in bytes, memory is mapped for one allocation and goes back to the system with it: all that is
/// allocated while a disk is used is smaller.
#[cfg(target_env = "gnu")]
const MAPPED: libc::c_int = 4 << 20;
/// So much of what was freed an arena of the allocator keeps: a few of the largest requests.
#[cfg(target_env = "gnu")]
const KEPT: libc::c_int = 8 << 20;

/// The kernel keeps this much of a thread's name.
pub const MAX_THREAD_NAME: usize = 15;

/// Something the kernel refused, and what that means.
#[derive(Debug)]
pub struct Refused {
    /// What was asked for.
    pub what: &'static str,
    /// What may happen without it.
    pub consequence: &'static str,
    /// The kernel's answer.
    pub error: io::Error,
}

fn refused(what: &'static str, consequence: &'static str) -> impl FnOnce(io::Error) -> Refused {
    move |error| Refused { what, consequence, error }
}

/// All that a daemon wants, in the order it needs it: (1) limits before (2) memory is locked under them; the
/// rest in any order. To be called before the first thread: the IO flusher mark is inherited by threads made
/// later, not given to those that exist. `files` is how many descriptors may be needed.
pub fn harden(files: u64) -> Vec<Refused> {
    let results = [raise_open_files(files), lock_memory(), become_io_flusher(), avoid_oom_killer()];
    results.into_iter().filter_map(Result::err).collect()
}

/// All refusals in one line: in a container they have one reason. What each may lead to is in the log.
pub fn in_one_line(refused: &[Refused]) -> Option<String> {
    for Refused { what, consequence, error } in refused {
        log::info!("{what} was refused ({}): {consequence}", crate::error::words(error));
    }
    let all: Vec<_> = refused.iter().map(|refused| refused.what).collect();
    (!all.is_empty()).then(|| format!("was refused: {}", all.join(", ")))
}

/// Memory that this thread asks for is never got by writing to the devices it serves.
pub fn become_io_flusher() -> Result<(), Refused> {
    rustix::process::configure_io_flusher_behavior(true)
        .map_err(io::Error::from)
        .map_err(refused("IO flusher", "with very little memory left the mount may hang"))
}

/// Pages, once touched, stay in memory. Pages that are never touched cost nothing.
pub fn lock_memory() -> Result<(), Refused> {
    let attempt = || -> io::Result<()> {
        let unlimited = Rlimit { current: None, maximum: None };
        let raised = rustix::process::setrlimit(Resource::Memlock, unlimited);
        let exempt = rustix::thread::capabilities(None)?.effective.contains(CapabilitySet::IPC_LOCK);
        // Under a limit that stands, every later allocation beyond it would fail: worse than being swapped out.
        if !exempt {
            raised?;
        }
        Ok(rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)?)
    };
    attempt().map_err(refused("memory lock", "with very little memory left the mount may hang"))
}

/// The out-of-memory killer takes others first.
#[expect(clippy::disallowed_methods, reason = "a setting of the kernel, not a file")]
pub fn avoid_oom_killer() -> Result<(), Refused> {
    fs::write("/proc/self/oom_score_adj", "-1000")
        .map_err(refused("OOM protection", "with no memory left the mount may be killed"))
}

/// A core file has the threads' registers, and no memory: what lies in it (data of disks, on the heap, in buffers and on
/// stacks) is the guests'. And the process has ended only when all of that is written, which takes seconds. To have the memory
/// as well, write to `/proc/PID/coredump_filter` where no guest's secrets are at stake.
#[expect(clippy::disallowed_methods, reason = "a setting of the kernel, not a file")]
pub fn keep_out_of_core_files() -> Result<(), Refused> {
    // ELF headers alone, of what is mapped from files.
    match fs::write("/proc/self/coredump_filter", "0x10") {
        // A kernel that writes no core files.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        set => set.map_err(refused("core filter", "a core file of the daemon has data of disks in it")),
    }
}

/// How much the out-of-memory killer wants a process, where it may be asked.
pub fn oom_score() -> Option<i32> {
    fs::read_to_string("/proc/self/oom_score_adj").ok()?.trim().parse().ok()
}

/// The out-of-memory killer judges a process that this one has started as `score` says, and not as this one. Unchanged where
/// that has ended.
#[expect(clippy::disallowed_methods, reason = "a setting of the kernel, not a file")]
pub fn set_oom_score(child: &std::process::Child, score: i32) {
    let _ = fs::write(format!("/proc/{}/oom_score_adj", child.id()), score.to_string());
}

/// How many files this process may have open.
pub fn may_open() -> u64 {
    rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Allows at least `wanted` open files, and never fewer than now. Takes what there is where that is too much.
pub fn raise_open_files(wanted: u64) -> Result<(), Refused> {
    let now = rustix::process::getrlimit(Resource::Nofile);
    if now.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    let maximum = now.maximum.map(|maximum| maximum.max(wanted));
    let enough = Rlimit { current: Some(wanted), maximum };
    rustix::process::setrlimit(Resource::Nofile, enough).map_err(|e| {
        // Second best: all that the administrator allows. Failing too, the limit is as it was.
        let allowed = Rlimit { current: now.maximum, maximum: now.maximum };
        let _ = rustix::process::setrlimit(Resource::Nofile, allowed);
        refused("open-file limit", "with many images in use some cannot be opened")(e.into())
    })
}

/// Gives up for good what root may do, but for `kept`, and returns what is left. Of the calling thread and those it starts.
pub fn keep_powers(kept: CapabilitySet) -> io::Result<CapabilitySet> {
    let now = rustix::thread::capabilities(None)?;
    let left = CapabilitySets {
        effective: now.effective & kept,
        permitted: now.permitted & kept,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, left)?;
    Ok(left.permitted)
}

/// True where memory can be locked without a limit, and without the power to ignore one.
pub fn may_lock_all() -> bool {
    rustix::process::getrlimit(Resource::Memlock).current.is_none()
}

/// Starts a thread, which may run on any CPU, also where its starter may not. The name is at most [`MAX_THREAD_NAME`]
/// bytes; what is longer is cut by the kernel.
pub fn spawn_thread<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    debug_assert!(name.len() <= MAX_THREAD_NAME, "'{name}' would be cut");
    Builder::new().name(name.to_owned()).spawn(|| {
        run_anywhere();
        body()
    })
}

/// What this process could run on before any thread was bound.
static CPUS: OnceLock<CpuSet> = OnceLock::new();

/// The CPUs that this process may run on, for [`run_anywhere`]; to be called before a thread is bound to some of them.
/// None: the kernel does not say, or has more than a [`CpuSet`] holds.
pub fn note_cpus() -> Option<CpuSet> {
    let cpus = rustix::thread::sched_getaffinity(None).ok()?;
    Some(*CPUS.get_or_init(|| cpus))
}

/// Frees the calling thread from the CPU of the one that started it, which it would share with it for ever. Without
/// [`note_cpus`] no thread is bound, and nothing happens.
pub fn run_anywhere() {
    if let Some(cpus) = CPUS.get()
        && let Err(e) = rustix::thread::sched_setaffinity(None, cpus)
    {
        log::debug!("a thread stays on the CPU of another: {e}");
    }
}

/// The part of a CPU's time, in nanoseconds, after which a thread that [`run_soon`] marked lets others run: the shortest
/// that the kernel takes (Linux 6.12; the usual one is 2.8 ms).
const SOON: u64 = 100_000;

/// Asks that the calling thread, and those that it starts from now on, be run soon after they are woken, for less time at
/// once; their share of the CPU stays what it was. It needs no power. A kernel before Linux 6.12 does as before, and a
/// scheduling policy that was chosen for the process is left as it is.
pub fn run_soon() -> io::Result<()> {
    let mut now = scheduling()?;
    if now.sched_policy == libc::SCHED_OTHER as u32 {
        now.sched_runtime = SOON;
        // SAFETY: the kernel reads as many bytes as the structure's own field says, of the calling thread's.
        let set = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const now, 0) };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// How the calling thread is scheduled.
fn scheduling() -> io::Result<libc::sched_attr> {
    // SAFETY: all fields are numbers, which may be zero.
    let mut now: libc::sched_attr = unsafe { std::mem::zeroed() };
    let len = size_of_val(&now);
    // SAFETY: the kernel writes at most so many bytes to where so many are.
    match unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut now, len, 0) } {
        0 => Ok(now),
        _ => Err(io::Error::last_os_error()),
    }
}

/// True for a signal that this process was started to ignore, as `nohup` does with SIGHUP, and a shell with SIGINT for
/// what it puts into the background.
pub fn is_ignored(signal: i32) -> bool {
    // SAFETY: the fields are numbers and a set of bits, which may be zero.
    let mut now: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: nothing is set, and the kernel writes one structure to where one is.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut now) };
    asked == 0 && now.sa_sigaction == libc::SIG_IGN
}

/// Why there is no thread `what`, and what to look at: for once the kernel's own words (EAGAIN, "try again") mislead.
pub fn no_thread(what: &str) -> impl FnOnce(io::Error) -> Error + '_ {
    move |e| {
        let hint = match e.raw_os_error() {
            Some(libc::EAGAIN) => "; raise the limit of tasks (TasksMax=, pids.max, ulimit -u)",
            _ => "",
        };
        Error::new(Kind::Io, format!("cannot start a thread {what}: {}{hint}", crate::error::words(&e)))
    }
}

/// Starts a named thread that is not waited for.
pub fn spawn_detached(name: &str, body: impl FnOnce() + Send + 'static) -> crate::error::Result<()> {
    spawn_thread(name, body).map(drop).map_err(no_thread(name))
}

/// Runs `body` on a thread of its own, or, where none can be had, on the calling one.
pub fn spawn_or_run<F: FnOnce() + Send + 'static>(name: &str, body: F) {
    let body = Arc::new(Mutex::new(Some(body)));
    let run = |body: &Mutex<Option<F>>| {
        let body = lock(body).take();
        if let Some(body) = body {
            body();
        }
    };
    let theirs = body.clone();
    if let Err(e) = spawn_detached(name, move || run(&theirs)) {
        log::warn!("{e}; it runs on another one");
        run(&body);
    }
}

/// Waits for the end of a process, of which `handle` is a pidfd. False: it goes on behind the deadline.
pub fn ends_before(handle: &OwnedFd, deadline: Option<Instant>) -> bool {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let limit =
            left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
        let mut fds = [PollFd::new(handle, PollFlags::IN)];
        match poll(&mut fds, limit.as_ref()) {
            Err(Errno::INTR) => {}
            result => return result.is_ok_and(|ready| ready > 0),
        }
    }
}

/// Keeps the allocator from keeping what was freed. glibc's takes the largest block that was ever freed for a usual one:
/// after the first of fuser's buffers of 16 MiB it keeps the next, fills it with zeroes where it is allocated again, and may
/// hold on to 32 MiB in each of its arenas, all of that in memory that is locked.
pub fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    for (setting, bytes) in [(libc::M_MMAP_THRESHOLD, MAPPED), (libc::M_TRIM_THRESHOLD, KEPT)] {
        // SAFETY: two numbers of the allocator, which may be changed at any time.
        let _ = unsafe { libc::mallopt(setting, bytes) };
    }
}

/// Closes every descriptor but the three standard ones: those that the caller of a command had open (a lock of a script, the
/// pipe of a job) would live as long as a daemon does. Belongs at the very start of a process that stays.
#[expect(clippy::disallowed_methods, reason = "descriptors that came from outside and have no owner here")]
pub fn close_inherited() {
    const FIRST: libc::c_int = 3;
    // SAFETY: called before anything of this process has opened a descriptor, so that none of them has an owner here.
    if unsafe { libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, 0) } == 0 {
        return;
    }
    // Before Linux 5.9. Collected first: the folder that is read has a descriptor, too, which is closed by then.
    let open = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let open: Vec<libc::c_int> = open.filter_map(|fd| fd.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| *fd >= FIRST) {
        // SAFETY: as above; a number that is not open any more is refused.
        unsafe { libc::close(fd) };
    }
}

/// Names the calling thread; of the first thread, it is the name of the process in `ps` and `top`.
pub fn name_this_thread(name: &str) -> io::Result<()> {
    let name = std::ffi::CString::new(name)?;
    Ok(rustix::thread::set_name(&name)?)
}

/// The program that `command` starts is killed when the calling thread ends, however that comes about, and what it makes
/// is its owner's alone.
pub fn ends_with_this_thread(command: &mut Command) -> &mut Command {
    let parent = rustix::process::getpid();
    // SAFETY: between fork and exec only system calls are made, nothing is allocated and no lock is taken.
    unsafe {
        command.pre_exec(move || {
            rustix::process::umask(Mode::RWXG | Mode::RWXO);
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            // It may have ended before that.
            match rustix::process::getppid() == Some(parent) {
                true => Ok(()),
                false => Err(io::Error::from(io::ErrorKind::Interrupted)),
            }
        })
    }
}

/// A command that starts this program again as a daemon: a session of its own, the root folder, nothing on
/// standard input. Starting anew, and not forking, is safe with threads about. Output, arguments and inherited
/// descriptors are the caller's to set; the new process should begin with [`name_this_thread`], because it is
/// started as `/proc/self/exe` (which works after the program's file was replaced or removed).
pub fn daemon_command(name: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(name).current_dir("/").stdin(Stdio::null());
    // SAFETY: between fork and exec only one system call is made, nothing is allocated and no lock is taken.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        })
    };
    command
}

/// Ends this process as if it had earned `signal`: for tests.
#[cfg(any(test, feature = "faults"))]
pub fn die_of(signal: i32) -> ! {
    loop {
        // SAFETY: a signal to the calling thread; all that it may do is to end the process. A handler that looks for the end
        // of a stack returns from the first one, and is gone at the second.
        unsafe { libc::raise(signal) };
    }
}

#[cfg(test)]
mod tests;
