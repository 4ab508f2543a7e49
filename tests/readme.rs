//! Every `sh` block of the README, pasted twice in a row, works.
//!
//! It runs in a copy of what the lines need, with the mount points moved below a temporary folder. `cargo install`
//! builds a release, which takes minutes: unless PLOOPFS_LONG is set, the binary under test takes its place.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use common::{Mount, Run, heavy, long, loops_in, temp_dir, text};

/// The README's blocks marked `sh`, in order.
fn blocks() -> Vec<String> {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = std::fs::read_to_string(readme).expect("README.md");
    let parts = readme.split("```sh\n").skip(1);
    parts.map(|part| part.split("```").next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn every_block_of_the_readme_works_when_pasted_twice_in_a_row() {
    require!("fuse", "loop", "qemu");
    let _turn = heavy();
    let folder = temp_dir();
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let tools = folder.path().join("tools");
    std::fs::create_dir(&tools).expect("a folder");
    let checkout = if long() {
        own.to_owned()
    } else {
        // Stands in for `cargo install`, and refuses to be taken for anything else.
        let cargo = tools.join("cargo");
        std::fs::write(&cargo, "#!/bin/sh\n[ \"$1\" = install ]\n").expect("the stand-in");
        std::fs::set_permissions(&cargo, std::fs::Permissions::from_mode(0o755)).expect("the stand-in");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_ploopfs"), tools.join("ploopfs")).expect("a link");
        std::os::unix::fs::symlink(own.join("src"), folder.path().join("src")).expect("a link");
        folder.path().to_owned()
    };
    // The guard cleans up whatever the lines leave when one of them fails.
    let images = folder.path().join("images");
    let guard = Mount::adopt(&images, &folder.path().join("vdisks"));
    let guest = common::Guest::adopt(&folder.path().join("guest"));
    // Where the README installs to is in everybody's PATH; what stands for it here must be, too.
    let installed = folder.path().join("local/bin");
    let path = format!("{}:{}:{}", text(&tools), text(&installed), std::env::var("PATH").unwrap_or_default());
    let moved = |block: &str| {
        block
            .replace("/mnt/vdisks", text(guard.point()))
            .replace("/mnt/guest", text(guest.path()))
            .replace("/usr/local", text(&folder.path().join("local")))
            .replace(" images", &format!(" {}", text(&images)))
    };
    let blocks = blocks();
    assert!(blocks.len() >= 3, "the README lost its lines");
    for block in &blocks {
        for time in ["first", "second"] {
            let done = Run::new("bash").args(["-c", &moved(block)]).in_folder(&checkout).env("PATH", &path);
            let done = done.limit(1500).run();
            assert!(done.success(), "pasted the {time} time:\n{block}\n{done}");
        }
    }
    assert!(!guard.is_mounted() && loops_in(guard.point()).is_empty(), "the last block ends everything");
}
