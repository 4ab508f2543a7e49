//! Which entries of an images folder are images, and under which name (docs/design.md#what-is-an-image). Pure: no I/O.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use crate::format::header::has_magic;

/// Bytes from the start of a file that [`classify`] wants to see; a shorter file gives what it has.
pub const HEAD_BYTES: usize = 64;
/// What is put behind an image's name where it is shown.
pub const SHOWN_SUFFIX: &str = ".img";
/// The descriptor that makes a folder a layered image.
pub const DESCRIPTOR: &str = "DiskDescriptor.xml";

/// Our own folder inside the images folder: lock, log, control socket, reserve.
pub const PRIVATE: &str = ".ploopfs";

/// Linux's limit for one name, in bytes.
const NAME_MAX: usize = 255;

/// How a single-file image is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageKind {
    /// One delta of the ploop format.
    Ploop,
    /// Plain bytes, written in place.
    Raw,
}

impl ImageKind {
    /// The word for people and for JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            ImageKind::Ploop => "ploop",
            ImageKind::Raw => "raw",
        }
    }
}

/// A name as text: what is UTF-8 as it is, and else its other bytes as `\xNN`, so that no two names are one. Where that
/// could be mistaken, a backslash of the name itself is two.
pub fn in_text(name: &OsStr) -> String {
    if let Some(text) = name.to_str().filter(|text| !text.contains("\\x")) {
        return text.to_owned();
    }
    let mut text = String::with_capacity(name.len());
    for chunk in name.as_bytes().utf8_chunks() {
        text.push_str(&chunk.valid().replace('\\', "\\\\"));
        chunk.invalid().iter().for_each(|byte| text.push_str(&format!("\\x{byte:02x}")));
    }
    text
}

/// What an entry of the images folder is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Class {
    /// An image; it may still turn out to be damaged when it is opened.
    Image {
        /// Its name, without the suffix that it is shown with ([`SHOWN_SUFFIX`]).
        name: OsString,
        /// How it is stored.
        kind: ImageKind,
    },
    /// Something else.
    NotAnImage {
        /// Why, in a form that follows "NAME: ".
        reason: String,
    },
}

/// Classifies one entry of an images folder. `is_regular` is about the entry itself, links not followed; `head`
/// holds the file's first [`HEAD_BYTES`] bytes.
///
/// A `.raw` file is raw whatever it begins with: the guest writes those bytes, and must not be able to turn its
/// disk into a delta by writing the magic there. A `.hds` without the magic is still an image (a damaged one), so
/// that it is named and not silently missing.
pub fn classify(name: &OsStr, is_regular: bool, head: &[u8]) -> Class {
    let bytes = name.as_bytes();
    if bytes.starts_with(b".") {
        return not("the name begins with a dot");
    }
    if !is_regular {
        return not("not a regular file");
    }
    if has_guid_suffix(bytes) {
        return not("a delta of a layered image (NAME.{guid})");
    }
    let (stem, kind) = if let Some(stem) = bytes.strip_suffix(b".raw") {
        (stem, ImageKind::Raw)
    } else if let Some(stem) = bytes.strip_suffix(b".hds") {
        (stem, ImageKind::Ploop)
    } else if has_magic(head) {
        let stem = bytes.strip_suffix(b".hdd").or_else(|| bytes.strip_suffix(b".img"));
        (stem.unwrap_or(bytes), ImageKind::Ploop)
    } else {
        return not("neither named .hds or .raw, nor does it begin with the ploop magic");
    };
    if stem.len() + SHOWN_SUFFIX.len() > NAME_MAX {
        return not("the name is too long to be shown with .img behind it");
    }
    Class::Image { name: OsString::from_vec(stem.to_vec()), kind }
}

/// The name of the layered image in a folder of this name: without .hdd.
pub fn folder_image_name(folder: &OsStr) -> OsString {
    let bytes = folder.as_bytes();
    OsString::from_vec(bytes.strip_suffix(b".hdd").unwrap_or(bytes).to_vec())
}

/// Why a sub-folder of an images folder is not served.
pub fn folder_reason(has_descriptor: bool) -> &'static str {
    if has_descriptor {
        "layered images (a folder with DiskDescriptor.xml) are not supported by this version"
    } else {
        "a folder without DiskDescriptor.xml"
    }
}

/// What [`NotAnImage`](Class::NotAnImage) says of a file that a descriptor beside it names.
pub const NAMED_BY_DESCRIPTOR: &str =
    "a delta of the layered image that DiskDescriptor.xml beside it describes";

