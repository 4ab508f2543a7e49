//! The offline commands, with the real binary: what every command owes its user, then create, list, info, check.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// A folder of images that goes away with the test.
struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(TempDir::with_prefix("ploopfs-offline-").expect("a temporary folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs ploopfs with the folder as its current one.
    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ploopfs"));
        command.args(args).current_dir(self.0.path()).env_remove("RUST_LOG").output().expect("ploopfs starts")
    }

    /// Runs it, demands status 0 and silence on stderr, returns stdout.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(status(&output), 0, "{args:?}: {output:?}");
        assert!(output.stderr.is_empty(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(args)).expect("valid JSON")
    }

    /// Runs it, demands `code` and one error line, returns the line.
    fn fails(&self, code: i32, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(status(&output), code, "{args:?}: {output:?}");
        let text = String::from_utf8(output.stderr).expect("UTF-8");
        assert!(!text.is_empty() && !text.contains("panicked"), "{args:?}: {text}");
        text
    }
}

fn status(output: &Output) -> i32 {
    output.status.code().expect("not killed")
}

/// The commands that take an existing image.
const READERS: [&str; 3] = ["info", "check", "map"];
const COMMANDS: [&str; 19] = [
    "top",
    "create",
    "list",
    "info",
    "map",
    "snapshot",
    "merge",
    "clone",
    "resize",
    "diff",
    "backup",
    "restore",
    "import",
    "export",
    "check",
    "compact",
    "cbt",
    "meta",
    "completions",
];

