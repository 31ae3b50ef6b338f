use super::*;
use crate::testing::Ram;
use alloc::format;
use alloc::vec;

const SIZE: u16 = 4;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const INDIRECT_TABLE: u64 = 0x4000;

const NEXT: u16 = DESCRIPTOR_NEXT;
const WRITE: u16 = DESCRIPTOR_WRITE;
const INDIRECT: u16 = DESCRIPTOR_INDIRECT;

fn set_up(event_index: bool, indirect: bool) -> (Queue, Ram) {
    let mut queue = Queue::new(7, SIZE);
    (queue.descriptors, queue.available, queue.used) = (DESCRIPTORS, AVAILABLE, USED);
    queue.enable(event_index, indirect).unwrap();
    (queue, Ram::new(0x1_0000))
}

fn put(ram: &mut Ram, table: u64, index: u64, at: u64, length: u32, flags: u16, next: u16) {
    let mut bytes = at.to_le_bytes().to_vec();
    bytes.extend(length.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    ram.write(GuestPhysAddr(table + 16 * index), &bytes).unwrap();
}

/// Makes `heads` available, as a fresh ring.
fn offer(ram: &mut Ram, heads: &[u16]) {
    for (slot, head) in (0..).zip(heads) {
        ram.write(GuestPhysAddr(AVAILABLE + 4 + 2 * slot), &head.to_le_bytes()).unwrap();
    }
    ram.write(GuestPhysAddr(AVAILABLE + 2), &(heads.len() as u16).to_le_bytes()).unwrap();
}

fn pop(queue: &mut Queue, ram: &Ram) -> Result<Chain, QueueError> {
    let mut chain = Chain::default();
    queue.pop(ram, &mut chain).map(|popped| {
        assert!(popped);
        chain
    })
}

#[test]
fn a_chain_is_read_and_written_across_its_buffers() {
    let (mut queue, mut ram) = set_up(false, false);
    put(&mut ram, DESCRIPTORS, 0, 0x8000, 3, NEXT, 2);
    put(&mut ram, DESCRIPTORS, 2, 0x9000, 2, NEXT, 1);
    put(&mut ram, DESCRIPTORS, 1, 0xA000, 1, NEXT | WRITE, 3);
    put(&mut ram, DESCRIPTORS, 3, 0xB000, 4, WRITE, 0);
    offer(&mut ram, &[0]);
    ram.write(GuestPhysAddr(0x8000), b"abc").unwrap();
    ram.write(GuestPhysAddr(0x9000), b"de").unwrap();
    let chain = pop(&mut queue, &ram).unwrap();
    assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (5, 5));
    let mut into = [0; 4];
    chain.read(&ram, 1, &mut into).unwrap();
    assert_eq!(&into, b"bcde");
    chain.write(&mut ram, 0, b"vwxyz").unwrap();
    assert_eq!((ram.0[0xA000], &ram.0[0xB000..0xB004]), (b'v', b"wxyz".as_slice()));
    assert!(matches!(chain.read(&ram, 2, &mut into).unwrap_err().rule, Rule::BufferTooSmall { .. }));
    let rule = chain.write(&mut ram, 1, b"vwxyz").unwrap_err().rule;
    assert_eq!(rule, Rule::BufferTooSmall { head: 0, length: 5, needed: 6 });
}

#[test]
fn an_indirect_table_is_followed() {
    let (mut queue, mut ram) = set_up(false, true);
    put(&mut ram, DESCRIPTORS, 1, INDIRECT_TABLE, 32, INDIRECT, 0);
    put(&mut ram, INDIRECT_TABLE, 0, 0x8000, 8, NEXT, 1);
    put(&mut ram, INDIRECT_TABLE, 1, 0x9000, 16, WRITE, 0);
    offer(&mut ram, &[1]);
    let chain = pop(&mut queue, &ram).unwrap();
    assert_eq!((chain.head(), chain.readable_bytes(), chain.writable_bytes()), (1, 8, 16));
}

