//! The local APIC, driven as a guest does.

use super::*;
use crate::address::MsrIndex;
use crate::interrupt::MsiMessage;
use proptest::prelude::*;

const NOW: GuestTsc = GuestTsc(1_000_000);
/// At 2 GHz a nanosecond, which is a timer tick, is two TSC ticks.
const TSC_KHZ: u32 = 2_000_000;

fn apic(id: u32, vcpu_count: u32) -> Lapic {
    let mut lapic = Lapic::new(&VcpuConfig { id, vcpu_count, tsc_khz: TSC_KHZ });
    write(&mut lapic, 0x80F, 0x1FF);
    lapic
}

fn xapic(id: u32) -> Lapic {
    let mut lapic = Lapic::new(&VcpuConfig { id, vcpu_count: 4, tsc_khz: TSC_KHZ });
    lapic.set_base(layout::LAPIC_BASE).unwrap();
    lapic.set_base(layout::LAPIC_BASE | BASE_ENABLE).unwrap();
    lapic.mmio_write(0xF0, 0x1FF, NOW);
    lapic
}

fn write(lapic: &mut Lapic, msr: u32, value: u64) {
    lapic.msr_write(MsrIndex(msr), value, NOW).unwrap();
}

fn read(lapic: &mut Lapic, msr: u32) -> u64 {
    lapic.msr_read(MsrIndex(msr), NOW).unwrap()
}

fn raise(lapic: &mut Lapic, vectors: &[u8]) {
    for &vector in vectors {
        lapic.raise(Vector(vector), false);
    }
}

fn message(destination: u64, data: u32) -> MsiMessage {
    MsiMessage { address: 0xFEE0_0000 | destination << 12, data }
}

#[test]
fn interrupts_come_by_priority_and_nest_by_class() {
    let mut lapic = apic(0, 1);
    raise(&mut lapic, &[0x31, 0x52, 0x35]);
    assert_eq!(lapic.acknowledge(), Some(Vector(0x52)));
    assert_eq!(lapic.pending(), None, "a lower class waits");
    raise(&mut lapic, &[0x5F]);
    assert_eq!(lapic.pending(), None, "the same class waits");
    raise(&mut lapic, &[0x60]);
    assert_eq!(lapic.acknowledge(), Some(Vector(0x60)));
    assert_eq!(read(&mut lapic, 0x80A), 0x60, "processor priority");
    write(&mut lapic, 0x80B, 0);
    assert_eq!(lapic.pending(), None);
    write(&mut lapic, 0x80B, 0);
    assert_eq!(lapic.acknowledge(), Some(Vector(0x5F)));
    write(&mut lapic, 0x80B, 0);
    assert_eq!(lapic.acknowledge(), Some(Vector(0x35)));
    write(&mut lapic, 0x80B, 0);
    assert_eq!(lapic.acknowledge(), Some(Vector(0x31)));
}

#[test]
fn the_task_priority_holds_back_its_class_and_below() {
    let mut lapic = apic(0, 1);
    raise(&mut lapic, &[0x4F]);
    write(&mut lapic, 0x808, 0x40);
    assert_eq!((lapic.pending(), lapic.requested()), (None, Some(Vector(0x4F))));
    lapic.set_tpr(0x30);
    assert_eq!(lapic.pending(), Some(Vector(0x4F)));
    write(&mut lapic, 0x808, 0x35);
    lapic.set_tpr(0x30);
    assert_eq!(lapic.tpr(), 0x35, "the same class from CR8 keeps the subclass");
}

#[test]
fn what_the_processor_delivered_is_in_service_even_after_the_guest_raised_its_priority() {
    let mut lapic = apic(0, 1);
    raise(&mut lapic, &[0x40]);
    let offered = lapic.pending().unwrap();
    lapic.set_tpr(0xF0);
    assert_eq!(lapic.acknowledge(), None);
    lapic.accept(offered);
    assert_eq!((lapic.requested(), read(&mut lapic, 0x812)), (None, 1));
}

