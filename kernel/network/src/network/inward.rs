//! What comes from the uplink for machines.

use core::net::SocketAddrV4;

use smoltcp::wire::{Icmpv4Packet, IpProtocol};

use super::Network;
use crate::frame::{ETHERNET, Output, set_ethernet};
use crate::icmp;
use crate::ip::Header;
use crate::link::{self, GATEWAY_MAC, MACHINE, MACHINE_MAC};
use crate::nat::Owner;
use crate::nat::rewrite::{self, End};
use crate::policy::Policy;
use crate::records::Protocol;
use crate::transport::{self, Transport};

impl<P: Policy> Network<P> {
    /// Takes a packet to the uplink's address, if it is for a machine. False: it is the node's own, as it was.
    pub(super) fn packet_from_uplink(
        &mut self,
        frame: &mut [u8],
        header: Header,
        now: u64,
        out: &mut impl Output,
    ) -> bool {
        let Some(fragment) = header.fragment else { return self.whole_from_uplink(frame, header, now, out) };
        // The node's own stack takes no fragments, so all are taken here.
        let Some(packet) = frame.get(ETHERNET..) else { return true };
        if let Some(mut whole) = self.fragments.take(&header, fragment, packet, now)
            && let Some(header) = whole.get(ETHERNET..).and_then(Header::read)
        {
            self.whole_from_uplink(&mut whole, header, now, out);
        }
        true
    }

    fn whole_from_uplink(
        &mut self,
        frame: &mut [u8],
        header: Header,
        now: u64,
        out: &mut impl Output,
    ) -> bool {
        let Some(packet) = frame.get_mut(ETHERNET..ETHERNET + header.total) else { return false };
        let Some(transport) = Transport::read(header.protocol, header.payload(packet)) else {
            return header.protocol == IpProtocol::Icmp && self.error_from_uplink(frame, &header, out);
        };
        let icmp = transport.protocol == Protocol::Icmp;
        if icmp && transport.echo_request {
            return false;
        }
        let Some(owner) = self.ports.owner(transport.protocol, transport.destination_port) else {
            return false;
        };
        if !transport::is_intact(&header, header.payload(packet)) {
            self.counters.invalid += 1;
            return true;
        }
        let (key, flow) = match owner {
            Owner::Dns => {
                let payload = header.payload(packet).get(transport.header_bytes..).unwrap_or(&[]);
                let from = SocketAddrV4::new(header.source, transport.source_port);
                self.looked_up(transport.destination_port, from, payload, now, out);
                return true;
            }
            Owner::Flow(key, flow) => (key, flow),
        };
        let Some(machine) = self.machines.get_mut(&key) else { return true };
        let Some(beyond) = machine.flows.get(&flow).map(|mapping| mapping.beyond) else { return true };
        let from_its_end = header.source == beyond.0 && (icmp || transport.source_port == beyond.1);
        if !from_its_end || header.ttl <= 1 {
            return true;
        }
        if let Some((_, due)) = machine.flows.pass(&flow, false, &transport.tcp, transport.payload_bytes, now)
        {
            self.sweep_due = self.sweep_due.min(due);
        }
        rewrite::replace(packet, &header, transport.protocol, End::Destination, (MACHINE, flow.port), true);
        if flow.end() != beyond {
            rewrite::replace(packet, &header, transport.protocol, End::Source, flow.end(), true);
        }
        rewrite::count_hop(packet, &header);
        if let Some(uplink) = self.uplink.as_ref().filter(|_| transport.tcp.syn) {
            let most = uplink.largest_segment();
            transport::clamp_mss(header.payload_mut(packet), transport.header_bytes, most);
        }
        set_ethernet(frame, MACHINE_MAC, GATEWAY_MAC, smoltcp::wire::EthernetProtocol::Ipv4);
        if header.total > link::MTU {
            self.give(key, frame, out);
        } else {
            let sent = self.coalescer.push(key, frame, &header, Some(&transport), out);
            self.counters.no_room += u64::from(!sent);
        }
        true
    }

    /// Takes an ICMP error, if it is about a machine's packet (RFC 5508, 4.2).
    fn error_from_uplink(&mut self, frame: &mut [u8], header: &Header, out: &mut impl Output) -> bool {
        let Some(packet) = frame.get_mut(ETHERNET..ETHERNET + header.total) else { return false };
        let Some((inner, protocol, ports)) = icmp::quoted(header.payload(packet)) else { return false };
        if inner.source != header.destination || !transport::is_intact(header, header.payload(packet)) {
            return false;
        }
        let Some(Owner::Flow(key, flow)) = self.ports.owner(protocol, ports.0) else { return false };
        let mapping = self.machines.get(&key).and_then(|machine| machine.flows.get(&flow));
        let Some(beyond) = mapping.map(|mapping| mapping.beyond) else { return false };
        if inner.destination != beyond.0 || !(protocol == Protocol::Icmp || ports.1 == beyond.1) {
            return false;
        }
        let message = header.payload_mut(packet);
        if let Some(quoted) = message.get_mut(icmp::ERROR..) {
            rewrite::replace(quoted, &inner, protocol, End::Source, (MACHINE, flow.port), true);
            if flow.end() != beyond {
                rewrite::replace(quoted, &inner, protocol, End::Destination, flow.end(), true);
            }
        }
        if let Ok(mut icmp) = Icmpv4Packet::new_checked(message) {
            icmp.fill_checksum();
        }
        rewrite::replace_address(packet, header, End::Destination, MACHINE);
        rewrite::count_hop(packet, header);
        set_ethernet(frame, MACHINE_MAC, GATEWAY_MAC, smoltcp::wire::EthernetProtocol::Ipv4);
        if let Some(frame) = frame.get(..ETHERNET + header.total) {
            self.give(key, frame, out);
        }
        true
    }
}
