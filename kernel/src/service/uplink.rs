//! The node's network: Ethernet, IPv4 and its address, by DHCP or fixed.
//!
//! Protocols are smoltcp's. RFC 2131 (DHCP), RFC 1122 (host requirements). The address and the interface are shared with the machines'
//! network, which sees every received frame first ([`Uplink::receive`]) and sends frames of its own ([`Uplink::parts`]).

#![forbid(unsafe_code)]

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use core::net::{Ipv4Addr, SocketAddrV4};
use core::ops::RangeInclusive;

use nestling_api::types;
use nestling_network::{LEAST_MTU, MTU};
use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::dhcpv4;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{DhcpPacket, EthernetAddress, HardwareAddress, IpCidr, Ipv4Cidr};

use crate::drivers::nic::{MAX_FRAME_BYTES, Nic};

const SECOND: u64 = 1_000_000_000;
/// How often an interface without interrupts is looked at.
const POLL_INTERVAL_NS: u64 = SECOND / 1000;
/// How long DHCP may take before the operator is told.
const DHCP_PATIENCE_NS: u64 = 10 * SECOND;
/// DHCP's first tries follow each other quickly: a node boots faster than some networks.
const DHCP_EAGER: Duration = Duration::from_secs(1);
const DHCP_RELAXED: Duration = Duration::from_secs(5);
/// Where DNS servers listen unless the operator says otherwise.
pub const DNS_PORT: u16 = 53;
/// Frames taken in one go, so that a flood leaves time for the rest.
const FRAMES_PER_POLL: usize = 512;

/// What an uplink's MTU may be: what every host takes in one piece (RFC 791), up to Ethernet's.
pub const MTUS: RangeInclusive<u16> = LEAST_MTU..=MTU as u16;
/// DHCP's option for the MTU (RFC 2132, 5.1), and what is asked for: subnet mask, router, DNS servers and that.
const DHCP_MTU: u8 = 26;
const DHCP_WANTED: [u8; 4] = [1, 3, 6, DHCP_MTU];
/// Bytes of an Ethernet header.
const ETHERNET: usize = MAX_FRAME_BYTES - MTU;

/// What the operator says of the uplink, which goes before DHCP's word.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Said {
    /// Who resolves names.
    pub dns_servers: Vec<SocketAddrV4>,
    /// Most bytes of an IP packet.
    pub mtu: Option<u16>,
}

/// How the node gets its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addressing {
    /// From a DHCP server.
    Dhcp,
    /// Fixed.
    Static {
        /// Address and prefix length.
        address: Ipv4Cidr,
        /// The way out of the local network.
        gateway: Option<Ipv4Addr>,
    },
}

impl Addressing {
    /// Reads the command line's `ip=` and `gateway=` values.
    ///
    /// # Errors
    /// A message that names the value and what it should be.
    pub fn parse(ip: Option<&str>, gateway: Option<&str>) -> Result<Self, String> {
        let ip = ip.unwrap_or("dhcp");
        if ip == "dhcp" {
            return match gateway {
                None => Ok(Self::Dhcp),
                Some(_) => Err("gateway= needs a static address: give ip=A.B.C.D/N as well".to_string()),
            };
        }
        let address: Ipv4Cidr = ip.parse().map_err(|()| {
            alloc::format!("ip={ip} is neither dhcp nor an address with its prefix, such as 10.0.2.15/24")
        })?;
        let usable = !address.address().is_unspecified()
            && !address.address().is_multicast()
            && !address.address().is_broadcast();
        if !usable {
            return Err(alloc::format!("ip={ip} is not an address that a host can have"));
        }
        let gateway = match gateway {
            None => None,
            Some(text) => {
                let gateway: Ipv4Addr = text
                    .parse()
                    .map_err(|_| alloc::format!("gateway={text} is not an IPv4 address, such as 10.0.2.2"))?;
                if !address.contains_addr(&gateway) {
                    return Err(alloc::format!(
                        "gateway={gateway} does not lie in the network of ip={address}"
                    ));
                }
                Some(gateway)
            }
        };
        Ok(Self::Static { address, gateway })
    }
}

