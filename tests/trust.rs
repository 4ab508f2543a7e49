//! Trust at the edges: what the owner of a folder can put in the way of root's commands and of root's mount, what a daemon
//! keeps of its caller, and what becomes of a start that fails.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use common::{Mount, Run, Traced, signal, text, until};
use rustix::process::Signal;
use serde_json::{Value, json};

/// How long an end may take on a busy machine.
const SOON: Duration = Duration::from_secs(20);
const NOBODY: u32 = 65534;

fn is_root() -> bool {
    let is = rustix::process::geteuid().is_root();
    if !is {
        println!("SKIPPED: needs root, to be someone else");
    }
    is
}

fn log(images: &Path) -> Vec<u8> {
    fs::read(images.join(".ploopfs/log")).unwrap_or_default()
}

fn is_mounted(point: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("the table of mounts");
    table.lines().any(|line| line.split(' ').nth(4) == Some(text(point)))
}

/// The processes that serve a folder.
fn serving(images: &Path) -> String {
    let pattern = format!("ploopfs (daemon|keeper) {} ", text(images));
    Run::new("pgrep").args(["-f", &pattern]).run().stdout
}

/// A user's folder with an image, and a socket on which that user answers whatever is asked, as a daemon would: with a
/// mount point of his own, where the flat files are links.
struct Stranger {
    folder: tempfile::TempDir,
    images: PathBuf,
    secret: Vec<u8>,
}

impl Stranger {
    fn new() -> Stranger {
        let folder = common::temp_dir();
        let (images, shown) = (folder.path().join("images"), folder.path().join("shown"));
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("open to all");
        fs::create_dir_all(shown.join(".snapshots/vm")).expect("folders");
        fs::create_dir(&images).expect("a folder");
        Run::ploopfs().args(["create", text(&images.join("vm")), "--size", "4M"]).ok();
        let secret: Vec<u8> =
            (0..1u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        fs::write(folder.path().join("secret"), &secret).expect("written");
        for link in ["vm.img", ".snapshots/vm/s.img"] {
            symlink(folder.path().join("secret"), shown.join(link)).expect("a link");
        }
        fs::create_dir(images.join(".ploopfs")).expect("a folder");
        for path in [&images, &images.join(".ploopfs"), &shown] {
            chown(path, Some(NOBODY), Some(NOBODY)).expect("given away");
        }
        let (ready, listens) = channel();
        let (at, hello) = (images.clone(), text(&shown).to_owned());
        std::thread::spawn(move || {
            // Of this thread alone; it ends with the test.
            let nobody = rustix::process::Uid::from_raw(NOBODY);
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).expect("nobody");
            let socket = UnixListener::bind(at.join(".ploopfs/control")).expect("bound");
            fs::set_permissions(at.join(".ploopfs/control"), fs::Permissions::from_mode(0o777))
                .expect("open");
            ready.send(()).expect("heard");
            for client in socket.incoming().flatten() {
                let mut out = client.try_clone().expect("a descriptor");
                for line in BufReader::new(client).lines().map_while(Result::ok) {
                    let answer = answer(&line, &at, &hello);
                    if writeln!(out, "{answer}").is_err() {
                        break;
                    }
                }
            }
        });
        listens.recv().expect("a stranger who answers");
        Stranger { folder, images, secret }
    }

    fn got(&self, file: &Path) -> bool {
        let found = fs::read(file).unwrap_or_default();
        found.windows(512).step_by(512).any(|part| part == &self.secret[4096..4608])
            || found.windows(512).any(|part| part == &self.secret[..512])
    }
}

fn answer(line: &str, images: &Path, shown: &str) -> Value {
    let level = |name: &str, last: u8, current: bool| {
        let guid = format!("{{11111111-2222-4333-8444-{last:012}}}");
        json!({"name": name, "guid": guid, "parent": null, "exclusive": 0, "shared": 0, "current": current,
               "temporary": false})
    };
    let op: Value = serde_json::from_str(line).unwrap_or_default();
    let mut answer = json!({"v": 1, "ok": true});
    let more = match op["op"].as_str().unwrap_or_default() {
        "hello" => json!({"hello": {"pid": 1, "keeper": 1, "version": "0.1.0", "mountpoint": shown,
                          "images": text(images), "transport": "fuse", "read_only": false}}),
        "list" => json!({"images": [{"name": "vm", "path": text(&images.join("vm.hds")), "kind": "ploop",
                         "size": 4 << 20, "allocated": 0, "served": true, "reason": null, "mode": "closed",
                         "openers": 0}]}),
        "snapshots" => json!({"snapshots": [level("", 1, true), level("s", 2, false)]}),
        "work" => json!({"done": {}}),
        _ => json!({}),
    };
    let more = more.as_object().cloned().unwrap_or_default();
    answer.as_object_mut().expect("an object").extend(more);
    answer
}

