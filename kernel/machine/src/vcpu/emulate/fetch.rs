//! Instruction bytes, and how long an instruction is.
//!
//! Intel SDM vol. 2, chapter 2 (instruction format) and appendix A (opcode map).

use super::Stop;
use super::translate::{Access, CR0_PE, translate};
use crate::address::GuestVirtAddr;
use crate::memory::{GuestMemory, MemoryError};
use crate::state::{CpuState, EFER_LMA, Exception, Gpr, Segment, SegmentRegister};
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};

const RFLAGS_VM: u64 = 1 << 17;
const PAGE: u64 = 0x1000;
const LONGEST: usize = 15;

/// The default operand and address size of the code that runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum CodeSize {
    Bits16,
    Bits32,
    Bits64,
}

impl CodeSize {
    pub(super) fn of(state: &dyn CpuState) -> Self {
        if state.cr0() & CR0_PE == 0 || state.rflags() & RFLAGS_VM != 0 {
            return Self::Bits16;
        }
        let code = Segment { attributes: state.code_attributes(), ..Segment::default() };
        if code.is_long() && state.efer() & EFER_LMA != 0 {
            Self::Bits64
        } else if code.is_32_bit() {
            Self::Bits32
        } else {
            Self::Bits16
        }
    }

    const fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }

    /// An instruction pointer, cut to size.
    pub(super) const fn wrap(self, rip: u64) -> u64 {
        match self {
            Self::Bits16 => rip & 0xFFFF,
            Self::Bits32 => rip & 0xFFFF_FFFF,
            Self::Bits64 => rip,
        }
    }
}

/// An instruction pointer, cut to the size of the code that runs.
pub fn wrap_instruction_pointer(state: &dyn CpuState, rip: u64) -> u64 {
    CodeSize::of(state).wrap(rip)
}

/// The bytes at the instruction pointer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    bytes: [u8; LONGEST],
    length: usize,
}

impl Window {
    pub(super) fn as_slice(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or(&self.bytes)
    }

    pub(super) const fn unsupported(&self) -> Stop {
        Stop::Unsupported { bytes: self.bytes, length: self.length as u8 }
    }

    /// Reads what the page of the instruction pointer has, and no more than the code segment's limit allows.
    fn first(state: &dyn CpuState, memory: &mut dyn GuestMemory) -> Result<Self, Stop> {
        let mut window = Self { bytes: [0; LONGEST], length: 0 };
        window.extend(state, memory)?;
        Ok(window)
    }

    /// Adds bytes up to the next page boundary. Adds none when there are 15 already.
    fn extend(&mut self, state: &dyn CpuState, memory: &mut dyn GuestMemory) -> Result<(), Stop> {
        let size = CodeSize::of(state);
        let offset = size.wrap(state.rip().wrapping_add(self.length as u64));
        let mut room = (LONGEST - self.length) as u64;
        let linear = if size == CodeSize::Bits64 {
            offset
        } else {
            let code = state.segment(SegmentRegister::Cs);
            let Some(left) = u64::from(code.limit).checked_sub(offset) else {
                return Err(Stop::Exception(super::operands::general_protection(state)));
            };
            room = room.min(left.saturating_add(1));
            code.base.wrapping_add(offset) & 0xFFFF_FFFF
        };
        room = room.min(PAGE - linear % PAGE);
        let access = Access { execute: true, write: false, user: state.cpl() == 3 };
        let at = translate(state, memory, GuestVirtAddr(linear), access)?;
        let Some(into) = self.bytes.get_mut(self.length..self.length + room as usize) else { return Ok(()) };
        match memory.read(at, into) {
            Ok(()) => {
                self.length += room as usize;
                Ok(())
            }
            Err(MemoryError::NotRam { .. }) => Err(self.unsupported()),
            Err(error) => Err(Stop::Memory(error)),
        }
    }
}