/// The node's address and what is beyond it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configuration {
    /// Address and prefix length.
    pub address: Ipv4Cidr,
    /// The way out of the local network.
    pub gateway: Option<Ipv4Addr>,
    /// Who resolves names, in order of preference.
    pub dns_servers: Vec<SocketAddrV4>,
    /// Most bytes of an IP packet on the local network.
    pub mtu: u16,
}

/// The interface as smoltcp wants it: a frame is copied in and out of one buffer each.
struct Link {
    nic: Box<dyn Nic>,
    received: Box<[u8]>,
    sending: Box<[u8]>,
    /// Length of the frame in `received` that is smoltcp's next.
    next: Option<usize>,
    /// Most bytes of an IP packet that smoltcp sends.
    mtu: u16,
}

struct Received<'a>(&'a [u8]);

struct Sending<'a> {
    nic: &'a mut dyn Nic,
    buffer: &'a mut [u8],
}

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        match self.buffer.get_mut(..len) {
            Some(frame) => {
                let result = f(frame);
                if !self.nic.transmit(frame) {
                    log::debug!("uplink: a frame of {len} bytes was dropped");
                }
                result
            }
            // smoltcp keeps to the MTU; were it not to, the frame would be dropped.
            None => f(&mut vec![0; len]),
        }
    }
}

impl Link {
    /// smoltcp's side of it, without an address.
    fn interface(&mut self, seed: u64, now: u64) -> Interface {
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(self.nic.mac())));
        config.random_seed = seed;
        Interface::new(config, self, instant(now))
    }
}

impl Device for Link {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Sending<'_>)> {
        let length = self.next.take()?;
        let frame = self.received.get(..length)?;
        Some((Received(frame), Sending { nic: &mut *self.nic, buffer: &mut self.sending }))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        self.nic.can_transmit().then_some(Sending { nic: &mut *self.nic, buffer: &mut self.sending })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = ETHERNET + usize::from(self.mtu);
        capabilities
    }
}

/// A DHCP client and how far it got.
struct Dhcp {
    socket: SocketHandle,
    started_at: u64,
    told: bool,
}

/// The node's network interface with its protocols.
pub struct Uplink {
    link: Link,
    interface: Interface,
    /// Every socket of the node; the HTTP server adds its own.
    pub sockets: SocketSet<'static>,
    dhcp: Option<Dhcp>,
    configuration: Option<Configuration>,
    said: Said,
    /// Received frames wait although no interrupt will tell of them again.
    behind: bool,
    port: u16,
    seed: u64,
}

impl Uplink {
    /// Starts the protocols on an interface. What is `said` goes before what DHCP says. `port` is only for telling people where the
    /// node answers; `seed` makes TCP's sequence numbers hard to guess.
    #[must_use]
    pub fn new(
        nic: Box<dyn Nic>,
        addressing: Addressing,
        said: Said,
        port: u16,
        seed: u64,
        now: u64,
    ) -> Self {
        let buffer = || vec![0; MAX_FRAME_BYTES].into_boxed_slice();
        let mut link = Link { nic, received: buffer(), sending: buffer(), next: None, mtu: MTU as u16 };
        let interface = link.interface(seed, now);
        let mut uplink = Self {
            link,
            interface,
            sockets: SocketSet::new(vec![]),
            dhcp: None,
            configuration: None,
            said,
            behind: false,
            port,
            seed,
        };
        match addressing {
            Addressing::Static { address, gateway } => {
                uplink.configure(address, gateway, Said::default(), "", now);
            }
            Addressing::Dhcp => {
                let mut socket = dhcpv4::Socket::new();
                let mut retry = dhcpv4::RetryConfig::default();
                retry.discover_timeout = DHCP_EAGER;
                retry.initial_request_timeout = DHCP_EAGER;
                socket.set_retry_config(retry);
                socket.set_parameter_request_list(&DHCP_WANTED);
                // The socket is as old as the node becomes, and so is the room for what it was told last.
                socket.set_receive_packet_buffer(Box::leak(buffer()));
                let socket = uplink.sockets.add(socket);
                uplink.dhcp = Some(Dhcp { socket, started_at: now, told: false });
            }
        }
        uplink
    }

