//! The crash rules R1 to R9 (DESIGN.md 5), and the switch of a test build (feature `break-rules`) that breaks one of
//! them at run time, at the rule's home: the crash and fault tests must then find a violation.
//!
//! Without the feature [`broken`] is `const false`, and what stands behind it is not compiled in. With it, a test also
//! sees every [`Step`] of an operation over several files (R8).

#[cfg(all(feature = "break-rules", not(debug_assertions)))]
compile_error!("the feature `break-rules` is for tests; it does not go into a release");

/// A crash rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Marked in use before the first change. Broken: the mark comes with the first BAT page.
    R1,
    /// No entry points past the end of the file. Broken: the file grows only as far as it is written.
    R2,
    /// Data before its entry. Broken: a round never syncs the data before it writes the BAT.
    R3,
    /// A freed cluster is reused after its entry is durably gone. Broken: at once.
    R4,
    /// A BAT page has the top's own entries only. Broken: it has those of every level.
    R5,
    /// An fsync waits for a round that starts after it. Broken: it joins the running one.
    R6,
    /// A failed sync is final. Broken: it is told once and forgotten.
    R7,
    /// New file, descriptor, folder, then the old file's removal. Broken: neither a new delta nor the folder is synced.
    R8,
    /// What others depend on is neither changed nor removed. Broken: nobody asks whether a file has another name.
    R9,
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
}

/// Tells who watches of a step.
#[cfg(not(feature = "break-rules"))]
#[inline(always)]
pub fn step(_: Step<'_>) {}

#[cfg(feature = "break-rules")]
pub use switch::{Broken, Watching, broken, step};

#[cfg(feature = "break-rules")]
mod switch {
    use super::{Rule, Step};
    use crate::sync::{AtomicU32, Ordering};
    use std::cell::RefCell;
    use std::fmt;

    /// One bit per broken rule.
    static BROKEN: AtomicU32 = AtomicU32::new(0);

    /// True while a test breaks `rule`.
    pub fn broken(rule: Rule) -> bool {
        BROKEN.load(Ordering::Relaxed) & 1 << rule as u32 != 0
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

    /// Tells who watches this thread of a step.
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
