use super::super::connection::{
    AGENT_PORT, HOST_CID, RECEIVE_BUFFER_BYTES, SEND_BUFFER_BYTES, VsockState, op,
};
use super::super::driver::{Device, DriverQueue, EVENT_INDEX, GUEST_CID, Guest, INDIRECT, VERSION_1, bytes};
use super::*;
use crate::address::GuestPhysAddr;
use crate::platform::MachineEnd;
use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

const ID: u16 = 0x1053;
const GUEST_PORT: u32 = 5555;
const RECEIVE_BUFFER: u32 = 4096;

/// A guest with an initialized vsock.
struct Socket {
    guest: Guest,
    device: Device,
    receive: DriverQueue,
    transmit: DriverQueue,
    /// Address of each receive buffer by its chain's head.
    buffers: BTreeMap<u32, u64>,
}

impl Socket {
    fn new(features: u64) -> Self {
        let mut guest = Guest::new();
        let device = guest.find(ID);
        let mut queues = device.initialize(&mut guest, features).into_iter();
        let (receive, transmit) = (queues.next().unwrap(), queues.next().unwrap());
        Self { guest, device, receive, transmit, buffers: BTreeMap::new() }
    }

    /// With receive buffers, and connected.
    fn connected() -> Self {
        let mut socket = Self::new(VERSION_1 | EVENT_INDEX | INDIRECT);
        socket.add_buffers(16);
        socket.send(op::REQUEST, &[]);
        let (response, _) = socket.take().unwrap();
        assert_eq!(response.op, op::RESPONSE);
        socket
    }

    fn add_buffers(&mut self, count: usize) {
        for _ in 0..count {
            let at = self.guest.allocate(RECEIVE_BUFFER + 44);
            let buffers = [(at, 44, true), (at + 44, RECEIVE_BUFFER, true)];
            let head = self.receive.add(&mut self.guest, &buffers);
            self.buffers.insert(head.into(), at);
        }
    }

    fn header(&self, op: u16, length: usize) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: GUEST_PORT,
            dst_port: AGENT_PORT,
            len: length as u32,
            kind: 1,
            op,
            flags: 0,
            buf_alloc: 8192,
            fwd_cnt: 0,
        }
    }

    fn send(&mut self, op: u16, payload: &[u8]) {
        self.send_packet(&self.header(op, payload.len()), payload);
    }

    fn send_packet(&mut self, header: &Header, payload: &[u8]) {
        let at = self.guest.allocate(44 + payload.len() as u32);
        self.guest.ram.write(GuestPhysAddr(at), &header.to_bytes()).unwrap();
        self.guest.ram.write(GuestPhysAddr(at + 44), payload).unwrap();
        let mut buffers = vec![(at, 44, false)];
        if !payload.is_empty() {
            buffers.push((at + 44, payload.len() as u32, false));
        }
        self.transmit.add(&mut self.guest, &buffers);
        self.device.notify(&mut self.guest, &self.transmit);
        if self.guest.platform.end().is_none() {
            assert!(self.transmit.take_used(&self.guest.ram).is_some());
        }
    }

    /// The next packet from the host.
    fn take(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, length) = self.receive.take_used(&self.guest.ram)?;
        let at = self.buffers[&head];
        let header = Header::from_bytes(&bytes(&self.guest.ram, at, 44).try_into().unwrap());
        assert_eq!(length, 44 + header.len);
        Some((header, bytes(&self.guest.ram, at + 44, header.len as usize)))
    }

    fn host(&mut self) -> &mut VsockHost {
        self.guest.platform.vsock()
    }
}

#[test]
fn the_guest_finds_its_context_id() {
    let mut socket = Socket::new(VERSION_1);
    let port = socket.device.config;
    assert_eq!(socket.guest.platform.pio_read(port, 4), 3);
    assert_eq!(socket.guest.platform.pio_read(port + 4, 4), 0);
}

#[test]
fn a_connection_carries_bytes_both_ways() {
    for features in [VERSION_1, VERSION_1 | EVENT_INDEX, VERSION_1 | EVENT_INDEX | INDIRECT] {
        let mut socket = Socket::new(features);
        socket.add_buffers(4);
        assert_eq!(socket.host().state(), VsockState::Listening);
        socket.send(op::REQUEST, &[]);
        assert_eq!(socket.host().state(), VsockState::Connected);
        let (response, _) = socket.take().unwrap();
        assert_eq!((response.op, response.buf_alloc), (op::RESPONSE, RECEIVE_BUFFER_BYTES as u32));
        assert_eq!((response.src_port, response.dst_port), (AGENT_PORT, GUEST_PORT));

        socket.send(op::RW, b"hello from the guest");
        let mut received = [0; 64];
        assert_eq!(socket.host().readable(), 20);
        assert_eq!(socket.host().receive(&mut received), 20);
        assert_eq!(&received[..20], b"hello from the guest");

        assert_eq!(socket.host().send(b"hello from the host"), 19);
        assert!(socket.guest.platform.needs_poll());
        socket.guest.interrupts();
        if features & EVENT_INDEX != 0 {
            socket.receive.want_interrupt(&mut socket.guest.ram);
        }
        socket.guest.poll();
        let (packet, payload) = socket.take().unwrap();
        assert_eq!((packet.op, packet.fwd_cnt), (op::RW, 20));
        assert_eq!(payload, b"hello from the host");
        assert_eq!(socket.guest.interrupts()[0].data, 0x41, "the vector of the queues");
    }
}

