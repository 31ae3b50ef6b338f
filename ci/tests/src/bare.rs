//! Guests that are no Linux, for one behaviour of the processor each: they report facts, and a test judges them.
//!
//! A guest is written with [`Guest`], an assembler with helpers, and becomes an image by [`image`]. A node runs it as a job ([`run`]); it
//! prints `name=words` lines on its serial port and switches itself off, and [`Facts`] is what it printed.
//!
//! ```no_run
//! # use iced_x86::{IcedError, code_asm::*};
//! # use nestling::bed::RunningBed;
//! use nestling_tests::bare::{Guest, Outcome, run};
//!
//! fn vmcall(guest: &mut Guest) -> Result<(), IcedError> {
//!     guest.mov(rcx, 7_u64)?;
//!     guest.attempt("vmcall", |guest| guest.vmcall())?; // "vmcall=6 0 0": vector, error code, RIP from the start of the attempt
//!     guest.fact("rcx", rcx) // "rcx=7"
//! }
//!
//! fn vmcall_is_undefined(node: &RunningBed) {
//!     let facts = run(node, "conformance-vmcall");
//!     facts.assert_fault("vmcall", 6, 0);
//!     facts.assert("rcx", 7);
//! }
//! ```
//!
//! What a guest finds: 64-bit mode at CPL 0, interrupts off, the first 4 GiB mapped to themselves by 2 MiB pages, a stack, [`gdt`], an IDT
//! with all 256 vectors, a TSS with stacks ([`layout`]), the local APIC in x2APIC mode but not yet enabled ([`Guest::enable_apic`]), and
//! the general-purpose registers as they were at the first instruction in [`layout::ENTRY`]. Vector, debug and system registers are
//! those of the first instruction. It ends by running off its end (or [`Guest::finish`]).
//!
//! What the handlers of all vectors do: they write a record of eight words (vector, error code, RIP, CS, RFLAGS, RSP, CR2, SS) to
//! [`layout::RECORDS`] and count it in [`layout::RECORD_COUNT`]; then
//! - an interrupt (32 and above) is ended by an EOI and returned from;
//! - with [`Guest::resume_at`], the next exception goes on at that label (once);
//! - with [`Guest::skip_on_exception`], exceptions go on a number of bytes further;
//! - #DB, NMI, #BP and #OF are returned from;
//! - any other exception is reported as the fact `unexpected` (vector, error code, RIP, CR2) and the machine switched off.
//!
//! [`Guest::gate`] puts a handler of the guest's own in an IDT entry. All helpers keep all registers and flags unless they say otherwise.
//! A report has room for about 4000 bytes and 98 lines: names should be short.

mod facts;
mod runtime;

pub use facts::{Facts, Outcome, finish, run, start, start_with};

use crate::guest::{self, LOAD};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use runtime::Runtime;
use std::ops::{Deref, DerefMut};

/// What the assembler answers.
pub type Asm = Result<(), IcedError>;

/// What writes a guest.
pub type Program = fn(&mut Guest) -> Asm;

/// Where things are in a guest's memory; all of it is mapped to itself.
pub mod layout {
    use super::LOAD;

