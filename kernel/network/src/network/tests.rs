//! The network as its machines and the outside see it.

mod dns_by_tcp;
mod mtu;

use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;
use core::net::{Ipv4Addr, SocketAddrV4};

use proptest::prelude::*;
use smoltcp::wire::ArpOperation;

use super::*;
use crate::frame::{Checksum, Gso};
use crate::link::{GATEWAY, GATEWAY_MAC, MACHINE, MACHINE_MAC};
use crate::nat::FlowKey;
use crate::policy::Refusal;
use crate::records::Protocol;
use crate::testing::{Ends, Segment, datagram, dns, icmp, read};

const NODE: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 80);
const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 15];
const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const MS: u64 = SECOND / 1000;

/// Names and ports that are let through; an empty list lets everything through.
#[derive(Debug, Default)]
struct Rules(Vec<(&'static str, Option<u16>)>);

impl Policy for Rules {
    fn allows_name(&self, name: &str, port: Option<u16>) -> bool {
        self.0.is_empty() || self.0.iter().any(|rule| rule.0 == name && (rule.1.is_none() || rule.1 == port))
    }

    fn allows_address(&self, address: Ipv4Addr, port: Option<u16>) -> bool {
        self.allows_name(&address.to_string(), port)
    }

    fn knows_name(&self, name: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|rule| rule.0 == name)
    }

    fn knows_every_name(&self) -> bool {
        self.0.is_empty()
    }
}

/// A network with an uplink whose router has been asked for its Ethernet address already.
struct Net {
    network: Network<Rules>,
    ends: Ends,
    now: u64,
}

impl Net {
    fn new(machines: &[MachineKey]) -> Self {
        Self::with(machines, &[])
    }

    fn with(machines: &[MachineKey], rules: &[(&'static str, Option<u16>)]) -> Self {
        let mut net = Self { network: Network::new([7; 32]), ends: Ends::default(), now: SECOND };
        machines.iter().for_each(|key| net.network.add_machine(*key, Rules(rules.to_vec())));
        net.set_uplink(NODE);
        net
    }

    fn set_uplink(&mut self, address: Ipv4Addr) {
        self.set_uplink_with(address, 1500);
    }

    fn set_uplink_with(&mut self, address: Ipv4Addr, mtu: u16) {
        let uplink = UplinkConfig {
            mac: NODE_MAC,
            address,
            prefix: 24,
            gateway: Some(ROUTER),
            dns_servers: vec![SocketAddrV4::new(ROUTER, 53)],
            mtu,
        };
        self.network.set_uplink(Some(uplink), self.now, &mut self.ends);
    }

    fn send_as(&mut self, key: MachineKey, mut frame: Vec<u8>, offload: Offload) {
        self.network.from_machine(key, &mut frame, offload, self.now, &mut self.ends);
    }

    /// Machine 1 sends; what comes out at the uplink, after ARP has been answered.
    fn send(&mut self, frame: Vec<u8>) -> Vec<Vec<u8>> {
        self.send_as(1, frame, Offload::default());
        self.sent()
    }

    /// What came out at the uplink.
    fn sent(&mut self) -> Vec<Vec<u8>> {
        loop {
            let frames = core::mem::take(&mut self.ends.uplink);
            let asks = |frame: &Vec<u8>| frame[12..14] == [8, 6];
            let asked: Vec<_> = frames.iter().filter(|frame| asks(frame)).cloned().collect();
            if asked.is_empty() {
                return frames;
            }
            self.ends.uplink = frames.into_iter().filter(|frame| !asks(frame)).collect();
            for request in asked {
                let target = Ipv4Addr::new(request[38], request[39], request[40], request[41]);
                let mut reply =
                    arp::message(ArpOperation::Reply, (ROUTER_MAC, target), (NODE_MAC, NODE), NODE_MAC);
                assert!(
                    !self.network.from_uplink(&mut reply, self.now, &mut self.ends),
                    "smoltcp gets it too"
                );
            }
        }
    }

    /// A frame from outside; what comes out at machines.
    fn receive(&mut self, mut frame: Vec<u8>) -> Option<Vec<(MachineKey, Vec<u8>)>> {
        let before = frame.clone();
        let taken = self.network.from_uplink(&mut frame, self.now, &mut self.ends);
        self.network.flush(&mut self.ends);
        if !taken {
            assert_eq!(frame, before, "what is left to smoltcp is as it was");
            return None;
        }
        Some(self.given().into_iter().map(|(key, frame, _)| (key, frame)).collect())
    }

    /// What came out at machines.
    fn given(&mut self) -> Vec<(MachineKey, Vec<u8>, Offload)> {
        core::mem::take(&mut self.ends.machines)
    }

    fn records(&mut self, key: MachineKey) -> Vec<Record> {
        let mut records = Vec::new();
        self.network.take_records(key, self.now, |record| records.push(record));
        records
    }

    /// Opens a TCP connection from machine 1; returns the uplink's port.
    fn connect(&mut self, port: u16) -> u16 {
        let sent = self.send(out("S", port, 100, 0, b""));
        let [syn] = sent.as_slice() else { panic!("{sent:?}") };
        let outside = read(syn).1.unwrap().source_port;
        self.receive(back("SA", outside, 500, 101, b"")).unwrap();
        self.send(out("A", port, 101, 501, b""));
        outside
    }
}

fn out<'a>(flags: &'a str, port: u16, sequence: u32, acknowledgement: u32, payload: &'a [u8]) -> Vec<u8> {
    let (from, to) = ((MACHINE, port), (SERVER, 80));
    Segment { from, to, flags, sequence, acknowledgement, options: &[], payload }.frame()
}

fn back<'a>(flags: &'a str, port: u16, sequence: u32, acknowledgement: u32, payload: &'a [u8]) -> Vec<u8> {
    let (from, to) = ((SERVER, 80), (NODE, port));
    Segment { from, to, flags, sequence, acknowledgement, options: &[], payload }.frame()
}

fn echo(kind: u8, ident: u16, payload: &[u8]) -> Vec<u8> {
    [&[kind, 0, 0, 0], &ident.to_be_bytes()[..], &[0, 1], payload].concat()
}

#[test]
fn what_goes_out_comes_back_translated() {
    let mut net = Net::new(&[1, 2]);
    let sent = net.send(out("S", 4000, 100, 0, b""));
    let (header, transport, _) = read(&sent[0]);
    assert_eq!((header.source, header.destination, header.ttl), (NODE, SERVER, 63));
    assert_eq!(sent[0][..12], [ROUTER_MAC, NODE_MAC].concat());
    let port = transport.unwrap().source_port;
    let given = net.receive(back("SA", port, 500, 101, b"")).unwrap();
    let (header, transport, _) = read(&given[0].1);
    assert_eq!((given[0].0, header.source, header.destination, header.ttl), (1, SERVER, MACHINE, 63));
    assert_eq!((transport.unwrap().source_port, transport.unwrap().destination_port), (80, 4000));
    assert_eq!(given[0].1[..12], [MACHINE_MAC, GATEWAY_MAC].concat());

    net.send_as(2, datagram((MACHINE, 4000), (SERVER, 53), b"hello"), Offload::default());
    let sent = net.sent();
    let (header, transport, payload) = read(&sent[0]);
    assert_eq!((header.source, payload.as_slice()), (NODE, &b"hello"[..]));
    let given =
        net.receive(datagram((SERVER, 53), (NODE, transport.unwrap().source_port), b"there")).unwrap();
    assert_eq!((given[0].0, read(&given[0].1).2.as_slice()), (2, &b"there"[..]));

    let sent = net.send(icmp(MACHINE, SERVER, &echo(8, 77, b"ping")));
    let ident = read(&sent[0]).1.unwrap().source_port;
    let given = net.receive(icmp(SERVER, NODE, &echo(0, ident, b"ping"))).unwrap();
    assert_eq!((given[0].0, read(&given[0].1).1.unwrap().source_port), (1, 77));
}

#[test]
fn only_the_other_end_comes_in() {
    let mut net = Net::new(&[1]);
    let port = net.connect(4000);
    assert_eq!(net.receive(datagram((SERVER, 80), (NODE, port), b"")), None, "another protocol");
    let other = Ipv4Addr::new(192, 0, 2, 81);
    for from in [(SERVER, 81), (other, 80)] {
        let (to, payload) = ((NODE, port), &b"x"[..]);
        let frame =
            Segment { from, to, flags: "A", sequence: 501, acknowledgement: 101, options: &[], payload }
                .frame();
        assert_eq!(net.receive(frame), Some(vec![]), "{from:?}");
    }
    let mut broken = back("A", port, 501, 101, b"data");
    *broken.last_mut().unwrap() ^= 1;
    assert_eq!(net.receive(broken), Some(vec![]), "a wrong checksum");
    assert_eq!(net.network.counters().invalid, 1);
    assert_eq!(net.receive(back("A", 8080, 1, 1, b"")), None, "the node's own");
    assert_eq!(net.receive(icmp(SERVER, NODE, &echo(8, 1, b""))), None, "a ping to the node");
}

#[test]
fn a_large_segment_is_cut_for_the_uplink_and_its_checksums_completed() {
    let mut net = Net::new(&[1]);
    net.connect(4000);
    let payload: Vec<u8> = (0..10_000).map(|index| (index / 7) as u8).collect();
    let mut frame = out("PA", 4000, 101, 501, &payload);
    // The guest leaves the pseudo-header's sum where the checksum belongs.
    frame[50..52].copy_from_slice(&[0x12, 0x34]);
    let checksum = Checksum::Partial { start: 34, offset: 16 };
    net.send_as(1, frame.clone(), Offload { checksum, gso: Some(Gso { size: 1460, header_bytes: 54 }) });
    let sent = net.sent();
    assert_eq!(sent.len(), 7);
    let joined: Vec<u8> = sent.iter().flat_map(|frame| read(frame).2).collect();
    assert_eq!(joined, payload);
    let offload = Offload { checksum: Checksum::Partial { start: 34, offset: 15 }, gso: None };
    net.send_as(1, frame, offload);
    assert!(net.sent().is_empty(), "a checksum elsewhere");
    let mut small = datagram((MACHINE, 5000), (SERVER, 123), b"time");
    small[40..42].copy_from_slice(&[9, 9]);
    net.send_as(1, small, Offload { checksum: Checksum::Partial { start: 34, offset: 6 }, gso: None });
    assert_eq!(read(&net.sent()[0]).2, b"time");
}

#[test]
fn segments_in_a_row_come_to_the_machine_as_one() {
    let mut net = Net::new(&[1]);
    let port = net.connect(4000);
    let parts: Vec<Vec<u8>> = (0..10).map(|index| vec![index; 1000]).collect();
    for (index, part) in parts.iter().enumerate() {
        let mut frame = back("A", port, 501 + 1000 * index as u32, 101, part);
        assert!(net.network.from_uplink(&mut frame, net.now, &mut net.ends));
    }
    net.given();
    net.network.flush(&mut net.ends);
    let given = net.given();
    let [(1, frame, offload)] = given.as_slice() else { panic!("{} frames", given.len()) };
    assert_eq!(offload.gso, Some(Gso { size: 1000, header_bytes: 54 }));
    assert_eq!(offload.checksum, Checksum::Partial { start: 34, offset: 16 });
    let header = Header::read(&frame[14..]).unwrap();
    let mut segments = Vec::new();
    crate::segments::cut(frame, &header, 20, 1000, &mut [0; 2048], |piece| segments.push(read(piece)));
    assert_eq!(segments.len(), 10);
    for (index, (_, transport, payload)) in segments.iter().enumerate() {
        assert_eq!(transport.unwrap().tcp.sequence, 501 + 1000 * index as u32);
        assert_eq!(*payload, parts[index]);
    }
}

#[test]
fn what_does_not_fit_together_is_not_joined_and_stays_in_order() {
    let mut net = Net::new(&[1]);
    let port = net.connect(4000);
    net.given();
    let frames = [
        back("A", port, 501, 101, &[1; 1000]),
        back("A", port, 1501, 101, &[2; 1000]),
        back("A", port, 3501, 101, &[4; 1000]), // one is missing
        back("A", port, 2501, 101, &[3; 1000]), // it comes late
        back("A", port, 3501, 102, &[4; 1000]), // with another acknowledgement
        back("PA", port, 4501, 102, &[5; 10]),  // the end of a train
        back("A", port, 4511, 102, b""),        // no payload
        back("FA", port, 4511, 102, &[6; 10]),
    ];
    for mut frame in frames {
        assert!(net.network.from_uplink(&mut frame, net.now, &mut net.ends));
    }
    net.network.flush(&mut net.ends);
    let given: Vec<(u32, usize)> = net
        .given()
        .iter()
        .map(|(_, frame, _)| {
            let header = Header::read(&frame[14..]).unwrap();
            let tcp =
                crate::transport::Transport::read(header.protocol, header.payload(&frame[14..])).unwrap();
            (tcp.tcp.sequence, tcp.payload_bytes)
        })
        .collect();
    assert_eq!(given, [(501, 2000), (3501, 1000), (2501, 1000), (3501, 1010), (4511, 0), (4511, 10)]);

    net.ends.small_only = true;
    for index in 0..2 {
        let mut frame = back("A", port, 5000 + 100 * index, 102, &[0; 100]);
        net.network.from_uplink(&mut frame, net.now, &mut net.ends);
    }
    assert_eq!(net.given().len(), 2, "a machine that takes no large frames");
}

#[test]
fn of_acknowledgements_in_a_row_the_last_goes_on_unless_one_tells_of_a_loss() {
    let mut net = Net::new(&[1]);
    let port = net.connect(4000);
    net.given();
    let stamped = |acknowledgement: u32, options: &[u8]| {
        let (from, to) = ((SERVER, 80), (NODE, port));
        Segment { from, to, flags: "A", sequence: 501, acknowledgement, options, payload: b"" }.frame()
    };
    let stamps = |time: u8| [1, 1, 8, 10, 0, 0, 0, time, 0, 0, 0, 9];
    let sack = [1, 1, 5, 10, 0, 0, 2, 0, 0, 0, 3, 0];
    let mut acknowledged = |frames: Vec<Vec<u8>>| -> Vec<u32> {
        for mut frame in frames {
            assert!(net.network.from_uplink(&mut frame, net.now, &mut net.ends));
        }
        net.network.flush(&mut net.ends);
        net.given().iter().map(|(_, frame, _)| read(frame).1.unwrap().tcp.acknowledgement).collect()
    };
    let plain = |numbers: &[u32]| numbers.iter().map(|number| stamped(*number, &[])).collect::<Vec<_>>();
    assert_eq!(acknowledged(plain(&[200, 300, 400])), [400]);
    assert_eq!(acknowledged(plain(&[400, 500, 500, 500, 600])), [500, 500, 600], "repeated");
    assert_eq!(acknowledged(plain(&[700, 650])), [700, 650], "out of order");
    assert_eq!(acknowledged(plain(&[u32::MAX, 5])), [5], "the numbers wrap");
    assert_eq!(acknowledged(vec![stamped(800, &stamps(1)), stamped(900, &stamps(2))]), [900]);
    assert_eq!(acknowledged(vec![stamped(800, &sack), stamped(900, &sack)]), [800, 900], "selective");
    let data = back("A", port, 501, 1100, &[0; 100]);
    let after = back("A", port, 601, 1200, b"");
    assert_eq!(acknowledged(vec![stamped(1000, &[]), data, after]), [1000, 1100, 1200], "with data between");
    let end = back("FA", port, 501, 1400, b"");
    assert_eq!(acknowledged(vec![stamped(1300, &[]), end]), [1300, 1400], "the end");
}

#[test]
fn refusals_are_answered_at_once_and_told() {
    let mut net = Net::with(&[1], &[("192.0.2.80", Some(443))]);
    assert!(net.send(out("S", 4000, 100, 0, b"")).is_empty());
    let given = net.given();
    let (header, transport, _) = read(&given[0].1);
    let tcp = transport.unwrap().tcp;
    assert_eq!((header.source, tcp.rst, tcp.ack, tcp.acknowledgement), (SERVER, true, true, 101));
    assert!(net.send(datagram((MACHINE, 5), (SERVER, 53), b"x")).is_empty());
    assert!(net.send(icmp(MACHINE, SERVER, &echo(8, 1, b""))).is_empty());
    for (_, frame, _) in net.given() {
        let (header, _, payload) = read(&frame);
        assert_eq!((header.source, &payload[..2]), (GATEWAY, &[3, 13][..]), "prohibited");
    }
    let records: Vec<_> =
        net.records(1).iter().map(|record| (record.protocol, record.port, record.refused)).collect();
    let refused = Some(Refusal::Policy);
    assert_eq!(
        records,
        [
            (Protocol::Tcp, Some(80), refused),
            (Protocol::Udp, Some(53), refused),
            (Protocol::Icmp, None, refused)
        ]
    );
}

#[test]
fn the_node_other_machines_and_the_metadata_service_are_closed_to_all() {
    let mut net = Net::new(&[1, 2]);
    for (address, refusal) in [
        ("10.0.2.15", Refusal::Node),
        ("10.0.2.255", Refusal::Reserved),
        ("169.254.169.254", Refusal::Reserved),
        ("127.0.0.1", Refusal::Reserved),
        ("192.0.0.3", Refusal::Reserved),
        ("224.0.0.1", Refusal::Reserved),
    ] {
        let to = (address.parse().unwrap(), 8080);
        let from = (MACHINE, 4000);
        let syn =
            Segment { from, to, flags: "S", sequence: 1, acknowledgement: 0, options: &[], payload: b"" }
                .frame();
        assert!(net.send(syn).is_empty());
        assert!(read(&net.given()[0].1).1.unwrap().tcp.rst, "{address}");
        assert_eq!(net.records(1)[0].refused, Some(refusal), "{address}");
    }
    let spoofed = datagram((Ipv4Addr::new(192, 0, 0, 4), 1), (SERVER, 1), b"");
    assert!(net.send(spoofed).is_empty() && net.given().is_empty());
}

/// What a machine is answered when it asks for a name; the outside answers with the records.
fn look_up(net: &mut Net, name: &str, records: &[Vec<u8>]) -> Vec<u8> {
    net.given();
    for query in net.send(datagram((MACHINE, 5353), (GATEWAY, 53), &dns::query(9, name, 1))) {
        let (header, transport, payload) = read(&query);
        assert_eq!((header.destination, transport.unwrap().destination_port), (ROUTER, 53));
        let answer = dns::answer(&payload, records);
        net.receive(datagram((ROUTER, 53), (NODE, transport.unwrap().source_port), &answer))
            .into_iter()
            .flatten()
            .for_each(|(key, frame)| net.ends.machines.push((key, frame, Offload::default())));
    }
    let given = net.given();
    let [(1, frame, _)] = given.as_slice() else { panic!("{} answers", given.len()) };
    let (header, transport, payload) = read(frame);
    assert_eq!((header.source, transport.unwrap().destination_port), (GATEWAY, 5353));
    payload
}

#[test]
fn a_rule_with_a_name_opens_the_addresses_that_dns_gave_for_it() {
    let mut net = Net::with(&[1], &[("www.example.org", Some(80))]);
    assert!(net.send(out("S", 4000, 100, 0, b"")).is_empty(), "before it was looked up");
    let records = [dns::alias("www.example.org", "cdn.net"), dns::address("cdn.net", SERVER.octets())];
    let answer = look_up(&mut net, "www.example.org", &records);
    assert_eq!(answer[..2], [0, 9]);
    assert_eq!(net.send(out("S", 4001, 100, 0, b"")).len(), 1);
    let names: Vec<_> = net.records(1).iter().map(|record| (record.name.clone(), record.refused)).collect();
    assert_eq!(names, [(None, Some(Refusal::Policy)), (Some("www.example.org".into()), None)]);
    let from = (MACHINE, 4000);
    let to = (SERVER, 81);
    let syn =
        Segment { from, to, flags: "S", sequence: 1, acknowledgement: 0, options: &[], payload: b"" }.frame();
    assert!(net.send(syn).is_empty(), "another port");
}

#[test]
fn names_that_no_rule_knows_are_refused_at_once() {
    let mut net = Net::with(&[1], &[("example.org", None)]);
    let answer = look_up(&mut net, "Evil.example", &[]);
    assert_eq!(answer[3] & 15, 5, "REFUSED");
    let record = &net.records(1)[0];
    assert_eq!(
        (record.protocol, record.name.as_deref(), record.refused),
        (Protocol::Dns, Some("evil.example"), Some(Refusal::Policy))
    );
}

#[test]
fn forged_answers_are_not_taken() {
    let mut net = Net::with(&[1], &[("example.org", None)]);
    let query = &net.send(datagram((MACHINE, 5353), (GATEWAY, 53), &dns::query(9, "example.org", 1)))[0];
    let (_, transport, payload) = read(query);
    let port = transport.unwrap().source_port;
    let answer = dns::answer(&payload, &[dns::address("example.org", SERVER.octets())]);
    let mut other_id = answer.clone();
    other_id[0] ^= 1;
    let other_question =
        dns::answer(&dns::query(u16::from_be_bytes([payload[0], payload[1]]), "example.com", 1), &[]);
    for frame in [
        datagram((SERVER, 53), (NODE, port), &answer),
        datagram((ROUTER, 54), (NODE, port), &answer),
        datagram((ROUTER, 53), (NODE, port), &other_id),
        datagram((ROUTER, 53), (NODE, port), &other_question),
    ] {
        assert_eq!(net.receive(frame), Some(vec![]));
    }
    assert!(net.send(out("S", 4000, 1, 0, b"")).is_empty(), "nothing was learned");
    net.given();
    assert_eq!(net.receive(datagram((ROUTER, 53), (NODE, port), &answer)).unwrap().len(), 1);
    assert_eq!(net.receive(datagram((ROUTER, 53), (NODE, port), &answer)), None, "a second one");
}

#[test]
fn without_an_uplink_names_fail_and_connections_are_unreachable_and_those_open_go_on_later() {
    let mut net = Net::new(&[1]);
    let port = net.connect(4000);
    net.given();
    net.network.set_uplink(None, net.now, &mut net.ends);
    assert_eq!(look_up(&mut net, "example.org", &[])[3] & 15, 2, "SERVFAIL");
    assert!(net.send(out("S", 4001, 1, 0, b"")).is_empty());
    assert_eq!(read(&net.given()[0].1).2[..2], [3, 0], "net unreachable");
    net.set_uplink(NODE);
    let sent = net.send(out("A", 4000, 101, 501, b"again"));
    assert_eq!(read(&sent[0]).1.unwrap().source_port, port);
    net.set_uplink(Ipv4Addr::new(10, 0, 2, 16));
    assert!(net.send(out("A", 4000, 106, 501, b"")).is_empty());
    assert!(read(&net.given()[0].1).1.unwrap().tcp.rst, "the old address is gone");
    assert_eq!(net.network.flows, 0);
}

#[test]
fn a_syn_flood_costs_only_its_own_machine() {
    let mut net = Net::new(&[1, 2]);
    net.send_as(2, out("S", 1, 100, 0, b""), Offload::default());
    let other = read(&net.sent()[0]).1.unwrap().source_port;
    for count in 0..20_000_u32 {
        let to = (Ipv4Addr::from_bits(0x0b00_0000 + count), 80);
        let from = (MACHINE, count as u16);
        net.send(
            Segment { from, to, flags: "S", sequence: 1, acknowledgement: 0, options: &[], payload: b"" }
                .frame(),
        );
        assert!(net.network.machines[&1].flows.len() <= 256);
    }
    let given = net.receive(back("SA", other, 1, 101, b"")).unwrap();
    assert_eq!(given[0].0, 2);
    assert_eq!(net.network.flows, 257);
}

#[test]
fn a_machine_has_at_most_its_share_of_connections_and_the_newcomer_gets_one() {
    let mut net = Net::new(&[1, 2, 3, 4]);
    for key in 1..=4 {
        for count in 0..6000_u32 {
            let to = (Ipv4Addr::from_bits(0x0b00_0000 + count), 1);
            net.send_as(key, datagram((MACHINE, 1), to, b""), Offload::default());
            net.ends.uplink.clear();
        }
        assert!(net.network.machines[&key].flows.len() <= MAX_FLOWS / 4);
    }
    net.network.add_machine(5, Rules::default());
    for count in 0..3000_u32 {
        let to = (Ipv4Addr::from_bits(0x0b00_0000 + count), 1);
        net.send_as(5, datagram((MACHINE, 1), to, b""), Offload::default());
        net.ends.uplink.clear();
        assert!(net.network.flows <= MAX_FLOWS);
    }
    assert_eq!(net.network.machines[&5].flows.len(), 3000);
    let total: usize = net.network.machines.values().map(|machine| machine.flows.len()).sum();
    assert_eq!(total, net.network.flows);
}

#[test]
fn connections_are_told_of_when_they_begin_and_as_they_grow() {
    let mut net = Net::new(&[1]);
    let port = net.connect(4000);
    let told = net.records(1);
    assert_eq!((told.len(), told[0].number, told[0].address, told[0].port), (1, 0, Some(SERVER), Some(80)));
    net.send(out("A", 4000, 101, 501, &[0; 300]));
    net.receive(back("A", port, 501, 401, &[0; 1000]));
    assert!(net.records(1).is_empty(), "not yet");
    net.now += SECOND;
    let told = net.records(1);
    assert_eq!((told[0].number, told[0].bytes_sent, told[0].bytes_received), (0, 300, 1000));
    assert!(net.records(1).is_empty());
    net.send(out("A", 4000, 401, 1501, &[0; 1]));
    let mut last = Vec::new();
    net.network.remove_machine(1, net.now, &mut net.ends, |record| last.push(record));
    assert_eq!((last.len(), last[0].bytes_sent), (1, 301));
    let sent = net.sent();
    let (_, transport, _) = read(&sent[0]);
    assert!(transport.unwrap().tcp.rst, "the outside is told");
    assert_eq!((transport.unwrap().source_port, transport.unwrap().tcp.sequence), (port, 401));
    assert_eq!((net.network.flows, net.receive(back("A", port, 1501, 402, b""))), (0, None));
}

#[test]
fn what_nobody_uses_is_forgotten_in_time_and_then_nothing_is_due() {
    let mut net = Net::new(&[1]);
    let port = net.connect(4000);
    net.send(datagram((MACHINE, 1), (SERVER, 1), b""));
    net.send(icmp(MACHINE, SERVER, &echo(8, 1, b"")));
    net.send(datagram((MACHINE, 1), (GATEWAY, 53), &dns::query(1, "a.b", 1)));
    assert_eq!(net.network.flows, 3);
    let mut rounds = 0;
    while let Some(deadline) = net.network.deadline() {
        assert!(deadline >= net.now);
        net.now = deadline.max(net.now + MS);
        net.network.poll(net.now, &mut net.ends);
        rounds += 1;
        assert!(rounds < 100);
    }
    assert_eq!(net.network.flows, 0);
    assert!(net.now > 7440 * SECOND);
    assert_eq!(net.receive(back("A", port, 501, 101, b"")), None);
}

#[test]
fn the_gateway_is_pinged_and_offers_nothing_else() {
    let mut net = Net::new(&[1]);
    net.send(icmp(MACHINE, GATEWAY, &echo(8, 3, b"hello")));
    let (header, transport, payload) = read(&net.given()[0].1);
    assert_eq!(
        (header.source, transport.unwrap().echo_request, payload.as_slice()),
        (GATEWAY, false, &b"hello"[..])
    );
    let (from, to) = ((MACHINE, 4000), (GATEWAY, 54));
    net.send(
        Segment { from, to, flags: "S", sequence: 1, acknowledgement: 0, options: &[], payload: b"" }.frame(),
    );
    assert!(read(&net.given()[0].1).1.unwrap().tcp.rst);
    net.send(datagram((MACHINE, 1), (GATEWAY, 54), b""));
    assert_eq!(read(&net.given()[0].1).2[..2], [3, 3], "port unreachable");
}

#[test]
fn errors_find_their_way_in_both_directions() {
    let mut net = Net::new(&[1]);
    let sent = net.send(datagram((MACHINE, 700), (SERVER, 9), &[0; 100]));
    let port = read(&sent[0]).1.unwrap().source_port;
    let message = [&[3, 4, 0, 0, 0, 0, 4, 176][..], &sent[0][14..14 + 28]].concat();
    let given = net.receive(icmp(Ipv4Addr::new(198, 51, 100, 1), NODE, &message)).unwrap();
    let (header, _, payload) = read(&given[0].1);
    assert_eq!((header.source, header.destination), (Ipv4Addr::new(198, 51, 100, 1), MACHINE));
    let inner = Header::read_quoted(&payload[8..]).unwrap();
    assert_eq!((inner.source, inner.destination, &payload[28..32]), (MACHINE, SERVER, &[2, 188, 0, 9][..]));
    assert_eq!(payload[6..8], [4, 176], "the MTU");
    assert!(
        net.receive(icmp(SERVER, NODE, &[&[3, 3, 0, 0, 0, 0, 0, 0][..], &[0x45; 28]].concat())).is_none()
    );

    let given = net.receive(datagram((SERVER, 9), (NODE, port), b"answer")).unwrap();
    let message = [&[3, 3, 0, 0, 0, 0, 0, 0][..], &given[0].1[14..14 + 28]].concat();
    let sent = net.send(icmp(MACHINE, SERVER, &message));
    let (header, _, payload) = read(&sent[0]);
    assert_eq!((header.source, header.destination), (NODE, SERVER));
    let inner = Header::read_quoted(&payload[8..]).unwrap();
    assert_eq!((inner.source, inner.destination), (SERVER, NODE));
    assert_eq!(payload[30..32], port.to_be_bytes());
    let sent = net.send(icmp(MACHINE, Ipv4Addr::new(192, 0, 2, 99), &message));
    assert!(sent.is_empty(), "to somebody else");
}

#[test]
fn hops_are_counted_and_packets_too_large_complained_about() {
    let mut net = Net::new(&[1]);
    let mut frame = datagram((MACHINE, 1), (SERVER, 1), b"");
    let mut ip = smoltcp::wire::Ipv4Packet::new_unchecked(&mut frame[14..]);
    ip.set_hop_limit(1);
    ip.fill_checksum();
    assert!(net.send(frame).is_empty());
    assert_eq!(read(&net.given()[0].1).2[..2], [11, 0]);
    let large = datagram((MACHINE, 1), (SERVER, 1), &[0; 2000]);
    assert!(net.send(large).is_empty(), "smoltcp's packets say that they must not be cut");
    let payload = read(&net.given()[0].1).2;
    assert_eq!((&payload[..2], &payload[4..8]), (&[3, 4][..], &[0, 0, 5, 220][..]));
}

#[test]
fn fragments_go_through_in_both_directions() {
    let mut net = Net::new(&[1]);
    let payload: Vec<u8> = (0..4000).map(|index| (index / 5) as u8).collect();
    let pieces = |frame: Vec<u8>| {
        let header = Header::read(&frame[14..]).unwrap();
        let mut whole = frame;
        let mut ip = smoltcp::wire::Ipv4Packet::new_unchecked(&mut whole[14..]);
        ip.set_dont_frag(false);
        ip.fill_checksum();
        let mut pieces = Vec::new();
        fragments::cut(&whole, &header, 3, 1000, |piece| pieces.push(piece.to_vec()));
        pieces
    };
    let mut sent = Vec::new();
    for piece in pieces(datagram((MACHINE, 700), (SERVER, 9), &payload)) {
        sent.extend(net.send(piece));
    }
    let mut reassembly = Reassembly::default();
    let mut join = |frames: &[Vec<u8>]| {
        let mut whole = None;
        for frame in frames {
            assert!(frame.len() <= 1514);
            let header = Header::read(&frame[14..]).unwrap();
            whole = whole.or(reassembly.take(&header, header.fragment.unwrap(), &frame[14..], 0));
        }
        read(&whole.unwrap())
    };
    let (header, transport, joined) = join(&sent);
    assert_eq!((header.source, joined == payload), (NODE, true));
    let mut given = Vec::new();
    for piece in pieces(datagram((SERVER, 9), (NODE, transport.unwrap().source_port), &payload)) {
        given.extend(net.receive(piece).unwrap().into_iter().map(|(_, frame)| frame));
    }
    let (header, transport, joined) = join(&given);
    assert_eq!(
        (header.destination, transport.unwrap().destination_port, joined == payload),
        (MACHINE, 700, true)
    );
}

#[test]
fn a_segment_size_that_does_not_fit_is_lowered() {
    let mut net = Net::new(&[1]);
    for options in [&[2, 4, 35, 240][..], &[1, 2, 4, 35, 240, 0, 0, 0], &[1, 1, 2, 4, 35, 240, 1, 0]] {
        let (from, to) = ((MACHINE, options.len() as u16 + u16::from(options[1])), (SERVER, 80));
        let sent = net.send(
            Segment { from, to, flags: "S", sequence: 1, acknowledgement: 0, options, payload: b"" }.frame(),
        );
        read(&sent[0]);
        let at = options.iter().position(|byte| *byte == 35).unwrap();
        assert_eq!(sent[0][54 + at..56 + at], 1460_u16.to_be_bytes());
    }
}

#[test]
fn an_unanswered_neighbour_is_asked_three_times_and_given_up() {
    let mut net = Net::new(&[1]);
    for port in 0..20 {
        net.send_as(1, datagram((MACHINE, port), (SERVER, 1), b""), Offload::default());
    }
    let mut asked = core::mem::take(&mut net.ends.uplink).len();
    assert_eq!(asked, 1);
    for _ in 0..10 {
        net.now += SECOND;
        net.network.poll(net.now, &mut net.ends);
        asked += core::mem::take(&mut net.ends.uplink).len();
    }
    assert_eq!(asked, 3);
    net.send_as(1, datagram((MACHINE, 99), (SERVER, 1), b""), Offload::default());
    assert_eq!(net.sent().len(), 1, "once it is there it is found");
}

#[test]
fn a_machine_that_asks_for_many_neighbours_does_not_push_out_the_router() {
    let mut net = Net::new(&[1]);
    net.connect(4000);
    for host in 0..10_000_u32 {
        let to = (Ipv4Addr::from_bits(NODE.to_bits() & !0xff | (host % 200 + 20)), 1);
        net.send_as(1, datagram((MACHINE, host as u16), to, b""), Offload::default());
    }
    net.ends.uplink.clear();
    net.send_as(1, out("A", 4000, 101, 501, b""), Offload::default());
    let sent = core::mem::take(&mut net.ends.uplink);
    assert_eq!((sent.len(), &sent[0][..6]), (1, &ROUTER_MAC[..]));
}

#[test]
fn packets_with_ip_options_go_nowhere() {
    let mut net = Net::new(&[1]);
    let plain = datagram((MACHINE, 1), (SERVER, 1), b"");
    // A loose source route by another host.
    let options = [131, 7, 4, 192, 0, 2, 99, 0];
    let mut frame = [&plain[..34], &options, &plain[34..]].concat();
    let mut ip = smoltcp::wire::Ipv4Packet::new_unchecked(&mut frame[14..]);
    ip.set_header_len(28);
    ip.set_total_len(36);
    ip.fill_checksum();
    assert!(net.send(frame).is_empty());
    assert_eq!((net.network.counters().invalid, net.network.flows), (1, 0));
}

#[test]
fn a_datagram_shorter_than_its_packet_gets_the_checksum_of_itself() {
    let mut net = Net::new(&[1]);
    let mut frame = datagram((MACHINE, 5000), (SERVER, 123), b"time and more");
    frame[38..40].copy_from_slice(&[0, 12]);
    net.send_as(1, frame, Offload { checksum: Checksum::Partial { start: 34, offset: 6 }, gso: None });
    // Reading checks it.
    assert_eq!(read(&net.sent()[0]).1.unwrap().payload_bytes, 4);
}

#[test]
fn a_closed_connection_s_ports_can_be_used_again_at_once() {
    let mut net = Net::new(&[1]);
    let first = net.connect(4000);
    net.send(out("FA", 4000, 101, 501, b""));
    net.receive(back("FA", first, 501, 102, b""));
    net.send(out("A", 4000, 102, 502, b""));
    net.given();
    net.records(1);
    let second = net.connect(4000);
    assert_ne!(first, second, "for the outside it is another one");
    let begun: Vec<_> =
        net.records(1).iter().filter(|record| record.bytes_sent == 0).map(|record| record.number).collect();
    assert_eq!((begun, net.network.flows), (vec![1], 1));
}

#[test]
fn dns_queries_of_one_machine_are_bounded_and_the_newest_are_answered() {
    let mut net = Net::new(&[1, 2]);
    let mut asked = Vec::new();
    for count in 0..1000_u16 {
        asked.extend(net.send(datagram(
            (MACHINE, count),
            (GATEWAY, 53),
            &dns::query(count, "example.org", 1),
        )));
    }
    assert_eq!(asked.len(), 1000);
    let mut answered = 0;
    for query in asked.iter().rev() {
        let (_, transport, payload) = read(query);
        let answer = dns::answer(&payload, &[dns::address("example.org", SERVER.octets())]);
        let given = net.receive(datagram((ROUTER, 53), (NODE, transport.unwrap().source_port), &answer));
        answered += given.unwrap_or_default().len();
    }
    assert_eq!(answered, 64);
}

#[test]
fn a_server_that_does_not_answer_gives_way_to_the_next() {
    let mut net = Net::new(&[1]);
    let (first, second) = (Ipv4Addr::new(10, 0, 2, 3), Ipv4Addr::new(10, 0, 2, 4));
    let uplink = UplinkConfig {
        mac: NODE_MAC,
        address: NODE,
        prefix: 24,
        gateway: Some(ROUTER),
        dns_servers: vec![SocketAddrV4::new(first, 53), SocketAddrV4::new(second, 53)],
        mtu: 1500,
    };
    net.network.set_uplink(Some(uplink), net.now, &mut net.ends);
    let mut asked = Vec::new();
    for _ in 0..3 {
        let sent = net.send(datagram((MACHINE, 1), (GATEWAY, 53), &dns::query(1, "a.b", 1)));
        asked.push(read(&sent[0]).0.destination);
        net.now += 6 * SECOND;
        net.network.poll(net.now, &mut net.ends);
    }
    assert_eq!(asked, [first, second, first]);
}

#[test]
fn frames_without_room_are_counted() {
    let mut net = Net::new(&[1]);
    let port = net.connect(4000);
    net.ends.no_room = true;
    net.send(out("A", 4000, 101, 501, b"x"));
    net.receive(back("PA", port, 501, 101, b"y"));
    assert_eq!(net.network.counters().no_room, 2);
}

/// A frame that is nearly right: of one kind, with some bytes changed, cut or not.
fn nearly(kind: u8, inward: bool, port: u16, changes: &[(u16, u8)], cut: usize) -> Vec<u8> {
    let (from, to) = if inward { ((SERVER, 80), (NODE, port)) } else { ((MACHINE, port), (SERVER, 80)) };
    let mut frame = match kind % 6 {
        0 => Segment {
            from,
            to,
            flags: "SA",
            sequence: 1,
            acknowledgement: 2,
            options: &[2, 4, 5, 6],
            payload: b"abc",
        }
        .frame(),
        1 => datagram(from, to, b"abcdefgh"),
        2 => icmp(from.0, to.0, &echo(8, port, b"abc")),
        3 => {
            let about = datagram(to, from, b"abc");
            icmp(from.0, to.0, &[&[3, 1, 0, 0, 0, 0, 0, 0][..], &about[14..]].concat())
        }
        4 => datagram(
            (from.0, if inward { 53 } else { 5 }),
            if inward { to } else { (GATEWAY, 53) },
            &dns::query(1, "a.b", 1),
        ),
        _ => arp::message(ArpOperation::Request, (MACHINE_MAC, from.0), ([0; 6], GATEWAY), [0xff; 6]),
    };
    for (at, value) in changes {
        let at = usize::from(*at) % frame.len();
        frame[at] = *value;
    }
    // A wrong header checksum would end most of them at the first look.
    if let Some(packet) = frame.get_mut(14..34).filter(|packet| packet[0] == 0x45) {
        smoltcp::wire::Ipv4Packet::new_unchecked(packet).fill_checksum();
    }
    frame.truncate(frame.len().saturating_sub(cut));
    frame
}

proptest! {
    #[test]
    fn hostile_frames_are_survived_and_nothing_goes_out_that_is_not_right(
        frames in proptest::collection::vec(
            (any::<u8>(), any::<bool>(), 0_u16..4, proptest::collection::vec((any::<u16>(), any::<u8>()), 0..4), 0_usize..20, any::<(bool, u16, u16, u16)>()),
            1..60,
        ),
    ) {
        let mut net = Net::new(&[1]);
        net.ends.uplink.clear();
        for (kind, inward, port, changes, cut, (partial, start, offset, size)) in frames {
            net.now += 100 * MS;
            let known = net.network.machines[&1].flows.keys().first().and_then(|key: &FlowKey| net.network.machines[&1].flows.get(key)).map(|flow| flow.port);
            let port = if inward { known.unwrap_or(port) } else { port };
            let mut frame = nearly(kind, inward, port, &changes, if cut > 10 { 0 } else { cut });
            if inward {
                net.network.from_uplink(&mut frame, net.now, &mut net.ends);
            } else {
                let checksum = if partial { Checksum::Partial { start: if start > 100 { 34 } else { start }, offset: if offset > 100 { 16 } else { offset } } } else { Checksum::Complete };
                let gso = (partial && size > 30_000).then_some(Gso { size, header_bytes: start });
                net.network.from_machine(1, &mut frame, Offload { checksum, gso }, net.now, &mut net.ends);
            }
            net.network.poll(net.now, &mut net.ends);
            for frame in net.sent() {
                let header = Header::read(&frame[14..]).unwrap();
                prop_assert!(frame.len() <= 1514 && header.source == NODE, "{:?}", header);
            }
            for (_, frame, _) in net.given() {
                prop_assert!(frame.len() <= 65_549);
                if frame[12..14] == [8, 0] {
                    let header = Header::read(&frame[14..]).unwrap();
                    prop_assert!([MACHINE, Ipv4Addr::BROADCAST].contains(&header.destination), "{:?}", header);
                }
            }
        }
    }
}
