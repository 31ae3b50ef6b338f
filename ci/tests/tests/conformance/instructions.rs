//! Single instructions whose behaviour the hypervisor decides: those of the virtualization extensions, caches, time, XSETBV.

use crate::cpuid::{if_feature, with_xsave};
use crate::{image, is_emulated_by_qemu, node, run, run_to_any_end};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use nestling::client::types::Status;
use nestling_machine::layout::{BOOT_PAGE_TABLES, BOOT_PARAMS};
use nestling_tests::bare::{self, Asm, Facts, Guest, Outcome, Program, layout};

/// This file's guests.
pub(crate) const GUESTS: &[(&str, Program)] = &[
    ("entry-state", entry_state),
    ("virtualization", virtualization),
    ("virtualization-user", virtualization_at_user_privilege),
    ("vmxe", vmxe),
    ("caches", caches),
    ("tsc-monotonic", tsc_is_monotonic),
    ("tsc-disable", tsc_disable),
    ("rdpmc", rdpmc),
    ("monitor", monitor),
    ("hlt-often", hlt_often),
    ("xsetbv", xsetbv),
    ("xsetbv-user", xsetbv_at_user_privilege),
    ("xsetbv-without-osxsave", xsetbv_without_osxsave),
];

const UD: u64 = 6;
const GP: u64 = 13;
const CR4_TSD: i32 = 1 << 2;
const CR4_VMXE: i32 = 1 << 13;

fn entry_state(guest: &mut Guest) -> Asm {
    guest.facts_at("registers", layout::ENTRY, 17)
}

