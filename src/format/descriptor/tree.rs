//! The tree of snapshots, and every step that operations take on it. A step that would break the tree is refused
//! and changes nothing.

use super::{BadXml, Delta, Descriptor, Guid, Kept, MAX_CHAIN, MAX_DELTAS, Marker, Shot};

impl Descriptor {
    /// The delta with this identity.
    pub fn delta(&self, guid: Guid) -> Option<&Delta> {
        self.deltas.iter().find(|delta| delta.guid == guid)
    }

    /// The place in the tree with this identity.
    pub fn shot(&self, guid: Guid) -> Option<&Shot> {
        self.shots.iter().find(|shot| shot.guid == guid)
    }

    /// The deltas directly above.
    pub fn children(&self, guid: Guid) -> Vec<Guid> {
        self.shots.iter().filter(|shot| shot.parent == guid).map(|shot| shot.guid).collect()
    }

    /// True when a delta has this file.
    pub fn names(&self, file: &str) -> bool {
        self.deltas.iter().any(|delta| delta.file == file)
    }

    /// The deltas from the base up to `guid`.
    pub fn chain(&self, guid: Guid) -> Result<Vec<Guid>, BadXml> {
        let mut chain = Vec::new();
        let mut at = guid;
        while at != Guid::NONE {
            let Some(shot) = self.shot(at) else {
                return Err(BadXml::new("ParentGUID", at, "there is no Shot of this GUID"));
            };
            // A loop ends here, too.
            if chain.len() == MAX_CHAIN {
                let reason =
                    format!("more than {MAX_CHAIN} deltas lie on top of each other, or they form a loop");
                return Err(BadXml::new("ParentGUID", at, reason));
            }
            chain.push(at);
            at = shot.parent;
        }
        chain.reverse();
        Ok(chain)
    }

    /// The live top becomes the snapshot `snapshot`; a new top with the file `new_top_file` lies on it.
    pub fn add_snapshot(&mut self, snapshot: Guid, new_top_file: &str) -> Result<(), BadXml> {
        self.fresh(snapshot, new_top_file)?;
        if self.chain(self.top)?.len() == MAX_CHAIN {
            let reason = format!("the chain has {MAX_CHAIN} deltas already; delete a snapshot first");
            return Err(BadXml::new("Shot", self.top, reason));
        }
        let old = self.top;
        if old != Guid::TOP && self.shot(Guid::TOP).is_some() {
            return Err(BadXml::new("GUID", Guid::TOP, "another delta has the GUID of the top"));
        }
        self.require(old)?;
        self.deltas.iter_mut().filter(|delta| delta.guid == old).for_each(|delta| delta.guid = snapshot);
        self.shots.iter_mut().filter(|shot| shot.guid == old).for_each(|shot| shot.guid = snapshot);
        self.push_top(snapshot, new_top_file);
        Ok(())
    }

    /// Sets or clears what a crash would leave to do.
    pub fn set_marker(&mut self, guid: Guid, marker: Option<Marker>) -> Result<(), BadXml> {
        self.require(guid)?;
        if guid == self.top && marker.is_some() {
            return Err(BadXml::new("Shot", guid, "the live top cannot be temporary"));
        }
        self.shots.iter_mut().filter(|shot| shot.guid == guid).for_each(|shot| shot.marker = marker);
        Ok(())
    }

    /// Removes a delta that has no child and is not the top. Its file is to be unlinked.
    pub fn remove_leaf(&mut self, guid: Guid) -> Result<Delta, BadXml> {
        let delta = self.require(guid)?;
        if guid == self.top {
            return Err(BadXml::new("Shot", guid, "the live top cannot be removed"));
        }
        if !self.children(guid).is_empty() {
            return Err(BadXml::new("Shot", guid, "other deltas lie on it"));
        }
        self.forget(guid);
        Ok(delta)
    }

    /// `parent` and its only child `child` are one now: the child keeps its GUID and takes the parent's place, and
    /// its file is `survivor`, the file of one of them. Returns the other file, to be unlinked.
    pub fn remove_merged(&mut self, parent: Guid, child: Guid, survivor: &str) -> Result<String, BadXml> {
        let (lower, upper) = (self.require(parent)?, self.require(child)?);
        if self.children(parent) != [child] {
            return Err(BadXml::new("Shot", parent, format!("{child} is not its only child")));
        }
        let upwards = survivor == upper.file;
        if !upwards && survivor != lower.file {
            return Err(BadXml::new("File", survivor, "belongs to neither of the merged deltas"));
        }
        let below = self.shot(parent).map_or(Guid::NONE, |shot| shot.parent);
        if upwards && below == Guid::NONE && upper.plain {
            // The raw base is gone; "Plain" would make its child, a delta of the ploop format, be read as raw.
            self.deltas.iter_mut().for_each(|delta| delta.plain = false);
        }
        self.forget(parent);
        self.shots.iter_mut().filter(|shot| shot.guid == child).for_each(|shot| shot.parent = below);
        for delta in self.deltas.iter_mut().filter(|delta| delta.guid == child) {
            delta.file = survivor.to_owned();
            // A raw base that took the child's data stays one, whatever was said of the child.
            delta.plain |= !upwards && lower.plain;
        }
        Ok(if upwards { lower.file } else { upper.file })
    }

