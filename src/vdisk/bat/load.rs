//! Loading a BAT page on behalf of whoever missed it: one loads, the others go on when it is there.

use super::cache::Loading;
use crate::error::Result;
use crate::sync::{Arc, mpsc};
use crate::vdisk::Image;
use crate::vdisk::runner::Job;
use crate::vdisk::stack::Stack;

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

    /// Loads the page of `cluster`, or waits for who does. Inside the gate; not for runners.
    pub(in crate::vdisk) fn load_and_wait(self: &Arc<Self>, stack: &Stack, cluster: u64) -> Result<()> {
        let Some(bat) = &stack.bat else { return Ok(()) };
        let (tell, loaded) = mpsc::channel();
        let job = |tell: mpsc::Sender<()>| -> Job {
            Box::new(move || {
                let _ = tell.send(());
            })
        };
        match bat.load_or_queue(cluster, tell, job) {
            Loading::Loaded(_) => Ok(()),
            Loading::Mine(_) => {
                let (waiting, result) = bat.load(cluster, stack);
                waiting.into_iter().for_each(|job| self.submit(job));
                result
            }
            // The loader is a runner or another thread of this kind; neither waits for us.
            Loading::Queued => {
                let _ = loaded.recv();
                Ok(())
            }
        }
    }
}
