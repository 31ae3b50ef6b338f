//! What machines send: to the gateway, or through it.

use smoltcp::wire::{Icmpv4Packet, IpProtocol, UdpPacket};

use super::{MachineKey, Network};
use crate::frame::{self, Checksum, ETHERNET, IPV4, Offload, Output};
use crate::icmp::{self, Error};
use crate::ip::Header;
use crate::link::{GATEWAY, MACHINE};
use crate::nat::FlowKey;
use crate::nat::rewrite::{self, End};
use crate::policy::{self, Policy};
use crate::records::Protocol;
use crate::transport::{self, Transport};
use crate::{dhcp, dns, fragments, segments};
use core::net::Ipv4Addr;

/// The port of DHCP servers.
const DHCP: u16 = 67;

impl<P: Policy> Network<P> {
    /// Takes a machine's packet, from the frame's Ethernet header on.
    pub(super) fn packet_from_machine(
        &mut self,
        key: MachineKey,
        frame: &mut [u8],
        header: Header,
        offload: Offload,
        now: u64,
        out: &mut impl Output,
    ) {
        let Some(packet) = frame.get(ETHERNET..) else { return };
        let to_gateway = header.destination == GATEWAY || header.destination == Ipv4Addr::BROADCAST;
        if to_gateway && !is_dns_by_tcp(packet, &header) {
            return self.packet_to_gateway(key, packet, &header, now, out);
        }
        // Options could name hops of the machine's choice, past the policy (RFC 7126, 4.3); nothing else needs them.
        if header.source != MACHINE || header.bytes != IPV4 {
            self.counters.invalid += 1;
            return;
        }
        let Some(fragment) = header.fragment else {
            return self.forward(key, frame, header, offload, now, out);
        };
        if offload != Offload::default() {
            self.counters.invalid += 1;
            return;
        }
        let Some(machine) = self.machines.get_mut(&key) else { return };
        let Some(mut whole) = machine.fragments.take(&header, fragment, packet, now) else { return };
        if let Some(header) = whole.get(ETHERNET..).and_then(Header::read) {
            self.forward(key, &mut whole, header, offload, now, out);
        }
    }

    /// What the gateway itself answers.
    fn packet_to_gateway(
        &mut self,
        key: MachineKey,
        packet: &[u8],
        header: &Header,
        now: u64,
        out: &mut impl Output,
    ) {
        let payload = header.payload(packet);
        if header.fragment.is_some() {
            return;
        }
        let mine = header.source == MACHINE && header.destination == GATEWAY;
        match header.protocol {
            IpProtocol::Udp => {
                let Ok(datagram) = UdpPacket::new_checked(payload) else {
                    self.counters.invalid += 1;
                    return;
                };
                match datagram.dst_port() {
                    DHCP => {
                        if let Some(answer) = dhcp::answer(datagram.payload()) {
                            self.give(key, &answer, out);
                        }
                    }
                    dns::PORT if mine => self.look_up(key, datagram.src_port(), datagram.payload(), now, out),
                    _ if mine => self.complain(key, Error::PortUnreachable, packet, header, now, out),
                    _ => {}
                }
            }
            IpProtocol::Icmp if mine => {
                if let Some(answer) = icmp::echo(payload) {
                    self.give(key, &answer, out);
                }
            }
            IpProtocol::Tcp if mine => {
                if let Some(transport) = Transport::read(header.protocol, payload) {
                    self.reset_machine(key, header, &transport, out);
                }
            }
            _ => {}
        }
    }

