//! The network as a whole: who is on it, and what it does as time goes by. [`outward`] is what machines send, [`inward`] what comes from
//! the uplink, [`connections`] how mappings begin and end, [`proxy`] how names are looked up.

mod connections;
mod inward;
mod outward;
mod proxy;
#[cfg(test)]
mod tests;

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;
use core::net::Ipv4Addr;

use smoltcp::wire::{EthernetFrame, EthernetProtocol};

use crate::SECOND;
use crate::coalesce::Coalescer;
use crate::dns::Queries;
use crate::fragments::Reassembly;
use crate::frame::{ETHERNET, Offload, Output};
use crate::ip::Header;
use crate::link;
use crate::machine::Machine;
use crate::nat::Ports;
use crate::neighbors::Neighbors;
use crate::policy::Policy;
use crate::records::Record;
use crate::uplink::UplinkConfig;
use crate::{arp, fragments};

/// Names a machine; whoever adds it chooses.
pub type MachineKey = u64;

/// Connections of all machines at once.
pub(crate) const MAX_FLOWS: usize = 16_384;
/// Machines among which they are shared at least: no machine has more than a quarter.
const LEAST_SHARES: usize = 4;
/// Between two tellings of the figures of connections that go on.
const NEWS_INTERVAL: u64 = SECOND / 2;
/// Between two looks at what is too old.
const SWEEP_INTERVAL: u64 = SECOND;

/// What was lost, since the network began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames for which machine or uplink had no room.
    pub no_room: u64,
    /// Frames that were malformed, had wrong checksums, or came from addresses that nobody has.
    pub invalid: u64,
}

/// The network of a node.
#[derive(Debug)]
pub struct Network<P> {
    uplink: Option<UplinkConfig>,
    /// The address that connections are known by outside, kept while the uplink has none.
    address: Option<Ipv4Addr>,
    machines: BTreeMap<MachineKey, Machine<P>>,
    /// Connections of all machines.
    flows: usize,
    ports: Ports,
    queries: Queries,
    neighbors: Neighbors,
    /// Fragments from outside.
    fragments: Reassembly,
    coalescer: Coalescer,
    /// Room for one frame of the link's size.
    scratch: Box<[u8]>,
    /// IP's identification of the next packet that is cut here.
    ident: u16,
    sweep_due: u64,
    counters: Counters,
}

impl<P: Policy> Network<P> {
    /// A network without machines and without an uplink. The seed decides ports and ids and must not be known outside.
    #[must_use]
    pub fn new(seed: [u8; 32]) -> Self {
        Self {
            uplink: None,
            address: None,
            machines: BTreeMap::new(),
            flows: 0,
            ports: Ports::new(seed),
            queries: Queries::default(),
            neighbors: Neighbors::default(),
            fragments: Reassembly::default(),
            coalescer: Coalescer::default(),
            scratch: vec![0; ETHERNET + link::MTU].into_boxed_slice(),
            ident: 0,
            sweep_due: u64::MAX,
            counters: Counters::default(),
        }
    }

    /// A machine comes. One by the same key must have been removed before.
    pub fn add_machine(&mut self, key: MachineKey, policy: P) {
        self.machines.insert(key, Machine::new(policy));
    }

    /// A machine goes: its connections are reset towards the outside, and the last records given to `tell`.
    pub fn remove_machine(
        &mut self,
        key: MachineKey,
        now: u64,
        out: &mut impl Output,
        mut tell: impl FnMut(Record),
    ) {
        self.coalescer.forget(key);
        let Some(flows) = self.machines.get(&key).map(|machine| machine.flows.keys()) else { return };
        while let Some(record) = self.machines.get_mut(&key).and_then(|machine| machine.records.take()) {
            tell(record);
        }
        for flow in flows {
            if let Some(news) = self.close(key, &flow, now, out) {
                tell(news);
            }
        }
        let ports = &mut self.ports;
        self.queries.forget(now, Some(key), |port| ports.free(crate::Protocol::Udp, port));
        self.machines.remove(&key);
    }

    /// The uplink has an address, another one, or none. With another one all connections are over: the outside knew them by the old.
    /// One that is lost and comes back as it was finds them as they were.
    pub fn set_uplink(&mut self, uplink: Option<UplinkConfig>, now: u64, out: &mut impl Output) {
        if self.uplink == uplink {
            return;
        }
        self.neighbors.clear();
        // Without an uplink, connections that end are not reset: their address is gone.
        self.uplink = None;
        let address = uplink.as_ref().map(|uplink| uplink.address);
        if address.is_some() && address != self.address {
            let keys: Vec<_> = self.machines.keys().copied().collect();
            for key in keys {
                let flows = self.machines.get(&key).map(|machine| machine.flows.keys()).unwrap_or_default();
                flows.iter().for_each(|flow| self.close_and_tell(key, flow, now, out));
            }
        }
        self.address = address.or(self.address);
        self.uplink = uplink;
    }

