//! What one image, one user or one change of the folder must not hold up, drop or use up for all others.

mod common;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::{Holder, Mount, Run, ok, qemu_holds, signal, text, until};

/// Longer than anything here takes on a busy machine, shorter than a wait for what hangs.
const SOON: Duration = Duration::from_secs(8);

fn log(mount: &Mount) -> String {
    fs::read_to_string(mount.images().join(".ploopfs/log")).unwrap_or_default()
}

/// The number behind a word in /proc/PID/status.
fn status(pid: u32, word: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("alive");
    let line = text.lines().find_map(|line| line.strip_prefix(word)).expect("a line");
    line.split_whitespace().find_map(|word| word.parse().ok()).expect("a number")
}

/// Processor time that a process has used.
fn cpu(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("alive");
    let words: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: u64 =
        words[11].parse::<u64>().expect("a number") + words[12].parse::<u64>().expect("a number");
    Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
}

/// A stopped process, which goes on when the test ends.
struct Stopped(u32);

impl Stopped {
    fn new(pid: u32) -> Stopped {
        signal(pid, rustix::process::Signal::STOP);
        Stopped(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        signal(self.0, rustix::process::Signal::CONT);
    }
}

/// A command that may hang; ended with the test.
fn begin(program: &str, args: &[&Path]) -> Holder {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Holder(command.spawn().expect("it starts"))
}

/// Fails unless `program` ends well and soon.
#[track_caller]
fn soon(program: &str, args: &[&str]) {
    let done = Run::new(program).args(args).limit(SOON.as_secs()).run();
    assert!(done.success(), "{done}");
}

/// Copies of an empty image, as files without data.
fn many_images(images: &Path, count: usize) {
    Run::ploopfs().args(["create", "--size", "1M"]).arg(images.join("base")).ok();
    let base = fs::read(images.join("base.hds")).expect("the image");
    for n in 0..count {
        let file = File::create(images.join(format!("i{n}.hds"))).expect("created");
        file.write_all_at(&base[..4096], 0).expect("written");
        file.set_len(base.len() as u64).expect("as long");
    }
    fs::remove_file(images.join("base.hds")).expect("removed");
}

#[test]
fn an_open_of_a_locked_image_is_answered_before_its_holder_is_looked_for_and_holds_up_no_other() {
    require!("fuse", "qemu");
    let mount = Mount::new(&["--create", "vm1=20M", "--create", "vm2=20M"]);
    let holder = qemu_holds(&mount.delta("vm1"));
    let keeper = status(mount.pid(), "PPid:") as u32;
    let stopped = Stopped::new(keeper);
    // Both would wait for the keeper, 20 s each.
    for _ in 0..2 {
        let began = Instant::now();
        let refused = File::open(mount.flat("vm1")).expect_err("in use");
        assert_eq!(refused.raw_os_error(), Some(libc::EBUSY));
        File::open(mount.flat("vm2")).expect("opens");
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    }
    drop(stopped);
    let named = format!("(pid {}", holder.pid());
    assert!(until(Duration::from_secs(30), || log(&mount).contains(&named)), "{}", log(&mount));
    // A command waits for the name.
    let snapshot = Run::ploopfs().args(["snapshot", "create"]).arg(mount.delta("vm1")).status(4);
    assert!(snapshot.stderr.contains(&named), "{snapshot}");
}

/// A mount with an image `deep`, whose base lies on the first mount: it hangs while the daemon of that one is stopped.
fn over_another(size: &str, args: &[&str]) -> (Mount, tempfile::TempDir, Mount) {
    let host = Mount::new(&[]);
    Run::ploopfs().args(["create", "--size", size, "--format", "raw"]).arg(host.images().join("base")).ok();
    assert!(until(SOON, || host.flat("base").exists()), "not shown");
    let images = common::temp_dir();
    let deep = images.path().join("deep");
    Run::ploopfs().args(["create", "--size", size, "--format", "raw"]).arg(&deep).ok();
    Run::ploopfs().args(["snapshot", "create"]).arg(images.path().join("deep.raw")).arg("s1").ok();
    let descriptor = deep.join("DiskDescriptor.xml");
    let xml = fs::read_to_string(&descriptor).expect("the descriptor");
    let named =
        xml.split("<File>").find_map(|part| part.split("</File>").next().filter(|f| f.ends_with(".raw")));
    let named = named.expect("a raw base").to_owned();
    let moved = xml.replace(&format!("<File>{named}<"), &format!("<File>{}<", text(&host.flat("base"))));
    fs::write(&descriptor, moved).expect("written");
    let mount = Mount::over(images.path(), &[&["--allow-outside"], args].concat());
    (host, images, mount)
}

fn open_direct(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).expect("opens")
}

