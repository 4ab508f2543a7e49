//! `ploopfs top`, with the real binary: in a terminal of 80x24, and without one.

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Mount, Run, find_program, temp_dir, text, until};
use serde_json::Value;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);

/// A terminal of 80x24 in which a shell runs `top`; ends with the test.
struct Terminal {
    child: Child,
    keys: Option<ChildStdin>,
    out: PathBuf,
    _folder: TempDir,
}

impl Terminal {
    /// Runs `program` with the arguments of `top` behind it; before and after, the terminal's settings are printed.
    fn run(before: &str, mount: &Mount) -> Terminal {
        let folder = temp_dir();
        let out = folder.path().join("out");
        let top =
            format!("{before} {} top {} --interval 0.2", env!("CARGO_BIN_EXE_ploopfs"), text(mount.point()));
        let line = format!("stty rows 24 cols 80; echo A=$(stty -g); {top}; echo S=$?; echo B=$(stty -g)");
        let mut script = Command::new("script");
        script.args(["-qfec", &line, "/dev/null"]).env("TERM", "xterm-256color").env("SHELL", "/bin/sh");
        let file = File::create(&out).expect("a file of the test");
        script.stdin(Stdio::piped()).stdout(Stdio::from(file)).stderr(Stdio::null());
        let mut child = script.spawn().expect("script starts");
        let keys = child.stdin.take();
        Terminal { child, keys, out, _folder: folder }
    }

    fn press(&mut self, keys: &[u8]) {
        let to = self.keys.as_mut().expect("not ended");
        to.write_all(keys).and_then(|()| to.flush()).expect("a key");
    }

    fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.out).expect("a file of the test")).into_owned()
    }

    /// What stands on the screen now.
    fn screen(&self) -> Vec<String> {
        let output = self.output();
        let ours = output.split("\x1b[?1049h").nth(1).unwrap_or_default();
        draw(ours)
    }

    #[track_caller]
    fn shows(&self, what: impl Fn(&[String]) -> bool) {
        if !until(PATIENCE, || what(&self.screen())) {
            panic!("never shown; now:\n{}", self.screen().join("\n"));
        }
    }

    /// Waits for the end: the terminal must be as it was. Returns the exit status of `top`.
    #[track_caller]
    fn ended(mut self) -> String {
        let over = until(PATIENCE, || self.child.try_wait().expect("our own child").is_some());
        let output = self.output();
        assert!(over, "it goes on:\n{}", self.screen().join("\n"));
        let said = |what: &str| {
            let rest = output.split(what).nth(1).unwrap_or_else(|| panic!("no {what} in {output:?}"));
            rest.lines().next().unwrap_or_default().trim().to_owned()
        };
        assert_eq!(said("A="), said("B="), "the terminal's settings");
        let end = output.rsplit("\x1b[?1049l").next().expect("one part");
        assert!(end.len() < output.len(), "the old screen is back: {output:?}");
        assert!(output.contains("\x1b[?25h"), "the cursor is back");
        said("S=")
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // The end of the terminal ends what runs in it.
        drop(self.keys.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A terminal of 80x24 as far as `top` needs one.
fn draw(output: &str) -> Vec<String> {
    let mut cells = vec![vec![' '; 80]; 24];
    let (mut row, mut column) = (0usize, 0usize);
    let mut rest = output.chars().peekable();
    while let Some(c) = rest.next() {
        if c != '\x1b' {
            assert!(row < 24 && column < 80, "{c:?} at {row},{column} is outside of the screen");
            cells[row][column] = c;
            column += 1;
            continue;
        }
        if rest.next_if_eq(&'[').is_none() {
            continue;
        }
        let mut numbers = String::new();
        let end = loop {
            match rest.next() {
                Some(c @ ('0'..='9' | ';' | '?')) => numbers.push(c),
                Some(c) => break c,
                None => return cells.iter().map(|row| row.iter().collect()).collect(),
            }
        };
        match (end, &*numbers) {
            ('H', at) => {
                let (r, c) = at.split_once(';').unwrap_or(("1", "1"));
                row = r.parse::<usize>().expect("a row") - 1;
                column = c.parse::<usize>().expect("a column") - 1;
            }
            ('K', "" | "0") => cells[row][column.min(80)..].fill(' '),
            ('J', "" | "0") => {
                cells[row][column.min(80)..].fill(' ');
                cells[row + 1..].iter_mut().for_each(|row| row.fill(' '));
            }
            // The screen is left: what stood there stays for the test.
            ('l', "?1049") => break,
            ('m', _) | ('h' | 'l', _) => {}
            other => panic!("{other:?} is not known to this terminal"),
        }
    }
    cells.iter().map(|row| row.iter().collect()).collect()
}

/// Skips where script(1) is missing.
fn no_script(test: &str) -> bool {
    let missing = find_program("script").is_none();
    if missing {
        println!("SKIPPED {test}: script is not installed");
    }
    missing
}

/// Writes to an image until it is dropped.
struct Writer<'a>(&'a AtomicBool);

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn order(screen: &[String]) -> Vec<String> {
    let rows = screen.iter().skip_while(|line| !line.starts_with("NAME")).skip(1);
    let names = rows.filter_map(|line| line.get(2..18)?.split_whitespace().next().map(str::to_owned));
    names.filter(|name| name.starts_with("vm")).collect()
}

#[test]
fn in_a_terminal_it_shows_what_goes_on_sorts_by_keys_and_ends_with_q() {
    require!("fuse");
    if no_script("in_a_terminal_it_shows_what_goes_on_sorts_by_keys_and_ends_with_q") {
        return;
    }
    let mount = Mount::new(&["--create", "vm1=64M", "--create", "vm2=64M", "--create", "vm3=64M"]);
    let (end, file) = (AtomicBool::new(false), mount.open("vm2"));
    std::thread::scope(|scope| {
        let _writer = Writer(&end);
        scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                file.write_all_at(&[7; 4096], 8192).expect("write");
                file.sync_data().expect("sync");
            }
        });
        let mut terminal = Terminal::run("", &mount);
        terminal.shows(|screen| screen[0].contains("3 images, 1 open"));
        // Writes per second, and a latency.
        terminal.shows(|screen| {
            let row = screen.iter().find(|line| line.starts_with("  vm2")).cloned().unwrap_or_default();
            let figures: Vec<&str> = row.split_whitespace().collect();
            figures.get(2).is_some_and(|writes| *writes != "0")
                && figures.get(5).is_some_and(|p50| p50.ends_with('s'))
        });
        let screen = terminal.screen();
        println!("{}", screen.join("\n"));
        assert!(screen[2].starts_with("NAME") && screen[2].ends_with("USED"), "{screen:?}");
        assert!(screen[1].contains(text(mount.point())) && screen[23].contains("q quit"), "{screen:?}");
        terminal.shows(|screen| order(screen) == ["vm2", "vm1", "vm3"]);
        terminal.press(b"n");
        terminal.shows(|screen| order(screen) == ["vm1", "vm2", "vm3"]);
        terminal.press(b"r");
        terminal.shows(|screen| order(screen) == ["vm3", "vm2", "vm1"]);
        terminal.press(b"o");
        terminal.shows(|screen| order(screen) == ["vm2"]);
        terminal.press(b"q");
        assert_eq!(terminal.ended(), "0");
    });
}