    /// Takes a frame from a machine. It may be changed on the way.
    pub fn from_machine(
        &mut self,
        key: MachineKey,
        frame: &mut [u8],
        offload: Offload,
        now: u64,
        out: &mut impl Output,
    ) {
        let Ok(ethernet) = EthernetFrame::new_checked(&*frame) else {
            self.counters.invalid += 1;
            return;
        };
        match ethernet.ethertype() {
            EthernetProtocol::Arp => {
                if let Some(answer) = arp::answer(ethernet.payload()) {
                    self.give(key, &answer, out);
                }
            }
            EthernetProtocol::Ipv4 => match Header::read(ethernet.payload()) {
                Some(header) => self.packet_from_machine(key, frame, header, offload, now, out),
                None => self.counters.invalid += 1,
            },
            // IPv6 and whatever else: nobody is there.
            _ => {}
        }
    }

    /// Takes a frame from the uplink, if it is for a machine; it may then be changed. False: it is somebody else's, as it was.
    pub fn from_uplink(&mut self, frame: &mut [u8], now: u64, out: &mut impl Output) -> bool {
        let (Some(uplink), Ok(ethernet)) = (&self.uplink, EthernetFrame::new_checked(&*frame)) else {
            return false;
        };
        match ethernet.ethertype() {
            EthernetProtocol::Arp => {
                self.neighbors.learn(ethernet.payload(), uplink, now, out);
                false
            }
            EthernetProtocol::Ipv4 => match Header::read(ethernet.payload()) {
                Some(header) if header.destination == uplink.address => {
                    self.packet_from_uplink(frame, header, now, out)
                }
                _ => false,
            },
            _ => false,
        }
    }

    /// Sends what waited for more frames from the uplink. To be called when a batch of [`Network::from_uplink`] is over.
    pub fn flush(&mut self, out: &mut impl Output) {
        self.coalescer.flush(out);
    }

    /// Does what is due.
    pub fn poll(&mut self, now: u64, out: &mut impl Output) {
        self.coalescer.flush(out);
        if let Some(uplink) = &self.uplink {
            self.neighbors.poll(uplink, now, out);
        }
        let ports = &mut self.ports;
        self.queries.forget(now, None, |port| ports.free(crate::Protocol::Udp, port));
        if now < self.sweep_due {
            return;
        }
        let mut next = None;
        let keys: Vec<_> = self.machines.keys().copied().collect();
        for key in keys {
            let Some((expired, then)) = self.machines.get(&key).map(|machine| machine.flows.expired(now))
            else {
                continue;
            };
            next = next.into_iter().chain(then).min();
            for flow in expired {
                self.close_and_tell(key, &flow, now, out);
            }
        }
        self.sweep_due = next.map_or(u64::MAX, |next| next.max(now.saturating_add(SWEEP_INTERVAL)));
    }

    /// When [`Network::poll`] has to be called next, whatever arrives.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        let sweep = (self.sweep_due != u64::MAX && self.flows > 0).then_some(self.sweep_due);
        [sweep, self.neighbors.deadline(), self.queries.deadline()].into_iter().flatten().min()
    }

    /// Gives what there is to tell of a machine's connections: what began or ended at once, figures that grow twice a second.
    pub fn take_records(&mut self, key: MachineKey, now: u64, mut tell: impl FnMut(Record)) {
        let Some(machine) = self.machines.get_mut(&key) else { return };
        while let Some(record) = machine.records.take() {
            tell(record);
        }
        if now >= machine.news_due {
            machine.news_due = now.saturating_add(NEWS_INTERVAL);
            machine.flows.news(tell);
        }
    }

    /// What was lost.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Sends a frame that started here to a machine.
    fn give(&mut self, key: MachineKey, frame: &[u8], out: &mut impl Output) {
        // A machine's stack sees packets in the order in which they were made.
        self.coalescer.flush(out);
        let verified = Offload { checksum: crate::Checksum::Verified, gso: None };
        let mut sent = true;
        if frame.len() > ETHERNET + link::MTU {
            let Some(header) = frame.get(ETHERNET..).and_then(Header::read) else { return };
            self.ident = self.ident.wrapping_add(1);
            fragments::cut(frame, &header, self.ident, link::MTU, |piece| {
                sent &= out.to_machine(key, piece, Offload::default());
            });
        } else {
            sent = out.to_machine(key, frame, verified);
        }
        self.counters.no_room += u64::from(!sent);
    }
}
