//! The machines' network: carries frames between their network cards, nestling-network, which decides what becomes of them, and the
//! uplink, and tells the job store of connections.

#![forbid(unsafe_code)]

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::net::Ipv4Addr;

use nestling_api::Clock;
use nestling_api::egress::Egress;
use nestling_api::jobs::{ConnectionRecord, JobId, JobStore};
use nestling_api::types;
use nestling_machine::platform::{self as card, NetworkConfig};
use nestling_network::{
    Checksum, GATEWAY, Gso, MACHINE, MACHINE_MAC, MTU, MachineKey, Network, Offload, Output, PREFIX, Policy,
    Protocol, Record, Refusal, UplinkConfig,
};

use super::machines::{Machines, NetworkLink};
use super::uplink::Configuration;
use crate::drivers::nic::Nic;

/// A machine's network card: the same in each, since no machine sees another's.
pub const CARD: NetworkConfig = NetworkConfig { mac: MACHINE_MAC, mtu: MTU as u16 };
/// Frames taken of a machine in one go, while its devices are held, and how often in a round: a flood leaves time for the rest.
const FRAMES_PER_TURN: usize = 32;
const TURNS: usize = 8;
/// What is not payload in a packet of the uplink that a segment fills: headers, with time stamps among TCP's options.
const SEGMENT_HEADERS: usize = 52;
/// The largest packet of a machine.
const LARGEST_PACKET: usize = 65_535;
/// Frames for machines in one round: what the uplink gives in one, and answers.
const WAITING_MAX: usize = 2048;
/// How soon frames that could not be carried for want of room are tried again.
const RETRY_NS: u64 = 500_000;

/// A kernel command line that goes on with what the agent sets the card up by: `nestling.net=ADDRESS/PREFIX,GATEWAY,DNS`.
#[must_use]
pub fn command_line(of_image: &str) -> String {
    format!("{of_image} nestling.net={MACHINE}/{PREFIX},{GATEWAY},{GATEWAY}")
}

/// A job's rules.
struct Rules(Egress);

impl Policy for Rules {
    fn allows_name(&self, name: &str, port: Option<u16>) -> bool {
        self.0.allows_name(name, port)
    }

    fn allows_address(&self, address: Ipv4Addr, port: Option<u16>) -> bool {
        self.0.allows_address(address, port)
    }

    fn knows_name(&self, name: &str) -> bool {
        self.0.knows_name(name)
    }

    fn knows_every_name(&self) -> bool {
        self.0 == Egress::All
    }
}

/// A machine on the network.
struct Cable<Id> {
    key: MachineKey,
    machine: Id,
    job: JobId,
    takes_large: bool,
}

/// A frame on its way to a machine.
struct Waiting {
    key: MachineKey,
    frame: Vec<u8>,
    offload: Offload,
}

/// The network that the machines of a node are on.
pub struct MachineNetwork<Id> {
    network: Network<Rules>,
    cables: Vec<Cable<Id>>,
    /// Machines that are gone, of which the network has still to be told.
    leaving: Vec<(MachineKey, JobId)>,
    next: MachineKey,
    waiting: Vec<Waiting>,
    uplink: Option<Configuration>,
    /// Frames of the machine that is looked at.
    taken: Vec<(Vec<u8>, card::Offload)>,
    /// Frames of machines wait for the uplink's room or the next round.
    behind: bool,
}

/// Where the network's frames go.
struct Wires<'a, Id> {
    nic: &'a mut dyn Nic,
    cables: &'a [Cable<Id>],
    waiting: &'a mut Vec<Waiting>,
}

impl<Id> Output for Wires<'_, Id> {
    fn to_machine(&mut self, key: MachineKey, frame: &[u8], offload: Offload) -> bool {
        let room = self.waiting.len() < WAITING_MAX;
        if room {
            self.waiting.push(Waiting { key, frame: frame.to_vec(), offload });
        }
        room
    }

    fn takes_large(&self, key: MachineKey) -> bool {
        self.cables.iter().any(|cable| cable.key == key && cable.takes_large)
    }

    fn to_uplink(&mut self, frame: &[u8]) -> bool {
        self.nic.transmit(frame)
    }
}

