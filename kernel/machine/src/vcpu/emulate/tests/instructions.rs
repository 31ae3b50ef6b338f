//! One instruction each.

use super::super::flags::{ADJUST, CARRY, OVERFLOW, PARITY, SIGN, ZERO};
use super::*;

const STATUS: u64 = CARRY | PARITY | ADJUST | ZERO | SIGN | OVERFLOW;

#[test]
fn a_load_takes_as_many_bytes_as_its_register_has() {
    let value = 0x8877_6655_4433_2211;
    for (code, width, expected) in [
        (&[0x8A, 0x03][..], 1, 0xAAAA_AAAA_AAAA_AA11), // mov al, [rbx]
        (&[0x8A, 0x23], 1, 0xAAAA_AAAA_AAAA_11AA),     // mov ah, [rbx]
        (&[0x66, 0x8B, 0x03], 2, 0xAAAA_AAAA_AAAA_2211),
        (&[0x8B, 0x03], 4, 0x4433_2211),
        (&[0x48, 0x8B, 0x03], 8, value),
        (&[0x0F, 0xB6, 0x03], 1, 0x11),         // movzx eax, byte
        (&[0x48, 0x0F, 0xB7, 0x03], 2, 0x2211), // movzx rax, word
    ] {
        let (state, board) = run(code, |state, board| {
            state.registers.set(Gpr::Rax, 0xAAAA_AAAA_AAAA_AAAA);
            board.set_device(0, value);
        });
        assert_eq!(state.registers.get(Gpr::Rax), expected, "{code:02x?}");
        assert_eq!(board.events, [Event::Read(DEVICE, width)]);
    }
}

#[test]
fn sign_extension_follows_the_source_width() {
    for (code, value, expected) in [
        (&[0x0F, 0xBE, 0x03][..], 0x80, 0xFFFF_FF80), // movsx eax, byte
        (&[0x48, 0x0F, 0xBE, 0x03], 0x80, 0xFFFF_FFFF_FFFF_FF80), // movsx rax, byte
        (&[0x48, 0x0F, 0xBF, 0x03], 0x8001, 0xFFFF_FFFF_FFFF_8001), // movsx rax, word
        (&[0x48, 0x63, 0x03], 0x8000_0001, 0xFFFF_FFFF_8000_0001), // movsxd rax, dword
        (&[0x66, 0x0F, 0xBE, 0x03], 0x80, 0xAAAA_AAAA_AAAA_FF80), // movsx ax, byte
    ] {
        let (state, _) = run(code, |state, board| {
            state.registers.set(Gpr::Rax, 0xAAAA_AAAA_AAAA_AAAA);
            board.set_device(0, value);
        });
        assert_eq!(state.registers.get(Gpr::Rax), expected, "{code:02x?}");
    }
}

#[test]
fn a_store_writes_as_many_bytes_as_its_operand_has() {
    for (code, width, value) in [
        (&[0x88, 0x03][..], 1, 0x88),
        (&[0x88, 0x23], 1, 0x77), // ah
        (&[0x66, 0x89, 0x03], 2, 0x7788),
        (&[0x89, 0x03], 4, 0x5566_7788),
        (&[0x48, 0x89, 0x03], 8, 0x1122_3344_5566_7788),
        (&[0x0F, 0xC3, 0x03], 4, 0x5566_7788), // movnti
        (&[0xC6, 0x03, 0x5A], 1, 0x5A),
        (&[0xC7, 0x03, 0x78, 0x56, 0x34, 0x12], 4, 0x1234_5678),
        (&[0x48, 0xC7, 0x03, 0xFF, 0xFF, 0xFF, 0xFF], 8, u64::MAX), // sign-extended immediate
        (&[0x0F, 0x38, 0xF1, 0x03], 4, 0x8877_6655),                // movbe
    ] {
        let (_, board) = run(code, |state, _| state.registers.set(Gpr::Rax, 0x1122_3344_5566_7788));
        assert_eq!(board.events, [Event::Write(DEVICE, width, value)], "{code:02x?}");
    }
}

#[test]
fn an_absolute_offset_reaches_the_device() {
    let mut code = alloc::vec![0xA3];
    code.extend_from_slice(&(DEVICE + 0x10).to_le_bytes());
    let (_, board) = run(&code, |state, _| state.registers.set(Gpr::Rax, 0x1234));
    assert_eq!(board.events, [Event::Write(DEVICE + 0x10, 4, 0x1234)]);
}

