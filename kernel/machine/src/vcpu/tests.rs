//! CPUID, MSR and XSETBV policy, on processors of both vendors.

use super::*;
use crate::address::{GuestPhysAddr, MsrIndex};
use crate::state::{EFER_LMA, EFER_LME, EFER_NXE};
use crate::testing::Ram;
use proptest::prelude::*;

const NOW: GuestTsc = GuestTsc(5_000_000);
/// Control registers as a test wants them.
#[derive(Clone, Copy)]
struct CpuContext {
    cr0: u64,
    cr4: u64,
    efer: u64,
    cpl: u8,
}

impl ControlRegisters for CpuContext {
    fn cr0(&self) -> u64 {
        self.cr0
    }

    fn cr4(&self) -> u64 {
        self.cr4
    }

    fn efer(&self) -> u64 {
        self.efer
    }

    fn cpl(&self) -> u8 {
        self.cpl
    }
}

const KERNEL: CpuContext =
    CpuContext { cr0: 0x8000_0001, cr4: 0x20, efer: EFER_LMA | EFER_LME | EFER_NXE, cpl: 0 };

/// A processor that has every feature there is, and a highest leaf beyond what anybody knows.
fn generous(vendor: [u32; 3]) -> HostCpuid {
    HostCpuid::read(|leaf, subleaf| match (leaf, subleaf) {
        (0, _) => [0x30, vendor[0], vendor[2], vendor[1]],
        (0x8000_0000, _) => [0x8000_0040, vendor[0], vendor[2], vendor[1]],
        (4 | 0x8000_001D, 4..) => [0; 4],
        (4 | 0x8000_001D, index) => [0xFC00_3FE0 & !0xE0 | 0xFFF << 14 | (index.max(1)) << 5 | 1, 63, 63, 0],
        (0xD, 0) => [u32::MAX, 0x2000, 0x2000, u32::MAX],
        (0xD, 1) => [u32::MAX, 0x2000, u32::MAX, u32::MAX],
        (0xD, 2) => [256, 576, 0, 0],
        (0xD, 5) => [64, 1088, 0, 0],
        (0xD, 6) => [512, 1152, 0, 0],
        (0xD, 7) => [1024, 1664, 0, 0],
        (0xD, 9) => [8, 2688, 0, 0],
        (0xD, _) => [64, 4096, 2, 0],
        (0x8000_0008, _) => [0x3934, u32::MAX, u32::MAX, u32::MAX],
        _ => [u32::MAX; 4],
    })
}

fn amd() -> HostCpuid {
    generous([0x6874_7541, 0x6974_6E65, 0x444D_4163])
}

fn intel() -> HostCpuid {
    generous([0x756E_6547, 0x4965_6E69, 0x6C65_746E])
}

fn vcpu(host: &HostCpuid, id: u32, vcpu_count: u32) -> Vcpu {
    Vcpu::new(&VcpuConfig { id, vcpu_count, tsc_khz: 2_500_000 }, host)
}

fn has(register: u32, bit: u32) -> bool {
    register & 1 << bit != 0
}

fn write(vcpu: &mut Vcpu, msr: u32, value: u64) -> Result<MsrEffect, Exception> {
    vcpu.write_msr(MsrIndex(msr), value, NOW, &KERNEL, 1_700_000_000_000_000_000, &mut Ram::new(0x1000))
}

fn read(vcpu: &mut Vcpu, msr: u32) -> Result<u64, Exception> {
    vcpu.read_msr(MsrIndex(msr), NOW, &KERNEL)
}

const REFUSED: Exception = Exception::GENERAL_PROTECTION;

