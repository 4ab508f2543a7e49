//! The keeper's way to the daemon: orders, and the descriptor that comes with one of them.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use crossbeam_channel::{Sender, bounded};

use super::wire::{self, Order};
use crate::error::Result;
use crate::io::handover;
use crate::io::process::spawn_detached as spawn;
use crate::sync::plain::lock;

/// Orders on their way to the daemon; more are dropped. A daemon that reads none must not keep its keeper from hearing a
/// signal, or its end.
const MAX_ORDERS: usize = 64;

/// An order, and what comes with it.
pub(super) type WithDescriptor = (Order, OwnedFd);

/// What goes together takes one place: of it nothing is dropped but all.
enum Sent {
    Alone(Order),
    All(Vec<WithDescriptor>),
}

type Line = Sender<Sent>;

/// The way to the standard input of the daemon that there is, through a thread that may wait for it.
#[derive(Clone)]
pub(super) struct Orders {
    /// Protects which daemon that is. A leaf.
    line: Arc<Mutex<Line>>,
}

impl Orders {
    /// Starts the thread, which sends `first` before all others.
    pub(super) fn start(to: UnixStream, first: Vec<WithDescriptor>) -> Result<Orders> {
        Ok(Orders { line: Arc::new(Mutex::new(begin(to, first)?)) })
    }

    /// From now on another daemon gets them, `first` before all others. What the one before has not read is lost with it.
    pub(super) fn renew(&self, to: UnixStream, first: Vec<WithDescriptor>) -> Result<()> {
        *lock(&self.line) = begin(to, first)?;
        Ok(())
    }

    /// Sends an order.
    pub(super) fn send(&self, order: Order) {
        let _ = lock(&self.line).try_send(Sent::Alone(order));
    }

    /// Sends orders with the descriptors that belong to them.
    pub(super) fn send_all(&self, orders: Vec<WithDescriptor>) {
        let _ = lock(&self.line).try_send(Sent::All(orders));
    }
}

fn begin(to: UnixStream, first: Vec<WithDescriptor>) -> Result<Line> {
    let (sender, orders) = bounded::<Sent>(MAX_ORDERS);
    let send = move |sent: Sent| {
        let put = |order: &Order, descriptor: Option<&OwnedFd>| {
            handover::send(&to, &wire::line(order)?, descriptor.map(AsFd::as_fd))
        };
        match sent {
            Sent::Alone(order) => put(&order, None),
            // Each is closed as soon as it is on its way.
            Sent::All(all) => all.into_iter().try_for_each(|(order, with)| put(&order, Some(&with))),
        }
    };
    // A daemon that is gone is noticed by its silence.
    spawn("keeper/orders", move || {
        drop(std::iter::once(Sent::All(first)).chain(orders.iter()).try_for_each(send));
    })?;
    Ok(sender)
}
