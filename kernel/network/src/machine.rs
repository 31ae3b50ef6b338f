//! What the network keeps of one machine.

use crate::dns::Names;
use crate::fragments::Reassembly;
use crate::icmp::Budget;
use crate::nat::Flows;
use crate::records::Records;

/// A machine on its link.
#[derive(Debug)]
pub(crate) struct Machine<P> {
    pub(crate) policy: P,
    pub(crate) flows: Flows,
    pub(crate) names: Names,
    pub(crate) fragments: Reassembly,
    pub(crate) records: Records,
    pub(crate) errors: Budget,
    /// When the figures of connections that go on are told next.
    pub(crate) news_due: u64,
}

impl<P> Machine<P> {
    pub(crate) fn new(policy: P) -> Self {
        Self {
            policy,
            flows: Flows::default(),
            names: Names::default(),
            fragments: Reassembly::default(),
            records: Records::default(),
            errors: Budget::new(),
            news_due: 0,
        }
    }
}
