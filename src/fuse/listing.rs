//! The names of opened folders, held still from the first name to the last.
//!
//! The kernel reads a folder in portions and names the portion by an offset. Asking the file system anew for each
//! would skip or repeat names when an image comes or goes between, and cost the square of the folder's size.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::fuse::ops::{Answer, FileKind, FileSystem, Ino, Name};

/// The root of every mount.
const ROOT: Ino = 1;

/// All opened folders of a session, by handle.
#[derive(Debug, Default)]
pub(crate) struct Listings {
    next: AtomicU64,
    /// Protects the table only; held for a look-up, never across a call. A leaf: no lock is taken under it.
    open: Mutex<HashMap<u64, Arc<Vec<Name>>>>,
}

impl Listings {
    /// A new handle. Nothing is kept for it until names are asked for.
    pub(crate) fn open(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Forgets a handle.
    pub(crate) fn close(&self, handle: u64) {
        self.table().remove(&handle);
    }

    /// The names as they were when the folder was last read from its beginning, `.` and `..` first. A handle that
    /// is not known (another process gave it out) is read now.
    pub(crate) fn names(
        &self,
        fs: &dyn FileSystem,
        ino: Ino,
        handle: u64,
        offset: u64,
    ) -> Answer<Arc<Vec<Name>>> {
        if offset != 0
            && let Some(names) = self.table().get(&handle)
        {
            return Ok(names.clone());
        }
        // `..` has the number of the root: what the kernel shows for it comes from its own tree.
        let mut names = vec![dots(ino, "."), dots(ROOT, "..")];
        names.extend(fs.readdir(ino)?);
        let names = Arc::new(names);
        self.table().insert(handle, names.clone());
        Ok(names)
    }

    fn table(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Arc<Vec<Name>>>> {
        // No panic can happen between two changes of the table.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn dots(ino: Ino, name: &str) -> Name {
    Name { ino, kind: FileKind::Folder, name: name.into() }
}