#[test]
fn every_command_explains_itself() {
    let folder = Folder::new();
    for command in COMMANDS {
        for flag in ["-h", "--help"] {
            let help = folder.ok(&[command, flag]);
            assert!(help.contains(&format!("Usage: ploopfs {command}")), "{help}");
        }
        assert!(folder.ok(&["--help"]).contains(&format!("\n  {command} ")));
    }
    assert_eq!(folder.ok(&["--version"]), format!("ploopfs {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn unknown_options_and_missing_arguments_are_usage_errors() {
    let folder = Folder::new();
    for command in COMMANDS {
        folder.fails(2, &[command, "--no-such-option"]);
        // What takes any number of names lacks one.
        let wrong = if command == "clone" { &["a"][..] } else { &["a", "b", "c", "d"] };
        let line = folder.fails(2, &[&[command], wrong].concat());
        assert!(line.starts_with("error: "), "{line}");
    }
    for command in ["create", "info", "map", "check", "completions"] {
        folder.fails(2, &[command]);
    }
    folder.fails(2, &[]);
    folder.fails(2, &["no-such-command"]);
    folder.fails(2, &["completions", "no-such-shell"]);
}

#[test]
fn a_missing_image_is_named_and_status_1() {
    let folder = Folder::new();
    for command in READERS {
        let line = folder.fails(1, &[command, "nothing"]);
        assert!(line.starts_with("ploopfs: nothing: no such image"), "{line}");
        folder.fails(1, &[command, "vm@snapshot"]);
    }
    folder.fails(1, &["list", "nothing"]);
}

#[test]
fn folders_links_pipes_and_foreign_files_are_refused_with_the_reason() {
    let folder = Folder::new();
    fs::create_dir(folder.path("plain")).expect("mkdir");
    fs::create_dir(folder.path("layered")).expect("mkdir");
    fs::write(folder.path("layered/DiskDescriptor.xml"), "<x/>").expect("write");
    fs::write(folder.path("notes"), "hello").expect("write");
    folder.ok(&["create", "vm", "--size", "1M"]);
    std::os::unix::fs::symlink("vm.hds", folder.path("link.hds")).expect("symlink");
    for command in READERS {
        let line = folder.fails(3, &[command, "layered"]);
        assert!(line.contains("layered/DiskDescriptor.xml"), "{line}");
    }
    let made = Command::new("mkfifo").arg(folder.path("pipe.hds")).status().expect("mkfifo");
    assert!(made.success());
    for command in READERS {
        for (name, reason) in [
            ("plain", "a folder without DiskDescriptor.xml"),
            ("notes", "nor does it begin with the ploop magic"),
            ("link.hds", "a symbolic link"),
            ("pipe.hds", "not a regular file"),
        ] {
            let line = folder.fails(1, &[command, name]);
            assert!(line.contains(name) && line.contains(reason), "{line}");
        }
    }
}

#[test]
fn empty_and_truncated_files_are_damage_that_names_the_field() {
    let folder = Folder::new();
    folder.ok(&["create", "vm", "--size", "64M"]);
    let good = fs::read(folder.path("vm.hds")).expect("read");
    for length in [0, 1, 63, 64, 4096, MIB as usize - 1] {
        fs::write(folder.path("cut.hds"), &good[..length]).expect("write");
        for command in READERS {
            let output = folder.run(&[command, "cut"]);
            assert_eq!(status(&output), 3, "{command} {length}: {output:?}");
            let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            let field = if length < 64 { "header = " } else { "m_FirstBlockOffset = 0x800 at byte 48" };
            assert!(text.contains(field), "{text}");
        }
    }
}

#[test]
fn reading_commands_change_no_byte_and_work_on_files_that_cannot_be_written() {
    let folder = Folder::new();
    folder.ok(&["create", "vm", "--size", "64M", "--preallocate"]);
    let path = folder.path("vm.hds");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).expect("chmod");
    let before =
        (fs::read(&path).expect("read"), fs::metadata(&path).expect("stat").modified().expect("mtime"));
    folder.ok(&["list", ".", "--all"]);
    for command in READERS {
        folder.ok(&[command, "vm"]);
        folder.ok(&[command, "vm", "--json"]);
    }
    let after =
        (fs::read(&path).expect("read"), fs::metadata(&path).expect("stat").modified().expect("mtime"));
    assert!(before == after);
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let folder = Folder::new();
    for args in [&["--help"][..], &["completions", "bash"], &["list", ".", "--all", "--json"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ploopfs"));
        command.args(args).current_dir(folder.0.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("ploopfs starts");
        drop(child.stdout.take());
        let mut stderr = String::new();
        child.stderr.take().expect("piped").read_to_string(&mut stderr).expect("read");
        let status = child.wait().expect("wait");
        assert_eq!((status.code(), stderr.as_str()), (Some(0), ""), "{args:?}");
    }
}

#[test]
fn create_makes_what_info_shows() {
    let folder = Folder::new();
    assert_eq!(folder.ok(&["create", "vm1", "--size", "10G"]), "created vm1.hds, 10 GiB\n");
    let info = folder.json(&["info", "vm1", "--json"]);
    for (field, value) in [("name", "vm1"), ("path", "vm1.hds"), ("kind", "ploop"), ("mode", "offline")] {
        assert_eq!(info[field], value, "{info}");
    }
    assert_eq!((&info["size"], &info["in_use"]), (&(10u64 << 30).into(), &false.into()));
    assert_eq!(info["allocated"], MIB, "header and BAT, nothing else");
    let level = &info["levels"][0];
    assert_eq!(
        (&level["version"], &level["cluster"], &level["mapped"]),
        (&"v2".into(), &MIB.into(), &0.into())
    );
    assert_eq!(info["openers"], Value::Array(Vec::new()));
    let text = folder.ok(&["info", "vm1"]);
    assert!(text.contains("size:        10 GiB (10737418240 bytes)\n"), "{text}");
}

#[test]
fn create_takes_sizes_clusters_formats_and_preallocation() {
    let folder = Folder::new();
    folder.ok(&["create", "thin", "--size", "1.5G", "--cluster", "64k"]);
    folder.ok(&["create", "odd", "--size", "1000001", "--cluster", "32K"]);
    folder.ok(&["create", "plain", "--size", "10M", "--format", "raw"]);
    folder.ok(&["create", "full.raw", "--size", "10M", "--preallocate"]);
    folder.ok(&["create", "full2", "--size", "10M", "--preallocate"]);
    let info = |name: &str| folder.json(&["info", name, "--json"]);
    assert_eq!(
        (&info("thin")["size"], &info("thin")["levels"][0]["cluster"]),
        (&(3u64 << 29).into(), &65536.into())
    );
    assert_eq!(info("odd")["size"], 31 * 32768);
    assert_eq!((&info("plain")["kind"], &info("plain")["allocated"]), (&"raw".into(), &0.into()));
    assert_eq!(info("full")["size"], 10 * MIB);
    // A fragmented host adds a block or two of its own.
    let taken = |name: &str| info(name)["allocated"].as_u64().expect("a number") / MIB;
    assert_eq!((taken("full"), taken("full2")), (10, 11));
    assert_eq!(info("full2")["levels"][0]["mapped"], 10);
    for name in ["thin", "odd", "plain", "full", "full2"] {
        folder.ok(&["check", name]);
    }
    let mode = fs::metadata(folder.path("thin.hds")).expect("stat").permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
}

#[test]
fn create_refuses_what_is_there_and_what_cannot_be() {
    let folder = Folder::new();
    folder.ok(&["create", "vm", "--size", "10M"]);
    let before = fs::read(folder.path("vm.hds")).expect("read");
    let line = folder.fails(1, &["create", "vm", "--size", "10M"]);
    assert!(line.contains("vm.hds: there is an image named vm already"), "{line}");
    folder.fails(1, &["create", "vm.raw", "--size", "10M"]);
    assert_eq!(fs::read(folder.path("vm.hds")).expect("read"), before);
    let line = folder.fails(1, &["create", "no/such/folder/vm", "--size", "10M"]);
    assert!(line.contains("no/such/folder: no such folder; make it first"), "{line}");
    for args in [
        &["create", "x", "--size", "10GB"][..],
        &["create", "x", "--size", "-1"],
        &["create", "x", "--size", "0"],
        &["create", "x", "--size", "15E"],
        &["create", "x", "--size", "1M", "--cluster", "48K"],
        &["create", "x", "--size", "1M", "--cluster", "128M"],
        &["create", "x.raw", "--size", "1M", "--format", "ploop"],
        &["create", "x.raw", "--size", "1M", "--cluster", "1M"],
        &["create", ".x", "--size", "1M"],
        &["create", "x/", "--size", "1M"],
    ] {
        folder.fails(2, args);
    }
    assert_eq!(fs::read_dir(folder.0.path()).expect("read").count(), 1, "nothing half-made is left");
}

#[test]
fn list_names_images_and_all_says_why_the_rest_is_none() {
    let folder = Folder::new();
    folder.ok(&["create", "a", "--size", "2G"]);
    folder.ok(&["create", "b.raw", "--size", "64K"]);
    fs::copy(folder.path("a.hds"), folder.path("copy.hds")).expect("copy");
    fs::copy(folder.path("a.hds"), folder.path("copy")).expect("copy");
    fs::copy(folder.path("a.hds"), folder.path("base.hds")).expect("copy");
    fs::write(folder.path("DiskDescriptor.xml"), "<Image><File>base.hds</File></Image>").expect("write");
    fs::write(folder.path("bad.hds"), "no image").expect("write");
    fs::write(folder.path("notes\x1b.txt"), "hello").expect("write");
    fs::create_dir(folder.path("sub")).expect("mkdir");

    let listing = folder.json(&["list", ".", "--json"]);
    let images = listing["images"].as_array().expect("an array");
    let names: Vec<_> = images.iter().map(|row| row["name"].as_str().expect("a name")).collect();
    assert_eq!(names, ["a", "b", "bad", "copy", "copy"]);
    assert!(listing.get("others").is_none());
    assert_eq!((&images[0]["size"], &images[0]["reason"]), (&(2u64 << 30).into(), &Value::Null));
    assert_eq!((&images[0]["kind"], &images[1]["kind"]), (&"ploop".into(), &"raw".into()));
    assert_eq!((&images[0]["served"], &images[0]["path"]), (&false.into(), &"a.hds".into()));
    let reason = |index: usize| images[index]["reason"].as_str().expect("a reason");
    assert!(reason(2).starts_with("damaged: header = 0x8"), "{}", reason(2));
    assert!(reason(3).contains("copy and copy.hds") && reason(3) == reason(4), "{}", reason(3));

    let listing = folder.json(&["list", ".", "--all", "--json"]);
    let others = listing["others"].as_array().expect("an array");
    let paths: Vec<_> = others.iter().map(|row| row["path"].as_str().expect("a path")).collect();
    assert_eq!(paths, ["DiskDescriptor.xml", "base.hds", "notes\u{1b}.txt", "sub"]);

    let text = folder.ok(&["list", ".", "--all"]);
    assert!(text.contains("    base.hds: a delta of the layered image"), "{text}");
    assert!(!text.contains('\u{1b}'), "a file name drives no terminal: {text}");
    let rows = text.lines().filter(|line| !line.starts_with(' '));
    assert!(rows.clone().count() > 5 && rows.clone().all(|line| line.chars().count() <= 80), "{text}");
    let empty = folder.run(&["list", "sub"]);
    assert!(empty.status.success() && empty.stdout.is_empty(), "an empty folder lists nothing: {empty:?}");
    assert_eq!(empty.stderr, b"ploopfs: sub: no images in this folder\n");
}

#[test]
fn check_tells_leaks_and_a_left_over_mark_from_damage() {
    let folder = Folder::new();
    folder.ok(&["create", "vm", "--size", "8M"]);
    let path = folder.path("vm.hds");
    assert_eq!(folder.ok(&["check", "vm"]), "vm.hds: no errors\n");
    let file = fs::OpenOptions::new().write(true).open(&path).expect("open");
    let entry =
        |cluster: u64, value: u32| file.write_all_at(&value.to_le_bytes(), 64 + 4 * cluster).expect("write");
    file.set_len(4 * MIB).expect("extend");
    file.write_all_at(&0x746F_6E59_u32.to_le_bytes(), 44).expect("write");
    entry(0, 2);
    // The cluster before it takes space; a hole there would be free and no leak.
    file.write_all_at(b"x", MIB).expect("write");

    let report = folder.json(&["check", "vm", "--json"]);
    assert_eq!((&report["errors"], &report["leaks"], &report["tail"]), (&0.into(), &2.into(), &1.into()));
    assert_eq!((&report["in_use"], &report["repaired"]), (&true.into(), &0.into()));
    let text = folder.ok(&["check", "vm"]);
    assert!(text.contains("leaks: 2 clusters (2 MiB)") && text.contains("in use: "), "{text}");

    entry(1, 2);
    entry(2, 77);
    let output = folder.run(&["check", "vm", "--json"]);
    assert_eq!((status(&output), output.stderr.len()), (3, 0), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("valid JSON");
    assert_eq!(report["errors"], 2);
    assert_eq!(report["findings"][0]["problem"], "double");
    assert_eq!(
        (&report["findings"][1]["problem"], &report["findings"][1]["offset"]),
        (&"past-end".into(), &72.into())
    );
    let output = folder.run(&["check", "vm"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("error: BAT entry 2 = 0x4d at byte 72"), "{text}");
}

#[test]
fn man_pages_and_completions_cover_every_command_and_man_is_up_to_date() {
    let folder = Folder::new();
    folder.ok(&["man", "."]);
    let checked_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("man");
    let pages = |folder: &Path| {
        let mut pages: Vec<_> = fs::read_dir(folder)
            .expect("a folder")
            .map(|entry| entry.expect("readable").path())
            .map(|path| (path.file_name().expect("a name").to_owned(), fs::read(&path).expect("read")))
            .collect();
        pages.sort();
        pages
    };
    let (generated, there) = (pages(folder.0.path()), pages(&checked_in));
    let names =
        |pages: &[(std::ffi::OsString, Vec<u8>)]| pages.iter().map(|page| page.0.clone()).collect::<Vec<_>>();
    assert_eq!(names(&generated), names(&there), "run: ploopfs man man");
    for (new, old) in generated.iter().zip(&there) {
        assert!(new == old, "{:?} is out of date; run: ploopfs man man", new.0);
    }
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = folder.ok(&["completions", shell]);
        for command in COMMANDS {
            assert!(generated.iter().any(|page| *page.0 == *format!("ploopfs-{command}.1")));
            assert!(script.contains(command), "{shell}: {command}");
        }
    }
}

#[test]
fn a_command_that_is_printed_can_be_pasted_whatever_the_image_is_called() {
    let folder = Folder::new();
    let program = Path::new(env!("CARGO_BIN_EXE_ploopfs")).parent().expect("a folder");
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap_or_default());
    for name in ["my disk", "it's", "a; touch PWNED #", "b$(touch PWNED)", "-rf", "gr\u{fc}n"] {
        let at = format!("./{name}");
        folder.ok(&["create", &at, "--size", "8M"]);
        let file = folder.path(&format!("{name}.hds"));
        let len = fs::metadata(&file).expect("stat").len();
        let opened = fs::OpenOptions::new().write(true).open(&file).expect("open");
        opened.write_all_at(&vec![7; MIB as usize], len).expect("a leak");
        let info = folder.ok(&["info", &at]);
        let command = info.lines().find_map(|line| line.split_once("leaked: ")).expect("a leak is said").1;
        let mut bash = Command::new("bash");
        let done = bash.args(["-c", command]).current_dir(folder.0.path()).env("PATH", &path).output();
        assert!(done.expect("bash").status.success(), "{command}");
        assert!(!folder.path("PWNED").exists(), "{command}");
        assert_eq!(folder.json(&["check", &at, "--json"])["leaks"], 0, "{command}");
        fs::remove_file(file).expect("remove");
    }
}

#[test]
fn a_bare_number_is_not_taken_for_so_few_bytes() {
    let folder = Folder::new();
    folder.ok(&["create", "vm", "--size", "10MiB"]);
    let said = folder.fails(2, &["resize", "vm", "20"]);
    assert!(said.contains("20G or 20M") && !said.contains("cut off"), "{said}");
    folder.fails(2, &["create", "small", "--size", "20"]);
    folder.ok(&["resize", "vm", "12Mi"]);
    assert_eq!(folder.json(&["info", "vm", "--json"])["size"], 12 * MIB);
}

#[test]
fn two_names_that_are_no_text_are_two_names() {
    use std::os::unix::ffi::OsStrExt;
    let folder = Folder::new();
    for name in [&b"a\xff.raw"[..], b"a\xfe.raw"] {
        fs::write(folder.0.path().join(std::ffi::OsStr::from_bytes(name)), [0; 512]).expect("write");
    }
    let listing = folder.json(&["list", ".", "--json"]);
    let images = listing["images"].as_array().expect("a list");
    let names: Vec<_> = images.iter().map(|row| row["name"].as_str().expect("a name")).collect();
    assert_eq!(names, ["a\\xfe", "a\\xff"]);
    assert!(images.iter().all(|row| row["reason"].is_null()), "{listing}");
}

/// Runs ploopfs in a shell with `redirected` behind its words.
fn redirected(folder: &Folder, redirected: &str, args: &[&str]) -> Output {
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("exec \"$0\" \"$@\" {redirected}")).arg(env!("CARGO_BIN_EXE_ploopfs"));
    command.args(args).current_dir(folder.0.path()).env_remove("RUST_LOG").output().expect("sh starts")
}

/// `export IMAGE - >&-` said 0 and wrote nowhere, and so did every answer: the runtime opens /dev/null where standard
/// output was closed, and takes EBADF for success.
#[test]
fn a_closed_standard_output_is_an_error_before_anything_is_done_and_a_full_one_is_none_of_success() {
    let folder = Folder::new();
    folder.ok(&["create", "vm", "--size", "4M"]);
    folder.ok(&["create", "s", "--size", "4M"]);
    folder.ok(&["snapshot", "create", "s", "one"]);
    folder.ok(&["backup", "s@one", "-o", "b.ploopfs"]);
    let looking: [&[&str]; 22] = [
        &["--help"],
        &["list", "--help"],
        &["--version"],
        &["list"],
        &["list", "--json"],
        &["info", "vm"],
        &["info", "vm", "--json"],
        &["map", "vm"],
        &["map", "vm", "--json"],
        &["snapshot", "list", "s"],
        &["check", "s"],
        &["check", "vm", "--json"],
        &["diff", "s", "one"],
        &["diff", "s", "one", "--json"],
        &["backup", "s@one"],
        &["backup", "s@one", "-o", "-"],
        &["export", "s@one", "-"],
        &["export", "vm", "/dev/stdout"],
        &["meta", "dump", "vm"],
        &["restore", "--check", "b.ploopfs"],
        &["compact", "vm", "--dry-run", "--json"],
        &["completions", "bash"],
    ];
    let changing: [&[&str]; 6] = [
        &["create", "new", "--size", "1M"],
        &["snapshot", "create", "vm", "two"],
        &["clone", "vm", "copy"],
        &["export", "vm", "vm.img"],
        &["resize", "vm", "8M"],
        &["cbt", "start", "vm"],
    ];
    let names = || {
        let mut names: Vec<_> =
            fs::read_dir(folder.0.path()).expect("read").flatten().map(|e| e.file_name()).collect();
        names.sort();
        (names, fs::read(folder.path("vm.hds")).expect("one file as before"))
    };
    let before = names();
    for args in looking.iter().chain(&changing) {
        for to in [">&-", "1</dev/null"] {
            let output = redirected(&folder, to, args);
            let said = String::from_utf8_lossy(&output.stderr);
            let good = status(&output) == 1 && said.contains("standard output is closed");
            assert!(good, "{args:?} {to}: {} {said}", status(&output));
        }
    }
    assert!(names() == before, "something was done");
    for args in looking {
        assert_eq!(status(&redirected(&folder, ">/dev/full", args)), 1, "{args:?} >/dev/full");
        for to in [">/dev/null", "1<>/dev/null", ">&- 2>/dev/null >/dev/null"] {
            assert_eq!(status(&redirected(&folder, to, args)), 0, "{args:?} {to}");
        }
    }
    // What is done all the same, and not said, stands in the message.
    let said = redirected(&folder, ">/dev/full", &["snapshot", "create", "vm", "two"]);
    assert_eq!(status(&said), 1);
    let text = String::from_utf8_lossy(&said.stderr);
    assert!(text.contains("done, but") && text.contains("two"), "{text}");
    // It never had anything to answer.
    let to = folder.path("pages");
    fs::create_dir(&to).expect("mkdir");
    assert_eq!(status(&redirected(&folder, ">&-", &["man", to.to_str().expect("UTF-8")])), 0);
}

#[test]
fn a_closed_standard_input_is_no_empty_disk_and_no_backup_that_was_cut_off() {
    let folder = Folder::new();
    for (args, from) in [
        (["import", "-", "vm"], "<&-"),
        (["import", "-", "vm"], "0>/dev/null"),
        (["restore", "-", "vm"], "<&-"),
        (["restore", "-", "vm"], "0>/dev/null"),
    ] {
        let output = redirected(&folder, from, &args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            status(&output) == 1 && said.contains("standard input: is closed"),
            "{args:?} {from}: {said}"
        );
    }
    assert_eq!(fs::read_dir(folder.0.path()).expect("read").count(), 0);
}
