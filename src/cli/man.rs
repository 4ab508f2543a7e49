//! `ploopfs man`, hidden: writes the man pages that are checked in under `man/`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Command, CommandFactory};

use crate::cli::{Cli, Outcome, freeze};
use crate::error::Kind;
use crate::format::header::MAX_ENTRIES;
use crate::image::create::{DEFAULT_CLUSTER, MAX_CLUSTER, MIN_CLUSTER};
use crate::image::labels::MAX_LABEL;
use crate::io::buffers;
use crate::vdisk;

/// ploopfs-semantics(7), with names between two `@` where the code has a number or a name of its own.
const SEMANTICS: &str = include_str!("semantics.7");

/// The page of mount(8)'s and umount(8)'s helpers, in the same way.
const HELPERS: &str = include_str!("mount_helper.8");

/// When the pages last changed in more than words. Not the time of the build, which would make every package another one.
const DATE: &str = "2026-11-30";
/// The longest line of a page's source.
const WIDTH: usize = 80;
/// What stands in a page's head, and its foot.
const MANUAL: &str = "Disk images";

/// Arguments of `man`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder; it must exist
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// Runs the command.
#[expect(
    clippy::disallowed_methods,
    reason = "pages of the repository, written anew in place; no disk depends on them"
)]
pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let failed = || format!("{}: cannot write the man pages", args.dir.display());
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let mut pages = vec![("ploopfs-semantics.7".to_owned(), semantics())];
    pages.extend(["mount.fuse.ploopfs", "umount.fuse.ploopfs"].map(helper));
    collect(&command, &mut pages).with_context(failed)?;
    for (name, page) in pages {
        std::fs::write(Path::new(&args.dir).join(name), page).with_context(failed)?;
    }
    Ok(Outcome::Done)
}

/// Name and text of the page of a command, and of those below it.
fn collect(command: &Command, pages: &mut Vec<(String, String)>) -> std::io::Result<()> {
    for inner in command.get_subcommands().filter(|inner| !inner.is_hide_set()) {
        collect(inner, pages)?;
    }
    let source = concat!("ploopfs ", env!("CARGO_PKG_VERSION"));
    let page = clap_mangen::Man::new(command.clone()).date(DATE).source(source).manual(MANUAL);
    let title = command.get_display_name().unwrap_or_else(|| command.get_name()).to_uppercase();
    let page = page.title(title);
    let mut text = Vec::new();
    page.render(&mut text)?;
    pages.push((page.get_filename(), tidy(&String::from_utf8_lossy(&text))));
    Ok(())
}

/// A page as mandoc(1) wants it: short lines, no blanks at their ends; a vertical space where one is empty or broken twice, which
/// keeps the indentation of an option; the last words under a head of their own; the version in the foot alone.
fn tidy(page: &str) -> String {
    let page = page.replace(".SH EXTRA\nExit status: ", ".SH EXIT STATUS\n");
    let page = page.split("\n.SH VERSION\n").next().unwrap_or_default();
    let mut out = String::new();
    let (mut gap, mut tag) = (Vec::new(), false);
    for line in page.lines().map(str::trim_end) {
        if line.is_empty() || line == ".br" {
            gap.push(line);
            continue;
        }
        match std::mem::take(&mut gap).as_slice() {
            [".br"] => out.push_str(".br\n"),
            [_, ..] if !line.starts_with('.') => out.push_str(".sp\n"),
            _ => {}
        }
        // The line behind .TP is a tag, whole; in all others a new line is a blank.
        match tag || line.starts_with('.') {
            true => out.push_str(line),
            false => wrap(line, &mut out),
        }
        out.push('\n');
        tag = line == ".TP";
    }
    out
}

/// Puts words into lines of at most `WIDTH` bytes, where they fit.
fn wrap(text: &str, out: &mut String) {
    let mut len = 0;
    for word in text.split(' ') {
        match len {
            0 => {}
            _ if len + 1 + word.len() > WIDTH => {
                out.push('\n');
                len = 0;
                // At the beginning of a line these two would make it a request.
                if word.starts_with(['.', '\'']) {
                    out.push_str("\\&");
                    len = 2;
                }
            }
            _ => {
                out.push(' ');
                len += 1;
            }
        }
        out.push_str(word);
        len += word.len();
    }
}

/// The page of a helper, and its name.
fn helper(program: &str) -> (String, String) {
    let page = HELPERS.replace("@TITLE@", &program.to_uppercase());
    let page = page.replace("@DATE@", DATE).replace("@VERSION@", env!("CARGO_PKG_VERSION"));
    (format!("{program}.8"), tidy(&page))
}

fn semantics() -> String {
    let put_in = |page: String, (name, value): (&str, String)| page.replace(&format!("@{name}@"), &value);
    tidy(&facts().into_iter().fold(SEMANTICS.to_owned(), put_in))
}

