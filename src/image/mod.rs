//! The files of an image, and the descriptor that binds them: opened, made, changed and removed, checked, repaired,
//! cloned. A live image (`vdisk`) stands on them and changes names and descriptor through [`layers`] and [`store`]; no
//! request of a guest comes here. What a path means, and who may use it, is said above (`disk`, `folder`).

pub mod assemble;
pub mod chain;
pub mod check;
pub mod clone;
pub mod create;
pub mod diff;
mod folder_files;
pub mod glance;
pub mod kind;
pub mod labels;
pub mod layers;
pub mod leave_folder;
pub mod level;
pub mod levels;
pub mod make_folder;
pub mod map;
pub mod meta;
pub mod names;
mod new_delta;
pub mod paths;
pub mod repair;
pub mod reserve;
mod shape;
pub mod store;
pub mod switch;
