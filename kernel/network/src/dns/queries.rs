//! Queries on their way to a DNS server.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::net::SocketAddrV4;

use crate::SECOND;
use crate::network::MachineKey;

/// Queries of one machine at once; the oldest goes first.
pub(crate) const MAX_OF_MACHINE: usize = 64;
/// Queries of all machines at once.
pub(crate) const MAX: usize = 1024;
/// How long an answer may take. Clients ask again after five seconds.
const PATIENCE: u64 = 5 * SECOND;

/// A query without an answer yet.
#[derive(Debug)]
pub(crate) struct InFlight {
    pub(crate) machine: MachineKey,
    /// The machine's port and the query's id there.
    pub(crate) client: (u16, u16),
    /// The id on the way to the server.
    pub(crate) id: u16,
    pub(crate) server: SocketAddrV4,
    pub(crate) name: Arc<str>,
    pub(crate) question: Vec<u8>,
    pub(crate) expires: u64,
}

/// Queries by the node's port they left from.
#[derive(Debug, Default)]
pub(crate) struct Queries {
    in_flight: BTreeMap<u16, InFlight>,
    /// Which of the servers is asked; another one after one did not answer.
    server: usize,
}

impl Queries {
    /// The server to ask.
    pub(crate) fn server(&self, servers: &[SocketAddrV4]) -> Option<SocketAddrV4> {
        servers.get(self.server.checked_rem(servers.len())?).copied()
    }

    /// The query that has to go before another of this machine may come.
    pub(crate) fn surplus(&self, machine: MachineKey) -> Option<u16> {
        let of_machine = || self.in_flight.iter().filter(|(_, query)| query.machine == machine);
        let full = self.in_flight.len() >= MAX || of_machine().count() >= MAX_OF_MACHINE;
        let oldest = |(port, query): (&u16, &InFlight)| (query.expires, *port);
        full.then(|| of_machine().map(oldest).min().or_else(|| self.in_flight.iter().map(oldest).min()))?
            .map(|(_, port)| port)
    }

    /// A query leaves from `port`.
    pub(crate) fn insert(&mut self, port: u16, query: InFlight) {
        self.in_flight.insert(port, query);
    }

    /// The query that left from `port`.
    pub(crate) fn get(&self, port: u16) -> Option<&InFlight> {
        self.in_flight.get(&port)
    }

    /// The query is over.
    pub(crate) fn remove(&mut self, port: u16) -> Option<InFlight> {
        self.in_flight.remove(&port)
    }

    /// Forgets queries: those whose time is over and those of a machine that is gone. `freed` is given their ports.
    pub(crate) fn forget(&mut self, now: u64, gone: Option<MachineKey>, mut freed: impl FnMut(u16)) {
        let server = &mut self.server;
        self.in_flight.retain(|port, query| {
            let late = now >= query.expires;
            if late {
                *server = server.wrapping_add(1);
            }
            let keep = !late && gone != Some(query.machine);
            if !keep {
                freed(*port);
            }
            keep
        });
    }

    /// When the next one's time is over.
    pub(crate) fn deadline(&self) -> Option<u64> {
        self.in_flight.values().map(|query| query.expires).min()
    }

    /// When the time of a query that leaves now is over.
    pub(crate) fn expiry(now: u64) -> u64 {
        now.saturating_add(PATIENCE)
    }
}
