//! Page walks.

use super::*;
use crate::address::GuestVirtAddr;

const READ: Access = Access { write: false, execute: false, user: false };
const WRITE: Access = Access { write: true, ..READ };
const FETCH: Access = Access { execute: true, ..READ };
const USER_READ: Access = Access { user: true, ..READ };
const USER_WRITE: Access = Access { write: true, ..USER_READ };

fn walk(state: &VcpuState, board: &mut Board, address: u64, access: Access) -> Result<u64, Stop> {
    translate(state, &mut board.ram, GuestVirtAddr(address), access).map(|at| at.0)
}

fn fault(address: u64, code: u32) -> Result<u64, Stop> {
    Err(Stop::Exception(Exception::page_fault(address, code)))
}

#[test]
fn every_page_size_of_long_mode_translates() {
    let (state, mut board) = long_mode(&[]);
    assert_eq!(walk(&state, &mut board, 0x12_3456, READ), Ok(0x12_3456));
    assert_eq!(walk(&state, &mut board, DATA + 0x123, READ), Ok(DATA_FRAME + 0x123));
    assert_eq!(walk(&state, &mut board, 0xFEE0_0020, READ), Ok(0xFEE0_0020));
    assert_eq!(walk(&state, &mut board, 0x1_0000_0000, READ), fault(0x1_0000_0000, 0));
}

#[test]
fn five_level_paging_adds_a_level() {
    let (mut state, mut board) = long_mode(&[]);
    board.put_u64(0x5000 + 8 * 2, 0x1000 | 0x27);
    state.system.cr3 = 0x5000;
    state.system.cr4 |= 1 << 12;
    let base = 2_u64 << 48;
    assert_eq!(walk(&state, &mut board, base + DATA, READ), Ok(DATA_FRAME));
    assert_eq!(walk(&state, &mut board, DATA, READ), fault(DATA, 0));
}

#[test]
fn pae_paging_ignores_rights_in_its_top_level() {
    let (mut state, mut board) = long_mode(&[]);
    state.system.efer = 0;
    board.put_u64(0x2020, 0x3000 | 1);
    state.system.cr3 = 0x2020;
    assert_eq!(walk(&state, &mut board, DATA + 5, USER_WRITE), Ok(DATA_FRAME + 5));
    // A right in it is reserved.
    board.put_u64(0x2020, 0x3000 | 3);
    assert_eq!(walk(&state, &mut board, DATA, READ), fault(DATA, 0b1001));
}

#[test]
fn two_level_paging_has_4_mib_pages_up_to_40_bits() {
    let (mut state, mut board) = long_mode(&[]);
    state.system.efer = 0;
    state.system.cr4 = 1 << 4;
    state.system.cr3 = 0x6000;
    board.put(0x6000 + 4, &(0x0080_00E7_u32 | 0x12 << 13).to_le_bytes());
    assert_eq!(walk(&state, &mut board, 0x40_1234, USER_WRITE), Ok(0x12_0080_1234));
    board.put(0x6000 + 8, &0x7067_u32.to_le_bytes());
    board.put(0x7000 + 12, &0xE010_0067_u32.to_le_bytes());
    assert_eq!(walk(&state, &mut board, 0x80_3008, READ), Ok(0xE010_0008));
    // Without CR4.PSE the large-page bit means nothing.
    state.system.cr4 = 0;
    assert_eq!(
        walk(&state, &mut board, 0x40_1234, READ),
        fault(0x40_1234, 0b1001),
        "its table is not in RAM"
    );
}

#[test]
fn accessed_and_dirty_flags_are_set_on_the_way() {
    let (state, mut board) = long_mode(&[]);
    for at in [0x1000, 0x2000, 0x3000 + 8, 0x4000] {
        let entry = board.ram.read_u64(GuestPhysAddr(at)).unwrap();
        board.put_u64(at, entry & !0x60);
    }
    let flags = |board: &Board| [0x1000, 0x2000, 0x3008, 0x4000].map(|at| board.ram.0[at] & 0x60);
    walk(&state, &mut board, DATA, READ).unwrap();
    assert_eq!(flags(&board), [0x20; 4]);
    walk(&state, &mut board, DATA, WRITE).unwrap();
    assert_eq!(flags(&board), [0x20, 0x20, 0x20, 0x60]);
}

