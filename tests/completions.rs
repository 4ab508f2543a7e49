//! The completion scripts, in the shells themselves.

mod common;

use std::path::PathBuf;

use common::{Run, find_program, temp_dir, text};
use tempfile::TempDir;

/// A folder with the script for a shell, and an image to complete; None, and the reason printed, without that shell.
fn prepared(test: &str, shell: &str) -> Option<(TempDir, PathBuf)> {
    if find_program(shell).is_none() {
        println!("SKIPPED {test}: {shell} is not installed");
        return None;
    }
    let folder = temp_dir();
    let script = folder.path().join("script");
    std::fs::write(&script, Run::ploopfs().args(["completions", shell]).ok()).expect("a file");
    std::fs::write(folder.path().join("vm1.hds"), "").expect("a file");
    Some((folder, script))
}

#[test]
fn bash_completes_commands_options_and_values_and_leaves_files_to_itself() {
    let test = "bash_completes_commands_options_and_values_and_leaves_files_to_itself";
    let Some((folder, script)) = prepared(test, "bash") else { return };
    // What bash does at a tab: the words so far, and which of them is being typed.
    let asked = |words: &str| {
        let script = format!(
            "source {}; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             _ploopfs ploopfs \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD - 1]}}\"; \
             printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            text(&script)
        );
        let done = Run::new("bash").args(["--norc", "-c", &script]).in_folder(folder.path()).ok();
        done.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(asked("ploopfs snap"), ["snapshot"]);
    assert_eq!(asked("ploopfs snapshot sw"), ["switch"]);
    assert_eq!(asked("ploopfs mount --on-f"), ["--on-full"]);
    assert_eq!(asked("ploopfs mount --on-full q"), ["queue"]);
    // Nothing of its own for an image: bash then offers the folder's files.
    assert_eq!(asked("ploopfs info vm"), [""]);
    let how = format!("source {}; complete -p ploopfs", text(&script));
    let how = Run::new("bash").args(["--norc", "-c", &how]).ok();
    assert!(how.contains("-o default"), "{how}");
    assert!(!asked("ploopfs ''").contains(&"keeper".to_owned()), "hidden commands stay hidden");
}

#[test]
fn fish_completes_commands_and_option_values() {
    let Some((_folder, script)) = prepared("fish_completes_commands_and_option_values", "fish") else {
        return;
    };
    let asked = |words: &str| {
        let line = format!("source {}; complete -C '{words}'", text(&script));
        let home = temp_dir();
        let done = Run::new("fish").args(["--no-config", "-c", &line]).env("HOME", text(home.path())).ok();
        done.lines().map(|line| line.split('\t').next().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(asked("ploopfs snap"), ["snapshot"]);
    assert_eq!(asked("ploopfs mount --on-full q"), ["queue"]);
}

#[test]
fn zsh_takes_the_script_and_knows_its_function() {
    let Some((_folder, script)) = prepared("zsh_takes_the_script_and_knows_its_function", "zsh") else {
        return;
    };
    let line =
        format!("autoload -U compinit; compinit -D -u; source {}; print $_comps[ploopfs]", text(&script));
    let done = Run::new("zsh").args(["-f", "-c", &line]).run();
    assert!(done.success() && done.stdout.trim() == "_ploopfs" && done.stderr.is_empty(), "{done}");
}
