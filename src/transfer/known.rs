//! What a file looks like that is about to be taken for plain bytes. Only asked, never believed: the guest of a raw disk
//! writes its first bytes.

use crate::format::header::has_magic;
use crate::format::stream::is_stream;

/// So many bytes of a file's beginning are looked at.
pub const HEAD: usize = 512;
/// And so many of its end: where Apple's and Microsoft's formats have their mark.
pub const TAIL: usize = 512;

/// Formats that QEMU's programs read, so that we do: where the mark stands, the mark, and QEMU's word.
const READ: [(usize, &[u8], &str); 7] = [
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"<<< ", "vdi"),
    (0, b"QED\0", "qed"),
];

/// Formats that are not read here.
const OTHERS: [(usize, &[u8], &str); 20] = [
    (0, b"#!/bin/sh\n#V2.0 Format\n", "a cloop file (compressed loop device)"),
    (0, b"#!/bin/sh\n#V1.0 Format\n", "a cloop file (compressed loop device)"),
    (0, b"Bochs Virtual HD Image", "a disk of Bochs"),
    (0, b"LUKS\xba\xbe", "encrypted by LUKS"),
    (0, b"COWD", "an old VMware disk"),
    (0, b"koly", "a disk image of macOS (dmg)"),
    (0, b"encrcdsa", "an encrypted disk image of macOS (dmg)"),
    (0, b"EVF\x09\x0d\x0a\xff\x00", "a forensic image (E01)"),
    (0, b"MSWIM\0\0\0", "a Windows image (WIM)"),
    (0, b"VMA\0", "a backup of Proxmox (VMA)"),
    (0, b"\x3a\xff\x26\xed", "a sparse image of Android"),
    (0, b"partclone-image", "an image of partclone"),
    (0, b"\0ntfsclone-image", "an image of ntfsclone"),
    (0, b"\x1f\x8b\x08", "compressed by gzip"),
    (0, b"\xfd7zXZ\0", "compressed by xz"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (0, b"BZh", "compressed by bzip2"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (257, b"ustar", "a tar archive, as OVA files are"),
];

/// Marks at the end.
const ENDS: [(&[u8], &str); 1] = [(b"koly", "a disk image of macOS (dmg)")];

/// Why a file of these first and last bytes should not be taken for plain bytes without a word, in words that follow its
/// name; None: nothing speaks against it.
pub fn looks_like(head: &[u8], tail: &[u8]) -> Option<String> {
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|head| head.starts_with(magic));
    if has_magic(head) {
        let what =
            "is an image of ours: copy it with ploopfs clone, or say --format raw if it is a disk's content";
        return Some(what.to_owned());
    }
    if is_stream(head) {
        return Some("is a backup: ploopfs restore makes an image of it; or say --format raw".to_owned());
    }
    if let Some((_, _, name)) = READ.iter().find(|(offset, magic, _)| at(*offset, magic)) {
        return Some(format!("begins like a {name} file; say what it is: --format {name}, or --format raw"));
    }
    // A fixed VHD is a plain disk with a mark behind it.
    if tail.starts_with(b"conectix") {
        return Some("ends like a VHD file; say what it is: --format vpc, or --format raw".to_owned());
    }
    let begins = OTHERS.iter().find(|(offset, magic, _)| at(*offset, magic)).map(|(_, _, name)| name);
    let ends = || ENDS.iter().find(|(magic, _)| tail.starts_with(magic)).map(|(_, name)| name);
    let name = begins.or_else(ends)?;
    let unpack = match name.starts_with("compressed") {
        true => "; unpack it: its bytes may come through a pipe, as FILE -",
        false => ", which is not read here",
    };
    Some(format!("looks like {name}{unpack}; --format raw takes it as it is"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_and_not_understood_is_named_and_a_disk_is_taken() {
        let looks = |head: &[u8], tail: &[u8]| looks_like(head, tail).unwrap_or_default();
        assert!(looks(b"QFI\xfb", b"").contains("--format qcow2, or --format raw"));
        assert!(looks(b"#!/bin/sh\n#V2.0 Format\n\0", b"").contains("cloop"));
        assert!(looks(&[0; 512], b"koly\0\0").contains("dmg"));
        assert!(looks(&[0; 512], b"conectix\0").contains("--format vpc"));
        assert!(looks(b"\x1f\x8b\x08\0", b"").contains("gzip"));
        assert!(looks(b"WithouFreSpacExt", b"").contains("ploopfs clone"));
        let mut tar = [0; 512];
        tar[257..262].copy_from_slice(b"ustar");
        assert!(looks(&tar, b"").contains("tar archive"));
        let mut boot = [0; 512];
        boot[..3].copy_from_slice(b"\xeb\x63\x90");
        boot[510..].copy_from_slice(b"\x55\xaa");
        assert_eq!(looks_like(&boot, &boot), None);
        assert_eq!(looks_like(b"", b""), None);
        assert_eq!(looks_like(b"#!/bin/sh\nexit", b"k"), None);
    }
}
