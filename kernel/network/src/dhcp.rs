//! The DHCP server of a machine's link: RFC 2131, options of RFC 2132, RFC 6842 (the client's identifier comes back). There is one
//! address to give and nobody else to give it to, so nothing is remembered.

use alloc::vec;
use alloc::vec::Vec;
use core::net::Ipv4Addr;

use smoltcp::wire::{
    DHCP_CLIENT_PORT, DHCP_SERVER_PORT, DhcpMessageType, DhcpOpCode, DhcpOption, DhcpPacket, DhcpRepr,
    IpProtocol,
};

use crate::frame;
use crate::link::{GATEWAY, MACHINE, MTU, PREFIX, netmask};
use crate::transport;

/// A lease outlives every job.
const LEASE_SECONDS: u32 = 30 * 24 * 3600;
/// Answers are not shorter: BOOTP's size, which some clients insist on (RFC 951, 3).
const LEAST_BYTES: usize = 300;
const DOMAIN_NAME_SERVER: u8 = 6;
const INTERFACE_MTU: u8 = 26;
const REQUESTED_ADDRESS: u8 = 50;
const MESSAGE_TYPE: u8 = 53;
const SERVER_IDENTIFIER: u8 = 54;
const CLIENT_IDENTIFIER: u8 = 61;

