//! The connections of one machine, their states and how long each is kept: RFC 5382, 5; RFC 4787, 4.3; RFC 5508, 3.2.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use core::net::Ipv4Addr;

use crate::SECOND;
use crate::records::{Protocol, Record};
use crate::transport::Tcp;

/// TCP connections of one machine that have not been answered; the oldest goes first.
pub(crate) const MAX_HALF_OPEN: usize = 256;

/// One connection as its machine names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FlowKey {
    pub(crate) protocol: Protocol,
    /// The machine's port, or an echo's identifier.
    pub(crate) port: u16,
    pub(crate) remote: Ipv4Addr,
    /// 0 for ICMP.
    pub(crate) remote_port: u16,
}

impl FlowKey {
    /// The other end as the machine names it.
    pub(crate) fn end(&self) -> (Ipv4Addr, u16) {
        (self.remote, self.remote_port)
    }
}

/// How far a connection has come; those that are missed least come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    /// TCP that was reset or closed from both sides.
    Closing,
    /// TCP whose SYN has no answer.
    Opening,
    /// TCP whose SYN was answered, but not acknowledged.
    Answered,
    /// ICMP echo.
    Echo,
    /// UDP.
    Datagrams,
    /// TCP.
    Established,
}

impl State {
    /// How long it is kept when nothing moves, in nanoseconds.
    fn timeout(self) -> u64 {
        match self {
            Self::Opening | Self::Answered => 30 * SECOND,
            Self::Echo => 60 * SECOND,
            Self::Closing => 240 * SECOND,
            Self::Datagrams => 300 * SECOND,
            Self::Established => 7440 * SECOND,
        }
    }

    fn is_half_open(self) -> bool {
        matches!(self, Self::Opening | Self::Answered)
    }
}

/// A connection's mapping.
#[derive(Debug)]
pub(crate) struct Flow {
    /// In the machine's log.
    pub(crate) number: u64,
    /// The uplink's port.
    pub(crate) port: u16,
    /// The other end as the outside names it: the machine's word but for what it calls the gateway.
    pub(crate) beyond: (Ipv4Addr, u16),
    state: State,
    finished: [bool; 2],
    used: u64,
    sent: u64,
    received: u64,
    told: (u64, u64),
    /// What the other end acknowledged last: where a reset has to stand for it to count (RFC 5961, 3).
    acknowledged: u32,
}

impl Flow {
    fn expires(&self) -> u64 {
        self.used.saturating_add(self.state.timeout())
    }

    /// What the log has not been told yet.
    fn news(&self, key: &FlowKey) -> Option<Record> {
        ((self.sent, self.received) != self.told).then(|| Record {
            number: self.number,
            protocol: key.protocol,
            name: None,
            address: Some(self.beyond.0),
            port: (key.protocol != Protocol::Icmp).then_some(self.beyond.1),
            bytes_sent: self.sent,
            bytes_received: self.received,
            refused: None,
        })
    }

    /// Where a reset to the other end has to stand; none where there is nobody to reset.
    pub(crate) fn reset_sequence(&self) -> Option<u32> {
        matches!(self.state, State::Answered | State::Established).then_some(self.acknowledged)
    }
}

/// The connections of one machine.
#[derive(Debug, Default)]
pub(crate) struct Flows {
    flows: BTreeMap<FlowKey, Flow>,
    /// Half-open ones in the order they began; some are no longer.
    opening: VecDeque<(FlowKey, u64)>,
    half_open: usize,
}