/// True when the descriptor text `xml` names the file `name` of its own folder in a `File` element. Such a file is
/// a level of a layered image, and writing to it alone would destroy the image. Errs on the careful side: only
/// the last part of the path in the element counts.
pub fn descriptor_names(xml: &[u8], name: &OsStr) -> bool {
    let text = String::from_utf8_lossy(xml);
    let name = name.to_string_lossy();
    text.split("<File>").skip(1).any(|rest| {
        let path = rest.split('<').next().unwrap_or_default().trim();
        // &amp; last, so that "&amp;lt;" becomes "&lt;" and not "<".
        let path = path.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"");
        let path = path.replace("&apos;", "'").replace("&amp;", "&");
        path.rsplit('/').next() == Some(&*name)
    })
}

fn not(reason: &str) -> Class {
    Class::NotAnImage { reason: reason.into() }
}

/// True for `X.{xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx}`.
fn has_guid_suffix(name: &[u8]) -> bool {
    const LEN: usize = 38;
    let Some(at) = name.len().checked_sub(LEN + 1) else { return false };
    let guid = &name[at + 1..];
    name[at] == b'.'
        && guid.iter().enumerate().all(|(i, byte)| match i {
            0 => *byte == b'{',
            37 => *byte == b'}',
            9 | 14 | 19 | 24 => *byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAGIC: &[u8] = b"WithouFreSpacExt\x02\0\0\0";

    fn image(name: &str, kind: ImageKind) -> Class {
        Class::Image { name: name.into(), kind }
    }

    fn is_image(name: &str, regular: bool, head: &[u8]) -> bool {
        matches!(classify(name.as_ref(), regular, head), Class::Image { .. })
    }

    #[test]
    fn two_names_that_are_no_text_are_two_texts() {
        let text = |bytes: &[u8]| in_text(OsStr::from_bytes(bytes));
        assert_eq!(text(b"vm1"), "vm1");
        assert_eq!((text("Bär".as_bytes()), text(b"a\\b")), ("Bär".into(), "a\\b".into()));
        assert_eq!((text(b"a\xff"), text(b"a\xfe")), ("a\\xff".into(), "a\\xfe".into()));
        assert_ne!(text(b"a\xff"), text(b"a\\xff"));
    }

    #[test]
    fn names_and_magic_decide_what_a_file_is_and_is_called() {
        assert_eq!(classify("vm2.hds".as_ref(), true, MAGIC), image("vm2", ImageKind::Ploop));
        assert_eq!(classify("vm3.raw".as_ref(), true, b"x"), image("vm3", ImageKind::Raw));
        assert_eq!(classify("disk".as_ref(), true, MAGIC), image("disk", ImageKind::Ploop));
        assert_eq!(classify("a.hdd".as_ref(), true, MAGIC), image("a", ImageKind::Ploop));
        assert_eq!(classify("a.img".as_ref(), true, MAGIC), image("a", ImageKind::Ploop));
        assert_eq!(classify("a.v1".as_ref(), true, b"WithoutFreeSpace"), image("a.v1", ImageKind::Ploop));
        assert!(!is_image("notes.txt", true, b"hello"));
        assert!(!is_image("empty", true, b""));
    }

    #[test]
    fn a_guest_cannot_turn_its_raw_disk_into_a_delta_by_writing_the_magic() {
        assert_eq!(classify("vm3.raw".as_ref(), true, MAGIC), image("vm3", ImageKind::Raw));
    }

    #[test]
    fn an_hds_without_the_magic_is_an_image_that_will_be_named_as_damaged() {
        assert_eq!(classify("vm.hds".as_ref(), true, b""), image("vm", ImageKind::Ploop));
    }

    #[test]
    fn dot_names_guid_names_and_irregular_files_are_never_images() {
        assert!(!is_image(".hds", true, MAGIC));
        assert!(!is_image(".vm.hds", true, MAGIC));
        assert!(!is_image("root.hds.{5fbaabe3-6958-40ff-92a7-860e329aab41}", true, MAGIC));
        assert!(!is_image("vm.hds", false, b""));
        assert!(is_image("root.{5fbaabe3-6958-40ff-92a7-860e329aab4z}", true, MAGIC));
        assert!(is_image("{5fbaabe3-6958-40ff-92a7-860e329aab41}", true, MAGIC));
    }

    #[test]
    fn a_name_that_cannot_be_shown_is_left_out() {
        assert!(is_image(&format!("{}.hds", "n".repeat(251)), true, MAGIC));
        assert!(!is_image(&"n".repeat(252), true, MAGIC));
    }

    #[test]
    fn a_file_that_a_descriptor_names_is_recognised() {
        let xml = b"<Image><GUID>{x}</GUID><File>root.hds</File></Image><File> ./a&amp;b.hds</File>";
        assert!(descriptor_names(xml, "root.hds".as_ref()));
        assert!(descriptor_names(xml, "a&b.hds".as_ref()));
        assert!(!descriptor_names(xml, "oot.hds".as_ref()));
        assert!(!descriptor_names(b"\xff\xfe<File>", "x".as_ref()));
    }
}
