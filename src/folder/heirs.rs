//! Open files that outlive this process: their locks stay, and a failed sync is heard by a successor, too
//! (docs/restart.md#who-holds-what).

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use super::locked;
use super::scan::Identity;

/// Where they are kept; asked on threads that may block.
pub trait Keeping: Send + Sync {
    /// Keeps a descriptor of `file`: the one that this process uses, or a witness. An error: it cannot, and a successor will
    /// be without it.
    fn keep(&self, file: Identity, witness: bool, descriptor: BorrowedFd<'_>) -> std::io::Result<()>;
    /// The oldest witness of `file` is asked now, and is none for a successor.
    fn asks(&self, file: Identity) -> std::io::Result<()>;
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

/// The same of all files.
pub type Inherited = HashMap<Identity, OpenFile>;

/// What comes from a daemon before, and goes to the next one.
pub(super) struct Heirs {
    keeping: Option<Arc<dyn Keeping>>,
    /// Protects what came and was not taken yet. A leaf.
    inherited: Mutex<Inherited>,
}

impl Heirs {
    pub(super) fn new(keeping: Option<Arc<dyn Keeping>>) -> Heirs {
        Heirs { keeping, inherited: Mutex::default() }
    }

    pub(super) fn inherit(&self, inherited: Inherited) {
        *locked(&self.inherited) = inherited;
    }

    /// The open file that the daemon before used.
    pub(super) fn take_own(&self, file: Identity) -> Option<OwnedFd> {
        locked(&self.inherited).get_mut(&file)?.own.take().filter(|own| is(own, file))
    }

    /// An open file of the daemon before that has not synced. The keeper hears it first: a successor that dies behind the
    /// question must not leave the next one a witness that has nothing more to say.
    pub(super) fn take_witness(&self, file: Identity) -> Option<OwnedFd> {
        let witness = {
            let mut inherited = locked(&self.inherited);
            let witnesses = &mut inherited.get_mut(&file)?.witnesses;
            (!witnesses.is_empty()).then(|| witnesses.remove(0))
        };
        let told = self.keeping.as_ref().is_none_or(|keeping| keeping.asks(file).is_ok());
        witness.filter(|witness| told && is(witness, file))
    }

    /// All is open that was: the rest is needed by nothing.
    pub(super) fn settle(&self) {
        let left = std::mem::take(&mut *locked(&self.inherited));
        // The own one of a file that is open was taken.
        left.iter().filter(|(_, open)| open.own.is_some()).for_each(|(file, _)| self.let_go(*file));
    }

    /// Keeps a descriptor of `file`, if there is a place for it. False: there is one, and it does not.
    pub(super) fn keep(&self, file: Identity, witness: bool, descriptor: impl AsFd) -> bool {
        let Some(keeping) = &self.keeping else { return true };
        keeping
            .keep(file, witness, descriptor.as_fd())
            .inspect_err(|e| log::warn!("the keeper does not take an open file: {e}"))
            .is_ok()
    }

    pub(super) fn let_go(&self, file: Identity) {
        if let Some(keeping) = &self.keeping {
            keeping.let_go(file);
        }
    }

    /// True where open files are kept.
    pub(super) fn are_kept(&self) -> bool {
        self.keeping.is_some()
    }
}

/// How many witnesses a file has: one for each successor in a row that dies before it can say what it heard.
pub const WITNESSES: usize = 3;

fn is(descriptor: &OwnedFd, file: Identity) -> bool {
    rustix::fs::fstat(descriptor).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == file)
}
