//! How a machine looks names up.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::net::SocketAddrV4;

use smoltcp::wire::IpProtocol;

use super::{MachineKey, Network};
use crate::dns::{self, InFlight, Queries, Query, Rcode};
use crate::frame::{self, Output};
use crate::link::{GATEWAY, MACHINE};
use crate::nat::Owner;
use crate::policy::{Policy, Refusal};
use crate::records::{Protocol, Record};
use crate::transport;

impl<P: Policy> Network<P> {
    /// Takes a machine's query, a datagram's payload.
    pub(super) fn look_up(
        &mut self,
        key: MachineKey,
        client_port: u16,
        message: &[u8],
        now: u64,
        out: &mut impl Output,
    ) {
        let Some(query) = Query::read(message) else {
            self.counters.invalid += 1;
            return;
        };
        let Some(machine) = self.machines.get_mut(&key) else { return };
        let recursion_desired = message.get(2).is_some_and(|flags| flags & 1 != 0);
        if !machine.policy.knows_name(&query.name) {
            let refused = Record {
                number: 0,
                protocol: Protocol::Dns,
                name: Some(query.name.as_str().into()),
                address: None,
                port: None,
                bytes_sent: 0,
                bytes_received: 0,
                refused: Some(Refusal::Policy),
            };
            machine.records.refuse(refused, now);
            let answer = dns::error(&query, Rcode::Refused, recursion_desired);
            return self.answer(key, client_port, &answer, out);
        }
        if self.ask(key, client_port, &query, message, now, out).is_none() {
            let answer = dns::error(&query, Rcode::ServFail, recursion_desired);
            self.answer(key, client_port, &answer, out);
        }
    }

    /// Asks a server what a machine asked. None: there is none, or no way to it.
    fn ask(
        &mut self,
        key: MachineKey,
        client_port: u16,
        query: &Query<'_>,
        message: &[u8],
        now: u64,
        out: &mut impl Output,
    ) -> Option<()> {
        let uplink = self.uplink.as_ref()?;
        let server = self.queries.server(&uplink.dns_servers)?;
        let hop = uplink.next_hop(*server.ip())?;
        if let Some(surplus) = self.queries.surplus(key) {
            self.queries.remove(surplus);
            self.ports.free(Protocol::Udp, surplus);
        }
        let port = self.ports.take(Protocol::Udp, Owner::Dns)?;
        let id = self.ports.number();
        let mut message = message.to_vec();
        message.get_mut(..2)?.copy_from_slice(&id.to_be_bytes());
        self.queries.insert(
            port,
            InFlight {
                machine: key,
                client: (client_port, query.id),
                id,
                server,
                name: query.name.as_str().into(),
                question: query.question.to_vec(),
                expires: Queries::expiry(now),
            },
        );
        let datagram = transport::udp(uplink.address, *server.ip(), port, server.port(), &message);
        let mut frame = frame::packet(uplink.address, *server.ip(), IpProtocol::Udp, &datagram);
        let sent = self.neighbors.send(hop, &mut frame, uplink, now, out);
        self.counters.no_room += u64::from(!sent);
        Some(())
    }

    /// Takes what came to a query's port; what is no answer to it is not looked at twice (RFC 5452, 9).
    pub(super) fn looked_up(
        &mut self,
        port: u16,
        from: SocketAddrV4,
        message: &[u8],
        now: u64,
        out: &mut impl Output,
    ) {
        let Some(query) = self.queries.get(port).filter(|query| from == query.server) else {
            return;
        };
        let Some(addresses) = dns::answered(message, query.id, &query.question) else { return };
        let Some(query) = self.queries.remove(port) else { return };
        self.ports.free(Protocol::Udp, port);
        let Some(machine) = self.machines.get_mut(&query.machine) else { return };
        let name: Arc<str> = query.name;
        addresses.into_iter().for_each(|address| machine.names.learn(address, &name, now));
        let mut answer: Vec<u8> = message.to_vec();
        if let Some(id) = answer.get_mut(..2) {
            id.copy_from_slice(&query.client.1.to_be_bytes());
        }
        self.answer(query.machine, query.client.0, &answer, out);
    }

    fn answer(&mut self, key: MachineKey, client_port: u16, message: &[u8], out: &mut impl Output) {
        let datagram = transport::udp(GATEWAY, MACHINE, dns::PORT, client_port, message);
        self.give(key, &frame::from_gateway(IpProtocol::Udp, &datagram), out);
    }
}
