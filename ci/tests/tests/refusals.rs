//! Processors that lack what a node needs: models of Bochs, refused with the name of what is missing. `NESTLING_BED` is of no concern here.

use nestling::bed::{Bed, BedKind};
use nestling_tests::node::start;
use std::time::Duration;

/// Longest wait for a node to refuse and to switch itself off, in QEMU.
const LIMIT: Duration = Duration::from_secs(60);
/// What the kernel says before it powers off instead of running.
const REFUSAL: &str = "this node cannot run: ";

/// Boots a node on this model of Bochs, which must refuse to run, and returns its reason in lower case.
fn refusal(model: &str) -> String {
    let bed =
        start(Bed::builder().kind(BedKind::Bochs { model: model.to_owned() }).memory_mib(512).no_image());
    let log = bed.wait_serial(REFUSAL, LIMIT);
    assert!(log.is_some(), "no refusal in:\n{}", bed.serial_log());
    assert_eq!(bed.wait_exit(LIMIT), Some(0), "it switches itself off");
    // Only now is the line whole for sure.
    let log = bed.serial_log();
    let line = log.lines().find(|line| line.contains(REFUSAL)).unwrap_or_default();
    line.split_once(REFUSAL).map_or_else(String::new, |(_, reason)| reason.to_lowercase())
}

#[test]
fn corei5_lynnfield_750_has_no_unrestricted_guest() {
    let reason = refusal("corei5_lynnfield_750");
    assert!(reason.contains("unrestricted guest"), "{reason}");
}

#[test]
fn core2_penryn_t9600_has_no_extended_page_tables() {
    let reason = refusal("core2_penryn_t9600");
    assert!(reason.contains("ept"), "{reason}");
}

#[test]
fn turion64_tyler_has_no_nested_paging() {
    let reason = refusal("turion64_tyler");
    assert!(reason.contains("nested paging"), "{reason}");
}

#[test]
fn athlon64_venice_has_no_virtualization_at_all() {
    let reason = refusal("athlon64_venice");
    assert!(reason.contains("svm"), "{reason}");
}
