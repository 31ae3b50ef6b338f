//! How often a machine stops for its node.

use nestling::bed::Bed;
use nestling::client::types::JobRequest;
use nestling_tests::job::{job, run};
use nestling_tests::node::ready;

/// A promise of SPECIFICATION.md.
const MOST: u64 = 2500;

#[test]
fn a_machine_from_boot_to_power_off_takes_at_most_2500_exits() {
    let node = ready(Bed::builder());
    let exits = run(&node, &JobRequest { cold: true, ..job("poweroff -f") }).job.exits;
    let total = exits.get("total").copied().unwrap_or_default();
    println!("{exits:?}");
    assert!(total > 0 && total <= MOST, "{total} exits: {exits:?}");
    let sum: u64 = exits.iter().filter(|(kind, _)| *kind != "total").map(|(_, count)| count).sum();
    assert_eq!(sum, total, "{exits:?}");
}
