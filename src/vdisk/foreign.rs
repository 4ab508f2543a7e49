//! A file that another program overwrites or cuts in place while we have it open (`cp new.hds images/vm.hds`). Locks keep
//! out who asks for them; such a program does not ask. What is written then goes into a file that is another's, and no
//! sync may say that it is kept: the image is read-only from then on and its syncs fail, as after a failed sync (R7).
//!
//! Looked at are the header, which says "in use" in our words from the first change to the close, and the length (R2). A
//! copy of this very image, made while it was in use, looks the same, and is not noticed.

use super::stack::Stack;
use super::{Image, Stage};
use crate::error::{Error, Kind, Result};
use crate::format::header::{HEADER_BYTES, Header};
use crate::io::file::read_full;
use crate::rules::{Rule, broken};
use crate::sync::{Arc, lock};

impl Image {
    /// The top's file is as we left it, as far as a look that costs no disk finds; else the image fails. Before each
    /// round writes or says that something is durable, before the mark is set, and before it is cleared.
    pub(super) fn still_ours(self: &Arc<Self>, stack: &Stack) -> Result<()> {
        let top = stack.top();
        if let Some((len, least)) = self.too_short(stack) {
            return Err(self.is_foreign(stack, &format!("it ends at byte {len}, where {least} were")));
        }
        // Held across the read: bytes 0 to 4095 have one writer (R5), and this is no other's half of a write.
        let header = lock(&stack.state.header);
        let Some(ours) = &*header else { return Ok(()) };
        let mut bytes = [0; HEADER_BYTES as usize];
        let Ok(n) = read_full(&*top.file, &mut bytes, 0) else { return Ok(()) };
        let same = Header::parse(&bytes[..n]).is_ok_and(|found| found == *ours);
        // The build that breaks R1 leaves its header as it was.
        if same || broken(Rule::R1) {
            return Ok(());
        }
        Err(self.is_foreign(stack, "its header is not what was written last"))
    }

    /// How long the file is, and should be at least; None: it is long enough, or that is not known.
    fn too_short(&self, stack: &Stack) -> Option<(u64, u64)> {
        let least = || match stack.state.allocator.get() {
            _ if stack.bat.is_none() => stack.geometry.disk,
            // The build that breaks R2 does not make it so long.
            Some(alloc) if !broken(Rule::R2) => stack.geometry.cluster_position(alloc.made()),
            _ => stack.geometry.bat_end(),
        };
        let look = || {
            // Asked on both sides: an extension counts when it is there, a cut before it is. Both in one look is what the
            // second look is for.
            let before = least();
            // One that fails says nothing: whether the data is safe the sync says.
            let len = stack.top().file.len().ok()?;
            let least = before.min(least());
            (len < least).then_some((len, least))
        };
        look().and_then(|_| look()).and_then(|_| look())
    }

    /// A mapped cluster of the top ends behind the end of the file. Where we have it in use, we have made it longer (R2).
    pub(super) fn ends_early(self: &Arc<Self>, stack: &Stack, level: u16, end: u64) {
        if level == stack.top_index() && self.stage() == Stage::Marked {
            self.is_foreign(stack, &format!("it ends at byte {end}, inside a cluster that is in use"));
        }
    }

    fn is_foreign(self: &Arc<Self>, stack: &Stack, how: &str) -> Error {
        let why = format!(
            "another program has changed the file while it was in use: {how}. What was written since may be lost: close \
             the disk, and put the file back from a backup"
        );
        let e = Error::at(Kind::Io, &stack.top().path, why);
        self.fail(&e);
        e
    }
}