/// Does something with so much memory as O_DIRECT wants it.
fn with_aligned<T>(len: usize, act: impl FnOnce(&mut [u8]) -> T) -> T {
    let mut memory = vec![7; len + 4096];
    let start = memory.as_ptr().align_offset(4096);
    act(&mut memory[start..start + len])
}

/// Writes of 1 MiB to the image `deep`, each by a thread of its own, that each copy two clusters of its base; what became
/// of them.
fn writers(deep: File, count: u64) -> Vec<thread::JoinHandle<std::io::Result<usize>>> {
    let deep = Arc::new(deep);
    let start = |n: u64| {
        let deep = deep.clone();
        let write = move || {
            // The threads' own memory is no part of this: each touches one page of it.
            with_aligned(1 << 20, |data| deep.write_at(data, (1 << 19) + (n << 20)))
        };
        thread::Builder::new().stack_size(64 << 10).spawn(write).expect("a thread")
    };
    (0..count).map(start).collect()
}

/// Reads 4 KiB of an image again and again, from each CPU, and sends how long each took.
fn read_on(mount: &Mount, name: &str) -> std::sync::mpsc::Receiver<Duration> {
    let (send, receive) = std::sync::mpsc::channel();
    let file = Arc::new(open_direct(&mount.flat(name)));
    let all = rustix::thread::sched_getaffinity(None).expect("our CPUs");
    for cpu in (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu)) {
        let (send, file) = (send.clone(), file.clone());
        thread::spawn(move || {
            let mut own = rustix::thread::CpuSet::new();
            own.set(cpu);
            rustix::thread::sched_setaffinity(None, &own).expect("bound");
            with_aligned(4096, |data| {
                loop {
                    let began = Instant::now();
                    let read = file.read_at(data, 4096);
                    if !read.is_ok_and(|n| n == 4096) || send.send(began.elapsed()).is_err() {
                        return;
                    }
                    thread::sleep(Duration::from_millis(5));
                }
            })
        });
    }
    receive
}

/// One at a time: each fills the daemon's memory.
static LARGE: Mutex<()> = Mutex::new(());

#[test]
fn an_image_with_500_mib_of_writes_waiting_for_a_host_that_hangs_stops_no_other_and_the_memory_is_given_back()
{
    require!("fuse");
    let _one = LARGE.lock();
    let (host, _images, mount) = over_another("600M", &["--threads", "2", "--create", "vm2=20M"]);
    let reads = read_on(&mount, "vm2");
    reads.recv_timeout(SOON).expect("a read");
    // Asked by a file of the mount, which would wait with all others.
    let pid = mount.pid();
    let deep = open_direct(&mount.flat("deep"));
    let stopped = Stopped::new(host.pid());
    let writers = writers(deep, 500);
    let (mut took, mut most) = (Vec::new(), 0);
    let end = Instant::now() + Duration::from_secs(5);
    while Instant::now() < end {
        took.push(reads.recv_timeout(SOON).expect("reads of another image go on"));
        most = most.max(status(pid, "VmRSS:") >> 10);
    }
    drop(reads);
    drop(stopped);
    for writer in writers {
        assert_eq!(writer.join().expect("no panic").expect("its host goes on"), 1 << 20);
    }
    took.sort_unstable();
    let p99 = took[took.len() * 99 / 100];
    println!(
        "HELD_UP 500 writes of 1 MiB wait: {} reads of another image, p99 {p99:?}, at most {:?}; {most} MiB",
        took.len(),
        took[took.len() - 1]
    );
    assert!(p99 < Duration::from_millis(500), "{p99:?}");
    assert!(most < 600, "{most} MiB");
    assert!(until(SOON, || status(pid, "VmRSS:") >> 10 < 200), "{}", status(pid, "VmRSS:"));
}