#[test]
fn only_the_end_of_a_level_triggered_interrupt_is_announced() {
    let mut lapic = apic(0, 1);
    lapic.raise(Vector(0x40), true);
    lapic.raise(Vector(0x50), false);
    assert_eq!(read(&mut lapic, 0x81A), 1, "trigger mode of vector 0x40");
    lapic.acknowledge();
    write(&mut lapic, 0x80B, 0);
    assert_eq!(lapic.take_eoi(), None);
    lapic.acknowledge();
    write(&mut lapic, 0x80B, 0);
    assert_eq!(lapic.take_eoi(), Some(Vector(0x40)));
    assert_eq!(lapic.take_eoi(), None);
}

#[test]
fn request_and_service_registers_show_the_vectors() {
    let mut lapic = apic(0, 1);
    raise(&mut lapic, &[0x21, 0xFF]);
    assert_eq!((read(&mut lapic, 0x821), read(&mut lapic, 0x827)), (2, 1 << 31));
    lapic.acknowledge();
    assert_eq!((read(&mut lapic, 0x827), read(&mut lapic, 0x817)), (0, 1 << 31));
}

#[test]
fn a_software_disabled_apic_takes_no_vectors_and_masks_its_table() {
    let mut lapic = apic(0, 1);
    write(&mut lapic, 0x832, 0x40);
    write(&mut lapic, 0x80F, 0xFF);
    assert_eq!(read(&mut lapic, 0x832), 0x1_0040);
    raise(&mut lapic, &[0x40]);
    write(&mut lapic, 0x832, 0x40);
    assert_eq!(read(&mut lapic, 0x832), 0x1_0040, "unmasking has no effect");
    write(&mut lapic, 0x80F, 0x1FF);
    assert_eq!(lapic.pending(), None);
    lapic.raise_nmi();
    assert!(lapic.take_nmi() && !lapic.take_nmi());
}

#[test]
fn vectors_below_16_are_errors() {
    let mut lapic = apic(0, 1);
    write(&mut lapic, 0x837, 0x45);
    lapic.raise(Vector(0x0F), false);
    write(&mut lapic, 0x83F, 0x0E);
    assert_eq!(lapic.acknowledge(), Some(Vector(0x45)));
    assert_eq!(read(&mut lapic, 0x828), 0, "errors show when they are asked for");
    write(&mut lapic, 0x828, 0);
    assert_eq!(read(&mut lapic, 0x828), 0x60);
    write(&mut lapic, 0x828, 0);
    assert_eq!(read(&mut lapic, 0x828), 0);
}

#[test]
fn an_error_vector_that_is_itself_illegal_ends_there() {
    let mut lapic = apic(0, 1);
    write(&mut lapic, 0x837, 0x05);
    raise(&mut lapic, &[3]);
    assert_eq!(lapic.pending(), None);
}

#[test]
fn messages_find_their_apic() {
    let lapic = apic(3, 4);
    assert!(lapic.addressing().accepts(&message(3, 0x40)) && !lapic.addressing().accepts(&message(2, 0x40)));
    assert!(lapic.addressing().accepts(&message(0xFF, 0x40)), "broadcast");
    let logical = |destination: u64| MsiMessage { address: 0xFEE0_0004 | destination << 12, data: 0x40 };
    assert!(lapic.addressing().accepts(&logical(0b1010)) && !lapic.addressing().accepts(&logical(0b0111)));
    let far = apic(300, 301);
    assert!(far.addressing().accepts(&MsiMessage { address: 0xFEE0_0000 | 0x2C << 12 | 1 << 5, data: 0x40 }));
}

#[test]
fn logical_destinations_of_xapic_mode_are_flat_or_clustered() {
    let mut lapic = xapic(1);
    lapic.mmio_write(0xD0, 0x2F12_3456, NOW);
    assert_eq!(lapic.mmio_read(0xD0, NOW), 0x2F00_0000);
    let logical = |destination: u64| MsiMessage { address: 0xFEE0_0004 | destination << 12, data: 0x40 };
    assert!(
        lapic.addressing().accepts(&logical(0x21))
            && !lapic.addressing().accepts(&logical(0xD0))
            && lapic.addressing().accepts(&logical(0xFF))
    );
    lapic.mmio_write(0xE0, 0x0, NOW);
    assert!(
        lapic.addressing().accepts(&logical(0x21))
            && !lapic.addressing().accepts(&logical(0x31))
            && !lapic.addressing().accepts(&logical(0x20))
    );
}

