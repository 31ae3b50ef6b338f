//! The machine's network card: up, with the address, route and name server that the node says on the kernel's command line.
//!
//! Linux: netdevice(7), include/uapi/linux/route.h; resolv.conf(5).

use std::ffi::c_char;
use std::fs;
use std::io;
use std::mem;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::str::FromStr;

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::system::optional;

/// The kernel's name for the first network card.
const CARD: &str = "eth0";
/// Where programs look for name servers.
const RESOLVER: &str = "/etc/resolv.conf";
/// IFF_UP, IFF_BROADCAST and IFF_MULTICAST (Linux: include/uapi/linux/if.h).
const FLAGS: &str = "0x1003";

mod ioctl {
    use nix::libc;

    nix::ioctl_write_ptr_bad!(set_address, libc::SIOCSIFADDR, libc::ifreq);
    nix::ioctl_write_ptr_bad!(set_netmask, libc::SIOCSIFNETMASK, libc::ifreq);
    nix::ioctl_write_ptr_bad!(add_route, libc::SIOCADDRT, libc::rtentry);
}

/// What the node says of the network: `ADDRESS/PREFIX,GATEWAY,DNS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Network {
    address: Ipv4Addr,
    /// Bits of the network's prefix, at most 32.
    prefix: u32,
    gateway: Ipv4Addr,
    dns: Ipv4Addr,
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let [address, gateway, dns] = text.split(',').collect::<Vec<_>>().try_into().ok()?;
            let (address, prefix) = address.split_once('/')?;
            Some(Self {
                address: address.parse().ok()?,
                prefix: prefix.parse().ok().filter(|&prefix| prefix <= 32)?,
                gateway: gateway.parse().ok()?,
                dns: dns.parse().ok()?,
            })
        };
        parse().ok_or_else(|| format!("nestling.net={text} is not ADDRESS/PREFIX,GATEWAY,DNS"))
    }
}

impl Network {
    fn netmask(&self) -> Ipv4Addr {
        u32::MAX.checked_shl(32 - self.prefix).unwrap_or(0).into()
    }
}

/// Brings the card up. Without a network a machine can still do much, so what fails is only reported.
pub(crate) fn start(network: &Network) {
    // The node translates IPv4 alone; looking for IPv6 would only wake it. Where it is already off there is nothing to write to.
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{CARD}/disable_ipv6"), "1");
    optional(&format!("bring {CARD} up"), bring_up(network));
    optional(&format!("write {RESOLVER}"), write_resolver(Path::new(RESOLVER), network.dns));
}

fn bring_up(network: &Network) -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let descriptor = socket.as_raw_fd();
    let (address, netmask) = (request(network.address), request(network.netmask()));
    // SAFETY: both ioctls read one ifreq from the pointer, which is valid for the call; the descriptor is open.
    unsafe {
        ioctl::set_address(descriptor, &raw const address)?;
        ioctl::set_netmask(descriptor, &raw const netmask)?;
    }
    fs::write(format!("/sys/class/net/{CARD}/flags"), FLAGS)?;
    let route = default_route(network.gateway);
    // SAFETY: the ioctl reads one rtentry from the pointer, which is valid for the call; its `rt_dev` is null, which means none; the
    // descriptor is open.
    unsafe { ioctl::add_route(descriptor, &raw const route) }?;
    Ok(())
}

/// A request that gives the card an address or a mask.
fn request(address: Ipv4Addr) -> libc::ifreq {
    // SAFETY: an ifreq is plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(CARD.bytes()) {
        *to = from as c_char;
    }
    request.ifr_ifru.ifru_addr = socket_address(address);
    request
}

fn default_route(gateway: Ipv4Addr) -> libc::rtentry {
    // SAFETY: an rtentry is plain data, for which zeros, and a null pointer to the name of a device, are valid.
    let mut route: libc::rtentry = unsafe { mem::zeroed() };
    route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = socket_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    route
}

/// A `sockaddr_in` (ip(7)) without a port.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let [a, b, c, d] = address.octets().map(|byte| byte as c_char);
    let sa_data = [0, 0, a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0];
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data }
}

/// Names the name server, unless the image names its own.
fn write_resolver(path: &Path, dns: Ipv4Addr) -> io::Result<()> {
    match fs::read(path) {
        Ok(bytes) if !bytes.trim_ascii().is_empty() => return Ok(()),
        Ok(_) => {}
        // A link to where something that does not run here would write it; writing through it could fail for want of a folder.
        Err(_) if path.is_symlink() => fs::remove_file(path)?,
        Err(_) => path.parent().map_or(Ok(()), fs::create_dir_all)?,
    }
    fs::write(path, format!("nameserver {dns}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const SAID: &str = "192.0.0.2/29,192.0.0.1,192.0.0.3";

    #[test]
    fn what_the_node_says_is_understood() {
        let network: Network = SAID.parse().unwrap();
        assert_eq!(
            (network.address, network.netmask()),
            ([192, 0, 0, 2].into(), [255, 255, 255, 248].into())
        );
        assert_eq!((network.gateway, network.dns), ([192, 0, 0, 1].into(), [192, 0, 0, 3].into()));
    }

    #[test]
    fn the_longest_and_the_shortest_prefix_have_masks() {
        let mask = |prefix: u32| {
            format!("10.0.0.1/{prefix},10.0.0.2,10.0.0.2").parse::<Network>().unwrap().netmask()
        };
        assert_eq!((mask(32), mask(0)), (Ipv4Addr::BROADCAST, Ipv4Addr::UNSPECIFIED));
    }

    #[test]
    fn anything_else_is_named_in_the_error() {
        for text in
            ["", "192.0.0.2", "192.0.0.2,192.0.0.1,192.0.0.1", "192.0.0.2/33,192.0.0.1,192.0.0.1", "a/29,b,c"]
        {
            assert!(text.parse::<Network>().unwrap_err().contains(text));
            assert!(format!("{SAID},{text}").parse::<Network>().is_err());
        }
    }

    #[test]
    fn an_address_is_where_the_kernel_looks_for_it() {
        let address = socket_address([192, 0, 0, 2].into());
        assert_eq!(address.sa_family, 2);
        assert_eq!(address.sa_data.map(|byte| byte as u8)[..8], [0, 0, 192, 0, 0, 2, 0, 0]);
    }

    #[test]
    fn the_name_server_is_written_only_where_the_image_names_none() {
        let folder = std::env::temp_dir().join(format!("nestling-resolver-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("etc/resolv.conf");
        let written = || fs::read_to_string(&path).unwrap();
        write_resolver(&path, [192, 0, 0, 1].into()).unwrap();
        assert_eq!(written(), "nameserver 192.0.0.1\n", "there was no folder");
        fs::write(&path, " \n").unwrap();
        write_resolver(&path, [192, 0, 0, 2].into()).unwrap();
        assert_eq!(written(), "nameserver 192.0.0.2\n", "it was empty");
        write_resolver(&path, [192, 0, 0, 3].into()).unwrap();
        assert_eq!(written(), "nameserver 192.0.0.2\n", "it names one");
        fs::remove_file(&path).unwrap();
        symlink("../run/systemd/resolve/stub-resolv.conf", &path).unwrap();
        write_resolver(&path, [192, 0, 0, 4].into()).unwrap();
        assert_eq!(written(), "nameserver 192.0.0.4\n", "it was a dangling link");
        fs::remove_dir_all(&folder).unwrap();
    }
}
