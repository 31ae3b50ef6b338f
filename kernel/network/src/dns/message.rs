//! DNS messages, as far as a proxy looks into them: RFC 1035, 4.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;
use core::net::Ipv4Addr;

use smoltcp::wire::{DnsFlags, DnsOpcode, DnsPacket, DnsQuestion, DnsRcode, DnsRecord, DnsRecordData};

/// Most bytes of a query; questions are not longer, and options seldom are.
const MAX_QUERY: usize = 512;
/// Bytes of a message's head.
const HEAD: usize = 12;
/// Aliases that are followed.
const MAX_ALIASES: usize = 16;
/// Addresses that are taken from one answer.
const MAX_ADDRESSES: usize = 32;

/// A query with one question.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Query<'a> {
    pub(crate) id: u16,
    /// The name asked for, in lower case, without a dot at its end.
    pub(crate) name: String,
    /// The question as it stands in the message.
    pub(crate) question: &'a [u8],
}

impl<'a> Query<'a> {
    /// Reads a query. None: it has no answer, or is not one.
    pub(crate) fn read(message: &'a [u8]) -> Option<Self> {
        let packet = DnsPacket::new_checked(message).ok().filter(|_| message.len() <= MAX_QUERY)?;
        let is_query = packet.opcode() == DnsOpcode::Query && !packet.flags().contains(DnsFlags::RESPONSE);
        if !is_query || packet.question_count() != 1 || packet.answer_record_count() != 0 {
            return None;
        }
        let (question, name) = first_question(message)?;
        Some(Self { id: packet.transaction_id(), name, question })
    }
}

/// The first question of a message and the name in it. Its name must be written out: there is nothing before it to point to.
fn first_question(message: &[u8]) -> Option<(&[u8], String)> {
    let after = message.get(HEAD..)?;
    let (rest, question) = DnsQuestion::parse(after).ok()?;
    let is_written_out = question.name.last() == Some(&0);
    let name = text(&DnsPacket::new_checked(message).ok()?, question.name)?;
    is_written_out.then_some((after.get(..after.len().checked_sub(rest.len())?)?, name))
}

