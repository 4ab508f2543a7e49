//! What the fuzz targets in `fuzz/` do with their input; here, so that `tests/fuzz_replay.rs` can do it as well, without
//! a fuzzer. A body panics when it finds something.
#![allow(dead_code)] // each user takes its part

mod control_protocol;
mod descriptor;
mod extension;
mod header_bat;
mod ledger;
mod operations;
#[path = "../common/crash/power.rs"]
mod power;
mod uring_wire;
#[path = "../common/crash/watched.rs"]
mod watched;

use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use ploopfs::vdisk::{Engine, OnFull, Options};
use tempfile::TempDir;

pub use control_protocol::control_protocol;
pub use descriptor::descriptor;
pub use extension::extension;
pub use header_bat::header_bat;
pub use ledger::ledger;
pub use operations::operations;
pub use uring_wire::uring_wire;

/// A target by its name.
pub type Body = fn(&[u8]);

/// Every target; its corpus lies in `fuzz/corpus/NAME`.
pub const TARGETS: [(&str, Body); 7] = [
    ("header_bat", header_bat),
    ("extension", extension),
    ("descriptor", descriptor),
    ("control_protocol", control_protocol),
    ("operations", operations),
    ("uring_wire", uring_wire),
    ("ledger", ledger),
];

/// BAT pages are written at a flush or a close only, so that the same input does the same: no input takes ten seconds.
/// More would keep too many images, each until its timer has run.
fn lazy_engine() -> &'static Arc<Engine> {
    static ENGINE: LazyLock<Arc<Engine>> = LazyLock::new(|| engine(Duration::from_secs(10)));
    &ENGINE
}

/// BAT pages are written at once.
fn eager_engine() -> &'static Arc<Engine> {
    static ENGINE: LazyLock<Arc<Engine>> = LazyLock::new(|| engine(Duration::ZERO));
    &ENGINE
}

fn engine(bat_delay: Duration) -> Arc<Engine> {
    // Short steps: many extensions, and little to look at after each cut.
    let options =
        Options { runners: 4, bat_delay, extend: 128 << 10, on_full: OnFull::Error, ..Options::default() };
    Engine::new(options, Box::new(|_| ()))
}

/// A folder in memory where that is to be had.
fn folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("ploopfs-fuzz").tempdir_in(place).expect("a temporary folder")
}

/// An error that only a panic on another thread makes is a finding.
fn not_internal(e: &ploopfs::Error) {
    assert!(!e.to_string().contains("internal error"), "{e}");
}