    /// Names and constant data, read-write.
    pub(super) const POOL: u64 = LOAD + 0x2000;
    /// The guest's own code.
    pub const CODE: u64 = LOAD + 0x4000;
    const DATA: u64 = LOAD + 0x10_0000;
    /// Words that the helpers and the handlers share.
    pub(super) const CONTROL: u64 = DATA;
    /// Number of records in [`RECORDS`], a word.
    pub const RECORD_COUNT: u64 = CONTROL;
    /// The sixteen general-purpose registers in encoding order and RFLAGS as they were at the first instruction.
    pub const ENTRY: u64 = CONTROL + 0x100;
    /// What the handlers saw, eight words each: vector, error code, RIP, CS, RFLAGS, RSP, CR2, SS.
    pub const RECORDS: u64 = DATA + 0x1000;
    /// More exceptions and interrupts than these are only counted.
    pub const RECORDS_MAX: u64 = 64;
    /// The IDT, 256 gates of 16 bytes.
    pub const IDT: u64 = DATA + 0x2000;
    /// The 64-bit TSS; its RSP0 is [`RSP0`], its IST1 to IST3 are [`IST`].
    pub const TSS: u64 = DATA + 0x3000;
    pub(super) const LINE: u64 = DATA + 0x4000;
    /// Page table of the 512 pages at [`WINDOW`], see [`super::Guest::map`].
    pub const WINDOW_TABLE: u64 = DATA + 0x7000;
    /// Page table pages of the window above [`WINDOW_TABLE`].
    pub(super) const WINDOW_DIRECTORIES: u64 = DATA + 0x5000;
    /// Top of the stack a guest starts with.
    pub const STACK: u64 = DATA + 0x2_0000;
    /// Top of the stack of handlers that interrupt CPL 3.
    pub const RSP0: u64 = DATA + 0x3_0000;
    /// Tops of the stacks of the interrupt stack table, IST1 first.
    pub const IST: [u64; 3] = [DATA + 0x4_0000, DATA + 0x5_0000, DATA + 0x6_0000];
    /// Top of the stack at CPL 3.
    pub const USER_STACK: u64 = DATA + 0x7_0000;
    /// Zeroed memory for the guest, 512 KiB.
    pub const SCRATCH: u64 = DATA + 0x8_0000;
    /// Regions of 2 MiB that nothing has touched yet, so that the first access to each is a nested fault.
    pub const FRESH: [u64; 12] = {
        let mut regions = [0; 12];
        let mut index = 0;
        while index < regions.len() {
            regions[index] = 0x200_0000 + 0x20_0000 * index as u64;
            index += 1;
        }
        regions
    };
    /// Linear address of the 512 pages of 4 KiB that [`super::Guest::map`] maps; none is mapped at first.
    pub const WINDOW: u64 = 0x80_0000_0000;
    /// A machine's memory in MiB.
    pub const MEMORY_MIB: u32 = 64;
}

/// Selectors in the guest's GDT.
pub mod gdt {
    /// 64-bit code, CPL 0.
    pub const CODE64: u16 = 0x08;
    /// Data, CPL 0.
    pub const DATA: u16 = 0x10;
    /// 32-bit code, CPL 3.
    pub const USER_CODE32: u16 = 0x18 | 3;
    /// Data, CPL 3.
    pub const USER_DATA: u16 = 0x20 | 3;
    /// 64-bit code, CPL 3.
    pub const USER_CODE64: u16 = 0x28 | 3;
    /// Data, CPL 3: where SYSEXIT expects it.
    pub const USER_DATA_SYSEXIT: u16 = 0x30 | 3;
    /// The 64-bit TSS, busy.
    pub const TSS: u16 = 0x38;
    /// 32-bit code, CPL 0.
    pub const CODE32: u16 = 0x48;
    /// 16-bit code, CPL 0, base 0, limit 64 KiB.
    pub const CODE16: u16 = 0x50;
    /// 16-bit data, CPL 0, base 0, limit 64 KiB.
    pub const DATA16: u16 = 0x58;
    /// STAR for SYSCALL and SYSRET with these selectors.
    pub const STAR: u64 = (CODE64 as u64) << 32 | (USER_CODE32 as u64) << 48;
}

