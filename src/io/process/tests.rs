//! What a daemon's process is given, seen from /proc.

use super::*;
use std::path::Path;

/// Set in a copy of the test program that runs one test alone, as its settings would stick to the others.
const ALONE: &str = "PLOOPFS_TEST_ALONE";

/// True in the copy; else runs the test `name` in such a copy, under `wrapper`, and says false.
fn alone(name: &str, wrapper: &[&str]) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let own = std::env::current_exe().expect("own path");
    let mut words = wrapper.iter().map(std::ffi::OsString::from).collect::<Vec<_>>();
    words.push(own.into());
    let test = format!("io::process::tests::{name}");
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).args(["--exact", &test, "--test-threads=1"]).env(ALONE, "1");
    let output = command.output().expect("run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{output:?}");
    false
}

fn status_field(name: &str) -> String {
    let status = fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix(name)).expect(name);
    line.trim_start_matches(':').trim().to_owned()
}

#[test]
fn a_hardened_process_is_an_io_flusher_locked_in_memory_and_no_prey_of_the_oom_killer() {
    if !alone("a_hardened_process_is_an_io_flusher_locked_in_memory_and_no_prey_of_the_oom_killer", &[]) {
        return;
    }
    let able = rustix::thread::capabilities(None).expect("capget").effective;
    // Locking needs another of root's powers; these two need this one, which some containers take away.
    let expected = if able.contains(CapabilitySet::SYS_RESOURCE) { 0 } else { 2 };
    let refused = harden(1000);
    assert_eq!(refused.len(), expected, "{refused:?}");
    let powerful = expected == 0;
    assert_eq!(rustix::process::is_io_flusher().is_ok_and(|is| is), powerful);
    let score = fs::read_to_string("/proc/self/oom_score_adj").expect("score");
    assert_eq!(score.trim() == "-1000", powerful);
    assert!(rustix::process::getrlimit(Resource::Nofile).current.is_none_or(|limit| limit >= 1000));
    // Untouched memory is not made present by the lock.
    let before = status_field("VmRSS");
    let kib = |text: &str| text.split(' ').next().and_then(|n| n.parse::<u64>().ok()).expect("kB");
    let untouched: Vec<u8> = Vec::with_capacity(256 << 20);
    let grown = kib(&status_field("VmRSS")).saturating_sub(kib(&before));
    assert!(grown < 64 << 10, "{grown} KiB for {} untouched bytes", untouched.capacity());
    assert!(kib(&status_field("VmLck")) > 0);
    // Threads made later inherit the mark.
    let inherited = spawn_thread("later", || rustix::process::is_io_flusher().is_ok_and(|is| is));
    assert_eq!(inherited.expect("spawn").join().expect("no panic"), powerful);
}

#[test]
fn without_roots_powers_each_refusal_is_told_and_memory_is_not_locked_under_a_limit() {
    let name = "without_roots_powers_each_refusal_is_told_and_memory_is_not_locked_under_a_limit";
    let wrapper = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "prlimit", "--memlock=65536:65536"];
    if !alone(name, &wrapper) {
        return;
    }
    let refused = harden(1 << 40);
    assert_eq!(refused.len(), 4, "{refused:?}");
    let line = in_one_line(&refused).expect("refusals");
    assert!(refused.iter().all(|r| line.contains(r.what)) && line.lines().count() == 1, "{line}");
    assert!(line.len() <= 78, "{line}");
    assert_eq!(status_field("VmLck"), "0 kB");
    let working = vec![1u8; 16 << 20];
    assert_eq!(working.len(), 16 << 20, "memory can still be had");
}

#[test]
fn a_thread_that_is_to_run_soon_has_the_shortest_slice_and_so_have_those_that_it_starts() {
    let slices = spawn_thread("soon", || {
        let before = scheduling().expect("sched_getattr");
        run_soon().expect("sched_setattr");
        let after = scheduling().expect("sched_getattr");
        let started = spawn_thread("started", || scheduling().expect("sched_getattr").sched_runtime);
        assert_eq!(after.sched_nice, before.sched_nice);
        (before.sched_runtime, after.sched_runtime, started.expect("spawn").join().expect("no panic"))
    });
    let (before, after, started) = slices.expect("spawn").join().expect("no panic");
    if before == 0 {
        return println!("SKIPPED slices: before Linux 6.12 they cannot be chosen");
    }
    assert_ne!(before, SOON, "a thread like others");
    assert_eq!((after, started), (SOON, SOON));
}

#[test]
fn a_policy_that_somebody_chose_is_kept() {
    let name = "a_policy_that_somebody_chose_is_kept";
    if !alone(name, &["chrt", "--batch", "0"]) {
        return;
    }
    let before = scheduling().expect("sched_getattr");
    run_soon().expect("sched_setattr");
    let after = scheduling().expect("sched_getattr");
    assert_eq!(before.sched_policy, libc::SCHED_BATCH as u32);
    assert_eq!((after.sched_policy, after.sched_runtime), (before.sched_policy, before.sched_runtime));
}

#[test]
fn a_thread_carries_its_name() {
    let thread = spawn_thread("runner-15-chars", || {
        let first = rustix::thread::name().expect("name");
        name_this_thread("other").expect("rename");
        (first, rustix::thread::name().expect("name"))
    });
    let (first, second) = thread.expect("spawn").join().expect("no panic");
    assert_eq!((first.to_str(), second.to_str()), (Ok("runner-15-chars"), Ok("other")));
}

#[test]
fn the_daemon_command_runs_this_program_in_a_session_of_its_own() {
    let name = "the_daemon_command_runs_this_program_in_a_session_of_its_own";
    if std::env::var_os(ALONE).is_some() {
        let (pid, session) = (rustix::process::getpid(), rustix::process::getsid(None).expect("getsid"));
        assert_eq!(pid, session);
        assert_eq!(std::env::current_dir().expect("cwd"), Path::new("/"));
        assert_eq!(std::env::args().next().as_deref(), Some("ploopfs-test"));
        return;
    }
    let test = format!("io::process::tests::{name}");
    let mut command = daemon_command("ploopfs-test");
    let output = command.args(["--exact", &test]).env(ALONE, "1").output().expect("run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
}
