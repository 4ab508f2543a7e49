//! A virtual machine in QEMU, by software alone: a kernel of this machine (/boot), and an initramfs made by the test.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use super::run::{Run, sh, until};
use super::{find_program, text};

/// How long a guest may take to its next line. Alone on a machine without KVM it boots in 5 s; systemd in a guest, on a
/// machine that compiles meanwhile, takes two minutes.
const PATIENCE: Duration = Duration::from_secs(300);

/// The newest kernel in /boot that has its modules, and its version.
pub fn kernel() -> Option<(PathBuf, String)> {
    let mut found: Vec<_> = fs::read_dir("/boot")
        .ok()?
        .flatten()
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned();
            Path::new("/lib/modules").join(&version).is_dir().then(|| (entry.path(), version))
        })
        .collect();
    found.sort();
    found.pop()
}

/// What becomes a guest's root folder, with busybox in it.
pub struct Root {
    folder: PathBuf,
}

impl Root {
    /// Below `folder`.
    pub fn new(folder: &Path) -> Root {
        let root = Root { folder: folder.join("root") };
        for name in ["bin", "sbin", "proc", "sys", "dev", "mnt", "modules"] {
            fs::create_dir_all(root.folder.join(name)).expect("a folder");
        }
        root.add_program("busybox", "/bin/busybox");
        root
    }

    /// A path of the guest, as it is here; the folders above it are made.
    pub fn path(&self, path: &str) -> PathBuf {
        let path = self.folder.join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        path
    }

    /// A file that can be executed.
    pub fn add_file(&self, path: &str, content: &str) {
        let path = self.path(path);
        fs::write(&path, content).expect("a file");
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("a file");
    }

    /// A program of this machine (a name, or a path) as `to`, with the libraries it needs.
    pub fn add_program(&self, program: &str, to: &str) {
        let from = if program.contains('/') {
            PathBuf::from(program)
        } else {
            find_program(program).expect("asked for before")
        };
        // ldd fails for a static program, which needs nothing.
        let libraries = Run::new("ldd").arg(&from).run().stdout;
        for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
            fs::copy(library, self.path(library)).expect("a copy");
        }
        fs::copy(from, self.path(to)).expect("a copy");
    }

    /// The modules, and those that they need; /modules/order has their names in the order of loading. What the kernel
    /// has built in is left out.
    pub fn add_modules(&self, version: &str, modules: &[&str]) {
        let mut order: Vec<String> = Vec::new();
        for module in modules {
            let depends = Run::new("modprobe").args(["-S", version, "--show-depends", module]).ok();
            for file in depends.lines().filter_map(|line| line.trim().strip_prefix("insmod ")) {
                let name = file.trim().rsplit('/').next().unwrap_or_default();
                if !order.iter().any(|known| known == name) {
                    order.push(name.to_owned());
                    fs::copy(file.trim(), self.path(&format!("modules/{name}"))).expect("a copy");
                }
            }
        }
        fs::write(self.path("modules/order"), order.join("\n")).expect("a file");
    }

    /// The initramfs.
    pub fn pack(&self) -> PathBuf {
        let file = self.folder.with_file_name("initramfs");
        let pack = "find . | busybox cpio -o -H newc 2>/dev/null | gzip -1";
        sh(&format!("cd {}; {pack} >{}", text(&self.folder), text(&file)));
        file
    }
}

/// A running QEMU; ended when dropped.
pub struct Machine {
    qemu: Child,
    console: ChildStdin,
    lines: Receiver<String>,
    heard: Vec<String>,
}

impl Machine {
    /// Boots, with `memory` MiB; `more` is for QEMU's command line.
    pub fn start(kernel: &Path, initramfs: &Path, memory: u32, more: &[&str]) -> Machine {
        let mut command = Command::new(find_program("qemu-system-x86_64").expect("asked for before"));
        command.args(["-accel", "tcg", "-m", &memory.to_string(), "-nodefaults", "-display", "none"]);
        command.args(["-no-reboot", "-serial", "stdio", "-append"]);
        command.arg("console=ttyS0 quiet panic=-1 systemd.show_status=0 systemd.log_target=null");
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs).args(more);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut qemu = command.spawn().expect("QEMU");
        let console = qemu.stdin.take().expect("piped");
        let output = BufReader::new(qemu.stdout.take().expect("piped"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.split(b'\n').map_while(Result::ok) {
                if sender.send(String::from_utf8_lossy(&line).trim().to_owned()).is_err() {
                    return;
                }
            }
        });
        Machine { qemu, console, lines, heard: Vec::new() }
    }

    /// Waits for a line that begins so; what stands behind it.
    #[track_caller]
    pub fn expect(&mut self, beginning: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|error| {
                panic!("no `{beginning}` from the guest ({error}); it said:\n{}", self.heard.join("\n"))
            });
            self.heard.push(line);
            if let Some(rest) = self.heard.last().and_then(|line| line.strip_prefix(beginning)) {
                return rest.trim().to_owned();
            }
        }
    }

    /// What stands behind this beginning in the last such line so far.
    pub fn last(&mut self, beginning: &str) -> Option<String> {
        self.heard.extend(self.lines.try_iter());
        self.heard
            .iter()
            .rev()
            .find_map(|line| line.strip_prefix(beginning))
            .map(|rest| rest.trim().to_owned())
    }

    /// A line on the guest's console.
    pub fn say(&mut self, line: &str) {
        writeln!(self.console, "{line}").expect("the guest's console");
    }

    /// Waits until the guest has powered off.
    #[track_caller]
    pub fn ends(&mut self) {
        let mut status = None;
        until(PATIENCE, || {
            status = self.qemu.try_wait().expect("our own child");
            status.is_some()
        });
        self.heard.extend(self.lines.try_iter());
        assert!(status.is_some_and(|status| status.success()), "{status:?}\n{}", self.heard.join("\n"));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It has ended by itself, or the test failed.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
