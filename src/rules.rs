//! The crash rules R1 to R9 (docs/design.md#crash-rules), those of the ledger (docs/restart.md#rules), and the switch of a
//! test build (feature `break-rules`) that breaks one of them at run time, at the rule's home: the crash and fault tests
//! must then find a violation. PLOOPFS_BREAK names one that is broken in a mount's processes.
//!
//! Without the feature [`broken`] is `const false`, and what stands behind it is not compiled in. With it, a test also
//! sees every [`Step`] of an operation over several files (R8).

#[cfg(all(feature = "break-rules", not(debug_assertions)))]
compile_error!("the feature `break-rules` is for tests; it does not go into a release");

/// A crash rule, in the words of the page (tests/tidy.rs).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The top is marked in use, durably, before its first change; a level below the top that a merge changes,
    /// likewise. Clean close: BAT durable; file cut to its last used cluster; fsync; then the mark cleared, synced. A
    /// running operation counts as a user. An in-use mark below the top at open means "finish the close", not "refuse".
    ///
    /// Broken: the mark comes with the first BAT page.
    R1,
    /// A BAT entry on disk never points past the end of the file. The file is extended ahead of need, sparse, and an
    /// entry is set only inside it; a round that writes an entry behind the length that is durably there syncs the file
    /// first. Header and BAT have their space from the beginning.
    ///
    /// Broken: the file grows only as far as it is written.
    R2,
    /// A cluster's content is durable before its entry is written to the host file whenever anything could be read
    /// there before: copy on write, a whole-cluster overwrite of what a lower level maps, relocation, merge. Only an
    /// allocation for a guest cluster that no level maps, in space known to be zero, may have its entry written first.
    /// Space is known to be zero when it lies beyond the file's size at the first change (the free tail is cut off
    /// then, not trusted) and was not handed out since. All other free space, every cluster handed out and given back
    /// included, is punched, and the punch durable, before an entry names it.
    ///
    /// Broken: a round never syncs the data before it writes the BAT.
    R3,
    /// A freed cluster is reused only after: unmapped, punched, and its BAT page durable.
    ///
    /// Broken: it is reused at once.
    R4,
    /// A BAT page on disk holds the top's own entries only. Bytes 0 to 4095 have one writer, a lock held across the
    /// write; every attempt, retries included, is built from the header as it is at that moment.
    ///
    /// Broken: a page has the entries of every level.
    R5,
    /// fsync returns after data and BAT are durable, the data first wherever R3 asks for it. An fsync waits for the
    /// first round that starts after it arrived; it never joins a running one; at most one running and one waiting
    /// round. O_SYNC and O_DSYNC writes likewise (the kernel sends no fsync for them).
    ///
    /// Broken: an fsync joins the running round.
    R6,
    /// Retried: a BAT write whose own system call failed before any sync of that file failed, for a bounded time. Any
    /// failed fdatasync, fsync or O_DSYNC write: the image is read-only at once, all waiters and all later fsyncs fail
    /// until it is closed, info and the log say so. A delta found in use at open has its page cache dropped before
    /// anything of it is trusted.
    ///
    /// Broken: a failure is reported once and forgotten.
    R7,
    /// Operations over several files: new file durable, descriptor written beside and renamed, folder synced, old file
    /// removed last. Whatever the moment of a crash, the image opens with the old state or the new one.
    ///
    /// Broken: neither a new delta nor the folder is synced.
    R8,
    /// A delta file below a top is neither changed nor removed while anything else depends on it: another child, an
    /// open snapshot file, another descriptor.
    ///
    /// Broken: no link count is asked for.
    R9,
    /// An entry stands in the ledger before its reply leaves: in the set, unmap and relocate of the BAT cache, under the
    /// page's lock. A slot is reserved where the page is pinned, so that a set waits for none; where all are taken,
    /// first writes wait as for clean pages.
    ///
    /// Broken: no entry comes there.
    L1,
    /// A page of the ledger is given back only when its copy is durable and nothing was added since.
    ///
    /// Broken: it is given back when it is copied.
    L2,
    /// A handle stands in the ledger before OPEN is answered; RELEASE takes it out of memory, then out of the ledger,
    /// then answers. OPEN sent again with the same number gets the handle that it has; RELEASE of a handle that is
    /// not known is done.
    ///
    /// Broken: no handle comes there.
    L3,
    /// A number stands in the ledger before any answer names it.
    ///
    /// Broken: no number comes there.
    L4,
    /// A failure stands in the ledger before any thread hears of it. Before a successor writes an entry it syncs
    /// through a witness, an open file that has not asked since the image was opened for writing. The keeper hears
    /// first that it is asked, and does not give it again; what it said stands in the ledger before the image gets a
    /// new one. With none left, or when it hears a failure, nothing is written, the entries are laid over the BAT in
    /// memory, and the image is read-only.
    ///
    /// Broken: no failure comes there, and no witness is asked.
    L5,
    /// One daemon at a time: the successor starts when `wait` has returned, and all data writes are synchronous
    /// calls.
    ///
    /// Broken: the successor starts when the dead one's first thread is gone.
    L6,
    /// What a daemon before has read and not answered is sent again when its handles are known, and before a thread reads.
    ///
    /// Broken: threads read first.
    L7,
}

