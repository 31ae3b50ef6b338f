//! A vCPU's architectural register state, in no vendor's format.
//!
//! AMD APM vol. 2, 4.7-4.8 (segment attributes) and 15.5.1 (their packed form, which this file uses for both vendors).

use crate::address::Vector;

/// Index of a general-purpose register in [`Registers::gpr`], numbered as instructions encode them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
#[expect(missing_docs, reason = "the registers' names say it all")]
pub enum Gpr {
    Rax = 0,
    Rcx = 1,
    Rdx = 2,
    Rbx = 3,
    Rsp = 4,
    Rbp = 5,
    Rsi = 6,
    Rdi = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
    R12 = 12,
    R13 = 13,
    R14 = 14,
    R15 = 15,
}

impl Gpr {
    /// The register with this number; only the low four bits count.
    pub const fn from_number(number: u8) -> Self {
        match number & 0xF {
            0 => Self::Rax,
            1 => Self::Rcx,
            2 => Self::Rdx,
            3 => Self::Rbx,
            4 => Self::Rsp,
            5 => Self::Rbp,
            6 => Self::Rsi,
            7 => Self::Rdi,
            8 => Self::R8,
            9 => Self::R9,
            10 => Self::R10,
            11 => Self::R11,
            12 => Self::R12,
            13 => Self::R13,
            14 => Self::R14,
            _ => Self::R15,
        }
    }
}

/// General-purpose registers, instruction pointer and flags.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C)]
pub struct Registers {
    /// General-purpose registers in encoding order, see [`Gpr`].
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
}

impl Registers {
    /// One general-purpose register.
    pub const fn get(&self, register: Gpr) -> u64 {
        self.gpr[register as usize]
    }

    /// Sets one general-purpose register.
    pub const fn set(&mut self, register: Gpr, value: u64) {
        self.gpr[register as usize] = value;
    }
}

/// A segment register with its hidden part, laid out as in a VMCB.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Attributes packed as in a VMCB: bits 0-3 type, 4 S, 5-6 DPL, 7 P, 8 AVL, 9 L, 10 D/B, 11 G.
    pub attributes: u16,
    /// Limit in bytes, granularity already applied.
    pub limit: u32,
    /// Base address.
    pub base: u64,
}

impl Segment {
    /// The L bit: a 64-bit code segment.
    pub const fn is_long(&self) -> bool {
        self.attributes & 1 << 9 != 0
    }

    /// The D/B bit: 32-bit default operand size.
    pub const fn is_32_bit(&self) -> bool {
        self.attributes & 1 << 10 != 0
    }
}

/// Base and limit of the GDT or IDT.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct TableRegister {
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// The state beyond the general-purpose registers.
#[derive(Clone, Copy, Default, Debug)]
#[expect(missing_docs, reason = "the registers' names say it all")]
pub struct SystemState {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: TableRegister,
    pub idtr: TableRegister,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    /// EFER as the guest sees it: SVME is never set here.
    pub efer: u64,
    pub dr6: u64,
    pub dr7: u64,
    /// Current privilege level, 0-3.
    pub cpl: u8,
}

/// A segment register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the registers' names say it all")]
pub enum SegmentRegister {
    Es,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
}

/// CR0, CR4, EFER and the privilege level: what CPUID and MSR policy rest on.
///
/// Each register of a vCPU is asked for by itself, and only where something rests on it, because reading one may cost the hypervisor an
/// exit of its own.
pub trait ControlRegisters {
    /// CR0.
    fn cr0(&self) -> u64;
    /// CR4.
    fn cr4(&self) -> u64;
    /// EFER as the guest sees it.
    fn efer(&self) -> u64;
    /// Current privilege level, 0-3.
    fn cpl(&self) -> u8;
}