/// What the page gives numbers and names of.
fn facts() -> Vec<(&'static str, String)> {
    let kinds = [
        ("NotPermitted", Kind::NotPermitted),
        ("ReadOnly", Kind::ReadOnly),
        ("InUse", Kind::InUse),
        ("NoSpace", Kind::NoSpace),
        ("Io", Kind::Io),
        ("Damaged", Kind::Damaged),
        ("Unsupported", Kind::Unsupported),
    ];
    let statuses = [
        ("STATUS_IO", Kind::Io),
        ("STATUS_INVALID", Kind::Invalid),
        ("STATUS_DAMAGED", Kind::Damaged),
        ("STATUS_IN_USE", Kind::InUse),
    ];
    let sizes = [
        ("DEFAULT_CLUSTER", DEFAULT_CLUSTER),
        ("MIN_CLUSTER", MIN_CLUSTER),
        ("MAX_CLUSTER", MAX_CLUSTER),
        ("MAX_DISK", (u64::from(MAX_ENTRIES) + 1) * DEFAULT_CLUSTER),
        ("BACKGROUND", vdisk::BACKGROUND),
        ("BOUND", vdisk::BOUND),
        ("PARKED_OF_ONE", buffers::PARKED_OF_ONE),
        ("PARKED", buffers::PARKED),
        ("ONE_WAITS", (buffers::LIMIT - buffers::RESERVE) as u64),
    ];
    let options = [
        ("BAT_DELAY", "bat_delay"),
        ("STOP_TIMEOUT", "stop_timeout"),
        ("FULL_TIMEOUT", "full_timeout"),
        ("LOW_WATER", "low_water"),
    ];
    let mut facts = vec![
        ("VERSION", env!("CARGO_PKG_VERSION").to_owned()),
        ("DATE", DATE.to_owned()),
        ("HUNG", buffers::HUNG.as_secs().to_string()),
        ("MAX_LEVELS", vdisk::MAX_LEVELS.to_string()),
        ("MAX_LABEL", MAX_LABEL.to_string()),
        ("FREEZE_LIMIT", freeze::LONGEST.as_secs().to_string()),
    ];
    facts.extend(kinds.map(|(name, kind)| (name, errno_name(kind.errno()).to_owned())));
    facts.extend(statuses.map(|(name, kind)| (name, kind.exit_status().to_string())));
    facts.extend(sizes.map(|(name, bytes)| (name, size(bytes))));
    facts.extend(options.map(|(name, option)| (name, default_of_mount(option))));
    facts
}

/// An errno as errno(3) names it.
fn errno_name(errno: i32) -> &'static str {
    match errno {
        libc::EPERM => "EPERM",
        libc::EIO => "EIO",
        libc::EBUSY => "EBUSY",
        libc::ENOSPC => "ENOSPC",
        libc::EROFS => "EROFS",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        libc::EUCLEAN => "EUCLEAN",
        _ => "an error",
    }
}

/// A size in the largest unit that gives a whole number.
fn size(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = units.into_iter().find(|(bits, _)| bytes >> bits << bits == bytes && bytes >> bits > 0);
    unit.map_or_else(|| format!("{bytes} bytes"), |(bits, name)| format!("{} {name}", bytes >> bits))
}

/// The default of an option of `mount`, as `--help` gives it.
fn default_of_mount(option: &str) -> String {
    let command = Cli::command();
    let mount = command.find_subcommand("mount");
    let arg = mount.and_then(|mount| mount.get_arguments().find(|arg| arg.get_id() == option));
    let value = arg.and_then(|arg| arg.get_default_values().first());
    value.map(|value| value.to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_and_name_of_the_page_comes_from_the_code() {
        for (name, value) in facts() {
            assert!(SEMANTICS.contains(&format!("@{name}@")), "{name} is not on the page");
            assert!(!value.is_empty() && value != "an error", "{name} = '{value}'");
        }
        let page = semantics();
        assert!(!page.contains('@'), "{}", page.lines().find(|line| line.contains('@')).unwrap_or_default());
        let lines = SEMANTICS.lines().filter(|line| !line.starts_with(".TH"));
        let words = lines.flat_map(|line| line.split(|c: char| !c.is_ascii_alphanumeric() && c != '@'));
        // One digit: a section of the manual, an exit status of 0, kill -9. 512: the bytes of a disk's sector.
        let numbers = words.filter(|word| word.len() > 1 && word.bytes().all(|byte| byte.is_ascii_digit()));
        let strays: Vec<&str> = numbers.filter(|number| *number != "512").collect();
        assert!(strays.is_empty(), "{strays:?} should come from the code");
    }

    #[test]
    fn a_page_has_no_blank_lines_no_blanks_at_ends_and_its_exit_status_under_a_head() {
        let page = ".TH a 1\n.SH NAME\na \\- b \n.TP\nx\n\ny\n.br\n\n.br\nz\n.SH EXTRA\nExit status: 0\n.SH VERSION\nv1\n";
        let tidied = ".TH a 1\n.SH NAME\na \\- b\n.TP\nx\n.sp\ny\n.sp\nz\n.SH EXIT STATUS\n0\n";
        assert_eq!(tidy(page), tidied);
    }

    #[test]
    fn a_long_line_is_wrapped_and_a_word_with_a_dot_in_front_makes_no_request() {
        let mut out = String::new();
        wrap(&format!("{} .hds {}", "a".repeat(76), "b".repeat(90)), &mut out);
        assert_eq!(out, format!("{}\n\\&.hds\n{}", "a".repeat(76), "b".repeat(90)));
    }

    #[test]
    fn sizes_are_written_in_the_largest_whole_unit() {
        assert_eq!(
            (size(32 << 10), size(64 << 20), size(512 << 40)),
            ("32 KiB".into(), "64 MiB".into(), "512 TiB".into())
        );
        assert_eq!((size(1025), size(0)), ("1025 bytes".into(), "0 bytes".into()));
    }
}