type Instruction = (&'static str, fn(&mut Guest) -> Result<(), IcedError>);

/// VMX and SMX, which need CR4.VMXE and CR4.SMXE: #UD without, at any privilege.
const VMX: &[Instruction] = &[
    ("vmcall", |guest| guest.vmcall()),
    ("vmxon", |guest| guest.vmxon(ptr(rsi))),
    ("vmxoff", |guest| guest.vmxoff()),
    ("vmclear", |guest| guest.vmclear(ptr(rsi))),
    ("vmptrld", |guest| guest.vmptrld(ptr(rsi))),
    ("vmptrst", |guest| guest.vmptrst(ptr(rsi))),
    ("vmread", |guest| guest.vmread(rax, rcx)),
    ("vmwrite", |guest| guest.vmwrite(rcx, rax)),
    ("vmlaunch", |guest| guest.vmlaunch()),
    ("vmresume", |guest| guest.vmresume()),
    ("vmfunc", |guest| guest.vmfunc()),
    ("invept", |guest| guest.invept(rax, ptr(rsi))),
    ("invvpid", |guest| guest.invvpid(rax, ptr(rsi))),
    ("getsec", |guest| guest.getsec()),
];

/// SVM, which needs EFER.SVME: #UD without, at any privilege.
const SVM: &[Instruction] = &[
    ("vmrun", |guest| guest.vmrun()),
    ("vmload", |guest| guest.vmload()),
    ("vmsave", |guest| guest.vmsave()),
    ("stgi", |guest| guest.stgi()),
    ("clgi", |guest| guest.clgi()),
    ("skinit", |guest| guest.skinit()),
    ("invlpga", |guest| guest.invlpga()),
];

/// SVM's call, which is not privileged.
const VMMCALL: &[Instruction] = &[("vmmcall", |guest| guest.vmmcall())];

fn attempts(guest: &mut Guest, instructions: &[&[Instruction]]) -> Asm {
    for &(name, instruction) in instructions.iter().copied().flatten() {
        guest.mov(eax, layout::SCRATCH as u32)?;
        guest.mov(rsi, rax)?;
        guest.xor(ecx, ecx)?;
        guest.attempt(name, instruction)?;
    }
    guest.fact("rsi", rsi)?;
    guest.fact_at("scratch", layout::SCRATCH)
}

fn virtualization(guest: &mut Guest) -> Asm {
    attempts(guest, &[VMX, SVM, VMMCALL])
}

fn virtualization_at_user_privilege(guest: &mut Guest) -> Asm {
    guest.allow_user()?;
    guest.user(|guest| attempts(guest, &[VMX, SVM, VMMCALL]))
}

fn vmxe(guest: &mut Guest) -> Asm {
    guest.mov(rax, cr4)?;
    guest.fact("before", rax)?;
    guest.or(eax, CR4_VMXE)?;
    guest.attempt("write", |guest| guest.mov(cr4, rax))?;
    guest.mov(rax, cr4)?;
    guest.fact("after", rax)
}

fn caches(guest: &mut Guest) -> Asm {
    for (name, at) in [("invd", layout::SCRATCH), ("wbinvd", layout::SCRATCH + 0x1000)] {
        guest.mov(rbx, 0x0123_4567_89AB_CDEF_u64)?;
        guest.mov(qword_ptr(at), rbx)?;
        guest.attempt(name, |guest| if name == "invd" { guest.invd() } else { guest.wbinvd() })?;
        guest.fact_at(&format!("{name}-data"), at)?;
    }
    guest.fact("rbx", rbx)?;
    guest.allow_user()?;
    guest.user(|guest| {
        guest.attempt("user-invd", |guest| guest.invd())?;
        guest.attempt("user-wbinvd", |guest| guest.wbinvd())
    })
}

/// Reads the counter often, with exits and a nested fault between the readings; the number of steps back and the whole span.
fn tsc_is_monotonic(guest: &mut Guest) -> Asm {
    let mut again = guest.create_label();
    let mut later = guest.create_label();
    guest.xor(r12d, r12d)?; // steps back
    guest.mov(r13d, 200)?; // readings
    guest.rdtsc()?;
    guest.shl(rdx, 32)?;
    guest.or(rax, rdx)?;
    guest.mov(r14, rax)?; // the last reading
    guest.mov(r15, rax)?; // the first
    guest.set_label(&mut again)?;
    guest.lfence()?;
    guest.rdtsc()?;
    guest.shl(rdx, 32)?;
    guest.or(rax, rdx)?;
    guest.cmp(rax, r14)?;
    guest.mov(r14, rax)?;
    guest.jae(later)?;
    guest.inc(r12d)?;
    guest.set_label(&mut later)?;
    guest.xor(eax, eax)?;
    guest.cpuid()?;
    guest.in_(al, 0x80)?;
    guest.mov(eax, dword_ptr(0xFEC0_0000_u64))?;
    guest.dec(r13d)?;
    guest.jne(again)?;
    guest.rdmsr_value(0x10)?;
    guest.sub(rax, r14)?;
    guest.fact("msr-later-by", rax)?;
    guest.fact("steps-back", r12)?;
    guest.sub(r14, r15)?;
    guest.fact("span", r14)
}

fn set_cr4(guest: &mut Guest, bits: i32, set: bool) -> Asm {
    guest.mov(rax, cr4)?;
    if set {
        guest.or(eax, bits)?
    } else {
        guest.and(eax, !bits)?
    }
    guest.mov(cr4, rax)
}

fn tsc_disable(guest: &mut Guest) -> Asm {
    // RDTSCP where there is one, RDTSC otherwise.
    let rdtscp = |guest: &mut Guest| guest.rdtscp();
    guest.cpuid_leaf(0x8000_0001, 0)?;
    guest.mov(r15d, edx)?;
    guest.shr(r15d, 27)?;
    guest.and(r15d, 1)?;
    guest.fact("has-rdtscp", r15)?;
    guest.allow_user()?;
    for (state, set) in [("off", false), ("on", true)] {
        set_cr4(guest, CR4_TSD, set)?;
        guest.attempt(&format!("{state}-kernel"), |guest| guest.rdtsc())?;
        guest.user(|guest| {
            guest.attempt(&format!("{state}-user"), |guest| guest.rdtsc())?;
            guest.attempt(&format!("{state}-user-p"), rdtscp)
        })?;
    }
    Ok(())
}

fn rdpmc(guest: &mut Guest) -> Asm {
    for counter in [0, 7, 0x4000_0000] {
        guest.mov(ecx, counter)?;
        guest.attempt(&format!("{counter:x}"), |guest| guest.rdpmc())?;
    }
    guest.allow_user()?;
    guest.user(|guest| {
        guest.xor(ecx, ecx)?;
        guest.attempt("user", |guest| guest.rdpmc())
    })
}

fn monitor(guest: &mut Guest) -> Asm {
    guest.mov(eax, layout::SCRATCH as u32)?;
    guest.xor(ecx, ecx)?;
    guest.xor(edx, edx)?;
    guest.attempt("monitor", |guest| guest.monitor())?;
    guest.xor(eax, eax)?;
    guest.attempt("mwait", |guest| guest.mwait())?;
    guest.allow_user()?;
    guest.user(|guest| {
        guest.attempt("user-monitor", |guest| guest.monitor())?;
        guest.attempt("user-mwait", |guest| guest.mwait())
    })
}

/// Waits thousands of times for a timer that fires at about the time of the HLT.
fn hlt_often(guest: &mut Guest) -> Asm {
    let mut again = guest.create_label();
    guest.enable_apic()?;
    guest.mov(r12d, HALTS as u32)?;
    guest.set_label(&mut again)?;
    guest.timer(0x60, 0, 1)?;
    guest.sti()?;
    guest.hlt()?;
    guest.cli()?;
    guest.dec(r12d)?;
    guest.jne(again)?;
    guest.record_count("interrupts")
}

const HALTS: u64 = 5000;

/// Reports XCR0.
fn xcr0(guest: &mut Guest, name: &str) -> Asm {
    guest.xor(ecx, ecx)?;
    guest.xgetbv()?;
    guest.shl(rdx, 32)?;
    guest.or(rax, rdx)?;
    guest.fact(name, rax)
}

/// Attempts XSETBV and reports XCR0 after it.
fn set_xcr0(guest: &mut Guest, name: &str, index: u32, value: u64) -> Asm {
    guest.mov(ecx, index)?;
    guest.mov(eax, value as u32)?;
    guest.mov(edx, (value >> 32) as u32)?;
    guest.attempt(name, |guest| guest.xsetbv())?;
    xcr0(guest, &format!("{name}-xcr0"))
}

fn xsetbv(guest: &mut Guest) -> Asm {
    with_xsave(guest, |guest| {
        guest.cpuid_leaf(0xD, 0)?;
        guest.fact("supported", rax)?;
        xcr0(guest, "reset")?;
        set_xcr0(guest, "3", 0, 3)?;
        for (name, value) in
            [("0", 0), ("2", 2), ("5", 5), ("e0", 0xE3), ("bit-63", 1 << 63 | 3), ("bit-32", 1 << 32 | 3)]
        {
            set_xcr0(guest, name, 0, value)?;
        }
        set_xcr0(guest, "index-1", 1, 1)?;
        set_xcr0(guest, "index-max", u32::MAX, 1)?;
        set_xcr0(guest, "7", 0, 7)?;
        set_xcr0(guest, "1", 0, 1)
    })
}

fn xsetbv_at_user_privilege(guest: &mut Guest) -> Asm {
    guest.allow_user()?;
    with_xsave(guest, |guest| {
        guest.user(|guest| {
            xcr0(guest, "reset")?;
            set_xcr0(guest, "3", 0, 3)
        })
    })
}

fn xsetbv_without_osxsave(guest: &mut Guest) -> Asm {
    guest.mov(eax, 1)?;
    guest.xor(ecx, ecx)?;
    guest.xor(edx, edx)?;
    guest.attempt("xsetbv", |guest| guest.xsetbv())?;
    guest.attempt("xgetbv", |guest| guest.xgetbv())?;
    if_feature(guest, 1, 26, |guest| guest.record_count("has-xsave"))
}

#[test]
fn a_machine_starts_with_clear_registers() {
    // Linux' 64-bit boot protocol asks for RSI; RSP is any stack.
    let mut expected = [0; 17];
    (expected[4], expected[6], expected[16]) = (BOOT_PAGE_TABLES, BOOT_PARAMS, 2);
    run("entry-state").assert_words("registers", &expected);
}

#[test]
fn virtualization_instructions_are_undefined() {
    let facts = run("virtualization");
    for (name, _) in [VMX, SVM, VMMCALL].into_iter().flatten() {
        facts.assert_fault(name, UD, 0);
    }
    facts.assert("rsi", layout::SCRATCH);
    facts.assert("scratch", 0);
}

#[test]
fn virtualization_instructions_are_undefined_for_programs() {
    let facts = run("virtualization-user");
    for (name, _) in [VMX, VMMCALL].into_iter().flatten() {
        facts.assert_fault(name, UD, 0);
    }
    for (name, _) in SVM {
        // A guest runs with EFER.SVME set whatever it sees, and the processor looks at the privilege before the intercept (APM
        // vol. 2, 15.9): where there is SVM it is #GP(0), as with SVME and without privilege.
        let found = facts.outcome(name);
        let expected = [UD, GP].map(|vector| Outcome::Fault { vector, error_code: 0, offset: 0 });
        assert!(expected.contains(&found), "{name}: {found:?}\n{facts}");
    }
    facts.assert("rsi", layout::SCRATCH);
    facts.assert("scratch", 0);
}

#[test]
fn cr4_vmxe_cannot_be_set() {
    let facts = run_to_any_end("vmxe");
    if is_emulated_by_qemu() && !facts.has("end") {
        // The emulation takes the bit and then refuses to run a guest that has it set.
        return facts.assert_ended("does not support");
    }
    facts.assert_finished();
    facts.assert_fault("write", GP, 0);
    let before = facts.value("before");
    assert_eq!(before & CR4_VMXE as u64, 0, "VMXE is not shown\n{facts}");
    facts.assert("after", before);
}

#[test]
fn invd_and_wbinvd_lose_nothing() {
    let facts = run("caches");
    for name in ["invd", "wbinvd"] {
        facts.assert_completed(name);
        facts.assert(&format!("{name}-data"), 0x0123_4567_89AB_CDEF);
        facts.assert_fault(&format!("user-{name}"), GP, 0);
    }
    facts.assert("rbx", 0x0123_4567_89AB_CDEF);
}

#[test]
fn the_tsc_never_goes_back() {
    let facts = run("tsc-monotonic");
    facts.assert("steps-back", 0);
    facts.assert_that("span", "time has passed", |span| span > 0 && span < 1 << 40);
    facts.assert_that("msr-later-by", "the MSR is the same counter", |later| later < 1 << 40);
}

#[test]
fn cr4_tsd_keeps_programs_from_the_tsc() {
    let facts = run("tsc-disable");
    let has_rdtscp = facts.value("has-rdtscp") == 1;
    for name in ["off-kernel", "off-user", "on-kernel"] {
        facts.assert_completed(name);
    }
    facts.assert_fault("on-user", GP, 0);
    if has_rdtscp {
        facts.assert_completed("off-user-p");
        facts.assert_fault("on-user-p", GP, 0);
    } else {
        facts.assert_fault("on-user-p", UD, 0);
    }
}

#[test]
fn there_are_no_performance_counters() {
    let facts = run("rdpmc");
    for name in ["0", "7", "40000000", "user"] {
        facts.assert_fault(name, GP, 0);
    }
}

#[test]
fn monitor_and_mwait_are_undefined() {
    let facts = run("monitor");
    for name in ["monitor", "mwait", "user-monitor", "user-mwait"] {
        facts.assert_fault(name, UD, 0);
    }
}

#[test]
fn a_timer_wakes_hlt_however_busy_the_node_is() {
    let node = node();
    let started = bare::start(node, &image("hlt-often"));
    let runs = || node.client().job(&started.id).is_ok_and(|job| job.status != Status::Completed);
    // Each request interrupts the guest a few times, now and then between STI and HLT.
    std::thread::scope(|scope| (0..3).for_each(|_| drop(scope.spawn(|| while runs() {}))));
    let facts = bare::finish(node, &started);
    facts.assert_finished();
    facts.assert("interrupts", HALTS);
}

fn has_xsave(facts: &Facts) -> bool {
    facts.has("reset")
}

#[test]
fn xsetbv_takes_what_the_processor_has_and_refuses_the_rest() {
    let facts = run("xsetbv");
    if !has_xsave(&facts) {
        return;
    }
    facts.assert("reset", 1);
    facts.assert_completed("3");
    facts.assert("3-xcr0", 3);
    // SDM vol. 1, 13.3: x87 always, AVX with SSE, AVX-512 as a whole and with AVX, no reserved bit.
    for name in ["0", "2", "5", "e0", "bit-63", "bit-32", "index-1", "index-max"] {
        facts.assert_fault(name, GP, 0);
        facts.assert(&format!("{name}-xcr0"), 3);
    }
    if facts.value("supported") & 4 != 0 {
        facts.assert_completed("7");
        facts.assert("7-xcr0", 7);
    } else {
        facts.assert_fault("7", GP, 0);
    }
    facts.assert_completed("1");
    facts.assert("1-xcr0", 1);
}

#[test]
fn xsetbv_is_privileged() {
    let facts = run("xsetbv-user");
    if has_xsave(&facts) {
        facts.assert_fault("3", GP, 0);
        facts.assert("3-xcr0", 1);
    }
}

#[test]
fn xsetbv_and_xgetbv_are_undefined_without_osxsave() {
    let facts = run("xsetbv-without-osxsave");
    facts.assert_fault("xsetbv", UD, 0);
    facts.assert_fault("xgetbv", UD, 0);
}