/// Fetches and decodes the instruction at CS:RIP.
pub(super) fn decode(
    state: &dyn CpuState,
    memory: &mut dyn GuestMemory,
) -> Result<(Instruction, Window), Stop> {
    let mut window = Window::first(state, memory)?;
    decode_from(state, memory, &mut window).map(|instruction| (instruction, window))
}

fn decode_from(
    state: &dyn CpuState,
    memory: &mut dyn GuestMemory,
    window: &mut Window,
) -> Result<Instruction, Stop> {
    let bitness = CodeSize::of(state).bits();
    loop {
        let mut decoder = Decoder::with_ip(bitness, window.as_slice(), state.rip(), DecoderOptions::NONE);
        let instruction = decoder.decode();
        match decoder.last_error() {
            DecoderError::None => return Ok(instruction),
            DecoderError::NoMoreBytes if window.length < LONGEST => window.extend(state, memory)?,
            // 15 bytes were not enough: longer than an instruction may be.
            DecoderError::NoMoreBytes => return Err(Stop::Exception(Exception::GENERAL_PROTECTION)),
            _ => return Err(window.unsupported()),
        }
    }
}

/// The length in bytes of the instruction at CS:RIP, for exits of processors that do not tell.
///
/// # Errors
/// The instruction cannot be fetched or decoded.
pub fn instruction_length(state: &dyn CpuState, memory: &mut dyn GuestMemory) -> Result<u8, Stop> {
    let mut window = Window::first(state, memory)?;
    match known_length(window.as_slice(), CodeSize::of(state) == CodeSize::Bits64) {
        Some(length) => Ok(length),
        None => decode_from(state, memory, &mut window).map(|instruction| instruction.len() as u8),
    }
}

/// The general-purpose register that is the last operand of the instruction at CS:RIP, for exits of processors that do not tell.
///
/// # Errors
/// The instruction cannot be fetched or decoded, or has no such operand.
pub fn source_register(state: &dyn CpuState, memory: &mut dyn GuestMemory) -> Result<Gpr, Stop> {
    let (instruction, window) = decode(state, memory)?;
    let register = instruction.op_register(instruction.op_count().saturating_sub(1));
    if !register.is_gpr() {
        return Err(window.unsupported());
    }
    Ok(Gpr::from_number(register.full_register().number() as u8))
}

/// Lengths of the instructions that exit most often, without the decoder's tables.
fn known_length(bytes: &[u8], long_mode: bool) -> Option<u8> {
    let prefixes = bytes.iter().take_while(|byte| is_prefix(**byte, long_mode)).count();
    let length = match bytes.get(prefixes..)? {
        // INT1, HLT, string I/O, I/O by DX.
        [0xF1 | 0xF4 | 0x6C..=0x6F | 0xEC..=0xEF, ..] => 1,
        // I/O by an immediate port.
        [0xE4..=0xE7, _, ..] => 2,
        // CLTS, INVD, WBINVD, WRMSR, RDTSC, RDMSR, RDPMC, CPUID.
        [0x0F, 0x06 | 0x08 | 0x09 | 0x30..=0x33 | 0xA2, ..] => 2,
        // The register forms of group 7 (XSETBV, VMCALL, VMMCALL, RDTSCP ...), moves to and from control and debug registers.
        [0x0F, 0x01, 0xC0..=0xFF, ..] | [0x0F, 0x20..=0x23, _, ..] => 3,
        _ => return None,
    };
    u8::try_from(prefixes + length).ok().filter(|total| usize::from(*total) <= LONGEST)
}

const fn is_prefix(byte: u8, long_mode: bool) -> bool {
    match byte {
        0x26 | 0x2E | 0x36 | 0x3E | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3 => true,
        0x40..=0x4F => long_mode,
        _ => false,
    }
}

/// Builds the decoder's tables, which otherwise the first instruction to be decoded pays for.
pub fn prepare() {
    const NOP: [u8; 1] = [0x90];
    let _ = Decoder::new(64, &NOP, DecoderOptions::NONE).decode();
}