#[test]
fn a_stranger_who_answers_on_the_control_socket_is_not_believed() {
    if !is_root() {
        return;
    }
    let stranger = Stranger::new();
    let (image, out) = (stranger.images.join("vm"), stranger.folder.path().join("out"));
    let snapshot = format!("{}@s", text(&image));
    let commands: [&[&str]; 8] = [
        &["export", &snapshot, text(&out)],
        &["export", text(&image), text(&out)],
        &["backup", &snapshot, "-o", text(&out)],
        &["snapshot", "create", text(&image), "nightly"],
        &["attach", text(&image)],
        &["info", text(&image)],
        &["list", text(&stranger.images)],
        &["resize", text(&image), "8M"],
    ];
    for args in commands {
        let done = Run::ploopfs().args(args).limit(30).run();
        assert!(!done.success() && done.stderr.contains(&format!("user {NOBODY}")), "{done}");
        assert!(!stranger.got(&out), "{done}");
        let _ = fs::remove_file(&out);
    }
    let point = stranger.folder.path().join("point");
    let mount = Run::ploopfs().arg("mount").args([&stranger.images, &point]).limit(30).run();
    assert!(
        !mount.success() && !mount.stderr.contains(text(&stranger.folder.path().join("shown"))),
        "{mount}"
    );
}

#[test]
fn a_socket_that_lets_nobody_in_holds_no_command_up_for_ever() {
    let folder = common::temp_dir();
    Run::ploopfs().args(["create", text(&folder.path().join("vm")), "--size", "4M"]).ok();
    fs::create_dir(folder.path().join(".ploopfs")).expect("a folder");
    let socket = UnixListener::bind(folder.path().join(".ploopfs/control")).expect("bound");
    // Never accepted: the queue is as long as the listener wished.
    let mut waiting = Vec::new();
    rustix::net::listen(&socket, 0).expect("a short queue");
    let flags = rustix::net::SocketFlags::NONBLOCK;
    let address = rustix::net::SocketAddrUnix::new(folder.path().join(".ploopfs/control")).expect("short");
    loop {
        let (family, kind) = (rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM);
        let client = rustix::net::socket_with(family, kind, flags, None).expect("a socket");
        if rustix::net::connect(&client, &address).is_err() {
            break;
        }
        waiting.push(client);
    }
    let listed = Run::ploopfs().args(["list", text(folder.path())]).limit(60).run();
    assert!(listed.status.is_some_and(|status| !status.success()), "{listed}");
    assert!(listed.stderr.contains("cannot reach the daemon"), "{listed}");
}

#[test]
fn what_lies_over_a_mount_is_not_taken_for_the_disk() {
    require!("fuse", "loop");
    let mount = Mount::new(&["--create", "vm1=4M"]);
    let tmpfs = common::Guest::adopt(mount.point());
    Run::new("mount").args(["-t", "tmpfs", "none", text(mount.point())]).ok();
    fs::write(mount.flat("vm1"), vec![9; 4 << 20]).expect("another disk");
    let out = mount.images().join("out.raw");
    let export = Run::ploopfs().args(["export", text(&mount.images().join("vm1")), text(&out)]).run();
    let attach = Run::ploopfs().args(["attach", text(&mount.images().join("vm1"))]).run();
    drop(tmpfs);
    for done in [&export, &attach] {
        assert!(!done.success() && done.stderr.contains("something else lies on"), "{done}");
    }
    assert!(!out.exists());
}

