//! Nodes whose network card is an e1000, as in VMware, VirtualBox and Proxmox. Those in Bochs have no other.

use nestling::bed::{Bed, Network, RunningBed};
use nestling::client::Client;
use nestling::client::types::Conclusion;
use nestling_tests::job::job;
use nestling_tests::node::{ready, start};
use serde_json::json;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Longest wait for a line on the serial port or an answer.
const LIMIT: Duration = Duration::from_secs(60);

/// A node with another network card than the bed gives, and a client of it.
struct Node {
    bed: RunningBed,
    client: Client,
}

impl Node {
    fn with_card(card: &str) -> Self {
        Self::with_card_and(card, &[])
    }

    fn with_card_and(card: &str, more: &[&str]) -> Self {
        let netdev = "user,id=card,hostfwd=tcp:127.0.0.1:0-:8080";
        let device = format!("{card},netdev=card");
        let arguments = ["-netdev", netdev, "-device", device.as_str()];
        let bed =
            start(Bed::builder().network(Network::None).qemu_args(arguments).qemu_args(more.iter().copied()));
        let port = bed.qmp().and_then(|mut qmp| qmp.forwarded_port()).expect("QEMU forwards a port");
        let client = Client::new(&format!("http://127.0.0.1:{port}"), bed.token()).expect("a URL");
        let node = Self { bed, client };
        node.wait_for("ready ");
        node
    }

    fn wait_for(&self, words: &str) {
        let log = self.bed.wait_serial(words, LIMIT);
        assert!(log.is_some(), "it never said {words:?}:\n{}", self.bed.serial_log());
    }

    fn set_link(&self, up: bool) {
        let mut qmp = self.bed.qmp().expect("QEMU listens");
        qmp.execute("set_link", json!({"name": "card", "up": up})).expect("QEMU has the card");
    }

    fn driver(&self) -> String {
        self.client.host().expect("it answers").uplink.expect("it has an uplink").driver
    }

    /// Runs a job whose output goes several times round the rings.
    fn run_a_talkative_job(&self) {
        let bytes = 2_000_000;
        let finished = self.client.run(&job(&format!("yes 0123456789abcdef | head -c {bytes}"))).unwrap();
        assert_eq!(finished.job.conclusion, Some(Conclusion::Success), "{:?}", finished.job);
        let expected = b"0123456789abcdef\n".iter().cycle().take(bytes);
        assert!(
            finished.stdout.iter().eq(expected),
            "{} bytes arrived, not those sent",
            finished.stdout.len()
        );
    }
}

#[test]
fn a_node_with_an_e1000_runs_a_job() {
    let node = Node::with_card("e1000");
    assert_eq!(node.driver(), "e1000");
    // Each takes several received frames, so that these too go round.
    for _ in 0..100 {
        node.client.version().unwrap();
    }
    node.run_a_talkative_job();
    assert!(!node.bed.serial_log().contains("polled"), "its interrupts arrive");
}

#[test]
fn a_node_with_an_e1000e_runs_a_job() {
    let node = Node::with_card("e1000e");
    assert_eq!(node.driver(), "e1000e");
    node.run_a_talkative_job();
    assert!(!node.bed.serial_log().contains("polled"), "its interrupts arrive");
}

#[test]
fn a_node_whose_link_was_lost_answers_again_once_it_is_back() {
    let node = Node::with_card("e1000");
    node.set_link(false);
    node.wait_for("the link is down");
    assert_eq!(node.bed.exit_code(), None);
    node.set_link(true);
    node.wait_for("the link is up");
    let began = Instant::now();
    while let Err(error) = node.client.version() {
        assert!(began.elapsed() < LIMIT, "the link is back, but: {error}");
        sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_virtio_card_is_preferred_to_an_e1000() {
    let node = ready(Bed::builder().qemu_args(["-device", "e1000,addr=3"]));
    assert_eq!(node.client().host().unwrap().uplink.unwrap().driver, "virtio-net");
}

#[test]
fn an_e1000_is_used_where_the_virtio_card_cannot_be() {
    // Without virtio 1, which this driver wants.
    let unusable = ["-device", "virtio-net-pci,disable-modern=on,disable-legacy=off,addr=3"];
    let node = Node::with_card_and("e1000", &unusable);
    assert_eq!(node.driver(), "e1000");
}
