//! Which processor a guest sees: the physical one's features that need nothing from us, and what we emulate.
//!
//! Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E; the KVM leaves from Linux, Documentation/virt/kvm/x86/cpuid.rst.
//!
//! Every feature bit is on an allow-list: one that needs an MSR, a control bit or state that a [`super::Vcpu`] does not have, or
//! that a later processor brings, stays hidden. The highest leaves are as low as they can be, since Linux asks for the leaf
//! of each feature it knows, and every question is an exit.

use super::xstate::ExtendedState;
use super::{ControlRegisters, VcpuConfig};

/// EAX, EBX, ECX, EDX.
pub type Registers = [u32; 4];

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// Highest basic leaf shown. What lies above is hidden (RDT, SGX, PT, AMX) or told in another way (topology, frequency).
const BASIC_MAX: u32 = 0xD;
/// Highest extended leaf kept.
const EXTENDED_MAX: u32 = 0x8000_0021;
/// Highest leaf of the hypervisor's range.
const HYPERVISOR_MAX: u32 = 0x4000_0010;

const BASIC_LEAVES: usize = BASIC_MAX as usize + 1;
const EXTENDED_LEAVES: usize = 0x22;
const CACHE_LEAVES: usize = 8;
const FEATURE_SUBLEAVES: usize = 2;
const XSTATE_SUBLEAVES: usize = 10;

/// As many APIC ids as an interrupt message can name.
const VCPU_COUNT_MAX: u32 = 1 << 15;

/// Frequency of the local APIC timer in kHz.
const APIC_TIMER_KHZ: u32 = 1_000_000;

const CR4_OSXSAVE: u64 = 1 << 18;
const CR4_PKE: u64 = 1 << 22;

/// Sets bits by their numbers.
const fn bits<const N: usize>(numbers: [u32; N]) -> u32 {
    let mut set = 0;
    let mut i = 0;
    while i < N {
        set |= 1 << numbers[i];
        i += 1;
    }
    set
}

/// SSE3, PCLMULQDQ, SSSE3, FMA, CX16, PCID, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, XSAVE, AVX, F16C, RDRAND.
const LEAF1_ECX: u32 = bits([0, 1, 9, 12, 13, 17, 19, 20, 22, 23, 25, 26, 28, 29, 30]);
const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_XSAVE: u32 = 1 << 26;
const LEAF1_ECX_OSXSAVE: u32 = 1 << 27;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
/// Instructions on vector registers wider than XMM: FMA, AVX, F16C.
const LEAF1_ECX_NEEDS_AVX: u32 = bits([12, 28, 29]);
/// FPU, VME, DE, PSE, TSC, MSR, PAE, CX8, SEP, PGE, CMOV, PAT, PSE36, CLFSH, MMX, FXSR, SSE, SSE2, SS.
/// Not MCE and MCA (no machine check reaches a guest) nor MTRR (nested paging decides; Linux then leaves the caches alone).
const LEAF1_EDX: u32 = bits([0, 1, 2, 3, 4, 5, 6, 8, 11, 13, 15, 16, 17, 19, 23, 24, 25, 26, 27]);
const LEAF1_EDX_APIC: u32 = 1 << 9;
const LEAF1_EDX_HTT: u32 = 1 << 28;

/// ARAT: the APIC timer never stops.
const LEAF6_EAX: u32 = 1 << 2;

/// FSGSBASE, BMI1, AVX2, FDP_EXCPTN_ONLY, SMEP, BMI2, ERMS, INVPCID, no FCS/FDS, AVX512F, AVX512DQ, RDSEED, ADX, SMAP,
/// AVX512IFMA, CLFLUSHOPT, CLWB, AVX512PF, AVX512ER, AVX512CD, SHA, AVX512BW, AVX512VL.
const LEAF7_EBX: u32 =
    bits([0, 3, 5, 6, 7, 8, 9, 10, 13, 16, 17, 18, 19, 20, 21, 23, 24, 26, 27, 28, 29, 30, 31]);
