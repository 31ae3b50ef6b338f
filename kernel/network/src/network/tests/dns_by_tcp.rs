//! Names looked up by TCP at the gateway (RFC 7766).

use super::*;

fn to_gateway(flags: &str, port: u16, sequence: u32, acknowledgement: u32, payload: &[u8]) -> Vec<u8> {
    let (from, to) = ((MACHINE, port), (GATEWAY, 53));
    Segment { from, to, flags, sequence, acknowledgement, options: &[], payload }.frame()
}

fn from_server(flags: &str, port: u16, sequence: u32, acknowledgement: u32, payload: &[u8]) -> Vec<u8> {
    let (from, to) = ((ROUTER, 53), (NODE, port));
    Segment { from, to, flags, sequence, acknowledgement, options: &[], payload }.frame()
}

/// Opens a connection to the gateway's DNS server; returns the uplink's port.
fn connect(net: &mut Net, port: u16) -> u16 {
    let sent = net.send(to_gateway("S", port, 100, 0, b""));
    let [syn] = sent.as_slice() else { panic!("{sent:?}") };
    let outside = read(syn).1.unwrap().source_port;
    net.receive(from_server("SA", outside, 500, 101, b"")).unwrap();
    assert_eq!(net.send(to_gateway("A", port, 101, 501, b"")).len(), 1);
    outside
}

#[test]
fn a_machine_that_may_reach_all_speaks_to_the_uplinks_server_and_sees_the_gateway() {
    let mut net = Net::new(&[1]);
    let sent = net.send(to_gateway("S", 4000, 100, 0, b""));
    let (header, syn, _) = read(&sent[0]);
    let syn = syn.unwrap();
    assert_eq!((header.source, header.destination, syn.destination_port), (NODE, ROUTER, 53));
    let given = net.receive(from_server("SA", syn.source_port, 500, 101, b"")).unwrap();
    let (header, answer, _) = read(&given[0].1);
    let answer = answer.unwrap();
    assert_eq!((header.source, header.destination), (GATEWAY, MACHINE));
    assert_eq!((answer.source_port, answer.destination_port), (53, 4000));
    let sent = net.send(to_gateway("PA", 4000, 101, 501, b"question"));
    assert_eq!((read(&sent[0]).0.destination, read(&sent[0]).2.as_slice()), (ROUTER, &b"question"[..]));
    let given = net.receive(from_server("PA", syn.source_port, 501, 109, b"answer")).unwrap();
    assert_eq!((read(&given[0].1).0.source, read(&given[0].1).2.as_slice()), (GATEWAY, &b"answer"[..]));
    net.now += SECOND;
    let records = net.records(1);
    let shown = |record: &Record| (record.protocol, record.address, record.port, record.refused);
    assert!(records.iter().all(|record| shown(record) == (Protocol::Tcp, Some(ROUTER), Some(53), None)));
    let last = records.last().unwrap();
    assert_eq!((last.bytes_sent, last.bytes_received), (8, 6));
}

#[test]
fn a_machine_with_rules_is_reset_and_told_of_whatever_its_rules_are() {
    for rules in [&[("example.org", None)][..], &[("10.0.2.2", None)], &[("192.0.0.1", None)]] {
        let mut net = Net::with(&[1], rules);
        assert!(net.send(to_gateway("S", 4000, 100, 0, b"")).is_empty());
        let given = net.given();
        let (header, reset, _) = read(&given[0].1);
        let reset = reset.unwrap();
        assert_eq!((header.source, reset.source_port, reset.tcp.rst), (GATEWAY, 53, true));
        let record = &net.records(1)[0];
        assert_eq!((record.protocol, record.refused), (Protocol::Tcp, Some(Refusal::NamesByTcp)));
    }
}

#[test]
fn it_is_not_mixed_up_with_a_connection_to_the_same_server_by_its_own_address() {
    let mut net = Net::new(&[1]);
    let one = connect(&mut net, 4000);
    let (from, to) = ((MACHINE, 4000), (ROUTER, 53));
    let syn = Segment { from, to, flags: "S", sequence: 7, acknowledgement: 0, options: &[], payload: b"" };
    let sent = net.send(syn.frame());
    let other = read(&sent[0]).1.unwrap().source_port;
    assert_ne!(one, other);
    net.given();
    for (port, acknowledged, source) in [(one, 101, GATEWAY), (other, 8, ROUTER)] {
        let flags = if port == one { "PA" } else { "SA" };
        let given = net.receive(from_server(flags, port, 501, acknowledged, b"")).unwrap();
        assert_eq!(read(&given[0].1).0.source, source);
    }
    assert_eq!(net.receive(back("PA", one, 501, 101, b"x")), Some(vec![]), "from another than the server");
}

#[test]
fn checksums_left_to_the_gateway_and_large_segments_are_completed_for_the_server() {
    let mut net = Net::new(&[1]);
    connect(&mut net, 4000);
    let payload = [7; 4000];
    for gso in [None, Some(Gso { size: 1460, header_bytes: 54 })] {
        let bytes = if gso.is_some() { 4000 } else { 1000 };
        let frame = to_gateway("A", 4000, 101, 501, &payload[..bytes]);
        net.send_as(1, frame, Offload { checksum: Checksum::Partial { start: 34, offset: 16 }, gso });
        let sent = net.sent();
        // `read` verifies the checksums.
        assert!(sent.iter().all(|frame| read(frame).0.destination == ROUTER));
        assert_eq!(sent.iter().map(|frame| read(frame).2.len()).sum::<usize>(), bytes);
    }
}

#[test]
fn errors_about_it_come_in_the_machines_words_and_its_end_resets_the_server() {
    let mut net = Net::new(&[1]);
    let sent = net.send(to_gateway("S", 4000, 100, 0, b""));
    let message = [&[3, 1, 0, 0, 0, 0, 0, 0][..], &sent[0][14..14 + 28]].concat();
    let given = net.receive(icmp(ROUTER, NODE, &message)).unwrap();
    let payload = read(&given[0].1).2;
    let inner = Header::read_quoted(&payload[8..]).unwrap();
    assert_eq!((inner.source, inner.destination), (MACHINE, GATEWAY));
    assert_eq!(payload[28..32], [15, 160, 0, 53]);
    connect(&mut net, 4001);
    let Net { network, ends, now } = &mut net;
    network.remove_machine(1, *now, ends, |_| {});
    let sent = net.sent();
    let (header, reset, _) = read(&sent[0]);
    assert_eq!((sent.len(), header.destination, reset.unwrap().tcp.rst), (1, ROUTER, true));
}

#[test]
fn without_a_server_it_fails_at_once() {
    let mut net = Net::new(&[1]);
    net.network.set_uplink(None, net.now, &mut net.ends);
    assert!(net.send(to_gateway("S", 4000, 100, 0, b"")).is_empty());
    assert_eq!(read(&net.given()[0].1).2[..2], [3, 0], "network unreachable");
    let bare = UplinkConfig {
        mac: NODE_MAC,
        address: NODE,
        prefix: 24,
        gateway: Some(ROUTER),
        dns_servers: vec![],
        mtu: 1500,
    };
    net.network.set_uplink(Some(bare), net.now, &mut net.ends);
    assert!(net.send(to_gateway("S", 4000, 100, 0, b"")).is_empty());
    assert!(read(&net.given()[0].1).1.unwrap().tcp.rst);
    assert_eq!(net.records(1)[0].refused, Some(Refusal::NoServer));
}