#[test]
fn an_image_that_fills_the_memory_while_its_host_hangs_is_refused_more_after_30_s_and_the_others_go_on() {
    require!("fuse");
    let _one = LARGE.lock();
    let (host, _images, mount) = over_another("900M", &["--threads", "2", "--create", "vm2=20M"]);
    let reads = read_on(&mount, "vm2");
    reads.recv_timeout(SOON).expect("a read");
    // Asked by a file of the mount, which would wait with all others.
    let pid = mount.pid();
    let deep = open_direct(&mount.flat("deep"));
    let stopped = Stopped::new(host.pid());
    let began = Instant::now();
    let writers = writers(deep, 800);
    let most = || status(pid, "VmRSS:") >> 10;
    // They may wait so long, once.
    assert!(until(Duration::from_secs(60), || writers.iter().any(|w| w.is_finished())), "none is refused");
    assert!(began.elapsed() > Duration::from_secs(29), "{:?}", began.elapsed());
    let held = most();
    assert!(held < 600, "{held} MiB");
    let mut slowest = Duration::ZERO;
    while reads.try_recv().is_ok() {}
    for _ in 0..200 {
        slowest = slowest.max(reads.recv_timeout(SOON).expect("reads of another image go on"));
    }
    println!("HELD_UP 800 writes of 1 MiB, after {:?}: reads in {slowest:?}; {held} MiB", began.elapsed());
    // So do large writes of another.
    let (send, written) = std::sync::mpsc::channel();
    let vm2 = open_direct(&mount.flat("vm2"));
    thread::spawn(move || {
        let wrote = (0..20).all(|n| with_aligned(1 << 20, |data| vm2.write_at(data, n << 20)).is_ok());
        let _ = send.send(wrote);
    });
    assert_eq!(written.recv_timeout(SOON), Ok(true));
    // Those that had room wait on, and are not lost.
    drop(stopped);
    let outcomes: Vec<_> = writers.into_iter().map(|writer| writer.join().expect("no panic")).collect();
    let refused = outcomes.iter().filter_map(|outcome| outcome.as_ref().err());
    assert!(refused.clone().all(|e| e.raw_os_error() == Some(libc::EIO)));
    let refused = refused.count();
    assert!((200..400).contains(&refused), "{refused} of 800");
    let log = log(&mount);
    assert_eq!(log.matches("its host has completed nothing for 3").count(), 1, "said once: {log}");
    let deep = open_direct(&mount.flat("deep"));
    with_aligned(1 << 20, |data| deep.write_at(data, 0)).expect("its host goes on, and so does it");
}

#[test]
fn an_image_whose_host_hangs_holds_up_no_user_of_another() {
    require!("fuse");
    // The base of an image lies on a mount whose daemon is stopped.
    let (host, _images, mount) =
        over_another("20M", &["--threads", "2", "--create", "vm2=20M", "--create", "vm4=20M"]);
    let snapshots = mount.point().join(".snapshots/deep");
    assert_eq!(fs::read_dir(&snapshots).expect("listed").count(), 1);
    assert_eq!(fs::metadata(mount.flat("deep")).expect("stat").len(), 20 << 20);
    let vm2 =
        OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(mount.flat("vm2")).expect("opens");
    // Ended behind the stop, whatever comes: what waits for an answer may not even die.
    let mut hanging = Vec::new();
    let stopped = Stopped::new(host.pid());
    // The kernel asks for attributes anew after a second.
    thread::sleep(Duration::from_millis(1200));
    let snapshot = snapshots.join("s1.img");
    for _ in 0..3 {
        hanging.push(begin("stat", &[&mount.flat("deep")]));
        hanging.push(begin("stat", &[&snapshot]));
        hanging.push(begin("cat", &[&mount.flat("deep")]));
        hanging.push(begin("ls", &[Path::new("-l"), &snapshots]));
    }
    thread::sleep(Duration::from_millis(300));
    let flat = |name| text(&mount.flat(name)).to_owned();
    let (send, receive) = std::sync::mpsc::channel();
    let reader = thread::spawn(move || {
        // O_DIRECT wants it aligned.
        let mut memory = vec![0; 2 << 12];
        let start = memory.as_ptr().align_offset(4096);
        let read = vm2.read_at(&mut memory[start..start + 4096], 77 << 12);
        let _ = send.send(read.map_err(|e| e.to_string()));
    });
    assert_eq!(receive.recv_timeout(SOON), Ok(Ok(4096)), "a read of another image");
    reader.join().expect("no panic");
    soon("cat", &[&flat("vm4")]);
    soon("stat", &[&flat("vm4")]);
    soon("stat", &["-f", text(mount.point())]);
    soon("ls", &[text(mount.point())]);
    soon("cat", &[text(&mount.point().join(".ploopfs/stats.json"))]);
    let listed = Run::ploopfs().args(["snapshot", "list"]).arg(mount.flat("vm4")).limit(SOON.as_secs()).run();
    assert_ne!(listed.code(), None, "{listed}");
    drop(stopped);
    drop(hanging);
    assert_eq!(fs::metadata(mount.flat("deep")).expect("stat").len(), 20 << 20);
}

