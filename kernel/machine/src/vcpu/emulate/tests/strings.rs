//! String instructions.

use super::super::flags::{CARRY, DIRECTION, ZERO};
use super::super::string::ITERATIONS;
use super::*;

#[test]
fn repeated_moves_copy_between_ram_and_device() {
    // rep movsd
    let (state, board) = run(&[0xF3, 0xA5], |state, board| {
        board.put(DATA_FRAME, &[1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]);
        state.registers.set(Gpr::Rsi, DATA);
        state.registers.set(Gpr::Rdi, DEVICE);
        state.registers.set(Gpr::Rcx, 3);
    });
    let written: Vec<_> = (0..3).map(|i| Event::Write(DEVICE + i * 4, 4, i + 1)).collect();
    assert_eq!(board.events, written);
    assert_eq!(state.registers.get(Gpr::Rcx), 0);
    assert_eq!(state.registers.get(Gpr::Rsi), DATA + 12);
    assert_eq!(state.registers.get(Gpr::Rdi), DEVICE + 12);
}

#[test]
fn the_direction_flag_turns_strings_around() {
    // rep stosb
    let (state, board) = run(&[0xF3, 0xAA], |state, _| {
        state.registers.rflags |= DIRECTION;
        state.registers.set(Gpr::Rax, 0x5A);
        state.registers.set(Gpr::Rdi, DEVICE + 1);
        state.registers.set(Gpr::Rcx, 2);
    });
    assert_eq!(board.events, [Event::Write(DEVICE + 1, 1, 0x5A), Event::Write(DEVICE, 1, 0x5A)]);
    assert_eq!(state.registers.get(Gpr::Rdi), DEVICE - 1);
}

#[test]
fn a_load_without_repetition_ignores_the_count() {
    let (state, board) = run(&[0x48, 0xAD], |state, board| {
        board.set_device(0, 0x1122_3344_5566_7788);
        state.registers.set(Gpr::Rsi, DEVICE);
    });
    assert_eq!(state.registers.get(Gpr::Rax), 0x1122_3344_5566_7788);
    assert_eq!(board.events, [Event::Read(DEVICE, 8)]);
    assert_eq!(state.registers.get(Gpr::Rcx), 0);
}

#[test]
fn a_count_of_zero_does_nothing() {
    let (state, board) = run(&[0xF3, 0xA4], |_, _| {});
    assert!(board.events.is_empty());
    assert_eq!(state.registers.get(Gpr::Rdi), 0);
}

#[test]
fn a_long_repetition_is_done_in_parts() {
    // rep outsb: RIP stays until the last part is done
    let (mut state, mut board) = long_mode(&[0xF3, 0x6E]);
    state.registers.set(Gpr::Rsi, CODE);
    state.registers.set(Gpr::Rdx, 0x3F8);
    state.registers.set(Gpr::Rcx, u64::from(ITERATIONS) + 1);
    assert_eq!(emulate(&mut state, &mut board), Emulation::Partial);
    assert_eq!((state.registers.rip, state.registers.get(Gpr::Rcx)), (CODE, 1));
    assert_eq!(emulate(&mut state, &mut board), Emulation::Done);
    assert_eq!((state.registers.rip, state.registers.get(Gpr::Rcx)), (CODE + 2, 0));
    assert_eq!(board.events.len() as u32, ITERATIONS + 1);
}

#[test]
fn a_fault_within_a_repetition_keeps_what_was_done() {
    // rep movsb from the last two bytes of the device's page into the one behind it
    let (mut state, mut board) = long_mode(&[0xF3, 0xA4]);
    state.registers.set(Gpr::Rsi, DATA + 0x1FFE);
    state.registers.set(Gpr::Rdi, DATA);
    state.registers.set(Gpr::Rcx, 5);
    assert_eq!(emulate(&mut state, &mut board), Emulation::Fault(Exception::page_fault(DATA + 0x2000, 0)));
    assert_eq!(state.registers.get(Gpr::Rcx), 3);
    assert_eq!(state.registers.get(Gpr::Rdi), DATA + 2);
    assert_eq!(state.registers.rip, CODE);
}