/// Mounts a folder in whose `.ploopfs` something was put before; it must come back.
fn mount_over_what(folder: &Path, put: impl FnOnce(&Path)) -> (Mount, common::Finished) {
    let images = folder.join("images");
    fs::create_dir_all(images.join(".ploopfs")).expect("folders");
    put(&images.join(".ploopfs"));
    let mut mount = Mount::prepare(&images, &["--create", "vm1=4M"]);
    let began = Instant::now();
    let done = mount.try_start();
    assert!(began.elapsed() < SOON, "{done}");
    (mount, done)
}

#[test]
fn a_pipe_or_a_link_or_a_second_name_as_log_or_lock_neither_hangs_a_mount_nor_is_written() {
    require!("fuse");
    for name in ["log", "log.1", "lock", "control"] {
        for what in ["a pipe", "a second name", "a link", "a dangling link"] {
            let folder = common::temp_dir();
            let other = folder.path().join("other");
            fs::write(&other, "precious").expect("written");
            let (mut mount, done) = mount_over_what(folder.path(), |private| match what {
                "a pipe" => drop(Run::new("mkfifo").arg(private.join(name)).ok()),
                "a second name" => fs::hard_link(&other, private.join(name)).expect("a second name"),
                "a link" => symlink(&other, private.join(name)).expect("a link"),
                _ => symlink("nowhere", private.join(name)).expect("a link"),
            });
            assert!(done.success(), "{what} as {name}: {done}");
            mount.open("vm1").write_all_at(b"x", 0).expect("served");
            assert!(String::from_utf8_lossy(&log(mount.images())).contains("vm1.hds"), "{what} as {name}");
            mount.umount();
            assert_eq!(fs::read(&other).expect("there"), b"precious", "{what} as {name}");
            assert!(!folder.path().join("images/.ploopfs/nowhere").exists(), "{what} as {name}");
        }
    }
}

#[test]
fn a_private_folder_that_is_a_link_is_refused_with_words() {
    require!("fuse");
    let folder = common::temp_dir();
    let elsewhere = folder.path().join("elsewhere");
    fs::create_dir(&elsewhere).expect("a folder");
    let (mount, done) = mount_over_what(folder.path(), |private| {
        fs::remove_dir(private).expect("empty");
        symlink(&elsewhere, private).expect("a link");
    });
    assert!(!done.success() && done.stderr.contains(".ploopfs"), "{done}");
    assert!(until(SOON, || serving(mount.images()).is_empty()) && !is_mounted(mount.point()), "{done}");
    assert_eq!(fs::read_dir(&elsewhere).expect("there").count(), 0, "nothing was made behind the link");
}

#[test]
fn a_folder_whose_lock_file_was_removed_is_not_served_twice() {
    require!("fuse");
    let first = Mount::new(&["--create", "vm1=4M"]);
    let pid = first.pid();
    fs::remove_dir_all(first.images().join(".ploopfs")).expect("removed");
    let mut second = Mount::prepare(first.images(), &[]);
    let refused = second.try_start();
    assert_eq!(refused.status.and_then(|status| status.code()), Some(4), "{refused}");
    assert!(refused.stderr.contains(&format!("(pid {pid}")), "{refused}");
    first.open("vm1").write_all_at(b"x", 0).expect("the first goes on");
}

#[test]
fn a_lock_and_a_pipe_of_the_caller_do_not_live_in_the_mount() {
    require!("fuse");
    let folder = common::temp_dir();
    let (images, point) = (folder.path().join("images"), folder.path().join("point"));
    let _mount = Mount::adopt(&images, &point);
    let script = format!(
        "exec 9>{0}/lock 7>&1; flock 9; {1} mount --create vm1=4M {2} {3} >/dev/null 2>&1",
        text(folder.path()),
        env!("CARGO_BIN_EXE_ploopfs"),
        text(&images),
        text(&point)
    );
    let mut shell = Command::new("bash").args(["-c", &script]).stdout(Stdio::piped()).spawn().expect("bash");
    let mut pipe = shell.stdout.take().expect("piped");
    let (send, ended) = channel();
    std::thread::spawn(move || send.send(pipe.read_to_end(&mut Vec::new()).is_ok()));
    assert!(shell.wait().expect("ended").success());
    assert_eq!(ended.recv_timeout(SOON), Ok(true), "the pipe still has a writer");
    Run::new("flock").args(["-n", text(&folder.path().join("lock")), "true"]).ok();
    assert!(is_mounted(&point));
}

