//! Registers, segments and memory, as an instruction's operands name them.
//!
//! Intel SDM vol. 1, 3.7 (operand addressing); vol. 3, 3.2-3.5 and 6.3-6.5 (segments, limits, types).

use super::fetch::CodeSize;
use super::flags::Width;
use super::translate::{Access, CR0_PE, is_canonical, translate};
use super::{Bus, Stop};
use crate::address::{GuestPhysAddr, GuestVirtAddr, Vector};
use crate::memory::MemoryError;
use crate::state::{CpuState, Exception, Gpr, Segment, SegmentRegister};
use iced_x86::{Instruction, Register};

const RFLAGS_VM: u64 = 1 << 17;
const PAGE: u64 = 0x1000;

const SEGMENT_CODE: u16 = 1 << 3;
const SEGMENT_EXPAND_DOWN: u16 = 1 << 2;
/// Writable for data, readable for code.
const SEGMENT_ACCESS: u16 = 1 << 1;
const SEGMENT_PRESENT: u16 = 1 << 7;

/// #GP(0), without the error code where the mode has none.
pub(super) fn general_protection(state: &dyn CpuState) -> Exception {
    in_mode(state, Exception::GENERAL_PROTECTION)
}

fn in_mode(state: &dyn CpuState, exception: Exception) -> Exception {
    let has_codes = state.cr0() & CR0_PE != 0;
    Exception { error_code: exception.error_code.filter(|_| has_codes), ..exception }
}

/// Where an operand of up to eight bytes is: one piece, or two when it crosses a page boundary.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pieces: [(GuestPhysAddr, usize); 2],
    width: Width,
}

impl Target {
    pub(super) const fn width(&self) -> Width {
        self.width
    }
}

/// One page's translation, kept while a string instruction goes through it.
#[derive(Clone, Copy, Debug)]
struct Cached {
    page: u64,
    frame: u64,
}

/// The state and the bus, while one instruction is emulated.
pub(super) struct Machine<'a> {
    pub(super) state: &'a mut dyn CpuState,
    pub(super) bus: &'a mut dyn Bus,
    /// For reads and for writes.
    cached: [Option<Cached>; 2],
}

impl<'a> Machine<'a> {
    pub(super) fn new(state: &'a mut dyn CpuState, bus: &'a mut dyn Bus) -> Self {
        Self { state, bus, cached: [None; 2] }
    }

    /// A general-purpose register's value; `None` for any other register.
    pub(super) fn register(&self, register: Register) -> Option<u64> {
        let (whole, shift, width) = locate(register)?;
        Some(self.state.gpr(whole) >> shift & width.mask())
    }

    /// Sets a general-purpose register: 32-bit writes clear the upper half, smaller ones keep the rest.
    pub(super) fn set_register(&mut self, register: Register, value: u64) {
        let Some((whole, shift, width)) = locate(register) else { return };
        let value = match width.bytes() {
            8 => value,
            4 => value & width.mask(),
            _ => self.state.gpr(whole) & !(width.mask() << shift) | (value & width.mask()) << shift,
        };
        self.state.set_gpr(whole, value);
    }

    /// The offset in its segment of an instruction's memory operand, cut to the address size.
    pub(super) fn effective_address(&self, instruction: &Instruction) -> Option<(u64, Width)> {
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        if matches!(base, Register::RIP | Register::EIP) {
            // The decoder has added the instruction pointer.
            let width = Width::new(base.size())?;
            return Some((instruction.memory_displacement64() & width.mask(), width));
        }
        let bytes = match (base, index) {
            (Register::None, Register::None) => instruction.memory_displ_size() as usize,
            (Register::None, index) => index.size(),
            (base, _) => base.size(),
        };
        let width = Width::new(bytes)?;
        let mut offset = instruction.memory_displacement64();
        if base != Register::None {
            offset = offset.wrapping_add(self.register(base)?);
        }
        if index != Register::None {
            let scale = u64::from(instruction.memory_index_scale());
            offset = offset.wrapping_add(self.register(index)?.wrapping_mul(scale));
        }
        Some((offset & width.mask(), width))
    }

