//! Instructions run against a small machine: RAM at 0, a device at [`DEVICE`], and page tables that map both.

mod instructions;
mod paging;
mod properties;
mod strings;

use super::*;
use crate::state::{EFER_LMA, EFER_LME, EFER_NXE, Gpr, Segment, VcpuState};
use crate::testing::Ram;
use alloc::vec::Vec;

pub(super) const RAM_SIZE: usize = 0x4_0000;
/// Where the tests' instructions are.
pub(super) const CODE: u64 = 0x1_0000;
/// Physical and linear address of a page where no RAM is.
pub(super) const DEVICE: u64 = 0xE010_0000;
/// A linear page of RAM (at [`DATA_FRAME`]), followed by one of the device, followed by nothing.
pub(super) const DATA: u64 = 0x20_0000;
pub(super) const DATA_FRAME: u64 = 0x2_0000;

/// An access that reached a device or a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Event {
    Read(u64, u8),
    Write(u64, u8, u64),
    In(u16, u8),
    Out(u16, u8, u32),
}

/// The tests' machine.
pub(super) struct Board {
    pub(super) ram: Ram,
    pub(super) device: [u8; 0x1000],
    pub(super) events: Vec<Event>,
    pub(super) input: u32,
}

impl Bus for Board {
    fn memory(&mut self) -> &mut dyn GuestMemory {
        &mut self.ram
    }

    fn mmio_read(&mut self, at: GuestPhysAddr, width: u8) -> u64 {
        self.events.push(Event::Read(at.0, width));
        let mut bytes = [0xFF; 8];
        for (index, byte) in bytes.iter_mut().enumerate() {
            let offset = at.0.wrapping_sub(DEVICE).wrapping_add(index as u64);
            *byte = self.device.get(offset as usize).copied().unwrap_or(0xFF);
        }
        u64::from_le_bytes(bytes)
    }

    fn mmio_write(&mut self, at: GuestPhysAddr, width: u8, value: u64) {
        self.events.push(Event::Write(at.0, width, value));
        for (index, byte) in value.to_le_bytes().into_iter().take(usize::from(width)).enumerate() {
            let offset = at.0.wrapping_sub(DEVICE).wrapping_add(index as u64);
            if let Some(slot) = self.device.get_mut(offset as usize) {
                *slot = byte;
            }
        }
    }

    fn pio_read(&mut self, port: u16, width: u8) -> u32 {
        self.events.push(Event::In(port, width));
        self.input = self.input.wrapping_add(1);
        self.input
    }

    fn pio_write(&mut self, port: u16, width: u8, value: u32) {
        self.events.push(Event::Out(port, width, value));
    }
}

impl Board {
    pub(super) fn empty() -> Self {
        Self { ram: Ram::new(RAM_SIZE), device: [0; 0x1000], events: Vec::new(), input: 0 }
    }

    pub(super) fn put(&mut self, at: u64, bytes: &[u8]) {
        self.ram.write(GuestPhysAddr(at), bytes).unwrap();
    }

    pub(super) fn put_u64(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    pub(super) fn device_u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.device[offset..offset + 8].try_into().unwrap())
    }

    pub(super) fn set_device(&mut self, offset: usize, value: u64) {
        self.device[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    }
}

/// A flat segment of packed attributes.
pub(super) fn segment(attributes: u16) -> Segment {
    Segment { selector: 8, attributes, limit: u32::MAX, base: 0 }
}

/// 64-bit kernel code at [`CODE`].
pub(super) fn long_mode(code: &[u8]) -> (VcpuState, Board) {
    let mut board = Board::empty();
    board.put(CODE, code);
    // 2 MiB pages for the first GiB but DATA's, a 1 GiB page around the device.
    board.put_u64(0x1000, 0x2000 | 0x27);
    board.put_u64(0x2000, 0x3000 | 0x27);
    board.put_u64(0x2000 + 3 * 8, 0xC000_0000 | 0xE7);
    board.put_u64(0x3000, 0xE7);
    board.put_u64(0x3000 + 8, 0x4000 | 0x27);
    board.put_u64(0x4000, DATA_FRAME | 0x67);
    board.put_u64(0x4000 + 8, DEVICE | 0x67);

    let mut state = VcpuState::default();
    state.system.cr0 = 0x8001_0033;
    state.system.cr3 = 0x1000;
    state.system.cr4 = 1 << 5;
    state.system.efer = EFER_LMA | EFER_LME | EFER_NXE;
    state.system.cs = segment(0xA9B);
    for data in [&mut state.system.ds, &mut state.system.es, &mut state.system.ss] {
        *data = segment(0xC93);
    }
    state.registers.rip = CODE;
    state.registers.rflags = 2;
    (state, board)
}

/// 32-bit flat code without paging at [`CODE`].
pub(super) fn protected_mode(code: &[u8]) -> (VcpuState, Board) {
    let (mut state, board) = long_mode(code);
    state.system.cr0 = 0x33;
    state.system.efer = 0;
    state.system.cs = segment(0xC9B);
    (state, board)
}

/// Runs one instruction to its end, with RBX at the device.
pub(super) fn run(code: &[u8], prepare: impl FnOnce(&mut VcpuState, &mut Board)) -> (VcpuState, Board) {
    let (mut state, mut board) = long_mode(code);
    state.registers.set(Gpr::Rbx, DEVICE);
    prepare(&mut state, &mut board);
    assert_eq!(emulate(&mut state, &mut board), Emulation::Done, "{code:02x?}");
    assert_eq!(state.registers.rip, CODE + code.len() as u64, "{code:02x?}");
    (state, board)
}
