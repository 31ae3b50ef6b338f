use super::super::driver::{Device, DriverQueue, EVENT_INDEX, Guest, INDIRECT, MAC, MTU, VERSION_1, bytes};
use super::host::{QUEUED_BYTES_MAX, QUEUED_FRAMES_MAX};
use super::*;
use crate::address::GuestPhysAddr;
use crate::platform::MachineEnd;
use alloc::collections::{BTreeMap, VecDeque};
use proptest::prelude::*;

const ID: u16 = 0x1041;
const ALL: u64 = u64::MAX;
const PLAIN: [u8; HEADER_BYTES] = [0; HEADER_BYTES];
/// TCP at byte 34, checksum at 16 in it, segments of 1448 bytes.
const SEGMENTED: [u8; HEADER_BYTES] = [1, 1, 0, 0, 0xA8, 5, 34, 0, 16, 0, 0, 0];

/// A machine with a network card and its driver.
struct Card {
    guest: Guest,
    device: Device,
    receive: DriverQueue,
    transmit: DriverQueue,
    /// Address and length of each receive buffer by its chain's head.
    buffers: BTreeMap<u32, (u64, u32)>,
}

impl Card {
    fn new(features: u64) -> Self {
        let mut guest = Guest::with_network();
        let device = guest.find(ID);
        let mut queues = device.initialize(&mut guest, features).into_iter();
        let (receive, transmit) = (queues.next().unwrap(), queues.next().unwrap());
        guest.interrupts();
        Self { guest, device, receive, transmit, buffers: BTreeMap::new() }
    }

    fn host(&mut self) -> &mut NetworkHost {
        self.guest.platform.network().unwrap()
    }

    fn put(&mut self, bytes: &[u8]) -> u64 {
        let at = self.guest.allocate(bytes.len() as u32);
        self.guest.ram.write(GuestPhysAddr(at), bytes).unwrap();
        at
    }

    /// Puts a frame with its header into the queue, in two buffers, without notifying.
    fn queue(&mut self, header: [u8; HEADER_BYTES], frame: &[u8]) {
        let (header, at) = (self.put(&header), self.put(frame));
        let mut chain = vec![(header, HEADER_BYTES as u32, false)];
        if !frame.is_empty() {
            chain.push((at, frame.len() as u32, false));
        }
        self.transmit.add(&mut self.guest, &chain);
    }

    fn notify(&mut self) {
        self.device.notify(&mut self.guest, &self.transmit);
    }

    fn send(&mut self, header: [u8; HEADER_BYTES], frame: &[u8]) {
        self.queue(header, frame);
        self.notify();
    }

    /// The host takes a frame, and the device sees to what that allows.
    fn take(&mut self) -> Option<(Vec<u8>, Offload)> {
        let mut frame = vec![];
        let offload = self.host().take_frame(&mut frame)?;
        self.guest.poll();
        Some((frame, offload))
    }

    fn add_buffers(&mut self, count: usize, length: u32) {
        for _ in 0..count {
            let at = self.guest.allocate(length);
            let head = self.receive.add(&mut self.guest, &[(at, length, true)]);
            self.buffers.insert(head.into(), (at, length));
        }
        if self.receive.wants_notification(&self.guest.ram, self.receive.added() - count as u16) {
            self.device.notify(&mut self.guest, &self.receive);
        }
    }

    /// The host gives a frame; whether it was taken.
    fn give(&mut self, frame: &[u8], offload: Offload) -> bool {
        let taken = self.host().give_frame(frame, offload);
        self.guest.poll();
        taken
    }

    /// The next frame the guest has received, with its header.
    fn received(&mut self) -> Option<([u8; HEADER_BYTES], Vec<u8>)> {
        let mut all = vec![];
        let mut count = 1;
        while count > 0 {
            let (head, length) = self.receive.take_used(&self.guest.ram)?;
            let (at, _) = self.buffers[&head];
            let part = bytes(&self.guest.ram, at, length as usize);
            if all.is_empty() {
                count = u16::from_le_bytes([part[10], part[11]]);
            }
            all.extend(part);
            count -= 1;
        }
        let frame = all.split_off(HEADER_BYTES);
        Some((all.try_into().unwrap(), frame))
    }
}

