//! What we keep beside a descriptor: the labels of snapshots, and the files that a step underway makes or drops.
//! ploop loses unknown elements when it stores a descriptor, so they have a file of their own.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::format::descriptor::{Descriptor, Guid};

/// The file's name in the descriptor's folder.
pub const LABELS_NAME: &str = "ploopfs.json";
/// Longest label in bytes.
pub(crate) const MAX_LABEL: usize = 64;
/// The format's number; a file of another is refused, not misread.
const VERSION: u32 = 1;

/// Names for snapshots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels {
    names: BTreeMap<Guid, String>,
    /// When each snapshot was taken, in seconds since 1970: no file of it keeps that through copies, merges and writes.
    times: BTreeMap<Guid, i64>,
    /// How long each snapshot's raw file was when it was taken, in bytes. It only grows from there; a shorter one was cut off,
    /// and no map says what is missing of it.
    lengths: BTreeMap<Guid, u64>,
    /// What deleted snapshots were called whose data is not merged yet. The names are free; who deletes one once more means
    /// what is left of it.
    deleted: BTreeMap<Guid, String>,
    /// Files of the folder that exist only while a step is underway. One that no delta has at the next open was left
    /// by a crash, and goes.
    pub(super) passing: BTreeSet<String>,
}

#[derive(Serialize, Deserialize)]
struct Text {
    version: u32,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    taken: BTreeMap<String, i64>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    lengths: BTreeMap<String, u64>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    deleted: BTreeMap<String, String>,
    #[serde(default)]
    passing: BTreeSet<String>,
}

impl Labels {
    /// The snapshot's label, else its GUID as text.
    pub fn name(&self, guid: Guid) -> String {
        self.names.get(&guid).cloned().unwrap_or_else(|| guid.to_string())
    }

    /// The snapshot's label, if it has one.
    pub fn label(&self, guid: Guid) -> Option<&str> {
        self.names.get(&guid).map(String::as_str)
    }

    /// When the snapshot was taken, in seconds since 1970; None: not known, since another program took it.
    pub fn taken(&self, guid: Guid) -> Option<i64> {
        self.times.get(&guid).copied()
    }

    /// The least that the snapshot's raw file is long, in bytes; None: not known, or it is no raw file.
    pub fn length(&self, guid: Guid) -> Option<u64> {
        self.lengths.get(&guid).copied()
    }

    /// The snapshot with this label or GUID. The live top is none.
    pub fn find(&self, descriptor: &Descriptor, name: &str) -> Option<Guid> {
        let is_snapshot = |guid: &Guid| *guid != descriptor.top && descriptor.shot(*guid).is_some();
        let labelled = self.names.iter().find(|(guid, label)| *label == name && is_snapshot(guid));
        labelled.map(|(guid, _)| *guid).or_else(|| Guid::parse(name).filter(is_snapshot))
    }

    /// The snapshot of this name that was deleted and whose data can be merged by now; also by its GUID.
    pub fn find_deleted(&self, descriptor: &Descriptor, name: &str) -> Option<Guid> {
        // A crash may have come before the name was free.
        let called = |guid: &Guid| self.deleted.get(guid).or_else(|| self.names.get(guid));
        let is =
            |guid: &Guid| called(guid).is_some_and(|label| label == name) || Guid::parse(name) == Some(*guid);
        descriptor.unfinished().into_iter().find(is)
    }

    /// Files that a step was about to make or to drop and that `descriptor` does not name: they go at the next open.
    pub fn noted(&self, descriptor: &Descriptor) -> impl Iterator<Item = &str> {
        self.passing.iter().map(String::as_str).filter(|file| !descriptor.names(file))
    }

    /// Whether `label` may be given to a snapshot.
    pub fn check(&self, label: &str) -> Result<()> {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let refuse = |why: &str| Err(Error::new(Kind::Invalid, format!("the name {label:?} {why}")));
        if label.is_empty() || label.len() > MAX_LABEL || !label.bytes().all(legal) {
            return refuse("must be 1 to 64 letters, digits, dots, underscores and dashes");
        }
        if label.starts_with('.') {
            return refuse("must not begin with a dot");
        }
        if Guid::parse(label).is_some() {
            return refuse("looks like the GUID of a snapshot; choose another");
        }
        if self.names.values().any(|taken| taken == label) {
            let why = format!("there is a snapshot named {label} already; choose another name");
            return Err(Error::new(Kind::Exists, why));
        }
        Ok(())
    }

    pub(super) fn set(&mut self, guid: Guid, label: Option<String>) {
        match label {
            Some(label) => self.names.insert(guid, label),
            None => self.names.remove(&guid),
        };
    }

    /// The snapshot is deleted: its name is free.
    pub(super) fn set_deleted(&mut self, guid: Guid) {
        self.deleted.extend(self.names.remove(&guid).map(|label| (guid, label)));
        self.times.remove(&guid);
    }

    pub(super) fn set_taken(&mut self, guid: Guid, taken: Option<i64>) {
        match taken {
            Some(taken) => self.times.insert(guid, taken),
            None => self.times.remove(&guid),
        };
    }

    pub(super) fn set_length(&mut self, guid: Guid, length: Option<u64>) {
        match length {
            Some(length) => self.lengths.insert(guid, length),
            None => self.lengths.remove(&guid),
        };
    }

