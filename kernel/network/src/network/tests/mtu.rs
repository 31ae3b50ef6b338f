//! An uplink that takes less in one packet than machines' links do.

use super::*;

/// What a cloud's network takes whose packets travel in others.
const TUNNELLED: u16 = 1460;

fn narrow(mtu: u16) -> Net {
    let mut net = Net::new(&[1]);
    net.set_uplink_with(NODE, mtu);
    net
}

/// The frame of a datagram that may be cut on the way.
fn may_be_cut(mut frame: Vec<u8>) -> Vec<u8> {
    let mut ip = smoltcp::wire::Ipv4Packet::new_unchecked(&mut frame[14..]);
    ip.set_dont_frag(false);
    ip.fill_checksum();
    frame
}

#[test]
fn segment_sizes_are_lowered_in_both_directions_to_what_the_uplink_takes() {
    for (mtu, named, becomes) in [
        (TUNNELLED, 1460_u16, 1420_u16),
        (TUNNELLED, 1200, 1200),
        (576, 1460, 536),
        (1, 1460, 536),
        (9001, 8961, 1460),
    ] {
        let mut net = narrow(mtu);
        let options = [&[2, 4][..], &named.to_be_bytes()].concat();
        let syn = |from, to, flags, acknowledgement| {
            Segment { from, to, flags, sequence: 100, acknowledgement, options: &options, payload: b"" }
                .frame()
        };
        let sent = net.send(syn((MACHINE, 4000), (SERVER, 80), "S", 0));
        let port = read(&sent[0]).1.unwrap().source_port;
        assert_eq!(sent[0][56..58], becomes.to_be_bytes(), "outward, {mtu}");
        let given = net.receive(syn((SERVER, 80), (NODE, port), "SA", 101)).unwrap();
        read(&given[0].1);
        assert_eq!(given[0].1[56..58], becomes.to_be_bytes(), "inward, {mtu}");
    }
}

#[test]
fn a_packet_too_large_that_must_not_be_cut_is_answered_with_the_size_that_fits() {
    let mut net = narrow(TUNNELLED);
    // 1460 bytes with their headers, and one more.
    assert_eq!(net.send(datagram((MACHINE, 1), (SERVER, 1), &[0; 1432])).len(), 1);
    assert!(net.given().is_empty());
    assert!(net.send(datagram((MACHINE, 1), (SERVER, 1), &[0; 1433])).is_empty());
    let (header, _, payload) = read(&net.given()[0].1);
    assert_eq!((header.source, &payload[..8]), (GATEWAY, &[3, 4, payload[2], payload[3], 0, 0, 5, 180][..]));
    let quoted = Header::read_quoted(&payload[8..]).unwrap();
    assert_eq!((quoted.source, quoted.destination, quoted.total), (MACHINE, SERVER, 1461));
}

#[test]
fn a_packet_too_large_that_may_be_cut_is() {
    let mut net = narrow(TUNNELLED);
    let payload: Vec<u8> = (0..1472).map(|index| (index / 7) as u8).collect();
    let sent = net.send(may_be_cut(datagram((MACHINE, 1), (SERVER, 1), &payload)));
    assert_eq!(sent.len(), 2);
    let mut reassembly = Reassembly::default();
    let mut whole = None;
    for frame in &sent {
        assert!(frame.len() <= 14 + usize::from(TUNNELLED));
        let header = Header::read(&frame[14..]).unwrap();
        whole = whole.or(reassembly.take(&header, header.fragment.unwrap(), &frame[14..], 0));
    }
    let (header, _, joined) = read(&whole.unwrap());
    assert_eq!((header.source, joined == payload), (NODE, true));
    assert!(net.given().is_empty());
}

#[test]
fn a_large_segment_is_cut_into_what_the_uplink_takes() {
    let mut net = narrow(TUNNELLED);
    net.connect(4000);
    let payload: Vec<u8> = (0..5000).map(|index| (index / 11) as u8).collect();
    let frame = out("PA", 4000, 101, 501, &payload);
    let offload = Offload {
        checksum: Checksum::Partial { start: 34, offset: 16 },
        gso: Some(Gso { size: 1460, header_bytes: 54 }),
    };
    net.send_as(1, frame, offload);
    let sent = net.sent();
    let lengths: Vec<_> = sent.iter().map(Vec::len).collect();
    assert_eq!(lengths, [1474, 1474, 1474, 54 + 740]);
    let joined: Vec<u8> = sent.iter().flat_map(|frame| read(frame).2).collect();
    assert!(joined == payload);
}

#[test]
fn connections_outlive_another_size() {
    let mut net = narrow(1500);
    let port = net.connect(4000);
    net.set_uplink_with(NODE, TUNNELLED);
    let large = [0; 1460];
    assert!(net.send(out("A", 4000, 101, 501, &large)).is_empty());
    assert_eq!(read(&net.given()[0].1).2[..2], [3, 4]);
    assert_eq!(net.send(out("A", 4000, 101, 501, &large[..1420])).len(), 1);
    assert_eq!(net.receive(back("A", port, 501, 1521, b"")).unwrap().len(), 1);
}

#[test]
fn an_error_that_quotes_more_than_fits_goes_nowhere() {
    let mut net = narrow(TUNNELLED);
    let port = read(&net.send(datagram((MACHINE, 700), (SERVER, 9), b""))[0]).1.unwrap().source_port;
    let given = net.receive(datagram((SERVER, 9), (NODE, port), &[0; 1472])).unwrap();
    for (quoted, sent) in [(1432, 1), (1433, 0)] {
        let message = [&[3, 3, 0, 0, 0, 0, 0, 0][..], &given[0].1[14..14 + quoted]].concat();
        assert_eq!(net.send(icmp(MACHINE, SERVER, &message)).len(), sent, "{quoted} bytes");
    }
}
