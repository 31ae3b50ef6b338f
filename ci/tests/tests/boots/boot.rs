//! What a node needs to run, and what it says when it is not there.

use nestling::bed::{Bed, BedBuilder, Network};
use nestling_tests::job::{job, run};
use nestling_tests::node::{ready, start};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Longest wait for a line on the serial port.
const LIMIT: Duration = Duration::from_secs(60);
/// What the kernel says before it powers off instead of running.
const REFUSAL: &str = "this node cannot run: ";

/// Boots a node that must refuse to run, and returns its reason in lower case.
fn refusal(builder: BedBuilder) -> String {
    let bed = start(builder);
    let log = bed.wait_serial(REFUSAL, LIMIT);
    let log = log.unwrap_or_else(|| panic!("no refusal in:\n{}", bed.serial_log()));
    let line = log.lines().find(|line| line.contains(REFUSAL)).unwrap_or_default();
    let began = Instant::now();
    while bed.exit_code().is_none() {
        assert!(began.elapsed() < LIMIT, "it refused but did not power off");
        sleep(Duration::from_millis(50));
    }
    line.split_once(REFUSAL).map_or_else(String::new, |(_, reason)| reason.to_lowercase())
}

#[test]
fn a_processor_without_svm_is_refused_with_what_to_enable() {
    let reason = refusal(Bed::builder().cpu("max,-la57,-svm"));
    assert!(reason.contains("svm"), "{reason}");
    assert!(reason.contains("enable") || reason.contains("nested"), "{reason}");
}

#[test]
fn a_processor_without_nested_paging_is_refused_with_what_to_enable() {
    let reason = refusal(Bed::builder().cpu("max,-la57,-npt"));
    assert!(reason.contains("nested paging") || reason.contains("npt"), "{reason}");
}

#[test]
fn too_little_memory_is_refused_with_how_much_is_needed() {
    let reason = refusal(Bed::builder().memory_mib(48));
    assert!(reason.contains("memory") && reason.contains("mib"), "{reason}");
}

#[test]
fn a_node_without_a_network_card_is_refused_with_what_to_add() {
    let reason = refusal(Bed::builder().network(Network::None));
    assert!(reason.contains("no supported network interface") && reason.contains("virtio-net"), "{reason}");
}

#[test]
fn a_node_that_gets_no_dhcp_answer_says_so_and_asks_again() {
    let bed = start(Bed::builder().network(Network::Silent));
    let log = bed.wait_serial("no DHCP answer", LIMIT);
    let log = log.unwrap_or_else(|| panic!("it did not complain:\n{}", bed.serial_log()));
    assert!(log.contains("ip="), "it says how to do without:\n{log}");
    assert_eq!(bed.exit_code(), None, "it goes on asking");
}

#[test]
fn a_node_with_a_static_address_serves_without_dhcp() {
    let node = ready(Bed::builder().append("ip=10.0.2.15/24 gateway=10.0.2.2"));
    let uplink = node.client().host().unwrap().uplink.expect("the node has a network");
    assert_eq!(uplink.address.as_deref(), Some("10.0.2.15/24"));
    assert_eq!(uplink.gateway.as_deref(), Some("10.0.2.2"));
    assert!(!node.serial_log().to_lowercase().contains("dhcp answer"), "it never asked");
}

#[test]
fn a_node_says_what_it_found_in_under_15_lines() {
    let node = ready(Bed::builder());
    let log = node.serial_log();
    assert!(log.lines().count() < 15, "{log}");
    for word in [env!("CARGO_PKG_VERSION"), "MiB", "cores", "amd", "nested_paging", "10.0.2.15", "http://"] {
        assert!(log.contains(word), "{word} is missing from:\n{log}");
    }
    assert!(!log.contains(node.token().unwrap()), "the token is a secret");
}

#[test]
fn a_node_without_images_says_so() {
    let bed = start(Bed::builder().no_image());
    let log = bed.wait_serial("image", LIMIT);
    assert!(log.is_some(), "{}", bed.serial_log());
}

#[test]
fn a_small_node_runs_a_job_in_the_memory_it_has() {
    let node = ready(Bed::builder().memory_mib(512));
    assert_eq!(run(&node, &job("echo small")).stdout, b"small\n");
}