    /// Exchanges the files of two deltas.
    pub fn swap_files(&mut self, a: Guid, b: Guid) -> Result<(), BadXml> {
        let (first, second) = (self.require(a)?, self.require(b)?);
        if first.plain || second.plain {
            return Err(BadXml::new("Type", "Plain", "a raw base cannot change places"));
        }
        for delta in &mut self.deltas {
            if delta.guid == a {
                delta.file.clone_from(&second.file);
            } else if delta.guid == b {
                delta.file.clone_from(&first.file);
            }
        }
        Ok(())
    }

    /// Drops the live top and puts a new one with the file `new_top_file` on `to`. Returns the old top, whose file is
    /// to be unlinked.
    pub fn switch(&mut self, to: Guid, new_top_file: &str) -> Result<Delta, BadXml> {
        self.require(to)?;
        let old = self.require(self.top)?;
        if to == self.top {
            return Err(BadXml::new("Shot", to, "the live top is no snapshot"));
        }
        if self.chain(to)?.len() == MAX_CHAIN {
            let reason = format!("its chain has {MAX_CHAIN} deltas already; delete a snapshot first");
            return Err(BadXml::new("Shot", to, reason));
        }
        if self.names(new_top_file) {
            return Err(BadXml::new("File", new_top_file, "another delta has this file"));
        }
        self.forget(self.top);
        self.push_top(to, new_top_file);
        Ok(old)
    }

    /// The deltas that were deleted and can be merged by now: marked, with one child.
    pub fn unfinished(&self) -> Vec<Guid> {
        let marked = self.shots.iter().filter(|shot| shot.marker.is_some());
        marked.map(|shot| shot.guid).filter(|guid| self.children(*guid).len() == 1).collect()
    }

    /// The deltas that were deleted and on which nothing stands any more: what did was merged, dropped or deleted itself.
    /// The other markers speak of a merge that was broken off, not of a deletion: they abandon nothing.
    pub fn abandoned(&self) -> Vec<Guid> {
        let deleted = |shot: &&Shot| shot.marker == Some(Marker::Temporary) && shot.guid != self.top;
        let marked = self.shots.iter().filter(deleted);
        marked.map(|shot| shot.guid).filter(|guid| self.children(*guid).is_empty()).collect()
    }

    /// The descriptor of a clone: the chain of the snapshot `guid` alone, and a new top with the file `new_top_file`
    /// on it. Markers stay, so that what was deleted stays deleted.
    pub fn clone_of(&self, guid: Guid, new_top_file: &str) -> Result<Descriptor, BadXml> {
        let chain = self.chain(guid)?;
        let mut clone = self.clone();
        clone.switch(guid, new_top_file)?;
        let stays = |at: &Guid| *at == Guid::TOP || chain.contains(at);
        clone.deltas.retain(|delta| stays(&delta.guid));
        clone.shots.retain(|shot| stays(&shot.guid));
        Ok(clone)
    }

    /// The one raw file that this describes, where it says no more of it than the file does: such an image can be the file
    /// alone. What another program has put in here would be lost with it.
    pub fn lone_raw_file(&self) -> Option<&str> {
        self.lone_file(true)
    }

    /// The same of a file that is stored so.
    pub fn lone_file(&self, raw: bool) -> Option<&str> {
        let [delta] = &self.deltas[..] else { return None };
        let alone = Descriptor::new(self.disk_sectors, self.cluster_sectors, &delta.file, raw);
        (self.to_xml() == alone.to_xml()).then_some(&*delta.file)
    }

    /// Gives a delta another file.
    pub fn set_file(&mut self, guid: Guid, file: &str) -> Result<(), BadXml> {
        if self.require(guid)?.file != file && self.names(file) {
            return Err(BadXml::new("File", file, "another delta has this file"));
        }
        let delta = self.deltas.iter_mut().filter(|delta| delta.guid == guid);
        delta.for_each(|delta| delta.file = file.to_owned());
        Ok(())
    }

    /// Sets the disk's size.
    pub fn set_size(&mut self, disk_sectors: u64) {
        self.disk_sectors = disk_sectors;
    }

    fn require(&self, guid: Guid) -> Result<Delta, BadXml> {
        match (self.delta(guid), self.shot(guid)) {
            (Some(delta), Some(_)) => Ok(delta.clone()),
            _ => Err(BadXml::new("Shot", guid, "there is no such snapshot")),
        }
    }

    fn fresh(&self, guid: Guid, file: &str) -> Result<(), BadXml> {
        if guid == Guid::NONE || guid == Guid::TOP || self.shot(guid).is_some() {
            return Err(BadXml::new("GUID", guid, "is taken"));
        }
        if self.names(file) {
            return Err(BadXml::new("File", file, "another delta has this file"));
        }
        if self.deltas.len() >= MAX_DELTAS {
            return Err(BadXml::new("Image", self.deltas.len(), "there are too many snapshots; delete some"));
        }
        Ok(())
    }

    fn push_top(&mut self, parent: Guid, file: &str) {
        // On every image of a raw disk ploop writes "Plain" (docs/format.md#reading).
        let plain = self.deltas.iter().any(|delta| delta.plain);
        self.deltas.push(Delta { guid: Guid::TOP, file: file.into(), plain, kept: Kept::default() });
        self.shots.push(Shot { guid: Guid::TOP, parent, marker: None, kept: Kept::default() });
        self.top = Guid::TOP;
    }

    fn forget(&mut self, guid: Guid) {
        self.deltas.retain(|delta| delta.guid != guid);
        self.shots.retain(|shot| shot.guid != guid);
    }
}
