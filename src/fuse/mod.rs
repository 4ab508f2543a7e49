//! Transports only: how requests of the kernel reach [`ops::FileSystem`] and how answers go back.

pub mod classic;
pub mod mount;
pub mod notify;
pub mod ops;