#[test]
fn a_self_interrupt_arrives_by_each_of_its_ways() {
    for (msr, value) in
        [(0x83F, 0x40), (0x830, 0x4_0040), (0x830, 0x40), (0x830, 0xFFFF_FFFF_0000_0040), (0x830, 0x8_0040)]
    {
        let mut lapic = apic(0, 1);
        write(&mut lapic, msr, value);
        assert_eq!(lapic.pending(), Some(Vector(0x40)), "{msr:#x} {value:#x}");
        assert_eq!(lapic.take_ipi(), None, "nobody else is there");
    }
}

#[test]
fn interrupts_to_others_are_handed_out() {
    let fixed = |destination| Some(Ipi { destination, delivery: DeliveryMode::Fixed, vector: Vector(0x40) });
    let mut lapic = apic(1, 4);
    write(&mut lapic, 0x830, 2 << 32 | 0x40);
    assert_eq!(lapic.take_ipi(), fixed(Destination::Physical(2)));
    assert_eq!(lapic.take_ipi(), None);
    write(&mut lapic, 0x830, 0xC_0040);
    assert_eq!(lapic.take_ipi(), fixed(Destination::AllExcept(1)));
    assert_eq!(lapic.pending(), None);
    write(&mut lapic, 0x830, 0x8_0040);
    assert_eq!(lapic.take_ipi(), fixed(Destination::AllExcept(1)));
    assert_eq!(lapic.pending(), Some(Vector(0x40)));
    write(&mut lapic, 0x830, 0b1101 << 32 | 0x840);
    let ipi = lapic.take_ipi().unwrap();
    assert_eq!(Some(ipi), fixed(Destination::Logical(0b1101)));
    assert!(
        apic(0, 4).addressing().accepts_ipi(&ipi)
            && !apic(1, 4).addressing().accepts_ipi(&ipi)
            && apic(3, 4).addressing().accepts_ipi(&ipi)
    );
}

#[test]
fn an_init_to_another_is_handed_out_and_its_de_assertion_is_not() {
    let mut boot = apic(0, 2);
    write(&mut boot, 0x830, 1 << 32 | 0x4500);
    assert_eq!(boot.take_ipi().map(|ipi| ipi.delivery), Some(DeliveryMode::Init));
    write(&mut boot, 0x830, 1 << 32 | 0x8500);
    assert_eq!(boot.take_ipi(), None, "the de-assertion of INIT does nothing");
    write(&mut boot, 0x830, 1 << 32 | 0x469A);
    let start = boot.take_ipi().map(|ipi| (ipi.delivery, ipi.vector));
    assert_eq!(start, Some((DeliveryMode::StartUp, Vector(0x9A))));
}

#[test]
fn the_lowest_priority_of_destinations_that_include_the_sender_is_the_sender() {
    let mut lapic = apic(0, 2);
    write(&mut lapic, 0x830, 0b11 << 32 | 0x940);
    assert_eq!((lapic.pending(), lapic.take_ipi()), (Some(Vector(0x40)), None));
    write(&mut lapic, 0x830, 0b10 << 32 | 0x941);
    assert!(lapic.take_ipi().is_some());
}

#[test]
fn the_xapic_page_sends_from_its_two_command_registers() {
    let mut lapic = xapic(0);
    lapic.mmio_write(0x310, 2 << 24, NOW);
    lapic.mmio_write(0x300, 0x40, NOW);
    let expected =
        Ipi { destination: Destination::Physical(2), delivery: DeliveryMode::Fixed, vector: Vector(0x40) };
    assert_eq!(lapic.take_ipi(), Some(expected));
    assert_eq!((lapic.mmio_read(0x310, NOW), lapic.mmio_read(0x300, NOW)), (2 << 24, 0x40));
}