#[test]
fn names_with_control_characters_stay_one_line_of_the_log() {
    require!("fuse");
    let folder = common::temp_dir();
    let images = folder.path().join("images");
    fs::create_dir(&images).expect("a folder");
    Run::ploopfs().args(["create", text(&images.join("plain")), "--size", "4M"]).ok();
    for name in ["esc\x1b]0;owned\x07", "two\n1999-12-31T00:00:00Z ERROR forged", "back\x08\x7f", "cr\rover"]
    {
        fs::copy(images.join("plain.hds"), images.join(format!("{name}.hds"))).expect("copied");
    }
    fs::write(images.join("torn\x1b[32m.hds"), b"WithouFreSpacExt\0\0\0\0").expect("written");
    let mut mount = Mount::over(&images, &[]);
    mount.umount();
    let log = log(&images);
    let odd = log.iter().filter(|b| (**b < 0x20 && **b != b'\n') || **b == 0x7f).count();
    assert_eq!(odd, 0, "{}", String::from_utf8_lossy(&log));
    assert!(log.split(|b| *b == b'\n').all(|line| !line.starts_with(b"1999")));
    assert!(String::from_utf8_lossy(&log).contains("esc\\u{1b}]0;owned"));
}

#[test]
fn the_program_of_on_event_is_given_no_name_that_looks_like_an_option() {
    require!("fuse");
    let folder = common::temp_dir();
    let (images, program, heard) =
        (folder.path().join("images"), folder.path().join("tell"), folder.path().join("heard"));
    let script = format!("#!/bin/sh\nprintf '%s|' \"$@\" \"$PLOOPFS_IMAGE\" >> {}\n", text(&heard));
    fs::write(&program, script).expect("a script");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("a program");
    fs::create_dir(&images).expect("a folder");
    Run::ploopfs().args(["create", text(&images.join("-rf")), "--size", "4M"]).ok();
    let mount = Mount::over(&images, &["--low-water", "100", "--on-event", text(&program)]);
    let open = mount.open("-rf");
    open.write_all_at(&[7; 1 << 20], 0).expect("written");
    open.sync_all().expect("synced");
    let said = || fs::read_to_string(&heard).unwrap_or_default();
    assert!(
        until(SOON, || said().ends_with("|-rf|")),
        "{} {}",
        said(),
        String::from_utf8_lossy(&log(&images))
    );
    assert_eq!(said(), "low-water|./-rf|-rf|");
}

#[test]
fn a_limit_of_file_size_is_want_of_space_and_ends_neither_daemon_nor_import() {
    require!("fuse");
    let folder = common::temp_dir();
    let (images, point) = (folder.path().join("images"), folder.path().join("point"));
    let mount = Mount::adopt(&images, &point);
    let limited = ["--fsize=8388608", env!("CARGO_BIN_EXE_ploopfs")];
    Run::new("prlimit")
        .args(limited)
        .args(["mount", "--on-full", "error", "--create", "vm1=64M", text(&images), text(&point)])
        .ok();
    let open = mount.open("vm1");
    let full = (0..32).find_map(|n| open.write_all_at(&[7; 1 << 20], n << 20).err());
    let full = full.expect("the file's limit is met");
    assert!([libc::ENOSPC, libc::EFBIG].contains(&full.raw_os_error().unwrap_or(0)), "{full}");
    mount.open("vm1").read_exact_at(&mut [0; 512], 0).expect("the daemon lives");
    let (raw, imported) = (folder.path().join("raw"), folder.path().join("imported"));
    fs::write(&raw, vec![7; 32 << 20]).expect("written");
    let import =
        Run::new("prlimit").args(limited).args(["import", text(&raw), text(&imported)]).limit(60).run();
    assert_eq!(import.status.and_then(|status| status.code()), Some(1), "{import}");
    assert!(import.stderr.contains("full"), "{import}");
}

/// The call in question, and what is done to it. The first only asks for the version.
fn tampered(inject: &str) -> Traced {
    let inject = format!("inject=landlock_create_ruleset:{inject}");
    Traced::start(&["-e", "trace=landlock_create_ruleset", "-e", &inject], &[])
}