fn frame(length: usize, seed: u8) -> Vec<u8> {
    let mut frame: Vec<u8> =
        (0..length).map(|index| (index as u8).wrapping_mul(31).wrapping_add(seed)).collect();
    if let Some(data_offset) = frame.get_mut(46) {
        *data_offset = 0x80;
    }
    frame
}

fn segmented() -> Offload {
    Offload {
        checksum: Checksum::Partial { start: 34, offset: 16 },
        gso: Some(Gso { size: 1448, header_bytes: 66 }),
    }
}

#[test]
fn the_guest_finds_its_address_its_mtu_and_the_link() {
    let mut card = Card::new(ALL);
    let config = card.device.config;
    let mut read = |offset, width| card.guest.platform.pio_read(config + offset, width);
    let mac: Vec<u8> = (0..6).map(|offset| read(offset, 1) as u8).collect();
    assert_eq!((mac.as_slice(), read(6, 2), read(10, 2)), (MAC.as_slice(), 1, MTU.into()));
    assert_eq!(card.device.features(&mut card.guest) & 0xFFFF_FFFF & !(EVENT_INDEX | INDIRECT), 0x0001_88AB);
}

#[test]
fn frames_of_the_guest_reach_the_host_in_order() {
    for features in [VERSION_1, VERSION_1 | EVENT_INDEX, ALL] {
        let mut card = Card::new(features);
        for seed in 0..3 {
            card.send(PLAIN, &frame(60 + usize::from(seed), seed));
        }
        assert_eq!(card.host().sent(), 3);
        for seed in 0..3 {
            assert!(card.host().has_frame());
            assert_eq!(card.take(), Some((frame(60 + usize::from(seed), seed), Offload::default())));
            assert!(card.transmit.take_used(&card.guest.ram).is_some());
        }
        assert_eq!(card.take(), None);
    }
}

#[test]
fn what_is_left_to_do_to_a_frame_is_told_both_ways() {
    let mut card = Card::new(ALL);
    let long = frame(30_000, 1);
    card.send(SEGMENTED, &long);
    assert_eq!(card.take(), Some((long.clone(), segmented())));

    card.add_buffers(32, 1536);
    assert_eq!(card.host().accepts(), Accepts { csum: true, tso4: true });
    assert!(card.give(&long, segmented()));
    let (header, received) = card.received().unwrap();
    assert_eq!(header, [1, 1, 66, 0, 0xA8, 5, 34, 0, 16, 0, 20, 0], "20 buffers");
    assert_eq!(received, long);
    assert!(card.give(&frame(100, 2), Offload { checksum: Checksum::Verified, gso: None }));
    assert_eq!(card.received(), Some(([2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], frame(100, 2))));
}

#[test]
fn frames_that_cannot_be_are_dropped_and_the_machine_goes_on() {
    let mut card = Card::new(ALL);
    let mut impossible = SEGMENTED;
    impossible[1] = 9;
    card.send(impossible, &frame(2000, 0));
    card.send(PLAIN, &frame(13, 0));
    card.send(PLAIN, &[]);
    card.send(PLAIN, &frame(1515, 0));
    card.send(SEGMENTED, &frame(FRAME_BYTES_MAX + 1, 0));
    let at = card.put(&[0; 4]);
    card.transmit.add(&mut card.guest, &[(at, 4, false)]);
    card.notify();
    // A chain of nearly 4 GiB, which is not looked at.
    card.transmit.add(&mut card.guest, &[(0, 0xFFFF_0000, false)]);
    card.notify();
    assert!(!card.host().has_frame());
    let given_back = core::iter::from_fn(|| card.transmit.take_used(&card.guest.ram)).count();
    assert_eq!((given_back, card.guest.platform.end()), (7, None));
    card.send(PLAIN, &frame(60, 0));
    assert!(card.take().is_some());
}

#[test]
fn a_guest_that_agreed_to_nothing_sends_and_gets_plain_frames_only() {
    let mut card = Card::new(VERSION_1);
    assert_eq!(card.host().accepts(), Accepts::default());
    card.send(SEGMENTED, &frame(1000, 0));
    assert_eq!(card.take(), None);
    card.add_buffers(2, 1536);
    assert!(card.give(&frame(1000, 0), segmented()), "dropped");
    assert_eq!(card.received(), None);
    assert!(card.give(&frame(100, 0), Offload { checksum: Checksum::Verified, gso: None }));
    assert_eq!(card.received(), Some(([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], frame(100, 0))));
}