#[test]
fn the_vendor_is_the_hosts_and_the_hypervisor_is_kvm() {
    let amd = amd();
    assert!(amd.is_amd() && !intel().is_amd());
    let guest = vcpu(&amd, 0, 1);
    let [max, b, c, d] = guest.cpuid(0, 0, &KERNEL);
    assert_eq!(max, 0xD);
    assert_eq!([b, d, c].map(u32::to_le_bytes).as_flattened(), b"AuthenticAMD");
    let [max, b, c, d] = guest.cpuid(0x4000_0000, 0, &KERNEL);
    assert_eq!(max, 0x4000_0010);
    assert_eq!([b, c, d].map(u32::to_le_bytes).as_flattened(), b"KVMKVMKVM\0\0\0");
    assert_eq!(guest.cpuid(0x4000_0010, 0, &KERNEL), [2_500_000, 1_000_000, 0, 0]);
    assert_eq!(guest.cpuid(0x4000_0001, 0, &KERNEL)[0], 1 << 1 | 1 << 3 | 1 << 6 | 1 << 15 | 1 << 24);
    assert_eq!(guest.cpuid(0x4000_0100, 0, &KERNEL), [0; 4], "and there is no other");
}

#[test]
fn what_is_not_emulated_is_hidden_and_what_is_emulated_is_shown() {
    for host in [amd(), intel()] {
        let guest = vcpu(&host, 0, 1);
        let [_, _, c, d] = guest.cpuid(1, 0, &KERNEL);
        for (bit, name) in [(2, "DTES64"), (3, "MONITOR"), (5, "VMX"), (6, "SMX"), (15, "PDCM"), (18, "DCA")]
        {
            assert!(!has(c, bit), "{name}");
        }
        for (bit, name) in
            [(17, "PCID"), (21, "x2APIC"), (24, "TSC deadline"), (26, "XSAVE"), (31, "hypervisor")]
        {
            assert!(has(c, bit), "{name}");
        }
        for (bit, name) in [(7, "MCE"), (12, "MTRR"), (14, "MCA"), (21, "DS"), (28, "HTT"), (29, "TM")] {
            assert!(!has(d, bit), "{name}");
        }
        assert!(has(d, 9) && has(d, 16), "APIC and PAT");
        assert_eq!(guest.cpuid(5, 0, &KERNEL), [0; 4], "MWAIT");
        assert_eq!(guest.cpuid(6, 0, &KERNEL), [4, 0, 0, 0], "ARAT only");
        let [max, b, c, d] = guest.cpuid(7, 0, &KERNEL);
        assert_eq!(max, 1);
        for (bit, name) in [(2, "SGX"), (4, "HLE"), (11, "RTM"), (12, "RDT"), (14, "MPX"), (25, "PT")] {
            assert!(!has(b, bit), "{name}");
        }
        assert!(has(b, 1), "TSC_ADJUST");
        for (bit, name) in [(5, "WAITPKG"), (7, "SHSTK"), (16, "LA57"), (29, "ENQCMD"), (31, "PKS")] {
            assert!(!has(c, bit), "{name}");
        }
        for (bit, name) in [
            (20, "IBT"),
            (22, "AMX"),
            (24, "AMX"),
            (25, "AMX"),
            (26, "SPEC_CTRL"),
            (29, "ARCH_CAPABILITIES"),
            (31, "SSBD"),
        ] {
            assert!(!has(d, bit), "{name}");
        }
        assert_eq!(guest.cpuid(0xA, 0, &KERNEL), [0; 4], "PMU");
        let [_, _, c, d] = guest.cpuid(0x8000_0001, 0, &KERNEL);
        for (bit, name) in [
            (2, "SVM"),
            (3, "EXTAPIC"),
            (9, "OSVW"),
            (10, "IBS"),
            (15, "LWP"),
            (23, "PERFCTR"),
            (29, "MWAITX"),
        ] {
            assert!(!has(c, bit), "{name}");
        }
        for (bit, name) in [(11, "SYSCALL"), (20, "NX"), (26, "1 GiB"), (27, "RDTSCP"), (29, "LM")] {
            assert!(has(d, bit), "{name}");
        }
        assert_eq!(guest.cpuid(0x8000_0007, 0, &KERNEL), [0, 0, 0, 0x100]);
        assert_eq!(guest.cpuid(0x8000_0008, 0, &KERNEL)[0], 0x3030, "48 bits of both kinds of address");
        assert_eq!(guest.cpuid(0x8000_000A, 0, &KERNEL), [0; 4]);
        assert_eq!(guest.cpuid(0x8000_001F, 0, &KERNEL), [0; 4], "memory encryption");
        assert_eq!(guest.cpuid(0x8000_0022, 0, &KERNEL), [0; 4]);
        for leaf in [0xE, 0xF, 0x10, 0x12, 0x14, 0x1D, 0x24, 0x3000, 0x8000_0040, 0xC000_0000, u32::MAX] {
            assert_eq!(guest.cpuid(leaf, 0, &KERNEL), [0; 4], "{leaf:#x}");
        }
    }
}