/// The registers that instruction emulation reads and changes.
pub trait CpuState: ControlRegisters {
    /// A general-purpose register.
    fn gpr(&self, register: Gpr) -> u64;
    /// Sets a general-purpose register.
    fn set_gpr(&mut self, register: Gpr, value: u64);
    /// The instruction pointer.
    fn rip(&self) -> u64;
    /// Sets the instruction pointer.
    fn set_rip(&mut self, value: u64);
    /// The flags.
    fn rflags(&self) -> u64;
    /// Sets the flags.
    fn set_rflags(&mut self, value: u64);
    /// CR3.
    fn cr3(&self) -> u64;
    /// A segment register with its hidden part.
    fn segment(&self, register: SegmentRegister) -> Segment;
    /// A segment's base address alone.
    fn segment_base(&self, register: SegmentRegister) -> u64;
    /// The code segment's attributes alone, packed as in [`Segment`].
    fn code_attributes(&self) -> u16;
    /// Notes a single-step trap in DR6 (BS).
    fn note_single_step(&mut self);
}

/// EFER.LMA: long mode is active.
pub const EFER_LMA: u64 = 1 << 10;
/// EFER.LME: long mode is enabled.
pub const EFER_LME: u64 = 1 << 8;
/// EFER.NXE: no-execute pages are enabled.
pub const EFER_NXE: u64 = 1 << 11;

/// DR6.BS: a single step.
pub const DR6_SINGLE_STEP: u64 = 1 << 14;

/// All of a vCPU's registers.
#[derive(Clone, Copy, Default, Debug)]
pub struct VcpuState {
    /// General-purpose registers, RIP, RFLAGS.
    pub registers: Registers,
    /// Segments, control registers, tables.
    pub system: SystemState,
}

impl ControlRegisters for VcpuState {
    fn cr0(&self) -> u64 {
        self.system.cr0
    }

    fn cr4(&self) -> u64 {
        self.system.cr4
    }

    fn efer(&self) -> u64 {
        self.system.efer
    }

    fn cpl(&self) -> u8 {
        self.system.cpl
    }
}

impl CpuState for VcpuState {
    fn gpr(&self, register: Gpr) -> u64 {
        self.registers.get(register)
    }

    fn set_gpr(&mut self, register: Gpr, value: u64) {
        self.registers.set(register, value);
    }

    fn rip(&self) -> u64 {
        self.registers.rip
    }

    fn set_rip(&mut self, value: u64) {
        self.registers.rip = value;
    }

    fn rflags(&self) -> u64 {
        self.registers.rflags
    }

    fn set_rflags(&mut self, value: u64) {
        self.registers.rflags = value;
    }

    fn cr3(&self) -> u64 {
        self.system.cr3
    }

    fn segment(&self, register: SegmentRegister) -> Segment {
        match register {
            SegmentRegister::Es => self.system.es,
            SegmentRegister::Cs => self.system.cs,
            SegmentRegister::Ss => self.system.ss,
            SegmentRegister::Ds => self.system.ds,
            SegmentRegister::Fs => self.system.fs,
            SegmentRegister::Gs => self.system.gs,
        }
    }

    fn segment_base(&self, register: SegmentRegister) -> u64 {
        self.segment(register).base
    }

    fn code_attributes(&self) -> u16 {
        self.system.cs.attributes
    }

    fn note_single_step(&mut self) {
        self.system.dr6 |= DR6_SINGLE_STEP;
    }
}

/// An exception to deliver to the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exception {
    /// Vector, 0-31.
    pub vector: Vector,
    /// Error code, for the vectors that push one.
    pub error_code: Option<u32>,
    /// Value for CR2, for a page fault.
    pub cr2: Option<u64>,
}

impl Exception {
    /// #UD, invalid opcode.
    pub const UNDEFINED: Self = Self { vector: Vector(6), error_code: None, cr2: None };
    /// #GP(0), general protection.
    pub const GENERAL_PROTECTION: Self = Self { vector: Vector(13), error_code: Some(0), cr2: None };

    /// #PF at `address` with `error_code`.
    pub const fn page_fault(address: u64, error_code: u32) -> Self {
        Self { vector: Vector(14), error_code: Some(error_code), cr2: Some(address) }
    }
}