#[test]
fn a_sandbox_that_could_not_be_had_just_now_fails_the_mount_and_leaves_no_dead_one() {
    require!("fuse", "landlock", "strace");
    let mut mount = tampered("error=EMFILE:when=2+");
    let said = mount.fails();
    assert!(said.contains("--no-sandbox"), "{said}");
}

#[test]
fn a_mount_whose_keeper_is_killed_at_the_start_is_taken_away() {
    require!("fuse", "landlock", "strace");
    let mut mount = tampered("delay_enter=2s");
    assert!(until(SOON, || mount.is_mounted()), "not mounted");
    signal(mount.process("keeper").expect("one keeper"), Signal::KILL);
    mount.fails();
}

#[test]
fn a_start_whose_keeper_was_stopped_says_so_and_ends() {
    require!("fuse", "strace");
    let mut mount = Traced::start(&["-e", "trace=mount", "-e", "inject=mount:signal=SIGSTOP"], &[]);
    let (status, said) = mount.end();
    assert_eq!(status, Some(1), "{said}");
    let keeper = mount.process("keeper").expect("one keeper");
    assert!(
        said.contains("waiting for the start") && said.contains(&format!("kill -CONT {keeper}")),
        "{said}"
    );
    signal(keeper, Signal::CONT);
    // Which no command waits for any more.
    assert!(until(SOON, || mount.processes().is_empty() && !mount.is_mounted()));
}

#[test]
fn a_stranger_who_answers_on_the_control_socket_does_not_keep_a_mount_from_its_end() {
    require!("fuse");
    if !is_root() {
        return;
    }
    let (stranger, mount) = (Stranger::new(), Mount::new(&["--create", "vm1=8M"]));
    let private = mount.images().join(".ploopfs");
    fs::rename(&private, mount.images().join("old")).expect("renamed");
    fs::rename(stranger.images.join(".ploopfs"), &private).expect("renamed");
    let done = Run::ploopfs().arg("umount").arg(mount.point()).limit(60).run();
    // How the images were closed it does not know.
    assert!(done.code() == Some(1) && done.stderr.contains("its daemon has ended"), "{done}");
    assert!(!mount.is_mounted());
}

/// The name, the arguments and the owner in /proc of a daemon, and the real user of a set-uid program that another started.
const DISGUISED: &str = r#"exec -a ploopfs tail daemon "$0" "$1" --follow"#;

