//! `check --repair` and `meta` with the real binary.

#[path = "../common/mod.rs"]
mod common;

mod crash;
mod files;
mod layers;
mod meta;
#[path = "../common/crash/watched.rs"]
mod watched;

use std::path::Path;

use common::Run;
use serde_json::Value;

const KIB: u64 = 1 << 10;

/// Runs `check` with `options` and returns status and report.
fn check(image: &Path, options: &[&str]) -> (i32, Value) {
    let done = Run::ploopfs().args(["check", "--json"]).args(options).arg(image).run();
    let report = serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {done}"));
    (done.code().expect("not killed"), report)
}
