//! The host's end of a machine's network card: frames that wait to go either way.

use super::offload::{Accepts, Checksum, FRAME_BYTES_MAX, Offload};
use alloc::collections::VecDeque;
use alloc::vec::Vec;

/// Frames that wait in one direction.
pub(super) const QUEUED_FRAMES_MAX: usize = 256;
/// Their bytes.
pub(super) const QUEUED_BYTES_MAX: usize = 512 * 1024;

/// Frames in order, bounded in number and bytes. Each is as long as its memory.
#[derive(Clone, Debug, Default)]
struct FrameQueue {
    frames: VecDeque<(Vec<u8>, Offload)>,
    bytes: usize,
}

impl FrameQueue {
    /// Bytes of the longest frame that [`Self::push`] takes now.
    fn room(&self) -> usize {
        if self.frames.len() < QUEUED_FRAMES_MAX { QUEUED_BYTES_MAX - self.bytes } else { 0 }
    }

    /// Queues a frame that is not longer than [`Self::room`].
    fn push(&mut self, frame: Vec<u8>, offload: Offload) {
        self.bytes += frame.len();
        self.frames.push_back((frame, offload));
    }

    fn pop(&mut self) -> Option<(Vec<u8>, Offload)> {
        let (frame, offload) = self.frames.pop_front()?;
        self.bytes -= frame.len();
        Some((frame, offload))
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

/// What the host side of a machine's network card is: a cable's end.
#[derive(Clone, Debug)]
pub struct NetworkHost {
    from_guest: FrameQueue,
    to_guest: FrameQueue,
    sent: u64,
    mtu: u16,
    link_up: bool,
    link_changed: bool,
    ready: bool,
    accepts: Accepts,
}

impl NetworkHost {
    /// A cable that is plugged in, for frames of at most `mtu` bytes behind their Ethernet header.
    pub(super) fn new(mtu: u16) -> Self {
        Self {
            from_guest: FrameQueue::default(),
            to_guest: FrameQueue::default(),
            sent: 0,
            mtu,
            link_up: true,
            link_changed: false,
            ready: false,
            accepts: Accepts::default(),
        }
    }

    /// Whether frames wait, in either direction.
    pub(in crate::platform) fn has_frames(&self) -> bool {
        !self.from_guest.frames.is_empty() || !self.to_guest.frames.is_empty()
    }

    /// Whether [`Self::take_frame`] has a frame.
    #[must_use]
    pub fn has_frame(&self) -> bool {
        !self.from_guest.frames.is_empty()
    }

    /// Frames that the guest has ever sent.
    #[must_use]
    pub const fn sent(&self) -> u64 {
        self.sent
    }

    /// Takes the oldest frame of the guest in place of what `into` held; says what is left to do to it.
    pub fn take_frame(&mut self, into: &mut Vec<u8>) -> Option<Offload> {
        let (frame, offload) = self.from_guest.pop()?;
        *into = frame;
        Some(offload)
    }

    /// Queues a frame for the guest. False if there is no [`Self::room`] for it now.
    ///
    /// A frame that the guest cannot take is dropped, as a network card does: one that is longer than the MTU allows, has an
    /// [`Offload`] that is not as its type promises or asks for what the guest does not do ([`Self::accepts`]), or finds no driver
    /// or no link.
    #[must_use]
    pub fn give_frame(&mut self, frame: &[u8], offload: Offload) -> bool {
        let accepts = self.accepts();
        let unheard = offload.checksum == Checksum::Verified && !accepts.csum;
        let offload = if unheard { Offload { checksum: Checksum::Complete, ..offload } } else { offload };
        if !self.ready || !self.link_up || !offload.suits(frame.len(), accepts, self.mtu) {
            return true;
        }
        if frame.len() > self.to_guest.room() {
            return false;
        }
        self.to_guest.push(frame.to_vec(), offload);
        true
    }

    /// Bytes of the longest frame that [`Self::give_frame`] would queue now.
    #[must_use]
    pub fn room(&self) -> usize {
        self.to_guest.room().min(FRAME_BYTES_MAX)
    }

    /// The offloads that the guest takes. None before its driver is ready.
    #[must_use]
    pub const fn accepts(&self) -> Accepts {
        self.accepts
    }

    /// Plugs the cable in or out; the guest is told.
    pub const fn set_link(&mut self, up: bool) {
        self.link_changed |= self.link_up != up;
        self.link_up = up;
    }

    /// Whether the cable is plugged in.
    #[must_use]
    pub const fn link(&self) -> bool {
        self.link_up
    }

    /// Bytes of the largest packet in a frame.
    pub(super) const fn mtu(&self) -> u16 {
        self.mtu
    }

    /// Whether the guest has still to be told of a change of the link.
    pub(super) const fn link_changed(&self) -> bool {
        self.link_changed
    }

    /// The guest is told of the change.
    pub(super) const fn take_link_change(&mut self) -> bool {
        core::mem::replace(&mut self.link_changed, false)
    }

    /// The guest's driver is ready.
    pub(super) const fn start(&mut self, accepts: Accepts) {
        self.ready = true;
        self.accepts = accepts;
    }

    /// The driver has reset the device. What it sent before stays sent.
    pub(super) fn reset(&mut self) {
        self.ready = false;
        self.accepts = Accepts::default();
        self.to_guest.clear();
    }

    /// Whether the longest frame that a guest can send would be taken.
    pub(super) fn can_send(&self) -> bool {
        self.from_guest.room() >= FRAME_BYTES_MAX
    }

    /// A frame from the guest. [`Self::can_send`] was asked before. Without a link it goes nowhere.
    pub(super) fn send(&mut self, frame: Vec<u8>, offload: Offload) {
        if self.link_up && frame.len() <= self.from_guest.room() {
            self.sent += 1;
            self.from_guest.push(frame, offload);
        }
    }

    /// Whether a frame waits for the guest.
    pub(super) fn has_frame_for_guest(&self) -> bool {
        !self.to_guest.frames.is_empty()
    }

    /// The next frame for the guest, which stays in the queue.
    pub(super) fn next_for_guest(&self) -> Option<(&[u8], Offload)> {
        self.to_guest.frames.front().map(|(frame, offload)| (frame.as_slice(), *offload))
    }

    /// The next frame has been given to the guest, or never can be.
    pub(super) fn drop_for_guest(&mut self) {
        self.to_guest.pop();
    }
}