#[test]
fn a_full_host_leaves_the_rest_in_the_guests_queue_until_it_has_taken_some() {
    let mut card = Card::new(ALL);
    let long = frame(FRAME_BYTES_MAX, 1);
    let fits = QUEUED_BYTES_MAX / FRAME_BYTES_MAX;
    // The same buffer over and over, for want of RAM.
    let (header, at) = (card.put(&SEGMENTED), card.put(&long));
    for _ in 0..fits + 3 {
        card.transmit.add(&mut card.guest, &[(header, 12, false), (at, long.len() as u32, false)]);
    }
    card.notify();
    let used = |card: &mut Card| core::iter::from_fn(|| card.transmit.take_used(&card.guest.ram)).count();
    assert_eq!(used(&mut card), fits);
    assert!(!card.guest.platform.needs_poll(), "there is nothing to do until the host takes a frame");
    let before = card.transmit.added();
    assert!(!card.transmit.wants_notification(&card.guest.ram, before.wrapping_sub(1)));
    assert!(card.take().is_some());
    assert_eq!(used(&mut card), 1);
    let rest = core::iter::from_fn(|| card.take()).count();
    assert_eq!((rest, used(&mut card)), (fits + 2, 2));
}

#[test]
fn many_small_frames_are_bounded_too() {
    let mut card = Card::new(ALL);
    let (header, at) = (card.put(&PLAIN), card.put(&frame(60, 0)));
    for _ in 0..200 {
        card.transmit.add(&mut card.guest, &[(header, 12, false), (at, 60, false)]);
    }
    card.notify();
    for _ in 0..200 {
        card.transmit.add(&mut card.guest, &[(header, 12, false), (at, 60, false)]);
    }
    card.notify();
    assert_eq!(card.host().sent(), QUEUED_FRAMES_MAX as u64);
    assert_eq!(core::iter::from_fn(|| card.take()).count(), 400);
}

#[test]
fn the_guest_need_not_notify_while_the_host_has_frames_of_it() {
    let mut card = Card::new(ALL);
    card.send(PLAIN, &frame(60, 1));
    let before = card.transmit.added();
    card.queue(PLAIN, &frame(60, 2));
    assert!(!card.transmit.wants_notification(&card.guest.ram, before));
    assert_eq!(card.take(), Some((frame(60, 1), Offload::default())));
    assert_eq!(card.take(), Some((frame(60, 2), Offload::default())), "seen without a notification");
    let before = card.transmit.added();
    card.queue(PLAIN, &frame(60, 3));
    assert!(card.transmit.wants_notification(&card.guest.ram, before));
    card.notify();
    assert!(card.take().is_some());
}

#[test]
fn a_batch_for_the_guest_is_one_interrupt_if_it_wants_one() {
    let mut card = Card::new(ALL);
    card.add_buffers(8, 1536);
    card.receive.want_interrupt(&mut card.guest.ram);
    for seed in 0..3 {
        assert!(card.host().give_frame(&frame(60, seed), Offload::default()));
    }
    card.guest.poll();
    assert_eq!(card.guest.interrupts().len(), 1);
    assert!(card.give(&frame(60, 3), Offload::default()));
    assert_eq!(card.guest.interrupts(), [], "the driver has not looked yet");
    for seed in 0..4 {
        assert_eq!(card.received().unwrap().1, frame(60, seed));
    }
    card.receive.want_interrupt(&mut card.guest.ram);
    assert!(card.give(&frame(60, 4), Offload::default()));
    assert_eq!(card.guest.interrupts().len(), 1);
}

#[test]
fn frames_wait_for_buffers_and_the_guest_notifies_only_then() {
    let mut card = Card::new(ALL);
    card.add_buffers(2, 1536);
    assert!(card.give(&frame(5000, 1), segmented()));
    assert_eq!(card.received(), None);
    assert!(!card.guest.platform.needs_poll(), "nothing to do until there are buffers");
    card.add_buffers(1, 1536);
    assert_eq!(card.received(), None);
    card.add_buffers(4, 1536);
    let (header, received) = card.received().unwrap();
    assert_eq!((header[10], received), (4, frame(5000, 1)));
    let before = card.receive.added();
    assert!(!card.receive.wants_notification(&card.guest.ram, before.wrapping_sub(1)));
    assert!(card.give(&frame(60, 2), Offload::default()));
    assert_eq!(card.received().unwrap().1, frame(60, 2));
}

