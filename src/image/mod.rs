//! An image at rest: opened, locked, created, checked, without a live data path.

pub mod assemble;
pub mod chain;
pub mod check;
pub mod clone;
pub mod create;
pub mod diff;
pub mod glance;
pub mod kind;
pub mod labels;
pub mod layers;
pub mod level;
pub mod make_folder;
pub mod map;
pub mod meta;
pub mod names;
pub mod paths;
pub mod repair;
pub mod reserve;
pub mod store;
pub mod switch;
