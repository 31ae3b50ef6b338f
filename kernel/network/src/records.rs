//! What is told of a machine's connections.

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use core::net::Ipv4Addr;

use crate::SECOND;
use crate::policy::Refusal;

/// Most records that wait to be taken; the service takes them every round.
const MAX_WAITING: usize = 1024;
/// How many refusals are remembered, so that one that repeats is told once ...
const REMEMBERED: usize = 32;
/// ... in this time.
const REPEATS_AFTER: u64 = 60 * SECOND;

/// How a connection travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP: datagrams between the same two ends.
    Udp,
    /// ICMP echo.
    Icmp,
    /// A name that was looked up and not let through.
    Dns,
}

/// A connection, or an attempt at one. It is told of when it begins and again, under the same number, when its figures have
/// changed; then only number and figures count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its number in its machine, in the order they began.
    pub number: u64,
    /// How it travels.
    pub protocol: Protocol,
    /// The name that the address was looked up by, or that was.
    pub name: Option<Arc<str>>,
    /// The address at the other end.
    pub address: Option<Ipv4Addr>,
    /// The port at the other end.
    pub port: Option<u16>,
    /// Bytes of payload from the machine so far.
    pub bytes_sent: u64,
    /// Bytes of payload to the machine so far.
    pub bytes_received: u64,
    /// Why it was refused; none when it was let through.
    pub refused: Option<Refusal>,
}

/// The records of one machine on their way to whoever keeps them.
#[derive(Debug, Default)]
pub(crate) struct Records {
    next: u64,
    waiting: VecDeque<Record>,
    refused: VecDeque<(u64, Record)>,
}

impl Records {
    /// A connection begins. Returns its number.
    pub(crate) fn begin(&mut self, record: Record) -> u64 {
        let number = self.next;
        self.next = self.next.saturating_add(1);
        self.tell(Record { number, ..record });
        number
    }

    /// Something was refused; again within a minute it is no news.
    pub(crate) fn refuse(&mut self, record: Record, now: u64) {
        self.refused.retain(|(at, _)| now < at.saturating_add(REPEATS_AFTER));
        let same = |(_, known): &(u64, Record)| Record { number: 0, ..known.clone() } == record;
        if self.refused.iter().any(same) {
            return;
        }
        if self.refused.len() >= REMEMBERED {
            self.refused.pop_front();
        }
        self.refused.push_back((now, record.clone()));
        self.begin(record);
    }

    /// Figures have changed, or a connection is over.
    pub(crate) fn tell(&mut self, record: Record) {
        if self.waiting.len() < MAX_WAITING {
            self.waiting.push_back(record);
        }
    }

    /// The oldest that was not taken yet.
    pub(crate) fn take(&mut self) -> Option<Record> {
        self.waiting.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(port: u16) -> Record {
        Record {
            number: 0,
            protocol: Protocol::Udp,
            name: None,
            address: Some(Ipv4Addr::new(192, 0, 2, 1)),
            port: Some(port),
            bytes_sent: 0,
            bytes_received: 0,
            refused: Some(Refusal::Policy),
        }
    }

    #[test]
    fn a_refusal_that_repeats_is_told_once_a_minute() {
        let mut records = Records::default();
        for second in 0..100 {
            records.refuse(refused(123), second * SECOND);
        }
        records.refuse(refused(124), 100 * SECOND);
        let told: Vec<_> =
            core::iter::from_fn(|| records.take()).map(|record| (record.number, record.port)).collect();
        assert_eq!(told, [(0, Some(123)), (1, Some(123)), (2, Some(124))]);
    }

    #[test]
    fn what_waits_is_bounded_whatever_begins() {
        let mut records = Records::default();
        for port in 0..u16::MAX {
            records.refuse(refused(port), 0);
            records.begin(Record { refused: None, ..refused(port) });
        }
        assert_eq!(records.waiting.len(), MAX_WAITING);
        assert_eq!(records.refused.len(), REMEMBERED);
    }

    use alloc::vec::Vec;
}
