//! A job's connection log: whom its machine talked to or tried to, bounded.
//!
//! The network tells of a connection when it begins and again as it goes on or ends, under the same number. Refused ones have
//! places of their own, so that a job cannot hide what it was refused behind what it was allowed, nor the other way round.

use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use core::net::Ipv4Addr;

use super::{JobId, JobStore};
use crate::egress::MAX_HOST;
use crate::error::ApiError;
use crate::json::short;
use crate::time::{Clock, rfc3339};
use crate::types::{Connection, ConnectionCounts, ConnectionList, Protocol, Verdict};

/// Most connections kept of a job that were let through ...
const MAX_ALLOWED: usize = 400;
/// ... and that were refused.
const MAX_REFUSED: usize = 100;
/// Most bytes kept of a reason.
const MAX_REASON: usize = 256;
/// What an entry costs besides its strings: itself, its number and its share of a map's node that may be half empty.
const ENTRY_OVERHEAD: usize = 2 * (size_of::<Entry>() + size_of::<u64>());

/// A connection as the network tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionRecord<'a> {
    /// Its number in its job, in the order they began. What was told under the same number before is replaced, all but when it
    /// began.
    pub number: u64,
    /// How it travels.
    pub protocol: Protocol,
    /// The name its address was looked up by.
    pub name: Option<&'a str>,
    /// The address at the other end.
    pub address: Option<Ipv4Addr>,
    /// The port at the other end.
    pub port: Option<u16>,
    /// Bytes of payload from the machine so far.
    pub bytes_sent: u64,
    /// Bytes of payload to the machine so far.
    pub bytes_received: u64,
    /// Why it was refused; none when it was let through.
    pub refused: Option<&'a str>,
}

#[derive(Debug)]
struct Entry {
    unix_ns: u64,
    protocol: Protocol,
    name: Option<String>,
    address: Option<Ipv4Addr>,
    port: Option<u16>,
    bytes_sent: u64,
    bytes_received: u64,
    refused: Option<String>,
}

impl Entry {
    fn weight(&self) -> usize {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        ENTRY_OVERHEAD + text(&self.name) + text(&self.refused)
    }

    fn show(&self) -> Connection {
        Connection {
            time: rfc3339(self.unix_ns),
            protocol: self.protocol,
            name: self.name.clone(),
            address: self.address.map(|address| address.to_string()),
            port: self.port,
            bytes_sent: self.bytes_sent,
            bytes_received: self.bytes_received,
            verdict: if self.refused.is_some() { Verdict::Refused } else { Verdict::Allowed },
            reason: self.refused.clone(),
        }
    }
}

/// The connections of one job.
#[derive(Debug, Default)]
pub(super) struct ConnectionLog {
    kept: BTreeMap<u64, Entry>,
    kept_refused: usize,
    counts: ConnectionCounts,
    /// The highest number told of, so that one that is not kept counts once.
    last: Option<u64>,
    weight: usize,
}

impl ConnectionLog {
    pub(super) fn counts(&self) -> ConnectionCounts {
        self.counts
    }

    /// Bytes of memory it takes, roughly.
    pub(super) fn weight(&self) -> usize {
        self.weight
    }

    fn list(&self) -> ConnectionList {
        ConnectionList {
            total_count: self.counts.total,
            refused_count: self.counts.refused,
            omitted_count: self.counts.total.saturating_sub(self.kept.len() as u64),
            connections: self.kept.values().map(Entry::show).collect(),
        }
    }

    /// Takes note of a connection, in no more than `room` more bytes.
    fn record(&mut self, record: &ConnectionRecord<'_>, room: usize, now: Clock) {
        if let Some(entry) = self.kept.get_mut(&record.number) {
            (entry.bytes_sent, entry.bytes_received) = (record.bytes_sent, record.bytes_received);
            return;
        }
        if self.last.is_some_and(|last| record.number <= last) {
            return;
        }
        self.last = Some(record.number);
        let refused = usize::from(record.refused.is_some());
        self.counts.total = self.counts.total.saturating_add(1);
        self.counts.refused = self.counts.refused.saturating_add(refused as u64);
        let full = if refused > 0 {
            self.kept_refused >= MAX_REFUSED
        } else {
            self.kept.len().saturating_sub(self.kept_refused) >= MAX_ALLOWED
        };
        if full {
            return;
        }
        let entry = Entry {
            unix_ns: now.unix_ns,
            protocol: record.protocol,
            name: record.name.map(|name| short(&name, MAX_HOST)),
            address: record.address,
            port: record.port,
            bytes_sent: record.bytes_sent,
            bytes_received: record.bytes_received,
            refused: record.refused.map(|reason| short(&reason, MAX_REASON)),
        };
        if entry.weight() <= room {
            self.weight = self.weight.saturating_add(entry.weight());
            self.kept_refused = self.kept_refused.saturating_add(refused);
            self.kept.insert(record.number, entry);
        }
    }
}