const LEAF7_EBX_TSC_ADJUST: u32 = 1 << 1;
const LEAF7_EBX_AVX2: u32 = 1 << 5;
const LEAF7_EBX_AVX512: u32 = bits([16, 17, 21, 26, 27, 28, 30, 31]);
/// AVX512_VBMI, UMIP, PKU, AVX512_VBMI2, GFNI, VAES, VPCLMULQDQ, AVX512_VNNI, AVX512_BITALG, AVX512_VPOPCNTDQ, RDPID,
/// MOVDIRI, MOVDIR64B.
const LEAF7_ECX: u32 = bits([1, 2, 3, 6, 8, 9, 10, 11, 12, 14, 22, 27, 28]);
const LEAF7_ECX_PKU: u32 = 1 << 3;
const LEAF7_ECX_OSPKE: u32 = 1 << 4;
/// VAES, VPCLMULQDQ.
const LEAF7_ECX_NEEDS_AVX: u32 = bits([9, 10]);
const LEAF7_ECX_AVX512: u32 = bits([1, 6, 11, 12, 14]);
/// AVX512_4VNNIW, AVX512_4FMAPS, FSRM, AVX512_VP2INTERSECT, MD_CLEAR, SERIALIZE, AVX512_FP16.
const LEAF7_EDX: u32 = bits([2, 3, 4, 8, 10, 14, 23]);
const LEAF7_EDX_AVX512: u32 = bits([2, 3, 8, 23]);
/// AVX_VNNI, AVX512_BF16, CMPCCXADD, FZRM, FSRS, FSRC, AVX_IFMA.
const LEAF7_1_EAX: u32 = bits([4, 5, 7, 10, 11, 12, 23]);
const LEAF7_1_EAX_NEEDS_AVX: u32 = bits([4, 23]);
const LEAF7_1_EAX_AVX512: u32 = 1 << 5;
/// AVX_VNNI_INT8, AVX_NE_CONVERT, PREFETCHI.
const LEAF7_1_EDX: u32 = bits([4, 5, 14]);
const LEAF7_1_EDX_NEEDS_AVX: u32 = bits([4, 5]);

/// LAHF, CR8 by LOCK MOV CR0, ABM, SSE4A, misaligned SSE, 3DNow prefetch, XOP, FMA4, TBM, topology extensions.
const EXTENDED1_ECX: u32 = bits([0, 4, 5, 6, 7, 8, 11, 16, 21, 22]);
const EXTENDED1_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXTENDED1_ECX_NEEDS_AVX: u32 = bits([11, 16]);
const EXTENDED1_ECX_TOPOLOGY: u32 = 1 << 22;
/// SYSCALL, NX, MMX extensions, FXSR, fast FXSR, 1 GiB pages, RDTSCP, long mode, 3DNow and its extensions, and AMD's copy of leaf 1.
const EXTENDED1_EDX: u32 = bits([11, 20, 22, 25, 26, 27, 29, 30, 31]);
/// What AMD repeats of leaf 1: FPU, VME, DE, PSE, TSC, MSR, PAE, CX8, PGE, CMOV, PAT, PSE36, MMX, FXSR.
const EXTENDED1_EDX_COPY: u32 = bits([0, 1, 2, 3, 4, 5, 6, 8, 13, 15, 16, 17, 23, 24]);
const EXTENDED1_EDX_FAST_FXSR: u32 = 1 << 25;

/// The TSC runs at a constant rate in every state.
const EXTENDED7_EDX: u32 = 1 << 8;
/// CLZERO, XSAVE saves error pointers always, no SSB, no BTC.
const EXTENDED8_EBX: u32 = bits([0, 2, 26, 29]);
/// No nested data breakpoints, LFENCE serializes, null selector clears the base, fast short REP STOSB and REP CMPSB.
const EXTENDED21_EAX: u32 = bits([0, 2, 6, 10, 11]);

/// Physical address bits that four levels of nested paging translate.
const PHYSICAL_BITS: u32 = 48;
/// Linear address bits of four-level paging; LA57 is hidden.
const LINEAR_BITS: u32 = 48;

/// KVM_FEATURE_NOP_IO_DELAY, CLOCKSOURCE2, PV_EOI, MSI_EXT_DEST_ID, CLOCKSOURCE_STABLE_BIT.
const KVM_FEATURES: u32 = bits([1, 3, 6, 15, 24]);

/// The physical processor's CPUID leaves, read once: CPUID exits to the hypervisor below.
#[derive(Clone, Debug)]
pub struct HostCpuid {
    basic: [Registers; BASIC_LEAVES],
    caches: [Registers; CACHE_LEAVES],
    features: [Registers; FEATURE_SUBLEAVES],
    xstate: [Registers; XSTATE_SUBLEAVES],
    extended: [Registers; EXTENDED_LEAVES],
    extended_caches: [Registers; CACHE_LEAVES],
}

