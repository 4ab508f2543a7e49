//! What every transport asks of the kernel in the handshake, beyond what it cannot do without (docs/kernel.md#init).

/// A capability of the kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Capability {
    /// Its bit in the flags of INIT.
    pub bit: u64,
    /// What the kernel calls it.
    pub name: &'static str,
    /// What is lost where the kernel lacks it.
    pub loss: &'static str,
}

/// Not READDIRPLUS: one answer would need the attributes of all images, and wait for the slowest host.
pub(super) const CAPABILITIES: [Capability; 4] = [
    Capability { bit: 1 << 15, name: "FUSE_ASYNC_DIO", loss: "loop and libaio requests run one at a time" },
    Capability { bit: 1 << 36, name: "FUSE_DIRECT_IO_ALLOW_MMAP", loss: "images cannot be mapped shared" },
    Capability {
        bit: 1 << 18,
        name: "FUSE_PARALLEL_DIROPS",
        loss: "look-ups in one folder run one at a time",
    },
    // Images show neither set-user-id bits nor capabilities: there is nothing to take away.
    Capability {
        bit: 1 << 28,
        name: "FUSE_HANDLE_KILLPRIV_V2",
        loss: "each write that is passed through asks for capabilities first",
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use fuser::InitFlags;

    #[test]
    fn each_bit_is_the_one_of_its_name() {
        for Capability { bit, name, .. } in CAPABILITIES {
            assert_eq!(InitFlags::from_name(name).map(|flag| flag.bits()), Some(bit), "{name}");
        }
    }
}
