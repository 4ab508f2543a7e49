//! Loading a BAT page on behalf of whoever missed it: one loads, the others go on when it is there.

use super::cache::Loading;
use crate::error::Result;
use crate::sync::Arc;
use crate::vdisk::Image;

impl Image {
    /// Runs `then(token)` once the page of `cluster` is loaded; loads it here when nobody else does, and calls
    /// `fail(token)` when that fails. The token holds no cluster lock. For runners.
    pub(in crate::vdisk) fn with_page<T: Send + 'static>(
        self: &Arc<Self>,
        cluster: u64,
        token: T,
        then: fn(T),
        fail: fn(T, Result<()>),
    ) {
        let stack = self.stack();
        let Some(bat) = &stack.bat else { return then(token) };
        match bat.load_or_queue(cluster, token, |token| Box::new(move || then(token))) {
            Loading::Queued => {}
            Loading::Loaded(token) => then(token),
            Loading::Mine(token) => {
                let (waiting, loaded) = bat.load(cluster, &stack);
                waiting.into_iter().for_each(|job| self.submit(job));
                match loaded {
                    Ok(()) => then(token),
                    Err(e) => fail(token, Err(e)),
                }
            }
        }
    }
}