#[test]
fn the_driver_need_not_announce_receive_buffers_until_the_host_lacks_one() {
    let mut socket = Socket::new(VERSION_1 | EVENT_INDEX);
    socket.add_buffers(1);
    assert!(!socket.receive.wants_notification(&socket.guest.ram, 0));
    socket.send(op::REQUEST, &[]);
    assert_eq!(socket.take().unwrap().0.op, op::RESPONSE);

    socket.host().send(b"wait");
    socket.guest.poll();
    assert!(!socket.guest.platform.needs_poll(), "nothing to do until there is a buffer");
    let before = socket.receive.added();
    socket.add_buffers(1);
    assert!(socket.receive.wants_notification(&socket.guest.ram, before));
    socket.device.notify(&mut socket.guest, &socket.receive);
    assert_eq!(socket.take().unwrap().1, b"wait");
}

#[test]
fn the_host_never_sends_more_than_the_guest_has_room_for() {
    let mut socket = Socket::connected();
    let data: Vec<u8> = (0..20_000_u32).map(|index| index as u8).collect();
    assert_eq!(socket.host().send(&data), 20_000);
    socket.guest.poll();
    let mut arrived = Vec::new();
    while let Some((_, payload)) = socket.take() {
        arrived.extend(payload);
    }
    assert_eq!(arrived.len(), 8192, "the guest's buf_alloc");
    let update = Header { fwd_cnt: 5000, ..socket.header(op::CREDIT_UPDATE, 0) };
    socket.send_packet(&update, &[]);
    while let Some((_, payload)) = socket.take() {
        arrived.extend(payload);
    }
    assert_eq!(arrived.len(), 13_192);
    assert_eq!(arrived, data[..13_192]);
    assert_eq!(socket.host().unsent(), 20_000 - 13_192);
}

#[test]
fn the_guest_learns_of_room_once_half_the_buffer_was_read() {
    let mut socket = Socket::connected();
    let chunk = vec![7; 32 * 1024];
    for _ in 0..4 {
        socket.send(op::RW, &chunk);
    }
    assert_eq!(socket.host().readable(), RECEIVE_BUFFER_BYTES);
    let mut into = vec![0; 40_000];
    socket.host().receive(&mut into);
    assert!(!socket.guest.platform.needs_poll());
    socket.host().receive(&mut into);
    socket.guest.poll();
    let (update, _) = socket.take().unwrap();
    assert_eq!((update.op, update.fwd_cnt), (op::CREDIT_UPDATE, 80_000));
    assert!(socket.take().is_none());
}

#[test]
fn a_guest_that_ignores_its_credit_is_disconnected_and_nothing_more_is_held() {
    let mut socket = Socket::connected();
    for _ in 0..5 {
        socket.send(op::RW, &vec![7; 32 * 1024]);
    }
    assert_eq!(socket.take().unwrap().0.op, op::RST);
    assert_eq!(socket.host().state(), VsockState::Closed);
    assert_eq!(socket.host().readable(), RECEIVE_BUFFER_BYTES);
}

#[test]
fn a_credit_request_is_answered() {
    let mut socket = Socket::connected();
    socket.send(op::CREDIT_REQUEST, &[]);
    let (update, _) = socket.take().unwrap();
    assert_eq!((update.op, update.buf_alloc), (op::CREDIT_UPDATE, RECEIVE_BUFFER_BYTES as u32));
}

#[test]
fn other_ports_other_hosts_and_second_connections_are_reset() {
    let mut socket = Socket::connected();
    let request = socket.header(op::REQUEST, 0);
    let wrong = [
        Header { dst_port: 22, ..request },
        Header { dst_cid: 9, ..request },
        Header { src_cid: 9, ..request },
        Header { kind: 2, ..request },
        Header { src_port: 6666, ..request },
        Header { src_port: 6666, op: op::RW, ..request },
        Header { op: op::RW, dst_port: 22, ..request },
    ];
    for packet in wrong {
        socket.send_packet(&packet, &[]);
        let (reset, _) = socket.take().unwrap();
        assert_eq!(reset.op, op::RST, "{packet:?}");
        assert_eq!((reset.src_cid, reset.src_port), (packet.dst_cid, packet.dst_port));
        assert_eq!((reset.dst_cid, reset.dst_port), (packet.src_cid, packet.src_port));
        socket.send_packet(&Header { op: op::RST, src_port: 6666, ..packet }, &[]);
        assert!(socket.take().is_none(), "a reset is never answered");
    }
    assert_eq!(socket.host().state(), VsockState::Connected);
}

