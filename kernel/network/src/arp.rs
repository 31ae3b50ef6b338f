//! ARP on a machine's link: RFC 826. The gateway answers for every address but the machine's own, so that a machine with a
//! wider idea of its link still finds the gateway.

use alloc::vec;
use alloc::vec::Vec;
use core::net::Ipv4Addr;

use smoltcp::wire::{ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetProtocol};

use crate::frame::{ETHERNET, set_ethernet};
use crate::link::{self, GATEWAY_MAC, MACHINE, MACHINE_MAC};

/// The answer to a machine's frame, from the Ethernet header's end on.
pub(crate) fn answer(packet: &[u8]) -> Option<Vec<u8>> {
    let request = ArpPacket::new_checked(packet).ok()?;
    let ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_protocol_addr,
        target_protocol_addr,
        ..
    } = ArpRepr::parse(&request).ok()?
    else {
        return None;
    };
    if !link::contains(target_protocol_addr) || target_protocol_addr == MACHINE {
        return None;
    }
    Some(message(
        ArpOperation::Reply,
        (GATEWAY_MAC, target_protocol_addr),
        (MACHINE_MAC, source_protocol_addr),
        MACHINE_MAC,
    ))
}

/// A frame with an ARP message.
pub(crate) fn message(
    operation: ArpOperation,
    source: ([u8; 6], Ipv4Addr),
    target: ([u8; 6], Ipv4Addr),
    to: [u8; 6],
) -> Vec<u8> {
    let message = ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr: EthernetAddress(source.0),
        source_protocol_addr: source.1,
        target_hardware_addr: EthernetAddress(target.0),
        target_protocol_addr: target.1,
    };
    let mut frame = vec![0; ETHERNET + message.buffer_len()];
    set_ethernet(&mut frame, to, source.0, EthernetProtocol::Arp);
    if let Some(packet) = frame.get_mut(ETHERNET..) {
        message.emit(&mut ArpPacket::new_unchecked(packet));
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::GATEWAY;

    fn ask(target: Ipv4Addr) -> Option<Vec<u8>> {
        let request = message(ArpOperation::Request, (MACHINE_MAC, MACHINE), ([0; 6], target), [0xff; 6]);
        answer(&request[ETHERNET..])
    }

    #[test]
    fn the_gateway_answers_for_all_of_the_link_but_the_machine() {
        let reply = ask(GATEWAY).unwrap();
        assert_eq!(reply[..14], [&MACHINE_MAC[..], &GATEWAY_MAC[..], &[8, 6]].concat());
        assert_eq!(reply[22..28], GATEWAY_MAC);
        assert_eq!(reply[28..32], GATEWAY.octets());
        assert!(ask(Ipv4Addr::new(192, 0, 0, 5)).is_some());
        assert!(ask(MACHINE).is_none() && ask(Ipv4Addr::new(192, 0, 0, 8)).is_none());
    }

    #[test]
    fn what_is_no_request_has_no_answer() {
        let reply = message(ArpOperation::Reply, (MACHINE_MAC, MACHINE), ([0; 6], GATEWAY), [0xff; 6]);
        assert_eq!(answer(&reply[ETHERNET..]), None);
        let mut odd = message(ArpOperation::Request, (MACHINE_MAC, MACHINE), ([0; 6], GATEWAY), [0xff; 6]);
        odd[ETHERNET + 4] = 255;
        assert_eq!(answer(&odd[ETHERNET..]), None);
        assert_eq!(answer(&[]), None);
    }
}
