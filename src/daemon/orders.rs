//! The keeper's way to the daemon: orders, and the descriptor that comes with one of them.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use crossbeam_channel::{Sender, bounded};

use super::wire::{self, Order};
use crate::error::Result;
use crate::io::handover;
use crate::io::process::spawn_detached as spawn;

/// Orders on their way to the daemon; more are dropped. A daemon that reads none must not keep its keeper from hearing a
/// signal, or its end.
const MAX_ORDERS: usize = 64;

/// The way to the daemon's standard input, through a thread that may wait for it.
#[derive(Clone)]
pub(super) struct Orders(Sender<(Order, Option<OwnedFd>)>);

impl Orders {
    /// Starts the thread.
    pub(super) fn start(to: UnixStream) -> Result<Orders> {
        let (sender, orders) = bounded::<(Order, Option<OwnedFd>)>(MAX_ORDERS);
        let send = move |(order, descriptor): (Order, Option<OwnedFd>)| {
            handover::send(&to, &wire::line(&order)?, descriptor.as_ref().map(AsFd::as_fd))
        };
        // A daemon that is gone is noticed by its silence.
        spawn("keeper/orders", move || drop(orders.iter().try_for_each(send)))?;
        Ok(Orders(sender))
    }

    /// Sends an order.
    pub(super) fn send(&self, order: Order) {
        let _ = self.0.try_send((order, None));
    }

    /// Sends a descriptor with the order, and keeps none.
    pub(super) fn send_with(&self, order: Order, descriptor: OwnedFd) {
        let _ = self.0.try_send((order, Some(descriptor)));
    }
}