#[test]
fn the_counters_cost_little_however_often_they_are_opened_and_are_not_for_everybody() {
    require!("fuse");
    let folder = common::temp_dir();
    many_images(folder.path(), 500);
    let mount = Mount::over(folder.path(), &[]);
    let stats = mount.point().join(".ploopfs/stats.json");
    let pid = mount.pid();
    let before = status(pid, "VmRSS:");
    let mut held = Vec::new();
    let refused = loop {
        match File::open(&stats) {
            Ok(file) if held.len() < 500 => held.push(file),
            Ok(_) => break None,
            Err(error) => break error.raw_os_error(),
        }
    };
    assert_eq!(refused, Some(libc::EMFILE), "after {}", held.len());
    assert!(held.len() >= 16, "{}", held.len());
    let grown = status(pid, "VmRSS:").saturating_sub(before);
    assert!(grown < 50 << 10, "{} opens: {grown} KiB", held.len());
    drop(held);
    assert!(until(SOON, || File::open(&stats).is_ok()), "places are given back");
    let stranger =
        Run::new("setpriv").args(["--reuid=65534", "--regid=65534", "--clear-groups", "cat"]).arg(&stats);
    let stranger = stranger.run();
    assert!(!stranger.success(), "{stranger}");
    // Until the owner says otherwise.
    ok("chmod", &["444", text(&stats)]);
    fs::read_to_string(&stats).expect("still there");
}

#[test]
fn a_clean_up_of_a_large_folder_is_looked_at_in_few_looks() {
    require!("fuse");
    const IMAGES: usize = 3000;
    let folder = common::temp_dir();
    many_images(folder.path(), IMAGES);
    let mount = Mount::over(folder.path(), &[]);
    let pid = mount.pid();
    let shown = || fs::read_dir(mount.point()).expect("listed").count() - 2;
    assert!(until(SOON, || shown() == IMAGES), "{}", shown());
    let before = cpu(pid);
    for n in (0..IMAGES).step_by(2) {
        fs::remove_file(folder.path().join(format!("i{n}.hds"))).expect("removed");
        thread::sleep(Duration::from_millis(2));
    }
    assert!(until(SOON, || shown() == IMAGES / 2), "{}", shown());
    let spent = cpu(pid) - before;
    println!("HELD_UP {} of {IMAGES} images removed, one each 2 ms: {spent:?} of CPU", IMAGES / 2);
    assert!(spent < Duration::from_millis(900), "{spent:?}");
    let before = cpu(pid);
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end {
        fs::write(folder.path().join("notes"), "").expect("written");
        fs::remove_file(folder.path().join("notes")).expect("removed");
    }
    let spent = cpu(pid) - before;
    println!("HELD_UP 2 s of touch and rm: {spent:?} of CPU");
    assert!(spent < Duration::from_millis(600), "{spent:?}");
    // What comes is seen all the same.
    fs::copy(folder.path().join("i1.hds"), folder.path().join("late.hds")).expect("copied");
    assert!(until(SOON, || mount.flat("late").exists()), "not shown");
}

#[test]
fn a_daemon_that_has_no_descriptors_left_goes_on_serving_what_it_serves() {
    require!("fuse");
    let folder = common::temp_dir();
    let deep = folder.path().join("deep");
    Run::ploopfs().args(["create", "--size", "20M"]).arg(&deep).ok();
    Run::ploopfs().args(["snapshot", "create"]).arg(folder.path().join("deep.hds")).arg("s1").ok();
    let mount = Mount::over(folder.path(), &["--create", "vm1=20M"]);
    let pid = mount.pid();
    // The lowest number that is free: with that as the limit it opens nothing more.
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).expect("listed").flatten();
    let used: Vec<u32> = fds.filter_map(|fd| fd.file_name().to_str()?.parse().ok()).collect();
    let free = (0..).find(|fd| !used.contains(fd)).expect("a free one");
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("alive");
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).expect("a line");
    let before = line.split_whitespace().next().expect("a number").to_owned();
    // The soft one alone: to set the other one again takes more than root has in a container.
    let limit = |n: &str| ok("prlimit", &["--pid", &pid.to_string(), &format!("--nofile={n}:")]);
    fs::write(folder.path().join("notes0"), "").expect("written");
    for spare in 0..6 {
        limit(&(free + spare).to_string());
        // A look at the folder, which fails as a whole, or in the middle of an image.
        let (from, to) = (format!("notes{spare}"), format!("notes{}", spare + 1));
        fs::rename(folder.path().join(from), folder.path().join(to)).expect("renamed");
        thread::sleep(Duration::from_millis(400));
    }
    fs::copy(mount.delta("vm1"), mount.delta("new")).expect("copied");
    fs::remove_file(mount.delta("vm1")).expect("removed");
    limit(&before);
    assert!(log(&mount).contains("looked at again"), "no look failed: {}", log(&mount));
    // And looks again by itself.
    assert!(until(Duration::from_secs(20), || mount.flat("new").exists() && !mount.flat("vm1").exists()));
    assert_eq!(fs::read_dir(mount.point().join(".snapshots/deep")).expect("listed").count(), 1);
    assert!(!log(&mount).contains("deep: no longer served"), "{}", log(&mount));
    fs::read(mount.flat("deep")).expect("opens and reads");
}