/// True while a test breaks `rule`.
#[cfg(not(feature = "break-rules"))]
#[inline(always)]
pub const fn broken(_: Rule) -> bool {
    false
}

/// What an operation over several files has just done to names and files.
#[derive(Clone, Copy, Debug)]
pub enum Step<'a> {
    /// A name was made, changed or removed.
    Names,
    /// The file of this path was synced.
    FileSynced(&'a std::path::Path),
    /// The folder of this path was synced.
    FolderSynced(&'a std::path::Path),
    /// All files and folders of the host's file system were synced.
    HostSynced,
}

/// Reports a step to the watcher.
#[cfg(not(feature = "break-rules"))]
#[inline(always)]
pub fn step(step: Step<'_>) {
    match step {
        Step::Names | Step::HostSynced => {}
        Step::FileSynced(path) | Step::FolderSynced(path) => _ = path,
    }
}

#[cfg(feature = "break-rules")]
pub use switch::{Broken, Watching, broken, step};

#[cfg(feature = "break-rules")]
mod switch {
    use super::{Rule, Step};
    use crate::sync::{AtomicU32, Ordering};
    use std::cell::RefCell;
    use std::fmt;
    use std::sync::LazyLock;

    /// One bit per broken rule.
    static BROKEN: AtomicU32 = AtomicU32::new(0);

    /// The one that the environment names: of other processes a test breaks it so.
    static OF_THE_PROCESS: LazyLock<u32> = LazyLock::new(|| {
        let named = std::env::var("PLOOPFS_BREAK").unwrap_or_default();
        LEDGER.iter().filter(|rule| named == format!("{rule:?}")).map(|rule| 1 << *rule as u32).sum()
    });
    /// Those that a test can break so.
    const LEDGER: [Rule; 7] = [Rule::L1, Rule::L2, Rule::L3, Rule::L4, Rule::L5, Rule::L6, Rule::L7];

    /// True while a test breaks `rule`.
    pub fn broken(rule: Rule) -> bool {
        (BROKEN.load(Ordering::Relaxed) | *OF_THE_PROCESS) & 1 << rule as u32 != 0
    }

    /// Breaks a rule, in the whole process, until it is dropped.
    #[derive(Debug)]
    pub struct Broken(Rule);

    impl Broken {
        /// From now on `rule` is broken.
        pub fn new(rule: Rule) -> Broken {
            BROKEN.fetch_or(1 << rule as u32, Ordering::SeqCst);
            Broken(rule)
        }
    }

    impl Drop for Broken {
        fn drop(&mut self) {
            BROKEN.fetch_and(!(1 << self.0 as u32), Ordering::SeqCst);
        }
    }

    type Watcher = Box<dyn Fn(Step<'_>)>;

    thread_local!(static WATCHER: RefCell<Option<Watcher>> = const { RefCell::new(None) });

    /// Reports a step to this thread's watcher.
    pub fn step(step: Step<'_>) {
        WATCHER.with_borrow(|watcher| {
            if let Some(watcher) = watcher {
                watcher(step);
            }
        });
    }

    /// Sees every step of this thread until it is dropped.
    pub struct Watching(());

    impl fmt::Debug for Watching {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Watching")
        }
    }

    impl Watching {
        /// From now on `watcher` is called for every step of this thread.
        pub fn new(watcher: impl Fn(Step<'_>) + 'static) -> Watching {
            WATCHER.set(Some(Box::new(watcher)));
            Watching(())
        }
    }

    impl Drop for Watching {
        fn drop(&mut self) {
            WATCHER.set(None);
        }
    }
}