#[test]
fn the_host_is_refused_when_its_frames_wait_and_told_the_room() {
    let mut card = Card::new(ALL);
    assert_eq!(card.host().room(), FRAME_BYTES_MAX);
    let mut given = 0;
    while card.host().give_frame(&frame(FRAME_BYTES_MAX, 0), segmented()) {
        given += 1;
    }
    assert_eq!(given, QUEUED_BYTES_MAX / FRAME_BYTES_MAX);
    let room = card.host().room();
    assert!(room < FRAME_BYTES_MAX);
    let small = (0..).take_while(|_| card.host().give_frame(&frame(60, 0), Offload::default())).count();
    assert_eq!(small, (QUEUED_FRAMES_MAX - given).min(room / 60));
}

#[test]
fn a_guest_without_mergeable_buffers_gets_a_frame_in_one_chain_or_not_at_all() {
    let mut card = Card::new(ALL & !FEATURE_MERGEABLE_BUFFERS);
    card.add_buffers(1, 1000);
    card.add_buffers(1, 1514 + 12);
    assert!(card.give(&frame(1200, 1), Offload::default()), "dropped: the buffer in front is too small");
    assert!(card.give(&frame(900, 2), Offload::default()));
    assert!(card.give(&frame(1200, 3), Offload::default()));
    assert_eq!(card.received(), Some(([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], frame(900, 2))));
    assert_eq!(card.received().unwrap().1, frame(1200, 3));
}

#[test]
fn a_frame_that_a_whole_queue_of_buffers_does_not_hold_is_dropped() {
    let mut card = Card::new(ALL);
    for _ in 0..2 {
        card.add_buffers(128, 16);
    }
    assert!(card.give(&frame(8000, 1), segmented()));
    assert!(card.give(&frame(100, 2), Offload::default()));
    assert_eq!(card.received().unwrap().1, frame(100, 2));
    assert_eq!(card.guest.platform.end(), None);
}

#[test]
fn a_receive_buffer_too_small_for_a_header_ends_the_machine_with_the_reason() {
    let mut card = Card::new(ALL);
    card.add_buffers(1, 11);
    card.give(&frame(60, 0), Offload::default());
    let Some(MachineEnd::DeviceFault { device, reason }) = card.guest.platform.end() else { panic!() };
    assert_eq!(*device, "virtio-net");
    assert_eq!(reason, "queue 0: the chain at descriptor 0 has room for 11 bytes, but 12 are needed");
}

#[test]
fn the_guest_is_told_when_the_link_changes_and_nothing_passes_a_link_that_is_down() {
    let mut card = Card::new(ALL);
    card.add_buffers(2, 1536);
    let (config, generation) = (card.device.config, card.device.common + 0x15);
    assert_eq!(card.guest.platform.pio_read(generation, 1), 0);
    card.host().set_link(false);
    card.guest.poll();
    let interrupts = card.guest.interrupts();
    assert_eq!((interrupts.len(), interrupts[0].data), (1, 0x40), "the configuration's vector");
    assert_eq!(card.guest.platform.pio_read(config + 6, 2), 0);
    assert_eq!(card.guest.platform.pio_read(generation, 1), 1);
    card.host().set_link(false);
    card.guest.poll();
    assert_eq!(card.guest.interrupts(), [], "nothing has changed");

    card.send(PLAIN, &frame(60, 0));
    assert!(card.transmit.take_used(&card.guest.ram).is_some());
    assert!(card.give(&frame(60, 0), Offload::default()));
    assert_eq!((card.take(), card.received()), (None, None));
    card.host().set_link(true);
    card.guest.poll();
    assert!(card.give(&frame(60, 1), Offload::default()));
    assert_eq!(card.received().unwrap().1, frame(60, 1));
}