impl Flows {
    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.flows.len()
    }

    /// A connection.
    pub(crate) fn get(&self, key: &FlowKey) -> Option<&Flow> {
        self.flows.get(key)
    }

    /// Whether a packet begins a connection though one of these ends is known: a SYN on one that is over.
    pub(crate) fn is_over(&self, key: &FlowKey) -> bool {
        self.flows.get(key).is_some_and(|flow| flow.state == State::Closing)
    }

    /// Whether one more half-open connection is too many.
    pub(crate) fn half_open_is_full(&self) -> bool {
        self.half_open >= MAX_HALF_OPEN
    }

    /// A connection begins.
    pub(crate) fn insert(&mut self, key: FlowKey, beyond: (Ipv4Addr, u16), number: u64, port: u16, now: u64) {
        let state = match key.protocol {
            Protocol::Tcp => State::Opening,
            Protocol::Icmp => State::Echo,
            Protocol::Udp | Protocol::Dns => State::Datagrams,
        };
        let flow = Flow {
            number,
            port,
            beyond,
            state,
            finished: [false; 2],
            used: now,
            sent: 0,
            received: 0,
            told: (0, 0),
            acknowledged: 0,
        };
        if let Some(before) = self.flows.insert(key, flow) {
            self.half_open -= usize::from(before.state.is_half_open());
        }
        if state.is_half_open() {
            self.half_open += 1;
            self.opening.push_back((key, number));
            if self.opening.len() > 4 * MAX_HALF_OPEN {
                let flows = &self.flows;
                let still = |(key, number): &(FlowKey, u64)| is_half_open(flows, key, *number);
                self.opening.retain(still);
            }
        }
    }

    /// A packet of a connection passes. Returns the uplink's port and when the connection is to be looked at next.
    pub(crate) fn pass(
        &mut self,
        key: &FlowKey,
        outward: bool,
        tcp: &Tcp,
        bytes: usize,
        now: u64,
    ) -> Option<(u16, u64)> {
        let flow = self.flows.get_mut(key)?;
        flow.used = now;
        let count = if outward { &mut flow.sent } else { &mut flow.received };
        *count = count.saturating_add(bytes as u64);
        if key.protocol == Protocol::Tcp {
            if !outward && tcp.ack {
                flow.acknowledged = tcp.acknowledgement;
            }
            if let Some(finished) = flow.finished.get_mut(usize::from(outward)) {
                *finished |= tcp.fin;
            }
            let state = match flow.state {
                _ if tcp.rst || flow.finished == [true; 2] => State::Closing,
                State::Opening if !outward && tcp.syn => State::Answered,
                State::Answered if outward && tcp.ack && !tcp.syn => State::Established,
                same => same,
            };
            self.half_open -= usize::from(flow.state.is_half_open() && !state.is_half_open());
            flow.state = state;
        }
        Some((flow.port, flow.expires()))
    }

    /// Takes a connection out; gives what the log has not been told.
    pub(crate) fn remove(&mut self, key: &FlowKey) -> Option<(Flow, Option<Record>)> {
        let flow = self.flows.remove(key)?;
        self.half_open -= usize::from(flow.state.is_half_open());
        let news = flow.news(key);
        Some((flow, news))
    }

    /// The oldest half-open connection.
    pub(crate) fn oldest_half_open(&mut self) -> Option<FlowKey> {
        loop {
            let (key, number) = *self.opening.front()?;
            if is_half_open(&self.flows, &key, number) {
                return Some(key);
            }
            self.opening.pop_front();
        }
    }

    /// A sixteenth of the connections, at least one: those that are missed least.
    pub(crate) fn least_missed(&self) -> Vec<FlowKey> {
        let mut all: Vec<_> = self.flows.iter().map(|(key, flow)| (flow.state, flow.used, *key)).collect();
        let count = all.len().div_ceil(16);
        if count > 0 && count < all.len() {
            all.select_nth_unstable(count - 1);
        }
        all.truncate(count);
        all.into_iter().map(|(_, _, key)| key).collect()
    }

    /// Those that have been kept long enough, and when the next one has been.
    pub(crate) fn expired(&self, now: u64) -> (Vec<FlowKey>, Option<u64>) {
        let over = self.flows.iter().filter(|(_, flow)| flow.expires() <= now).map(|(key, _)| *key).collect();
        (over, self.flows.values().map(Flow::expires).filter(|expires| *expires > now).min())
    }

    /// All, in no order that matters.
    pub(crate) fn keys(&self) -> Vec<FlowKey> {
        self.flows.keys().copied().collect()
    }

    /// What the log has not been told.
    pub(crate) fn news(&mut self, mut tell: impl FnMut(Record)) {
        for (key, flow) in &mut self.flows {
            if let Some(news) = flow.news(key) {
                flow.told = (flow.sent, flow.received);
                tell(news);
            }
        }
    }
}

