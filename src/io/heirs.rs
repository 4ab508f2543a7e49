//! Open files that outlive this process: their locks stay, and a failed sync is heard by a successor, too
//! (docs/restart.md#who-holds-what).

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::sync::plain::lock;

/// A file: its device and inode.
type Identity = (u64, u64);

/// What a mount has one of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fixture {
    /// The images folder, with the lock on it.
    Folder,
    /// The control socket: who connects while there is no daemon waits for the next.
    Socket,
}

/// Where they are kept; asked on threads that may block.
pub trait Keeping: Send + Sync {
    /// Keeps a descriptor of `file`: the one that this process uses, or a witness. An error: it cannot, and a successor will
    /// be without it.
    fn keep(&self, file: Identity, witness: bool, descriptor: BorrowedFd<'_>) -> io::Result<()>;
    /// Keeps a descriptor of what the mount has one of, until its end.
    fn keep_fixture(&self, what: Fixture, descriptor: BorrowedFd<'_>) -> io::Result<()>;
    /// The oldest witness of `file` is asked now, and is none for a successor.
    fn asks(&self, file: Identity) -> io::Result<()>;
    /// None of them is needed any more.
    fn let_go(&self, file: Identity);
}

/// What a daemon before has had of one file.
#[derive(Debug, Default)]
pub struct OpenFile {
    /// What it used: its locks are on it.
    pub own: Option<OwnedFd>,
    /// Open files that have not synced, the one that is to be asked first.
    pub witnesses: Vec<OwnedFd>,
}

/// All that a daemon leaves.
#[derive(Debug, Default)]
pub struct Estate {
    /// Its files: levels of images, and those that are open for their locks alone.
    pub files: HashMap<Identity, OpenFile>,
    /// What the mount has one of.
    pub fixtures: HashMap<Fixture, OwnedFd>,
}

/// What comes from a daemon before, and goes to the next one. The default: there is none of either.
#[derive(Default)]
pub struct Heirs {
    keeping: Option<Arc<dyn Keeping>>,
    /// Protects what came and was not taken yet. A leaf.
    inherited: Mutex<Estate>,
}

impl fmt::Debug for Heirs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Heirs").field("inherited", &self.inherited).finish_non_exhaustive()
    }
}

impl Heirs {
    /// With what a daemon before has left.
    pub fn new(keeping: Arc<dyn Keeping>, inherited: Estate) -> Heirs {
        Heirs { keeping: Some(keeping), inherited: Mutex::new(inherited) }
    }

    /// The open file that the daemon before used.
    pub fn take_own(&self, file: Identity) -> Option<OwnedFd> {
        lock(&self.inherited).files.get_mut(&file)?.own.take().filter(|own| identity(own) == Some(file))
    }

    /// The same, and it stays to be taken.
    pub fn left(&self, file: Identity) -> Option<Left> {
        let descriptor = lock(&self.inherited).files.get(&file)?.own.as_ref()?.try_clone().ok()?;
        let name = last_name(&descriptor).filter(|_| identity(&descriptor) == Some(file))?;
        Some(Left { descriptor, name })
    }

    /// What the daemon before had of it.
    pub fn take_fixture(&self, what: Fixture) -> Option<OwnedFd> {
        lock(&self.inherited).fixtures.remove(&what)
    }

    /// An open file of the daemon before that has not synced. The keeper hears it first: a successor that dies behind the
    /// question must not leave the next one a witness that has nothing more to say.
    pub fn take_witness(&self, file: Identity) -> Option<OwnedFd> {
        let witness = {
            let mut inherited = lock(&self.inherited);
            let witnesses = &mut inherited.files.get_mut(&file)?.witnesses;
            (!witnesses.is_empty()).then(|| witnesses.remove(0))
        };
        let told = self.keeping.as_ref().is_none_or(|keeping| keeping.asks(file).is_ok());
        witness.filter(|witness| told && identity(witness) == Some(file))
    }

    /// All is open that was: the rest is needed by nothing.
    pub fn settle(&self) {
        let left = std::mem::take(&mut lock(&self.inherited).files);
        // The own one of a file that is open was taken.
        left.iter().filter(|(_, open)| open.own.is_some()).for_each(|(file, _)| self.let_go(*file));
    }

