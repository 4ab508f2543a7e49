//! The one door to an image: what a path means, what lies there and what it is not, who holds it, how it is opened, and
//! the work that is done with it at rest. Every command, the daemon and users of the library come through here.
//!
//! [`find`] says what a path names; [`owner`] whose level a file is; [`layered`] reads a descriptor and the files it names
//! without a lock, [`snapshots`], [`examine`], [`space`] and [`facts`] say what is to be said of
//! them; [`open`] takes the locks;
//! [`content`] reads what it opened, [`work`] changes it.

pub mod content;
pub mod examine;
pub mod facts;
pub mod find;
pub mod layered;
pub mod open;
pub mod owner;
pub mod snapshots;
pub mod space;
pub mod work;
