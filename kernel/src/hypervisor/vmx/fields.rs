//! The fields of a virtual-machine control structure, by their encodings.
//!
//! Intel SDM vol. 3, appendix B (encodings), 25.4.1-25.4.2 (guest state that has a layout of its own).

macro_rules! fields {
    ($($(#[$comment:meta])* $name:ident = $encoding:literal,)*) => {
        /// A field of a VMCS. 64-bit fields are always accessed in full, never by their upper half.
        #[allow(missing_docs, reason = "the manual's names")]
        #[allow(dead_code, reason = "a list as the manual has it, of which no processor has all")]
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u32)]
        pub enum Field {
            $($(#[$comment])* $name = $encoding,)*
        }

        impl Field {
            /// Every field, in the order of the encodings within each width.
            #[allow(dead_code, reason = "for dumps and tests")]
            pub const ALL: &[Self] = &[$(Self::$name,)*];
        }
    };
}

fields! {
    // B.1: 16 bits. Controls, guest state, host state.
    Vpid = 0x0000,
    PostedInterruptNotificationVector = 0x0002,
    EptpIndex = 0x0004,
    HlatPrefixSize = 0x0006,
    LastPidPointerIndex = 0x0008,
    GuestEsSelector = 0x0800,
    GuestCsSelector = 0x0802,
    GuestSsSelector = 0x0804,
    GuestDsSelector = 0x0806,
    GuestFsSelector = 0x0808,
    GuestGsSelector = 0x080A,
    GuestLdtrSelector = 0x080C,
    GuestTrSelector = 0x080E,
    GuestInterruptStatus = 0x0810,
    PmlIndex = 0x0812,
    GuestUinv = 0x0814,
    HostEsSelector = 0x0C00,
    HostCsSelector = 0x0C02,
    HostSsSelector = 0x0C04,
    HostDsSelector = 0x0C06,
    HostFsSelector = 0x0C08,
    HostGsSelector = 0x0C0A,
    HostTrSelector = 0x0C0C,

    // B.2: 64 bits. Controls, read-only data, guest state, host state.
    IoBitmapA = 0x2000,
    IoBitmapB = 0x2002,
    MsrBitmap = 0x2004,
    ExitMsrStoreAddress = 0x2006,
    ExitMsrLoadAddress = 0x2008,
    EntryMsrLoadAddress = 0x200A,
    ExecutiveVmcsPointer = 0x200C,
    PmlAddress = 0x200E,
    TscOffset = 0x2010,
    VirtualApicPage = 0x2012,
    ApicAccessPage = 0x2014,
    PostedInterruptDescriptor = 0x2016,
    VmFunctionControls = 0x2018,
    EptPointer = 0x201A,
    EoiExitBitmap0 = 0x201C,
    EoiExitBitmap1 = 0x201E,
    EoiExitBitmap2 = 0x2020,
    EoiExitBitmap3 = 0x2022,
    EptpListAddress = 0x2024,
    VmreadBitmap = 0x2026,
    VmwriteBitmap = 0x2028,
    VirtualizationExceptionInformation = 0x202A,
    XssExitingBitmap = 0x202C,
    EnclsExitingBitmap = 0x202E,
    SubPagePermissionTablePointer = 0x2030,
    TscMultiplier = 0x2032,
    TertiaryControls = 0x2034,
    EnclvExitingBitmap = 0x2036,
    PconfigExitingBitmap = 0x203E,
    HlatPointer = 0x2040,
    PidPointerTable = 0x2042,
    SecondaryExitControls = 0x2044,
    Ia32SpecCtrlMask = 0x204A,
    Ia32SpecCtrlShadow = 0x204C,
    GuestPhysicalAddress = 0x2400,
    VmcsLinkPointer = 0x2800,
    GuestIa32Debugctl = 0x2802,
    GuestIa32Pat = 0x2804,
    GuestIa32Efer = 0x2806,
    GuestIa32PerfGlobalCtrl = 0x2808,
    GuestPdpte0 = 0x280A,
    GuestPdpte1 = 0x280C,
    GuestPdpte2 = 0x280E,
    GuestPdpte3 = 0x2810,
    GuestIa32Bndcfgs = 0x2812,
    GuestIa32RtitCtl = 0x2814,
    GuestIa32LbrCtl = 0x2816,
    GuestIa32Pkrs = 0x2818,
    HostIa32Pat = 0x2C00,
    HostIa32Efer = 0x2C02,
    HostIa32PerfGlobalCtrl = 0x2C04,
    HostIa32Pkrs = 0x2C06,

    // B.3: 32 bits. Controls, read-only data, guest state, host state.
    PinControls = 0x4000,
    PrimaryControls = 0x4002,
    ExceptionBitmap = 0x4004,
    PageFaultErrorCodeMask = 0x4006,
    PageFaultErrorCodeMatch = 0x4008,
    Cr3TargetCount = 0x400A,
    ExitControls = 0x400C,
    ExitMsrStoreCount = 0x400E,
    ExitMsrLoadCount = 0x4010,
    EntryControls = 0x4012,
    EntryMsrLoadCount = 0x4014,
    EntryInterruptionInfo = 0x4016,
    EntryExceptionErrorCode = 0x4018,
    EntryInstructionLength = 0x401A,
    TprThreshold = 0x401C,
    SecondaryControls = 0x401E,
    PleGap = 0x4020,
    PleWindow = 0x4022,
    InstructionTimeout = 0x4024,
    VmInstructionError = 0x4400,
    ExitReason = 0x4402,
    ExitInterruptionInfo = 0x4404,
    ExitInterruptionErrorCode = 0x4406,
    IdtVectoringInfo = 0x4408,
    IdtVectoringErrorCode = 0x440A,
    ExitInstructionLength = 0x440C,
    ExitInstructionInfo = 0x440E,
    GuestEsLimit = 0x4800,
    GuestCsLimit = 0x4802,
    GuestSsLimit = 0x4804,
    GuestDsLimit = 0x4806,
    GuestFsLimit = 0x4808,
    GuestGsLimit = 0x480A,
    GuestLdtrLimit = 0x480C,
    GuestTrLimit = 0x480E,
    GuestGdtrLimit = 0x4810,
    GuestIdtrLimit = 0x4812,
    GuestEsAccessRights = 0x4814,
    GuestCsAccessRights = 0x4816,
    GuestSsAccessRights = 0x4818,
    GuestDsAccessRights = 0x481A,
    GuestFsAccessRights = 0x481C,
    GuestGsAccessRights = 0x481E,
    GuestLdtrAccessRights = 0x4820,
    GuestTrAccessRights = 0x4822,
    GuestInterruptibility = 0x4824,
    GuestActivityState = 0x4826,
    GuestSmbase = 0x4828,
    GuestSysenterCs = 0x482A,
    GuestPreemptionTimer = 0x482E,
    HostSysenterCs = 0x4C00,

    // B.4: natural width. Controls, read-only data, guest state, host state.
    Cr0Mask = 0x6000,
    Cr4Mask = 0x6002,
    Cr0ReadShadow = 0x6004,
    Cr4ReadShadow = 0x6006,
    Cr3Target0 = 0x6008,
    Cr3Target1 = 0x600A,
    Cr3Target2 = 0x600C,
    Cr3Target3 = 0x600E,
    ExitQualification = 0x6400,
    IoRcx = 0x6402,
    IoRsi = 0x6404,
    IoRdi = 0x6406,
    IoRip = 0x6408,
    GuestLinearAddress = 0x640A,
    GuestCr0 = 0x6800,
    GuestCr3 = 0x6802,
    GuestCr4 = 0x6804,
    GuestEsBase = 0x6806,
    GuestCsBase = 0x6808,
    GuestSsBase = 0x680A,
    GuestDsBase = 0x680C,
    GuestFsBase = 0x680E,
    GuestGsBase = 0x6810,
    GuestLdtrBase = 0x6812,
    GuestTrBase = 0x6814,
    GuestGdtrBase = 0x6816,
    GuestIdtrBase = 0x6818,
    GuestDr7 = 0x681A,
    GuestRsp = 0x681C,
    GuestRip = 0x681E,
    GuestRflags = 0x6820,
    GuestPendingDebugExceptions = 0x6822,
    GuestSysenterEsp = 0x6824,
    GuestSysenterEip = 0x6826,
    GuestIa32SCet = 0x6828,
    GuestSsp = 0x682A,
    GuestInterruptSspTable = 0x682C,
    HostCr0 = 0x6C00,
    HostCr3 = 0x6C02,
    HostCr4 = 0x6C04,
    HostFsBase = 0x6C06,
    HostGsBase = 0x6C08,
    HostTrBase = 0x6C0A,
    HostGdtrBase = 0x6C0C,
    HostIdtrBase = 0x6C0E,
    HostSysenterEsp = 0x6C10,
    HostSysenterEip = 0x6C12,
    HostRsp = 0x6C14,
    HostRip = 0x6C16,
    HostIa32SCet = 0x6C18,
    HostSsp = 0x6C1A,
    HostInterruptSspTable = 0x6C1C,
}

impl Field {
    /// What VMREAD and VMWRITE take.
    pub const fn encoding(self) -> u32 {
        self as u32
    }
}

/// [`Field::GuestInterruptibility`].
pub mod interruptibility {
    /// The instruction before was STI: interrupts wait for one more.
    pub const BLOCKING_BY_STI: u32 = 1 << 0;
    /// The instruction before was MOV SS or POP SS: interrupts, NMIs and debug traps wait for one more.
    pub const BLOCKING_BY_MOV_SS: u32 = 1 << 1;
    /// System-management interrupts are blocked.
    pub const BLOCKING_BY_SMI: u32 = 1 << 2;
    /// NMIs are blocked until IRET.
    pub const BLOCKING_BY_NMI: u32 = 1 << 3;
    /// The exit came from an enclave.
    pub const ENCLAVE: u32 = 1 << 4;
}

/// [`Field::GuestActivityState`].
#[allow(dead_code, reason = "the format, whole")]
pub mod activity {
    /// Executes instructions.
    pub const ACTIVE: u32 = 0;
    /// Waits in HLT.
    pub const HLT: u32 = 1;
    /// Stopped after a triple fault.
    pub const SHUTDOWN: u32 = 2;
    /// Waits for a startup IPI.
    pub const WAIT_FOR_SIPI: u32 = 3;
}

/// Access rights of a segment: the descriptor's bits 8-15 and 20-23 as 0-7 and 12-15, and this one.
pub const SEGMENT_UNUSABLE: u32 = 1 << 16;
