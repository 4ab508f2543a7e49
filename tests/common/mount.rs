//! A served folder of images.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use super::host::{drop_loop, loops_in, memory_dir, sequence, temp_dir};
use super::run::{Finished, Run, until};
use super::text;

/// A folder of images and its mount. However the test ends: loops over it are detached, it is unmounted, its own
/// daemon is ended, the folders are removed.
#[derive(Debug)]
pub struct Mount {
    images: PathBuf,
    point: PathBuf,
    args: Vec<String>,
    env: Vec<(String, String)>,
    up: bool,
    _own: Vec<TempDir>,
}

impl Mount {
    /// A fresh folder of images on the disk, mounted with `args`.
    #[track_caller]
    pub fn new(args: &[&str]) -> Mount {
        Mount::with(temp_dir(), args)
    }

    /// A fresh folder of images in memory, mounted with `args`.
    #[track_caller]
    pub fn in_memory(args: &[&str]) -> Mount {
        Mount::with(memory_dir(), args)
    }

    #[track_caller]
    fn with(folder: TempDir, args: &[&str]) -> Mount {
        let images = folder.path().join("images");
        let mut mount = Mount::prepare(&images, args);
        mount._own.push(folder);
        mount.start();
        mount
    }

    /// Mounts a folder that exists.
    #[track_caller]
    pub fn over(images: &Path, args: &[&str]) -> Mount {
        let mut mount = Mount::prepare(images, args);
        mount.start();
        mount
    }

    /// Everything but the start, for tests of the start itself.
    pub fn prepare(images: &Path, args: &[&str]) -> Mount {
        let folder = temp_dir();
        let point = folder.path().join("vdisks");
        let args = args.iter().map(|&arg| arg.to_owned()).collect();
        Mount { images: images.to_owned(), point, args, env: Vec::new(), up: false, _own: vec![folder] }
    }

    /// A guard for a mount that something else makes, at `point`.
    pub fn adopt(images: &Path, point: &Path) -> Mount {
        Mount {
            images: images.to_owned(),
            point: point.to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            up: true,
            _own: Vec::new(),
        }
    }

    /// Runs `ploopfs mount`, which must succeed and leave a live mount.
    #[track_caller]
    pub fn start(&mut self) {
        let done = self.try_start();
        assert!(done.success(), "{done}");
        assert!(self.is_mounted(), "`{}` returned, and {} is no mount", done.line, self.point.display());
    }

    /// Runs `ploopfs mount`, whatever comes of it.
    pub fn try_start(&mut self) -> Finished {
        self.up = true;
        // By PLOOPFS_TRANSPORT every test can be run on another transport.
        let transport = std::env::var("PLOOPFS_TRANSPORT").map(|name| format!("--transport={name}"));
        let run = self.env.iter().fold(Run::ploopfs(), |run, (name, value)| run.env(name, value));
        run.arg("mount").args(transport).args(&self.args).args([&self.images, &self.point]).limit(60).run()
    }

    /// Replaces the options of the next start.
    pub fn set_args(&mut self, args: &[&str]) {
        self.args = args.iter().map(|&arg| arg.to_owned()).collect();
    }

    /// A folder that is removed with it.
    pub fn owns(&mut self, folder: TempDir) {
        self._own.push(folder);
    }

    /// A variable in the environment of the next start, and so of all processes of the mount.
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.env.push((name.to_owned(), value.to_owned()));
    }

    /// The folder of images.
    pub fn images(&self) -> &Path {
        &self.images
    }

    /// Where it is mounted.
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// The flat file of an image.
    pub fn flat(&self, name: &str) -> PathBuf {
        self.point.join(format!("{name}.img"))
    }

    /// The delta file of a single-file image.
    pub fn delta(&self, name: &str) -> PathBuf {
        self.images.join(format!("{name}.hds"))
    }

    /// Opens the flat file for reading and writing.
    #[track_caller]
    pub fn open(&self, name: &str) -> std::fs::File {
        let flat = self.flat(name);
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&flat);
        file.unwrap_or_else(|error| panic!("cannot open {}: {error}", flat.display()))
    }

    /// The live counters.
    #[track_caller]
    pub fn stats(&self) -> serde_json::Value {
        let file = self.point.join(".ploopfs/stats.json");
        let text =
            std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("stats.json: {error}\n{text}"))
    }

    /// The mode of an image as the live counters give it.
    #[track_caller]
    pub fn mode(&self, name: &str) -> String {
        self.stats()["images"][name]["mode"].as_str().unwrap_or("none").to_owned()
    }

    /// The daemon's process id, as it says itself.
    #[track_caller]
    pub fn pid(&self) -> u32 {
        let pid = self.stats()["pid"].as_u64().expect("stats.json has a pid");
        u32::try_from(pid).expect("a process id")
    }

    /// True while something is mounted there.
    pub fn is_mounted(&self) -> bool {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let here = text(&self.point);
        table.lines().any(|line| line.split(' ').nth(4) == Some(here))
    }

    /// `ploopfs umount`, which must succeed: the daemon is gone and the images are closed when it returns.
    #[track_caller]
    pub fn umount(&mut self) {
        let umount = || Run::ploopfs().arg("umount").arg(&self.point).limit(90).run();
        let mut done = umount();
        // A child that another test has just forked holds our closed files open until its exec.
        until(Duration::from_secs(5), || {
            if done.code() == Some(4) {
                done = umount();
            }
            done.code() != Some(4)
        });
        assert!(done.success(), "{done}");
        assert!(!self.is_mounted(), "still mounted after `{}`", done.line);
        assert_eq!(self.processes(), Vec::<i32>::new(), "`{}` returned before the daemon's end", done.line);
        self.up = false;
    }

    /// SIGKILL to the daemon, then the ways of the mount's end: nothing is mounted when it returns.
    #[track_caller]
    pub fn kill(&mut self) {
        let pid =
            i32::try_from(self.pid()).ok().and_then(rustix::process::Pid::from_raw).expect("a process id");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("our own daemon");
        self.clear();
    }

    /// Processes that serve this mount: the binary under test with our mount point among its arguments.
    fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        let here = text(&self.point).as_bytes();
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let words: Vec<&[u8]> = line.split(|&byte| byte == 0).collect();
            let ours = words.first().is_some_and(|program| program.ends_with(b"ploopfs"));
            if ours && words.contains(&here) {
                found.push(pid);
            }
        }
        found
    }

    /// Ends the mount by any means, each bounded in time.
    fn clear(&mut self) {
        for device in loops_in(&self.point) {
            drop_loop(&device, sequence(&device));
        }
        // A daemon that was killed leaves the unmount to its keeper.
        let gone = |mount: &Mount| !mount.is_mounted() && mount.processes().is_empty();
        if !until(Duration::from_millis(500), || gone(self)) && self.is_mounted() {
            let _ = Run::ploopfs().arg("umount").arg(&self.point).limit(30).run();
        }
        if self.is_mounted() {
            let _ = Run::new("umount").arg("-l").arg(&self.point).limit(10).run();
        }
        if !until(Duration::from_secs(2), || self.processes().is_empty()) {
            // Again: a keeper may have started another daemon just before its own end.
            until(Duration::from_secs(5), || {
                let left = self.processes();
                for pid in left.iter().copied().filter_map(rustix::process::Pid::from_raw) {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
                left.is_empty()
            });
        }
        self.up = false;
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.up {
            self.clear();
        }
    }
}