#[test]
fn bits_that_follow_control_registers_do() {
    let mut guest = vcpu(&intel(), 0, 1);
    let mut context = KERNEL;
    assert!(!has(guest.cpuid(1, 0, &context)[2], 27) && !has(guest.cpuid(7, 0, &context)[2], 4));
    context.cr4 |= 1 << 18 | 1 << 22;
    assert!(has(guest.cpuid(1, 0, &context)[2], 27) && has(guest.cpuid(7, 0, &context)[2], 4));
    write(&mut guest, 0x1B, 0xFEE0_0000).unwrap();
    assert!(!has(guest.cpuid(1, 0, &context)[3], 9), "APIC off");
}

#[test]
fn the_topology_is_one_package_of_single_threaded_cores() {
    let guest = vcpu(&amd(), 3, 6);
    assert_eq!(guest.cpuid(1, 0, &KERNEL)[1] >> 16, 0x0306);
    assert!(has(guest.cpuid(1, 0, &KERNEL)[3], 28));
    assert_eq!(guest.cpuid(0xB, 0, &KERNEL), [0, 1, 0x100, 3]);
    assert_eq!(guest.cpuid(0xB, 1, &KERNEL), [3, 6, 0x201, 3]);
    assert_eq!(guest.cpuid(0xB, 2, &KERNEL), [0, 0, 2, 3]);
    assert_eq!(guest.cpuid(0x8000_0008, 0, &KERNEL)[2], 3 << 12 | 5);
    assert_eq!(guest.cpuid(0x8000_001E, 0, &KERNEL), [3, 3, 0, 0]);
    let level = |leaf, index| guest.cpuid(leaf, index, &KERNEL)[0];
    for leaf in [4, 0x8000_001D] {
        assert_eq!(level(leaf, 2) >> 14 & 0xFFF, 0, "a second-level cache is one core's");
        assert_eq!(level(leaf, 3) >> 14 & 0xFFF, 7, "the third-level cache is everybody's");
        assert_eq!(level(leaf, 4), 0);
    }
    assert_eq!(level(4, 0) >> 26, 7);
    let alone = vcpu(&intel(), 0, 1);
    assert_eq!(alone.cpuid(0xB, 1, &KERNEL), [0, 1, 0x201, 0]);
    assert_eq!(alone.cpuid(1, 0, &KERNEL)[1] >> 16, 1);
}

#[test]
fn extended_state_has_the_sizes_of_what_is_enabled() {
    let mut guest = vcpu(&intel(), 0, 1);
    let mut context = KERNEL;
    assert_eq!(guest.cpuid(0xD, 0, &context), [0x2E7, 576, 2696, 0]);
    assert_eq!(guest.xsetbv(0, 7, &context), Err(Exception::UNDEFINED), "CR4.OSXSAVE is off");
    context.cr4 |= 1 << 18;
    assert_eq!(guest.xsetbv(0, 7, &context), Ok(7));
    assert_eq!(guest.xcr0(), 7);
    assert_eq!(guest.cpuid(0xD, 0, &context)[1], 832);
    assert_eq!(guest.cpuid(0xD, 1, &context), [7, 832, 0, 0], "no XSAVES and nothing of XSS");
    assert_eq!(guest.xsetbv(0, 0x2E7, &context), Ok(0x2E7));
    assert_eq!(guest.cpuid(0xD, 1, &context)[1], 576 + 256 + 64 + 512 + 1024 + 8, "compacted");
    assert_eq!(guest.cpuid(0xD, 2, &context), [256, 576, 0, 0]);
    assert_eq!(guest.cpuid(0xD, 3, &context), [0; 4], "MPX");
    for index in [17, 18, 64, u32::MAX] {
        assert_eq!(guest.cpuid(0xD, index, &context), [0; 4], "AMX and beyond");
    }
}

