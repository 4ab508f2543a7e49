//! ploopfs: thin, snapshotted virtual disks as plain files, in the ploop/Parallels format, served through FUSE.
//!
//! What is exported here is the library's front: [`create`] an image, open a [`Disk`], take a [`snapshot`], ask what
//! differs ([`diff`]), serve a folder of images ([`Server`]). An [`Error`] has a [`Kind`] to act on; long work reports
//! to a [`Progress`], which also cancels it.
//!
//! The rooms behind it, lowest first: `io` (the host), `format` (bytes), `image` (an image at rest), `ledger`
//! (what outlives a daemon), `vdisk` (one live image), `disk` (the one door to an image at rest), `transfer` (disks
//! in and out of images), `folder` (the live set), `tree` (what the kernel sees), `fuse` (transports), `control`,
//! `daemon`, `cli`, `front`. A room uses only what stands below it. They are private: the feature `internals`, which
//! the project's own tests and examples use, shows them, and promises nothing.
#![warn(missing_docs)]
#![deny(clippy::undocumented_unsafe_blocks)]
// Where the rooms are shown: what no other file can reach is not called public.
#![cfg_attr(feature = "internals", warn(unreachable_pub))]
// R8 by machine (clippy.toml says which, and why). Tests may make and move files as they like.
#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

/// Declares the rooms: private, so that the compiler sees what no one uses; shown to the project's own tests.
macro_rules! rooms {
    ($($room:ident)*) => {$(
        #[cfg(feature = "internals")]
        #[doc(hidden)]
        pub mod $room;
        #[cfg(not(feature = "internals"))]
        mod $room;
    )*};
}

rooms! {
    cli control daemon disk error folder format front fuse image io ledger progress rules sync transfer tree utc vdisk
    words
}

pub use error::{Error, Kind, Result};
pub use front::{Disk, Server, Snapshot, Stopper, create, delete_snapshot, diff, snapshot, snapshots};
pub use progress::Progress;

/// The `ploopfs` program: what `main` calls.
#[doc(hidden)]
pub fn main(arguments: impl IntoIterator<Item = std::ffi::OsString>) -> std::process::ExitCode {
    cli::main(arguments)
}
