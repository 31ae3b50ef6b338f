//! Who on the uplink's link has which Ethernet address: RFC 826, with RFC 1122's bounds (2.3.2): requests at most once a second each, and
//! the newest packets for an address kept while it is asked for.

use alloc::collections::BTreeMap;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::net::Ipv4Addr;

use smoltcp::wire::{ArpOperation, ArpPacket, ArpRepr};

use crate::SECOND;
use crate::arp;
use crate::frame::Output;
use crate::uplink::UplinkConfig;

/// Neighbours known or asked for.
const MAX_NEIGHBORS: usize = 256;
/// Frames kept for one while it is asked for: with the number of neighbours, at most 1.5 MiB.
const MAX_QUEUED: usize = 4;
/// How long an address is used before it is asked for again; in its last part the old one is still used.
const FRESH: u64 = 60 * SECOND;
const STALE: u64 = 90 * SECOND;
/// Between two requests for one address.
const RETRY: u64 = SECOND;
/// Requests before the queued frames are given up.
const MAX_REQUESTS: u8 = 3;

#[derive(Debug, Default)]
struct Neighbor {
    mac: Option<([u8; 6], u64)>,
    asked: Option<u64>,
    requests: u8,
    queued: VecDeque<Vec<u8>>,
}

/// The neighbours of the uplink.
#[derive(Debug, Default)]
pub(crate) struct Neighbors {
    known: BTreeMap<Ipv4Addr, Neighbor>,
}

impl Neighbors {
    /// Forgets all: the link is another.
    pub(crate) fn clear(&mut self) {
        self.known.clear();
    }

    /// Sends a frame to a neighbour, or keeps it until its address is known. False: it is lost.
    pub(crate) fn send(
        &mut self,
        hop: Ipv4Addr,
        frame: &mut [u8],
        uplink: &UplinkConfig,
        now: u64,
        out: &mut impl Output,
    ) -> bool {
        if !self.known.contains_key(&hop) && self.known.len() >= MAX_NEIGHBORS {
            self.forget_one(now);
        }
        let neighbor = self.known.entry(hop).or_default();
        let age = |learned: u64| now.saturating_sub(learned);
        match neighbor.mac.filter(|(_, learned)| age(*learned) < STALE) {
            Some((mac, learned)) => {
                if age(learned) >= FRESH {
                    ask(neighbor, hop, uplink, now, out);
                }
                crate::frame::set_ethernet(frame, mac, uplink.mac, smoltcp::wire::EthernetProtocol::Ipv4);
                out.to_uplink(frame)
            }
            None => {
                neighbor.mac = None;
                if neighbor.queued.len() >= MAX_QUEUED {
                    neighbor.queued.pop_front();
                }
                neighbor.queued.push_back(frame.to_vec());
                ask(neighbor, hop, uplink, now, out);
                true
            }
        }
    }

    /// Makes room: the one who has waited longest without an answer, or was learned first.
    fn forget_one(&mut self, now: u64) {
        let age = |neighbor: &Neighbor| {
            let since = neighbor.mac.map_or(neighbor.asked.unwrap_or(0), |mac| mac.1);
            (neighbor.mac.is_none(), now.saturating_sub(since))
        };
        let oldest = self.known.iter().max_by_key(|(_, neighbor)| age(neighbor)).map(|(address, _)| *address);
        oldest.map(|address| self.known.remove(&address));
    }

    /// Looks at an ARP message from the uplink, from the Ethernet header's end on; only answers that were asked for count, and what
    /// a known neighbour says of itself.
    pub(crate) fn learn(&mut self, packet: &[u8], uplink: &UplinkConfig, now: u64, out: &mut impl Output) {
        let Ok(message) = ArpPacket::new_checked(packet) else { return };
        let Ok(ArpRepr::EthernetIpv4 { source_hardware_addr, source_protocol_addr, .. }) =
            ArpRepr::parse(&message)
        else {
            return;
        };
        let Some(neighbor) = self.known.get_mut(&source_protocol_addr) else { return };
        if !source_hardware_addr.is_unicast() {
            return;
        }
        let mac = source_hardware_addr.0;
        (neighbor.mac, neighbor.asked, neighbor.requests) = (Some((mac, now)), None, 0);
        for mut frame in core::mem::take(&mut neighbor.queued) {
            crate::frame::set_ethernet(&mut frame, mac, uplink.mac, smoltcp::wire::EthernetProtocol::Ipv4);
            out.to_uplink(&frame);
        }
    }

    /// Asks again where no answer came, and gives up after some time.
    pub(crate) fn poll(&mut self, uplink: &UplinkConfig, now: u64, out: &mut impl Output) {
        for (address, neighbor) in &mut self.known {
            if !neighbor.queued.is_empty() {
                if neighbor.requests >= MAX_REQUESTS && due(neighbor) <= now {
                    neighbor.queued.clear();
                    neighbor.requests = 0;
                } else {
                    ask(neighbor, *address, uplink, now, out);
                }
            }
        }
    }

    /// When [`Neighbors::poll`] has something to do.
    pub(crate) fn deadline(&self) -> Option<u64> {
        self.known.values().filter(|neighbor| !neighbor.queued.is_empty()).map(due).min()
    }
}

fn due(neighbor: &Neighbor) -> u64 {
    neighbor.asked.map_or(0, |asked| asked.saturating_add(RETRY))
}

fn ask(neighbor: &mut Neighbor, hop: Ipv4Addr, uplink: &UplinkConfig, now: u64, out: &mut impl Output) {
    if neighbor.asked.is_some() && now < due(neighbor) {
        return;
    }
    neighbor.asked = Some(now);
    neighbor.requests = neighbor.requests.saturating_add(1);
    out.to_uplink(&arp::message(
        ArpOperation::Request,
        (uplink.mac, uplink.address),
        ([0; 6], hop),
        [0xff; 6],
    ));
}