#[test]
fn the_one_shot_timer_fires_once() {
    let mut lapic = apic(0, 1);
    write(&mut lapic, 0x83E, 0b1011); // divide by 1
    write(&mut lapic, 0x832, 0x40);
    write(&mut lapic, 0x838, 1000);
    assert_eq!(lapic.next_deadline(), Some(GuestTsc(NOW.0 + 2000)));
    assert_eq!(lapic.msr_read(MsrIndex(0x839), GuestTsc(NOW.0 + 500)), Ok(750));
    lapic.advance(GuestTsc(NOW.0 + 1999));
    assert_eq!(lapic.pending(), None);
    lapic.advance(GuestTsc(NOW.0 + 2000));
    assert_eq!(lapic.acknowledge(), Some(Vector(0x40)));
    assert_eq!(lapic.next_deadline(), None);
    assert_eq!(lapic.msr_read(MsrIndex(0x839), GuestTsc(NOW.0 + 2001)), Ok(0));
}

#[test]
fn the_divide_register_slows_the_timer() {
    for (bits, divisor) in [
        (0b0000, 2),
        (0b0001, 4),
        (0b0010, 8),
        (0b0011, 16),
        (0b1000, 32),
        (0b1001, 64),
        (0b1010, 128),
        (0b1011, 1),
    ] {
        let mut lapic = apic(0, 1);
        write(&mut lapic, 0x83E, bits);
        write(&mut lapic, 0x832, 0x40);
        write(&mut lapic, 0x838, 1000);
        assert_eq!(lapic.next_deadline(), Some(GuestTsc(NOW.0 + 2000 * divisor)), "{bits:#b}");
    }
}

#[test]
fn changing_the_divisor_keeps_the_count() {
    let mut lapic = apic(0, 1);
    write(&mut lapic, 0x83E, 0b1011);
    write(&mut lapic, 0x832, 0x40);
    write(&mut lapic, 0x838, 1000);
    let later = GuestTsc(NOW.0 + 1000);
    lapic.msr_write(MsrIndex(0x83E), 0b0000, later).unwrap();
    assert_eq!(lapic.msr_read(MsrIndex(0x839), later), Ok(500));
    assert_eq!(lapic.next_deadline(), Some(GuestTsc(later.0 + 2000)));
}

#[test]
fn the_periodic_timer_counts_missed_periods_as_one() {
    let mut lapic = apic(0, 1);
    write(&mut lapic, 0x83E, 0b1011);
    write(&mut lapic, 0x832, 1 << 17 | 0x40);
    write(&mut lapic, 0x838, 1_000_000);
    let period = 2_000_000;
    lapic.advance(GuestTsc(NOW.0 + 3 * period + 5));
    assert_eq!(lapic.acknowledge(), Some(Vector(0x40)));
    assert_eq!(lapic.requested(), None);
    assert_eq!(lapic.next_deadline(), Some(GuestTsc(NOW.0 + 4 * period)));
}

#[test]
fn a_period_too_short_to_serve_is_stretched() {
    let mut lapic = apic(0, 1);
    write(&mut lapic, 0x832, 1 << 17 | 0x40);
    write(&mut lapic, 0x838, 1);
    assert_eq!(lapic.next_deadline(), Some(GuestTsc(NOW.0 + 400_000)));
}

#[test]
fn the_deadline_timer_fires_when_the_tsc_gets_there() {
    let mut lapic = apic(0, 1);
    lapic.set_tsc_deadline(5, NOW);
    assert_eq!(lapic.next_deadline(), None, "not in this mode");
    write(&mut lapic, 0x832, 2 << 17 | 0x40);
    lapic.set_tsc_deadline(NOW.0 + 10, NOW);
    assert_eq!(lapic.tsc_deadline(NOW), NOW.0 + 10);
    assert_eq!(lapic.next_deadline(), Some(GuestTsc(NOW.0 + 10)));
    lapic.advance(GuestTsc(NOW.0 + 10));
    assert_eq!(lapic.acknowledge(), Some(Vector(0x40)));
    assert_eq!(lapic.tsc_deadline(NOW), 0);
    lapic.set_tsc_deadline(1, NOW);
    assert_eq!(lapic.requested(), Some(Vector(0x40)), "one in the past fires at once");
    lapic.set_tsc_deadline(NOW.0 + 10, NOW);
    lapic.set_tsc_deadline(0, NOW);
    assert_eq!(lapic.next_deadline(), None);
    write(&mut lapic, 0x838, 100);
    assert_eq!(lapic.next_deadline(), None, "the count has no meaning in this mode");
}

