//! Formats of other programs, by the `qemu-img` program: what is tested most and repaired first for qcow2, VMDK, VHDX, VHD
//! and VDI, in its own process, where what it makes of a hostile file harms nothing here. The disk itself is read and
//! written by way of `qemu_nbd`.

use std::io::{self, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Kind, Result};
use crate::format::header::SECTOR;
use crate::io::process::ends_with_this_thread;
use crate::progress::Progress;

const PROGRAM: &str = "qemu-img";
/// How often a running program is looked at: an even bar, and a Ctrl-C that is heard at once.
const LOOK: Duration = Duration::from_millis(50);

/// What `qemu-img info` says of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// Disk size in bytes.
    pub size: u64,
    /// The least that it maps on its own, in bytes; None: no such unit.
    pub cluster: Option<u64>,
    /// The file below it.
    pub backing: Option<BackingFile>,
    /// Another file that holds its data, and without which it is not whole.
    pub data: Option<String>,
    /// The names of the snapshots in it.
    pub snapshots: Vec<String>,
    /// Its content is encrypted.
    pub encrypted: bool,
}

/// The file below another, as that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingFile {
    /// Its name as it is written there.
    pub name: String,
    /// Where it is.
    pub path: String,
    /// Its format; None: the file does not say.
    pub format: Option<String>,
}

impl Info {
    /// Of the JSON about the file at `path`; None: it has no size.
    fn of(said: &Value, path: &Path) -> Option<Info> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let data = &said["format-specific"]["data"];
        // A VMDK names its own file among its extents.
        let extents = data["extents"].as_array().into_iter().flatten();
        let mut extents = extents.filter_map(|extent| text(&extent["filename"]));
        let other = text(&data["data-file"]).or_else(|| extents.find(|name| Path::new(name) != path));
        let backing = text(&said["backing-filename"]).map(|name| BackingFile {
            path: text(&said["full-backing-filename"]).unwrap_or_else(|| name.clone()),
            format: text(&said["backing-filename-format"]),
            name,
        });
        // Extended entries map by the 32nd part of a cluster.
        let parts = if data["extended-l2"].as_bool() == Some(true) { 32 } else { 1 };
        let snapshots = said["snapshots"].as_array().into_iter().flatten();
        Some(Info {
            size: said["virtual-size"].as_u64()?,
            cluster: said["cluster-size"].as_u64().map(|cluster| cluster / parts),
            backing,
            data: other,
            snapshots: snapshots.filter_map(|snapshot| text(&snapshot["name"])).collect(),
            encrypted: said["encrypted"].as_bool() == Some(true),
        })
    }

    /// Any other file that it names, and without which it is not whole.
    pub fn other(&self) -> Option<&str> {
        self.backing.as_ref().map(|backing| &*backing.name).or(self.data.as_deref())
    }
}

/// Looks at `file`, which is of `format`.
pub fn info(file: &Path, format: &str) -> Result<Info> {
    let mut command = Command::new(PROGRAM);
    let path = absolute(file)?;
    command.args(["info", "--output=json", "-f", format]).arg(&path).stdin(Stdio::null());
    let done = command.output().map_err(|e| cannot_run(PROGRAM, &e))?;
    if !done.status.success() {
        return Err(refused(PROGRAM, file, &done.stderr));
    }
    let said = serde_json::from_slice(&done.stdout).unwrap_or_default();
    Info::of(&said, &path).ok_or_else(|| not_understood(file, "info"))
}

/// A range of a disk that its file allocates; what lies in the files below it is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins, in bytes.
    pub begin: u64,
    /// Where it ends, in bytes.
    pub end: u64,
    /// It reads as zero, and nothing need be read for it.
    pub zero: bool,
}

/// One range as `qemu-img map` prints it. Programs older than 6.1 do not say `present`.
#[derive(Deserialize)]
struct Mapped {
    start: u64,
    length: u64,
    depth: u32,
    #[serde(default = "yes")]
    present: bool,
    zero: bool,
    /// It has a place of its own, whatever is there.
    #[serde(default)]
    data: bool,
    /// That place, in bytes; what is compressed has none.
    offset: Option<u64>,
}

