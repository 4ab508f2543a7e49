//! All of a host's file system made durable by one call, where that is as good as an fsync of each file and folder.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::retry_on_intr;

/// `statfs` magics of the file systems whose syncfs waits for the data of every file and commits names and sizes (source,
/// Linux 6.18: `ext4_sync_fs`, `xfs_fs_sync_fs`, `btrfs_sync_fs`): ext4 and its elders, XFS, btrfs; and tmpfs, which has
/// nothing to make durable. Others only write back: a FUSE server hears nothing of it, and a server in the network is not
/// asked to commit.
const THOROUGH: [u64; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994];

/// True where [`sync`] does for every file of the file system of `folder` what an fsync does. Else each must be synced by
/// itself.
pub fn can_sync(folder: &impl AsFd) -> io::Result<bool> {
    let magic = retry_on_intr(|| rustix::fs::fstatfs(folder))?.f_type as u64;
    Ok(THOROUGH.contains(&magic) && says_what_failed(folder))
}

/// Syncs the file system of `folder`, which was opened before the first change that is to be durable: a write-back that has
/// failed since then is an error here.
///
/// 1. the file system; 2. the folder: some of them leave in the device's cache what they wrote in 1, an fsync does not. 2
///    before 1 would empty that cache too early.
pub fn sync(folder: &impl AsFd) -> io::Result<()> {
    retry_on_intr(|| rustix::fs::syncfs(folder))?; // 1
    retry_on_intr(|| rustix::fs::fsync(folder))?; // 2
    Ok(())
}

/// Before Linux 5.8 syncfs returned 0 whatever had failed. The same release gave statx the number of the mount.
fn says_what_failed(folder: &impl AsFd) -> bool {
    let stat = rustix::fs::statx(folder, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID);
    stat.is_ok_and(|stat| stat.stx_mask & StatxFlags::MNT_ID.bits() != 0)
}
