//! The identifiers of a descriptor. Written with braces and in lower case, compared without regard to case.

use std::fmt;

/// One GUID, its bytes in the order of its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Guid([u8; 16]);

impl Guid {
    /// The GUID of every live top (docs/format.md#guids).
    pub const TOP: Guid = Guid(0x5fba_abe3_6958_40ff_92a7_860e_329a_ab41_u128.to_be_bytes());
    /// The parent of a base: none.
    pub const NONE: Guid = Guid([0; 16]);

    /// Reads `{xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx}`, with or without the braces, in any case.
    pub fn parse(text: &str) -> Option<Guid> {
        let text = text.trim();
        let inner = match text.strip_prefix('{') {
            Some(rest) => rest.strip_suffix('}')?,
            None => text,
        };
        let well_formed = inner.len() == 36
            && inner.bytes().enumerate().all(|(i, byte)| match i {
                8 | 13 | 18 | 23 => byte == b'-',
                _ => byte.is_ascii_hexdigit(),
            });
        if !well_formed {
            return None;
        }
        let digits: String = inner.chars().filter(|c| *c != '-').collect();
        u128::from_str_radix(&digits, 16).ok().map(|n| Guid(n.to_be_bytes()))
    }

    /// Its bytes, in the order of its text.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    /// The one with these bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> Guid {
        Guid(bytes)
    }

    /// A new one that is no other's (RFC 9562 version 4).
    pub fn random() -> Guid {
        let mut bytes = [0; 16];
        let mut filled = 0;
        while filled < bytes.len() {
            // Sixteen bytes of the kernel's pool: fails only where a signal came first, and is then asked again.
            let flags = rustix::rand::GetRandomFlags::empty();
            filled += rustix::rand::getrandom(&mut bytes[filled..], flags).unwrap_or(0);
        }
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Guid(bytes)
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = u128::from_be_bytes(self.0);
        let (a, b, c, d) = ((n >> 96) as u32, (n >> 80) as u16, (n >> 64) as u16, (n >> 48) as u16);
        write!(f, "{{{a:08x}-{b:04x}-{c:04x}-{d:04x}-{:012x}}}", n & 0xffff_ffff_ffff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guid_is_read_with_and_without_braces_in_any_case_and_written_one_way() {
        let text = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
        for form in [text.to_owned(), text.to_uppercase(), text[1..37].to_owned(), format!(" {text}\n")] {
            assert_eq!(Guid::parse(&form), Some(Guid::TOP), "{form}");
        }
        assert_eq!(Guid::TOP.to_string(), text);
        assert_eq!(Guid::NONE.to_string(), "{00000000-0000-0000-0000-000000000000}");
    }

    #[test]
    fn what_is_no_guid_is_refused() {
        for text in [
            "",
            "{}",
            "{5fbaabe3-6958-40ff-92a7-860e329aab41",
            "5fbaabe3-6958-40ff-92a7-860e329aab41}",
            "{5fbaabe3-6958-40ff-92a7-860e329aab4}",
            "{5fbaabe3_6958-40ff-92a7-860e329aab41}",
            "+fbaabe3-6958-40ff-92a7-860e329aab41",
        ] {
            assert_eq!(Guid::parse(text), None, "{text}");
        }
    }

    #[test]
    fn random_guids_differ_and_read_back() {
        let (a, b) = (Guid::random(), Guid::random());
        assert_ne!(a, b);
        assert_eq!(Guid::parse(&a.to_string()), Some(a));
        assert_eq!(&a.to_string()[15..16], "4");
    }
}
