//! What the operator decided, on the kernel's command line.

#![forbid(unsafe_code)]

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::net::{Ipv4Addr, SocketAddrV4};

use nestling_network::PORTS;

use super::uplink::{self, Addressing, DNS_PORT};
use crate::boot::CommandLine;

/// The node's HTTP port unless the command line says otherwise.
const DEFAULT_PORT: u16 = 8080;
const DEFAULT_NAME: &str = "nestling";
const MAX_NAME_BYTES: usize = 64;
/// A token shorter than this could be guessed.
const MIN_TOKEN_BYTES: usize = 16;
/// As many as DHCP may name.
const MAX_DNS_SERVERS: usize = 3;

/// The command line's words, understood.
pub struct Settings {
    /// The node's name.
    pub name: String,
    /// The API's TCP port.
    pub port: u16,
    /// The API's bearer token; `None` where authorization is off.
    pub token: Option<String>,
    /// How the node gets its address.
    pub addressing: Addressing,
    /// Who resolves names for the machines; empty: whom DHCP names.
    pub dns_servers: Vec<SocketAddrV4>,
    /// Most bytes of an IP packet on the uplink's link; none: what DHCP says.
    pub mtu: Option<u16>,
    /// Whether jobs get clones of templates.
    pub templates: bool,
}

impl Settings {
    /// Reads `name=`, `port=`, `token=` or `auth=off`, `ip=`, `gateway=`, `dns=`, `mtu=` and `templates=`. Other words are
    /// other modules' business.
    ///
    /// # Errors
    /// A message that names the word and what it should be.
    pub fn read(line: &CommandLine) -> Result<Self, String> {
        let port = match line.value("port") {
            None => DEFAULT_PORT,
            Some(text) => {
                let port = text.parse().ok().filter(|port| *port != 0);
                let port = port.ok_or_else(|| format!("port={text} is not a TCP port, 1 to 65535"))?;
                if PORTS.contains(&port) {
                    return Err(format!(
                        "port={port} lies among those that machines' connections have on the uplink, {} to {}",
                        PORTS.start(),
                        PORTS.end()
                    ));
                }
                port
            }
        };
        let token = match (line.value("token"), line.value("auth")) {
            (Some(token), None) if token.len() >= MIN_TOKEN_BYTES => Some(token.to_string()),
            (Some(_), None) => return Err(format!("token= needs at least {MIN_TOKEN_BYTES} characters")),
            (None, Some("off")) => None,
            (Some(_), Some(_)) => return Err("token= and auth= exclude each other: give one of them".into()),
            (None, Some(other)) => {
                return Err(format!("auth={other} is unknown: give token=... or auth=off"));
            }
            (None, None) => {
                return Err("the kernel's command line has neither token=... for the API nor auth=off".into());
            }
        };
        let addressing = Addressing::parse(line.value("ip"), line.value("gateway"))?;
        let dns_servers = parse_dns(line.value("dns"))?;
        let mtu = parse_mtu(line.value("mtu"))?;
        let name = line.value("name").unwrap_or(DEFAULT_NAME);
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(format!("name={name} must have 1 to {MAX_NAME_BYTES} characters"));
        }
        let templates = match line.value("templates") {
            None | Some("on") => true,
            Some("off") => false,
            Some(other) => return Err(format!("templates={other} is neither on nor off")),
        };
        Ok(Self { name: name.to_string(), port, token, addressing, dns_servers, mtu, templates })
    }
}

/// Reads `dns=`'s list of addresses, each with or without a port.
fn parse_dns(list: Option<&str>) -> Result<Vec<SocketAddrV4>, String> {
    let Some(list) = list else { return Ok(Vec::new()) };
    let server = |text: &str| {
        let alone = || Some(SocketAddrV4::new(text.parse::<Ipv4Addr>().ok()?, DNS_PORT));
        text.parse().ok().or_else(alone)
    };
    let servers: Option<Vec<_>> = list.split(',').map(server).collect();
    servers.filter(|servers| servers.len() <= MAX_DNS_SERVERS).ok_or_else(|| {
        format!("dns={list} is not a list of at most {MAX_DNS_SERVERS} IPv4 addresses, such as 10.0.2.3,192.0.2.53:5353")
    })
}