#[test]
fn addresses_add_base_scaled_index_displacement_and_segment_base() {
    // mov eax, fs:[rbx + rcx*4 - 8]
    let (_, board) = run(&[0x64, 0x8B, 0x44, 0x8B, 0xF8], |state, _| {
        state.registers.set(Gpr::Rbx, 0x100);
        state.registers.set(Gpr::Rcx, 2);
        state.system.fs.base = DEVICE;
    });
    assert_eq!(board.events, [Event::Read(DEVICE + 0x100, 4)]);
    // mov eax, [rip + displacement]
    let displacement = (DATA + 0x1010 - CODE - 6) as u32;
    let mut code = alloc::vec![0x8B, 0x05];
    code.extend_from_slice(&displacement.to_le_bytes());
    let (_, board) = run(&code, |_, _| {});
    assert_eq!(board.events, [Event::Read(DEVICE + 0x10, 4)]);
}

#[test]
fn a_32_bit_address_size_wraps_at_4_gib() {
    // mov eax, [ebx + 0x10] with RBX's upper half set
    let (_, board) = run(&[0x67, 0x8B, 0x43, 0x10], |state, _| {
        state.registers.set(Gpr::Rbx, 0xFFFF_FFFF_0000_0000 | DEVICE)
    });
    assert_eq!(board.events, [Event::Read(DEVICE + 0x10, 4)]);
}

#[test]
fn read_modify_write_reads_once_and_writes_once() {
    for (code, before, after, flags) in [
        (&[0x09, 0x03][..], 0xF0, 0xFF, PARITY),    // or [rbx], eax
        (&[0x21, 0x03], 0xF0, 0x00, ZERO | PARITY), // and
        (&[0x31, 0x03], 0xFF, 0xF0, PARITY),        // xor
        (&[0x01, 0x03], 0xFFFF_FFF1, 0x0000_0000, CARRY | ZERO | PARITY | ADJUST), // add
        (&[0x29, 0x03], 0x0000_0000, 0xFFFF_FFF1, CARRY | SIGN | ADJUST), // sub
        (&[0xF0, 0x83, 0x0B, 0x01], 0x02, 0x03, PARITY), // lock or dword [rbx], 1
        (&[0xFF, 0x03], 0x7FFF_FFFF, 0x8000_0000, SIGN | OVERFLOW | ADJUST | PARITY), // inc
        (&[0xFF, 0x0B], 0x0000_0001, 0x0000_0000, ZERO | PARITY), // dec
        (&[0xF7, 0x1B], 0x0000_0001, 0xFFFF_FFFF, CARRY | SIGN | PARITY | ADJUST), // neg
        (&[0xF7, 0x13], 0x0000_0000, 0xFFFF_FFFF, 0), // not
    ] {
        let (state, board) = run(code, |state, board| {
            state.registers.set(Gpr::Rax, 0x0F);
            board.set_device(0, before);
        });
        assert_eq!(board.events, [Event::Read(DEVICE, 4), Event::Write(DEVICE, 4, after)], "{code:02x?}");
        assert_eq!(state.registers.rflags & STATUS, flags, "{code:02x?}");
    }
}

#[test]
fn increment_leaves_the_carry_flag_alone() {
    let (state, _) = run(&[0xFE, 0x03], |state, board| {
        state.registers.rflags |= CARRY;
        board.set_device(0, 0xFF);
    });
    assert_eq!(state.registers.rflags & STATUS, CARRY | ZERO | PARITY | ADJUST);
}

#[test]
fn comparisons_change_flags_only() {
    // cmp dword [rbx], 5
    let (state, board) = run(&[0x83, 0x3B, 0x05], |_, board| board.set_device(0, 3));
    assert_eq!(state.registers.rflags & STATUS, CARRY | SIGN | ADJUST);
    assert_eq!(board.events, [Event::Read(DEVICE, 4)]);
    // test byte [rbx], 0x80
    let (state, _) = run(&[0xF6, 0x03, 0x80], |_, board| board.set_device(0, 0x81));
    assert_eq!(state.registers.rflags & STATUS, SIGN);
}

#[test]
fn carry_goes_into_adc_and_sbb() {
    let (_, board) = run(&[0x11, 0x03], |state, board| {
        state.registers.rflags |= CARRY;
        state.registers.set(Gpr::Rax, 1);
        board.set_device(0, 1);
    });
    assert_eq!(board.device_u64(0), 3);
    let (state, board) = run(&[0x19, 0x03], |state, board| {
        state.registers.rflags |= CARRY;
        state.registers.set(Gpr::Rax, u64::from(u32::MAX));
        board.set_device(0, 0);
    });
    assert_eq!(board.device_u64(0), 0);
    assert_ne!(state.registers.rflags & CARRY, 0);
}

