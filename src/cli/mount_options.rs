//! What stands behind `-o` of `ploopfs mount`: options of ours by their long names, and those that mount(8) has for every file
//! system and hands on from a line of fstab.

use std::ffi::OsString;

use crate::fuse::mount::AskedOptions;

/// Options of mount(8) that say nothing to us: they are about when and by whom to mount, or are what a mount of ours is
/// anyway (there is nothing in it to execute, no device, and no time of access), or what the kernel has no more (mand). With
/// [`ASKED`] and `ro` they are all that mount(8) has for every file system.
const FOR_MOUNT: [&str; 42] = [
    "rw",
    "defaults",
    "auto",
    "noauto",
    "nofail",
    "_netdev",
    "comment",
    "helper",
    "uhelper",
    "user",
    "nouser",
    "users",
    "nousers",
    "owner",
    "noowner",
    "group",
    "nogroup",
    "default_permissions",
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "exec",
    "noexec",
    "async",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "lazytime",
    "nolazytime",
    "iversion",
    "noiversion",
    "mand",
    "nomand",
    "silent",
    "loud",
    "symfollow",
];
/// Options of mount(8) that the kernel carries out.
const ASKED: [&str; 4] = ["sync", "dirsync", "nosymfollow", "allow_other"];
/// Labels of SELinux: the kernel's business, with their values.
const LABELS: [&str; 4] = ["context", "fscontext", "defcontext", "rootcontext"];

/// True where the word `name` stands behind an `-o`.
pub(super) fn has(options: &[String], name: &str) -> bool {
    all_words(options).any(|word| word == name)
}

/// The words of one `-o`. A comma between quotes is part of a value (`context="a:b:c:s0:c1,c2"`).
fn words_of(list: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    let words = list.split(move |c| {
        quoted ^= c == '"';
        c == ',' && !quoted
    });
    words.filter(|word| !word.is_empty())
}

/// All words behind `-o`.
fn all_words(options: &[String]) -> impl Iterator<Item = &str> {
    options.iter().flat_map(|list| words_of(list))
}

/// The name in `NAME[=VALUE]`.
fn name_in(word: &str) -> &str {
    word.split_once('=').map_or(word, |(name, _)| name)
}

fn is_for_mount(word: &str) -> bool {
    let name = name_in(word);
    [&FOR_MOUNT[..], &ASKED, &LABELS].iter().any(|list| list.contains(&name))
        || word.starts_with("x-")
        || word.starts_with("X-")
}

/// The words of a command line in which every `-o` is spelled out with long options.
pub(super) fn spell_out(options: &[String]) -> Vec<OsString> {
    let words = all_words(options).filter(|word| !is_for_mount(word));
    // Also `ro=recursive` and the like.
    let spelled =
        |word| if name_in(word) == "ro" { "--read-only".into() } else { format!("--{word}").into() };
    words.map(spelled).collect()
}

/// What the kernel is asked for behind `-o`; of two that contradict each other the last counts.
pub(super) fn asked(options: &[String]) -> AskedOptions {
    let last = |yes: &str, no: &str| {
        all_words(options).filter(|word| *word == yes || *word == no).last() == Some(yes)
    };
    let labels = all_words(options).filter(|word| LABELS.contains(&name_in(word)));
    AskedOptions {
        sync: last("sync", "async"),
        dirsync: all_words(options).any(|word| word == "dirsync"),
        nosymfollow: last("nosymfollow", "symfollow"),
        labels: labels.map(str::to_owned).collect(),
    }
}

#[cfg(test)]
pub(crate) fn all_of_mount() -> Vec<&'static str> {
    [&FOR_MOUNT[..], &ASKED].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_carries_out_is_passed_on_to_it() {
        let options = ["sync,nosymfollow", r#"context="u:r:t:s0:c1,c2",symfollow,noexec"#].map(str::to_owned);
        let labels = vec![r#"context="u:r:t:s0:c1,c2""#.to_owned()];
        assert_eq!(asked(&options), AskedOptions { sync: true, labels, ..AskedOptions::default() });
    }
}
