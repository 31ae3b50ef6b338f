//! The least a node does on hardware it can use: it says what it found, and runs guests that are no Linux.

use crate::job::ALONE;
use crate::node;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use nestling::bed::BedKind;
use nestling::client::types::{Conclusion, Vendor};
use nestling_tests::guest::program;
use nestling_tests::job::{job, run};
use nestling_tests::node::bed_kind;

/// The guests by their images' names.
pub(crate) fn guests() -> Vec<(&'static str, Vec<u8>)> {
    vec![("speaks", program(speaks)), ("triple-fault", program(triple_fault))]
}

/// Writes a word to the serial port, leaf 0x4000_0000 of CPUID with it, and ends.
fn speaks(guest: &mut CodeAssembler) -> Result<(), IcedError> {
    guest.mov(dx, 0x3F8)?;
    for byte in b"hypervisor is " {
        guest.mov(al, u32::from(*byte))?;
        guest.out(dx, al)?;
    }
    guest.mov(eax, 0x4000_0000)?;
    guest.cpuid()?;
    // The signature's twelve bytes: EBX, ECX, EDX.
    guest.mov(esi, edx)?;
    guest.mov(edx, 0x3F8)?;
    for register in [ebx, ecx, esi] {
        guest.mov(eax, register)?;
        for _ in 0..4 {
            guest.out(dx, al)?;
            guest.shr(eax, 8)?;
        }
    }
    guest.mov(al, u32::from(b'\n'))?;
    guest.out(dx, al)?;
    triple_fault(guest)
}

/// A breakpoint without an interrupt descriptor table.
fn triple_fault(guest: &mut CodeAssembler) -> Result<(), IcedError> {
    guest.push(0)?;
    guest.push(0)?;
    guest.lidt(ptr(rsp))?;
    guest.int3()
}

#[test]
fn a_node_says_which_vendors_hardware_it_runs_on() {
    let host = node().client().host().unwrap();
    let amd = match bed_kind() {
        BedKind::QemuTcg => true,
        BedKind::Bochs { model } => ["ryzen", "phenom_8650_toliman"].contains(&model.as_str()),
        // Whatever this computer has.
        BedKind::QemuKvm => host.vendor == Vendor::Amd,
    };
    assert_eq!(host.vendor, if amd { Vendor::Amd } else { Vendor::Intel });
    assert!(host.features.values().any(|there| *there), "{:?}", host.features);
    assert!(!node().serial_log().contains(node().token().unwrap()), "the token is a secret");
}

#[test]
fn a_bare_guest_runs_and_its_end_is_told() {
    let _alone = ALONE.lock();
    let node = node();
    for (image, words) in [("speaks", "hypervisor is KVMKVMKVM"), ("triple-fault", "")] {
        let mut request = job("true");
        request.image = Some(image.to_owned());
        let job = run(node, &request).job;
        assert_eq!(job.conclusion, Some(Conclusion::SystemFailure), "{job:?}");
        assert!(
            job.failure_reason.as_deref().is_some_and(|reason| reason.contains("triple fault")),
            "{job:?}"
        );
        let console = job.console.unwrap_or_default();
        assert!(console.contains(words), "{console:?}");
    }
}