impl HostCpuid {
    /// Reads every leaf that matters; `cpuid` gets leaf and subleaf and returns EAX, EBX, ECX, EDX.
    pub fn read(mut cpuid: impl FnMut(u32, u32) -> Registers) -> Self {
        let basic_max = cpuid(0, 0)[EAX];
        let extended_max = cpuid(0x8000_0000, 0)[EAX];
        let mut get = |leaf: u32, subleaf: u32| {
            let max = if leaf < 0x8000_0000 { basic_max } else { extended_max };
            if leaf <= max { cpuid(leaf, subleaf) } else { [0; 4] }
        };
        let features = get(7, 0);
        let has_features_1 = features[EAX] >= 1;
        Self {
            basic: core::array::from_fn(|leaf| get(leaf as u32, 0)),
            caches: core::array::from_fn(|index| get(4, index as u32)),
            features: [features, if has_features_1 { get(7, 1) } else { [0; 4] }],
            xstate: core::array::from_fn(|index| get(0xD, index as u32)),
            extended: core::array::from_fn(|leaf| get(0x8000_0000 + leaf as u32, 0)),
            extended_caches: core::array::from_fn(|index| get(0x8000_001D, index as u32)),
        }
    }

    /// A leaf as the physical processor has it; zeros for one that is not kept.
    pub fn leaf(&self, leaf: u32, subleaf: u32) -> Registers {
        let found = match leaf {
            4 => self.caches.get(subleaf as usize),
            7 => self.features.get(subleaf as usize),
            0xD => self.xstate.get(subleaf as usize),
            0x8000_001D => self.extended_caches.get(subleaf as usize),
            0x8000_0000.. => self.extended.get((leaf - 0x8000_0000) as usize),
            _ => self.basic.get(leaf as usize),
        };
        found.copied().unwrap_or([0; 4])
    }

    /// True for AMD's and Hygon's processors.
    pub fn is_amd(&self) -> bool {
        let [_, b, c, d] = self.leaf(0, 0);
        let vendor = [b, d, c].map(u32::to_le_bytes);
        matches!(vendor.as_flattened(), b"AuthenticAMD" | b"HygonGenuine")
    }

    pub(super) fn has_xsave(&self) -> bool {
        self.leaf(1, 0)[ECX] & LEAF1_ECX_XSAVE != 0
    }

    /// True when EFER.FFXSR exists.
    pub(super) fn has_fast_fxsr(&self) -> bool {
        self.leaf(0x8000_0001, 0)[EDX] & EXTENDED1_EDX_FAST_FXSR != 0
    }
}

/// The leaves of one vCPU, but for the bits that follow its control registers.
#[derive(Clone, Debug)]
pub(super) struct GuestCpuid {
    id: u32,
    vcpu_count: u32,
    basic: [Registers; BASIC_LEAVES],
    caches: [Registers; CACHE_LEAVES],
    features: [Registers; FEATURE_SUBLEAVES],
    extended: [Registers; EXTENDED_LEAVES],
    extended_caches: [Registers; CACHE_LEAVES],
    extended_max: u32,
    tsc_khz: u32,
}

impl GuestCpuid {
    pub(super) fn new(config: &VcpuConfig, host: &HostCpuid, xstate: &ExtendedState) -> Self {
        let count = config.vcpu_count.clamp(1, VCPU_COUNT_MAX);
        let topology = host.leaf(0x8000_0001, 0)[ECX] & EXTENDED1_ECX_TOPOLOGY != 0;
        let mut guest = Self {
            id: config.id,
            vcpu_count: count,
            basic: [[0; 4]; BASIC_LEAVES],
            caches: host.caches.map(|leaf| cache_leaf(leaf, count)),
            features: features(host, xstate),
            extended: [[0; 4]; EXTENDED_LEAVES],
            extended_caches: [[0; 4]; CACHE_LEAVES],
            extended_max: match host.leaf(0x8000_0000, 0)[EAX] {
                EXTENDED_MAX.. => EXTENDED_MAX,
                0x8000_001E.. if topology => 0x8000_001E,
                max => max.clamp(0x8000_0001, 0x8000_0008),
            },
            tsc_khz: config.tsc_khz,
        };
        if topology {
            guest.extended_caches = host.extended_caches.map(|leaf| amd_cache_leaf(leaf, count));
        }
        guest.fill_basic(host, xstate);
        guest.fill_extended(host, xstate);
        guest
    }

