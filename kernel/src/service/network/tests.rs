//! The network's own rules are nestling-network's tests; here frames reach it and come from it.

use super::super::testing::{CableEnd, FakeMachines, Wire, at, queue_job};
use super::*;
use crate::service::machines::MachineSpec;
use alloc::rc::Rc;
use alloc::vec;
use nestling_api::Limits;
use nestling_api::types::Verdict;

const NODE: [u8; 4] = [10, 0, 0, 1];
const SERVER: [u8; 4] = [10, 0, 0, 9];
const SERVER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// A node with machines, whose uplink's other end is in the test's hands.
struct Bench {
    network: MachineNetwork<u32>,
    machines: FakeMachines,
    jobs: JobStore,
    nic: CableEnd,
    sent: Wire,
}

impl Bench {
    fn new() -> Self {
        let sent = Wire::default();
        let nic = CableEnd { mac: 1, incoming: Wire::default(), outgoing: Rc::clone(&sent), queue: 100 };
        let mut bench = Self {
            network: MachineNetwork::new([1; 32]),
            machines: FakeMachines::default(),
            jobs: JobStore::new(Limits::default()),
            nic,
            sent,
        };
        let uplink = Configuration {
            address: "10.0.0.1/24".parse().unwrap(),
            gateway: None,
            dns_servers: vec![],
            mtu: 1500,
        };
        bench.network.follow(Some(&uplink), &mut bench.nic, 0);
        bench
    }

    fn machine(&mut self, number: u8, egress: Egress) -> (u32, JobId) {
        let job = queue_job(&mut self.jobs, number);
        let spec = MachineSpec {
            kernel: &[],
            initramfs: &[],
            command_line: "",
            mem_size_mib: 64,
            vcpu_count: 1,
            network: Some(CARD),
            disk: None,
        };
        let machine = self.machines.create(&spec).unwrap();
        self.network.add(machine, job, egress);
        (machine, job)
    }

    fn send(&mut self, machine: u32, frame: Vec<u8>) {
        let cable = self.machines.networks.get_mut(&machine).unwrap();
        cable.to_node.push_back((frame, card::Offload::default()));
    }

    fn carry(&mut self, ms: u64) {
        self.network.carry(&mut self.nic, &mut self.machines, &mut self.jobs, at(ms));
    }

    fn received(&mut self, machine: u32) -> Vec<Vec<u8>> {
        let cable = self.machines.networks.get_mut(&machine).unwrap();
        cable.from_node.drain(..).map(|(frame, _)| frame).collect()
    }
}

fn sum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes = parts.concat();
    let word = |word: &[u8]| u32::from(word[0]) << 8 | word.get(1).map_or(0, |low| u32::from(*low));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// A UDP datagram in its frame, with checksums.
fn udp(mac: [u8; 6], from: ([u8; 4], u16), to: ([u8; 4], u16), payload: &[u8]) -> Vec<u8> {
    let length = ((8 + payload.len()) as u16).to_be_bytes();
    let ports = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    let check = sum(&[&from.0, &to.0, &[0, 17], &length, &ports, &length, &[0, 0], payload]);
    let total = ((28 + payload.len()) as u16).to_be_bytes();
    let mut ip = [&[0x45, 0], &total[..], &[0, 1, 0, 0, 64, 17, 0, 0], &from.0, &to.0].concat();
    let ip_check = sum(&[&ip]);
    ip[10..12].copy_from_slice(&ip_check);
    [&mac, &[2, 0, 0, 0, 0, 9, 8, 0][..], &ip, &ports, &length, &check, payload].concat()
}

#[test]
fn the_agent_is_told_address_gateway_and_dns_behind_the_images_own_arguments() {
    assert_eq!(command_line("quiet"), "quiet nestling.net=192.0.0.2/29,192.0.0.1,192.0.0.1");
}