impl JobStore {
    /// The network tells what a job's machine connected to or tried to. Numbers begin at any number and grow; what is beyond
    /// the bounds is counted and not kept.
    pub fn record_connections<'a>(
        &mut self,
        id: JobId,
        records: impl IntoIterator<Item = ConnectionRecord<'a>>,
        now: Clock,
    ) {
        let mut room = self.limits.jobs_total_bytes.saturating_sub(self.weight());
        let Some(job) = self.jobs.get_mut(&id) else { return };
        for record in records {
            let before = job.connections.weight();
            job.connections.record(&record, room, now);
            let more = job.connections.weight().saturating_sub(before);
            job.weight = job.weight.saturating_add(more);
            room = room.saturating_sub(more);
        }
    }

    /// What is kept of a job's connections.
    ///
    /// # Errors
    /// [`crate::error::ErrorCode::JobNotFound`].
    pub fn connections(&self, id: JobId) -> Result<ConnectionList, ApiError> {
        self.record(id).map(|record| record.connections.list())
    }
}

/// The types that a list of connections is made of are kept small: a job's whole log fits an answer.
const _: () = assert!((MAX_ALLOWED + MAX_REFUSED) * (ENTRY_OVERHEAD + MAX_HOST + MAX_REASON) < 512 * 1024);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Limits;
    use crate::testing::*;
    use alloc::vec;

    fn allowed(number: u64) -> ConnectionRecord<'static> {
        ConnectionRecord {
            number,
            protocol: Protocol::Tcp,
            name: Some("example.org"),
            address: Some(Ipv4Addr::new(192, 0, 2, 7)),
            port: Some(443),
            bytes_sent: 1,
            bytes_received: 2,
            refused: None,
        }
    }

    fn refused(number: u64) -> ConnectionRecord<'static> {
        ConnectionRecord {
            refused: Some("no rule allows it"),
            bytes_sent: 0,
            bytes_received: 0,
            ..allowed(number)
        }
    }

    #[test]
    fn connections_are_kept_in_order_with_what_became_of_them() {
        let mut jobs = JobStore::new(Limits::default());
        let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
        jobs.record_connections(job, [allowed(7), refused(8)], at(0));
        jobs.record_connections(job, [ConnectionRecord { bytes_received: 900, ..allowed(7) }], at(5000));
        let list = jobs.connections(job).unwrap();
        assert_eq!((list.total_count, list.refused_count, list.omitted_count), (2, 1, 0));
        let [first, second] = list.connections.as_slice() else { panic!("{list:?}") };
        assert_eq!((first.bytes_sent, first.bytes_received, first.verdict), (1, 900, Verdict::Allowed));
        assert_eq!(
            (first.time.as_str(), first.address.as_deref()),
            (rfc3339(at(0).unix_ns).as_str(), Some("192.0.2.7"))
        );
        assert_eq!((second.verdict, second.reason.as_deref()), (Verdict::Refused, Some("no rule allows it")));
        assert_eq!(jobs.get(job).unwrap().connections, ConnectionCounts { total: 2, refused: 1 });
    }

    #[test]
    fn a_flood_of_one_verdict_leaves_room_for_the_other() {
        let mut jobs = JobStore::new(Limits::default());
        let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
        jobs.record_connections(job, (0..100_000).map(allowed), at(0));
        jobs.record_connections(job, (100_000..200_000).map(refused), at(0));
        jobs.record_connections(job, (0..200_000).map(allowed), at(1));
        let list = jobs.connections(job).unwrap();
        assert_eq!(list.connections.len(), MAX_ALLOWED + MAX_REFUSED);
        assert_eq!((list.total_count, list.refused_count, list.omitted_count), (200_000, 100_000, 199_500));
    }

    #[test]
    fn the_log_counts_as_part_of_the_jobs_description_and_stays_within_the_limit_of_all() {
        let limits = Limits { jobs_total_bytes: 20_000, ..Limits::default() };
        let mut jobs = JobStore::new(limits);
        let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
        jobs.record_connections(job, (0..300).map(allowed), at(0));
        let list = jobs.connections(job).unwrap();
        assert!(list.omitted_count > 0 && !list.connections.is_empty(), "{}", list.omitted_count);
        let weight = jobs.jobs[&job].weight;
        assert!(weight <= limits.jobs_total_bytes, "{weight}");
        assert_eq!(weight, jobs.jobs[&job].weigh());
    }

    #[test]
    fn long_names_and_reasons_are_cut() {
        let mut jobs = JobStore::new(Limits::default());
        let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
        let long = "x".repeat(100_000);
        jobs.record_connections(
            job,
            [ConnectionRecord { name: Some(&long), refused: Some(&long), ..refused(0) }],
            at(0),
        );
        let entry = jobs.connections(job).unwrap().connections.remove(0);
        assert_eq!((entry.name.unwrap().len(), entry.reason.unwrap().len()), (MAX_HOST, MAX_REASON));
    }

    #[test]
    fn the_log_outlives_the_run_and_goes_with_the_job() {
        let mut jobs = JobStore::new(Limits::default());
        let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
        jobs.record_connections(job, [allowed(0)], at(0));
        say(&mut jobs, job, &started(0), at(0));
        say(&mut jobs, job, &exited(0, 0), at(0));
        finish(&mut jobs, job, at(0));
        assert_eq!(jobs.connections(job).unwrap().total_count, 1);
        jobs.delete(job).unwrap();
        assert!(jobs.connections(job).is_err());
    }
}
