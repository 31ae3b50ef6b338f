//! What each instruction does.
//!
//! Intel SDM vol. 2; the instructions that compilers and kernels use on device memory. LOCK has no effect of its own: a
//! machine's processors do not run while one of them is emulated.

use super::flags::{self, CARRY, OVERFLOW, Outcome, STATUS, Width, ZERO};
use super::operands::{Machine, Target};
use super::{Stop, fetch, string};
use iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind, Register};

/// An operand, ready to be read or written.
#[derive(Clone, Copy, Debug)]
enum Place {
    Register(Register, Width),
    Memory(Target),
    Immediate(u64),
}

/// How an instruction went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Progress {
    Done,
    Partial,
}

/// Carries out `instruction`, all but the move of RIP; of a repeated one a single iteration when `single_step`.
pub(super) fn execute(
    machine: &mut Machine<'_>,
    instruction: &Instruction,
    window: &fetch::Window,
    single_step: bool,
) -> Result<Progress, Stop> {
    let unsupported = window.unsupported();
    if string::is_string(instruction.mnemonic()) {
        return string::execute(machine, instruction, single_step).ok_or(unsupported)?;
    }
    let mut executor = Executor { machine, instruction, unsupported };
    executor.run().map(|()| Progress::Done)
}

struct Executor<'a, 'b> {
    machine: &'a mut Machine<'b>,
    instruction: &'a Instruction,
    unsupported: Stop,
}

impl Executor<'_, '_> {
    fn run(&mut self) -> Result<(), Stop> {
        use Mnemonic as M;
        match self.instruction.mnemonic() {
            M::Mov | M::Movnti => self.move_to(|value, _, _| value),
            M::Movzx => self.move_to(|value, _, _| value),
            M::Movsx | M::Movsxd => self.move_to(|value, from, _| from.sign_extend(value)),
            M::Movbe => self.move_to(|value, from, _| value.swap_bytes() >> (64 - from.bits())),
            M::Add => self.modify(|a, b, _, w| flags::add(a, b, false, w)),
            M::Adc => self.modify(flags::add),
            M::Sub => self.modify(|a, b, _, w| flags::sub(a, b, false, w)),
            M::Sbb => self.modify(flags::sub),
            M::And => self.modify(|a, b, _, w| flags::logic(a & b, w)),
            M::Or => self.modify(|a, b, _, w| flags::logic(a | b, w)),
            M::Xor => self.modify(|a, b, _, w| flags::logic(a ^ b, w)),
            M::Cmp => self.compare(|a, b, w| flags::sub(a, b, false, w)),
            M::Test => self.compare(|a, b, w| flags::logic(a & b, w)),
            M::Inc => self.modify_one(STATUS & !CARRY, |a, w| flags::add(a, 1, false, w)),
            M::Dec => self.modify_one(STATUS & !CARRY, |a, w| flags::sub(a, 1, false, w)),
            M::Neg => self.modify_one(STATUS, |a, w| flags::sub(0, a, false, w)),
            M::Not => self.modify_one(0, |a, w| Outcome { value: !a & w.mask(), flags: 0 }),
            M::Xchg => self.exchange(|_, source, _| (source, None)),
            M::Xadd => self.exchange(|destination, source, width| {
                let sum = flags::add(destination, source, false, width);
                (sum.value, Some(sum.flags))
            }),
            M::Cmpxchg => self.compare_exchange(),
            M::Cmpxchg8b => self.compare_exchange_8_bytes(),
            M::Bt => self.bit(|_, _| None),
            M::Bts => self.bit(|value, bit| Some(value | bit)),
            M::Btr => self.bit(|value, bit| Some(value & !bit)),
            M::Btc => self.bit(|value, bit| Some(value ^ bit)),
            // Nothing of a device is cached.
            M::Clflush | M::Clflushopt | M::Clwb => Ok(()),
            _ if self.instruction.condition_code() != ConditionCode::None => self.conditional(),
            _ => Err(self.unsupported),
        }
    }

    fn place(&mut self, operand: u32, write: bool) -> Result<Place, Stop> {
        match self.instruction.op_kind(operand) {
            OpKind::Register => {
                let register = self.instruction.op_register(operand);
                self.machine.register(register).ok_or(self.unsupported)?;
                let width = Width::new(register.size()).ok_or(self.unsupported)?;
                Ok(Place::Register(register, width))
            }
            OpKind::Memory => {
                let width = Width::new(self.instruction.memory_size().size()).ok_or(self.unsupported)?;
                self.memory(0, width, write).map(Place::Memory)
            }
            _ => match self.instruction.try_immediate(operand) {
                Ok(value) => Ok(Place::Immediate(value)),
                Err(_) => Err(self.unsupported),
            },
        }
    }

