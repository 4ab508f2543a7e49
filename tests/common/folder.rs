//! A folder of images for the commands, without a mount.

use std::path::PathBuf;

use tempfile::TempDir;

use super::{Finished, Run, temp_dir};

/// A folder of images, empty at first, where ploopfs is run. Removed with everything in it.
pub struct Folder(pub TempDir);

impl Folder {
    pub fn new() -> Folder {
        Folder(temp_dir())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs ploopfs here.
    pub fn run(&self, args: &[&str]) -> Finished {
        Run::ploopfs().args(args).in_folder(self.0.path()).limit(60).run()
    }

    /// The same; it must succeed. Returns standard output.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        Run::ploopfs().args(args).in_folder(self.0.path()).limit(60).ok()
    }

    /// The same; it must end with `status`. Returns standard error.
    #[track_caller]
    pub fn fails(&self, status: i32, args: &[&str]) -> String {
        Run::ploopfs().args(args).in_folder(self.0.path()).limit(60).status(status).stderr
    }

    /// All names, with those that begin with a dot, without the daemon's own.
    pub fn names(&self) -> Vec<String> {
        let entries = self.0.path().read_dir().expect("the folder");
        let mut names: Vec<String> = entries
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.retain(|name| name != ".ploopfs");
        names.sort();
        names
    }
}