#[test]
fn the_guests_shutdown_is_confirmed_and_what_it_sent_stays_readable() {
    let mut socket = Socket::connected();
    socket.send(op::RW, b"last words");
    let half = Header { flags: 2, ..socket.header(op::SHUTDOWN, 0) };
    socket.send_packet(&half, &[]);
    assert_eq!(socket.host().state(), VsockState::Connected);
    assert!(socket.host().guest_finished());
    let full = Header { flags: 3, ..half };
    socket.send_packet(&full, &[]);
    assert_eq!(socket.take().unwrap().0.op, op::RST);
    assert_eq!(socket.host().state(), VsockState::Closed);
    let mut into = [0; 16];
    assert_eq!(socket.host().receive(&mut into), 10);
    assert_eq!(socket.host().send(b"x"), 0);
}

#[test]
fn the_hosts_shutdown_follows_everything_it_sent() {
    let mut socket = Socket::connected();
    socket.host().send(b"bye");
    socket.host().shutdown();
    assert_eq!(socket.host().send(b"more"), 0);
    socket.guest.poll();
    assert_eq!(socket.take().unwrap().1, b"bye");
    let (shutdown, _) = socket.take().unwrap();
    assert_eq!((shutdown.op, shutdown.flags), (op::SHUTDOWN, 3));
    socket.send(op::RST, &[]);
    assert_eq!(socket.host().state(), VsockState::Closed);
    assert!(!socket.guest.platform.needs_poll());
}

#[test]
fn a_guests_reset_closes_the_connection_and_no_second_one_is_made() {
    let mut socket = Socket::connected();
    socket.send(op::RST, &[]);
    assert_eq!(socket.host().state(), VsockState::Closed);
    socket.send(op::REQUEST, &[]);
    assert_eq!(socket.take().unwrap().0.op, op::RST);
}

#[test]
fn a_driver_that_resets_the_device_loses_its_connection() {
    let mut socket = Socket::connected();
    socket.device.set_status(&mut socket.guest, 0);
    assert_eq!(socket.host().state(), VsockState::Closed);
    let mut fresh = Socket::new(VERSION_1);
    fresh.device.set_status(&mut fresh.guest, 0);
    assert_eq!(fresh.host().state(), VsockState::Listening);
}

#[test]
fn packets_are_left_in_the_queue_while_replies_have_no_buffers() {
    let mut socket = Socket::new(VERSION_1 | EVENT_INDEX | INDIRECT);
    let request = Header { dst_port: 22, ..socket.header(op::REQUEST, 0) };
    let at = socket.guest.allocate(44);
    socket.guest.ram.write(GuestPhysAddr(at), &request.to_bytes()).unwrap();
    for _ in 0..100 {
        socket.transmit.add(&mut socket.guest, &[(at, 44, false)]);
    }
    socket.device.notify(&mut socket.guest, &socket.transmit);
    let handled = core::iter::from_fn(|| socket.transmit.take_used(&socket.guest.ram)).count();
    assert!(handled < 100 && !socket.guest.platform.needs_poll());
    socket.add_buffers(120);
    socket.device.notify(&mut socket.guest, &socket.receive);
    let more = core::iter::from_fn(|| socket.transmit.take_used(&socket.guest.ram)).count();
    assert_eq!(handled + more, 100);
    let resets = core::iter::from_fn(|| socket.take()).filter(|(header, _)| header.op == op::RST).count();
    assert_eq!(resets, 100);
}

#[test]
fn a_packet_longer_than_its_buffers_is_a_fault() {
    let mut socket = Socket::connected();
    let lie = Header { len: 100, ..socket.header(op::RW, 0) };
    socket.send_packet(&lie, b"short");
    let Some(MachineEnd::DeviceFault { device, reason }) = socket.guest.platform.end() else { panic!() };
    assert_eq!(*device, "virtio-vsock");
    assert!(reason.contains("queue 1") && reason.contains("more than its buffers hold"), "{reason}");
}

#[test]
fn a_receive_buffer_with_no_room_for_a_header_is_a_fault() {
    let mut socket = Socket::new(VERSION_1);
    let at = socket.guest.allocate(16);
    socket.receive.add(&mut socket.guest, &[(at, 16, true)]);
    socket.send(op::REQUEST, &[]);
    let end = alloc::format!("{}", socket.guest.platform.end().unwrap());
    assert!(end.contains("queue 0") && end.contains("room for 16 bytes, but 45 are needed"), "{end}");
}

#[test]
fn the_hosts_send_buffer_is_bounded() {
    let mut socket = Socket::connected();
    let data = vec![1; 2 * SEND_BUFFER_BYTES];
    assert_eq!(socket.host().send_capacity(), SEND_BUFFER_BYTES);
    assert_eq!(socket.host().send(&data), SEND_BUFFER_BYTES);
    assert_eq!(socket.host().send_capacity(), 0);
}
