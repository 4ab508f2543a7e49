//! What is said over the control socket: one JSON object a line, each way, with the version in every line.
//!
//! Fields are added, never renamed; what a reader does not know it skips. All types that are said are the protocol's own,
//! so that a change in the rest of the program changes no line: [`work`], [`content`] and [`stats`] convert from and to
//! the program's, field by field.

pub mod content;
pub mod stats;
pub mod work;

use serde::{Deserialize, Serialize};

use crate::control::protocol::content::{ChangesAnswer, DiffAnswer, MapAnswer, SnapshotAnswer};
use crate::control::protocol::stats::StatsAnswer;
use crate::control::protocol::work::{DoneAnswer, WorkRequest};
use crate::error::{Error, Kind};

/// The version both sides put in every line.
pub const VERSION: u32 = 1;
/// The longest line, in bytes. A list of some thousand images is an answer, so only requests are held to it.
pub const MAX_REQUEST: usize = 64 << 10;
/// The longest answer a client takes, in bytes.
pub const MAX_ANSWER: usize = 64 << 20;

/// What a client wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Op {
    /// Who serves this folder.
    Hello,
    /// The images of the folder.
    List,
    /// Look at the folder now; answered when what lies there is shown.
    Rescan {
        /// Name of a file that was just made there and is complete. Without that, a file that appeared is taken for one that
        /// is still being written until it is closed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        made: Option<String>,
    },
    /// End as after SIGTERM; a second one forces it.
    Stop,
    /// Answered when every image was closed, just before the daemon ends.
    Wait,
    /// Do something with an image. Answered with lines of [`Interim`] while it lasts, then with one [`Answer`]. A client
    /// that hangs up does not end it.
    Work {
        /// Name of the image, without `.img`.
        image: String,
        /// What to do.
        work: WorkRequest,
        /// At most this many bytes per second; None: as fast as it goes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rate: Option<u64>,
    },
    /// What differs between two snapshots of an image, or one and its live disk.
    Diff {
        /// Name of the image, without `.img`.
        image: String,
        /// Label or GUID.
        from: String,
        /// Label or GUID; None: the live disk.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        to: Option<String>,
        /// From which byte on; an answer says where the next begins.
        #[serde(default)]
        start: u64,
    },
    /// End what [`Op::Work`] began; that answers when it has ended.
    Cancel {
        /// Name of the image, without `.img`.
        image: String,
    },
    /// The snapshots of an image.
    Snapshots {
        /// Name of the image, without `.img`.
        image: String,
    },
    /// The live counters.
    Stats,
    /// What has changed on an image's disk since its tracking began.
    Changes {
        /// Name of the image, without `.img`.
        image: String,
        /// From which byte on; an answer says where the next begins.
        #[serde(default)]
        start: u64,
    },
    /// A piece of the map of an image.
    Map {
        /// Name of the image, without `.img`.
        image: String,
        /// One of its snapshots, by label or GUID; None: the live disk.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        snapshot: Option<String>,
        /// The byte of the disk at which the piece begins.
        offset: u64,
    },
}

/// One request line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Protocol version.
    pub v: u32,
    /// What is wanted.
    #[serde(flatten)]
    pub op: Op,
}

/// The answer to [`Op::Hello`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Process id of the daemon.
    pub pid: u32,
    /// Process id of its keeper.
    pub keeper: u32,
    /// Version of the program.
    pub version: String,
    /// Where the folder is mounted.
    pub mountpoint: String,
    /// The images folder.
    pub images: String,
    /// `fuse` or `uring`.
    pub transport: String,
    /// True when no image can be written.
    pub read_only: bool,
    /// True once the mount has ended and its images are being closed.
    #[serde(default)]
    pub closing: bool,
    /// The file system's device number, major and minor, in the kernel's table of mounts. It distinguishes this
    /// daemon's mount from one that another daemon made of a folder that had the same path before.
    #[serde(default)]
    pub device: Option<(u32, u32)>,
    /// How often a daemon of the mount was replaced.
    #[serde(default)]
    pub restarts: u64,
    /// How long requests waited at the last time, in milliseconds.
    #[serde(default)]
    pub last_pause_ms: u64,
}

/// One image in the answer to [`Op::List`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageLine {
    /// Name without `.img`.
    pub name: String,
    /// Its file or folder.
    pub path: String,
    /// `ploop`, `raw`, `layered`, ...
    pub kind: String,
    /// Disk size in bytes.
    pub size: u64,
    /// Space taken on the host in bytes.
    pub allocated: u64,
    /// True when it is shown under the mount.
    pub served: bool,
    /// Why it is not served, or served read-only.
    pub reason: Option<String>,
    /// What it can do now: `write`, `full-queue`, `full-error`, `read-only`, or `closed` while it is not open.
    pub mode: String,
    /// Number of open handles.
    pub openers: u64,
}

/// How one image ended, in the answer to [`Op::Wait`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Closed {
    /// Name of the image.
    pub name: String,
    /// Why its in-use mark stays; None when it was closed cleanly.
    pub error: Option<String>,
}

/// How far a piece of work has come, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amount {
    /// Done so far.
    pub done: u64,
    /// In all; 0: not known.
    pub total: u64,
}

/// A line that comes before the answer to [`Op::Work`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interim {
    /// Protocol version.
    pub v: u32,
    /// How far it has come.
    pub progress: Amount,
}

