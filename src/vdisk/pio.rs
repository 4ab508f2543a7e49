//! Requests and pios. A pio is the part of one request that lies in one cluster; it is what locks, runners and
//! queues deal with. A request answers when its last pio has finished.

use std::time::Instant;

use bytes::{Bytes, BytesMut};

use super::gate::Inside;
use super::locks::LockMode;
use super::{Image, Reply, read, write};
use crate::error::{Error, Kind, Result};
use crate::ledger::deaths::Work;
use crate::ledger::running;
use crate::sync::{Arc, AtomicUsize, Mutex, Ordering, lock};

/// What a pio carries.
pub(super) enum Body {
    /// Room for what is read; made when it is read ([`Pio::make_room`]), so that what waits takes no memory.
    Read(BytesMut),
    /// What is written.
    Write(Bytes),
}

/// How a request answers.
enum Answer {
    /// Bytes of each part; and the parts themselves, once one of them is read.
    Read {
        lens: Vec<usize>,
        parts: Vec<BytesMut>,
        reply: Reply<Bytes>,
    },
    Write {
        durable: bool,
        reply: Reply<()>,
    },
}

struct Request {
    /// The transport's, for the ledger.
    number: Work,
    left: AtomicUsize,
    /// The first failure, and the answer with the parts that have come in. A leaf.
    state: Mutex<(Option<Error>, Option<Answer>)>,
}

/// The part of a request in one cluster.
pub(super) struct Pio {
    /// The image.
    pub image: Arc<Image>,
    request: Arc<Request>,
    /// Which part of the request.
    index: usize,
    /// Guest cluster.
    pub cluster: u64,
    /// First byte inside the cluster.
    pub start: u64,
    /// Data.
    pub body: Body,
    /// The cluster lock held.
    held: Option<LockMode>,
    /// None while parked for space, and once finished.
    inside: Option<Inside>,
    /// When it was first parked for space.
    pub parked: Option<Instant>,
    finished: bool,
}

/// Splits a read and hands its pios to runners. `offset` and `len` lie inside the disk, `len` > 0.
pub(super) fn submit_read(image: &Arc<Image>, offset: u64, len: usize, reply: Reply<Bytes>) {
    let answer = Answer::Read { lens: Vec::new(), parts: Vec::new(), reply };
    submit(image, offset, len, answer, |_| Body::Read(BytesMut::new()));
}

/// Splits a write and hands its pios to runners. The range lies inside the disk and is not empty.
pub(super) fn submit_write(
    image: &Arc<Image>,
    offset: u64,
    mut data: Bytes,
    durable: bool,
    reply: Reply<()>,
) {
    let len = data.len();
    submit(image, offset, len, Answer::Write { durable, reply }, move |n| Body::Write(data.split_to(n)));
}

fn pieces(image: &Image, offset: u64, len: usize) -> usize {
    let last = (offset + len as u64 - 1) / image.cluster;
    (last - offset / image.cluster + 1) as usize
}

/// How the range is cut at the ends of clusters.
fn lengths(image: &Image, offset: u64, len: usize) -> impl Iterator<Item = usize> + use<> {
    let (cluster, end) = (image.cluster, offset + len as u64);
    let mut at = offset;
    std::iter::from_fn(move || {
        let n = (cluster - at % cluster).min(end - at);
        at += n;
        (n > 0).then_some(n as usize)
    })
}

fn submit<F>(image: &Arc<Image>, offset: u64, len: usize, mut answer: Answer, mut body: F)
where
    F: FnMut(usize) -> Body + Send + 'static,
{
    let count = pieces(image, offset, len);
    let Some(mut inside) = image.gate.enter(count as u64) else {
        if image.is_closed() {
            let error = Err(image.closed_error());
            return match answer {
                Answer::Read { reply, .. } => reply(error.map(|()| Bytes::new())),
                Answer::Write { reply, .. } => reply(error),
            };
        }
        let again = Arc::clone(image);
        image.outside(Box::new(move || submit(&again, offset, len, answer, body)));
        return;
    };
    if let Answer::Read { lens, .. } = &mut answer {
        *lens = lengths(image, offset, len).collect();
    }
    let request = Arc::new(Request {
        number: running::current(),
        left: AtomicUsize::new(count),
        state: Mutex::new((None, Some(answer))),
    });
    let mut at = offset;
    for (index, n) in lengths(image, offset, len).enumerate() {
        let (cluster, start) = (at / image.cluster, at % image.cluster);
        at += n as u64;
        let pio = Pio {
            image: Arc::clone(image),
            request: Arc::clone(&request),
            index,
            cluster,
            start,
            body: body(n),
            held: None,
            inside: Some(inside.split()),
            parked: None,
            finished: false,
        };
        pio.requeue();
    }
}

