//! Notifications to the kernel, which it did not ask for: forget a name, forget an inode's attributes and pages.
//!
//! Sending such a message may wait for locks in the kernel that only our own answers release (a folder being looked
//! up, a page being read). So callers only queue, and one thread that holds no lock sends.

use std::ffi::{OsStr, OsString};
use std::io;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};

use crate::error::Result;
use crate::fuse::ops::Ino;
use crate::io::process::{no_thread, spawn_thread};

/// The way into the kernel; each transport has one.
pub trait Sink: Send + 'static {
    /// Drops the cached attributes of `ino`. Its pages stay: what is written past the kernel changes no image that it has
    /// open, and an open drops them.
    fn inval_attributes(&self, ino: Ino) -> io::Result<()>;
    /// Drops the cached name.
    fn inval_entry(&self, parent: Ino, name: &OsStr) -> io::Result<()>;
}

#[derive(Debug)]
enum Message {
    Attributes(Ino),
    Entry {
        parent: Ino,
        name: OsString,
    },
    /// All before it was sent: who waits for that hears it.
    Settle(Sender<()>),
    Stop,
}

/// Queues messages; never waits, may be called under any lock. Cheap to clone. After the end of the session
/// messages go nowhere.
#[derive(Clone, Debug)]
pub struct Notifier {
    queue: Sender<Message>,
}

impl Notifier {
    /// The attributes (size, blocks, times) of `ino` have changed.
    pub fn attributes_changed(&self, ino: Ino) {
        self.send(Message::Attributes(ino));
    }

    /// `name` in the folder `parent` appeared, went away or means another inode.
    pub fn name_changed(&self, parent: Ino, name: &OsStr) {
        self.send(Message::Entry { parent, name: name.to_owned() });
    }

    /// Waits until all that was queued before has been sent, or for `limit`. False: it has not. Under no lock, and on no
    /// thread that serves requests: the kernel may wait for an answer of ours.
    pub fn settle(&self, limit: Duration) -> bool {
        let (sent, heard) = bounded(1);
        self.send(Message::Settle(sent));
        // Its end is the session's, and with it that of all that the kernel keeps.
        heard.recv_timeout(limit) != Err(RecvTimeoutError::Timeout)
    }

    fn send(&self, message: Message) {
        // Fails only when the session has ended and with it the kernel's caches.
        let _ = self.queue.send(message);
    }
}

/// The other end, before its thread runs: a mount is made before the first thread (docs/design.md#start).
pub(crate) struct Pending {
    sender: Sender<Message>,
    receiver: Receiver<Message>,
    sink: Box<dyn Sink>,
}

/// Makes the queue. Nothing is sent before [`Pending::start`].
pub(crate) fn queue(sink: Box<dyn Sink>) -> (Notifier, Pending) {
    // Unbounded, so that queueing never waits; at most one message per live change of the folder or of a size.
    let (sender, receiver) = unbounded();
    (Notifier { queue: sender.clone() }, Pending { sender, receiver, sink })
}

impl Pending {
    /// Starts the thread.
    pub(crate) fn start(self) -> Result<Running> {
        let Pending { sender, receiver, sink } = self;
        let name = "ploopfs/notify";
        let thread = spawn_thread(name, move || run(&receiver, sink.as_ref())).map_err(no_thread(name))?;
        Ok(Running { sender, thread: Some(thread) })
    }
}

/// The running thread. Dropping it sends what is queued and ends it; the sink, which holds the connection open,
/// goes with it.
pub(crate) struct Running {
    sender: Sender<Message>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.sender.send(Message::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the notification thread panicked");
        }
    }
}

fn run(queue: &Receiver<Message>, sink: &dyn Sink) {
    while let Ok(message) = queue.recv() {
        let sent = match &message {
            Message::Attributes(ino) => sink.inval_attributes(*ino),
            Message::Entry { parent, name } => sink.inval_entry(*parent, name),
            Message::Settle(waiting) => {
                // Who waited too long is gone.
                let _ = waiting.send(());
                Ok(())
            }
            Message::Stop => return,
        };
        match sent {
            Ok(()) => {}
            // ENOENT: nothing was cached. ENODEV, ENOTCONN: the mount is gone, and its caches with it. ENOTEMPTY: a
            // folder that still has names under it in use; it goes when they go, after at most the time to live.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::ENOENT | libc::ENODEV | libc::ENOTCONN | libc::ENOTEMPTY)
                ) => {}
            Err(e) => log::warn!("the kernel refused {message:?}: {e}; it shows old data for up to a second"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    struct Recorder(Sender<String>);

    impl Sink for Recorder {
        fn inval_attributes(&self, ino: Ino) -> io::Result<()> {
            let _ = self.0.send(format!("{} attributes {ino}", thread_name()));
            Ok(())
        }

        fn inval_entry(&self, parent: Ino, name: &OsStr) -> io::Result<()> {
            let _ = self.0.send(format!("{} entry {parent} {}", thread_name(), name.display()));
            Err(io::Error::from_raw_os_error(libc::ENOENT))
        }
    }

    fn thread_name() -> String {
        thread::current().name().unwrap_or_default().to_owned()
    }

    #[test]
    fn queued_messages_are_sent_in_order_from_their_own_thread_and_before_the_end() {
        let (seen, log) = unbounded();
        let (notifier, pending) = queue(Box::new(Recorder(seen)));
        notifier.attributes_changed(7);
        let running = pending.start().expect("a thread can be started");
        notifier.name_changed(1, OsStr::new("vm1.img"));
        notifier.attributes_changed(8);
        assert!(notifier.settle(Duration::from_secs(60)));
        assert_eq!(log.len(), 3, "what was queued before is sent");
        drop(running);
        let all: Vec<String> = log.iter().collect();
        let want = ["attributes 7", "entry 1 vm1.img", "attributes 8"].map(|m| format!("ploopfs/notify {m}"));
        assert_eq!(all, want);
        notifier.attributes_changed(9);
        assert!(notifier.settle(Duration::from_secs(60)), "after the end nothing is waited for");
    }
}
