//! Every `sh` block of the README and of the pages for users, pasted twice in a row, works; the commands, options and files
//! that they name are there; and the README stays short.
//!
//! Blocks run in a copy of what the lines need, with the mount points moved below a temporary folder. `cargo install`
//! builds a release, which takes minutes: unless PLOOPFS_LONG is set, the binary under test takes its place. Blocks marked
//! `console` need what a test may not do to a machine, and are run elsewhere: `contrib/test` by CI, QEMU's line by
//! `qemu_guest.rs`, mount(8)'s by `mount_helper.rs`, systemd's by `unit_guest.rs`.

mod common;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use common::{Guest, Mount, Run, find_program, heavy, long, loops_in, temp_dir, text};
use tempfile::TempDir;

/// The pages for users, beside README.md.
const PAGES: [&str; 6] = [
    "docs/promises.md",
    "docs/speed.md",
    "docs/compare.md",
    "docs/repair.md",
    "docs/sandbox.md",
    "docs/recipes.md",
];

/// What a new user reads in one go.
const README_MOST: usize = 9 * 1024;

/// A shell that ends with the first line that fails.
const STRICT: [&str; 3] = ["-e", "-o", "pipefail"];

fn own(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn page(name: &str) -> String {
    std::fs::read_to_string(own(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// A page's blocks marked `sh`, in order.
fn blocks(name: &str) -> Vec<String> {
    let page = page(name);
    let parts = page.split("```sh\n").skip(1);
    parts.map(|part| part.split("```").next().unwrap_or_default().to_owned()).collect()
}

/// Where the lines run.
struct World {
    folder: TempDir,
    /// The guard cleans up whatever the lines leave when one of them fails.
    mount: Mount,
    guest: Guest,
    path: String,
}

impl World {
    fn new() -> World {
        let folder = temp_dir();
        let tools = folder.path().join("tools");
        std::fs::create_dir(&tools).expect("a folder");
        let stand_in = |name: &str, script: &str| {
            let file = tools.join(name);
            std::fs::write(&file, format!("#!/bin/sh\nset -e\n{script}\n")).expect("the stand-in");
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).expect("the stand-in");
        };
        if !long() {
            // Stands in for `cargo install`, and refuses to be taken for anything else. So do those below.
            stand_in("cargo", r#"[ "$1" = install ]"#);
            std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_ploopfs"), tools.join("ploopfs")).expect("a link");
        }
        std::os::unix::fs::symlink(own("src"), folder.path().join("src")).expect("a link");
        let far = folder.path().join("far");
        std::fs::create_dir(&far).expect("a folder");
        stand_in(
            "ssh",
            &format!(r#"[ "$1" = backup.example ]; shift; cd '{}'; exec sh -c "$*""#, text(&far)),
        );
        // The real one takes minutes for a disk of 10 GiB.
        if !long() || find_program("restic").is_none() {
            stand_in("restic", r#"[ "$1 $3" = "-r backup" ]; exec head -c 64M "$4" >/dev/null"#);
        } else {
            let restic = Run::new("restic").arg("-r").arg(folder.path().join("srv/restic")).arg("init");
            restic.env("RESTIC_PASSWORD", "secret").ok();
        }
        let mount = Mount::adopt(&folder.path().join("images"), &folder.path().join("vdisks"));
        let guest = Guest::adopt(&folder.path().join("guest"));
        // Where the README installs to is in everybody's PATH; what stands for it here must be, too.
        let installed = folder.path().join("local/bin");
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{}:{path}", text(&tools), text(&installed));
        World { folder, mount, guest, path }
    }

    /// Runs a block in `folder`, by a shell with these options; it must succeed.
    fn paste(&self, folder: &Path, block: &str, options: &[&str], what: &str) {
        let moved = block
            .replace("/mnt/vdisks", text(self.mount.point()))
            .replace("/mnt/guest", text(self.guest.path()))
            .replace("/usr/local", text(&self.folder.path().join("local")))
            .replace("/srv/", text(&self.folder.path().join("srv/")))
            .replace(" images", &format!(" {}", text(self.mount.images())));
        let run = Run::new("bash").args(options).args(["-c", &moved]).in_folder(folder);
        let done = run.env("PATH", &self.path).env("RESTIC_PASSWORD", "secret").limit(1500).run();
        assert!(done.success(), "{what}:\n{block}\n{done}");
        if block.contains("ploopfs umount") && !block.contains("ploopfs mount") {
            self.has_ended();
        }
    }

    fn paste_twice(&self, folder: &Path, block: &str) {
        // The first time every line succeeds. The second time some have nothing left to do, and say so.
        self.paste(folder, block, &STRICT, "pasted the first time");
        self.paste(folder, block, &[], "pasted the second time");
    }

    fn end(&self) {
        self.paste(self.folder.path(), "ploopfs umount /mnt/vdisks\n", &STRICT, "the end");
    }

    #[track_caller]
    fn has_ended(&self) {
        let point = self.mount.point();
        assert!(!self.mount.is_mounted() && loops_in(point).is_empty(), "`umount` ends everything");
    }
}

#[test]
fn every_block_of_the_readme_works_when_pasted_twice_in_a_row() {
    require!("fuse", "loop", "qemu");
    let _turn = heavy();
    let world = World::new();
    let checkout = if long() { own(".") } else { world.folder.path().to_owned() };
    let blocks = blocks("README.md");
    assert!(blocks.len() >= 4, "the README lost its lines");
    assert!(
        blocks.iter().any(|block| block.contains("ploopfs umount")),
        "the README does not say how to end"
    );
    blocks.iter().for_each(|block| world.paste_twice(&checkout, block));
    world.end();
}

#[test]
fn every_block_of_the_pages_works_when_pasted_twice_in_a_row_after_the_readme_s_first_lines() {
    require!("fuse", "loop", "qemu");
    let _turn = heavy();
    let start = blocks("README.md").remove(0);
    let mut all = 0;
    for name in PAGES {
        let blocks = blocks(name);
        all += blocks.len();
        if blocks.is_empty() {
            continue;
        }
        let world = World::new();
        let checkout = if long() { own(".") } else { world.folder.path().to_owned() };
        world.paste(&checkout, &start, &STRICT, "the README's first lines");
        blocks.iter().for_each(|block| world.paste_twice(world.folder.path(), block));
        world.end();
    }
    assert!(all >= 10, "the pages lost their lines");
}

#[test]
fn the_readme_is_read_in_one_go() {
    let length = page("README.md").len();
    assert!(
        length <= README_MOST,
        "README.md has {length} bytes; what is beyond {README_MOST} belongs to docs/"
    );
}

#[test]
fn blocks_are_marked_as_run_or_as_not_run_and_no_other_way() {
    for name in PAGES.iter().chain(&["README.md"]) {
        let page = page(name);
        let fences: Vec<&str> =
            page.lines().filter_map(|line| line.trim_start().strip_prefix("```")).collect();
        assert_eq!(fences.len() % 2, 0, "{name}: a block does not end");
        for mark in fences.into_iter().step_by(2) {
            assert!(["sh", "console", ""].contains(&mark), "{name}: a block is marked {mark}");
        }
    }
}

/// The code of a page: its blocks, and what stands between two backticks of a line.
fn code(page: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut in_block = false;
    for line in page.lines() {
        if line.starts_with("```") {
            in_block = !in_block;
        } else if in_block {
            found.push(line.to_owned());
        } else {
            found.extend(line.split('`').skip(1).step_by(2).map(|code| code.replace("\\|", "|")));
        }
    }
    found
}

/// Command and options of each call of ploopfs in a piece of code.
fn calls(code: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("ploopfs ") {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_ascii_alphanumeric() || ".-/@_".contains(c)) {
            continue;
        }
        let words = code[at..].split_whitespace().skip(1);
        let words = words.take_while(|word| !["|", "&&", ";", ">", "-", "||"].contains(word));
        let call = words.map(|word| word.trim_matches(|c: char| "[](),.;".contains(c)).to_owned());
        found.push(call.collect());
    }
    found
}

/// The help of a command, None where there is no such command.
fn help(words: &[&str]) -> Option<String> {
    let done = Run::ploopfs().args(words).arg("--help").run();
    done.success().then(|| done.output())
}

#[test]
fn the_pages_name_commands_and_options_that_exist() {
    let mut checked = 0;
    for name in PAGES.iter().chain(&["README.md"]) {
        for code in code(&page(name)) {
            for call in calls(&code) {
                let Some(command) =
                    call.first().filter(|word| word.starts_with(|c: char| c.is_ascii_lowercase()))
                else {
                    continue;
                };
                let groups = ["snapshot", "cbt", "meta"];
                let second = call.get(1).filter(|_| groups.contains(&command.as_str()));
                let subcommands: Vec<Option<&str>> =
                    second.map_or(vec![None], |words| words.split('|').map(Some).collect());
                for subcommand in subcommands {
                    let words: Vec<&str> = std::iter::once(command.as_str()).chain(subcommand).collect();
                    let help = help(&words).unwrap_or_else(|| panic!("{name}: no command {words:?}: {code}"));
                    checked += 1;
                    for option in call.iter().filter(|word| word.starts_with("--")) {
                        let option = option.split(['=', ']']).next().unwrap_or_default();
                        let is_there = help.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
                        assert!(is_there.into_iter().any(|word| word == option), "{name}: {option}: {code}");
                    }
                }
            }
        }
    }
    assert!(checked >= 60, "only {checked} calls were found");
}

#[test]
fn every_command_is_in_the_readme_and_among_the_recipes() {
    let help = help(&[]).expect("--help");
    let commands = help.split("Commands:").nth(1).expect("a list of commands");
    let commands: BTreeSet<&str> = commands
        .lines()
        .skip(1)
        .take_while(|line| !line.trim().is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|word| *word != "help")
        .collect();
    assert!(commands.len() >= 20, "{commands:?}");
    let (readme, recipes) = (page("README.md"), page("docs/recipes.md"));
    let screen =
        readme.split("## Commands").nth(1).and_then(|part| part.split("```").nth(1)).expect("the commands");
    assert!(screen.lines().all(|line| line.len() <= 80), "the commands are wider than a terminal");
    let words: BTreeSet<&str> = screen.split_whitespace().collect();
    for command in commands {
        assert!(words.contains(command), "the README does not name {command}");
        assert!(recipes.contains(&format!("`ploopfs {command} ")), "the recipes do not name {command}");
    }
}

#[test]
fn files_that_the_pages_name_are_there() {
    let mut checked = 0;
    for name in PAGES.iter().chain(&["README.md"]) {
        for code in code(&page(name)) {
            let is_file = |word: &&str| {
                ["tests/", "src/", "contrib/", "examples/", "man/"]
                    .iter()
                    .any(|folder| word.starts_with(folder))
            };
            for word in code.split(|c: char| c.is_whitespace() || c == ',').filter(is_file) {
                assert!(own(word).exists(), "{name} names {word}, which is not there");
                checked += 1;
            }
            // Behind the first of a row of tests, the others stand without their folder.
            if code.ends_with(".rs") && !code.contains(['/', ' ']) {
                assert!(own("tests").join(&code).exists(), "{name} names {code}, which is no test");
                checked += 1;
            }
        }
    }
    assert!(checked >= 40, "only {checked} files were found");
}