impl<Id: Copy> MachineNetwork<Id> {
    /// A network without machines. The seed must not be known outside.
    #[must_use]
    pub fn new(seed: [u8; 32]) -> Self {
        Self {
            network: Network::new(seed),
            cables: Vec::new(),
            leaving: Vec::new(),
            next: 0,
            waiting: Vec::new(),
            uplink: None,
            taken: Vec::new(),
            behind: false,
        }
    }

    /// A machine comes, which may reach what its job says.
    pub fn add(&mut self, machine: Id, job: JobId, egress: Egress) {
        let key = self.next;
        self.next += 1;
        self.network.add_machine(key, Rules(egress));
        self.cables.push(Cable { key, machine, job, takes_large: false });
    }

    /// A job's machine goes.
    pub fn remove(&mut self, job: JobId) {
        let gone = self.cables.extract_if(.., |cable| cable.job == job);
        self.leaving.extend(gone.map(|cable| (cable.key, cable.job)));
    }

    /// Follows the uplink's address.
    pub fn follow(&mut self, uplink: Option<&Configuration>, nic: &mut dyn Nic, now: u64) {
        if self.uplink.as_ref() == uplink {
            return;
        }
        self.uplink = uplink.cloned();
        let mac = nic.mac();
        let config = uplink.map(|uplink| UplinkConfig {
            mac,
            address: uplink.address.address(),
            prefix: uplink.address.prefix_len(),
            gateway: uplink.gateway,
            dns_servers: uplink.dns_servers.clone(),
            mtu: uplink.mtu,
        });
        let mut wires = Wires { nic, cables: &self.cables, waiting: &mut self.waiting };
        self.network.set_uplink(config, now, &mut wires);
    }

    /// Takes a received frame if it is for a machine, or else returns false.
    pub fn receive(&mut self, frame: &mut [u8], nic: &mut dyn Nic, now: u64) -> bool {
        let mut wires = Wires { nic, cables: &self.cables, waiting: &mut self.waiting };
        self.network.from_uplink(frame, now, &mut wires)
    }

    /// Carries what machines have sent and what there is for them, and tells of their connections.
    pub fn carry<M: Machines<Id = Id>>(
        &mut self,
        nic: &mut dyn Nic,
        machines: &mut M,
        jobs: &mut JobStore,
        now: Clock,
    ) {
        let ns = now.monotonic_ns;
        self.network.poll(ns, &mut Wires { nic, cables: &self.cables, waiting: &mut self.waiting });
        self.behind = false;
        for position in 0..self.cables.len() {
            self.carry_one(position, nic, machines, ns);
        }
        // Those of machines that are gone.
        self.waiting.clear();
        self.tell(nic, jobs, now);
        nic.flush();
    }

    fn carry_one<M: Machines<Id = Id>>(
        &mut self,
        position: usize,
        nic: &mut dyn Nic,
        machines: &mut M,
        now: u64,
    ) {
        let Some(&Cable { key, machine, .. }) = self.cables.get(position) else { return };
        let segment_bytes = self.segment_bytes();
        // What one frame of a machine may become, unless its segments are smaller than that.
        let uplink_frames = LARGEST_PACKET.div_ceil(segment_bytes);
        for turn in 1..=TURNS {
            let mut room = nic.transmit_room();
            let takes_large = machines.with_network(machine, |link| {
                self.give(key, link);
                // What is taken here goes out at once.
                while self.taken.len() < FRAMES_PER_TURN && room >= uplink_frames {
                    let mut frame = Vec::new();
                    let Some(offload) = link.take_frame(&mut frame) else { break };
                    room = room.saturating_sub(frame.len().div_ceil(segment_bytes));
                    self.taken.push((frame, offload));
                }
                self.behind |= link.has_frame() && (turn == TURNS || self.taken.is_empty());
                link.accepts().tso4
            });
            if let Some(cable) = self.cables.get_mut(position) {
                cable.takes_large = takes_large.unwrap_or(false);
            }
            let mut wires = Wires { nic, cables: &self.cables, waiting: &mut self.waiting };
            let had_some = !self.taken.is_empty();
            for (mut frame, offload) in self.taken.drain(..) {
                self.network.from_machine(key, &mut frame, from_card(offload), now, &mut wires);
                // The device works on these while the next are made.
                wires.nic.flush();
            }
            if !had_some {
                return;
            }
        }
        // Answers to the last turn's.
        machines.with_network(machine, |link| self.give(key, link));
    }

