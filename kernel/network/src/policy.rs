//! What a machine may reach.
//!
//! Some addresses no policy opens: RFC 6890 (special-purpose addresses), and the node's own.

use core::net::Ipv4Addr;

use crate::link;
use crate::uplink::UplinkConfig;

/// A job's rules. Ports are none for protocols without them (ICMP).
pub trait Policy {
    /// Whether the machine may connect to this port of a host by this name.
    fn allows_name(&self, name: &str, port: Option<u16>) -> bool;

    /// Whether the machine may connect to this port of this address, whatever its name.
    fn allows_address(&self, address: Ipv4Addr, port: Option<u16>) -> bool;

    /// Whether the machine may learn the addresses of a host by this name.
    fn knows_name(&self, name: &str) -> bool;

    /// Whether it may learn those of every name, and so of names that nobody looks at.
    fn knows_every_name(&self) -> bool;
}

/// Why something was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The job's policy has no rule for it.
    Policy,
    /// It is the node itself.
    Node,
    /// It is an address that no machine may reach: loopback, link-local (with a cloud's metadata), broadcast, multicast.
    Reserved,
    /// It looks names up by TCP, which nobody looks into.
    NamesByTcp,
    /// It looks names up and nobody is known who could.
    NoServer,
    /// The machine has as many connections as it may have.
    Connections,
}

impl Refusal {
    /// The reason, for people.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Policy => "no rule of network.egress allows it",
            Self::Node => "no machine may reach the node itself",
            Self::Reserved => "no machine may reach loopback, link-local, broadcast or multicast addresses",
            Self::NamesByTcp => "names are looked up by UDP alone unless network.egress is all",
            Self::NoServer => {
                "no DNS server is known: the uplink's DHCP names none, and dns= on the node's command line neither"
            }
            Self::Connections => "the machine has too many connections at once",
        }
    }
}

/// Whether an address is closed to every machine.
pub(crate) fn closed(address: Ipv4Addr, uplink: Option<&UplinkConfig>) -> Option<Refusal> {
    let [first, ..] = address.octets();
    if first == 0
        || first >= 224
        || address.is_loopback()
        || address.is_link_local()
        || link::contains(address)
    {
        return Some(Refusal::Reserved);
    }
    let uplink = uplink?;
    if address == uplink.address {
        return Some(Refusal::Node);
    }
    // A link of two addresses or one has no broadcast (RFC 3021).
    let hosts = !link::netmask(uplink.prefix);
    let ends = [0, hosts].contains(&(address.to_bits() & hosts));
    (uplink.prefix < 31 && ends && uplink.is_on_link(address)).then_some(Refusal::Reserved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_its_link_s_ends_and_special_addresses_are_closed() {
        let uplink = UplinkConfig {
            mac: [2; 6],
            address: Ipv4Addr::new(10, 0, 2, 15),
            prefix: 24,
            gateway: None,
            dns_servers: [].into(),
            mtu: 1500,
        };
        for (address, refusal) in [
            ("10.0.2.15", Some(Refusal::Node)),
            ("10.0.2.255", Some(Refusal::Reserved)),
            ("10.0.2.0", Some(Refusal::Reserved)),
            ("10.0.3.255", None),
            ("10.0.2.2", None),
            ("0.1.2.3", Some(Refusal::Reserved)),
            ("127.1.2.3", Some(Refusal::Reserved)),
            ("169.254.169.254", Some(Refusal::Reserved)),
            ("224.0.0.1", Some(Refusal::Reserved)),
            ("240.0.0.1", Some(Refusal::Reserved)),
            ("255.255.255.255", Some(Refusal::Reserved)),
            ("192.0.0.3", Some(Refusal::Reserved)),
            ("192.0.2.1", None),
            ("223.255.255.255", None),
        ] {
            assert_eq!(closed(address.parse().unwrap(), Some(&uplink)), refusal, "{address}");
        }
        let pair = UplinkConfig { prefix: 31, ..uplink };
        assert_eq!(closed(Ipv4Addr::new(10, 0, 2, 14), Some(&pair)), None);
    }
}