#[test]
fn a_set_uid_program_of_another_user_is_not_taken_for_a_daemon() {
    require!("fuse");
    if !is_root() {
        return;
    }
    let folder = common::temp_dir();
    let (images, point) = (folder.path().join("images"), folder.path().join("point"));
    fs::create_dir(&images).and_then(|()| fs::create_dir(&point)).expect("folders");
    fs::write(folder.path().join("daemon"), "").expect("written");
    let mut command = Command::new("setpriv");
    command.arg(format!("--ruid={NOBODY}")).args(["bash", "-p", "-c", DISGUISED]).args([&images, &point]);
    command.current_dir(folder.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().expect("setpriv");
    let line = format!("/proc/{}/cmdline", child.id());
    let disguised = until(SOON, || fs::read(&line).is_ok_and(|line| line.starts_with(b"ploopfs\0daemon\0")));
    let done = Run::ploopfs().arg("umount").arg(&point).limit(60).run();
    child.kill().and_then(|()| child.wait()).expect("our own child");
    assert!(disguised && done.success() && done.output().contains("not mounted"), "{done}");
}

/// A mount of our type by another user, to whom root may look, and who never answers.
struct Silent {
    folder: tempfile::TempDir,
    point: PathBuf,
    connection: Option<std::os::fd::OwnedFd>,
}

impl Silent {
    fn new() -> Silent {
        let folder = common::temp_dir();
        let (point, source) = (folder.path().join("point"), folder.path().join("source"));
        [&point, &source].into_iter().for_each(|dir| fs::create_dir(dir).expect("a folder"));
        Silent::at(folder, &point, &source)
    }

    fn at(folder: tempfile::TempDir, point: &Path, source: &Path) -> Silent {
        use rustix::mount::{MountFlags, mount};
        let connection = fs::File::options().read(true).write(true).open("/dev/fuse").expect("/dev/fuse");
        let fd = std::os::fd::AsRawFd::as_raw_fd(&connection);
        let data = format!("fd={fd},rootmode=40000,user_id={NOBODY},group_id={NOBODY},allow_other");
        let data = std::ffi::CString::new(data).expect("no NUL");
        mount(source, point, "fuse.ploopfs", MountFlags::NOSUID | MountFlags::NODEV, data.as_c_str())
            .expect("mounted");
        Silent { folder, point: point.to_owned(), connection: Some(connection.into()) }
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        // The end of the connection answers what waits.
        drop(self.connection.take());
        let _ = rustix::mount::unmount(&self.point, rustix::mount::UnmountFlags::DETACH);
    }
}

/// `umount` asked the mount of another user whether it is dead, by a call that has no end, and whose caller cannot even be
/// killed once the request was read.
#[test]
fn a_mount_of_another_user_that_never_answers_holds_up_no_command_of_root() {
    require!("fuse");
    if !is_root() {
        return;
    }
    let silent = Silent::new();
    let (folder, point) = (silent.folder.path(), &silent.point);
    let (images, flat, new) = (folder.join("images"), point.join("vm.img"), point.join("../point/new"));
    let to_flat = format!("--output={}", text(&flat));
    fs::create_dir(&images).expect("a folder");
    let commands: [&[&str]; 14] = [
        &["umount", text(point)],
        &["mount", text(&images), text(point)],
        &["mount", text(point), text(&images)],
        &["mount", text(&flat), text(&images)],
        &["list", text(point)],
        &["info", text(&flat)],
        &["attach", text(&flat)],
        &["detach", text(&flat)],
        &["export", text(&flat), "-"],
        &["create", text(&new), "--size", "1M"],
        &["import", text(&flat), text(&images)],
        &["backup", text(&images), &to_flat],
        &["snapshot", "list", text(&flat)],
        &["top", "--once", text(point)],
    ];
    for args in commands {
        let done = Run::ploopfs().args(args).limit(20).run();
        assert!(done.code().is_some_and(|code| code != 0), "{done}");
        assert!(done.stderr.contains(&format!("mount of user {NOBODY}")), "{done}");
    }
    let listed = Run::ploopfs().args(["list", "--all", text(folder)]).limit(20).ok();
    assert!(listed.contains("point: is a mount of user"), "{listed}");
    Run::ploopfs().arg("list").in_folder(&images).limit(20).ok();
    let done = Run::ploopfs().args(["umount", "--detach", text(point)]).limit(20).run();
    assert!(done.status.is_some() && !is_mounted(point), "{done}");
}

/// A daemon that looked at its folder asked each file system that is mounted in it, and waited without an end: no start, no new
/// image, no first snapshot.
#[test]
fn a_mount_in_the_images_folder_that_never_answers_holds_up_no_image_beside_it() {
    require!("fuse");
    if !is_root() {
        return;
    }
    let folder = common::temp_dir();
    let images = folder.path().join("images");
    let inside = images.join("vm0");
    fs::create_dir_all(&inside).expect("folders");
    for image in ["vm1", "vm2"] {
        Run::ploopfs().args(["create", text(&images.join(image)), "--size", "16M"]).ok();
    }
    // Once before the start, once behind it.
    for before in [true, false] {
        let scratch = common::temp_dir();
        let source = scratch.path().to_owned();
        let silent = before.then(|| Silent::at(common::temp_dir(), &inside, &source));
        let mut mount = Mount::prepare(&images, &[]);
        mount.start();
        let silent = silent.unwrap_or_else(|| Silent::at(scratch, &inside, &source));
        let (old, new) = (if before { "vm1" } else { "vm2" }, if before { "vm3" } else { "vm4" });
        mount.open(old).write_all_at(&[7; 4096], 0).expect("written");
        for args in [
            &["create", text(&images.join(new)), "--size", "16M"][..],
            &["snapshot", "create", text(&images.join(old)), "one"],
            &["list", text(&images)],
        ] {
            Run::ploopfs().args(args).limit(30).ok();
        }
        mount.open(new).write_all_at(&[7; 4096], 0).expect("written");
        assert!(mount.flat(old).exists());
        // What it then has to say is heard.
        drop(silent);
        let other = images.join("vm0/vm0.hds");
        Run::ploopfs().args(["create", text(&other), "--size", "1M"]).ok();
        fs::remove_file(other).expect("removed");
        mount.umount();
    }
}
