//! **R9** A delta file below a top is neither changed nor removed while anything else depends on it: another child, an
//! open snapshot file, another descriptor.
//!
//! What live operations come to for an image with a descriptor: which files, which steps, in which order. Another child:
//! only a snapshot with one child is merged. An open snapshot file: the folder refuses (`folder::views`). Another
//! descriptor has the file under another name: a link count above 1, and then a copy takes its place (`unshare`). The
//! order of files, descriptor and removal is R8's (`image::store`).

use std::cell::Cell;
use std::time::SystemTime;

use super::freeze::Uncommitted;
use super::judge::{is_unfinished, judge, sound};
use super::lower;
use super::merge::Direction;
use super::snapshot::TopPlan;
use super::{Done, Work};
use crate::error::{Error, Kind, Result};
use crate::format::descriptor::{Descriptor, Guid, Marker};
use crate::format::header::Header;
use crate::image::clone::{self, Unmade};
use crate::image::layers::Layers;
use crate::image::store::Replaced;
use crate::progress::Progress;
use crate::rules::{Rule, broken};
use crate::sync::Arc;
use crate::utc;
use crate::vdisk::Image;
use crate::vdisk::tracking::uuid_text;

/// Carries `work` out on the live disk `image`, whose descriptor and files are `layers`; None: it is a single file, which
/// work that [needs a folder](Work::needs_folder) must have become before. This is the one place that dispatches by the
/// kind of work. Blocks, for as long as it takes; not for runners or transport threads. Switching needs a closed
/// image: see `image::switch`.
pub fn carry_out(
    image: &Arc<Image>,
    layers: Option<&Arc<Layers>>,
    work: &Work,
    progress: &Progress,
) -> Result<Done> {
    carry_out_for(image, layers, work, progress, false)
}

/// The same for a caller that has the image for itself and closes it behind this: what is merged best while it is closed is
/// left for then ([`lower::finish`]).
pub fn carry_out_before_close(
    image: &Arc<Image>,
    layers: Option<&Arc<Layers>>,
    work: &Work,
    progress: &Progress,
) -> Result<Done> {
    carry_out_for(image, layers, work, progress, true)
}

fn carry_out_for(
    image: &Arc<Image>,
    layers: Option<&Arc<Layers>>,
    work: &Work,
    progress: &Progress,
    closes: bool,
) -> Result<Done> {
    let _alone = layers.map(|layers| layers.begin_operation()).transpose()?;
    judge(image, layers.map(|layers| &**layers), work)?;
    // What changes its files is not in the ledger.
    if let Some(book) = image.book.get() {
        book.beyond();
    }
    let done = act(image, layers.map(|layers| LiveWork { image, layers, progress, closes }), work, progress);
    if let Some(layers) = layers {
        // What was the top, or was changed by a merge, is a frozen level now; what became the top stays the writer's.
        layers.end_changing();
    }
    done
}