    /// Payload of a segment that fills a packet of the uplink.
    fn segment_bytes(&self) -> usize {
        let mtu = self.uplink.as_ref().map_or(MTU, |uplink| usize::from(uplink.mtu));
        mtu.saturating_sub(SEGMENT_HEADERS).max(1)
    }

    /// Gives a machine the frames that wait for it. Those without room are lost, as in a switch.
    fn give(&mut self, key: MachineKey, link: &mut dyn NetworkLink) {
        self.waiting.retain(|waiting| {
            if waiting.key == key && !link.give_frame(&waiting.frame, to_card(waiting.offload)) {
                log::debug!("network: a frame of {} bytes for a machine was dropped", waiting.frame.len());
            }
            waiting.key != key
        });
    }

    fn tell(&mut self, nic: &mut dyn Nic, jobs: &mut JobStore, now: Clock) {
        let ns = now.monotonic_ns;
        let mut records = Vec::new();
        for cable in &self.cables {
            self.network.take_records(cable.key, ns, |record| records.push(record));
            record(jobs, cable.job, &mut records, now);
        }
        for (key, job) in self.leaving.drain(..) {
            let mut wires = Wires { nic, cables: &self.cables, waiting: &mut self.waiting };
            self.network.remove_machine(key, ns, &mut wires, |record| records.push(record));
            record(jobs, job, &mut records, now);
        }
    }

    /// When [`MachineNetwork::carry`] has to be called next, whatever arrives, in nanoseconds since boot.
    #[must_use]
    pub fn deadline(&self, now: u64) -> Option<u64> {
        let retry = self.behind.then(|| now.saturating_add(RETRY_NS));
        self.network.deadline().into_iter().chain(retry).min()
    }
}

/// Takes records over into a job's log of connections.
fn record(jobs: &mut JobStore, job: JobId, records: &mut Vec<Record>, now: Clock) {
    if records.is_empty() {
        return;
    }
    let connections = records.iter().map(|record| ConnectionRecord {
        number: record.number,
        protocol: match record.protocol {
            Protocol::Tcp => types::Protocol::Tcp,
            Protocol::Udp => types::Protocol::Udp,
            Protocol::Icmp => types::Protocol::Icmp,
            Protocol::Dns => types::Protocol::Dns,
        },
        name: record.name.as_deref(),
        address: record.address,
        port: record.port,
        bytes_sent: record.bytes_sent,
        bytes_received: record.bytes_received,
        refused: record.refused.map(Refusal::reason),
    });
    jobs.record_connections(job, connections, now);
    records.clear();
}

/// What a machine's card leaves to be done to a frame, in the network's words.
fn from_card(offload: card::Offload) -> Offload {
    Offload {
        checksum: match offload.checksum {
            card::Checksum::Complete => Checksum::Complete,
            card::Checksum::Verified => Checksum::Verified,
            card::Checksum::Partial { start, offset } => Checksum::Partial { start, offset },
        },
        gso: offload.gso.map(|gso| Gso { size: gso.size, header_bytes: gso.header_bytes }),
    }
}

/// What the network leaves to a machine, in its card's words.
fn to_card(offload: Offload) -> card::Offload {
    card::Offload {
        checksum: match offload.checksum {
            Checksum::Complete => card::Checksum::Complete,
            Checksum::Verified => card::Checksum::Verified,
            Checksum::Partial { start, offset } => card::Checksum::Partial { start, offset },
        },
        gso: offload.gso.map(|gso| card::Gso { size: gso.size, header_bytes: gso.header_bytes }),
    }
}

#[cfg(test)]
mod tests;