#[test]
fn comparisons_stop_at_the_first_difference() {
    // repe cmpsb
    let (state, _) = run(&[0xF3, 0xA6], |state, board| {
        board.put(DATA_FRAME, b"abcX");
        board.device[..4].copy_from_slice(b"abcd");
        state.registers.set(Gpr::Rsi, DATA);
        state.registers.set(Gpr::Rdi, DEVICE);
        state.registers.set(Gpr::Rcx, 10);
    });
    assert_eq!(state.registers.get(Gpr::Rcx), 6);
    assert_eq!(state.registers.rflags & (ZERO | CARRY), CARRY);
    // repne scasb finds the zero
    let (state, _) = run(&[0xF2, 0xAE], |state, board| {
        board.device[..4].copy_from_slice(b"abc\0");
        state.registers.set(Gpr::Rdi, DEVICE);
        state.registers.set(Gpr::Rcx, u64::MAX);
    });
    assert_eq!(state.registers.get(Gpr::Rdi), DEVICE + 4);
    assert_ne!(state.registers.rflags & ZERO, 0);
}

#[test]
fn string_input_writes_to_memory_and_string_output_reads_it() {
    // rep insw
    let (_, mut board) = run(&[0x66, 0xF3, 0x6D], |state, board| {
        board.input = 0x10;
        state.registers.set(Gpr::Rdx, 0x1F0);
        state.registers.set(Gpr::Rdi, DATA);
        state.registers.set(Gpr::Rcx, 2);
    });
    assert_eq!(board.events, [Event::In(0x1F0, 2), Event::In(0x1F0, 2)]);
    assert_eq!(board.ram.read_u32(GuestPhysAddr(DATA_FRAME)), Ok(0x0012_0011));
    // outs dx, dword fs:[rsi]
    board.events.clear();
    let (_, board) = run(&[0x64, 0x6F], |state, board| {
        board.put(DATA_FRAME + 8, &[1, 2, 3, 4]);
        state.registers.set(Gpr::Rdx, 0xFFFF_0CF8);
        state.registers.set(Gpr::Rsi, 8);
        state.system.fs.base = DATA;
    });
    assert_eq!(board.events, [Event::Out(0xCF8, 4, 0x0403_0201)]);
}

#[test]
fn input_does_not_touch_the_port_when_memory_faults() {
    let (mut state, mut board) = long_mode(&[0x6C]);
    state.registers.set(Gpr::Rdi, DATA + 0x2000);
    assert_eq!(emulate(&mut state, &mut board), Emulation::Fault(Exception::page_fault(DATA + 0x2000, 2)));
    assert!(board.events.is_empty());
}

#[test]
fn a_32_bit_address_size_counts_in_ecx() {
    // a32 rep stosb
    let (state, board) = run(&[0x67, 0xF3, 0xAA], |state, _| {
        state.registers.set(Gpr::Rdi, 0xFFFF_FFFF_0000_0000 | DEVICE);
        state.registers.set(Gpr::Rcx, 0xFFFF_FFFF_0000_0002);
    });
    assert_eq!(board.events.len(), 2);
    assert_eq!(state.registers.get(Gpr::Rcx), 0);
    assert_eq!(state.registers.get(Gpr::Rdi), DEVICE + 2);
}

#[test]
fn single_step_traps_after_each_iteration() {
    // rep outsb
    let (mut state, mut board) = long_mode(&[0xF3, 0x6E]);
    state.registers.set(Gpr::Rsi, CODE);
    state.registers.set(Gpr::Rcx, 2);
    state.registers.rflags |= 1 << 8;
    let debug = Emulation::Fault(Exception { vector: Vector(1), error_code: None, cr2: None });
    for (left, rip) in [(1, CODE), (0, CODE + 2)] {
        state.system.dr6 = 0xFFFF_0FF0;
        assert_eq!(emulate(&mut state, &mut board), debug);
        assert_eq!((state.registers.get(Gpr::Rcx), state.registers.rip), (left, rip));
        assert_eq!(state.system.dr6, 0xFFFF_4FF0);
    }
}
