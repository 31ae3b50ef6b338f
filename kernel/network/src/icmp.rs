//! ICMP messages that start here: RFC 792, RFC 1812 (5.2.7: what the errors mean, 4.3.2.8: not too many of them), RFC 1191.

use alloc::vec;
use alloc::vec::Vec;

use smoltcp::wire::{Icmpv4DstUnreachable, Icmpv4Message, Icmpv4Packet, Icmpv4TimeExceeded, IpProtocol};

use crate::SECOND;
use crate::frame;
use crate::ip::Header;
use crate::link;
use crate::records::Protocol;

/// Bytes of an error's header.
pub(crate) const ERROR: usize = 8;
/// The most of the packet in question that an error quotes (RFC 1812, 4.3.2.3: 576 bytes in all).
const QUOTED: usize = 576 - frame::IPV4 - ERROR;
/// Errors that a machine gets at once ...
const BURST: u64 = 50;
/// ... and one more each.
const INTERVAL: u64 = SECOND / 100;

/// Why a packet did not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Error {
    /// There is no way out.
    NetUnreachable,
    /// Nobody listens at the gateway.
    PortUnreachable,
    /// It is not let through.
    Prohibited,
    /// It is larger than this and must not be cut.
    TooBig(u16),
    /// It has made too many hops.
    TimeExceeded,
}

/// An error from the gateway about a machine's packet.
pub(crate) fn error(error: Error, packet: &[u8], header: &Header) -> Option<Vec<u8>> {
    // No error about an error, nor about a fragment but the first (RFC 1122, 3.2.2).
    let is_error = header.protocol == IpProtocol::Icmp
        && !matches!(header.payload(packet).first(), Some(0 | 8 | 13 | 14 | 17 | 18));
    if is_error || header.fragment.is_some_and(|fragment| fragment.offset > 0) {
        return None;
    }
    let unreachable = |code: Icmpv4DstUnreachable| (Icmpv4Message::DstUnreachable, u8::from(code));
    let (kind, code) = match error {
        Error::NetUnreachable => unreachable(Icmpv4DstUnreachable::NetUnreachable),
        Error::PortUnreachable => unreachable(Icmpv4DstUnreachable::PortUnreachable),
        Error::Prohibited => unreachable(Icmpv4DstUnreachable::CommProhibited),
        Error::TooBig(_) => unreachable(Icmpv4DstUnreachable::FragRequired),
        Error::TimeExceeded => (Icmpv4Message::TimeExceeded, u8::from(Icmpv4TimeExceeded::TtlExpired)),
    };
    let quoted = packet.get(..header.total.min(QUOTED))?;
    let mut message = vec![0; ERROR];
    message.extend_from_slice(quoted);
    if let Error::TooBig(mtu) = error {
        message.get_mut(6..8)?.copy_from_slice(&mtu.to_be_bytes());
    }
    let mut icmp = Icmpv4Packet::new_unchecked(message.as_mut_slice());
    icmp.set_msg_type(kind);
    icmp.set_msg_code(code);
    icmp.fill_checksum();
    Some(frame::from_gateway(IpProtocol::Icmp, &message))
}

/// What an error is about: the header that it quotes, the protocol, and source and destination port (an echo's identifier for both).
/// None: it is no error, or about something else.
pub(crate) fn quoted(message: &[u8]) -> Option<(Header, Protocol, (u16, u16))> {
    let icmp = Icmpv4Packet::new_checked(message).ok()?;
    let is_error = matches!(
        icmp.msg_type(),
        Icmpv4Message::DstUnreachable | Icmpv4Message::TimeExceeded | Icmpv4Message::ParamProblem
    );
    let packet = message.get(ERROR..).filter(|_| is_error)?;
    let header = Header::read_quoted(packet)?;
    let payload = packet.get(header.bytes..)?;
    let word = |at: usize| Some(u16::from_be_bytes(*payload.get(at..)?.first_chunk()?));
    Some(match header.protocol {
        IpProtocol::Tcp => (header, Protocol::Tcp, (word(0)?, word(2)?)),
        IpProtocol::Udp => (header, Protocol::Udp, (word(0)?, word(2)?)),
        IpProtocol::Icmp => (header, Protocol::Icmp, (word(4)?, word(4)?)),
        _ => return None,
    })
}

/// The gateway's answer to an echo request, an IP packet's payload.
pub(crate) fn echo(request: &[u8]) -> Option<Vec<u8>> {
    let mut message = request.to_vec();
    if message.len() > link::MTU - frame::IPV4 {
        return None;
    }
    let mut icmp = Icmpv4Packet::new_checked(message.as_mut_slice()).ok()?;
    if icmp.msg_type() != Icmpv4Message::EchoRequest {
        return None;
    }
    icmp.set_msg_type(Icmpv4Message::EchoReply);
    icmp.fill_checksum();
    Some(frame::from_gateway(IpProtocol::Icmp, &message))
}

/// How many errors a machine may still get: a bucket that fills with time.
#[derive(Debug)]
pub(crate) struct Budget {
    /// When the bucket would be full if nothing more were taken.
    full_at: u64,
}

impl Budget {
    pub(crate) fn new() -> Self {
        Self { full_at: 0 }
    }

    /// Whether one more may be sent.
    pub(crate) fn take(&mut self, now: u64) -> bool {
        let full_at = self.full_at.max(now).saturating_add(INTERVAL);
        let allowed = full_at <= now.saturating_add(BURST * INTERVAL);
        if allowed {
            self.full_at = full_at;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_come_in_bursts_of_fifty_and_a_hundred_a_second() {
        let mut budget = Budget::new();
        let mut taken = |from: u64, count: u64| (0..count).filter(|_| budget.take(from)).count();
        assert_eq!(taken(SECOND, 1000), 50);
        assert_eq!(taken(SECOND + SECOND / 10, 1000), 10);
        assert_eq!(taken(9 * SECOND, 1000), 50);
    }
}