    /// Takes received frames. Each is offered to `first`, with the interface to answer on, and only the node's own if that does not
    /// take it (returns false). `state_changed` is called whenever a frame may have changed a socket, before the next frame. Returns
    /// whether any was the node's own, or may be left.
    pub fn receive(
        &mut self,
        now: u64,
        mut first: impl FnMut(&mut [u8], &mut dyn Nic) -> bool,
        mut state_changed: impl FnMut(&mut SocketSet<'static>),
    ) -> bool {
        // Interrupts only wake the loop; every call looks at the ring.
        self.link.nic.take_interrupt();
        self.behind = true;
        let mut has_own = false;
        for _ in 0..FRAMES_PER_POLL {
            let Link { nic, received, next, .. } = &mut self.link;
            // A received frame may need an answer at once: without room for that it has to wait.
            if !nic.can_transmit() {
                break;
            }
            let Some(length) = nic.receive(received) else {
                self.behind = false;
                break;
            };
            let Some(frame) = received.get_mut(..length) else { continue };
            if first(frame, &mut **nic) {
                continue;
            }
            *next = Some(length);
            has_own = true;
            match self.interface.poll_ingress_single(instant(now), &mut self.link, &mut self.sockets) {
                PollIngressSingleResult::None | PollIngressSingleResult::PacketProcessed => {}
                PollIngressSingleResult::SocketStateChanged => state_changed(&mut self.sockets),
            }
        }
        self.link.nic.flush();
        self.follow_dhcp(now);
        has_own || self.behind
    }

    /// The node's address and what is beyond it; none without an address. And the interface.
    pub fn parts(&mut self) -> (Option<&Configuration>, &mut dyn Nic) {
        (self.configuration.as_ref(), &mut *self.link.nic)
    }

    /// Sends what the sockets have to send.
    pub fn transmit(&mut self, now: u64) {
        for _ in 0..FRAMES_PER_POLL {
            if self.interface.poll_egress(instant(now), &mut self.link, &mut self.sockets) == PollResult::None
            {
                break;
            }
        }
        self.link.nic.flush();
    }

    /// When [`Uplink::receive`] and [`Uplink::transmit`] have to be called next, whatever arrives, in
    /// nanoseconds since boot.
    pub fn deadline(&mut self, now: u64) -> Option<u64> {
        let protocols = self.interface.poll_at(instant(now), &self.sockets).map(|at| {
            let at = u64::try_from(at.total_micros()).unwrap_or(0).saturating_mul(1000);
            // What could not be sent now for want of room in the interface's queue is tried again soon, not
            // at once.
            if at <= now { now.saturating_add(POLL_INTERVAL_NS) } else { at }
        });
        let polling =
            (self.behind || !self.link.nic.has_interrupt()).then(|| now.saturating_add(POLL_INTERVAL_NS));
        let patience = self
            .dhcp
            .as_ref()
            .filter(|dhcp| !dhcp.told)
            .map(|dhcp| dhcp.started_at.saturating_add(DHCP_PATIENCE_NS));
        [protocols, polling, patience].into_iter().flatten().min()
    }

    /// The interface's side of opening a connection, for tests that need a client.
    #[cfg(test)]
    pub fn context(&mut self) -> &mut smoltcp::iface::Context {
        self.interface.context()
    }

    /// Whether the node has an address.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.interface.ipv4_addr().is_some()
    }

    /// What `GET /v1/host` tells of the uplink.
    #[must_use]
    pub fn describe(&self) -> types::Uplink {
        types::Uplink {
            driver: self.link.nic.driver().to_string(),
            mac: Mac(self.link.nic.mac()).to_string(),
            address: self.interface.ip_addrs().first().map(ToString::to_string),
            gateway: self
                .interface
                .routes()
                .get_default_ipv4_route()
                .map(|route| route.via_router.to_string()),
        }
    }

