//! The host: files, locks, loop devices and process settings. `unsafe` and raw system calls live here
//! (and in `fuse/uring`), behind safe functions.

pub mod backing;
pub mod buffers;
pub mod connection;
pub mod descriptor_lock;
pub mod direct;
#[cfg(any(test, feature = "faults"))]
pub mod fault;
pub mod file;
pub mod folder_lock;
pub mod foreign;
pub mod freeze;
pub mod handover;
pub mod heirs;
pub mod holder;
pub mod lock;
pub mod loopdev;
#[cfg(any(test, feature = "internals"))]
pub mod memory;
pub mod mounts;
pub mod namespaces;
pub mod new_file;
mod pages;
pub mod planned;
pub mod poison;
pub mod process;
pub mod reads;
pub mod real;
pub mod rename;
pub mod ring;
pub mod share;
pub mod shared;
pub mod standard;
pub mod unmount;
pub mod whole;