fn act(image: &Arc<Image>, job: Option<LiveWork<'_>>, work: &Work, progress: &Progress) -> Result<Done> {
    let layered = || {
        let what = "is a single file, and has no snapshots";
        job.as_ref().ok_or_else(|| Error::at(Kind::NotFound, image.shown(), what))
    };
    match work {
        Work::Snapshot { label } => {
            let name = layered()?.snapshot(label.as_deref())?;
            Ok(Done { name: Some(name), ..Done::default() })
        }
        Work::Delete { snapshot } => layered()?.delete(snapshot, true),
        Work::Merge { snapshot } => layered()?.delete(snapshot, false),
        Work::Finish => job.as_ref().map_or_else(|| Ok(Done::default()), LiveWork::finish),
        Work::Resize { size } => {
            let size = image.grow(*size, progress)?;
            if let Some(job) = &job {
                // The header, then the descriptor: at open the top's header wins. So the disk has its size, and a full host
                // is no reason to say that it has not. A raw file has no header.
                let changed = job.change(|next| {
                    next.set_size(size / 512);
                    Ok(())
                });
                match changed {
                    Err(Uncommitted::NotDone(e)) if image.has_map() => {
                        log::warn!("{e}; the next open corrects the size that is there");
                    }
                    changed => job.settle(changed)?,
                }
            }
            Ok(Done { size: Some(size), ..Done::default() })
        }
        Work::Clone { snapshot, to, copy } => {
            let job = layered()?;
            let of = match snapshot {
                Some(name) => name.clone(),
                None => job.snapshot(None)?,
            };
            let guid = job.find(&of)?;
            if let Err(Unmade { made, error }) = clone::clone(job.layers, guid, to, *copy, progress) {
                return Err(match (snapshot, made) {
                    (Some(_), _) => error,
                    (None, 0) => {
                        job.take_back(&of);
                        error
                    }
                    (None, _) => error.and(format!("the new snapshot {of}, on which they stand, stays")),
                });
            }
            let stands = if to.len() > 1 { "the clones stand" } else { "the clone stands" };
            let note = snapshot.is_none().then(|| format!("{stands} on the new snapshot {of}"));
            let name = if let [one] = &to[..] { Some(one.to_string_lossy().into_owned()) } else { None };
            Ok(Done { name, note, ..Done::default() })
        }
        Work::Compact { dry_run, defrag } => {
            let gain = match (dry_run, defrag) {
                (true, true) => image.defrag_gain(progress),
                (true, false) => image.compact_gain(progress),
                (false, true) => image.defrag(progress),
                (false, false) => image.compact(progress),
            };
            Ok(Done { gain: Some(gain?), ..Done::default() })
        }
        Work::Track { granularity } => {
            let name = uuid_text(image.start_tracking(*granularity)?);
            Ok(Done { name: Some(name), ..Done::default() })
        }
        Work::Untrack => image.stop_tracking().map(|()| Done::default()),
        Work::Switch { .. } => Err(Error::new(Kind::Busy, "the disk is open; a switch needs a closed disk")),
    }
}

struct LiveWork<'a> {
    image: &'a Arc<Image>,
    layers: &'a Arc<Layers>,
    progress: &'a Progress,
    /// The image is closed behind this.
    closes: bool,
}