    fn follow_dhcp(&mut self, now: u64) {
        let Some(dhcp) = &mut self.dhcp else { return };
        let socket = self.sockets.get_mut::<dhcpv4::Socket<'_>>(dhcp.socket);
        match socket.poll() {
            Some(dhcpv4::Event::Configured(config)) => {
                let (address, gateway) = (config.address, config.router);
                let dns_servers =
                    config.dns_servers.iter().map(|server| SocketAddrV4::new(*server, DNS_PORT));
                let told = config.packet.filter(|packet| packet.your_ip() == address.address());
                let mtu = told.as_ref().and_then(offered_mtu);
                let offered = Said { dns_servers: dns_servers.collect(), mtu };
                dhcp.told = true;
                self.configure(address, gateway, offered, " by DHCP", now);
            }
            Some(dhcpv4::Event::Deconfigured) => {
                if self.configuration.is_some() {
                    log::warn!("uplink: the DHCP lease is lost; asking for a new one");
                    self.interface.update_ip_addrs(|addresses| addresses.clear());
                    self.interface.routes_mut().remove_default_ipv4_route();
                    self.configuration = None;
                }
                (dhcp.started_at, dhcp.told) = (now, false);
            }
            None => {}
        }
        let Some(dhcp) = &mut self.dhcp else { return };
        if !dhcp.told && now >= dhcp.started_at.saturating_add(DHCP_PATIENCE_NS) {
            dhcp.told = true;
            let socket = self.sockets.get_mut::<dhcpv4::Socket<'_>>(dhcp.socket);
            let mut retry = socket.get_retry_config();
            retry.discover_timeout = DHCP_RELAXED;
            socket.set_retry_config(retry);
            log::warn!(
                "no DHCP answer after {} s on {name}; still trying. \
                 Without a DHCP server, give ip=A.B.C.D/N gateway=A.B.C.D on the kernel's command line",
                DHCP_PATIENCE_NS / SECOND,
                name = Name(&*self.link.nic),
            );
        }
    }

    /// Takes an address, unless it is what the node has already. `offered` is what who gave it says besides.
    fn configure(
        &mut self,
        address: Ipv4Cidr,
        gateway: Option<Ipv4Addr>,
        offered: Said,
        how: &str,
        now: u64,
    ) {
        let own = &self.said;
        let dns_servers =
            if own.dns_servers.is_empty() { offered.dns_servers } else { own.dns_servers.clone() };
        let mtu = own.mtu.or(offered.mtu).unwrap_or(MTU as u16);
        let new = Configuration { address, gateway, dns_servers, mtu };
        if self.configuration.as_ref() == Some(&new) {
            return;
        }
        self.configuration = Some(new);
        if mtu != self.link.mtu {
            // smoltcp asks for the MTU once, when it is made. The sockets stay as they are.
            self.link.mtu = mtu;
            self.seed = self.seed.rotate_left(31) ^ now;
            self.interface = self.link.interface(self.seed, now);
        }
        self.interface.update_ip_addrs(|addresses| {
            addresses.clear();
            // The list is empty, so there is room.
            let _ = addresses.push(IpCidr::Ipv4(address));
        });
        self.interface.routes_mut().remove_default_ipv4_route();
        if let Some(gateway) = gateway {
            // The table has room for the one route that was just removed.
            let _ = self.interface.routes_mut().add_default_ipv4_route(gateway);
        }
        let gateway = gateway.map_or_else(|| "none".to_string(), |gateway| gateway.to_string());
        let name = Name(&*self.link.nic);
        if mtu == *MTUS.end() {
            log::info!("uplink: {name} has {address}{how}, gateway {gateway}");
        } else {
            log::info!("uplink: {name} has {address}{how}, gateway {gateway}, MTU {mtu}");
        }
        log::info!("API: http://{}:{}", address.address(), self.port);
    }
}

/// The MTU that a DHCP server gives; more than Ethernet's is Ethernet's here.
fn offered_mtu(packet: &DhcpPacket<&[u8]>) -> Option<u16> {
    let option = packet.options().find(|option| option.kind == DHCP_MTU)?;
    let mtu = u16::from_be_bytes(option.data.try_into().ok()?);
    if mtu < *MTUS.start() {
        log::warn!(
            "uplink: the DHCP server says mtu {mtu}, less than IPv4's least of {}: not taken; mtu=N on the kernel's command \
             line says otherwise",
            MTUS.start()
        );
        return None;
    }
    Some(mtu.min(*MTUS.end()))
}

/// An interface's name for people.
struct Name<'a>(&'a dyn Nic);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0.driver(), Mac(self.0.mac()))
    }
}