#[test]
fn a_refused_access_sets_no_flags() {
    let (state, mut board) = long_mode(&[]);
    board.put_u64(0x4000, DATA_FRAME | 0x05);
    assert_eq!(walk(&state, &mut board, DATA, USER_WRITE), fault(DATA, 0b111));
    assert_eq!(board.ram.0[0x4000], 0x05);
}

#[test]
fn rights_are_those_of_every_level() {
    let (mut state, mut board) = long_mode(&[]);
    // The directory entry is for the supervisor only and read-only.
    board.put_u64(0x3000 + 8, 0x4000 | 0x21);
    assert_eq!(walk(&state, &mut board, DATA, USER_READ), fault(DATA, 0b101));
    assert_eq!(walk(&state, &mut board, DATA, WRITE), fault(DATA, 0b011));
    state.system.cr0 &= !(1 << 16);
    assert_eq!(
        walk(&state, &mut board, DATA, WRITE),
        Ok(DATA_FRAME),
        "without write protection a supervisor may"
    );
    assert_eq!(walk(&state, &mut board, DATA, USER_WRITE), fault(DATA, 0b111));
}

#[test]
fn no_execute_counts_at_any_level_and_is_reserved_when_off() {
    let (mut state, mut board) = long_mode(&[]);
    board.put_u64(0x2000, 0x3000 | 0x27 | 1 << 63);
    assert_eq!(walk(&state, &mut board, DATA, FETCH), fault(DATA, 0b1_0001));
    assert_eq!(walk(&state, &mut board, DATA, READ), Ok(DATA_FRAME));
    state.system.efer &= !EFER_NXE;
    assert_eq!(walk(&state, &mut board, DATA, READ), fault(DATA, 0b1001));
}

#[test]
fn a_supervisor_neither_runs_nor_touches_user_pages_unless_told() {
    let (mut state, mut board) = long_mode(&[]);
    state.system.cr4 |= 1 << 20 | 1 << 21;
    assert_eq!(walk(&state, &mut board, DATA, FETCH), fault(DATA, 0b1_0001));
    assert_eq!(walk(&state, &mut board, DATA, READ), fault(DATA, 0b0001));
    state.registers.rflags |= 1 << 18;
    assert_eq!(walk(&state, &mut board, DATA, READ), Ok(DATA_FRAME));
    assert_eq!(walk(&state, &mut board, DATA, FETCH), fault(DATA, 0b1_0001));
    assert_eq!(walk(&state, &mut board, DATA, USER_WRITE), Ok(DATA_FRAME));
}

#[test]
fn misaligned_large_pages_and_large_bits_too_high_are_reserved() {
    let (state, mut board) = long_mode(&[]);
    board.put_u64(0x3000, 0xE7 | 1 << 13);
    assert_eq!(walk(&state, &mut board, 0, READ), fault(0, 0b1001));
    board.put_u64(0x1000, 0x2000 | 0xA7);
    assert_eq!(walk(&state, &mut board, DATA, READ), fault(DATA, 0b1001));
}

#[test]
fn without_paging_addresses_are_32_bits() {
    let (mut state, mut board) = protected_mode(&[]);
    state.system.cr3 = u64::MAX;
    assert_eq!(walk(&state, &mut board, 0x1_2345_6789, USER_WRITE), Ok(0x2345_6789));
}

#[test]
fn tables_outside_ram_fault() {
    let (mut state, mut board) = long_mode(&[]);
    state.system.cr3 = 0xFEE0_0000;
    assert_eq!(walk(&state, &mut board, 0x1000, USER_READ), fault(0x1000, 0b1101));
}
