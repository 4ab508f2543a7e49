//! The options behind -o, the one behind --create, and places that cannot be used.

use super::*;

fn parse(words: &[&str]) -> anyhow::Result<Args> {
    let words: Vec<OsString> = words.iter().map(Into::into).collect();
    let args = Again::try_parse_from(&words)?.args;
    with_options(args, std::iter::once("mount".into()).chain(words))
}

#[test]
fn options_behind_o_are_the_long_options_and_mounts_own_are_passed_over() {
    let args = parse(&[
        "a",
        "b",
        "-o",
        "ro,noauto,x-systemd.automount,threads=3,create=vm=1G",
        "-o",
        "on-full=error",
    ])
    .expect("all known");
    assert!(args.read_only);
    assert_eq!(args.threads, Some(3));
    assert_eq!(args.on_full, WhenFull::Error);
    assert_eq!(args.create, [Create { name: "vm".to_owned(), size: 1 << 30 }]);
}

#[test]
fn every_option_that_only_mount_understands_is_passed_over_with_its_value() {
    let all = mount_options::all_of_mount().join(",");
    let args = parse(&["a", "b", "-o", &all, "-o", "user=me,X-mount.mkdir=0755,comment=x"]).expect("known");
    assert!(!args.read_only && args.create.is_empty() && args.threads.is_none());
    assert!(parse(&["a", "b", "-o", "ro=recursive"]).expect("known").read_only);
    let labelled = parse(&["a", "b", "-o", r#"context="u:r:t:s0:c1,c2",threads=3"#]);
    assert_eq!(labelled.expect("the comma in quotes").threads, Some(3));
}

#[test]
fn a_remount_is_refused_with_what_to_do_instead() {
    let e = parse(&["a", "b", "-o", "remount,ro"]).expect_err("refused");
    assert!(format!("{e:#}").contains("umount it"), "{e:#}");
}

#[test]
fn an_unknown_option_behind_o_is_named() {
    let e = parse(&["a", "b", "-o", "rw,shiny"]).expect_err("unknown");
    assert!(format!("{e:#}").contains("shiny"), "{e:#}");
}

#[test]
fn an_option_of_the_command_line_wins_over_the_one_behind_o() {
    assert_eq!(parse(&["--threads", "5", "a", "b", "-o", "threads=3"]).expect("known").threads, Some(5));
}

#[test]
fn a_name_to_create_cannot_leave_the_folder() {
    for text in ["../x=1G", "a/b=1G", ".x=1G", "=1G", "x", "x=", "x=-1"] {
        assert!(parse_create(text).is_err(), "{text}");
    }
}

#[test]
fn a_mount_point_inside_the_images_folder_is_refused_and_the_reverse() {
    assert!(check_places(Path::new("/a"), Path::new("/a/b")).is_err());
    assert!(check_places(Path::new("/a"), Path::new("/a")).is_err());
    assert!(check_places(Path::new("/a/b"), Path::new("/a")).is_err());
    assert!(check_places(Path::new("/a"), Path::new("/ab")).is_ok());
}