fn is_half_open(flows: &BTreeMap<FlowKey, Flow>, key: &FlowKey, number: u64) -> bool {
    flows.get(key).is_some_and(|flow| flow.number == number && flow.state.is_half_open())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(port: u16) -> FlowKey {
        FlowKey { protocol: Protocol::Tcp, port, remote: Ipv4Addr::new(192, 0, 2, 1), remote_port: 80 }
    }

    fn flags(flags: &str) -> Tcp {
        let has = |letter| flags.contains(letter);
        Tcp { syn: has('S'), ack: has('A'), fin: has('F'), rst: has('R'), ..Tcp::default() }
    }

    fn life(steps: &[(bool, &str)]) -> State {
        let mut flows = Flows::default();
        flows.insert(key(1), key(1).end(), 0, 40_000, 0);
        for (outward, letters) in steps {
            flows.pass(&key(1), *outward, &flags(letters), 0, 0).unwrap();
        }
        let state = flows.flows[&key(1)].state;
        assert_eq!(flows.half_open, usize::from(state.is_half_open()));
        state
    }

    #[test]
    fn a_tcp_connection_is_kept_by_how_far_it_has_come() {
        assert_eq!(life(&[(true, "S")]), State::Opening);
        assert_eq!(life(&[(true, "S"), (true, "S"), (false, "A")]), State::Opening);
        assert_eq!(life(&[(true, "S"), (false, "SA")]), State::Answered);
        assert_eq!(life(&[(true, "S"), (false, "SA"), (true, "A")]), State::Established);
        let open = [(true, "S"), (false, "SA"), (true, "A")];
        assert_eq!(
            life(&[&open[..], &[(true, "FA"), (false, "A")]].concat()),
            State::Established,
            "half closed"
        );
        assert_eq!(life(&[&open[..], &[(true, "FA"), (false, "FA")]].concat()), State::Closing);
        assert_eq!(life(&[&open[..], &[(false, "R")]].concat()), State::Closing);
        assert_eq!(life(&[(true, "S"), (false, "RA")]), State::Closing);
    }

    #[test]
    fn the_oldest_half_open_is_found_though_others_have_gone_on_or_away() {
        let mut flows = Flows::default();
        for port in 0..5000 {
            flows.insert(key(port), key(port).end(), u64::from(port), 40_000, 0);
            if port % 3 == 0 {
                flows.pass(&key(port), true, &flags("R"), 0, 0);
            } else if port % 3 == 1 {
                flows.remove(&key(port));
            }
            while flows.half_open > MAX_HALF_OPEN {
                let oldest = flows.oldest_half_open().unwrap();
                flows.remove(&oldest);
            }
            assert!(flows.opening.len() <= 4 * MAX_HALF_OPEN);
        }
        let live = flows.flows.values().filter(|flow| flow.state.is_half_open()).count();
        assert_eq!((live, flows.half_open), (MAX_HALF_OPEN, MAX_HALF_OPEN));
    }

    #[test]
    fn what_is_over_goes_before_what_is_open() {
        let mut flows = Flows::default();
        for port in 0..64 {
            flows.insert(key(port), key(port).end(), 0, 40_000, u64::from(port));
            let steps: &[(bool, &str)] =
                if port >= 60 { &[(false, "R")] } else { &[(false, "SA"), (true, "A")] };
            for (outward, letters) in steps {
                flows.pass(&key(port), *outward, &flags(letters), 0, u64::from(port));
            }
        }
        let mut gone: Vec<_> = flows.least_missed().iter().map(|key| key.port).collect();
        gone.sort_unstable();
        assert_eq!(gone, [60, 61, 62, 63]);
    }
}