fn yes() -> bool {
    true
}

/// What of a disk is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// What the file itself allocates.
    Own,
    /// What the files allocate, too, on which it stands.
    Chain,
}

/// What `file`, of which `info` is known, allocates, ascending; neighbours of one sort are one. A file that ends before
/// what it allocates is refused: it was cut off, and QEMU reads zeroes there.
pub fn map(file: &Path, format: &str, info: &Info, reach: Reach, progress: &Progress) -> Result<Vec<Extent>> {
    let mut command = Command::new(PROGRAM);
    command.args(["map", "--output=json", "-f", format]).arg(absolute(file)?);
    let read = |stdout: ChildStdout| serde_json::from_reader::<_, Vec<Mapped>>(BufReader::new(stdout));
    let ranges = run(&mut command, file, progress, read)?.map_err(|_| not_understood(file, "map"))?;
    // Places in another file are not said to be so.
    if info.data.is_none() {
        refuse_cut(file, &ranges)?;
    }
    Ok(extents(&ranges, reach))
}

/// A device is as long as it is.
fn refuse_cut(file: &Path, ranges: &[Mapped]) -> Result<()> {
    let status = file.metadata().map_err(|e| Error::io(&e, file, "cannot look at it"))?;
    let own = ranges.iter().filter(|range| range.depth == 0 && range.present && range.data);
    let ends = own.filter_map(|range| Some(range.offset?.saturating_add(range.length)));
    // A raw file's last sector may be a part of one.
    let (end, len) = (ends.max().unwrap_or(0), status.len().next_multiple_of(SECTOR));
    if !status.is_file() || end <= len {
        return Ok(());
    }
    let what = format!(
        "was cut off: it has {} bytes, and data of its disk up to byte {end}; copy it anew from where it came",
        status.len()
    );
    Err(Error::at(Kind::Damaged, file, what))
}

fn extents(ranges: &[Mapped], reach: Reach) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    let wanted = |range: &&Mapped| range.present && (range.depth == 0 || reach == Reach::Chain);
    for range in ranges.iter().filter(wanted) {
        let end = range.start.saturating_add(range.length);
        match extents.last_mut() {
            Some(last) if last.end == range.start && last.zero == range.zero => last.end = end,
            _ => extents.push(Extent { begin: range.start, end, zero: range.zero }),
        }
    }
    extents
}

/// Makes `file`, which is there and empty, an empty disk of `size` bytes in `format`; `shown` is for messages.
pub fn create(file: &Path, format: &str, size: u64, shown: &Path, progress: &Progress) -> Result<()> {
    let mut command = Command::new(PROGRAM);
    command.args(["create", "-q", "-f", format]).arg(file).arg(size.to_string());
    run(&mut command, shown, progress, |mut stdout: ChildStdout| {
        // It says nothing; what it says all the same must not stop it.
        let _ = io::copy(&mut stdout, &mut io::sink());
    })
}