/// The frame that answers a client's message, the payload of a datagram to port 67.
pub(crate) fn answer(message: &[u8]) -> Option<Vec<u8>> {
    // Everything before the options' cookie, and that.
    let request = DhcpPacket::new_checked(message).ok().filter(|_| message.len() >= 240)?;
    if request.opcode() != DhcpOpCode::Request || request.magic_number() != 0x6382_5363 {
        return None;
    }
    let option = |kind: u8| request.options().find(|option| option.kind == kind).map(|option| option.data);
    let address = |kind: u8| option(kind).and_then(|data| <[u8; 4]>::try_from(data).ok()).map(Ipv4Addr::from);
    let to_another = address(SERVER_IDENTIFIER).is_some_and(|server| server != GATEWAY);
    let kind = match option(MESSAGE_TYPE)?.first().map(|kind| DhcpMessageType::from(*kind))? {
        _ if to_another => return None,
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request => {
            let wanted = address(REQUESTED_ADDRESS).unwrap_or(request.client_ip());
            if wanted == MACHINE { DhcpMessageType::Ack } else { DhcpMessageType::Nak }
        }
        DhcpMessageType::Inform => DhcpMessageType::Ack,
        _ => return None,
    };
    let (given, inform) = (kind != DhcpMessageType::Nak, request.client_ip() != Ipv4Addr::UNSPECIFIED);
    let leased = given && option(MESSAGE_TYPE)?.first() != Some(&u8::from(DhcpMessageType::Inform));
    let (gateway, mtu) = (GATEWAY.octets(), (MTU as u16).to_be_bytes());
    let mut options = Vec::with_capacity(3);
    if given {
        options.push(DhcpOption { kind: DOMAIN_NAME_SERVER, data: &gateway });
        options.push(DhcpOption { kind: INTERFACE_MTU, data: &mtu });
    }
    options.extend(option(CLIENT_IDENTIFIER).map(|data| DhcpOption { kind: CLIENT_IDENTIFIER, data }));
    let reply = DhcpRepr {
        message_type: kind,
        transaction_id: request.transaction_id(),
        secs: 0,
        client_hardware_address: request.client_hardware_address(),
        client_ip: if given { request.client_ip() } else { Ipv4Addr::UNSPECIFIED },
        your_ip: if leased { MACHINE } else { Ipv4Addr::UNSPECIFIED },
        server_ip: Ipv4Addr::UNSPECIFIED,
        router: given.then_some(GATEWAY),
        subnet_mask: given.then(|| Ipv4Addr::from_bits(netmask(PREFIX))),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: request.flags().contains(smoltcp::wire::DhcpFlags::BROADCAST),
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(GATEWAY),
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: leased.then_some(LEASE_SECONDS),
        renew_duration: None,
        rebind_duration: None,
        additional_options: &options,
    };
    let mut payload = vec![0; reply.buffer_len().max(LEAST_BYTES)];
    reply.emit(&mut DhcpPacket::new_unchecked(payload.as_mut_slice())).ok()?;
    // A client that has its address yet gets the answer there; another one's broadcast reaches it in any case, and so does
    // a frame to the address it is about to have (RFC 2131, 4.1).
    let to = if given && inform {
        request.client_ip()
    } else if !given || reply.broadcast {
        Ipv4Addr::BROADCAST
    } else {
        MACHINE
    };
    let datagram = transport::udp(GATEWAY, to, DHCP_SERVER_PORT, DHCP_CLIENT_PORT, &payload);
    let mut answer = frame::to_machine(GATEWAY, to, IpProtocol::Udp, &datagram);
    if to == Ipv4Addr::BROADCAST {
        answer.get_mut(..6)?.fill(0xff);
    }
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{ETHERNET, IPV4};
    use crate::link::MACHINE_MAC;
    use proptest::prelude::*;

    fn message(kind: u8, broadcast: bool, client: [u8; 4], options: &[u8]) -> Vec<u8> {
        let mut message = vec![1, 1, 6, 0, 1, 2, 3, 4, 0, 0, if broadcast { 0x80 } else { 0 }, 0];
        message.extend(client);
        message.resize(28, 0);
        message.extend(MACHINE_MAC);
        message.resize(236, 0);
        message.extend([0x63, 0x82, 0x53, 0x63, 53, 1, kind]);
        message.extend(options);
        message.push(255);
        message
    }

    type Options = Vec<(u8, Vec<u8>)>;

    /// The answer's destination address, its "your address" and its options.
    fn ask(
        kind: u8,
        broadcast: bool,
        client: [u8; 4],
        options: &[u8],
    ) -> Option<(Ipv4Addr, [u8; 4], Options)> {
        let frame = answer(&message(kind, broadcast, client, options))?;
        let ip = crate::ip::Header::read(&frame[ETHERNET..]).unwrap();
        let segment = ip.payload(&frame[ETHERNET..]);
        let sum = crate::checksum::pseudo_header(ip.source, ip.destination, 17, segment.len());
        assert_eq!(crate::checksum::add(&[sum, crate::checksum::sum(segment)]), 0xffff);
        let reply = DhcpPacket::new_checked(&frame[ETHERNET + IPV4 + 8..]).unwrap();
        assert_eq!((reply.opcode(), reply.transaction_id()), (DhcpOpCode::Reply, 0x0102_0304));
        let options = reply.options().map(|option| (option.kind, option.data.to_vec())).collect();
        Some((ip.destination, reply.your_ip().octets(), options))
    }

    fn option(options: &[(u8, Vec<u8>)], kind: u8) -> Option<&[u8]> {
        options.iter().find(|option| option.0 == kind).map(|option| option.1.as_slice())
    }

    #[test]
    fn a_machine_is_offered_and_given_its_address_with_all_it_needs() {
        for (kind, answer, asked) in [(1, 2, vec![]), (3, 5, [&[50, 4], &MACHINE.octets()[..]].concat())] {
            let (to, given, options) = ask(kind, false, [0; 4], &asked).unwrap();
            assert_eq!((to, given), (MACHINE, MACHINE.octets()));
            for (kind, data) in [
                (53, &[answer][..]),
                (1, &[255, 255, 255, 248]),
                (3, &GATEWAY.octets()),
                (6, &GATEWAY.octets()),
                (26, &[5, 220]),
                (54, &GATEWAY.octets()),
                (51, &LEASE_SECONDS.to_be_bytes()),
            ] {
                assert_eq!(option(&options, kind), Some(data), "option {kind}");
            }
        }
    }

    #[test]
    fn a_lease_is_renewed_another_address_refused_and_an_identifier_given_back() {
        let (to, _, options) = ask(3, false, MACHINE.octets(), &[61, 3, 255, 1, 2]).unwrap();
        assert_eq!(
            (to, option(&options, 53), option(&options, 61)),
            (MACHINE, Some(&[5][..]), Some(&[255, 1, 2][..]))
        );
        let (to, given, options) = ask(3, false, [0; 4], &[50, 4, 10, 0, 0, 1]).unwrap();
        assert_eq!((to, given, option(&options, 53)), (Ipv4Addr::BROADCAST, [0; 4], Some(&[6][..])));
        assert_eq!((option(&options, 3), option(&options, 51)), (None, None));
        let (to, ..) = ask(1, true, [0; 4], &[]).unwrap();
        assert_eq!(to, Ipv4Addr::BROADCAST);
        let (_, given, options) = ask(8, false, MACHINE.octets(), &[]).unwrap();
        assert_eq!(
            (given, option(&options, 51), option(&options, 6)),
            ([0; 4], None, Some(&GATEWAY.octets()[..]))
        );
    }

    #[test]
    fn other_servers_clients_and_other_messages_are_none_of_its_business() {
        assert!(ask(3, false, [0; 4], &[54, 4, 10, 0, 0, 1, 50, 4, 192, 0, 0, 2]).is_none());
        assert!(ask(7, false, [0; 4], &[]).is_none() && ask(2, false, [0; 4], &[]).is_none());
        let mut reply = message(1, false, [0; 4], &[]);
        reply[0] = 2;
        assert_eq!(answer(&reply), None);
    }

    proptest! {
        #[test]
        fn garbage_is_survived(kind: u8, options: Vec<u8>, cut in 0_usize..300, broadcast: bool) {
            let mut message = message(kind, broadcast, [0; 4], &options);
            message.truncate(cut.max(message.len().saturating_sub(cut)));
            let _ = answer(&message);
        }
    }
}