    fn fill_basic(&mut self, host: &HostCpuid, xstate: &ExtendedState) {
        let [_, b, c, d] = host.leaf(0, 0);
        self.basic[0] = [BASIC_MAX, b, c, d];

        let [eax, ebx, ecx, edx] = host.leaf(1, 0);
        let mut ecx = ecx & LEAF1_ECX | LEAF1_ECX_X2APIC | LEAF1_ECX_TSC_DEADLINE | LEAF1_ECX_HYPERVISOR;
        if !xstate.is_supported() {
            ecx &= !LEAF1_ECX_XSAVE;
        }
        if !xstate.has_avx() {
            ecx &= !LEAF1_ECX_NEEDS_AVX;
        }
        let mut edx = edx & LEAF1_EDX;
        if self.vcpu_count > 1 {
            edx |= LEAF1_EDX_HTT;
        }
        let ebx = ebx & 0xFF00 | self.vcpu_count.min(255) << 16 | (self.id & 0xFF) << 24;
        self.basic[1] = [eax, ebx, ecx, edx];

        self.basic[2] = host.leaf(2, 0);
        self.basic[6] = [LEAF6_EAX, 0, 0, 0];
    }

    fn fill_extended(&mut self, host: &HostCpuid, xstate: &ExtendedState) {
        let [_, b, c, d] = host.leaf(0x8000_0000, 0);
        self.extended[0] = [self.extended_max, b, c, d];

        let [eax, ebx, ecx, edx] = host.leaf(0x8000_0001, 0);
        let mut ecx = ecx & EXTENDED1_ECX;
        if self.vcpu_count > 1 && host.is_amd() {
            ecx |= EXTENDED1_ECX_CMP_LEGACY;
        }
        if !xstate.has_avx() {
            ecx &= !EXTENDED1_ECX_NEEDS_AVX;
        }
        if self.extended_max < 0x8000_001E {
            ecx &= !EXTENDED1_ECX_TOPOLOGY;
        }
        let copy = if host.is_amd() { EXTENDED1_EDX_COPY } else { 0 };
        self.extended[1] = [eax, ebx, ecx, edx & (EXTENDED1_EDX | copy)];

        // Brand string and cache sizes.
        for leaf in 2..=6 {
            self.extended[leaf] = host.leaf(0x8000_0000 + leaf as u32, 0);
        }
        self.extended[7] = [0, 0, 0, EXTENDED7_EDX];

        let [eax, ebx, _, _] = host.leaf(0x8000_0008, 0);
        let physical = (eax & 0xFF).clamp(36, PHYSICAL_BITS);
        let linear = LINEAR_BITS;
        let id_bits = self.core_bits();
        let ecx = if host.is_amd() { (self.vcpu_count - 1).min(255) | id_bits << 12 } else { 0 };
        self.extended[8] = [physical | linear << 8, ebx & EXTENDED8_EBX, ecx, 0];

        // TLB and cache facts that carry no feature.
        self.extended[0x19] = host.leaf(0x8000_0019, 0);
        self.extended[0x1A] = host.leaf(0x8000_001A, 0);
        if ecx_has_topology(self.extended[1][ECX]) {
            self.extended[0x1E] = [self.id, self.id & 0xFF, 0, 0];
        }
        self.extended[0x21] = [host.leaf(0x8000_0021, 0)[EAX] & EXTENDED21_EAX, 0, 0, 0];
    }

    /// Family, model and stepping, as RDX has them after a reset.
    pub(super) const fn signature(&self) -> u32 {
        self.basic[1][EAX]
    }

    /// How many bits of an APIC id tell the cores apart.
    const fn core_bits(&self) -> u32 {
        u32::BITS - (self.vcpu_count - 1).leading_zeros()
    }