    /// Forgets what no snapshot of `descriptor` has, except for `coming`, which it will have next.
    pub(super) fn prune(&mut self, descriptor: &Descriptor, coming: Option<Guid>) {
        let stays = |guid: &Guid| Some(*guid) == coming || descriptor.shot(*guid).is_some();
        self.names.retain(|guid, _| stays(guid));
        self.times.retain(|guid, _| stays(guid));
        self.lengths.retain(|guid, _| stays(guid));
        self.deleted.retain(|guid, _| stays(guid));
    }

    /// Reads the file. Err says what is wrong with it.
    pub(super) fn parse(bytes: &[u8]) -> std::result::Result<Labels, String> {
        let text: Text = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        if text.version != VERSION {
            return Err(format!("version {} is not known to this program", text.version));
        }
        let mut labels = Labels::default();
        for (guid, label) in text.labels {
            let guid = Guid::parse(&guid).ok_or_else(|| format!("{guid:?} is not a GUID"))?;
            labels.check(&label).map_err(|e| e.to_string())?;
            labels.names.insert(guid, label);
        }
        for (guid, time) in text.taken {
            let guid = Guid::parse(&guid).ok_or_else(|| format!("{guid:?} is not a GUID"))?;
            labels.times.insert(guid, time);
        }
        for (guid, length) in text.lengths {
            let guid = Guid::parse(&guid).ok_or_else(|| format!("{guid:?} is not a GUID"))?;
            labels.lengths.insert(guid, length);
        }
        for (guid, label) in text.deleted {
            let guid = Guid::parse(&guid).ok_or_else(|| format!("{guid:?} is not a GUID"))?;
            labels.deleted.insert(guid, label);
        }
        if let Some(path) = text.passing.iter().find(|name| !is_plain_name(name)) {
            return Err(format!("{path:?} is not the name of a file"));
        }
        labels.passing = text.passing;
        Ok(labels)
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let labels = self.names.iter().map(|(guid, label)| (guid.to_string(), label.clone())).collect();
        let taken = self.times.iter().map(|(guid, time)| (guid.to_string(), *time)).collect();
        let deleted = self.deleted.iter().map(|(guid, label)| (guid.to_string(), label.clone())).collect();
        let lengths = self.lengths.iter().map(|(guid, length)| (guid.to_string(), *length)).collect();
        let text = Text { version: VERSION, labels, taken, lengths, deleted, passing: self.passing.clone() };
        let mut bytes = serde_json::to_vec_pretty(&text).expect("maps of strings are always JSON");
        bytes.push(b'\n');
        bytes
    }
}

/// True for a file of the folder itself that may be a delta.
pub(super) fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && !name.contains(['/', '\0']) && name != "." && name != ".."
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_have_the_documented_letters_and_are_unique() {
        let mut labels = Labels::default();
        for good in ["a", "2026-11-20T22.45.01", "A_b-c.d", &"x".repeat(64)] {
            labels.check(good).expect(good);
        }
        for bad in ["", ".a", "a b", "a/b", "\u{e4}", &"x".repeat(65), "5fbaabe3-6958-40ff-92a7-860e329aab41"]
        {
            assert_eq!(labels.check(bad).expect_err(bad).kind(), Kind::Invalid);
        }
        labels.set(Guid::random(), Some("a".into()));
        assert_eq!(labels.check("a").expect_err("taken").kind(), Kind::Exists);
    }

    #[test]
    fn a_snapshot_is_found_by_label_and_by_guid_and_the_live_top_is_not() {
        let (first, gone) = (Guid::random(), Guid::random());
        let mut descriptor = Descriptor::new(8, 8, "f0", false);
        descriptor.add_snapshot(first, "f1").expect("fresh");
        let mut labels = Labels::default();
        labels.set(first, Some("one".into()));
        labels.set(gone, Some("old".into()));
        for name in ["one".to_owned(), first.to_string(), first.to_string().to_uppercase()] {
            assert_eq!(labels.find(&descriptor, &name), Some(first));
        }
        for name in ["old".to_owned(), gone.to_string(), Guid::TOP.to_string(), "two".into()] {
            assert_eq!(labels.find(&descriptor, &name), None, "{name}");
        }
        assert_eq!((labels.name(first), labels.name(Guid::TOP)), ("one".into(), Guid::TOP.to_string()));
        labels.prune(&descriptor, None);
        assert_eq!(labels.label(gone), None);
    }

    #[test]
    fn the_file_reads_back_and_rubbish_is_refused() {
        let mut labels = Labels::default();
        labels.set(Guid::random(), Some("one".into()));
        labels.set_taken(Guid::random(), Some(1_795_214_701));
        labels.set_length(Guid::random(), Some(1 << 40));
        let gone = Guid::random();
        labels.set(gone, Some("two".into()));
        labels.set_deleted(gone);
        labels.check("two").expect("free again");
        labels.passing.insert("f1".into());
        assert_eq!(Labels::parse(&labels.to_bytes()), Ok(labels));
        for bad in ["", "{}", "{\"version\":2}", "{\"version\":1,\"labels\":{\"x\":\"y\"}}"] {
            Labels::parse(bad.as_bytes()).expect_err(bad);
        }
        Labels::parse(b"{\"version\":1,\"passing\":[\"../x\"]}").expect_err("leaves the folder");
    }
}