impl LiveWork<'_> {
    fn find(&self, name: &str) -> Result<Guid> {
        self.layers.store().find_snapshot(name)
    }

    fn descriptor(&self) -> Descriptor {
        self.layers.store().descriptor().clone()
    }

    /// Changes the descriptor on disk; what fails leaves it, and the one in memory, as it was.
    fn change(
        &self,
        change: impl FnOnce(&mut Descriptor) -> std::result::Result<(), crate::format::descriptor::BadXml>,
    ) -> std::result::Result<(), Uncommitted> {
        let mut store = self.layers.store();
        let mut next = store.descriptor().clone();
        change(&mut next).map_err(|e| Error::at(Kind::Damaged, store.path(), e.to_string()))?;
        match store.replace(next)? {
            Replaced::Durable => Ok(()),
            Replaced::Unsynced(e) => Err(Uncommitted::Unknown(e)),
        }
    }

    /// 1. the label is kept durably beside the descriptor; 2. the new top is created, durable; 3. the image freezes and
    ///    the descriptor is renamed (see `snapshot`).
    ///
    /// 1 after 3 could leave the snapshot without its name. A label without a snapshot is dropped at the next write.
    fn snapshot(&self, label: Option<&str>) -> Result<String> {
        let guid = Guid::random();
        let label = match label {
            Some(label) => label.to_owned(),
            None => self.free_time_label(),
        };
        self.layers.store().set_label(guid, Some(&label), i64::try_from(now()).ok())?; // 1
        self.keep_length(guid)?;
        let file = Cell::new(String::new());
        let create = |plan: TopPlan| {
            let mut header = Header::new(plan.version, plan.disk, plan.cluster)
                .map_err(|bad| Error::at(Kind::Invalid, self.layers.store().path(), bad.to_string()))?;
            if plan.in_use {
                header = header.marked();
            }
            let (name, level) = self.layers.add_delta(&header)?;
            file.set(name);
            Ok(level)
        };
        let commit = || {
            let name = file.take();
            file.set(name.clone());
            self.change(|next| next.add_snapshot(guid, &name))
        };
        if let Err(e) = self.image.put_on_top(create, commit) {
            self.forget(&file.take());
            return Err(e);
        }
        Ok(label)
    }

    /// How long the live disk's file is, where it is raw, which is about to be the snapshot's: with the label.
    fn keep_length(&self, guid: Guid) -> Result<()> {
        let Some(top) = self.layers.live_chain()?.pop().filter(|top| top.geometry().is_none()) else {
            return Ok(());
        };
        let len = top.file.len().map_err(|e| Error::io(&e, &top.path, "cannot read the length"))?;
        self.layers.store().set_length(guid, len)
    }

    /// The time as a name; the next second's, and so on, where that is taken.
    fn free_time_label(&self) -> String {
        let store = self.layers.store();
        let taken = |label: &String| store.labels().find(store.descriptor(), label).is_some();
        (now()..).map(utc::label).find(|label| !taken(label)).unwrap_or_default()
    }

    /// After a failed operation: removes a new file, unless the descriptor names it after all.
    fn forget(&self, file: &str) {
        if !file.is_empty()
            && !self.layers.store().descriptor().names(file)
            && let Err(e) = self.layers.remove(file)
        {
            log::warn!("{e}; the next open tries again");
        }
    }

    /// Deletes a snapshot that was taken for work that then failed. Not to be cancelled: that may be why it failed.
    fn take_back(&self, name: &str) {
        let job = LiveWork { progress: &Progress::new(), ..*self };
        if let Err(e) = job.delete(name, true) {
            log::warn!("the snapshot {name}, which was taken for a clone, is left: {e}");
        }
    }

    fn delete(&self, name: &str, later: bool) -> Result<Done> {
        let guid = match self.find(name) {
            Ok(guid) => guid,
            // It was deleted before, and its data is not merged yet.
            Err(_) if is_unfinished(self.layers, name) => return self.finish(),
            Err(e) => return Err(e),
        };
        let descriptor = self.descriptor();
        let refuse = |kind: Kind, why: String| Err(Error::at(kind, self.layers.store().path(), why));
        if guid == descriptor.top {
            return refuse(Kind::Invalid, format!("{name} is the live disk, not a snapshot"));
        }
        match descriptor.children(guid).len() {
            0 if !later => {
                return refuse(
                    Kind::Invalid,
                    format!(
                        "nothing stands on {name}, so that it cannot be merged; `ploopfs snapshot delete` removes it"
                    ),
                );
            }
            0 => self.remove_leaf(guid)?,
            1 => {
                // Before the snapshot's name is gone: one that is refused is still there.
                for child in descriptor.children(guid) {
                    self.layers.claim(&[guid, child])?;
                }
                self.mark_deleted(guid)?;
            }
            children if later => {
                self.mark_deleted(guid)?;
                let note = format!(
                    "{name} is deleted; its data is merged when only one of the {children} that stand on it is left"
                );
                return Ok(Done { note: Some(note), ..Done::default() });
            }
            children => {
                return refuse(
                    Kind::Busy,
                    format!("{children} disks and snapshots stand on {name}; delete those first"),
                );
            }
        }
        self.finish()
    }

    fn remove_leaf(&self, guid: Guid) -> Result<()> {
        let mut file = String::new();
        self.settle(self.change(|next| {
            file = next.remove_leaf(guid)?.file;
            Ok(())
        }))?;
        self.layers.remove(&file)
    }

    /// From here on the snapshot is gone for all, and its name is free.
    fn mark_deleted(&self, guid: Guid) -> Result<()> {
        self.settle(self.change(|next| next.set_marker(guid, Some(Marker::Temporary))))?;
        self.layers.store().set_deleted(guid)
    }

    /// Outside a freeze, a descriptor whose rename may not be durable is the caller's error, and no more: both states
    /// are whole.
    fn settle(&self, changed: std::result::Result<(), Uncommitted>) -> Result<()> {
        changed.map_err(|e| match e {
            Uncommitted::NotDone(e) | Uncommitted::Unknown(e) => e,
        })
    }

    /// Removes every snapshot that was deleted and has no child left, and merges those that have one.
    fn finish(&self) -> Result<Done> {
        loop {
            let descriptor = self.descriptor();
            if let Some(guid) = descriptor.abandoned().first() {
                log::info!(
                    "{}: nothing stands on the deleted snapshot {guid} any more; it goes",
                    self.image.name
                );
                self.layers.store().redo_unsynced()?;
                self.remove_leaf(*guid)?;
                continue;
            }
            let later = if self.closes { lower::waiting(self.layers)? } else { None };
            let now = |guid: &Guid| later.is_none_or(|(parent, _)| parent != *guid);
            let Some(parent) = descriptor.unfinished().into_iter().find(now) else {
                return Ok(Done::default());
            };
            let Some(child) = descriptor.children(parent).first().copied() else {
                return Ok(Done::default());
            };
            self.progress.check()?;
            // Else a power cut could bring back a snapshot whose file the merge has changed.
            self.layers.store().redo_unsynced()?;
            self.layers.claim(&[parent, child])?;
            if child == descriptor.top {
                self.follow_descriptor()?;
                self.merge(self.image, parent, child)?;
            } else {
                self.merge_below(&descriptor, parent, child)?;
            }
        }
    }

    /// After a merge below the top whose last steps failed, the live image still reads from the files that were there
    /// before. That is as good, but a merge with the top goes by the descriptor, and would leave out what only they have.
    fn follow_descriptor(&self) -> Result<()> {
        let levels = self.layers.live_chain()?;
        if self.image.stands_on(&levels)? { Ok(()) } else { self.image.stand_on(levels) }
    }

    /// Merges the two uppermost levels of `image`, which are `parent` and `child`; returns nothing that depends on the
    /// file that went:
    /// 1. where that copies less, the two change places (`flip`);
    /// 2. the lower one is pulled up and taken out of the descriptor (`pull_out`);
    /// 3. its file is removed.
    fn merge(&self, image: &Arc<Image>, parent: Guid, child: Guid) -> Result<()> {
        let gone = self.merge_files(image, parent, child)?;
        self.layers.remove(&gone) // 3
    }

    fn merge_files(&self, image: &Arc<Image>, parent: Guid, child: Guid) -> Result<String> {
        // The upper one was scanned when it became writable.
        sound(self.layers, parent)?;
        let raw = self.layers.level_of(parent)?.geometry().is_none();
        // "Plain" on a delta says that its base is raw; swapping files under it would confuse ploop.
        let plain = |guid| self.descriptor().delta(guid).is_none_or(|delta| delta.plain);
        let alone = broken(Rule::R9) || self.layers.may_change(parent)?;
        let may_change = !raw && !plain(parent) && !plain(child) && alone;
        if image.merge_direction(may_change)? == Direction::Flip {
            image.flip(self.progress, || self.change(|next| next.swap_files(parent, child)))?; // 1
        }
        let file_of =
            |d: &Descriptor, guid| d.delta(guid).map(|delta| delta.file.clone()).unwrap_or_default();
        let survivor = file_of(&self.descriptor(), child);
        let mut gone = String::new();
        image.pull_out(self.progress, || {
            self.change(|next| {
                gone = next.remove_merged(parent, child, &survivor)?;
                Ok(())
            })
        })?; // 2
        Ok(gone)
    }

    /// Two levels below the live top, or in another branch: they are opened as an image of their own, merged, and the
    /// live one, if it stands on them, then takes the result instead:
    /// 1. merge, as above, but for the removal; 2. close: the result is durable and its mark cleared; 3. the live image
    ///    reads from the new chain; 4. the file that went is removed. Into a raw base `lower` merges: 1 and 2 are its.
    ///
    /// The live image reads the same from both files all the while: nothing that it can see is changed in either.
    fn merge_below(&self, descriptor: &Descriptor, parent: Guid, child: Guid) -> Result<()> {
        let on_it = descriptor.chain(descriptor.top).is_ok_and(|chain| chain.contains(&child));
        if lower::goes_down(self.layers, parent, child)? {
            let gone = lower::merge(self.layers, parent, child, self.progress, &|| true)?; // 1, 2
            return gone.map_or(Ok(()), |gone| self.take_result(on_it, &gone));
        }
        if !broken(Rule::R9) && !self.layers.may_change(child)? {
            self.unshare(child, on_it)?;
            self.layers.begin_changing(child)?;
        }
        let levels = vec![self.layers.level_of(parent)?, self.layers.level_of(child)?];
        let is_base = descriptor.shot(parent).is_some_and(|shot| shot.parent == Guid::NONE);
        let open = if is_base { Image::open } else { Image::open_part };
        let pair = open(&self.image.engine, self.image.name(), levels)?;
        let merged = pair.make_writable().and_then(|()| self.merge_files(&pair, parent, child)); // 1
        let closed = pair.close(); // 2
        let gone = merged?;
        closed?;
        self.take_result(on_it, &gone)
    }

    /// The live image, if it stands on what was merged or copied, reads from the new chain; then `gone` is removed.
    fn take_result(&self, on_it: bool, gone: &str) -> Result<()> {
        if on_it {
            self.image.stand_on(self.layers.live_chain()?)?;
        }
        self.layers.remove(gone)
    }

    /// A file that is also part of a clone, under another name, is never changed (R9): a copy takes its place.
    /// 1. the copy, durable; 2. the descriptor names it; 3. the live image, if it stands on it, reads from it; 4. our
    ///    name of the old file is removed.
    fn unshare(&self, guid: Guid, on_it: bool) -> Result<()> {
        let file = self.layers.copy(guid, self.progress)?; // 1
        let mut gone = String::new();
        let changed = self.change(|next| {
            gone = next.delta(guid).map(|delta| delta.file.clone()).unwrap_or_default();
            next.set_file(guid, &file)
        }); // 2
        if let Err(e) = self.settle(changed) {
            self.forget(&file);
            return Err(e);
        }
        self.take_result(on_it, &gone) // 3, 4
    }
}

impl Image {
    /// True when its levels are these files, in this order (base first).
    fn stands_on(&self, levels: &[crate::vdisk::Level]) -> Result<bool> {
        let file = |level: &crate::vdisk::Level| {
            let status = level.file.status();
            status
                .map(|status| (status.dev, status.ino))
                .map_err(|e| Error::io(&e, &level.path, "cannot look at it"))
        };
        let stack = self.stack();
        let own = stack.top_down().map(|(_, level)| file(level)).collect::<Result<Vec<_>>>()?;
        let theirs = levels.iter().rev().map(file).collect::<Result<Vec<_>>>()?;
        Ok(own == theirs)
    }

    /// Reads from other lower levels from now on, with the same content; `levels` is the whole chain, base first, whose
    /// last is our own top.
    fn stand_on(self: &Arc<Self>, mut levels: Vec<crate::vdisk::Level>) -> Result<()> {
        let operating = self.begin_operation()?;
        levels.pop();
        let frozen = operating.freeze_durably()?;
        let next = self.stack().over(levels, &self.engine.budget)?;
        frozen.swap(next);
        Ok(())
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
