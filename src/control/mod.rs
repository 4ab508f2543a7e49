//! The control socket: JSON lines, versioned on both sides (docs/design.md#control-socket).
//!
//! [`place`] says where socket, lock and log of a folder live, [`protocol`] what is said, [`server`] answers in the
//! daemon, [`client`] asks from the command line.

pub mod client;
pub mod place;
pub mod protocol;
pub mod server;