#[test]
fn a_masked_timer_is_silent_and_what_it_missed_is_lost() {
    let mut lapic = apic(0, 1);
    write(&mut lapic, 0x832, 2 << 17 | 1 << 16 | 0x40);
    lapic.set_tsc_deadline(NOW.0 + 10, NOW);
    assert_eq!(lapic.next_deadline(), None);
    lapic.msr_write(MsrIndex(0x832), 2 << 17 | 0x40, GuestTsc(NOW.0 + 20)).unwrap();
    lapic.advance(GuestTsc(NOW.0 + 30));
    assert_eq!(lapic.requested(), None);
}

#[test]
fn leaving_deadline_mode_stops_the_timer() {
    let mut lapic = apic(0, 1);
    write(&mut lapic, 0x832, 2 << 17 | 0x40);
    lapic.set_tsc_deadline(NOW.0 + 10, NOW);
    write(&mut lapic, 0x832, 0x40);
    assert_eq!(lapic.next_deadline(), None);
}

#[test]
fn moving_the_tsc_moves_counts_but_not_deadlines() {
    let mut lapic = apic(0, 1);
    write(&mut lapic, 0x83E, 0b1011);
    write(&mut lapic, 0x832, 0x40);
    write(&mut lapic, 0x838, 1000);
    lapic.shift_time(-500_000);
    assert_eq!(lapic.next_deadline(), Some(GuestTsc(NOW.0 + 2000 - 500_000)));
    write(&mut lapic, 0x832, 2 << 17 | 0x40);
    lapic.set_tsc_deadline(NOW.0 + 10, NOW);
    lapic.shift_time(5);
    assert_eq!(lapic.next_deadline(), Some(GuestTsc(NOW.0 + 10)));
}

#[test]
fn x2apic_registers_refuse_what_they_do_not_have() {
    let mut lapic = apic(0x123, 1);
    assert_eq!(read(&mut lapic, 0x802), 0x123);
    assert_eq!(read(&mut lapic, 0x803), 0x5_0014);
    assert_eq!(read(&mut lapic, 0x80D), 0x12_0008);
    for msr in [0x800, 0x804, 0x809, 0x80B, 0x80C, 0x80E, 0x82F, 0x831, 0x83A, 0x83F, 0x840, 0x8FF] {
        assert!(lapic.msr_read(MsrIndex(msr), NOW).is_err(), "read {msr:#x}");
    }
    for (msr, value) in [
        (0x802, 0),
        (0x803, 0),
        (0x808, 0x100),
        (0x80A, 0),
        (0x80B, 1),
        (0x80D, 0),
        (0x80E, 0),
        (0x80F, 0x1000),
        (0x810, 0),
        (0x820, 0),
        (0x828, 1),
        (0x830, 1 << 13),
        (0x830, 1 << 20),
        (0x831, 0),
        (0x832, 1 << 32),
        (0x832, 1 << 19),
        (0x833, 1 << 17),
        (0x835, 1 << 11),
        (0x838, 1 << 32),
        (0x839, 0),
        (0x83E, 4),
        (0x83F, 0x100),
    ] {
        assert!(lapic.msr_write(MsrIndex(msr), value, NOW).is_err(), "write {msr:#x} {value:#x}");
    }
}

#[test]
fn each_mode_has_its_own_face() {
    let mut lapic = apic(2, 4);
    assert_eq!(lapic.mmio_read(0x20, NOW), u32::MAX, "no page in x2APIC mode");
    let mut lapic = xapic(2);
    assert_eq!(lapic.mmio_read(0x20, NOW), 2 << 24);
    assert!(lapic.msr_read(MsrIndex(0x802), NOW).is_err());
    assert!(lapic.msr_write(MsrIndex(0x80B), 0, NOW).is_err());
    lapic.raise(Vector(0x40), false);
    lapic.acknowledge();
    lapic.mmio_write(0xB0, 1, NOW);
    assert_eq!(lapic.mmio_read(0x120, NOW), 0, "any value ends the interrupt");
    assert_eq!(lapic.mmio_read(0x24, NOW), 0);
}