#[test]
fn exchanges_give_the_old_value_back() {
    let (state, board) = run(&[0x87, 0x03], |state, board| {
        state.registers.set(Gpr::Rax, 7);
        board.set_device(0, 9);
    });
    assert_eq!((state.registers.get(Gpr::Rax), board.device_u64(0)), (9, 7));
    let (state, board) = run(&[0xF0, 0x0F, 0xC1, 0x03], |state, board| {
        state.registers.set(Gpr::Rax, 7);
        board.set_device(0, 9);
    });
    assert_eq!((state.registers.get(Gpr::Rax), board.device_u64(0)), (9, 16));
}

#[test]
fn compare_and_exchange_writes_only_what_matches() {
    let prepare = |expected: u64| {
        move |state: &mut VcpuState, board: &mut Board| {
            state.registers.set(Gpr::Rax, expected);
            state.registers.set(Gpr::Rcx, 0x55);
            board.set_device(0, 0x11);
        }
    };
    let (state, board) = run(&[0xF0, 0x0F, 0xB1, 0x0B], prepare(0x11));
    assert_eq!(board.device_u64(0), 0x55);
    assert_ne!(state.registers.rflags & ZERO, 0);
    let (state, board) = run(&[0xF0, 0x0F, 0xB1, 0x0B], prepare(0x12));
    assert_eq!((board.device_u64(0), state.registers.get(Gpr::Rax)), (0x11, 0x11));
    assert_eq!(state.registers.rflags & ZERO, 0);
}

#[test]
fn the_8_byte_compare_and_exchange_uses_register_pairs() {
    let (state, board) = run(&[0x0F, 0xC7, 0x0F], |state, board| {
        // cmpxchg8b [rdi]
        state.registers.set(Gpr::Rdi, DEVICE);
        state.registers.set(Gpr::Rdx, 2);
        state.registers.set(Gpr::Rax, 1);
        state.registers.set(Gpr::Rcx, 4);
        state.registers.set(Gpr::Rbx, 3);
        board.set_device(0, 0x2_0000_0001);
    });
    assert_eq!(board.device_u64(0), 0x4_0000_0003);
    assert_ne!(state.registers.rflags & ZERO, 0);
}

#[test]
fn a_bit_number_in_a_register_reaches_other_words() {
    // bts [rbx], ecx: bit -1 is the highest of the word below
    let (state, board) = run(&[0x0F, 0xAB, 0x0B], |state, _| {
        state.registers.set(Gpr::Rbx, DEVICE + 4);
        state.registers.set(Gpr::Rcx, u64::from(u32::MAX));
    });
    assert_eq!(board.events, [Event::Read(DEVICE, 4), Event::Write(DEVICE, 4, 1 << 31)]);
    assert_eq!(state.registers.rflags & CARRY, 0);
    // bt qword [rbx], rcx: bit 200 is bit 8 of the fourth word
    let (state, board) = run(&[0x48, 0x0F, 0xA3, 0x0B], |state, board| {
        state.registers.set(Gpr::Rcx, 200);
        board.set_device(24, 1 << 8);
    });
    assert_eq!(board.events, [Event::Read(DEVICE + 24, 8)]);
    assert_ne!(state.registers.rflags & CARRY, 0);
    // btr dword [rbx], 35: an immediate stays in its word
    let (_, board) = run(&[0x0F, 0xBA, 0x33, 35], |_, board| board.set_device(0, 0xFF));
    assert_eq!(board.device_u64(0), 0xF7);
}

#[test]
fn conditions_read_the_flags() {
    let (_, board) = run(&[0x0F, 0x94, 0x03], |state, _| state.registers.rflags |= ZERO); // sete
    assert_eq!(board.events, [Event::Write(DEVICE, 1, 1)]);
    let (state, board) = run(&[0x0F, 0x42, 0x03], |state, board| {
        // cmovb eax, [rbx], which does not hold: the source is read and the upper half cleared all the same
        state.registers.set(Gpr::Rax, 0xFFFF_FFFF_0000_0001);
        board.set_device(0, 5);
    });
    assert_eq!(state.registers.get(Gpr::Rax), 1);
    assert_eq!(board.events, [Event::Read(DEVICE, 4)]);
}