    /// The memory operand, `displacement` bytes further on.
    fn memory(&mut self, displacement: u64, width: Width, write: bool) -> Result<Target, Stop> {
        let (offset, size) = self.machine.effective_address(self.instruction).ok_or(self.unsupported)?;
        let offset = offset.wrapping_add(displacement) & size.mask();
        let segment = self.instruction.memory_segment();
        let linear = self.machine.linear(segment, offset, width, write).map_err(Stop::Exception)?;
        self.machine.resolve(linear, width, write)
    }

    fn get(&mut self, place: &Place) -> Result<u64, Stop> {
        match place {
            Place::Register(register, _) => self.machine.register(*register).ok_or(self.unsupported),
            Place::Memory(target) => self.machine.read(target),
            Place::Immediate(value) => Ok(*value),
        }
    }

    fn set(&mut self, place: &Place, value: u64) -> Result<(), Stop> {
        match place {
            Place::Register(register, _) => {
                self.machine.set_register(*register, value);
                Ok(())
            }
            Place::Memory(target) => self.machine.write(target, value),
            Place::Immediate(_) => Err(self.unsupported),
        }
    }

    fn width(&self, place: &Place) -> Result<Width, Stop> {
        match place {
            Place::Register(_, width) => Ok(*width),
            Place::Memory(target) => Ok(target.width()),
            Place::Immediate(_) => Err(self.unsupported),
        }
    }

    fn flag(&self, flag: u64) -> bool {
        self.machine.state.rflags() & flag != 0
    }

    fn set_flags(&mut self, mask: u64, flags: u64) {
        let state = &mut self.machine.state;
        state.set_rflags(state.rflags() & !mask | flags & mask);
    }

    fn move_to(&mut self, convert: impl FnOnce(u64, Width, Width) -> u64) -> Result<(), Stop> {
        let destination = self.place(0, true)?;
        let source = self.place(1, false)?;
        let to = self.width(&destination)?;
        let from = self.width(&source).unwrap_or(to);
        let value = self.get(&source)?;
        self.set(&destination, convert(value, from, to) & to.mask())
    }

    fn modify(&mut self, operation: impl FnOnce(u64, u64, bool, Width) -> Outcome) -> Result<(), Stop> {
        let destination = self.place(0, true)?;
        let source = self.place(1, false)?;
        let width = self.width(&destination)?;
        let (a, b) = (self.get(&destination)?, self.get(&source)?);
        let outcome = operation(a, b, self.flag(CARRY), width);
        self.set(&destination, outcome.value)?;
        self.set_flags(STATUS, outcome.flags);
        Ok(())
    }

    fn modify_one(&mut self, mask: u64, operation: impl FnOnce(u64, Width) -> Outcome) -> Result<(), Stop> {
        let destination = self.place(0, true)?;
        let width = self.width(&destination)?;
        let outcome = operation(self.get(&destination)?, width);
        self.set(&destination, outcome.value)?;
        self.set_flags(mask, outcome.flags);
        Ok(())
    }

    fn compare(&mut self, operation: impl FnOnce(u64, u64, Width) -> Outcome) -> Result<(), Stop> {
        let first = self.place(0, false)?;
        let second = self.place(1, false)?;
        let width = self.width(&first)?;
        let (a, b) = (self.get(&first)?, self.get(&second)?);
        self.set_flags(STATUS, operation(a, b, width).flags);
        Ok(())
    }

    /// Writes a new value to the destination, and the destination's old one to the source register.
    fn exchange(
        &mut self,
        operation: impl FnOnce(u64, u64, Width) -> (u64, Option<u64>),
    ) -> Result<(), Stop> {
        let destination = self.place(0, true)?;
        let source = self.place(1, true)?;
        let width = self.width(&destination)?;
        let (old, operand) = (self.get(&destination)?, self.get(&source)?);
        let (new, flags) = operation(old, operand, width);
        // The order matters when both are the same register: XADD leaves the sum.
        if let Place::Memory(_) = destination {
            self.set(&destination, new)?;
            self.set(&source, old)?;
        } else {
            self.set(&source, old)?;
            self.set(&destination, new)?;
        }
        if let Some(flags) = flags {
            self.set_flags(STATUS, flags);
        }
        Ok(())
    }