#[test]
fn the_base_register_takes_only_legal_changes_of_mode() {
    let base = layout::LAPIC_BASE;
    let mut lapic = apic(0, 1);
    assert_eq!(lapic.base(), base | BASE_BSP | BASE_ENABLE | BASE_X2APIC);
    assert!(lapic.set_base(base | BASE_ENABLE).is_err(), "x2APIC to xAPIC");
    assert!(lapic.set_base(base | BASE_X2APIC).is_err(), "x2APIC without enable");
    assert!(lapic.set_base(0x1000 | BASE_ENABLE | BASE_X2APIC).is_err(), "another address");
    assert!(lapic.set_base(base | BASE_ENABLE | BASE_X2APIC | 1).is_err(), "a reserved bit");
    raise(&mut lapic, &[0x40]);
    lapic.set_base(base).unwrap();
    assert!(!lapic.is_enabled() && lapic.pending().is_none());
    assert!(lapic.set_base(base | BASE_ENABLE | BASE_X2APIC).is_err(), "off to x2APIC");
    lapic.set_base(base | BASE_ENABLE).unwrap();
    assert_eq!(lapic.mmio_read(0xF0, NOW), 0xFF, "as after a reset");
    lapic.set_base(base | BASE_ENABLE | BASE_X2APIC).unwrap();
    assert_eq!(lapic.base(), base | BASE_BSP | BASE_ENABLE | BASE_X2APIC);
    assert_eq!(apic(1, 2).base() & BASE_BSP, 0);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_accesses_ends_orderly(
        steps in prop::collection::vec((0..10_u8, 0..0x110_u32, any::<u64>(), any::<u64>()), 1..64),
        x2apic in any::<bool>(),
        tsc_khz in any::<u32>(),
    ) {
        let mut lapic = Lapic::new(&VcpuConfig { id: 0, vcpu_count: 2, tsc_khz });
        if !x2apic {
            lapic.set_base(layout::LAPIC_BASE).unwrap();
            lapic.set_base(layout::LAPIC_BASE | BASE_ENABLE).unwrap();
        }
        for (step, register, value, now) in steps {
            let now = GuestTsc(now);
            match step {
                0 => { let _ = lapic.msr_read(MsrIndex(0x7F8 + register), now); }
                1 => { let _ = lapic.msr_write(MsrIndex(0x7F8 + register), value & 0xFFFF, now); }
                2 => { let _ = lapic.msr_write(MsrIndex(0x7F8 + register), value, now); }
                3 => { let _ = lapic.mmio_read(u64::from(register) << 4, now); }
                4 => lapic.mmio_write(u64::from(register) << 4, value as u32, now),
                5 => lapic.set_tsc_deadline(value, now),
                6 => lapic.shift_time(value as i64),
                7 => { let _ = lapic.addressing().accepts(&MsiMessage { address: value, data: register }); }
                8 => { let _ = lapic.set_base(value & 0xD00 | layout::LAPIC_BASE); }
                _ => lapic.raise(Vector(value as u8), value & 0x100 != 0),
            }
            lapic.advance(now);
            if let Some(deadline) = lapic.next_deadline() {
                prop_assert!(deadline > now || deadline == GuestTsc(u64::MAX));
            }
            let pending = lapic.pending();
            prop_assert_eq!(lapic.acknowledge(), pending);
            prop_assert!(pending.is_none_or(|vector| vector.0 >= 16));
            let _ = (lapic.take_ipi(), lapic.take_eoi(), lapic.take_nmi());
        }
    }

    #[test]
    fn every_accepted_vector_is_delivered_once_and_by_priority(mut vectors in prop::collection::btree_set(16..=255_u8, 1..40)) {
        let mut lapic = apic(0, 1);
        for &vector in &vectors {
            lapic.raise(Vector(vector), false);
        }
        while let Some(vector) = lapic.acknowledge() {
            prop_assert_eq!(vectors.pop_last(), Some(vector.0));
            write(&mut lapic, 0x80B, 0);
        }
        prop_assert!(vectors.is_empty());
    }
}
