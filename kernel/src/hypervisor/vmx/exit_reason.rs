//! Why a guest stopped running, as the processor says it.
//!
//! Intel SDM vol. 3, appendix C (basic exit reasons), 25.9 (exit information), 28.2.1 (qualifications), 31.4 (instruction errors).

/// In the exit reason: the entry failed, no guest instruction was executed.
pub const ENTRY_FAILURE: u32 = 1 << 31;
/// In the exit reason: the part that is one of [`reason`].
pub const BASIC: u32 = 0xFFFF;

macro_rules! reasons {
    ($($constant:ident = $number:literal $name:literal,)*) => {
        /// Basic exit reasons.
        #[allow(missing_docs, reason = "the manual's names")]
        #[allow(dead_code, reason = "a list as the manual has it")]
        pub mod reason {
            $(pub const $constant: u32 = $number;)*
        }

        /// The manual's name of an exit reason, for dumps; the flags in its upper half are not looked at.
        pub const fn name(exit_reason: u32) -> &'static str {
            match exit_reason & BASIC {
                $($number => $name,)*
                _ => "unknown",
            }
        }
    };
}

reasons! {
    EXCEPTION_OR_NMI = 0 "exception or NMI",
    EXTERNAL_INTERRUPT = 1 "external interrupt",
    TRIPLE_FAULT = 2 "triple fault",
    INIT = 3 "INIT signal",
    STARTUP_IPI = 4 "startup IPI",
    IO_SMI = 5 "I/O system-management interrupt",
    OTHER_SMI = 6 "other system-management interrupt",
    INTERRUPT_WINDOW = 7 "interrupt window",
    NMI_WINDOW = 8 "NMI window",
    TASK_SWITCH = 9 "task switch",
    CPUID = 10 "CPUID",
    GETSEC = 11 "GETSEC",
    HLT = 12 "HLT",
    INVD = 13 "INVD",
    INVLPG = 14 "INVLPG",
    RDPMC = 15 "RDPMC",
    RDTSC = 16 "RDTSC",
    RSM = 17 "RSM",
    VMCALL = 18 "VMCALL",
    VMCLEAR = 19 "VMCLEAR",
    VMLAUNCH = 20 "VMLAUNCH",
    VMPTRLD = 21 "VMPTRLD",
    VMPTRST = 22 "VMPTRST",
    VMREAD = 23 "VMREAD",
    VMRESUME = 24 "VMRESUME",
    VMWRITE = 25 "VMWRITE",
    VMXOFF = 26 "VMXOFF",
    VMXON = 27 "VMXON",
    CR_ACCESS = 28 "control-register access",
    MOV_DR = 29 "MOV DR",
    IO_INSTRUCTION = 30 "I/O instruction",
    RDMSR = 31 "RDMSR",
    WRMSR = 32 "WRMSR",
    INVALID_GUEST_STATE = 33 "entry failure due to invalid guest state",
    MSR_LOADING = 34 "entry failure due to MSR loading",
    MWAIT = 36 "MWAIT",
    MONITOR_TRAP_FLAG = 37 "monitor trap flag",
    MONITOR = 39 "MONITOR",
    PAUSE = 40 "PAUSE",
    MACHINE_CHECK_ON_ENTRY = 41 "entry failure due to a machine check",
    TPR_BELOW_THRESHOLD = 43 "TPR below threshold",
    APIC_ACCESS = 44 "APIC access",
    VIRTUALIZED_EOI = 45 "virtualized EOI",
    GDTR_IDTR_ACCESS = 46 "access to GDTR or IDTR",
    LDTR_TR_ACCESS = 47 "access to LDTR or TR",
    EPT_VIOLATION = 48 "EPT violation",
    EPT_MISCONFIGURATION = 49 "EPT misconfiguration",
    INVEPT = 50 "INVEPT",
    RDTSCP = 51 "RDTSCP",
    PREEMPTION_TIMER = 52 "VMX-preemption timer expired",
    INVVPID = 53 "INVVPID",
    WBINVD = 54 "WBINVD or WBNOINVD",
    XSETBV = 55 "XSETBV",
    APIC_WRITE = 56 "APIC write",
    RDRAND = 57 "RDRAND",
    INVPCID = 58 "INVPCID",
    VMFUNC = 59 "VMFUNC",
    ENCLS = 60 "ENCLS",
    RDSEED = 61 "RDSEED",
    PAGE_MODIFICATION_LOG_FULL = 62 "page-modification log full",
    XSAVES = 63 "XSAVES",
    XRSTORS = 64 "XRSTORS",
    PCONFIG = 65 "PCONFIG",
    SUB_PAGE_EVENT = 66 "sub-page-permission-related event",
    UMWAIT = 67 "UMWAIT",
    TPAUSE = 68 "TPAUSE",
    LOADIWKEY = 69 "LOADIWKEY",
    ENCLV = 70 "ENCLV",
    ENQCMD_PASID = 72 "ENQCMD PASID translation failure",
    ENQCMDS_PASID = 73 "ENQCMDS PASID translation failure",
    BUS_LOCK = 74 "bus lock",
    INSTRUCTION_TIMEOUT = 75 "instruction timeout",
    SEAMCALL = 76 "SEAMCALL",
    TDCALL = 77 "TDCALL",
    RDMSRLIST = 78 "RDMSRLIST",
    WRMSRLIST = 79 "WRMSRLIST",
}

