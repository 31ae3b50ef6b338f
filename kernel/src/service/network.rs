//! The network that every machine finds: the same card, address and gateway in each, since no machine sees another's.

#![forbid(unsafe_code)]

use alloc::format;
use alloc::string::String;
use core::net::Ipv4Addr;

use nestling_machine::platform::NetworkConfig;

/// A machine's network card. Its address is locally administered.
pub const CARD: NetworkConfig = NetworkConfig { mac: [0x02, 0x6E, 0x65, 0x73, 0x74, 0x02], mtu: 1500 };
/// A machine's address, of those set aside for hosts that speak to a translator next to them (RFC 7335).
const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 2);
/// Bits of its network's prefix.
const PREFIX: u8 = 29;
/// The gateway's address, who also answers DNS.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 1);

/// A kernel command line that goes on with what the agent sets the card up by: `nestling.net=ADDRESS/PREFIX,GATEWAY,DNS`.
#[must_use]
pub fn command_line(of_image: &str) -> String {
    format!("{of_image} nestling.net={ADDRESS}/{PREFIX},{GATEWAY},{GATEWAY}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_is_told_address_gateway_and_dns_behind_the_images_own_arguments() {
        assert_eq!(command_line("quiet"), "quiet nestling.net=192.0.0.2/29,192.0.0.1,192.0.0.1");
    }

    #[test]
    fn the_cards_address_is_a_locally_administered_one_of_a_single_card() {
        assert_eq!(CARD.mac[0] & 3, 2);
    }
}
