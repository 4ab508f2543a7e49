//! Memory aligned to pages, which any host can read into directly.

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// A page in bytes: the largest alignment that disks ask for.
pub(super) const PAGE: usize = 4096;

/// One page.
#[derive(Clone, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C, align(4096))]
pub(super) struct AlignedPage([u8; PAGE]);

/// Some bytes that begin at a page.
pub(super) struct Pages {
    pages: Vec<AlignedPage>,
    len: usize,
}

impl Pages {
    /// `len` zeroes.
    pub(super) fn zeroed(len: usize) -> Pages {
        let mut pages = Vec::new();
        grow(&mut pages, len);
        Pages { pages, len }
    }

    /// All of them.
    pub(super) fn as_mut(&mut self) -> &mut [u8] {
        &mut self.pages.as_mut_slice().as_mut_bytes()[..self.len]
    }
}

impl AsRef<[u8]> for Pages {
    fn as_ref(&self) -> &[u8] {
        &self.pages.as_slice().as_bytes()[..self.len]
    }
}

/// Makes `pages` at least `len` bytes large.
pub(super) fn grow(pages: &mut Vec<AlignedPage>, len: usize) {
    let missing = len.div_ceil(PAGE).saturating_sub(pages.len());
    pages.extend(std::iter::repeat_with(AlignedPage::new_zeroed).take(missing));
}
