//! String instructions and their repetition, string I/O included.
//!
//! Intel SDM vol. 2: MOVS, STOS, LODS, CMPS, SCAS, INS, OUTS, REP; vol. 1, 19.3 (I/O). Each iteration leaves the registers as the
//! processor would after it, so that a fault or a pause between two of them is exact.

use super::Stop;
use super::execute::Progress;
use super::flags::{self, DIRECTION, STATUS, Width, ZERO};
use super::operands::{Machine, Target};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// Iterations of one call at most, so that a guest cannot keep the node busy with one instruction.
pub(super) const ITERATIONS: u32 = 1024;

pub(super) fn is_string(mnemonic: Mnemonic) -> bool {
    Operation::of(mnemonic).is_some()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Operation {
    Move,
    Store,
    Load,
    Compare,
    Scan,
    In,
    Out,
}

impl Operation {
    /// The operation and the operand width. `Movsd` and `Cmpsd` are SSE instructions as well, which take vector registers.
    fn of(mnemonic: Mnemonic) -> Option<(Self, usize)> {
        Some(match mnemonic {
            Mnemonic::Movsb => (Self::Move, 1),
            Mnemonic::Movsw => (Self::Move, 2),
            Mnemonic::Movsd => (Self::Move, 4),
            Mnemonic::Movsq => (Self::Move, 8),
            Mnemonic::Stosb => (Self::Store, 1),
            Mnemonic::Stosw => (Self::Store, 2),
            Mnemonic::Stosd => (Self::Store, 4),
            Mnemonic::Stosq => (Self::Store, 8),
            Mnemonic::Lodsb => (Self::Load, 1),
            Mnemonic::Lodsw => (Self::Load, 2),
            Mnemonic::Lodsd => (Self::Load, 4),
            Mnemonic::Lodsq => (Self::Load, 8),
            Mnemonic::Cmpsb => (Self::Compare, 1),
            Mnemonic::Cmpsw => (Self::Compare, 2),
            Mnemonic::Cmpsd => (Self::Compare, 4),
            Mnemonic::Cmpsq => (Self::Compare, 8),
            Mnemonic::Scasb => (Self::Scan, 1),
            Mnemonic::Scasw => (Self::Scan, 2),
            Mnemonic::Scasd => (Self::Scan, 4),
            Mnemonic::Scasq => (Self::Scan, 8),
            Mnemonic::Insb => (Self::In, 1),
            Mnemonic::Insw => (Self::In, 2),
            Mnemonic::Insd => (Self::In, 4),
            Mnemonic::Outsb => (Self::Out, 1),
            Mnemonic::Outsw => (Self::Out, 2),
            Mnemonic::Outsd => (Self::Out, 4),
            _ => return None,
        })
    }
}

/// Index and count registers, by address size.
struct Registers {
    source: Register,
    destination: Register,
    count: Register,
}

impl Registers {
    /// `None` when no operand is one of a string instruction.
    fn of(instruction: &Instruction) -> Option<Self> {
        let size = (0..instruction.op_count()).find_map(|operand| match instruction.op_kind(operand) {
            OpKind::MemorySegSI | OpKind::MemoryESDI => Some(2),
            OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(4),
            OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(8),
            _ => None,
        })?;
        Some(match size {
            2 => Self { source: Register::SI, destination: Register::DI, count: Register::CX },
            4 => Self { source: Register::ESI, destination: Register::EDI, count: Register::ECX },
            _ => Self { source: Register::RSI, destination: Register::RDI, count: Register::RCX },
        })
    }
}

/// Carries out a string instruction, one iteration of it when `single_step`; `None` when it is not one after all.
pub(super) fn execute(
    machine: &mut Machine<'_>,
    instruction: &Instruction,
    single_step: bool,
) -> Option<Result<Progress, Stop>> {
    let (operation, bytes) = Operation::of(instruction.mnemonic())?;
    let string = StringInstruction {
        operation,
        width: Width::new(bytes)?,
        registers: Registers::of(instruction)?,
        segment: if matches!(
            operation,
            Operation::Move | Operation::Load | Operation::Compare | Operation::Out
        ) {
            instruction.memory_segment()
        } else {
            Register::ES
        },
        repeat_while: match operation {
            Operation::Compare | Operation::Scan => {
                Some(if instruction.has_repne_prefix() { 0 } else { ZERO })
            }
            _ => None,
        },
    };
    if !instruction.has_rep_prefix() && !instruction.has_repne_prefix() {
        return Some(string.iterate(machine).map(|()| Progress::Done));
    }
    Some(string.repeat(machine, if single_step { 1 } else { ITERATIONS }))
}

struct StringInstruction {
    operation: Operation,
    width: Width,
    registers: Registers,
    /// Of the source operand.
    segment: Register,
    /// The zero flag's state that lets a comparison go on.
    repeat_while: Option<u64>,
}

impl StringInstruction {
    fn repeat(&self, machine: &mut Machine<'_>, iterations: u32) -> Result<Progress, Stop> {
        for _ in 0..iterations {
            let count = machine.register(self.registers.count).unwrap_or(0);
            if count == 0 {
                return Ok(Progress::Done);
            }
            self.iterate(machine)?;
            machine.set_register(self.registers.count, count - 1);
            let zero = machine.state.rflags() & ZERO;
            if count == 1 || self.repeat_while.is_some_and(|wanted| wanted != zero) {
                return Ok(Progress::Done);
            }
        }
        Ok(Progress::Partial)
    }

    fn iterate(&self, machine: &mut Machine<'_>) -> Result<(), Stop> {
        let accumulator = match self.width.bytes() {
            1 => Register::AL,
            2 => Register::AX,
            4 => Register::EAX,
            _ => Register::RAX,
        };
        let port = machine.register(Register::DX).unwrap_or(0) as u16;
        match self.operation {
            Operation::Move => {
                let (from, to) = (self.source(machine)?, self.destination(machine, true)?);
                let value = machine.read(&from)?;
                machine.write(&to, value)?;
            }
            Operation::Store => {
                let to = self.destination(machine, true)?;
                let value = machine.register(accumulator).unwrap_or(0);
                machine.write(&to, value)?;
            }
            Operation::Load => {
                let from = self.source(machine)?;
                let value = machine.read(&from)?;
                machine.set_register(accumulator, value);
            }
            Operation::Compare => {
                let (first, second) = (self.source(machine)?, self.destination(machine, false)?);
                let (a, b) = (machine.read(&first)?, machine.read(&second)?);
                self.compare(machine, a, b);
            }
            Operation::Scan => {
                let second = self.destination(machine, false)?;
                let b = machine.read(&second)?;
                let a = machine.register(accumulator).unwrap_or(0);
                self.compare(machine, a, b);
            }
            Operation::In => {
                let to = self.destination(machine, true)?;
                let value = machine.bus.pio_read(port, self.width.bytes());
                machine.write(&to, u64::from(value))?;
            }
            Operation::Out => {
                let from = self.source(machine)?;
                let value = machine.read(&from)?;
                machine.bus.pio_write(port, self.width.bytes(), value as u32);
            }
        }
        self.advance(machine);
        Ok(())
    }

    fn compare(&self, machine: &mut Machine<'_>, a: u64, b: u64) {
        let outcome = flags::sub(a, b, false, self.width);
        machine.state.set_rflags(machine.state.rflags() & !STATUS | outcome.flags);
    }

    fn source(&self, machine: &mut Machine<'_>) -> Result<Target, Stop> {
        self.operand(machine, self.segment, self.registers.source, false)
    }

    fn destination(&self, machine: &mut Machine<'_>, write: bool) -> Result<Target, Stop> {
        self.operand(machine, Register::ES, self.registers.destination, write)
    }

    fn operand(
        &self,
        machine: &mut Machine<'_>,
        segment: Register,
        index: Register,
        write: bool,
    ) -> Result<Target, Stop> {
        let offset = machine.register(index).unwrap_or(0);
        let linear = machine.linear(segment, offset, self.width, write).map_err(Stop::Exception)?;
        machine.resolve(linear, self.width, write)
    }

    /// Moves the index registers that the operation uses.
    fn advance(&self, machine: &mut Machine<'_>) {
        let step = u64::from(self.width.bytes());
        let backwards = machine.state.rflags() & DIRECTION != 0;
        let mut step_register = |register| {
            let value = machine.register(register).unwrap_or(0);
            let next = if backwards { value.wrapping_sub(step) } else { value.wrapping_add(step) };
            machine.set_register(register, next);
        };
        if matches!(self.operation, Operation::Move | Operation::Load | Operation::Compare | Operation::Out) {
            step_register(self.registers.source);
        }
        if !matches!(self.operation, Operation::Load | Operation::Out) {
            step_register(self.registers.destination);
        }
    }
}