/// MSRs by name.
pub mod msr {
    /// IA32_APIC_BASE.
    pub const APIC_BASE: u32 = 0x1B;
    /// x2APIC: task priority.
    pub const TPR: u32 = 0x808;
    /// x2APIC: end of interrupt.
    pub const EOI: u32 = 0x80B;
    /// x2APIC: spurious interrupt vector, with the enable bit.
    pub const SPURIOUS: u32 = 0x80F;
    /// x2APIC: interrupt command.
    pub const ICR: u32 = 0x830;
    /// x2APIC: timer's local vector.
    pub const LVT_TIMER: u32 = 0x832;
    /// x2APIC: timer's initial count.
    pub const INITIAL_COUNT: u32 = 0x838;
    /// x2APIC: timer's current count.
    pub const CURRENT_COUNT: u32 = 0x839;
    /// x2APIC: timer's divider.
    pub const DIVIDE: u32 = 0x83E;
    /// x2APIC: interrupt to itself.
    pub const SELF_IPI: u32 = 0x83F;
    /// EFER.
    pub const EFER: u32 = 0xC000_0080;
    /// STAR.
    pub const STAR: u32 = 0xC000_0081;
    /// LSTAR.
    pub const LSTAR: u32 = 0xC000_0082;
    /// CSTAR.
    pub const CSTAR: u32 = 0xC000_0083;
    /// SFMASK.
    pub const SFMASK: u32 = 0xC000_0084;
    /// FS_BASE.
    pub const FS_BASE: u32 = 0xC000_0100;
    /// GS_BASE.
    pub const GS_BASE: u32 = 0xC000_0101;
    /// KERNEL_GS_BASE.
    pub const KERNEL_GS_BASE: u32 = 0xC000_0102;
    /// SYSENTER_CS.
    pub const SYSENTER_CS: u32 = 0x174;
    /// SYSENTER_ESP.
    pub const SYSENTER_ESP: u32 = 0x175;
    /// SYSENTER_EIP.
    pub const SYSENTER_EIP: u32 = 0x176;
    /// TSC_DEADLINE.
    pub const TSC_DEADLINE: u32 = 0x6E0;
}

/// A guest that is being written: a 64-bit assembler with helpers.
pub struct Guest {
    assembler: CodeAssembler,
    runtime: Runtime,
    pool: Vec<u8>,
}

impl Deref for Guest {
    type Target = CodeAssembler;

    fn deref(&self) -> &CodeAssembler {
        &self.assembler
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut CodeAssembler {
        &mut self.assembler
    }
}

/// The image of the guest `name` that `program` writes.
///
/// # Panics
/// When its instructions do not assemble, or its names and data are too long.
pub fn image(name: &str, program: Program) -> Vec<u8> {
    let assembler = CodeAssembler::new(64).expect("64 bits are a mode");
    let entry = LOAD + guest::ENTRY as u64;
    let runtime = Runtime::assemble(entry).expect("the runtime assembles");
    let mut guest = Guest { assembler, runtime, pool: Vec::new() };
    let code = program(&mut guest)
        .and_then(|()| guest.finish())
        .and_then(|()| guest.assembler.assemble(layout::CODE));
    let code = code.unwrap_or_else(|error| panic!("the guest {name} does not assemble: {error}"));
    let mut whole = guest.runtime.code;
    for (at, part) in [(layout::POOL, guest.pool), (layout::CODE, code)] {
        let offset = (at - entry) as usize;
        assert!(whole.len() <= offset, "what stands before {at:#x} is too long: {} bytes", whole.len());
        whole.resize(offset, 0);
        whole.extend_from_slice(&part);
    }
    guest::kernel(&whole)
}

impl Guest {
    /// Puts constant bytes into the guest's memory and returns their address; 8-aligned.
    pub fn data(&mut self, bytes: &[u8]) -> u64 {
        self.pool.resize(self.pool.len().next_multiple_of(8), 0);
        let at = layout::POOL + self.pool.len() as u64;
        self.pool.extend_from_slice(bytes);
        at
    }

    fn name(&mut self, name: &str) -> i32 {
        assert!(!name.contains(['=', ' ', '\n']), "{name:?} cannot be a fact's name");
        self.data(format!("{name}\0").as_bytes()) as i32
    }

    /// Reports a register.
    pub fn fact(&mut self, name: &str, value: AsmRegister64) -> Asm {
        self.facts(name, &[value])
    }

    /// Reports several registers as one fact.
    pub fn facts(&mut self, name: &str, values: &[AsmRegister64]) -> Asm {
        assert!(values.iter().skip(1).all(|value| *value != rsp), "pushes have moved RSP");
        let name = self.name(name);
        for value in values.iter().rev() {
            self.push(*value)?;
        }
        self.push(rsp)?;
        self.say(name, values.len())?;
        self.lea(rsp, ptr(rsp + 8 * values.len() as i32))
    }

    /// Reports `count` words at `address`, which is below 2 GiB, as one fact.
    pub fn facts_at(&mut self, name: &str, address: u64, count: usize) -> Asm {
        let name = self.name(name);
        self.push(i32::try_from(address).expect("an address below 2 GiB"))?;
        self.say(name, count)
    }

