//! Names in the mount that have no image yet, and the numbers that images will have which are about to come under a name.
//! In memory only: a name without a size is forgotten when the mount ends.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};

/// Most names without an image: they cost memory, and nothing ends them but `rm` and the mount's end.
const MOST: usize = 1024;

/// What is known of one name.
struct Kept {
    id: u64,
    /// Shown as an empty file; else the number is only kept for an image that is on its way.
    shown: bool,
    /// Its image is being made.
    busy: bool,
}

/// All such names of a folder.
#[derive(Default)]
pub(super) struct Names(BTreeMap<OsString, Kept>);

impl Names {
    /// A new empty file. False: there are too many, or the name is taken.
    pub(super) fn add(&mut self, name: &OsStr, id: u64) -> bool {
        let fits = self.0.len() < MOST && !self.0.contains_key(name);
        if fits {
            self.0.insert(name.to_owned(), Kept { id, shown: true, busy: false });
        }
        fits
    }

    /// The image that comes under `name` will have the number `id`.
    pub(super) fn keep(&mut self, name: &OsStr, id: u64) {
        self.0.insert(name.to_owned(), Kept { id, shown: false, busy: false });
    }

    /// The image has come: its number.
    pub(super) fn take(&mut self, name: &OsStr) -> Option<u64> {
        self.0.remove(name).map(|kept| kept.id)
    }

    /// The number of an empty file.
    pub(super) fn id(&self, name: &OsStr) -> Option<u64> {
        self.0.get(name).filter(|kept| kept.shown).map(|kept| kept.id)
    }

    /// The name of the empty file with this number.
    pub(super) fn name(&self, id: u64) -> Option<OsString> {
        let mut found = self.0.iter().filter(|(_, kept)| kept.shown && kept.id == id);
        found.next().map(|(name, _)| name.clone())
    }

    /// All empty files.
    pub(super) fn all(&self) -> Vec<(OsString, u64)> {
        self.0.iter().filter(|(_, kept)| kept.shown).map(|(name, kept)| (name.clone(), kept.id)).collect()
    }

    /// The image of an empty file is being made, or no longer; None: there is no such file, or it was so already.
    pub(super) fn set_busy(&mut self, id: u64, busy: bool) -> Option<OsString> {
        let (name, kept) = self.0.iter_mut().find(|(_, kept)| kept.shown && kept.id == id)?;
        (std::mem::replace(&mut kept.busy, busy) != busy).then(|| name.clone())
    }

    /// True while the image of `name` is being made.
    pub(super) fn is_busy(&self, name: &OsStr) -> bool {
        self.0.get(name).is_some_and(|kept| kept.busy)
    }

    /// Takes an empty file away, unless its image is being made.
    pub(super) fn remove(&mut self, name: &OsStr) -> Option<u64> {
        let id = self.id(name).filter(|_| !self.is_busy(name))?;
        self.0.remove(name);
        Some(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_number_until_its_image_comes() {
        let mut names = Names::default();
        assert!(names.add("a".as_ref(), 7) && !names.add("a".as_ref(), 8));
        assert_eq!((names.id("a".as_ref()), names.name(7)), (Some(7), Some("a".into())));
        assert_eq!(names.take("a".as_ref()), Some(7));
        assert_eq!((names.id("a".as_ref()), names.name(7)), (None, None));
    }

    #[test]
    fn a_kept_number_is_no_file() {
        let mut names = Names::default();
        names.keep("a".as_ref(), 7);
        assert_eq!((names.id("a".as_ref()), names.all().len()), (None, 0));
        assert_eq!(names.take("a".as_ref()), Some(7));
    }

    #[test]
    fn a_file_whose_image_is_being_made_cannot_be_removed() {
        let mut names = Names::default();
        names.add("a".as_ref(), 7);
        assert!(names.set_busy(7, true).is_some() && names.set_busy(7, true).is_none());
        assert_eq!(names.remove("a".as_ref()), None);
        names.set_busy(7, false);
        assert_eq!(names.remove("a".as_ref()), Some(7));
    }

    #[test]
    fn there_is_an_end_to_empty_files() {
        let mut names = Names::default();
        assert!((0..MOST as u64).all(|id| names.add(format!("{id}").as_ref(), id)));
        assert!(!names.add("one more".as_ref(), 1 << 40));
    }
}