    /// Sends a packet on, if the machine may.
    fn forward(
        &mut self,
        key: MachineKey,
        frame: &mut [u8],
        header: Header,
        offload: Offload,
        now: u64,
        out: &mut impl Output,
    ) {
        let Some(packet) = frame.get_mut(ETHERNET..ETHERNET + header.total) else { return };
        let Some(transport) = Transport::read(header.protocol, header.payload(packet)) else {
            if header.protocol == IpProtocol::Icmp {
                return self.forward_error(key, frame, &header, now, out);
            }
            return self.complain(key, Error::Prohibited, packet, &header, now, out);
        };
        if !is_offload_right(&offload, &header, &transport)
            || (transport.protocol == Protocol::Icmp && !transport.echo_request)
        {
            self.counters.invalid += 1;
            return;
        }
        let icmp = transport.protocol == Protocol::Icmp;
        let flow = FlowKey {
            protocol: transport.protocol,
            port: transport.source_port,
            remote: header.destination,
            remote_port: if icmp { 0 } else { transport.destination_port },
        };
        let Some(machine) = self.machines.get(&key) else { return };
        let first = transport.protocol != Protocol::Tcp || (transport.tcp.syn && !transport.tcp.ack);
        let known = machine.flows.get(&flow).is_some() && !(first && machine.flows.is_over(&flow));
        if !known {
            if !first {
                // Nobody knows this connection (any more).
                return self.reset_machine(key, &header, &transport, out);
            }
            let to_gateway = header.destination == GATEWAY;
            if self.uplink.is_none() && (to_gateway || policy::closed(header.destination, None).is_none()) {
                return self.complain(key, Error::NetUnreachable, packet, &header, now, out);
            }
            if self.open(key, flow, now, out).is_err() {
                if transport.protocol == Protocol::Tcp {
                    return self.reset_machine(key, &header, &transport, out);
                }
                return self.complain(key, Error::Prohibited, packet, &header, now, out);
            }
        }
        if header.ttl <= 1 {
            return self.complain(key, Error::TimeExceeded, packet, &header, now, out);
        }
        let Some(uplink) = &self.uplink else { return };
        let mapping = self.machines.get(&key).and_then(|machine| machine.flows.get(&flow));
        let Some(beyond) = mapping.map(|mapping| mapping.beyond) else { return };
        let Some(hop) = uplink.next_hop(beyond.0) else {
            return self.complain(key, Error::NetUnreachable, packet, &header, now, out);
        };
        let mtu = uplink.mtu();
        let too_big = header.total > mtu && offload.gso.is_none();
        if too_big && header.dont_fragment {
            return self.complain(key, Error::TooBig(mtu as u16), packet, &header, now, out);
        }
        let Some(machine) = self.machines.get_mut(&key) else { return };
        let Some((port, due)) = machine.flows.pass(&flow, true, &transport.tcp, transport.payload_bytes, now)
        else {
            return;
        };
        self.sweep_due = self.sweep_due.min(due);
        let complete = offload.checksum == Checksum::Complete || offload.checksum == Checksum::Verified;
        rewrite::replace(packet, &header, transport.protocol, End::Source, (uplink.address, port), complete);
        if flow.end() != beyond {
            rewrite::replace(packet, &header, transport.protocol, End::Destination, beyond, complete);
        }
        rewrite::count_hop(packet, &header);
        if !complete && offload.gso.is_none() {
            let payload = header.payload_mut(packet);
            transport::complete(uplink.address, beyond.0, transport.protocol, payload);
        }
        if transport.tcp.syn {
            let most = uplink.largest_segment();
            transport::clamp_mss(header.payload_mut(packet), transport.header_bytes, most);
        }
        let header = Header { source: uplink.address, destination: beyond.0, ..header };
        let (neighbors, counters) = (&mut self.neighbors, &mut self.counters);
        let mut send = |frame: &mut [u8]| {
            let sent = neighbors.send(hop, frame, uplink, now, out);
            counters.no_room += u64::from(!sent);
        };
        if let Some(gso) = offload.gso {
            let most = mtu.saturating_sub(header.bytes + transport.header_bytes);
            let size = usize::from(gso.size).min(most);
            segments::cut(frame, &header, transport.header_bytes, size, &mut self.scratch, send);
        } else if too_big {
            self.ident = self.ident.wrapping_add(1);
            fragments::cut(frame, &header, self.ident, mtu, send);
        } else if let Some(frame) = frame.get_mut(..ETHERNET + header.total) {
            send(frame);
        }
    }