/// An Ethernet address as people write it, `52:54:00:12:34:56`.
struct Mac([u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

fn instant(now: u64) -> Instant {
    Instant::from_micros(i64::try_from(now / 1000).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{CableEnd, Wire, connected_uplinks};
    use super::*;
    use smoltcp::socket::tcp;

    const MS: u64 = 1_000_000;

    #[test]
    fn without_an_answer_dhcp_is_asked_again_and_the_operator_told() {
        let sent = Wire::default();
        let nic = CableEnd { mac: 1, incoming: Wire::default(), outgoing: sent.clone(), queue: 100 };
        let mut uplink = Uplink::new(Box::new(nic), Addressing::Dhcp, Said::default(), 80, 1, 0);
        let mut now = 0;
        let mut rounds = 0;
        while now < 30 * SECOND {
            uplink.receive(now, |_, _| false, |_| {});
            uplink.transmit(now);
            now = uplink.deadline(now).unwrap().max(now + MS);
            rounds += 1;
        }
        let asked = sent.borrow().len();
        assert!((10..=20).contains(&asked), "asked {asked} times");
        assert!(rounds < 100, "{rounds} rounds for {asked} frames");
        assert!(uplink.dhcp.as_ref().unwrap().told && !uplink.is_up());
        assert_eq!(uplink.describe().mac, "02:00:00:00:00:01");
        assert_eq!(uplink.describe().address, None);
    }

    #[test]
    fn a_static_address_is_up_at_once_and_quiet() {
        let (mut uplink, _, _, sent) = connected_uplinks(100);
        assert!(uplink.is_up());
        assert_eq!(uplink.describe().address.as_deref(), Some("10.0.0.1/24"));
        uplink.receive(MS, |_, _| false, |_| {});
        uplink.transmit(MS);
        assert!(sent.borrow().is_empty());
        assert_eq!(uplink.deadline(MS), None);
    }

    #[test]
    fn rubbish_frames_are_survived() {
        let (mut uplink, _, incoming, _) = connected_uplinks(100);
        let mut state = 1_u64;
        for length in 0..MAX_FRAME_BYTES {
            let mut frame: Vec<u8> = (0..length)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 56) as u8
                })
                .collect();
            // To this interface, alternately IPv4 and ARP, so that more than the first check is reached.
            if let Some(head) = frame.first_chunk_mut::<15>() {
                *head = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 9, 8, if length % 2 == 0 { 0 } else { 6 }, 0x45];
            }
            incoming.borrow_mut().push_back(frame);
        }
        for round in 0..4 {
            uplink.receive(round * MS, |_, _| false, |_| {});
            uplink.transmit(round * MS);
        }
        assert!(incoming.borrow().is_empty() && uplink.is_up());
    }

    #[test]
    fn frames_left_behind_bring_the_next_round_soon() {
        let (mut uplink, _, incoming, _) = connected_uplinks(100);
        incoming.borrow_mut().extend((0..FRAMES_PER_POLL + 1).map(|_| vec![0; 60]));
        uplink.receive(0, |_, _| false, |_| {});
        assert_eq!(uplink.deadline(0), Some(POLL_INTERVAL_NS));
        uplink.receive(POLL_INTERVAL_NS, |_, _| false, |_| {});
        assert_eq!(uplink.deadline(POLL_INTERVAL_NS), None);
    }

    /// An answer to a DHCP request, as RFC 2131 has it: message type 2 (offer) for a discover, 5
    /// (acknowledgement) for the rest.
    fn dhcp_answer(
        request: &[u8],
        address: [u8; 4],
        lease_seconds: u32,
        mtu: Option<u16>,
    ) -> Option<Vec<u8>> {
        const SERVER: [u8; 4] = [10, 0, 0, 254];
        let dhcp = request.get(42..)?;
        let kind = if dhcp.windows(3).any(|option| option == [53, 1, 1]) { 2 } else { 5 };
        let mut body = vec![2, 1, 6, 0];
        body.extend(&dhcp[4..8]);
        body.extend([0; 8]);
        body.extend(address);
        body.extend([0; 8]);
        body.extend(&dhcp[28..44]);
        body.extend([0; 192]);
        body.extend([0x63, 0x82, 0x53, 0x63, 53, 1, kind, 54, 4]);
        body.extend(SERVER);
        body.extend([51, 4]);
        body.extend(lease_seconds.to_be_bytes());
        body.extend([1, 4, 255, 255, 255, 0, 3, 4]);
        body.extend(SERVER);
        body.extend([6, 8, 10, 0, 0, 53, 10, 0, 0, 54]);
        if let Some(mtu) = mtu {
            body.extend([26, 2]);
            body.extend(mtu.to_be_bytes());
        }
        body.push(255);
        let length = |bytes: usize| (bytes as u16).to_be_bytes();
        let mut ip =
            [&[0x45, 0], &length(28 + body.len())[..], &[0; 4], &[64, 17, 0, 0], &SERVER, &[255; 4]].concat();
        let sum: u32 = ip.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        let udp = [&[0, 67, 0, 68], &length(8 + body.len())[..], &[0, 0]].concat();
        Some([&[255; 6], &[2, 0, 0, 0, 0, 254, 8, 0][..], &ip, &udp, &body].concat())
    }

    /// An uplink with a DHCP server that gives `address` for a minute, or is silent.
    struct Dhcpd {
        uplink: Uplink,
        to_uplink: Wire,
        from_uplink: Wire,
        address: Option<[u8; 4]>,
        mtu: Option<u16>,
        segments: Vec<Vec<u8>>,
        now: u64,
    }

    impl Dhcpd {
        fn new() -> Self {
            Self::beside(Said::default())
        }

        /// The operator has said this.
        fn beside(said: Said) -> Self {
            let (to_uplink, from_uplink) = (Wire::default(), Wire::default());
            let nic =
                CableEnd { mac: 1, incoming: to_uplink.clone(), outgoing: from_uplink.clone(), queue: 100 };
            let uplink = Uplink::new(Box::new(nic), Addressing::Dhcp, said, 80, 1, 0);
            Self {
                uplink,
                to_uplink,
                from_uplink,
                address: Some([10, 0, 0, 7]),
                mtu: None,
                segments: vec![],
                now: 0,
            }
        }

        fn run(&mut self, seconds: u64) {
            let end = self.now + seconds * SECOND;
            while self.now < end {
                self.uplink.receive(self.now, |_, _| false, |_| {});
                self.uplink.transmit(self.now);
                for request in self.from_uplink.borrow_mut().drain(..) {
                    let is_dhcp =
                        request.get(12..14) == Some(&[8, 0]) && request.get(36..38) == Some(&[0, 67]);
                    if let Some(address) = self.address.filter(|_| is_dhcp) {
                        self.to_uplink.borrow_mut().extend(dhcp_answer(&request, address, 60, self.mtu));
                    } else if request.get(12..14) == Some(&[8, 6])
                        && request.get(38..42) == Some(&[10, 0, 0, 254])
                    {
                        // Who has the server's address? A renewal goes to it alone.
                        let mut answer =
                            [&request[6..12], &[2, 0, 0, 0, 0, 254, 8, 6], &request[14..20], &[0, 2]]
                                .concat();
                        answer.extend([2, 0, 0, 0, 0, 254, 10, 0, 0, 254]);
                        answer.extend(&request[22..32]);
                        self.to_uplink.borrow_mut().push_back(answer);
                    } else if request.get(23) == Some(&6) {
                        self.segments.push(request);
                    }
                }
                self.now += 100 * MS;
            }
        }

        /// The largest segment that the node names when it connects.
        fn segment_size(&mut self) -> u16 {
            let buffer = || tcp::SocketBuffer::new(vec![0; 100]);
            let socket = self.uplink.sockets.add(tcp::Socket::new(buffer(), buffer()));
            let Uplink { interface, sockets, .. } = &mut self.uplink;
            let server = (Ipv4Addr::new(10, 0, 0, 254), 80);
            sockets.get_mut::<tcp::Socket<'_>>(socket).connect(interface.context(), server, 1000).unwrap();
            self.run(1);
            let syn = self.segments.first().unwrap();
            assert_eq!(syn[54..56], [2, 4]);
            u16::from_be_bytes([syn[56], syn[57]])
        }

        fn address(&self) -> Option<String> {
            self.uplink.describe().address
        }
    }

    #[test]
    fn dhcp_gives_address_and_gateway_and_the_lease_is_renewed() {
        let mut dhcpd = Dhcpd::new();
        dhcpd.run(2);
        assert_eq!(dhcpd.address().as_deref(), Some("10.0.0.7/24"));
        assert_eq!(dhcpd.uplink.describe().gateway.as_deref(), Some("10.0.0.254"));
        for _ in 0..30 {
            dhcpd.run(10);
            assert_eq!(dhcpd.address().as_deref(), Some("10.0.0.7/24"), "at {} s", dhcpd.now / SECOND);
        }
    }

    #[test]
    fn names_are_resolved_by_whom_the_operator_or_else_dhcp_names() {
        let own = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 53), 5300);
        let offered = [53, 54].map(|host| SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, host), DNS_PORT));
        for (operator, expected) in [(vec![], offered.as_slice()), (vec![own], &[own])] {
            let mut dhcpd = Dhcpd::beside(Said { dns_servers: operator, mtu: None });
            assert_eq!(dhcpd.uplink.parts().0, None);
            dhcpd.run(2);
            assert_eq!(dhcpd.uplink.parts().0.unwrap().dns_servers, expected);
        }
    }

    #[test]
    fn the_mtu_is_the_operators_or_else_dhcps_as_far_as_it_makes_sense() {
        for (operator, offered, expected) in [
            (None, None, 1500),
            (None, Some(1460), 1460),
            (Some(1400), Some(1460), 1400),
            (None, Some(9001), 1500),
            (None, Some(68), 1500),
            (Some(576), None, 576),
        ] {
            let mut dhcpd = Dhcpd::beside(Said { dns_servers: vec![], mtu: operator });
            dhcpd.mtu = offered;
            dhcpd.run(2);
            assert_eq!(dhcpd.uplink.parts().0.unwrap().mtu, expected, "{operator:?} {offered:?}");
            assert_eq!(dhcpd.segment_size(), expected - 40, "the node's own TCP");
            assert_eq!(dhcpd.address().as_deref(), Some("10.0.0.7/24"));
        }
    }

    #[test]
    fn another_mtu_comes_with_the_lease_s_renewal_and_the_node_goes_on() {
        let mut dhcpd = Dhcpd::new();
        dhcpd.run(2);
        dhcpd.mtu = Some(1280);
        dhcpd.run(60);
        assert_eq!(dhcpd.uplink.parts().0.unwrap().mtu, 1280);
        assert_eq!(dhcpd.uplink.describe().gateway.as_deref(), Some("10.0.0.254"));
        dhcpd.run(120);
        assert_eq!(dhcpd.address().as_deref(), Some("10.0.0.7/24"));
    }

    #[test]
    fn a_lease_that_nobody_renews_is_given_up_and_asked_for_again() {
        let mut dhcpd = Dhcpd::new();
        dhcpd.run(2);
        dhcpd.address = None;
        dhcpd.run(70);
        assert_eq!(dhcpd.address(), None);
        assert_eq!(dhcpd.uplink.parts().0, None);
        assert_eq!(dhcpd.uplink.describe().gateway, None);
        dhcpd.address = Some([10, 0, 0, 9]);
        dhcpd.run(15);
        assert_eq!(dhcpd.address().as_deref(), Some("10.0.0.9/24"));
    }

    #[test]
    fn frames_that_another_takes_first_are_not_the_nodes() {
        let (mut uplink, _, incoming, sent) = connected_uplinks(100);
        // Who has 10.0.0.1?
        let mut question = vec![0xFF; 6];
        question.extend([2, 0, 0, 0, 0, 9, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        question.extend([2, 0, 0, 0, 0, 9, 10, 0, 0, 9, 0, 0, 0, 0, 0, 0, 10, 0, 0, 1]);
        for (taken, answers) in [(true, 0), (false, 1)] {
            incoming.borrow_mut().push_back(question.clone());
            let mut seen = vec![];
            uplink.receive(
                MS,
                |frame, _| {
                    seen.push(frame.to_vec());
                    taken
                },
                |_| {},
            );
            assert_eq!((seen, sent.borrow().len()), (vec![question.clone()], answers));
        }
    }

    #[test]
    fn without_room_to_answer_frames_wait_in_the_interface() {
        let (mut uplink, _, incoming, sent) = connected_uplinks(1);
        sent.borrow_mut().push_back(vec![]);
        incoming.borrow_mut().push_back(vec![0; 60]);
        uplink.receive(0, |_, _| panic!("taken"), |_| {});
        assert_eq!((incoming.borrow().len(), uplink.deadline(0)), (1, Some(POLL_INTERVAL_NS)));
        sent.borrow_mut().clear();
        uplink.receive(MS, |_, _| true, |_| {});
        assert_eq!((incoming.borrow().len(), uplink.deadline(MS)), (0, None));
    }
}