    /// Reports one word at `address`.
    pub fn fact_at(&mut self, name: &str, address: u64) -> Asm {
        self.facts_at(name, address, 1)
    }

    /// Reports the words at the address in a register.
    pub fn facts_by(&mut self, name: &str, pointer: AsmRegister64, count: usize) -> Asm {
        let name = self.name(name);
        self.push(pointer)?;
        self.say(name, count)
    }

    fn say(&mut self, name: i32, count: usize) -> Asm {
        self.push(count as i32)?;
        self.push(name)?;
        self.call_runtime(|runtime| runtime.say)
    }

    fn call_runtime(&mut self, entry: impl FnOnce(&Runtime) -> u64) -> Asm {
        let entry = entry(&self.runtime);
        self.call(entry)
    }

    /// Runs `body`, which may raise one exception, and reports what became of it as the fact `name`, an [`Outcome`]: nothing, or
    /// vector, error code and RIP counted from the start of `body`. After an exception the guest goes on behind `body`. The exception's
    /// record is the last one.
    pub fn attempt(&mut self, name: &str, body: impl FnOnce(&mut Self) -> Asm) -> Asm {
        let name = self.name(name);
        let (mut start, mut end) = (self.create_label(), self.create_label());
        self.push(rax)?;
        self.lea(rax, ptr(start))?;
        self.mov(qword_ptr(runtime::START), rax)?;
        self.lea(rax, ptr(end))?;
        self.mov(qword_ptr(runtime::RESUME), rax)?;
        self.mov(rax, -1_i64 as u64)?;
        self.mov(qword_ptr(runtime::LAST), rax)?;
        self.pop(rax)?;
        self.set_label(&mut start)?;
        body(self)?;
        self.set_label(&mut end)?;
        // An instruction without a label of its own: `body` may end with one that needs this place.
        self.nop()?;
        self.mov(qword_ptr(runtime::RESUME), 0)?;
        self.push(name)?;
        self.call_runtime(|runtime| runtime.outcome)
    }

    /// The next exception goes on at `label`. Once.
    pub fn resume_at(&mut self, label: CodeLabel) -> Asm {
        self.push(rax)?;
        self.lea(rax, ptr(label))?;
        self.mov(qword_ptr(runtime::RESUME), rax)?;
        self.pop(rax)
    }

    /// Exceptions go on `bytes` further from now on; 0 ends that.
    pub fn skip_on_exception(&mut self, bytes: u32) -> Asm {
        self.mov(qword_ptr(runtime::SKIP), bytes as i32)
    }

    /// Forgets all records.
    pub fn clear_records(&mut self) -> Asm {
        self.mov(qword_ptr(layout::RECORD_COUNT), 0)
    }

    /// Reports how many records there are.
    pub fn record_count(&mut self, name: &str) -> Asm {
        self.fact_at(name, layout::RECORD_COUNT)
    }

    /// Reports record `index`: vector, error code, RIP, CS, RFLAGS, RSP, CR2, SS.
    pub fn record(&mut self, name: &str, index: u64) -> Asm {
        self.facts_at(name, layout::RECORDS + index * 64, 8)
    }

    /// Makes `handler` the interrupt gate of `vector` (no end of interrupt, no record, it does all by itself), on the stack of the
    /// interrupt stack table's entry `ist` (1-3), or the current one with 0.
    pub fn gate(&mut self, vector: u8, handler: CodeLabel, ist: u8) -> Asm {
        let gate = layout::IDT + u64::from(vector) * 16;
        self.push(rax)?;
        self.lea(rax, ptr(handler))?;
        self.mov(word_ptr(gate), ax)?;
        self.push(rcx)?;
        // SHR changes flags.
        self.pushfq()?;
        self.shr(eax, 16)?;
        self.popfq()?;
        self.pop(rcx)?;
        self.mov(word_ptr(gate + 6), ax)?;
        self.mov(byte_ptr(gate + 4), u32::from(ist))?;
        self.pop(rax)
    }

    /// WRMSR of a constant. Changes RAX, RCX and RDX.
    pub fn wrmsr_value(&mut self, index: u32, value: u64) -> Asm {
        self.mov(ecx, index)?;
        self.mov(eax, value as u32)?;
        self.mov(edx, (value >> 32) as u32)?;
        self.wrmsr()
    }

