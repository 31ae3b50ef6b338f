//! What both vendors' boots cost, side by side in one emulator. `NESTLING_BED` is of no concern here.

use nestling::bed::{Bed, BedKind};
use nestling::client::types::{Host, JobRequest, Vendor};
use nestling_tests::job::{job, run};
use nestling_tests::node::ready;

/// Promises of SPECIFICATION.md: exits for one boot on VMX against SVM's in percent, and accesses to the VMCS an exit on average.
const MOST_PERCENT: u64 = 115;
const MOST_ACCESSES: u64 = 8;

/// The node after one machine has booted Linux, run a job and powered off.
fn after_one_machine(model: &str) -> Host {
    let node = ready(Bed::builder().kind(BedKind::Bochs { model: model.to_owned() }));
    run(&node, &JobRequest { cold: true, ..job("poweroff -f") });
    node.client().host().unwrap_or_else(|error| panic!("GET /v1/host: {error}"))
}

fn total(host: &Host) -> u64 {
    host.exits.get("total").copied().unwrap_or_default()
}

#[test]
fn vmx_takes_at_most_a_few_more_exits_than_svm_and_8_accesses_to_the_vmcs_each() {
    let svm = std::thread::spawn(|| after_one_machine("ryzen"));
    let vmx = after_one_machine("corei7_haswell_4770");
    let svm = svm.join().expect("the node on SVM runs a machine");
    assert_eq!((svm.vendor, vmx.vendor), (Vendor::Amd, Vendor::Intel));
    let accesses = vmx.vmcs_accesses.expect("a node on Intel counts them");
    let (svm_exits, vmx_exits) = (total(&svm), total(&vmx));
    println!("svm: {svm_exits} exits {:?}", svm.exits);
    println!("vmx: {vmx_exits} exits {:?}, {accesses} VMCS accesses", vmx.exits);
    assert!(
        vmx_exits > 0 && vmx_exits * 100 <= svm_exits * MOST_PERCENT,
        "{vmx_exits} exits, {svm_exits} on SVM"
    );
    assert!(
        accesses > 0 && accesses <= vmx_exits * MOST_ACCESSES,
        "{accesses} accesses in {vmx_exits} exits"
    );
    assert_eq!(svm.vmcs_accesses, None, "a VMCB is plain memory");
}
