//! Carrying out single instructions.

use crate::address::{GuestPhysAddr, GuestVirtAddr};
use crate::memory::{GuestMemory, MemoryError};
use crate::state::{Exception, VcpuState};

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

/// What an access wants to do.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Access {
    /// Write.
    pub write: bool,
    /// Fetch an instruction.
    pub execute: bool,
    /// With user privilege (CPL 3).
    pub user: bool,
}

/// Emulates the one instruction at CS:RIP.
pub fn emulate(_state: &mut VcpuState, _bus: &mut dyn Bus) -> Emulation {
    Emulation::Unsupported { bytes: [0; 15], length: 0 }
}

/// The length of the instruction at CS:RIP, for exits of processors that do not say.
///
/// # Errors
/// The instruction cannot be fetched or decoded.
pub fn instruction_length(_state: &VcpuState, _memory: &mut dyn GuestMemory) -> Result<u8, Stop> {
    Err(Stop::Unsupported { bytes: [0; 15], length: 0 })
}

/// Walks the guest's page tables.
///
/// # Errors
/// The page fault or general protection exception, or [`Stop::Memory`]; never [`Stop::Unsupported`].
pub fn translate(
    _state: &VcpuState,
    _memory: &mut dyn GuestMemory,
    _address: GuestVirtAddr,
    _access: Access,
) -> Result<GuestPhysAddr, Stop> {
    Err(Stop::Exception(Exception::GENERAL_PROTECTION))
}
