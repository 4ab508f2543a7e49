//! A takeover's first look at the folder: what a daemon before has served comes before all that is new. An image that is in use
//! stays so, whatever became of its file.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::sync::Arc;

use super::locked;
use super::scan::{self, Claim, Identity};
use super::set::Folder;
use crate::io::real::RealFile;
use crate::ledger::FoundNumber;

impl Folder {
    /// Serves what was served, before newcomers are judged: of those in use (`left_open`, by number) also what was renamed, under
    /// its old name, and what is gone, from the open file that the daemon before has left. All else of it is judged anew.
    pub(super) fn take_left(&self, claims: &[Claim], left_open: &HashSet<u64>) {
        let Some(ledger) = &self.shared.ledger else { return };
        let by_name: HashMap<(&OsStr, Identity), &Claim> =
            claims.iter().map(|claim| ((claim.name.as_os_str(), claim.stamp.identity), claim)).collect();
        let by_identity: HashMap<Identity, &Claim> =
            claims.iter().map(|claim| (claim.stamp.identity, claim)).collect();
        for number in &ledger.found().numbers {
            let open = left_open.contains(&number.id);
            let here = by_name.get(&(number.name.as_os_str(), number.file));
            let claim = match (here, by_identity.get(&number.file)) {
                (Some(&claim), _) => Some(claim.clone()),
                // It ends under its old name.
                (None, Some(&claim)) if open => Some(Claim { name: number.name.clone(), ..claim.clone() }),
                (None, None) if open => self.gone(number),
                (None, _) => None,
            };
            let Some(claim) = claim else { continue };
            // Two of one name: the ledger makes no sense.
            if ledger.take_number(&number.name, number.file) != Some(number.id) {
                continue;
            }
            let entry = self.serve(number.id, &claim);
            // Until it is open again nothing else says that it is in use.
            if open && entry.hold() {
                locked(&self.left).push(entry);
            }
        }
    }

    /// All is open that was: what no opener has is judged as any other.
    pub(super) fn let_go_of_left(&self) {
        let left = std::mem::take(&mut *locked(&self.left));
        left.iter().for_each(|entry| entry.let_go());
    }

    /// What a file says that no name of the folder leads to.
    fn gone(&self, number: &FoundNumber) -> Option<Claim> {
        let left = self.shared.deltas.heirs.left(number.file)?;
        let file = RealFile::from_file(File::from(left.descriptor), &left.name).ok()?;
        let claim = scan::claim_of_open(&left.name, Arc::new(file))?;
        Some(Claim { name: number.name.clone(), ..claim })
    }
}