#[test]
fn an_xcr0_that_was_written_without_an_exit_counts() {
    let mut guest = vcpu(&intel(), 0, 1);
    guest.observe_xcr0(0x207);
    assert_eq!(guest.xcr0(), 0x207);
    assert_eq!(guest.cpuid(0xD, 0, &KERNEL), [0x2E7, 2696, 2696, 0]);
}

#[test]
fn xcr0_takes_only_consistent_values() {
    let mut guest = vcpu(&intel(), 0, 1);
    let context = CpuContext { cr4: 1 << 18, ..KERNEL };
    for value in [0, 2, 5, 0x21, 0x67, 0xE3, 0x1F, 7 | 1 << 17, 7 | 1 << 63] {
        assert_eq!(guest.xsetbv(0, value, &context), Err(REFUSED), "{value:#x}");
    }
    assert_eq!(guest.xsetbv(1, 7, &context), Err(REFUSED), "another register");
    assert_eq!(guest.xsetbv(0, 7, &CpuContext { cpl: 3, ..context }), Err(REFUSED));
    assert_eq!(guest.xcr0(), 1);
}

#[test]
fn a_host_without_xsave_has_no_vector_extensions() {
    let host = HostCpuid::read(|leaf, _| match leaf {
        0 => [0xD, 0, 0, 0],
        0x8000_0000 => [0x8000_0008, 0, 0, 0],
        1 => [u32::MAX, u32::MAX, !(1 << 26), u32::MAX],
        _ => [u32::MAX; 4],
    });
    let mut guest = vcpu(&host, 0, 1);
    let context = CpuContext { cr4: 1 << 18, ..KERNEL };
    let [_, _, c, _] = guest.cpuid(1, 0, &context);
    assert!(!has(c, 26) && !has(c, 27) && !has(c, 28) && !has(c, 12));
    assert_eq!(guest.cpuid(0xD, 0, &context), [0; 4]);
    assert!(!has(guest.cpuid(7, 0, &context)[1], 5) && !has(guest.cpuid(7, 0, &context)[1], 16));
    assert_eq!(guest.xsetbv(0, 1, &context), Err(Exception::UNDEFINED));
}

#[test]
fn state_without_a_place_in_the_save_area_is_not_offered() {
    for (missing, supported, pkru, avx512) in [(9, 0xE7, false, true), (6, 0x207, true, false)] {
        let whole = intel();
        let host = HostCpuid::read(|leaf, subleaf| match (leaf, subleaf) {
            (0, _) => [0xD, 0x756E_6547, 0x6C65_746E, 0x4965_6E69],
            (0xD, subleaf) if subleaf == missing => [0; 4],
            _ => whole.leaf(leaf, subleaf),
        });
        let guest = vcpu(&host, 0, 1);
        assert_eq!(guest.cpuid(0xD, 0, &KERNEL)[0], supported, "component {missing}");
        assert_eq!(guest.cpuid(0xD, missing, &KERNEL), [0; 4]);
        let [_, b, c, _] = guest.cpuid(7, 0, &KERNEL);
        assert_eq!((has(c, 3), has(b, 16)), (pkru, avx512), "component {missing}");
    }
}

#[test]
fn what_linux_reads_without_care_can_be_read() {
    let mut guest = vcpu(&amd(), 0, 1);
    for (msr, value) in [
        (0x10, NOW.0),
        (0x17, 0),
        (0x1B, 0xFEE0_0D00),
        (0x3A, 1),
        (0x3B, 0),
        (0x8B, 0x0100_0065),
        (0xFE, 0),
        (0x179, 0),
        (0x17A, 0),
        (0x1A0, 0x1801),
        (0x1D9, 0),
        (0x277, 0x0007_0406_0007_0406),
        (0x2FF, 0x806),
        (0x6E0, 0),
        (0x802, 0),
        (0xC000_0080, KERNEL.efer),
        (0xC000_0103, 0),
        (0xC001_0010, 0),
        (0xC001_0015, 1 << 24),
        (0xC001_001F, 0),
        (0xC001_1029, 2),
    ] {
        assert_eq!(read(&mut guest, msr), Ok(value), "{msr:#x}");
    }
    let mut guest = vcpu(&intel(), 0, 1);
    assert_eq!(read(&mut guest, 0x8B), Ok(1 << 32));
    assert_eq!(read(&mut guest, 0xC001_0015), Err(REFUSED));
}

