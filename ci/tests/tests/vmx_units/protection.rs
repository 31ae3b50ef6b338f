//! Which barriers a processor needs.

use crate::cpu::barriers::{
    Barriers, EXTENDED_8_IBPB, EXTENDED_21_TSA_NO, EXTENDED_21_VERW_CLEAR, LEAF_7_2_BHI_CTRL,
    LEAF_7_ARCH_CAPABILITIES, LEAF_7_IBRS_IBPB, LEAF_7_L1D_FLUSH, LEAF_7_MD_CLEAR, Processor,
    arch_capability as immunity, overwrite_return_predictions,
};

const MICROCODE_OF_2019: u32 = LEAF_7_MD_CLEAR | LEAF_7_IBRS_IBPB | LEAF_7_L1D_FLUSH;

fn names(processor: &Processor) -> Vec<&'static str> {
    Barriers::decide(processor).names().collect()
}

fn intel(leaf_7_edx: u32, arch_capabilities: u64) -> Processor {
    Processor { is_intel: true, leaf_7_edx, arch_capabilities, ..Processor::default() }
}

#[test]
fn a_processor_that_offers_nothing_gets_nothing() {
    assert_eq!(names(&intel(0, 0)), [""; 0]);
    assert_eq!(names(&Processor::default()), [""; 0]);
}

#[test]
fn a_vulnerable_intel_processor_flushes_at_every_entry() {
    // Skylake. The flush clears the buffers as well.
    assert_eq!(
        names(&intel(MICROCODE_OF_2019, 0)),
        [
            "ibpb_between_machines",
            "l1d_flush_between_machines",
            "verw_between_machines",
            "l1d_flush_at_entry"
        ]
    );
    // Without the flush the buffers are left to clear.
    assert!(names(&intel(LEAF_7_MD_CLEAR, 0)).contains(&"verw_at_entry"));
}

#[test]
fn what_the_processor_is_immune_to_or_l0_does_is_not_done_again() {
    let at_entry = |arch_capabilities| {
        let all = names(&intel(MICROCODE_OF_2019 | LEAF_7_ARCH_CAPABILITIES, arch_capabilities));
        all.into_iter().filter(|name| name.ends_with("at_entry")).collect::<Vec<_>>()
    };
    let sampling = immunity::MDS_NO | immunity::TAA_NO;
    assert_eq!(at_entry(immunity::RDCL_NO | sampling), [""; 0]);
    assert_eq!(at_entry(immunity::SKIP_L1DFL_VMENTRY | sampling), [""; 0]);
    assert_eq!(at_entry(sampling), ["l1d_flush_at_entry"]);
    assert_eq!(at_entry(immunity::RDCL_NO | immunity::MDS_NO), ["verw_at_entry"]);
    assert_eq!(at_entry(immunity::RDCL_NO | immunity::TAA_NO), ["verw_at_entry"]);
    let atom = immunity::RDCL_NO | sampling | immunity::RFDS_CLEAR;
    assert_eq!(at_entry(atom), ["verw_at_entry"]);
    assert_eq!(at_entry(atom | immunity::RFDS_NO), [""; 0]);
}

#[test]
fn enhanced_ibrs_is_for_intel_processors_that_say_it_holds() {
    let leaf_7 = LEAF_7_IBRS_IBPB | LEAF_7_ARCH_CAPABILITIES;
    let has = |processor: Processor| names(&processor).contains(&"enhanced_ibrs");
    assert!(has(intel(leaf_7, immunity::IBRS_ALL)));
    assert!(!has(intel(leaf_7, 0)));
    assert!(!has(intel(LEAF_7_ARCH_CAPABILITIES, immunity::IBRS_ALL)), "no IA32_SPEC_CTRL, no IBRS");
    assert!(!has(Processor { is_intel: false, ..intel(leaf_7, immunity::IBRS_ALL) }));
}

#[test]
fn branch_history_is_cut_where_the_processor_can_and_needs_it() {
    let leaf_7 = LEAF_7_IBRS_IBPB | LEAF_7_ARCH_CAPABILITIES;
    let has = |arch_capabilities, leaf_7_2_edx| {
        names(&Processor { leaf_7_2_edx, ..intel(leaf_7, arch_capabilities) }).contains(&"bhi_dis_s")
    };
    assert!(has(immunity::IBRS_ALL, LEAF_7_2_BHI_CTRL));
    assert!(!has(immunity::IBRS_ALL, 0));
    assert!(!has(immunity::IBRS_ALL | immunity::BHI_NO, LEAF_7_2_BHI_CTRL));
    assert!(!has(0, LEAF_7_2_BHI_CTRL), "it only completes enhanced IBRS");
}

#[test]
fn amd_processors_clear_buffers_at_entry_only_against_scheduler_attacks() {
    let zen = Processor { extended_8_ebx: EXTENDED_8_IBPB, ..Processor::default() };
    assert_eq!(names(&zen), ["ibpb_between_machines"]);
    let zen_4 = Processor { extended_21_eax: EXTENDED_21_VERW_CLEAR, ..zen };
    assert_eq!(names(&zen_4), ["ibpb_between_machines", "verw_between_machines", "verw_at_entry"]);
    let immune = Processor { extended_21_ecx: EXTENDED_21_TSA_NO, ..zen_4 };
    assert_eq!(names(&immune), ["ibpb_between_machines", "verw_between_machines"]);
    let half_immune = Processor { extended_21_ecx: EXTENDED_21_TSA_NO & 2, ..zen_4 };
    assert!(names(&half_immune).contains(&"verw_at_entry"));
}

#[test]
fn overwriting_return_predictions_comes_back_with_the_stack_as_it_was() {
    fn depth(levels: u32) -> u32 {
        // SAFETY: on a test thread's stack there is room.
        unsafe { overwrite_return_predictions() };
        if levels == 0 { 0 } else { 1 + std::hint::black_box(depth)(levels - 1) }
    }
    assert_eq!(depth(40), 40);
}