    /// The linear address of `width` bytes at `segment:offset`, if the segment allows the access.
    pub(super) fn linear(
        &self,
        segment: Register,
        offset: u64,
        width: Width,
        write: bool,
    ) -> Result<u64, Exception> {
        let last = u64::from(width.bytes()) - 1;
        if CodeSize::of(self.state) == CodeSize::Bits64 {
            let base = match segment {
                Register::FS => self.state.segment_base(SegmentRegister::Fs),
                Register::GS => self.state.segment_base(SegmentRegister::Gs),
                _ => 0,
            };
            let linear = base.wrapping_add(offset);
            let end = linear.wrapping_add(last);
            if !is_canonical(self.state, linear) || !is_canonical(self.state, end) {
                return Err(self.segment_fault(segment));
            }
            return Ok(linear);
        }
        let descriptor = self.segment(segment);
        let real = self.state.cr0() & CR0_PE == 0 || self.state.rflags() & RFLAGS_VM != 0;
        if !(real || permits(&descriptor, write)) || !within(&descriptor, offset, last) {
            return Err(self.segment_fault(segment));
        }
        Ok(descriptor.base.wrapping_add(offset) & 0xFFFF_FFFF)
    }

    fn segment(&self, register: Register) -> Segment {
        self.state.segment(match register {
            Register::ES => SegmentRegister::Es,
            Register::CS => SegmentRegister::Cs,
            Register::SS => SegmentRegister::Ss,
            Register::FS => SegmentRegister::Fs,
            Register::GS => SegmentRegister::Gs,
            _ => SegmentRegister::Ds,
        })
    }

    fn segment_fault(&self, segment: Register) -> Exception {
        let exception = if segment == Register::SS {
            Exception { vector: Vector(12), error_code: Some(0), cr2: None }
        } else {
            Exception::GENERAL_PROTECTION
        };
        in_mode(self.state, exception)
    }

    /// Translates `width` bytes at a linear address, all of them before any is touched.
    pub(super) fn resolve(&mut self, linear: u64, width: Width, write: bool) -> Result<Target, Stop> {
        let bytes = usize::from(width.bytes());
        let in_page = (PAGE - linear % PAGE) as usize;
        let first = bytes.min(in_page);
        let mut pieces = [(self.translate(linear, write)?, first), (GuestPhysAddr(0), 0)];
        if first < bytes {
            let mut next = linear.wrapping_add(first as u64);
            if CodeSize::of(self.state) != CodeSize::Bits64 {
                next &= 0xFFFF_FFFF;
            }
            pieces[1] = (self.translate(next, write)?, bytes - first);
        }
        Ok(Target { pieces, width })
    }

    fn translate(&mut self, linear: u64, write: bool) -> Result<GuestPhysAddr, Stop> {
        let (page, offset) = (linear & !(PAGE - 1), linear & (PAGE - 1));
        let cached = &mut self.cached[usize::from(write)];
        if let Some(hit) = cached.filter(|cached| cached.page == page) {
            return Ok(GuestPhysAddr(hit.frame | offset));
        }
        let access = Access { write, execute: false, user: self.state.cpl() == 3 };
        let at = translate(self.state, self.bus.memory(), GuestVirtAddr(linear), access)?;
        *cached = Some(Cached { page, frame: at.0 & !(PAGE - 1) });
        Ok(at)
    }