#[test]
fn an_operand_across_two_pages_goes_to_both() {
    // mov [rbx], rax with three bytes in RAM and five in the device
    let (_, mut board) = run(&[0x48, 0x89, 0x03], |state, _| {
        state.registers.set(Gpr::Rbx, DATA + 0xFFD);
        state.registers.set(Gpr::Rax, 0x8877_6655_4433_2211);
    });
    assert_eq!(board.ram.read_u32(GuestPhysAddr(DATA_FRAME + 0xFFC)), Ok(0x3322_1100));
    assert_eq!(board.events, [Event::Write(DEVICE, 4, 0x7766_5544), Event::Write(DEVICE + 4, 1, 0x88)]);
    // and back
    board.events.clear();
    let (mut state, _) = long_mode(&[]);
    board.put(CODE, &[0x48, 0x8B, 0x03]);
    state.registers.set(Gpr::Rbx, DATA + 0xFFD);
    assert_eq!(emulate(&mut state, &mut board), Emulation::Done);
    assert_eq!(state.registers.get(Gpr::Rax), 0x8877_6655_4433_2211);
}

#[test]
fn a_fault_on_the_second_page_leaves_the_first_alone() {
    // add [rbx], rax: the device's page is followed by one that is not present
    let (mut state, mut board) = long_mode(&[0x48, 0x01, 0x03]);
    state.registers.set(Gpr::Rbx, DATA + 0x1FFC);
    let before = state.registers;
    let expected = Exception::page_fault(DATA + 0x2000, 2);
    assert_eq!(emulate(&mut state, &mut board), Emulation::Fault(expected));
    assert!(board.events.is_empty());
    assert_eq!((state.registers.rip, state.registers.rflags), (before.rip, before.rflags));
}

#[test]
fn an_unknown_instruction_is_shown_and_changes_nothing() {
    // movups [rbx], xmm0
    let (mut state, mut board) = long_mode(&[0x0F, 0x11, 0x03]);
    state.registers.set(Gpr::Rbx, DEVICE);
    let Emulation::Unsupported { bytes, length } = emulate(&mut state, &mut board) else { panic!() };
    assert_eq!((bytes[..3].to_vec(), length), (alloc::vec![0x0F, 0x11, 0x03], 15));
    assert_eq!(state.registers.rip, CODE);
}

#[test]
fn single_step_traps_after_the_instruction() {
    let (mut state, mut board) = long_mode(&[0x8B, 0x03]);
    state.registers.set(Gpr::Rbx, DEVICE);
    state.registers.rflags |= 1 << 8 | 1 << 16;
    let Emulation::Fault(exception) = emulate(&mut state, &mut board) else { panic!() };
    assert_eq!(exception.vector, Vector(1));
    assert_eq!(state.registers.rip, CODE + 2);
    assert_ne!(state.system.dr6 & 1 << 14, 0);
    assert_eq!(state.registers.rflags & 1 << 16, 0, "the resume flag ends with the instruction");
}

#[test]
fn segments_check_limits_and_types_outside_64_bit_mode() {
    let attempt = |prepare: &dyn Fn(&mut VcpuState)| {
        // mov [ebx], eax
        let (mut state, mut board) = protected_mode(&[0x89, 0x03]);
        state.registers.set(Gpr::Rbx, 0x100);
        prepare(&mut state);
        emulate(&mut state, &mut board)
    };
    let fault = Emulation::Fault(Exception::GENERAL_PROTECTION);
    assert_eq!(attempt(&|_| {}), Emulation::Done);
    assert_eq!(attempt(&|state| state.system.ds.limit = 0x103), Emulation::Done);
    assert_eq!(attempt(&|state| state.system.ds.limit = 0x102), fault);
    assert_eq!(attempt(&|state| state.system.ds.attributes = 0xC91), fault, "read-only");
    assert_eq!(attempt(&|state| state.system.ds.attributes = 0xC9B), fault, "code");
    assert_eq!(attempt(&|state| state.system.ds.attributes = 0xC13), fault, "not present");
    assert_eq!(
        attempt(&|state| (state.system.ds.attributes, state.system.ds.limit) = (0xC97, 0xFF)),
        Emulation::Done
    );
    assert_eq!(attempt(&|state| (state.system.ds.attributes, state.system.ds.limit) = (0xC97, 0x100)), fault);
}