#[test]
fn rubbish_in_the_rings_is_an_error_that_says_what_is_wrong() {
    type Case = (fn(&mut Ram), &'static str);
    let cases: [Case; 14] = [
        (|ram| offer(ram, &[4]), "descriptor 4 is outside its table of 4"),
        (|ram| offer(ram, &[0, 0, 0, 0, 0]), "available index 5 is further ahead of 0"),
        (|ram| put(ram, DESCRIPTORS, 0, 0, 1, NEXT, 9), "descriptor 9 is outside"),
        (|ram| put(ram, DESCRIPTORS, 0, 0, 1, NEXT, 0), "loops or is longer than the queue"),
        (|ram| put(ram, DESCRIPTORS, 0, u64::MAX, 1, 0, 0), "impossible length"),
        (
            |ram| {
                put(ram, DESCRIPTORS, 0, 0, u32::MAX, NEXT, 1);
                put(ram, DESCRIPTORS, 1, 0, 1, 0, 0);
            },
            "impossible length",
        ),
        (
            |ram| {
                put(ram, DESCRIPTORS, 0, 0, 1, NEXT | WRITE, 1);
                put(ram, DESCRIPTORS, 1, 0, 1, 0, 0);
            },
            "a readable buffer after a writable one",
        ),
        (|ram| put(ram, DESCRIPTORS, 0, INDIRECT_TABLE, 0, INDIRECT, 0), "indirect table of 0 bytes"),
        (|ram| put(ram, DESCRIPTORS, 0, INDIRECT_TABLE, 17, INDIRECT, 0), "indirect table of 17 bytes"),
        (|ram| put(ram, DESCRIPTORS, 0, INDIRECT_TABLE, 16, INDIRECT | NEXT, 1), "indirect table"),
        (
            |ram| {
                put(ram, DESCRIPTORS, 0, INDIRECT_TABLE, 16, INDIRECT, 0);
                put(ram, INDIRECT_TABLE, 0, INDIRECT_TABLE, 16, INDIRECT, 0);
            },
            "indirect table",
        ),
        (
            |ram| {
                put(ram, DESCRIPTORS, 0, INDIRECT_TABLE, 16, INDIRECT, 0);
                put(ram, INDIRECT_TABLE, 0, 0, 1, NEXT, 1);
            },
            "descriptor 1 is outside its table of 1",
        ),
        (
            |ram| {
                put(ram, DESCRIPTORS, 0, INDIRECT_TABLE, 16 * 64, INDIRECT, 0);
                (0..64).for_each(|index| put(ram, INDIRECT_TABLE, index, 0, 1, NEXT, index as u16 + 1));
            },
            "longer than the queue",
        ),
        (|ram| put(ram, DESCRIPTORS, 0, 0xFFF0_0000, 16, INDIRECT, 0), "not all RAM"),
    ];
    for (make, message) in cases {
        let (mut queue, mut ram) = set_up(false, true);
        offer(&mut ram, &[0]);
        make(&mut ram);
        let error = format!("{}", pop(&mut queue, &ram).unwrap_err());
        assert!(error.starts_with("queue 7: ") && error.contains(message), "{error} / {message}");
    }
}

#[test]
fn an_indirect_table_that_was_not_negotiated_is_an_error() {
    let (mut queue, mut ram) = set_up(false, false);
    put(&mut ram, DESCRIPTORS, 0, INDIRECT_TABLE, 16, INDIRECT, 0);
    offer(&mut ram, &[0]);
    assert_eq!(pop(&mut queue, &ram).unwrap_err().rule, Rule::Indirect { head: 0, length: 16 });
}

#[test]
fn rings_outside_ram_are_an_error() {
    let mut queue = Queue::new(0, SIZE);
    queue.available = u64::MAX - 1;
    queue.enable(false, false).unwrap();
    let ram = Ram::new(0x1000);
    let mut chain = Chain::default();
    queue.available = 0x2000;
    assert!(matches!(queue.pop(&ram, &mut chain).unwrap_err().rule, Rule::Memory(_)));
    queue.available = u64::MAX - 1;
    let _ = queue.pop(&ram, &mut chain);
}

#[test]
fn a_queue_that_is_off_has_nothing() {
    let mut queue = Queue::new(0, SIZE);
    let ram = Ram::new(0x1000);
    assert_eq!(queue.pop(&ram, &mut Chain::default()), Ok(false));
}

#[test]
fn what_is_given_back_appears_in_the_used_ring_around_its_end() {
    let (mut queue, mut ram) = set_up(false, false);
    for turn in 0..6_u16 {
        queue.push_used(&mut ram, turn % SIZE, 100 + u32::from(turn)).unwrap();
        assert_eq!(ram.read_u16(GuestPhysAddr(USED + 2)), Ok(turn + 1));
        let element = USED + 4 + 8 * u64::from(turn % SIZE);
        assert_eq!(ram.read_u32(GuestPhysAddr(element)), Ok(u32::from(turn % SIZE)));
        assert_eq!(ram.read_u32(GuestPhysAddr(element + 4)), Ok(100 + u32::from(turn)));
    }
}

#[test]
fn the_flag_decides_about_interrupts_without_event_indexes() {
    let (mut queue, mut ram) = set_up(false, false);
    assert_eq!(queue.take_signal(&ram), Ok(false), "nothing was given back");
    queue.push_used(&mut ram, 0, 0).unwrap();
    assert_eq!(queue.take_signal(&ram), Ok(true));
    assert_eq!(queue.take_signal(&ram), Ok(false));
    ram.write(GuestPhysAddr(AVAILABLE), &[1, 0]).unwrap();
    queue.push_used(&mut ram, 0, 0).unwrap();
    assert_eq!(queue.take_signal(&ram), Ok(false));
}

#[test]
fn the_event_index_decides_about_interrupts() {
    let (mut queue, mut ram) = set_up(true, false);
    let used_event = GuestPhysAddr(AVAILABLE + 4 + 2 * u64::from(SIZE));
    ram.write(used_event, &2_u16.to_le_bytes()).unwrap();
    for (turn, wanted) in [(1, false), (2, false), (3, true), (4, false)] {
        queue.push_used(&mut ram, 0, 0).unwrap();
        assert_eq!(queue.take_signal(&ram), Ok(wanted), "chain {turn}");
    }
}

#[test]
fn notifications_are_suppressed_and_asked_for_by_flag_or_event_index() {
    let (mut queue, mut ram) = set_up(false, false);
    queue.set_notifications(&mut ram, false).unwrap();
    assert_eq!(ram.read_u16(GuestPhysAddr(USED)), Ok(1));
    queue.set_notifications(&mut ram, true).unwrap();
    assert_eq!(ram.read_u16(GuestPhysAddr(USED)), Ok(0));

    let (mut queue, mut ram) = set_up(true, false);
    let available_event = GuestPhysAddr(USED + 4 + 8 * u64::from(SIZE));
    queue.set_notifications(&mut ram, false).unwrap();
    assert_eq!(ram.read_u16(available_event), Ok(0xFFFF));
    queue.set_notifications(&mut ram, true).unwrap();
    assert_eq!(ram.read_u16(available_event), Ok(0));
}

#[test]
fn indexes_wrap_at_65536() {
    let (mut queue, mut ram) = set_up(true, false);
    put(&mut ram, DESCRIPTORS, 0, 0x8000, 1, WRITE, 0);
    let mut chain = Chain::default();
    for turn in 1..=70_000_u32 {
        ram.write(GuestPhysAddr(AVAILABLE + 2), &(turn as u16).to_le_bytes()).unwrap();
        assert_eq!(queue.pop(&ram, &mut chain), Ok(true));
        queue.push_used(&mut ram, 0, 1).unwrap();
    }
    assert_eq!(ram.read_u16(GuestPhysAddr(USED + 2)), Ok(70_000_u32 as u16));
    assert_eq!(vec![queue.has_available(&ram)], [Ok(false)]);
}
