//! How a machine's connections begin and end.

use smoltcp::wire::IpProtocol;

use super::{LEAST_SHARES, MAX_FLOWS, MachineKey, Network};
use crate::frame::{self, Output};
use crate::link::GATEWAY;
use crate::nat::{FlowKey, Owner};
use crate::policy::{self, Policy, Refusal};
use crate::records::{Protocol, Record};
use crate::transport;

impl<P: Policy> Network<P> {
    /// Begins a connection, if the machine may have it.
    pub(super) fn open(
        &mut self,
        key: MachineKey,
        flow: FlowKey,
        now: u64,
        out: &mut impl Output,
    ) -> Result<(), Refusal> {
        let machines = self.machines.len();
        let Some(machine) = self.machines.get_mut(&key) else { return Err(Refusal::Policy) };
        // The gateway has nothing but DNS, whose place a server outside takes.
        let by_proxy = flow.remote == GATEWAY;
        let server = self.uplink.as_ref().and_then(|uplink| self.queries.server(&uplink.dns_servers));
        let beyond = match server.filter(|_| by_proxy) {
            Some(server) => (*server.ip(), server.port()),
            None => flow.end(),
        };
        let port = (flow.protocol != Protocol::Icmp).then_some(beyond.1);
        let record = Record {
            number: 0,
            protocol: flow.protocol,
            name: None,
            address: Some(beyond.0),
            port,
            bytes_sent: 0,
            bytes_received: 0,
            refused: None,
        };
        let policy = &machine.policy;
        let by_name = machine.names.find(flow.remote, now, |name| policy.allows_name(name, port));
        let refused = if by_proxy && !policy.knows_every_name() {
            Some(Refusal::NamesByTcp)
        } else if by_proxy {
            server.is_none().then_some(Refusal::NoServer)
        } else {
            policy::closed(flow.remote, self.uplink.as_ref()).or_else(|| {
                let allowed = by_name.is_some() || policy.allows_address(flow.remote, port);
                (!allowed).then_some(Refusal::Policy)
            })
        };
        let name = by_name.or_else(|| machine.names.find(flow.remote, now, |_| true));
        if let Some(refused) = refused {
            machine.records.refuse(Record { name, refused: Some(refused), ..record }, now);
            return Err(refused);
        }
        if machine.flows.get(&flow).is_some() {
            self.close_and_tell(key, &flow, now, out);
        }
        self.make_room(key, flow.protocol, machines, now, out);
        let port = self.ports.take(flow.protocol, Owner::Flow(key, flow));
        let Some(machine) = self.machines.get_mut(&key) else { return Err(Refusal::Policy) };
        let Some(port) = port else {
            let refused = Some(Refusal::Connections);
            machine.records.refuse(Record { name, refused, ..record }, now);
            return Err(Refusal::Connections);
        };
        let number = machine.records.begin(Record { name, ..record });
        machine.flows.insert(flow, beyond, number, port, now);
        self.flows += 1;
        Ok(())
    }

    /// Ends connections until one more may begin: first those of this machine, if it has its share, otherwise those of the
    /// one that has most.
    fn make_room(
        &mut self,
        key: MachineKey,
        protocol: Protocol,
        machines: usize,
        now: u64,
        out: &mut impl Output,
    ) {
        let Some(machine) = self.machines.get_mut(&key) else { return };
        if protocol == Protocol::Tcp
            && machine.flows.half_open_is_full()
            && let Some(oldest) = machine.flows.oldest_half_open()
        {
            self.close_and_tell(key, &oldest, now, out);
        }
        let share = MAX_FLOWS / machines.max(LEAST_SHARES);
        let has_share = self.machines.get(&key).is_some_and(|machine| machine.flows.len() >= share);
        if !has_share && self.flows < MAX_FLOWS {
            return;
        }
        let most = self.machines.iter().max_by_key(|(_, machine)| machine.flows.len()).map(|(key, _)| *key);
        let Some(victim) = most.filter(|_| !has_share).or(Some(key)) else { return };
        let gone = self.machines.get(&victim).map(|machine| machine.flows.least_missed()).unwrap_or_default();
        for flow in gone {
            self.close_and_tell(victim, &flow, now, out);
        }
    }

    /// Ends a connection and puts its last figures into the machine's records.
    pub(super) fn close_and_tell(
        &mut self,
        key: MachineKey,
        flow: &FlowKey,
        now: u64,
        out: &mut impl Output,
    ) {
        if let Some(news) = self.close(key, flow, now, out)
            && let Some(machine) = self.machines.get_mut(&key)
        {
            machine.records.tell(news);
        }
    }

    /// Ends a connection; the other end of a TCP connection that was open is told. Gives what the log has not been told.
    pub(super) fn close(
        &mut self,
        key: MachineKey,
        flow: &FlowKey,
        now: u64,
        out: &mut impl Output,
    ) -> Option<Record> {
        let (mapping, news) = self.machines.get_mut(&key)?.flows.remove(flow)?;
        self.flows = self.flows.saturating_sub(1);
        self.ports.free(flow.protocol, mapping.port);
        if let (Some(sequence), Some(uplink)) = (mapping.reset_sequence(), &self.uplink) {
            let (source, destination) = ((uplink.address, mapping.port), mapping.beyond);
            let segment = transport::reset(source, destination, sequence, None);
            let mut frame = frame::packet(source.0, destination.0, IpProtocol::Tcp, &segment);
            if let Some(hop) = uplink.next_hop(destination.0) {
                let sent = self.neighbors.send(hop, &mut frame, uplink, now, out);
                self.counters.no_room += u64::from(!sent);
            }
        }
        news
    }
}