/// Reads `mtu=`.
fn parse_mtu(text: Option<&str>) -> Result<Option<u16>, String> {
    let Some(text) = text else { return Ok(None) };
    let mtu = text.parse().ok().filter(|mtu| uplink::MTUS.contains(mtu));
    let message = || {
        let (least, most) = (uplink::MTUS.start(), uplink::MTUS.end());
        format!(
            "mtu={text} is not the size of an IP packet on the uplink, {least} to {most} bytes, such as 1460"
        )
    };
    mtu.map(Some).ok_or_else(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &'static str) -> Result<Settings, String> {
        Settings::read(&CommandLine::new(line))
    }

    #[test]
    fn a_token_or_its_express_absence_is_all_that_is_needed() {
        let settings = read("token=0123456789abcdef").unwrap();
        assert_eq!(
            (settings.port, settings.name.as_str(), settings.addressing),
            (8080, "nestling", Addressing::Dhcp)
        );
        assert_eq!(settings.token.as_deref(), Some("0123456789abcdef"));
        assert_eq!(read("auth=off").unwrap().token, None);
    }

    #[test]
    fn every_wrong_word_is_named_with_what_it_should_be() {
        let cases = [
            ("", "neither token="),
            ("token=short", "at least 16"),
            ("auth=on", "auth=on is unknown"),
            ("auth=off token=0123456789abcdef", "exclude each other"),
            ("auth=off port=0", "port=0 is not"),
            ("auth=off port=http", "port=http is not"),
            ("auth=off port=40000", "32768 to 60999"),
            ("auth=off ip=10.0.2.15", "such as 10.0.2.15/24"),
            ("auth=off ip=10.0.2.15/33", "such as 10.0.2.15/24"),
            ("auth=off ip=0.0.0.0/0", "not an address that a host can have"),
            ("auth=off ip=10.0.2.15/24 gateway=ten", "gateway=ten is not"),
            ("auth=off ip=10.0.2.15/24 gateway=10.0.3.2", "does not lie in the network"),
            ("auth=off gateway=10.0.3.2", "needs a static address"),
            ("auth=off dns=", "such as 10.0.2.3"),
            ("auth=off dns=9.9.9.9,x", "dns=9.9.9.9,x is not"),
            ("auth=off dns=1.1.1.1,2.2.2.2,3.3.3.3,4.4.4.4", "at most 3"),
            ("auth=off mtu=", "mtu= is not"),
            ("auth=off mtu=575", "576 to 1500 bytes, such as 1460"),
            ("auth=off mtu=9001", "mtu=9001 is not"),
            ("auth=off name=", "1 to 64"),
            ("auth=off templates=none", "neither on nor off"),
        ];
        for (line, part) in cases {
            let Err(message) = read(line) else { panic!("{line} was taken") };
            assert!(message.contains(part), "{line}: {message}");
        }
    }

    #[test]
    fn a_static_address_is_read_with_its_gateway() {
        let settings = read("auth=off ip=10.0.2.15/24 gateway=10.0.2.2").unwrap();
        let Addressing::Static { address, gateway } = settings.addressing else { panic!("not static") };
        assert_eq!(
            (address.to_string(), gateway.unwrap().to_string()),
            ("10.0.2.15/24".into(), "10.0.2.2".into())
        );
    }

    #[test]
    fn those_who_resolve_names_are_read_in_their_order() {
        let servers = ["10.0.2.3:53", "192.0.2.53:5353"].map(|server| server.parse().unwrap());
        assert_eq!(read("auth=off dns=10.0.2.3,192.0.2.53:5353").unwrap().dns_servers, servers);
        assert!(read("auth=off").unwrap().dns_servers.is_empty());
    }

    #[test]
    fn the_uplinks_mtu_is_read_or_left_to_dhcp() {
        assert_eq!(read("auth=off mtu=1460").unwrap().mtu, Some(1460));
        assert_eq!(read("auth=off").unwrap().mtu, None);
    }
}