#[test]
fn ctrl_c_and_a_signal_give_the_terminal_back() {
    require!("fuse");
    if no_script("ctrl_c_and_a_signal_give_the_terminal_back") {
        return;
    }
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let mut terminal = Terminal::run("", &mount);
    terminal.shows(|screen| order(screen) == ["vm1"]);
    terminal.press(b"\x03");
    assert_eq!(terminal.ended(), "0");
    let terminal = Terminal::run("timeout --foreground --preserve-status -s TERM 3", &mount);
    assert_eq!(terminal.ended(), "143");
}

#[test]
fn a_mount_that_ends_is_said_and_the_keyboard_goes_on() {
    require!("fuse");
    if no_script("a_mount_that_ends_is_said_and_the_keyboard_goes_on") {
        return;
    }
    let mount = Mount::new(&["--create", "vm1=64M"]);
    let mut terminal = Terminal::run("", &mount);
    terminal.shows(|screen| order(screen) == ["vm1"]);
    // Not by the guard, which takes `top` for a daemon that is left.
    Run::ploopfs().arg("umount").arg(mount.point()).ok();
    terminal.shows(|screen| screen.iter().any(|line| line.contains("not mounted any more")));
    terminal.press(b"q");
    assert_eq!(terminal.ended(), "0");
}

#[test]
fn without_a_terminal_one_measurement_is_printed() {
    require!("fuse");
    let mount = Mount::new(&["--create", "vm1=64M", "--create", "vm2=64M"]);
    let top =
        |args: &[&str]| Run::ploopfs().arg("top").arg(mount.point()).args(["--interval", "0.5"]).args(args);
    let end = AtomicBool::new(false);
    let file = mount.open("vm1");
    let (json, words) = std::thread::scope(|scope| {
        let _writer = Writer(&end);
        scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                file.write_all_at(&[7; 4096], 8192).expect("write");
            }
        });
        let json: Value = serde_json::from_str(&top(&["--json"]).ok()).expect("valid JSON");
        (json, top(&[]).ok())
    });
    let vm1 = json["mounts"][0]["images"][0].clone();
    assert_eq!((&vm1["name"], &vm1["mode"], &vm1["openers"]), (&"vm1".into(), &"write".into(), &1.into()));
    let number = |field: &str| vm1[field].as_f64().unwrap_or_else(|| panic!("{field}: {vm1}"));
    assert!(number("writes") > 1.0 && number("written_bytes") >= 4000.0 * number("writes"), "{vm1}");
    let latency = &vm1["latency"]["write"];
    assert!(latency["p50_us"].as_f64() <= latency["p99_us"].as_f64() && latency["p99_us"].is_f64(), "{vm1}");
    assert!((0.4..20.0).contains(&json["seconds"].as_f64().expect("seconds")), "{json}");
    assert_eq!(json["mounts"][0]["mountpoint"], text(mount.point()));
    assert!(json["mounts"][0]["host_size"].as_u64() > Some(0), "{json}");
    assert!(words.contains("\nNAME ") && words.contains("\n  vm1 ") && words.contains("\n- vm2 "), "{words}");
    assert!(words.lines().skip(2).all(|line| line.chars().count() <= 80), "{words}");
    assert!(!words.contains('\x1b'), "{words}");
}

#[test]
fn what_is_no_mount_and_bad_options_are_refused() {
    let folder = temp_dir();
    let top = |args: &[&str]| Run::ploopfs().arg("top").arg(folder.path()).args(args);
    let line = top(&["--once"]).status(1);
    assert!(line.stderr.contains("nothing is mounted here"), "{line}");
    Run::ploopfs().args(["top", "--json", text(&folder.path().join("missing"))]).status(1);
    for bad in [&["--once", "--json"][..], &["--interval", "0"], &["--interval", "x"], &["--sort", "colour"]]
    {
        top(bad).status(2);
    }
    assert_eq!(fs::read_dir(folder.path()).expect("readdir").count(), 0);
}