#[test]
fn after_a_reset_the_guest_gets_nothing_that_was_meant_for_the_driver_before() {
    let mut card = Card::new(ALL);
    card.send(PLAIN, &frame(60, 9));
    assert!(card.give(&frame(5000, 1), segmented()), "waits for buffers");
    card.device.set_status(&mut card.guest, 0);
    assert_eq!(card.host().accepts(), Accepts::default());
    assert!(card.give(&frame(60, 2), Offload::default()), "no driver: dropped");
    for ring in [card.receive.avail(), card.receive.used(), card.transmit.avail(), card.transmit.used()] {
        card.guest.ram.write(GuestPhysAddr(ring), &[0; 4]).unwrap();
    }
    let mut queues = card.device.initialize(&mut card.guest, ALL).into_iter();
    (card.receive, card.transmit) = (queues.next().unwrap(), queues.next().unwrap());
    card.add_buffers(4, 1536);
    assert!(card.give(&frame(60, 3), Offload::default()));
    assert_eq!(card.received().unwrap().1, frame(60, 3));
    assert_eq!(card.take(), Some((frame(60, 9), Offload::default())), "what was sent stays sent");
    assert_eq!(card.guest.platform.end(), None);
}

/// What a driver and a host do.
#[derive(Clone, Debug)]
enum Step {
    Send(usize),
    SendSegmented(usize),
    Take,
    AddBuffers(usize, u32),
    Give(usize),
    GiveSegmented(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (14_usize..1514).prop_map(Step::Send),
        (100_usize..20_000).prop_map(Step::SendSegmented),
        Just(Step::Take),
        (1_usize..6, 12_u32..3000).prop_map(|(count, length)| Step::AddBuffers(count, length)),
        (14_usize..1514).prop_map(Step::Give),
        (100_usize..20_000).prop_map(Step::GiveSegmented),
    ];
    prop::collection::vec(step, 0..40)
}

proptest! {
    #[test]
    fn every_frame_arrives_once_whole_and_in_order(
        steps in steps(),
        features in prop_oneof![Just(ALL), Just(ALL & !EVENT_INDEX), Just(ALL & !INDIRECT)],
    ) {
        let mut card = Card::new(features);
        let (mut to_host, mut to_guest) = (VecDeque::new(), VecDeque::new());
        for (seed, step) in (0_u8..).zip(steps) {
            match step {
                Step::Send(length) => {
                    card.send(PLAIN, &frame(length, seed));
                    to_host.push_back(frame(length, seed));
                }
                Step::SendSegmented(length) => {
                    card.send(SEGMENTED, &frame(length, seed));
                    to_host.push_back(frame(length, seed));
                }
                Step::Take => prop_assert_eq!(card.take().map(|taken| taken.0), to_host.pop_front()),
                Step::AddBuffers(count, length) => {
                    card.add_buffers(count, length);
                    card.device.notify(&mut card.guest, &card.receive);
                }
                Step::Give(length) => {
                    prop_assert!(card.give(&frame(length, seed), Offload::default()));
                    to_guest.push_back(frame(length, seed));
                }
                Step::GiveSegmented(length) => {
                    if card.give(&frame(length, seed), segmented()) {
                        to_guest.push_back(frame(length, seed));
                    }
                }
            }
            while let Some((_, received)) = card.received() {
                prop_assert_eq!(Some(received), to_guest.pop_front());
            }
            prop_assert!(!card.guest.platform.needs_poll());
            prop_assert_eq!(card.guest.platform.end(), None);
        }
        while let Some(sent) = to_host.pop_front() {
            prop_assert_eq!(card.take().map(|taken| taken.0), Some(sent));
        }
    }

    #[test]
    fn rubbish_in_the_rings_and_headers_never_breaks_what_the_host_may_rely_on(
        chains in prop::collection::vec(
            (any::<[u8; HEADER_BYTES]>(), prop::collection::vec(any::<u8>(), 0..200), 0_u32..70_000),
            1..20,
        ),
    ) {
        let mut card = Card::new(ALL);
        let agreed = Accepts { csum: true, tso4: true };
        for (mut header, start, more) in chains {
            header[1] &= 1;
            header[7] &= 1;
            let (header, at) = (card.put(&header), card.put(&start));
            let buffers = [(header, 12, false), (at, start.len() as u32, false), (0x20_0000, more, false)];
            card.transmit.add(&mut card.guest, &buffers);
            card.notify();
            while let Some((frame, offload)) = card.take() {
                prop_assert!(offload.suits(frame.len(), agreed, MTU));
            }
        }
        prop_assert_eq!(card.guest.platform.end(), None);
    }
}