    /// RDMSR into RAX, all 64 bits. Changes RCX and RDX.
    pub fn rdmsr_value(&mut self, index: u32) -> Asm {
        self.mov(ecx, index)?;
        self.rdmsr()?;
        self.shl(rdx, 32)?;
        self.or(rax, rdx)
    }

    /// CPUID. Changes RAX, RBX, RCX and RDX.
    pub fn cpuid_leaf(&mut self, leaf: u32, subleaf: u32) -> Asm {
        self.mov(eax, leaf)?;
        self.mov(ecx, subleaf)?;
        self.cpuid()
    }

    /// Switches the local APIC on (spurious vector 0xFF). Changes RAX, RCX and RDX.
    pub fn enable_apic(&mut self) -> Asm {
        self.wrmsr_value(msr::SPURIOUS, 0x1FF)
    }

    /// Sends an interrupt to itself. Changes RAX, RCX and RDX.
    pub fn self_ipi(&mut self, vector: u8) -> Asm {
        self.wrmsr_value(msr::SELF_IPI, vector.into())
    }

    /// Sends itself an NMI. Changes RAX, RCX and RDX.
    pub fn self_nmi(&mut self) -> Asm {
        // Delivery mode NMI, physical destination 0.
        self.wrmsr_value(msr::ICR, 4 << 8)
    }

    /// Starts the local APIC's timer, divider 1: `mode` is 0 (one-shot), 1 (periodic) or 2 (TSC deadline, then write
    /// [`msr::TSC_DEADLINE`]). Changes RAX, RCX and RDX.
    pub fn timer(&mut self, vector: u8, mode: u32, count: u32) -> Asm {
        self.wrmsr_value(msr::DIVIDE, 0b1011)?;
        self.wrmsr_value(msr::LVT_TIMER, u64::from(mode << 17 | u32::from(vector)))?;
        if mode == 2 { Ok(()) } else { self.wrmsr_value(msr::INITIAL_COUNT, count.into()) }
    }

    /// Maps page `index` (0-511) of [`layout::WINDOW`]: `entry` is the page table entry, such as `physical | 3`; 0 unmaps it. The linear
    /// address is returned.
    pub fn map(&mut self, index: u64, entry: u64) -> Result<u64, IcedError> {
        let linear = layout::WINDOW + index * 0x1000;
        self.push(rax)?;
        self.mov(rax, entry)?;
        self.mov(qword_ptr(layout::WINDOW_TABLE + index * 8), rax)?;
        self.mov(rax, linear)?;
        self.invlpg(ptr(rax))?;
        self.pop(rax)?;
        Ok(linear)
    }

    /// Makes all memory accessible at CPL 3. Changes RAX and RCX.
    pub fn allow_user(&mut self) -> Asm {
        self.call_runtime(|runtime| runtime.allow_user)
    }

    /// Runs `body` at CPL 3, IOPL 0, interrupts off, on a stack of its own; helpers that report work there. It must be left at its end.
    /// Needs [`Guest::allow_user`] before. Changes RAX.
    pub fn user(&mut self, body: impl FnOnce(&mut Self) -> Asm) -> Asm {
        let (mut start, mut end) = (self.create_label(), self.create_label());
        self.lea(rax, ptr(start))?;
        self.call_runtime(|runtime| runtime.enter_user)?;
        self.jmp(end)?;
        self.set_label(&mut start)?;
        body(self)?;
        self.int(i32::from(runtime::LEAVE_USER_VECTOR))?;
        self.set_label(&mut end)?;
        self.nop()
    }

    /// Copies constant bytes to `address`. Changes RSI, RDI and RCX.
    pub fn copy_to(&mut self, address: u64, bytes: &[u8]) -> Asm {
        let from = self.data(bytes);
        self.mov(rsi, from)?;
        self.mov(rdi, address)?;
        self.mov(ecx, bytes.len() as u32)?;
        self.cld()?;
        self.rep().movsb()
    }

    /// Ends the guest: says so and switches the machine off.
    pub fn finish(&mut self) -> Asm {
        let finish = self.runtime.finish;
        self.jmp(finish)
    }
}
