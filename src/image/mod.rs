//! An image at rest: opened, locked, created, checked, without a live data path.

pub mod chain;
pub mod check;
pub mod create;
pub mod kind;