/// Runs `command` to its end, with `read` on what it prints; ends it when the work is cancelled. `file` is for messages.
fn run<T: Send>(
    command: &mut Command,
    file: &Path,
    progress: &Progress,
    read: impl FnOnce(ChildStdout) -> T + Send,
) -> Result<T> {
    let lost = |e: io::Error| Error::new(Kind::Io, format!("cannot wait for {PROGRAM}: {e}"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = ours(command).spawn().map_err(|e| cannot_run(PROGRAM, &e))?;
    let pipes = (child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        let (stdout, stderr) = pipes;
        let read = scope.spawn(|| stdout.map(read));
        let said = scope.spawn(|| stderr.map(said).unwrap_or_default());
        let status = loop {
            if let Some(status) = child.try_wait().map_err(lost)? {
                break status;
            }
            if let Err(cancelled) = progress.check() {
                // It may just have ended.
                let _ = child.kill();
                child.wait().map_err(lost)?;
                return Err(cancelled);
            }
            std::thread::sleep(LOOK);
        };
        let (read, said) = (read.join().ok().flatten(), said.join().unwrap_or_default());
        match read {
            Some(read) if status.success() => Ok(read),
            _ => Err(refused(PROGRAM, file, &said)),
        }
    })
}

/// A Ctrl-C of the terminal is for us, and we end the program; it does not outlive us either.
pub(super) fn ours(command: &mut Command) -> &mut Command {
    ends_with_this_thread(command).process_group(0)
}

/// All that it says; what cannot be read is missing in a message, no more.
pub(super) fn said(mut stderr: impl Read) -> Vec<u8> {
    let mut said = Vec::new();
    let _ = stderr.read_to_end(&mut said);
    said
}

/// With a slash in front no part of a name is taken for a protocol or an option.
pub(super) fn absolute(file: &Path) -> Result<PathBuf> {
    std::path::absolute(file).map_err(|e| Error::io(&e, file, "cannot open"))
}

pub(super) fn cannot_run(program: &str, e: &io::Error) -> Error {
    if e.kind() == io::ErrorKind::NotFound {
        let what = format!(
            "the program {program} is not installed, which reads and writes all formats but raw (Debian: apt-get install \
             qemu-utils)"
        );
        return Error::new(Kind::Unsupported, what);
    }
    Error::io(e, program, "cannot run the program")
}

pub(super) fn refused(program: &str, file: &Path, stderr: &[u8]) -> Error {
    let said = String::from_utf8_lossy(stderr);
    let said = said.trim();
    let said = said.strip_prefix(&format!("{program}: ")).unwrap_or(said);
    // A hostile name must not fill the screen.
    let said: String = said.chars().take(500).collect();
    Error::at(Kind::Io, file, format!("{program} failed: {said}"))
}

fn not_understood(file: &Path, asked: &str) -> Error {
    Error::at(Kind::Io, file, format!("{PROGRAM} {asked} says nothing that is understood"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_other_file_that_a_file_names_is_seen() {
        let other =
            |said: Value| Info::of(&said, Path::new("/d/own")).expect("a size").other().map(str::to_owned);
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
    fn a_file_that_stands_on_another_is_read_with_its_clusters_and_its_snapshots() {
        let said = serde_json::json!({
            "virtual-size": 1 << 20, "cluster-size": 65536, "backing-filename": "b", "full-backing-filename": "/d/b",
            "backing-filename-format": "raw", "snapshots": [{"name": "one"}, {"name": "two"}],
            "format-specific": {"data": {"extended-l2": true}},
        });
        let backing = BackingFile { name: "b".into(), path: "/d/b".into(), format: Some("raw".into()) };
        let expected = Info {
            size: 1 << 20,
            cluster: Some(2048),
            backing: Some(backing),
            data: None,
            snapshots: vec!["one".into(), "two".into()],
            encrypted: false,
        };
        assert_eq!(Info::of(&said, Path::new("/d/own")), Some(expected));
    }

    #[test]
    fn what_was_asked_for_is_in_the_map_and_neighbours_are_one() {
        let said = r#"[
            {"start": 0, "length": 10, "depth": 0, "present": true, "zero": false, "data": true, "offset": 7},
            {"start": 10, "length": 10, "depth": 0, "present": true, "zero": false, "data": true, "compressed": true},
            {"start": 20, "length": 10, "depth": 0, "zero": true, "data": false},
            {"start": 30, "length": 10, "depth": 1, "present": true, "zero": false, "data": true},
            {"start": 40, "length": 10, "depth": 0, "present": false, "zero": true, "data": false}]"#;
        let ranges: Vec<Mapped> = serde_json::from_str(said).expect("as qemu-img prints it");
        let extent = |begin, end, zero| Extent { begin, end, zero };
        assert_eq!(extents(&ranges, Reach::Own), [extent(0, 20, false), extent(20, 30, true)]);
        let all = [extent(0, 20, false), extent(20, 30, true), extent(30, 40, false)];
        assert_eq!(extents(&ranges, Reach::Chain), all);
    }

    #[test]
    fn a_missing_program_is_named_with_what_to_install() {
        let e = cannot_run(PROGRAM, &io::Error::from(io::ErrorKind::NotFound));
        assert!(e.kind() == Kind::Unsupported && e.to_string().contains("qemu-utils"), "{e}");
    }
}