#[test]
fn what_is_not_there_raises_general_protection() {
    let mut guest = vcpu(&amd(), 0, 1);
    for msr in [
        0x0,
        0x48,
        0x49,
        0x10A,
        0xCE,
        0xE7,
        0x122,
        0x186,
        0x200,
        0x250,
        0x480,
        0xDA0,
        0x4000_0000,
        0x4B56_4D02,
        0x4B56_4D03,
        0xC000_0104,
        0xC001_0000,
        0xC001_0117,
        0xC001_0131,
        0xC001_0140,
        0xC001_011F,
        u32::MAX,
    ] {
        assert_eq!(read(&mut guest, msr), Err(REFUSED), "read {msr:#x}");
        assert_eq!(write(&mut guest, msr, 0), Err(REFUSED), "write {msr:#x}");
    }
}

#[test]
fn efer_keeps_its_rules() {
    let mut guest = vcpu(&amd(), 0, 1);
    assert_eq!(write(&mut guest, 0xC000_0080, 0xD01), Ok(MsrEffect::Efer(0xD01)));
    assert_eq!(write(&mut guest, 0xC000_0080, 0x901), Ok(MsrEffect::Efer(0xD01)), "LMA is not the guest's");
    assert_eq!(write(&mut guest, 0xC000_0080, 0xC01), Err(REFUSED), "LME cannot change while paging");
    assert_eq!(write(&mut guest, 0xC000_0080, 0x1D01), Err(REFUSED), "SVME");
    assert_eq!(write(&mut guest, 0xC000_0080, 0x4D01), Ok(MsrEffect::Efer(0x4D01)), "FFXSR");
    let unpaged = CpuContext { cr0: 1, efer: EFER_LME, ..KERNEL };
    let written = guest.write_msr(MsrIndex(0xC000_0080), EFER_LMA, NOW, &unpaged, 0, &mut Ram::new(0));
    assert_eq!(written, Ok(MsrEffect::Efer(0)));
}

#[test]
fn the_page_attribute_table_takes_memory_types_only() {
    let mut guest = vcpu(&amd(), 0, 1);
    assert_eq!(write(&mut guest, 0x277, 0x0407_0506_0007_0106), Ok(MsrEffect::Pat(0x0407_0506_0007_0106)));
    assert_eq!(write(&mut guest, 0x277, 0x0007_0406_0007_0402), Err(REFUSED));
    assert_eq!(write(&mut guest, 0x277, 0x0807_0406_0007_0406), Err(REFUSED));
    assert_eq!(read(&mut guest, 0x277), Ok(0x0407_0506_0007_0106));
}

#[test]
fn moving_the_tsc_shows_in_its_adjustment() {
    let mut guest = vcpu(&amd(), 0, 1);
    assert_eq!(write(&mut guest, 0x10, NOW.0 + 100), Ok(MsrEffect::TscOffsetDelta(100)));
    assert_eq!(read(&mut guest, 0x3B), Ok(100));
    assert_eq!(write(&mut guest, 0x3B, 40), Ok(MsrEffect::TscOffsetDelta(-60)));
    assert_eq!(write(&mut guest, 0x3B, 40), Ok(MsrEffect::None));
    let before = vcpu(&amd(), 0, 1).nanoseconds(NOW);
    assert_eq!(guest.nanoseconds(GuestTsc(NOW.0 + 40)), before, "kvm-clock stands where it stood");
}

#[test]
fn registers_of_the_guests_own_keep_what_is_written() {
    let mut guest = vcpu(&amd(), 0, 1);
    assert_eq!(write(&mut guest, 0xC000_0103, 7), Ok(MsrEffect::TscAux(7)));
    assert_eq!((guest.tsc_aux(), read(&mut guest, 0xC000_0103)), (7, Ok(7)));
    assert_eq!(write(&mut guest, 0xC000_0103, 1 << 32), Err(REFUSED));
    for (msr, good, bad) in [
        (0x1A0, 0x1800, 0x0801),
        (0x1D9, 3, 4),
        (0x2FF, 0x800, 0x802),
        (0x8B, 0, 0),
        (0x17A, 0, 1),
        (0xC001_0015, 1 << 24 | 8, 1),
        (0xC001_1029, 2, 4),
    ] {
        assert_eq!(write(&mut guest, msr, good), Ok(MsrEffect::None), "{msr:#x}");
        if good != bad {
            assert_eq!(write(&mut guest, msr, bad), Err(REFUSED), "{msr:#x}");
        }
    }
    assert_eq!(read(&mut guest, 0x1A0), Ok(0x1800));
}