/// A name as text in lower case. What is neither a letter, a digit, '-' nor '_' is escaped (RFC 1035, 5.1), so that no label's bytes
/// can pass for a dot.
fn text(packet: &DnsPacket<&[u8]>, name: &[u8]) -> Option<String> {
    let mut text = String::new();
    let mut bytes = 0;
    for label in packet.parse_name(name) {
        let label = label.ok()?;
        bytes += label.len() + 1;
        if bytes > 254 {
            return None;
        }
        if !text.is_empty() {
            text.push('.');
        }
        for byte in label {
            match byte.to_ascii_lowercase() {
                byte @ (b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_') => text.push(char::from(byte)),
                byte => write!(text, "\\{byte:03}").ok()?,
            }
        }
    }
    Some(text)
}

/// The answer that says only that there is none.
pub(crate) fn error(query: &Query<'_>, code: DnsRcode, recursion_desired: bool) -> Vec<u8> {
    let mut message = alloc::vec![0; HEAD];
    let mut packet = DnsPacket::new_unchecked(message.as_mut_slice());
    let desired = if recursion_desired { DnsFlags::RECURSION_DESIRED } else { DnsFlags::empty() };
    packet.set_transaction_id(query.id);
    packet.set_flags(DnsFlags::RESPONSE | DnsFlags::RECURSION_AVAILABLE | desired);
    packet.set_question_count(1);
    if let Some(byte) = message.get_mut(3) {
        *byte |= u8::from(code) & 0x0f;
    }
    message.extend_from_slice(query.question);
    message
}

/// The addresses that an answer gives for its question, through aliases too. None: it is no answer to this question.
pub(crate) fn answered(message: &[u8], id: u16, question: &[u8]) -> Option<Vec<Ipv4Addr>> {
    let packet = DnsPacket::new_checked(message).ok()?;
    let is_answer = packet.flags().contains(DnsFlags::RESPONSE) && packet.opcode() == DnsOpcode::Query;
    if !is_answer || packet.transaction_id() != id || packet.question_count() != 1 {
        return None;
    }
    let (asked, name) = first_question(message)?;
    if !asked.eq_ignore_ascii_case(question) {
        return None;
    }
    let mut names = alloc::vec![name];
    let mut addresses = Vec::new();
    let mut rest = message.get(HEAD + asked.len()..)?;
    for _ in 0..packet.answer_record_count() {
        let Ok((after, record)) = DnsRecord::parse(rest) else { break };
        rest = after;
        let Some(owner) = text(&packet, record.name).filter(|owner| names.contains(owner)) else { continue };
        match record.data {
            DnsRecordData::A(address) if addresses.len() < MAX_ADDRESSES => addresses.push(address),
            DnsRecordData::Cname(alias) if names.len() < MAX_ALIASES => {
                names.extend(text(&packet, alias).filter(|alias| *alias != owner));
            }
            _ => {}
        }
    }
    Some(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::dns;
    use proptest::prelude::*;

    #[test]
    fn a_query_gives_its_name_in_lower_case() {
        let message = dns::query(7, "WWW.Example.org", 1);
        let query = Query::read(&message).unwrap();
        assert_eq!((query.id, query.name.as_str()), (7, "www.example.org"));
        assert_eq!(query.question, &message[12..]);
    }

    #[test]
    fn a_label_with_a_dot_in_it_does_not_pass_for_two() {
        let mut message = dns::query(7, "evilXorg", 1);
        let at = message.iter().position(|byte| *byte == b'X').unwrap();
        message[at] = b'.';
        assert_eq!(Query::read(&message).unwrap().name, "evil\\046org");
    }

    #[test]
    fn addresses_come_through_aliases_and_from_nowhere_else() {
        let message = dns::answer(
            &dns::query(7, "www.example.org", 1),
            &[
                dns::alias("www.example.org", "a.cdn.net"),
                dns::address("other.example.org", [10, 0, 0, 1]),
                dns::alias("a.cdn.net", "b.cdn.net"),
                dns::address("b.cdn.net", [192, 0, 2, 1]),
                dns::address("B.CDN.net", [192, 0, 2, 2]),
            ],
        );
        let query = dns::query(7, "WWW.example.org", 1);
        let addresses = answered(&message, 7, &query[12..]).unwrap();
        assert_eq!(addresses, [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)]);
        assert_eq!(answered(&message, 8, &query[12..]), None, "another id");
        let other = dns::query(7, "www.example.com", 1);
        assert_eq!(answered(&message, 7, &other[12..]), None, "another question");
        assert_eq!(answered(&query, 7, &query[12..]), None, "no answer");
    }

    #[test]
    fn an_error_repeats_the_question() {
        let message = dns::query(7, "example.org", 28);
        let query = Query::read(&message).unwrap();
        let refusal = error(&query, DnsRcode::Refused, true);
        assert_eq!(refusal[..12], [0, 7, 0x81, 0x85, 0, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(refusal[12..], message[12..]);
        assert_eq!(answered(&refusal, 7, query.question), Some(Vec::new()));
    }

    #[test]
    fn names_that_point_at_themselves_end() {
        let mut message = dns::answer(&dns::query(7, "a.b", 1), &[dns::address("a.b", [1, 2, 3, 4])]);
        let at = message.len() - 14 - 5;
        // A pointer to itself in place of the record's name.
        message[at..at + 2].copy_from_slice(&[0xc0, at as u8]);
        assert_eq!(answered(&message, 7, &dns::query(7, "a.b", 1)[12..]), Some(Vec::new()));
    }

    proptest! {
        #[test]
        fn garbage_is_survived(bytes: Vec<u8>, at in 0_usize..80, value: u8) {
            let _ = Query::read(&bytes);
            let question = dns::query(7, "www.example.org", 1);
            let mut message = dns::answer(&question, &[dns::alias("www.example.org", "b"), dns::address("b", [1, 2, 3, 4])]);
            let at = at % message.len();
            message[at] = value;
            let _ = answered(&message, 7, &question[12..]);
            let _ = Query::read(&message);
            message.truncate(at);
            message.extend(bytes);
            let _ = answered(&message, 7, &question[12..]);
        }
    }
}