/// One answer line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Protocol version.
    pub v: u32,
    /// Whether the request was carried out.
    pub ok: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The exit status that the command should end with.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub status: u8,
    /// What kind of failure, as an errno; 0 for none.
    #[serde(default, skip_serializing_if = "is_none")]
    pub errno: i32,
    /// For [`Op::Hello`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hello: Option<Hello>,
    /// For [`Op::List`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<Vec<ImageLine>>,
    /// For [`Op::Wait`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<Vec<Closed>>,
    /// For [`Op::Work`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub done: Option<DoneAnswer>,
    /// For [`Op::Snapshots`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshots: Option<Vec<SnapshotAnswer>>,
    /// For [`Op::Stats`]: what `.ploopfs/stats.json` holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stats: Option<StatsAnswer>,
    /// For [`Op::Map`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<MapAnswer>,
    /// For [`Op::Changes`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes: Option<ChangesAnswer>,
    /// For [`Op::Diff`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff: Option<DiffAnswer>,
}

fn is_zero(n: &u8) -> bool {
    *n == 0
}

fn is_none(errno: &i32) -> bool {
    *errno == 0
}

impl Answer {
    /// "Done".
    pub fn done() -> Answer {
        Answer { v: VERSION, ok: true, ..Answer::default() }
    }

    /// "Not done, because".
    pub fn failed(e: &Error) -> Answer {
        Answer {
            v: VERSION,
            ok: false,
            error: Some(e.to_string()),
            status: e.kind().exit_status(),
            errno: e.errno(),
            ..Answer::default()
        }
    }
}

/// Reads one request line.
pub fn parse_request(line: &[u8]) -> Result<Op, Error> {
    /// Only the version: read first, so that a newer client hears why it is not understood.
    #[derive(Deserialize)]
    struct Version {
        v: u32,
    }
    let malformed = |e: serde_json::Error| Error::new(Kind::Invalid, format!("not a request: {e}"));
    let Version { v } = serde_json::from_slice(line).map_err(malformed)?;
    if v != VERSION {
        let what = format!("protocol version {v} is not known here, this daemon speaks {VERSION}");
        return Err(Error::new(Kind::Unsupported, what));
    }
    let request: Request = serde_json::from_slice(line).map_err(malformed)?;
    Ok(request.op)
}

#[cfg(test)]
mod golden;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vdisk::live::Work;

    #[test]
    fn a_request_survives_being_written_and_read() {
        let image = || "vm1".to_owned();
        let works = [
            Work::Snapshot { label: Some("a".into()) },
            Work::Snapshot { label: None },
            Work::Delete { snapshot: "a".into() },
            Work::Merge { snapshot: "a".into() },
            Work::Switch { snapshot: "a".into() },
            Work::Clone { snapshot: None, to: vec!["/images/vm2".into()], copy: true },
            Work::Clone { snapshot: None, to: vec!["/images/vm2".into(), "/images/vm3".into()], copy: true },
            Work::Resize { size: u64::MAX },
            Work::Compact { dry_run: true, defrag: false },
            Work::Compact { dry_run: false, defrag: true },
            Work::Track { granularity: Some(65536) },
            Work::Track { granularity: None },
            Work::Untrack,
        ];
        let works = works.map(|work| Op::Work { image: image(), work: work.into(), rate: Some(1 << 20) });
        let diff = |to| Op::Diff { image: image(), from: "a".into(), to, start: 7 };
        let map = Op::Map { image: image(), snapshot: Some("a".into()), offset: 1 << 40 };
        let changes = Op::Changes { image: image(), start: 1 << 40 };
        let others = [Op::Cancel { image: image() }, Op::Snapshots { image: image() }, map, changes];
        for op in [Op::Hello, Op::List, Op::Rescan { made: None }, Op::Stop, Op::Wait, Op::Stats]
            .into_iter()
            .chain(works)
            .chain(others)
            .chain([diff(None), diff(Some("b".into()))])
        {
            let line = serde_json::to_vec(&Request { v: VERSION, op: op.clone() }).expect("plain data");
            assert_eq!(parse_request(&line).expect("our own line"), op);
        }
    }

    #[test]
    fn another_version_is_told_which_one_is_spoken() {
        let e = parse_request(br#"{"v":9,"op":"dance"}"#).expect_err("version 9");
        assert!(e.to_string().contains("speaks 1"), "{e}");
    }

    #[test]
    fn rubbish_is_an_error_and_not_a_panic() {
        let lines = [
            &b""[..],
            b"{",
            b"[]",
            b"\xff\xfe",
            b"null",
            br#"{"v":1}"#,
            br#"{"v":1,"op":"dance"}"#,
            br#"{"v":1,"op":"work"}"#,
            br#"{"v":1,"op":"work","image":"vm1","work":"snapshot"}"#,
            br#"{"v":1,"op":"work","image":"vm1","work":{"work":"format"}}"#,
            br#"{"v":1,"op":"work","image":"vm1","work":{"work":"resize","size":-1}}"#,
            br#"{"v":1,"op":"work","image":7,"work":{"work":"resize","size":1}}"#,
            br#"{"v":1,"op":"cancel"}"#,
        ];
        for line in lines {
            assert_eq!(parse_request(line).expect_err("rubbish").kind(), Kind::Invalid);
        }
    }
}