/// Interruption information: of the entry, of an exit, and of an event whose delivery an exit cut short.
#[allow(dead_code, reason = "the format, whole")]
pub mod interruption {
    /// The vector.
    pub const VECTOR: u32 = 0xFF;
    /// The type, one of those below.
    pub const TYPE: u32 = 0b111 << 8;
    /// Type: external interrupt.
    pub const EXTERNAL_INTERRUPT: u32 = 0 << 8;
    /// Type: NMI.
    pub const NMI: u32 = 2 << 8;
    /// Type: exception that the processor raised.
    pub const HARDWARE_EXCEPTION: u32 = 3 << 8;
    /// Type: INT n.
    pub const SOFTWARE_INTERRUPT: u32 = 4 << 8;
    /// Type: INT1.
    pub const PRIVILEGED_SOFTWARE_EXCEPTION: u32 = 5 << 8;
    /// Type: INT3 or INTO.
    pub const SOFTWARE_EXCEPTION: u32 = 6 << 8;
    /// Type: other event, in the entry's field only.
    pub const OTHER_EVENT: u32 = 7 << 8;
    /// An error code is delivered (entry: is to be delivered).
    pub const HAS_ERROR_CODE: u32 = 1 << 11;
    /// In an exit's field: IRET had ended the blocking of NMIs before it faulted.
    pub const NMI_UNBLOCKED: u32 = 1 << 12;
    /// There is an event.
    pub const VALID: u32 = 1 << 31;

    /// Whether the event comes from an instruction, so that the entry needs its length.
    pub const fn is_software(info: u32) -> bool {
        matches!(info & TYPE, SOFTWARE_INTERRUPT | PRIVILEGED_SOFTWARE_EXCEPTION | SOFTWARE_EXCEPTION)
    }
}

/// Qualification of an EPT violation.
#[allow(dead_code, reason = "the format, whole")]
pub mod ept_violation {
    /// A data read.
    pub const READ: u64 = 1 << 0;
    /// A data write.
    pub const WRITE: u64 = 1 << 1;
    /// An instruction fetch.
    pub const FETCH: u64 = 1 << 2;
    /// The guest linear address is valid.
    pub const LINEAR_ADDRESS_VALID: u64 = 1 << 7;
    /// With a valid linear address: the access was to what it translates to, not to a paging structure.
    pub const FINAL_TRANSLATION: u64 = 1 << 8;
    /// IRET had ended the blocking of NMIs before it faulted.
    pub const NMI_UNBLOCKED: u64 = 1 << 12;
}

/// What an I/O instruction does, from the exit's qualification.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PioAccess {
    /// The port.
    pub port: u16,
    /// 1, 2 or 4 bytes.
    pub width: u8,
    /// IN or INS rather than OUT or OUTS.
    pub input: bool,
    /// INS or OUTS, with or without REP.
    pub string: bool,
}

impl PioAccess {
    /// Decodes the qualification.
    pub const fn decode(qualification: u64) -> Self {
        Self {
            port: (qualification >> 16) as u16,
            width: match qualification & 0b111 {
                0 => 1,
                1 => 2,
                _ => 4,
            },
            input: qualification & 1 << 3 != 0,
            string: qualification & 1 << 4 != 0,
        }
    }
}

/// What an access to a control register does, from the exit's qualification.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CrAccess {
    /// MOV to CR.
    Write {
        /// The control register, 0-15.
        cr: u8,
        /// The general-purpose register, 0-15, numbered as instructions encode them.
        gpr: u8,
    },
    /// MOV from CR.
    Read {
        /// The control register, 0-15.
        cr: u8,
        /// The general-purpose register, 0-15, numbered as instructions encode them.
        gpr: u8,
    },
    /// CLTS.
    Clts,
    /// LMSW.
    Lmsw {
        /// Its operand, wherever it came from.
        value: u16,
    },
}

impl CrAccess {
    /// Decodes the qualification.
    pub const fn decode(qualification: u64) -> Self {
        let cr = (qualification & 0xF) as u8;
        let gpr = (qualification >> 8 & 0xF) as u8;
        match qualification >> 4 & 0b11 {
            0 => Self::Write { cr, gpr },
            1 => Self::Read { cr, gpr },
            2 => Self::Clts,
            _ => Self::Lmsw { value: (qualification >> 16) as u16 },
        }
    }
}

/// What [`super::fields::Field::VmInstructionError`] means.
pub const fn instruction_error(number: u32) -> &'static str {
    match number {
        1 => "VMCALL executed in VMX root operation",
        2 => "VMCLEAR with invalid physical address",
        3 => "VMCLEAR with VMXON pointer",
        4 => "VMLAUNCH with non-clear VMCS",
        5 => "VMRESUME with non-launched VMCS",
        6 => "VMRESUME after VMXOFF",
        7 => "VM entry with invalid control field(s)",
        8 => "VM entry with invalid host-state field(s)",
        9 => "VMPTRLD with invalid physical address",
        10 => "VMPTRLD with VMXON pointer",
        11 => "VMPTRLD with incorrect VMCS revision identifier",
        12 => "VMREAD or VMWRITE from or to unsupported VMCS component",
        13 => "VMWRITE to read-only VMCS component",
        15 => "VMXON executed in VMX root operation",
        16 => "VM entry with invalid executive-VMCS pointer",
        17 => "VM entry with non-launched executive VMCS",
        18 => "VM entry with executive-VMCS pointer not VMXON pointer",
        19 => "VMCALL with non-clear VMCS",
        20 => "VMCALL with invalid VM-exit control fields",
        22 => "VMCALL with incorrect MSEG revision identifier",
        23 => "VMXOFF under dual-monitor treatment of SMIs and SMM",
        24 => "VMCALL with invalid SMM-monitor features",
        25 => "VM entry with invalid VM-execution control fields in executive VMCS",
        26 => "VM entry with events blocked by MOV SS",
        28 => "invalid operand to INVEPT or INVVPID",
        _ => "unknown",
    }
}
