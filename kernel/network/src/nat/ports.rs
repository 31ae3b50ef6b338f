//! The ports of the uplink's address that translation uses, and who has them.

use alloc::collections::BTreeMap;

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::FlowKey;
use crate::network::MachineKey;
use crate::records::Protocol;

/// The first port; those below are the node's own.
const FIRST: u16 = 32_768;
/// How many there are.
const COUNT: u16 = 28_232;
/// All of them.
pub const PORTS: core::ops::RangeInclusive<u16> = FIRST..=FIRST + (COUNT - 1);
/// Tries to find a free one. At most 17,408 are taken, so this many fail once in 10^13 times.
const TRIES: usize = 64;

/// Who has a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// A connection of a machine.
    Flow(MachineKey, FlowKey),
    /// A query of the DNS proxy.
    Dns,
}

/// The ports in use, and chance.
#[derive(Debug)]
pub(crate) struct Ports {
    owners: BTreeMap<(Protocol, u16), Owner>,
    random: ChaCha20Rng,
}

impl Ports {
    /// No port is in use. The seed decides which are taken; it must not be known outside.
    pub(crate) fn new(seed: [u8; 32]) -> Self {
        Self { owners: BTreeMap::new(), random: ChaCha20Rng::from_seed(seed) }
    }

    /// Gives a port by chance (RFC 6056). None: all that were tried are in use.
    pub(crate) fn take(&mut self, protocol: Protocol, owner: Owner) -> Option<u16> {
        for _ in 0..TRIES {
            let offset = (u32::from(self.number()) * u32::from(COUNT)) >> 16;
            let port = FIRST + offset as u16;
            if let alloc::collections::btree_map::Entry::Vacant(free) = self.owners.entry((protocol, port)) {
                free.insert(owner);
                return Some(port);
            }
        }
        None
    }

    /// A port is free again.
    pub(crate) fn free(&mut self, protocol: Protocol, port: u16) {
        self.owners.remove(&(protocol, port));
    }

    /// Who has a port.
    pub(crate) fn owner(&self, protocol: Protocol, port: u16) -> Option<Owner> {
        self.owners.get(&(protocol, port)).copied()
    }

    /// A number by chance.
    pub(crate) fn number(&mut self) -> u16 {
        self.random.next_u32() as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_port_is_given_once_and_all_lie_in_the_range() {
        let mut ports = Ports::new([7; 32]);
        for _ in 0..16_384 {
            let port = ports.take(Protocol::Udp, Owner::Dns).unwrap();
            assert!((FIRST..FIRST + COUNT).contains(&port));
        }
        assert_eq!(ports.owners.len(), 16_384);
        assert!(ports.take(Protocol::Tcp, Owner::Dns).is_some());
        let port = ports.owners.keys().next().unwrap().1;
        assert_eq!(ports.owner(Protocol::Tcp, port).or(ports.owner(Protocol::Udp, port)), Some(Owner::Dns));
    }
}
