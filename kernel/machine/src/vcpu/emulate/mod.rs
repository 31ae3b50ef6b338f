//! Carrying out single instructions that the processor could not: those that reach device memory, and string I/O.
//!
//! Intel SDM vol. 2 and vol. 3, 3-5. The bytes are decoded by iced-x86; page walk, segments, operands and semantics are here.
//! Alignment checks, protection keys and I/O permissions are the processor's: it has made them before it exits.

mod execute;
mod fetch;
mod flags;
mod operands;
mod string;
#[cfg(test)]
mod tests;
mod translate;

use crate::address::{GuestPhysAddr, Vector};
use crate::memory::{GuestMemory, MemoryError};
use crate::state::{CpuState, Exception};
use execute::Progress;
use fetch::CodeSize;
use operands::Machine;

pub use fetch::{instruction_length, prepare, source_register, wrap_instruction_pointer};
pub use translate::{Access, translate};

/// What an instruction's operands reach.
pub trait Bus {
    /// The machine's RAM.
    fn memory(&mut self) -> &mut dyn GuestMemory;
    /// Reads `width` (1, 2, 4, 8) bytes from a device's memory.
    fn mmio_read(&mut self, at: GuestPhysAddr, width: u8) -> u64;
    /// Writes `width` (1, 2, 4, 8) bytes to a device's memory.
    fn mmio_write(&mut self, at: GuestPhysAddr, width: u8, value: u64);
    /// Reads `width` (1, 2, 4) bytes from an I/O port.
    fn pio_read(&mut self, port: u16, width: u8) -> u32;
    /// Writes `width` (1, 2, 4) bytes to an I/O port.
    fn pio_write(&mut self, port: u16, width: u8, value: u32);
}

/// How the emulation of an instruction ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Emulation {
    /// The instruction is complete and RIP is past it.
    Done,
    /// A repeated string instruction did many of its iterations; RIP still points at it: enter the guest, or emulate again.
    Partial,
    /// The instruction raised this exception; deliver it. RIP points where the exception's class says.
    Fault(Exception),
    /// The emulator does not know the instruction. Nothing has changed.
    Unsupported {
        /// The instruction's bytes, as far as they could be read.
        bytes: [u8; 15],
        /// How many of `bytes` are valid.
        length: u8,
    },
    /// Guest memory could not be reached, because the node is out of frames.
    Memory(MemoryError),
}

/// Why an instruction or an access could not be carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// It raises this exception.
    Exception(Exception),
    /// The emulator does not know the instruction.
    Unsupported {
        /// The instruction's bytes, as far as they could be read.
        bytes: [u8; 15],
        /// How many of `bytes` are valid.
        length: u8,
    },
    /// Guest memory could not be reached, because the node is out of frames.
    Memory(MemoryError),
}

impl From<Stop> for Emulation {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Exception(exception) => Self::Fault(exception),
            Stop::Unsupported { bytes, length } => Self::Unsupported { bytes, length },
            Stop::Memory(error) => Self::Memory(error),
        }
    }
}

/// Emulates the one instruction at CS:RIP.
///
/// A fault leaves registers and memory as they were, but for the iterations that a string instruction had completed. The caller
/// ends an interrupt shadow when the instruction is done.
pub fn emulate(state: &mut dyn CpuState, bus: &mut dyn Bus) -> Emulation {
    let (instruction, window) = match fetch::decode(state, bus.memory()) {
        Ok(decoded) => decoded,
        Err(stop) => return stop.into(),
    };
    let single_step = state.rflags() & flags::TRAP != 0;
    let mut machine = Machine::new(state, bus);
    let progress = match execute::execute(&mut machine, &instruction, &window, single_step) {
        Ok(progress) => progress,
        Err(stop) => return stop.into(),
    };
    if progress == Progress::Done {
        let next = state.rip().wrapping_add(instruction.len() as u64);
        state.set_rip(CodeSize::of(state).wrap(next));
        state.set_rflags(state.rflags() & !flags::RESUME);
    }
    if single_step {
        // After each iteration of a repeated string instruction too, with RIP still at it (SDM vol. 3, 18.3.1.4).
        state.note_single_step();
        return Emulation::Fault(Exception { vector: Vector(1), error_code: None, cr2: None });
    }
    match progress {
        Progress::Done => Emulation::Done,
        Progress::Partial => Emulation::Partial,
    }
}