    pub(super) fn get(
        &self,
        leaf: u32,
        subleaf: u32,
        context: &dyn ControlRegisters,
        xstate: &ExtendedState,
        apic_enabled: bool,
    ) -> Registers {
        match leaf {
            1 => {
                let mut registers = self.basic[1];
                if context.cr4() & CR4_OSXSAVE != 0 && registers[ECX] & LEAF1_ECX_XSAVE != 0 {
                    registers[ECX] |= LEAF1_ECX_OSXSAVE;
                }
                if apic_enabled {
                    registers[EDX] |= LEAF1_EDX_APIC;
                }
                registers
            }
            4 => self.caches.get(subleaf as usize).copied().unwrap_or([0; 4]),
            7 => {
                let mut registers = self.features.get(subleaf as usize).copied().unwrap_or([0; 4]);
                if subleaf == 0 && context.cr4() & CR4_PKE != 0 && registers[ECX] & LEAF7_ECX_PKU != 0 {
                    registers[ECX] |= LEAF7_ECX_OSPKE;
                }
                registers
            }
            0xB => self.topology(subleaf),
            0xD => xstate.cpuid(subleaf),
            0..=BASIC_MAX => self.basic.get(leaf as usize).copied().unwrap_or([0; 4]),
            // "KVMKVMKVM\0\0\0".
            0x4000_0000 => [HYPERVISOR_MAX, 0x4B4D_564B, 0x564B_4D56, 0x4D],
            0x4000_0001 => [KVM_FEATURES, 0, 0, 0],
            HYPERVISOR_MAX => [self.tsc_khz, APIC_TIMER_KHZ, 0, 0],
            0x8000_0001 => {
                let mut registers = self.extended[1];
                if apic_enabled && registers[EDX] & 1 != 0 {
                    registers[EDX] |= LEAF1_EDX_APIC;
                }
                registers
            }
            0x8000_001D if leaf <= self.extended_max => {
                self.extended_caches.get(subleaf as usize).copied().unwrap_or([0; 4])
            }
            0x8000_0000.. if leaf <= self.extended_max => {
                self.extended.get((leaf - 0x8000_0000) as usize).copied().unwrap_or([0; 4])
            }
            _ => [0; 4],
        }
    }

    /// Extended topology: one thread a core, all cores in one package.
    fn topology(&self, subleaf: u32) -> Registers {
        match subleaf {
            0 => [0, 1, 1 << 8, self.id],
            1 => [self.core_bits(), self.vcpu_count, 2 << 8 | 1, self.id],
            _ => [0, 0, subleaf & 0xFF, self.id],
        }
    }
}

const fn ecx_has_topology(ecx: u32) -> bool {
    ecx & EXTENDED1_ECX_TOPOLOGY != 0
}

/// Leaf 7 and its subleaf.
fn features(host: &HostCpuid, xstate: &ExtendedState) -> [Registers; FEATURE_SUBLEAVES] {
    let [_, ebx, ecx, edx] = host.leaf(7, 0);
    let mut main = [0, ebx & LEAF7_EBX | LEAF7_EBX_TSC_ADJUST, ecx & LEAF7_ECX, edx & LEAF7_EDX];
    let [eax, _, _, edx] = host.leaf(7, 1);
    let mut more = [eax & LEAF7_1_EAX, 0, 0, edx & LEAF7_1_EDX];
    if !xstate.has_avx() {
        main[EBX] &= !LEAF7_EBX_AVX2;
        main[ECX] &= !LEAF7_ECX_NEEDS_AVX;
        more[EAX] &= !LEAF7_1_EAX_NEEDS_AVX;
        more[EDX] &= !LEAF7_1_EDX_NEEDS_AVX;
    }
    if !xstate.has_avx512() {
        main[EBX] &= !LEAF7_EBX_AVX512;
        main[ECX] &= !LEAF7_ECX_AVX512;
        main[EDX] &= !LEAF7_EDX_AVX512;
        more[EAX] &= !LEAF7_1_EAX_AVX512;
    }
    if !xstate.has_pkru() {
        main[ECX] &= !LEAF7_ECX_PKU;
    }
    main[EAX] = u32::from(more != [0; 4]);
    [main, more]
}

/// Deterministic cache parameters (leaf 4): a cache that the physical cores share is shared by the guest's cores.
fn cache_leaf(leaf: Registers, vcpu_count: u32) -> Registers {
    if leaf[EAX] & 0x1F == 0 {
        return [0; 4];
    }
    let sharing = cache_sharing(leaf[EAX], vcpu_count);
    let cores = (vcpu_count.next_power_of_two() - 1).min(0x3F);
    [leaf[EAX] & 0x3FFF | sharing << 14 | cores << 26, leaf[EBX], leaf[ECX], leaf[EDX]]
}

/// The same of AMD (leaf 0x8000001D), which has no core count here.
fn amd_cache_leaf(leaf: Registers, vcpu_count: u32) -> Registers {
    if leaf[EAX] & 0x1F == 0 {
        return [0; 4];
    }
    [leaf[EAX] & 0x3FFF | cache_sharing(leaf[EAX], vcpu_count) << 14, leaf[EBX], leaf[ECX], leaf[EDX]]
}

/// Logical processors that share a cache, less one: all for a cache of the third level, else one.
fn cache_sharing(eax: u32, vcpu_count: u32) -> u32 {
    if eax >> 5 & 7 >= 3 { (vcpu_count.next_power_of_two() - 1).min(0xFFF) } else { 0 }
}