#[test]
fn a_datagram_goes_out_by_the_nodes_address_and_its_answer_comes_back() {
    let mut bench = Bench::new();
    let (machine, job) = bench.machine(1, Egress::All);
    let ask = udp(nestling_network::GATEWAY_MAC, (MACHINE.octets(), 5000), (SERVER, 7), b"ping");
    bench.send(machine, ask);
    bench.carry(0);
    // Who has the server's address?
    let question = bench.sent.borrow_mut().pop_front().unwrap();
    assert_eq!((&question[12..14], &question[38..42]), (&[8, 6][..], &SERVER[..]));
    let mut answer =
        [&question[6..12], &SERVER_MAC, &[8, 6], &question[14..20], &[0, 2], &SERVER_MAC, &SERVER].concat();
    answer.extend(&question[22..32]);
    assert!(!bench.network.receive(&mut answer, &mut bench.nic, 0), "the node's own protocols see ARP too");
    let out = bench.sent.borrow_mut().pop_front().unwrap();
    assert_eq!((&out[..6], &out[26..30], &out[42..]), (&SERVER_MAC[..], &NODE[..], &b"ping"[..]));
    let port = u16::from_be_bytes([out[34], out[35]]);
    let mut answer = udp([2, 0, 0, 0, 0, 1], (SERVER, 7), (NODE, port), b"pong!");
    assert!(bench.network.receive(&mut answer, &mut bench.nic, 1));
    bench.carry(1);
    let received = bench.received(machine);
    assert_eq!(received.len(), 1);
    assert_eq!((&received[0][30..34], &received[0][42..]), (&MACHINE.octets()[..], &b"pong!"[..]));
    bench.network.remove(job);
    bench.carry(2);
    let list = bench.jobs.connections(job).unwrap();
    let [connection] = list.connections.as_slice() else { panic!("{list:?}") };
    assert_eq!((connection.bytes_sent, connection.bytes_received), (4, 5));
    assert_eq!((connection.verdict, connection.port), (Verdict::Allowed, Some(7)));
}

#[test]
fn what_a_job_may_not_reach_is_answered_and_logged_and_does_not_leave_the_node() {
    let mut bench = Bench::new();
    let (first, job) = bench.machine(1, Egress::None);
    let (second, _) = bench.machine(2, Egress::All);
    let ask = udp(nestling_network::GATEWAY_MAC, (MACHINE.octets(), 5000), (SERVER, 7), b"ping");
    bench.send(first, ask);
    bench.carry(0);
    assert!(bench.sent.borrow().is_empty());
    let received = bench.received(first);
    assert_eq!(received.len(), 1);
    // ICMP: destination unreachable, administratively prohibited.
    assert_eq!((received[0][23], &received[0][34..36]), (1, &[3, 13][..]));
    assert!(bench.received(second).is_empty());
    let list = bench.jobs.connections(job).unwrap();
    assert_eq!((list.total_count, list.refused_count), (1, 1));
}

#[test]
fn frames_that_the_uplink_has_no_room_for_stay_with_their_machine() {
    let mut bench = Bench::new();
    let (machine, _) = bench.machine(1, Egress::All);
    bench.sent.borrow_mut().extend((0..100).map(|_| vec![]));
    bench.send(machine, vec![0; 60]);
    bench.carry(0);
    assert_eq!(bench.machines.networks[&machine].to_node.len(), 1);
    assert_eq!(bench.network.deadline(0), Some(RETRY_NS));
    bench.sent.borrow_mut().clear();
    bench.carry(1);
    assert!(bench.machines.networks[&machine].to_node.is_empty());
}

#[test]
fn a_flood_of_one_machine_is_taken_in_rounds() {
    let mut bench = Bench::new();
    let (machine, _) = bench.machine(1, Egress::All);
    bench.nic.queue = 100_000;
    (0..FRAMES_PER_TURN * TURNS + 1).for_each(|_| bench.send(machine, vec![0; 60]));
    bench.carry(0);
    assert_eq!(bench.machines.networks[&machine].to_node.len(), 1);
    assert!(bench.network.deadline(0).is_some());
}
