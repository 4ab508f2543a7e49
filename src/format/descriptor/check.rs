//! The tree that a descriptor says: what an old one leaves out, and what must hold of every one.

use std::collections::HashMap;

use super::{BadXml, Descriptor, Guid, Kept, Shot};

impl Descriptor {
    /// Adds what old single-image descriptors leave out (docs/format.md#reading).
    pub(super) fn complete(&mut self, has_top: bool) {
        if let ([only], []) = (&self.deltas[..], &self.shots[..]) {
            let guid = only.guid;
            self.shots.push(Shot { guid, parent: Guid::NONE, marker: None, kept: Kept::default() });
            if !has_top {
                self.top = guid;
            }
        } else if self.deltas.len() == self.shots.len() + 1 && self.shot(Guid::TOP).is_none() {
            let parent = Guid::NONE;
            self.shots.push(Shot { guid: Guid::TOP, parent, marker: None, kept: Kept::default() });
        }
    }

    /// Everything that must hold of the tree.
    pub(super) fn check(&self) -> Result<(), BadXml> {
        let mut files = HashMap::new();
        let mut guids = HashMap::new();
        for delta in &self.deltas {
            if delta.file.is_empty() {
                return Err(BadXml::new("File", "", format!("the image {} has no file", delta.guid)));
            }
            if files.insert(&*delta.file, ()).is_some() {
                return Err(BadXml::new("File", &delta.file, "two images have this file"));
            }
            if delta.guid == Guid::NONE || guids.insert(delta.guid, ()).is_some() {
                return Err(BadXml::new("GUID", delta.guid, "an image must have a GUID of its own"));
            }
        }
        let mut parents = HashMap::new();
        for shot in &self.shots {
            if parents.insert(shot.guid, shot.parent).is_some() {
                return Err(BadXml::new("GUID", shot.guid, "two shots have this GUID"));
            }
            if !guids.contains_key(&shot.guid) {
                return Err(BadXml::new("Shot", shot.guid, "there is no Image of this GUID"));
            }
            if shot.parent == self.top {
                let reason = format!("the live top {} must not have children", self.top);
                return Err(BadXml::new("ParentGUID", shot.parent, reason));
            }
        }
        if let Some(delta) = self.deltas.iter().find(|delta| !parents.contains_key(&delta.guid)) {
            return Err(BadXml::new("Image", delta.guid, "there is no Shot of this GUID"));
        }
        for shot in &self.shots {
            if shot.parent != Guid::NONE && !parents.contains_key(&shot.parent) {
                return Err(BadXml::new("ParentGUID", shot.parent, "there is no Shot of this GUID"));
            }
        }
        refuse_loops(&parents)?;
        match self.shot(self.top) {
            None => Err(BadXml::new("TopGUID", self.top, "there is no Shot of this GUID")),
            Some(Shot { marker: Some(marker), .. }) => {
                Err(BadXml::new(marker.as_str(), self.top, "the live top cannot be temporary"))
            }
            Some(_) if self.preallocated && self.deltas.iter().any(|d| d.plain) => {
                Err(BadXml::new("Preallocated", 1, "contradicts the Type Plain"))
            }
            Some(_) => self.chain(self.top).map(|_| ()),
        }
    }
}

/// Every shot is visited once: what is below a visited one is known to end.
fn refuse_loops(parents: &HashMap<Guid, Guid>) -> Result<(), BadXml> {
    let mut ends: HashMap<Guid, ()> = HashMap::new();
    for start in parents.keys() {
        let mut path = HashMap::new();
        let mut at = *start;
        while at != Guid::NONE && !ends.contains_key(&at) {
            if path.insert(at, ()).is_some() {
                return Err(BadXml::new("ParentGUID", at, "the shots form a loop"));
            }
            at = parents.get(&at).copied().unwrap_or(Guid::NONE);
        }
        ends.extend(path);
    }
    Ok(())
}