#[test]
fn the_clocks_registers_reach_guest_memory() {
    let mut guest = vcpu(&amd(), 0, 1);
    let mut ram = Ram::new(0x1000);
    let mut put =
        |msr, value| guest.write_msr(MsrIndex(msr), value, NOW, &KERNEL, 1_700_000_000_000_000_000, &mut ram);
    put(0x4B56_4D01, 0x101).unwrap();
    put(0x4B56_4D00, 0x200).unwrap();
    put(0x4B56_4D04, 0x301).unwrap();
    assert_eq!(put(0x4B56_4D01, 0x1001), Err(REFUSED));
    assert_eq!(ram.read_u32(GuestPhysAddr(0x204)), Ok(1_699_999_999));
    assert_eq!(ram.read_u16(GuestPhysAddr(0x11C)).unwrap() >> 8, 1, "stable");
    assert_eq!(read(&mut guest, 0x4B56_4D01), Ok(0x101));
    assert_eq!(read(&mut guest, 0x4B56_4D04), Ok(0x301));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_processor_makes_a_guest_that_answers_every_leaf(
        seed in any::<[u32; 4]>(),
        maximum in any::<(u32, u32)>(),
        config in any::<(u32, u32, u32)>(),
        questions in prop::collection::vec(any::<(u32, u32)>(), 32),
        context in any::<(u64, u64, u64, u8)>(),
        xcr0 in any::<u64>(),
    ) {
        let host = HostCpuid::read(|leaf, subleaf| match leaf {
            0 => [maximum.0, seed[0], seed[1], seed[2]],
            0x8000_0000 => [maximum.1, seed[0], seed[1], seed[2]],
            _ => seed.map(|word| word.rotate_left(leaf).wrapping_mul(subleaf | 1)),
        });
        let config = VcpuConfig { id: config.0, vcpu_count: config.1, tsc_khz: config.2 };
        let mut guest = Vcpu::new(&config, &host);
        let context = CpuContext { cr0: context.0, cr4: context.1, efer: context.2, cpl: context.3 };
        let _ = guest.xsetbv(0, xcr0, &context);
        for (leaf, subleaf) in questions {
            for leaf in [leaf, leaf & 0x3F, 0x8000_0000 | leaf & 0x3F, 0x4000_0000 | leaf & 0x1F] {
                guest.cpuid(leaf, subleaf, &context);
                let [.., c, _] = guest.cpuid(leaf, subleaf & 0xF, &context);
                if leaf == 0x8000_0001 {
                    prop_assert!(!has(c, 2), "SVM");
                }
            }
        }
    }

    #[test]
    fn any_msr_access_is_answered_or_refused(
        accesses in prop::collection::vec((any::<u32>(), any::<u64>(), any::<u64>(), any::<u64>()), 1..64),
        tsc_khz in any::<u32>(),
    ) {
        let mut guest = Vcpu::new(&VcpuConfig { id: 0, vcpu_count: 1, tsc_khz }, &amd());
        let mut ram = Ram::new(0x1000);
        for (index, value, now, wall_ns) in accesses {
            let now = GuestTsc(now);
            let blocks = [0, 0x800, 0x4B56_4D00, 0xC000_0080, 0xC001_0000];
            for base in blocks {
                let index = MsrIndex(base + (index & 0x3FF));
                for value in [value, value & 0xFFF] {
                    let _ = guest.write_msr(index, value, now, &KERNEL, wall_ns, &mut ram);
                    guest.after_exit(&mut ram);
                    guest.lapic.acknowledge();
                    guest.before_entry(&mut ram);
                }
                let _ = guest.read_msr(index, now, &KERNEL);
            }
        }
    }
}
