//! Nothing that a guest can arrange makes the emulator panic, or run on.

use super::*;
use crate::address::GuestVirtAddr;
use proptest::prelude::*;

/// Long mode, PAE, two-level paging, protected mode, 16-bit protected mode, real mode.
fn mode(number: u8, state: &mut VcpuState) {
    match number % 6 {
        1 => state.system.efer = EFER_NXE,
        2 => (state.system.efer, state.system.cr4) = (0, 1 << 4),
        3 => (state.system.efer, state.system.cr0) = (0, 0x33),
        4 => (state.system.efer, state.system.cr0, state.system.cs.attributes) = (0, 0x33, 0x9B),
        5 => (state.system.efer, state.system.cr0, state.system.cs.base) = (0, 0x10, CODE),
        _ => {}
    }
    match number % 6 {
        0 => {}
        5 => (state.system.cs.attributes, state.registers.rip) = (0x9B, 0),
        4 => state.registers.rip = CODE,
        _ => state.system.cs.attributes = 0xC9B,
    }
}

fn interesting() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        Just(DEVICE),
        Just(DATA),
        (0..0x3000_u64).prop_map(|offset| DATA + offset),
        (0..0x1000_u64).prop_map(|offset| DEVICE + offset),
        0..0x2000_u64,
        Just(u64::MAX),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_in_any_mode_end_orderly(
        code in prop::collection::vec(any::<u8>(), 1..20),
        mode_number in 0..6_u8,
        gpr in prop::array::uniform16(interesting()),
        rflags in any::<u64>(),
        cpl in prop_oneof![Just(0_u8), Just(3)],
    ) {
        let (mut state, mut board) = long_mode(&code);
        mode(mode_number, &mut state);
        state.registers.gpr = gpr;
        state.registers.rflags = rflags & !(1 << 17);
        state.system.cpl = cpl;
        let before = state;
        let length = instruction_length(&state, &mut board.ram);
        match emulate(&mut state, &mut board) {
            Emulation::Done => {
                let advanced = state.registers.rip.wrapping_sub(before.registers.rip);
                prop_assert_eq!(Ok(advanced as u8), length, "{:02x?}", code);
            }
            Emulation::Partial => prop_assert_eq!(state.registers.rip, before.registers.rip),
            Emulation::Unsupported { .. } => {
                prop_assert_eq!(state.registers.gpr, before.registers.gpr);
                prop_assert!(board.events.is_empty());
            }
            Emulation::Fault(_) | Emulation::Memory(_) => {}
        }
    }

    #[test]
    fn random_opcodes_that_reach_memory_end_orderly(
        opcode in prop_oneof![
            any::<u8>().prop_map(|byte| alloc::vec![byte]),
            any::<u8>().prop_map(|byte| alloc::vec![0x0F, byte]),
            any::<u8>().prop_map(|byte| alloc::vec![0x48, byte]),
            any::<u8>().prop_map(|byte| alloc::vec![0xF3, byte]),
            any::<u8>().prop_map(|byte| alloc::vec![0x66, 0x0F, byte]),
        ],
        register in 0..8_u8,
        gpr in prop::array::uniform16(interesting()),
        tail in prop::array::uniform4(any::<u8>()),
    ) {
        let mut code = opcode;
        code.push(register << 3 | 0x03);
        code.extend_from_slice(&tail);
        let (mut state, mut board) = long_mode(&code);
        state.registers.gpr = gpr;
        let _ = emulate(&mut state, &mut board);
        prop_assert!(board.events.len() <= 4096);
    }

    #[test]
    fn random_page_tables_end_orderly(
        tables in prop::collection::vec(any::<u64>(), 64),
        control in any::<(u64, u64, u64, u64)>(),
        address in interesting(),
        access in any::<(bool, bool, bool)>(),
    ) {
        let (mut state, mut board) = long_mode(&[]);
        for (index, entry) in tables.iter().enumerate() {
            // Most entries point into RAM, so that walks get somewhere.
            let entry = if index % 4 == 0 { *entry } else { entry & 0x8000_0000_0003_FFFF };
            board.put_u64((index as u64 * 0x4E8) & 0x3_FFF8, entry);
        }
        (state.system.cr0, state.system.cr3, state.system.cr4, state.system.efer) = control;
        state.system.cr3 &= 0x3_FFFF;
        let access = Access { write: access.0, execute: access.1, user: access.2 };
        let _ = translate(&state, &mut board.ram, GuestVirtAddr(address), access);
        state.registers.rip = address;
        let _ = instruction_length(&state, &mut board.ram);
    }

    #[test]
    fn random_segments_end_orderly(
        attributes in any::<u16>(),
        limit in any::<u32>(),
        base in any::<u64>(),
        offset in any::<u64>(),
        opcode in any::<u8>(),
    ) {
        let (mut state, mut board) = protected_mode(&[opcode, 0x03]);
        state.system.ds = Segment { selector: 0, attributes, limit, base };
        state.system.es = state.system.ds;
        state.registers.set(Gpr::Rbx, offset);
        state.registers.set(Gpr::Rdi, offset);
        let _ = emulate(&mut state, &mut board);
    }
}