    /// Reads an operand from RAM or from a device.
    pub(super) fn read(&mut self, target: &Target) -> Result<u64, Stop> {
        let mut bytes = [0; 8];
        let mut rest = bytes.as_mut_slice();
        for &(at, length) in &target.pieces {
            let Some((piece, tail)) = rest.split_at_mut_checked(length) else { break };
            rest = tail;
            if piece.is_empty() {
                continue;
            }
            match self.bus.memory().read(at, piece) {
                Ok(()) => {}
                Err(MemoryError::NotRam { .. }) => {
                    for (at, part) in aligned_parts(at, piece.len()) {
                        let value = self.bus.mmio_read(at, part.len() as u8).to_le_bytes();
                        if let (Some(into), Some(from)) =
                            (piece.get_mut(part.clone()), value.get(..part.len()))
                        {
                            into.copy_from_slice(from);
                        }
                    }
                }
                Err(error) => return Err(Stop::Memory(error)),
            }
        }
        Ok(u64::from_le_bytes(bytes) & target.width.mask())
    }

    /// Writes an operand to RAM or to a device.
    pub(super) fn write(&mut self, target: &Target, value: u64) -> Result<(), Stop> {
        let bytes = value.to_le_bytes();
        let mut rest = bytes.as_slice();
        for &(at, length) in &target.pieces {
            let Some((piece, tail)) = rest.split_at_checked(length) else { break };
            rest = tail;
            if piece.is_empty() {
                continue;
            }
            match self.bus.memory().write(at, piece) {
                Ok(()) => {}
                Err(MemoryError::NotRam { .. }) => {
                    for (at, part) in aligned_parts(at, piece.len()) {
                        let mut value = [0; 8];
                        if let (Some(into), Some(from)) =
                            (value.get_mut(..part.len()), piece.get(part.clone()))
                        {
                            into.copy_from_slice(from);
                        }
                        self.bus.mmio_write(at, part.len() as u8, u64::from_le_bytes(value));
                    }
                }
                Err(error) => return Err(Stop::Memory(error)),
            }
        }
        Ok(())
    }
}

/// Index, bit offset and width of a general-purpose register.
fn locate(register: Register) -> Option<(Gpr, u32, Width)> {
    if !register.is_gpr() {
        return None;
    }
    let width = Width::new(register.size())?;
    match register {
        Register::AH => Some((Gpr::Rax, 8, width)),
        Register::CH => Some((Gpr::Rcx, 8, width)),
        Register::DH => Some((Gpr::Rdx, 8, width)),
        Register::BH => Some((Gpr::Rbx, 8, width)),
        _ => Some((Gpr::from_number(register.full_register().number() as u8), 0, width)),
    }
}

/// Whether a protected-mode segment may be read or written.
const fn permits(segment: &Segment, write: bool) -> bool {
    let code = segment.attributes & SEGMENT_CODE != 0;
    let access = segment.attributes & SEGMENT_ACCESS != 0;
    let allowed = if code { !write && access } else { !write || access };
    segment.attributes & SEGMENT_PRESENT != 0 && allowed
}

/// Whether `last + 1` bytes from `offset` on are within the segment's limit.
const fn within(segment: &Segment, offset: u64, last: u64) -> bool {
    let Some(end) = offset.checked_add(last) else { return false };
    let expands_down = segment.attributes & (SEGMENT_CODE | SEGMENT_EXPAND_DOWN) == SEGMENT_EXPAND_DOWN;
    let limit = segment.limit as u64;
    if expands_down {
        let top = if segment.is_32_bit() { 0xFFFF_FFFF } else { 0xFFFF };
        offset > limit && end <= top
    } else {
        end <= limit
    }
}

/// Cuts `length` bytes at `at` into accesses that a bus can make: 1, 2, 4 or 8 bytes. A whole access of such a size stays whole.
fn aligned_parts(
    at: GuestPhysAddr,
    length: usize,
) -> impl Iterator<Item = (GuestPhysAddr, core::ops::Range<usize>)> {
    let mut done = 0;
    core::iter::from_fn(move || {
        let left = length - done;
        if left == 0 {
            return None;
        }
        let size = if length.is_power_of_two() { length } else { 1 << left.ilog2() };
        let part = done..done + size;
        let address = GuestPhysAddr(at.0.wrapping_add(done as u64));
        done += size;
        Some((address, part))
    })
}
