//! Formats of other programs, by the `qemu-img` program: the reader of qcow2, VMDK, VHDX, VHD and VDI that is tested most
//! and repaired first, in its own process, where what it makes of a hostile file harms nobody here.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::error::{Error, Kind, Result};
use crate::progress::Progress;

const PROGRAM: &str = "qemu-img";
/// How often a running program is looked at: an even bar, and a Ctrl-C that is heard at once.
const LOOK: Duration = Duration::from_millis(50);

/// What `qemu-img info` says of a file.
#[derive(Clone, Debug)]
pub struct Info {
    /// Disk size in bytes.
    pub size: u64,
    /// Another file that it names, and without which it is not whole.
    pub other: Option<String>,
}

impl Info {
    /// Of the JSON about the file at `path`; None: it has no size.
    fn of(said: &Value, path: &Path) -> Option<Info> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let data = &said["format-specific"]["data"];
        // A VMDK names its own file among its extents.
        let extents = data["extents"].as_array().into_iter().flatten();
        let mut extents = extents.filter_map(|extent| text(&extent["filename"]));
        let other = text(&said["backing-filename"])
            .or_else(|| text(&data["data-file"]))
            .or_else(|| extents.find(|name| Path::new(name) != path));
        Some(Info { size: said["virtual-size"].as_u64()?, other })
    }
}

/// Looks at `file`, which is of `format`.
pub fn info(file: &Path, format: &str) -> Result<Info> {
    let mut command = Command::new(PROGRAM);
    let path = absolute(file)?;
    command.args(["info", "--output=json", "-f", format]).arg(&path).stdin(Stdio::null());
    let done = command.output().map_err(|e| cannot_run(&e))?;
    if !done.status.success() {
        return Err(refused(file, &done.stderr));
    }
    let said = serde_json::from_slice(&done.stdout).unwrap_or_default();
    Info::of(&said, &path)
        .ok_or_else(|| Error::at(Kind::Io, file, "qemu-img info says nothing that is understood"))
}

/// Converts a file of one format into one of another; each is format and path. `size` of the disk in bytes.
pub fn convert(
    options: &[&str],
    from: (&str, &Path),
    to: (&str, &Path),
    size: u64,
    progress: &Progress,
) -> Result<()> {
    progress.set_total(size);
    let mut command = Command::new(PROGRAM);
    command.args(["convert", "-p"]).args(options).args(["-f", from.0, "-O", to.0]);
    command
        .arg(absolute(from.1)?)
        .arg(to.1)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // A Ctrl-C of the terminal is for us; we end it.
    command.process_group(0);
    let mut child = command.spawn().map_err(|e| cannot_run(&e))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let percent = AtomicU64::new(0);
    let (status, said) = std::thread::scope(|scope| {
        scope.spawn(|| follow(stdout, &percent));
        let said = scope.spawn(|| {
            let mut said = Vec::new();
            // What it could not say is missing in a message, no more.
            let _ = stderr.map(|mut stderr| stderr.read_to_end(&mut said));
            said
        });
        let status = wait(&mut child, &percent, size, progress);
        (status, said.join().unwrap_or_default())
    });
    if status?.success() { Ok(()) } else { Err(refused(from.1, &said)) }
}

/// Waits for its end; ends it when the work is cancelled.
fn wait(
    child: &mut Child,
    percent: &AtomicU64,
    size: u64,
    progress: &Progress,
) -> Result<std::process::ExitStatus> {
    let lost = |e: io::Error| Error::new(Kind::Io, format!("cannot wait for qemu-img: {e}"));
    let mut shown = 0;
    loop {
        if let Some(status) = child.try_wait().map_err(lost)? {
            return Ok(status);
        }
        if let Err(cancelled) = progress.check() {
            // It may just have ended.
            let _ = child.kill();
            child.wait().map_err(lost)?;
            return Err(cancelled);
        }
        let done = size / 100 * percent.load(Ordering::Relaxed);
        progress.skip(done.saturating_sub(shown));
        shown = done.max(shown);
        std::thread::sleep(LOOK);
    }
}

/// Reads `    (12.34/100%)` after `    (12.34/100%)`.
fn follow(stdout: Option<impl Read>, percent: &AtomicU64) {
    let Some(mut stdout) = stdout else { return };
    let (mut buf, mut text) = ([0; 256], Vec::new());
    while let Ok(n @ 1..) = stdout.read(&mut buf) {
        text.extend_from_slice(&buf[..n]);
        if let Some(end) = text.iter().rposition(|byte| *byte == b'/') {
            let begin = text[..end].iter().rposition(|byte| *byte == b'(').map_or(0, |at| at + 1);
            let number = String::from_utf8_lossy(&text[begin..end]).trim().parse::<f64>();
            percent.store(number.map_or(0, |n| n as u64).min(100), Ordering::Relaxed);
            text.drain(..=end);
        }
    }
}

/// With a slash in front no part of a name is taken for a protocol or an option.
fn absolute(file: &Path) -> Result<PathBuf> {
    std::path::absolute(file).map_err(|e| Error::io(&e, file, "cannot open"))
}

fn cannot_run(e: &io::Error) -> Error {
    if e.kind() == io::ErrorKind::NotFound {
        let what = "the program qemu-img is not installed, which reads and writes all formats but raw (Debian: apt-get \
                    install qemu-utils)";
        return Error::new(Kind::Unsupported, what);
    }
    Error::io(e, PROGRAM, "cannot run the program")
}

fn refused(file: &Path, stderr: &[u8]) -> Error {
    let said = String::from_utf8_lossy(stderr);
    let said = said.trim().strip_prefix("qemu-img: ").unwrap_or(said.trim());
    // A hostile name must not fill the screen.
    let said: String = said.chars().take(500).collect();
    Error::at(Kind::Io, file, format!("qemu-img failed: {said}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_percentage_is_found_however_the_text_is_cut() {
        struct Bits<'a>(&'a [u8]);
        impl Read for Bits<'_> {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                let n = self.0.len().min(7);
                buf[..n].copy_from_slice(&self.0[..n]);
                self.0 = &self.0[n..];
                Ok(n)
            }
        }
        let percent = AtomicU64::new(0);
        follow(Some(Bits(b"    (0.00/100%)\r    (41.66/100%)\r    (7")), &percent);
        assert_eq!(percent.load(Ordering::Relaxed), 41);
    }

    #[test]
    fn every_other_file_that_a_file_names_is_seen() {
        let other = |said: Value| Info::of(&said, Path::new("/d/own")).expect("a size").other;
        let size = 1 << 20;
        let extents = |name: &str| serde_json::json!({"virtual-size": size, "format-specific": {"data": {"extents": [{"filename": name}]}}});
        assert_eq!(other(serde_json::json!({"virtual-size": size})), None);
        assert_eq!(other(extents("/d/own")), None);
        assert_eq!(other(extents("/etc/shadow")), Some("/etc/shadow".into()));
        let backing = serde_json::json!({"virtual-size": size, "backing-filename": "b"});
        assert_eq!(other(backing), Some("b".into()));
        let data = serde_json::json!({"virtual-size": size, "format-specific": {"data": {"data-file": "d"}}});
        assert_eq!(other(data), Some("d".into()));
    }

    #[test]
    fn a_missing_program_is_named_with_what_to_install() {
        let e = cannot_run(&io::Error::from(io::ErrorKind::NotFound));
        assert!(e.kind() == Kind::Unsupported && e.to_string().contains("qemu-utils"), "{e}");
    }
}
