//! What in a descriptor says that the bytes of the files are not those of the disk. Each of these fields has a value that
//! says nothing; with any other the disk is not served, whatever the rest looks like: ciphertext has no signature, and
//! a disk without one gets a new file system.

use super::xml::Element;
use super::{BadXml, Guid, number};

/// Why the disk is not what its files hold; None: every field says that it is.
pub(super) fn foreign(parameters: &Element, storage: &Element) -> Result<Option<String>, BadXml> {
    if parameters.elements().chain(storage.elements()).any(encrypts) {
        let why =
            "is encrypted (Encryption in its descriptor); only the program that encrypted it can read it";
        return Ok(Some(why.into()));
    }
    // By QEMU's description of the format, only the program that set it may open a disk with padding.
    let plain = [(parameters, "Padding", 0), (parameters, "LogicSectorSize", 512), (storage, "Start", 0)];
    for (parent, name, expected) in plain {
        for element in parent.elements().filter(|element| element.name == name) {
            let value = match element.content() {
                text if text.is_empty() => expected,
                _ => number(element)?,
            };
            if value != expected {
                let (name, what) = (name.to_lowercase(), format!("{name} = {value}"));
                return Ok(Some(format!(
                    "has {what} in its descriptor, and what {name} other than {expected} means is not known here"
                )));
            }
        }
    }
    Ok(None)
}

/// True for an `Encryption` that names an engine, a key or anything else; Parallels writes an empty one with the GUID of
/// zeroes for a disk that is not encrypted.
fn encrypts(element: &Element) -> bool {
    element.name == "Encryption" && says_something(element)
}

fn says_something(element: &Element) -> bool {
    let text = element.content();
    let is_none = text.is_empty() || Guid::parse(&text) == Some(Guid::NONE);
    !is_none || element.elements().any(says_something)
}