    fn compare_exchange(&mut self) -> Result<(), Stop> {
        let destination = self.place(0, true)?;
        let source = self.place(1, false)?;
        let width = self.width(&destination)?;
        let accumulator = match width.bytes() {
            1 => Register::AL,
            2 => Register::AX,
            4 => Register::EAX,
            _ => Register::RAX,
        };
        let expected = self.get(&Place::Register(accumulator, width))?;
        let found = self.get(&destination)?;
        let outcome = flags::sub(expected, found, false, width);
        if outcome.flags & ZERO != 0 {
            let new = self.get(&source)?;
            self.set(&destination, new)?;
        } else {
            // Memory is written all the same; a register keeps even its upper half.
            if let Place::Memory(_) = destination {
                self.set(&destination, found)?;
            }
            self.machine.set_register(accumulator, found);
        }
        self.set_flags(STATUS, outcome.flags);
        Ok(())
    }

    fn compare_exchange_8_bytes(&mut self) -> Result<(), Stop> {
        let width = Width::new(8).ok_or(self.unsupported)?;
        let target = self.memory(0, width, true)?;
        let pair =
            |machine: &Machine<'_>, high, low| Some(machine.register(high)? << 32 | machine.register(low)?);
        let expected = pair(self.machine, Register::EDX, Register::EAX).ok_or(self.unsupported)?;
        let new = pair(self.machine, Register::ECX, Register::EBX).ok_or(self.unsupported)?;
        let found = self.machine.read(&target)?;
        if found == expected {
            self.machine.write(&target, new)?;
            self.set_flags(ZERO, ZERO);
        } else {
            self.machine.write(&target, found)?;
            self.machine.set_register(Register::EAX, found);
            self.machine.set_register(Register::EDX, found >> 32);
            self.set_flags(ZERO, 0);
        }
        Ok(())
    }

    /// BT and its kin. A bit number in a register reaches beyond the operand in memory, in both directions.
    fn bit(&mut self, operation: impl FnOnce(u64, u64) -> Option<u64>) -> Result<(), Stop> {
        let write = self.instruction.mnemonic() != Mnemonic::Bt;
        let number = self.place(1, false)?;
        let number = match number {
            Place::Register(_, width) => width.sign_extend(self.get(&number)?),
            _ => self.get(&number)?,
        };
        let destination = match (self.instruction.op0_kind(), self.instruction.op1_kind()) {
            (OpKind::Memory, OpKind::Register) => {
                let width = Width::new(self.instruction.memory_size().size()).ok_or(self.unsupported)?;
                let units = (number as i64) >> width.bits().ilog2();
                let displacement = units.wrapping_mul(i64::from(width.bytes())) as u64;
                Place::Memory(self.memory(displacement, width, write)?)
            }
            _ => self.place(0, write)?,
        };
        let width = self.width(&destination)?;
        let bit = 1_u64 << (number & u64::from(width.bits() - 1));
        let value = self.get(&destination)?;
        if let Some(new) = operation(value, bit) {
            self.set(&destination, new)?;
        }
        self.set_flags(CARRY, if value & bit != 0 { CARRY } else { 0 });
        Ok(())
    }

    /// SETcc and CMOVcc.
    fn conditional(&mut self) -> Result<(), Stop> {
        let holds = self.condition();
        match self.instruction.op_count() {
            1 if self.instruction.memory_size().size() == 1
                || self.instruction.op0_kind() == OpKind::Register =>
            {
                let destination = self.place(0, true)?;
                self.set(&destination, u64::from(holds))
            }
            2 if self.instruction.op0_kind() == OpKind::Register => {
                let destination = self.place(0, true)?;
                let source = self.place(1, false)?;
                let value = self.get(&source)?;
                let old = self.get(&destination)?;
                self.set(&destination, if holds { value } else { old })
            }
            _ => Err(self.unsupported),
        }
    }

    fn condition(&self) -> bool {
        let (carry, zero) = (self.flag(CARRY), self.flag(ZERO));
        let (sign, overflow) = (self.flag(flags::SIGN), self.flag(OVERFLOW));
        match self.instruction.condition_code() {
            ConditionCode::o => overflow,
            ConditionCode::no => !overflow,
            ConditionCode::b => carry,
            ConditionCode::ae => !carry,
            ConditionCode::e => zero,
            ConditionCode::ne => !zero,
            ConditionCode::be => carry || zero,
            ConditionCode::a => !carry && !zero,
            ConditionCode::s => sign,
            ConditionCode::ns => !sign,
            ConditionCode::p => self.flag(flags::PARITY),
            ConditionCode::np => !self.flag(flags::PARITY),
            ConditionCode::l => sign != overflow,
            ConditionCode::ge => sign == overflow,
            ConditionCode::le => zero || sign != overflow,
            ConditionCode::g => !zero && sign == overflow,
            _ => false,
        }
    }
}
