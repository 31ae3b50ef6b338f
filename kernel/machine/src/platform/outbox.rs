//! Interrupt messages that wait to be delivered.

use crate::interrupt::MsiMessage;
use alloc::collections::VecDeque;

/// More messages than all vectors and lines of a machine; only a guest that rewrites its MSI-X tables meanwhile reaches it.
const MESSAGES_MAX: usize = 64;

/// Messages in the order they were sent. Equal ones merge, as they would in a local APIC.
#[derive(Clone, Debug, Default)]
pub(super) struct Outbox {
    messages: VecDeque<MsiMessage>,
}

impl Outbox {
    /// Sends a message. Beyond [`MESSAGES_MAX`] it is lost.
    pub(super) fn send(&mut self, message: MsiMessage) {
        if self.messages.len() < MESSAGES_MAX && !self.messages.contains(&message) {
            self.messages.push_back(message);
        }
    }

    /// The oldest message.
    pub(super) fn take(&mut self) -> Option<MsiMessage> {
        self.messages.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_messages_merge_and_order_is_kept() {
        let mut outbox = Outbox::default();
        let message = |data| MsiMessage { address: 0xFEE0_0000, data };
        [1, 2, 1, 3].into_iter().for_each(|data| outbox.send(message(data)));
        let taken: alloc::vec::Vec<_> = core::iter::from_fn(|| outbox.take()).map(|m| m.data).collect();
        assert_eq!(taken, [1, 2, 3]);
    }

    #[test]
    fn the_outbox_is_bounded() {
        let mut outbox = Outbox::default();
        (0..1000).for_each(|data| outbox.send(MsiMessage { address: 0, data }));
        assert_eq!(core::iter::from_fn(|| outbox.take()).count(), MESSAGES_MAX);
    }
}
