//! Numbers and structures of loop devices and their partitions, as the kernel's headers have them.

// linux/loop.h
pub(super) const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
pub(super) const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
pub(super) const LOOP_SET_CAPACITY: libc::Ioctl = 0x4C07;
#[cfg(test)]
pub(super) const LOOP_SET_DIRECT_IO: libc::Ioctl = 0x4C08;
pub(super) const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
pub(super) const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
// linux/fs.h and linux/blkpg.h
pub(super) const BLKPG: libc::Ioctl = 0x1269;
pub(super) const BLKPG_DEL_PARTITION: libc::c_int = 2;
pub(super) const LO_FLAGS_READ_ONLY: u32 = 1;
pub(super) const LO_FLAGS_DIRECT_IO: u32 = 16;
pub(super) const LO_NAME_SIZE: usize = 64;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct LoopInfo {
    pub(super) device: u64,
    pub(super) inode: u64,
    pub(super) rdevice: u64,
    pub(super) offset: u64,
    pub(super) size_limit: u64,
    pub(super) number: u32,
    pub(super) encrypt_type: u32,
    pub(super) encrypt_key_size: u32,
    pub(super) flags: u32,
    pub(super) file_name: [u8; LO_NAME_SIZE],
    pub(super) crypt_name: [u8; LO_NAME_SIZE],
    pub(super) encrypt_key: [u8; 32],
    pub(super) init: [u64; 2],
}

impl LoopInfo {
    pub(super) const ZERO: LoopInfo = LoopInfo {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; LO_NAME_SIZE],
        crypt_name: [0; LO_NAME_SIZE],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// `struct loop_config`.
#[repr(C)]
pub(super) struct LoopConfig {
    pub(super) fd: u32,
    pub(super) block_size: u32,
    pub(super) info: LoopInfo,
    pub(super) reserved: [u64; 8],
}

/// `struct blkpg_partition`.
#[repr(C)]
pub(super) struct Partition {
    pub(super) start: i64,
    pub(super) length: i64,
    pub(super) number: libc::c_int,
    pub(super) device_name: [u8; 64],
    pub(super) volume_name: [u8; 64],
}

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
pub(super) struct PartitionCall {
    pub(super) what: libc::c_int,
    pub(super) flags: libc::c_int,
    pub(super) length: libc::c_int,
    pub(super) partition: *mut Partition,
}