    /// Keeps a descriptor of `file`, if there is a place for it. False: there is one, and it does not.
    pub fn keep(&self, file: Identity, witness: bool, descriptor: impl AsFd) -> bool {
        let Some(keeping) = &self.keeping else { return true };
        said(keeping.keep(file, witness, descriptor.as_fd()))
    }

    /// Keeps a descriptor of what the mount has one of, if there is a place for it.
    pub fn keep_fixture(&self, what: Fixture, descriptor: impl AsFd) {
        if let Some(keeping) = &self.keeping {
            said(keeping.keep_fixture(what, descriptor.as_fd()));
        }
    }

    /// None of what is kept of `file` is needed any more.
    pub fn let_go(&self, file: Identity) {
        if let Some(keeping) = &self.keeping {
            keeping.let_go(file);
        }
    }

    /// True where open files are kept.
    pub fn are_kept(&self) -> bool {
        self.keeping.is_some()
    }

    /// For a file that is open for its lock alone, and was opened just now: the open file of a daemon before in its place,
    /// whose lock goes on without a gap.
    pub fn instead_of(&self, opened: File) -> File {
        if !self.are_kept() {
            return opened;
        }
        identity(&opened).and_then(|file| self.take_own(file)).map_or(opened, File::from)
    }

    /// Keeps such a file, now that it is locked, as long as what is returned is there.
    pub fn keep_locked(self: &Arc<Self>, locked: &File) -> Option<KeptLock> {
        let file = identity(locked).filter(|_| self.are_kept())?;
        self.keep(file, false, locked).then(|| KeptLock { heirs: self.clone(), file })
    }
}

/// What a daemon before has left of a file.
#[derive(Debug)]
pub struct Left {
    /// Of the open file that it used.
    pub descriptor: OwnedFd,
    /// The last name that the file had.
    pub name: OsString,
}

/// The name of an open file, as the kernel has it: the last one, behind which it says so where that is gone.
fn last_name(open: &OwnedFd) -> Option<OsString> {
    let path = std::fs::read_link(format!("/proc/self/fd/{}", open.as_raw_fd())).ok()?;
    let is_there =
        rustix::fs::lstat(&path).is_ok_and(|stat| Some((stat.st_dev, stat.st_ino)) == identity(open));
    let name = path.file_name()?;
    let gone = name.as_bytes().strip_suffix(GONE).filter(|_| !is_there);
    Some(gone.map_or_else(|| name.to_owned(), |name| OsStr::from_bytes(name).to_owned()))
}

/// Behind a path that leads nowhere any more.
const GONE: &[u8] = b" (deleted)";

/// A locked file that is kept for a successor. To be dropped when the lock was given back, or just before: that is said by
/// name, so that what another process still holds of the open file keeps none.
#[derive(Debug)]
pub struct KeptLock {
    heirs: Arc<Heirs>,
    file: Identity,
}

impl Drop for KeptLock {
    fn drop(&mut self) {
        self.heirs.let_go(self.file);
    }
}

/// How many witnesses a file has: one for each successor in a row that dies before it can say what it heard.
pub const WITNESSES: usize = 3;

fn said(kept: io::Result<()>) -> bool {
    kept.inspect_err(|e| log::warn!("the keeper does not take an open file: {e}")).is_ok()
}

fn identity(of: impl AsFd) -> Option<Identity> {
    rustix::fs::fstat(of).ok().map(|stat| (stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_name_of_a_file_is_its_own_also_where_it_ends_as_those_of_removed_ones_do() {
        let temp = tempfile::tempdir().expect("a folder");
        for name in ["vm.raw", "vm.raw (deleted)"] {
            let path = temp.path().join(name);
            let file = OwnedFd::from(File::create(&path).expect("made"));
            assert_eq!(last_name(&file).expect("it has one"), name);
            std::fs::rename(&path, temp.path().join("other")).expect("renamed");
            assert_eq!(last_name(&file).expect("it has one"), "other");
            std::fs::rename(temp.path().join("other"), &path).expect("renamed");
            std::fs::remove_file(&path).expect("removed");
            assert_eq!(last_name(&file).expect("it had one"), name);
        }
    }
}
