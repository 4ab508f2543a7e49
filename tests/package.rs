//! The Debian package: built, installed into a root of its own, used from there, and removed again without a trace. And
//! the tarball.
//!
//! The former takes PLOOPFS_PACKAGE=1: cargo-deb has to be built first, and the package is 27 MB to compress.

mod common;

use std::path::{Path, PathBuf};

use common::namespace::installed;
use common::{Mount, Run, marked_in_use, number_from_env, ok, temp_dir, text};

/// What the package is expected to bring, below the root.
const FILES: [&str; 13] = [
    "usr/bin/ploopfs",
    "usr/sbin/mount.fuse.ploopfs",
    "usr/sbin/umount.fuse.ploopfs",
    "usr/lib/systemd/system/ploopfs@.service",
    "usr/lib/udev/rules.d/60-ploopfs-loop.rules",
    "usr/share/man/man1/ploopfs.1.gz",
    "usr/share/man/man7/ploopfs-semantics.7.gz",
    "usr/share/man/man8/mount.fuse.ploopfs.8.gz",
    "usr/share/bash-completion/completions/ploopfs",
    "usr/share/zsh/vendor-completions/_ploopfs",
    "usr/share/fish/vendor_completions.d/ploopfs.fish",
    "usr/share/doc/ploopfs/examples/example.conf",
    "usr/share/doc/ploopfs/copyright",
];

/// Every file below `folder` but dpkg's own notes.
fn files_below(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        match path.is_dir() {
            true if path.ends_with("var/lib/dpkg") => {}
            true => files_below(&path, found),
            false => found.push(path),
        }
    }
}

#[test]
fn the_debian_package_installs_mounts_and_is_removed_without_a_trace() {
    let test = "the_debian_package_installs_mounts_and_is_removed_without_a_trace";
    if number_from_env("PLOOPFS_PACKAGE", 0) == 0 {
        return println!("SKIPPED {test}: PLOOPFS_PACKAGE=1 switches it on");
    }
    require!("fuse", "loop", "package");
    let folder = temp_dir();
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let package = folder.path().join("ploopfs.deb");
    Run::new(own.join("contrib/package")).arg("--built").arg(&package).limit(300).ok();

    let root = folder.path().join("root");
    let notes = root.join("var/lib/dpkg");
    std::fs::create_dir_all(notes.join("info")).expect("a folder");
    std::fs::create_dir_all(notes.join("updates")).expect("a folder");
    std::fs::write(notes.join("status"), "").expect("a file");
    // The libraries that it depends on are the machine's, not this root's.
    let dpkg = |words: &[&str]| {
        let mut all = vec!["--root", text(&root), "--force-depends", "--no-triggers", "--log=/dev/null"];
        all.extend(words);
        ok("dpkg", &all)
    };
    dpkg(&["--install", text(&package)]);
    for file in FILES {
        assert!(root.join(file).is_file(), "{file} is missing");
    }
    let page = root.join("usr/share/man/man7/ploopfs-semantics.7.gz");
    let page = Run::new("man").args(["-l", text(&page)]).env("MANWIDTH", "80").ok();
    assert!(
        page.contains("What a sync means") && page.lines().all(|line| line.chars().count() <= 80),
        "{page}"
    );

    let images = folder.path().join("images");
    std::fs::create_dir(&images).expect("a folder");
    let guard = Mount::adopt(&images, &folder.path().join("vdisks"));
    let done = installed(
        folder.path(),
        &root.join("usr/sbin"),
        &root.join("usr/bin/ploopfs"),
        r#"
        mkdir vdisks
        mount -t fuse.ploopfs -o create=vm1=64M images vdisks
        printf kept | dd of=vdisks/vm1.img conv=notrunc,fsync status=none
        head -c 4 vdisks/vm1.img
        umount vdisks"#,
    );
    assert!(done.success() && done.stdout == "kept", "{done}");
    assert!(!marked_in_use(&guard.delta("vm1")));

    dpkg(&["--purge", "ploopfs"]);
    let mut left = Vec::new();
    files_below(&root, &mut left);
    assert_eq!(left, Vec::<PathBuf>::new(), "left behind");
}

#[test]
fn the_tarball_has_what_its_sums_name_and_is_the_same_twice() {
    let folder = temp_dir();
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let packed = |name: &str| {
        let file = folder.path().join(name);
        let pack = Run::new(own.join("contrib/package")).args(["--built", "--tar"]).arg(&file);
        pack.env("SOURCE_DATE_EPOCH", "1000000000").limit(300).ok();
        std::fs::read(file).expect("the tarball")
    };
    assert!(packed("b.tar.gz") == packed("a.tar.gz"), "the same sources give other bytes");
    let check = "sha256sum --quiet -c a.tar.gz.sha256 && tar -xzf a.tar.gz --strip-components=1 \
                 && sha256sum --quiet -c SHA256SUMS && bin/ploopfs --version";
    let said = Run::new("bash").args(["-e", "-c", check]).in_folder(folder.path()).ok();
    assert_eq!(said.trim(), concat!("ploopfs ", env!("CARGO_PKG_VERSION")));
    for file in [
        "sbin/mount.fuse.ploopfs",
        "sbin/umount.fuse.ploopfs",
        "share/man/man1/ploopfs-mount.1",
        "share/man/man7/ploopfs-semantics.7",
        "share/bash-completion/completions/ploopfs",
        "share/zsh/site-functions/_ploopfs",
        "share/fish/vendor_completions.d/ploopfs.fish",
        "lib/systemd/system/ploopfs@.service",
        "lib/udev/rules.d/60-ploopfs-loop.rules",
        "share/doc/ploopfs/README.md",
        "share/doc/ploopfs/docs/promises.md",
        "share/doc/ploopfs/LICENSE-MIT",
        "share/doc/ploopfs/LICENSE-APACHE",
    ] {
        assert!(folder.path().join(file).is_file(), "{file} is missing");
    }
}