    /// Sends on an ICMP error of a machine's about a packet that it got (RFC 5508, 4.3).
    fn forward_error(
        &mut self,
        key: MachineKey,
        frame: &mut [u8],
        header: &Header,
        now: u64,
        out: &mut impl Output,
    ) {
        let Some(packet) = frame.get_mut(ETHERNET..ETHERNET + header.total) else { return };
        let Some(uplink) = &self.uplink else { return };
        // Errors quote no more than what makes them as long as every link takes (RFC 1812, 4.3.2.3).
        if header.total > uplink.mtu() {
            self.counters.invalid += 1;
            return;
        }
        let about = icmp::quoted(header.payload(packet));
        let Some((inner, protocol, ports)) = about.filter(|(inner, ..)| inner.destination == MACHINE) else {
            self.counters.invalid += 1;
            return;
        };
        let flow = FlowKey {
            protocol,
            port: ports.1,
            remote: inner.source,
            remote_port: if protocol == Protocol::Icmp { 0 } else { ports.0 },
        };
        // To whom it goes is to be who sent what it is about: an error is no way around the policy.
        let mapping = self.machines.get(&key).and_then(|machine| machine.flows.get(&flow));
        let (Some(port), true) = (mapping.map(|mapping| mapping.port), header.destination == inner.source)
        else {
            return;
        };
        let Some(hop) = uplink.next_hop(header.destination) else { return };
        let message = header.payload_mut(packet);
        if let Some(quoted) = message.get_mut(icmp::ERROR..) {
            rewrite::replace(quoted, &inner, protocol, End::Destination, (uplink.address, port), true);
        }
        if let Ok(mut icmp) = Icmpv4Packet::new_checked(message) {
            icmp.fill_checksum();
        }
        rewrite::replace_address(packet, header, End::Source, uplink.address);
        rewrite::count_hop(packet, header);
        if let Some(frame) = frame.get_mut(..ETHERNET + header.total) {
            let sent = self.neighbors.send(hop, frame, uplink, now, out);
            self.counters.no_room += u64::from(!sent);
        }
    }

    /// Tells a machine by ICMP why its packet did not go on.
    fn complain(
        &mut self,
        key: MachineKey,
        error: Error,
        packet: &[u8],
        header: &Header,
        now: u64,
        out: &mut impl Output,
    ) {
        let Some(machine) = self.machines.get_mut(&key) else { return };
        if !machine.errors.take(now) {
            return;
        }
        if let Some(frame) = icmp::error(error, packet, header) {
            self.give(key, &frame, out);
        }
    }

    /// Answers a machine's TCP segment with a reset.
    fn reset_machine(
        &mut self,
        key: MachineKey,
        header: &Header,
        transport: &Transport,
        out: &mut impl Output,
    ) {
        let Some((sequence, acknowledgement)) = transport::reset_for(&transport.tcp, transport.payload_bytes)
        else {
            return;
        };
        let source = (header.destination, transport.destination_port);
        let destination = (MACHINE, transport.source_port);
        let segment = transport::reset(source, destination, sequence, acknowledgement);
        let frame = frame::to_machine(source.0, MACHINE, IpProtocol::Tcp, &segment);
        self.give(key, &frame, out);
    }
}

/// Whether a packet to the gateway is of a connection to its DNS server. Such connections are translated to one outside: answers come
/// whole from there, and nothing here has to put a stream together.
fn is_dns_by_tcp(packet: &[u8], header: &Header) -> bool {
    header.destination == GATEWAY
        && header.protocol == IpProtocol::Tcp
        && header.fragment.is_none()
        && Transport::read(header.protocol, header.payload(packet))
            .is_some_and(|transport| transport.destination_port == dns::PORT)
}

/// Whether what a machine leaves to us is what virtio lets it: the checksum of the packet's own TCP or UDP header, and cuts of TCP.
fn is_offload_right(offload: &Offload, header: &Header, transport: &Transport) -> bool {
    let partial = match offload.checksum {
        Checksum::Complete | Checksum::Verified => false,
        Checksum::Partial { start, offset } => {
            let right = usize::from(start) == ETHERNET + header.bytes
                && usize::from(offset) == transport.checksum_at();
            if !right || transport.protocol == Protocol::Icmp {
                return false;
            }
            true
        }
    };
    offload.gso.is_none_or(|gso| partial && gso.size > 0 && transport.protocol == Protocol::Tcp)
}