impl Pio {
    /// Runs the pio from its beginning; it holds no lock.
    pub(super) fn run(self) {
        let _executing = running::begin(self.request.number);
        match &self.body {
            Body::Read(_) => read::run(self),
            Body::Write(_) => write::run(self),
        }
    }

    /// Bytes that it is to write.
    pub(super) fn bytes(&self) -> u64 {
        match &self.body {
            Body::Write(data) => data.len() as u64,
            Body::Read(_) => 0,
        }
    }

    /// Room for what this read pio reads. The parts of a request are cut from one buffer.
    pub(super) fn make_room(&mut self) -> &mut BytesMut {
        let Body::Read(room) = &mut self.body else { unreachable!("only reads come here") };
        if room.is_empty()
            && let (_, Some(Answer::Read { lens, parts, .. })) = &mut *lock(&self.request.state)
        {
            if parts.is_empty() {
                let mut rest = BytesMut::zeroed(lens.iter().sum());
                *parts = lens.iter().map(|len| rest.split_to(*len)).collect();
            }
            *room = std::mem::take(&mut parts[self.index]);
        }
        room
    }

    /// Hands the pio to a runner, to run from its beginning.
    pub(super) fn requeue(self) {
        let image = Arc::clone(&self.image);
        image.submit(Box::new(move || self.run()));
    }

    /// Goes on with `then` once the cluster is locked: at once, or on the runner that is handed the lock.
    pub(super) fn with_lock(mut self, mode: LockMode, then: fn(Pio)) {
        let (image, cluster) = (Arc::clone(&self.image), self.cluster);
        image.with_cluster(cluster, mode, move || {
            let _executing = running::begin(self.request.number);
            self.held = Some(mode);
            then(self);
        });
    }

    /// Lets the cluster lock go.
    pub(super) fn unlock(&mut self) {
        if let Some(mode) = self.held.take() {
            self.image.unlock(self.cluster, mode);
        }
    }

    /// Releases the lock and starts over once the BAT page is loaded; loads it here when no other pio does.
    pub(super) fn run_with_page(mut self) {
        self.unlock();
        let (image, cluster) = (Arc::clone(&self.image), self.cluster);
        image.with_page(cluster, self, Pio::run, Pio::finish);
    }

    /// A place inside the gate for work that this pio starts and does not wait for.
    pub(super) fn companion(&self) -> Option<Inside> {
        self.inside.as_ref().map(|inside| self.image.gate.enter_with(inside))
    }

    /// Leaves the image while parked for space: a freeze does not wait for it.
    pub(super) fn leave(&mut self) {
        self.unlock();
        if let Some(inside) = self.inside.take() {
            self.image.gate.leave(inside);
        }
    }

    /// Comes back from being parked and runs; waits outside while the gate is closed.
    pub(super) fn come_back(mut self) {
        let image = Arc::clone(&self.image);
        match image.gate.enter(1) {
            Some(inside) => {
                self.inside = Some(inside);
                self.requeue();
            }
            None if image.is_closed() => {
                let e = image.closed_error();
                self.finish(Err(e));
            }
            None => image.outside(Box::new(move || self.come_back())),
        }
    }

    /// The end: releases everything and, as the last pio, answers the request.
    pub(super) fn finish(mut self, result: Result<()>) {
        self.end(result);
    }

    fn end(&mut self, result: Result<()>) {
        self.finished = true;
        self.leave();
        let mut state = lock(&self.request.state);
        match result {
            Err(e) => {
                state.0.get_or_insert(e);
            }
            Ok(()) => {
                if let (Some(Answer::Read { parts, .. }), Body::Read(data)) = (&mut state.1, &mut self.body) {
                    parts[self.index] = std::mem::take(data);
                }
            }
        }
        drop(state);
        if self.request.left.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.answer();
        }
    }

    fn answer(&self) {
        let (error, answer) = std::mem::take(&mut *lock(&self.request.state));
        match (error, answer) {
            (Some(e), Some(Answer::Read { reply, .. })) => reply(Err(e)),
            (Some(e), Some(Answer::Write { reply, .. })) => reply(Err(e)),
            (None, Some(Answer::Read { parts, reply, .. })) => {
                let mut parts = parts.into_iter();
                let mut whole = parts.next().unwrap_or_default();
                // The parts were split from one buffer, so that joining them moves no data.
                parts.for_each(|part| whole.unsplit(part));
                reply(Ok(whole.freeze()));
            }
            // O_DSYNC: no fsync follows from the kernel, so the write itself waits for a round (R6).
            (None, Some(Answer::Write { durable: true, reply })) => self.image.flush(reply),
            (None, Some(Answer::Write { durable: false, reply })) => reply(Ok(())),
            (_, None) => {}
        }
    }
}

impl Drop for Pio {
    /// A pio that is dropped unfinished (its runner panicked) answers EIO and keeps no lock.
    fn drop(&mut self) {
        if !self.finished {
            self.end(Err(Error::new(Kind::Io, "internal error: the request was dropped")));
        }
    }
}
