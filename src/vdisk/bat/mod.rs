//! The block allocation table in memory: entries and pages, the cache of pages, and their way back to disk.

pub mod budget;
pub mod cache;
pub(in crate::vdisk) mod kept;
pub(in crate::vdisk) mod load;
pub mod page;
pub mod writeback;