#[test]
fn the_stack_segment_has_its_own_exception() {
    // mov [ebp+0], eax uses SS
    let (mut state, mut board) = protected_mode(&[0x89, 0x45, 0x00]);
    state.system.ss.limit = 0;
    let Emulation::Fault(exception) = emulate(&mut state, &mut board) else { panic!() };
    assert_eq!((exception.vector, exception.error_code), (Vector(12), Some(0)));
}

#[test]
fn real_mode_has_no_error_codes_and_adds_segment_bases() {
    // mov [bx+si], ax
    let (mut state, mut board) = protected_mode(&[0x89, 0x00]);
    state.system.cr0 = 0x10;
    for segment in [&mut state.system.cs, &mut state.system.ds, &mut state.system.ss, &mut state.system.es] {
        *segment = Segment { selector: 0, attributes: 0x93, limit: 0xFFFF, base: 0 };
    }
    state.system.cs.base = CODE;
    state.system.ds.base = DEVICE;
    state.registers.rip = 0;
    state.registers.set(Gpr::Rbx, 0x8010);
    state.registers.set(Gpr::Rsi, 0x8008);
    assert_eq!(emulate(&mut state, &mut board), Emulation::Done);
    assert_eq!(board.events, [Event::Write(DEVICE + 0x18, 2, 0)]);

    state.registers.rip = 0;
    state.registers.set(Gpr::Rsi, 0x7FEF);
    let Emulation::Fault(exception) = emulate(&mut state, &mut board) else { panic!() };
    assert_eq!((exception.vector, exception.error_code), (Vector(13), None));
}

#[test]
fn an_address_that_is_not_canonical_is_refused() {
    let (mut state, mut board) = long_mode(&[0x8B, 0x03]);
    state.registers.set(Gpr::Rbx, 0x8000_0000_0000);
    assert_eq!(emulate(&mut state, &mut board), Emulation::Fault(Exception::GENERAL_PROTECTION));
}

#[test]
fn lengths_need_no_decoder_where_exits_are_frequent() {
    for code in [
        &[0x0F, 0xA2][..],                           // cpuid
        &[0x0F, 0x30],                               // wrmsr
        &[0x0F, 0x32],                               // rdmsr
        &[0xF4],                                     // hlt
        &[0x2E, 0x0F, 0x30],                         // with a prefix
        &[0x48, 0x0F, 0x20, 0xC0],                   // mov rax, cr0
        &[0x0F, 0x01, 0xD1],                         // xsetbv
        &[0x0F, 0x01, 0xF9],                         // rdtscp
        &[0xE4, 0x60],                               // in al, 0x60
        &[0x66, 0xEF],                               // out dx, ax
        &[0xF3, 0x6E],                               // rep outsb
        &[0x0F, 0x09],                               // wbinvd
        &[0x0F, 0x01, 0x3B],                         // invlpg [rbx], by the decoder
        &[0x48, 0x81, 0x83, 0, 0, 0, 0, 0, 0, 0, 0], // add qword [rbx+0], 0, by the decoder
    ] {
        let (state, mut board) = long_mode(code);
        assert_eq!(instruction_length(&state, &mut board.ram), Ok(code.len() as u8), "{code:02x?}");
    }
}

#[test]
fn an_instruction_across_two_pages_is_fetched_from_both() {
    let (mut state, mut board) = long_mode(&[]);
    board.put_u64(0x4000 + 8, (DATA_FRAME + 0x3000) | 0x67);
    board.put(DATA_FRAME + 0xFFF, &[0x89]);
    board.put(DATA_FRAME + 0x3000, &[0x03]);
    state.registers.rip = DATA + 0xFFF;
    state.registers.set(Gpr::Rbx, DEVICE);
    assert_eq!(emulate(&mut state, &mut board), Emulation::Done);
    assert_eq!(state.registers.rip, DATA + 0x1001);

    // With nothing behind it, the fetch faults at the second page.
    board.put_u64(0x4000 + 8, 0);
    state.registers.rip = DATA + 0xFFF;
    assert_eq!(emulate(&mut state, &mut board), Emulation::Fault(Exception::page_fault(DATA + 0x1000, 0x10)));
}

#[test]
fn code_outside_ram_is_not_fetched_from_devices() {
    let (mut state, mut board) = long_mode(&[]);
    state.registers.rip = DEVICE;
    assert!(matches!(emulate(&mut state, &mut board), Emulation::Unsupported { length: 0, .. }));
    assert!(board.events.is_empty());
}
