//! The adapter against a device that keeps the rules, and against some that do not.

use alloc::collections::BTreeMap;
use alloc::rc::Rc;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};

use super::adapter::{Adapter, AdapterError};
use super::registers::{ADDRESS_VALID, Register, Registers, STATUS_LINK_UP, cause, control, receive_control};
use super::ring::LENGTH;
use crate::drivers::nic::MAX_FRAME_BYTES;

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
/// Frames that a device always has descriptors for, once all that came were taken.
const BURST: usize = 200;
const DONE: u64 = 1 << 32;
const END: u64 = 1 << 33;

/// A device in memory: it reaches the rings by the addresses it was given, as a real one does.
#[derive(Default)]
struct Device {
    registers: RefCell<BTreeMap<usize, u32>>,
    /// The EEPROM's words; none never answers.
    eeprom: Option<[u16; 3]>,
    narrow_eeprom: bool,
    never_resets: bool,
    link_down: Cell<bool>,
    tails_written: Cell<usize>,
}

impl Device {
    fn get(&self, register: Register) -> u32 {
        self.registers.borrow().get(&(register as usize)).copied().unwrap_or(0)
    }

    fn set(&self, register: Register, value: u32) {
        self.registers.borrow_mut().insert(register as usize, value);
    }

    fn descriptor(&self, low: Register, high: Register, index: u32) -> *mut [u64; 2] {
        assert!((index as usize) < LENGTH);
        let base = u64::from(self.get(high)) << 32 | u64::from(self.get(low));
        (base as *mut [u64; 2]).wrapping_add(index as usize)
    }

    fn receive_descriptor(&self, index: u32) -> *mut [u64; 2] {
        self.descriptor(Register::ReceiveBaseLow, Register::ReceiveBaseHigh, index)
    }

    /// Stores a frame with a descriptor's second word; false if it has no descriptor.
    fn deliver_as(&self, frame: &[u8], word: u64) -> bool {
        let head = self.get(Register::ReceiveHead);
        if head == self.get(Register::ReceiveTail) || self.get(Register::ReceiveControl) & 2 == 0 {
            return false;
        }
        let descriptor = self.receive_descriptor(head);
        // SAFETY: the adapter's ring and buffers, which are never freed; frames here fit a buffer of 2048 bytes.
        unsafe {
            assert_eq!((*descriptor)[1], 0, "a descriptor is clean when the device gets it");
            core::ptr::copy_nonoverlapping(
                frame.as_ptr(),
                (*descriptor)[0] as *mut u8,
                frame.len().min(2048),
            );
            (*descriptor)[1] = word;
        }
        self.set(Register::ReceiveHead, (head + 1) % LENGTH as u32);
        true
    }

    fn deliver(&self, frame: &[u8]) -> bool {
        self.deliver_as(frame, frame.len() as u64 | DONE | END)
    }

    /// Sends the oldest queued frame and reports it.
    fn send(&self) -> Option<Vec<u8>> {
        let head = self.get(Register::TransmitHead);
        if head == self.get(Register::TransmitTail) {
            return None;
        }
        let descriptor = self.descriptor(Register::TransmitBaseLow, Register::TransmitBaseHigh, head);
        // SAFETY: as in `deliver_as`.
        let frame = unsafe {
            let [buffer, word] = *descriptor;
            assert_eq!(word >> 24 & 0xff, 0b1011, "EOP, IFCS, RS");
            (*descriptor)[1] = word | DONE;
            core::slice::from_raw_parts(buffer as *const u8, usize::from(word as u16)).to_vec()
        };
        self.set(Register::TransmitHead, (head + 1) % LENGTH as u32);
        Some(frame)
    }
}

impl Registers for Rc<Device> {
    fn read(&self, register: Register) -> u32 {
        let value = self.get(register);
        match register {
            Register::Status if self.link_down.get() => value & !STATUS_LINK_UP,
            Register::Status => value | STATUS_LINK_UP,
            Register::InterruptCause => {
                self.set(register, 0);
                value
            }
            Register::EepromRead => {
                let (done, shift) = if self.narrow_eeprom { (2, 2) } else { (16, 8) };
                let word = self.eeprom.and_then(|words| words.get((value >> shift) as usize).copied());
                word.map_or(value, |word| u32::from(word) << 16 | done)
            }
            _ => value,
        }
    }

    fn write(&mut self, register: Register, value: u32) {
        let value = match register {
            Register::Control if !self.never_resets => value & !control::RESET,
            Register::ReceiveTail | Register::TransmitTail => {
                self.tails_written.set(self.tails_written.get() + 1);
                value
            }
            _ => value,
        };
        self.set(register, value);
    }
}

fn device() -> Device {
    let device = Device::default();
    device.set(Register::AddressLow, u32::from_le_bytes([MAC[0], MAC[1], MAC[2], MAC[3]]));
    device.set(Register::AddressHigh, u32::from(MAC[5]) << 8 | u32::from(MAC[4]) | ADDRESS_VALID);
    device
}

fn started() -> (Adapter<Rc<Device>>, Rc<Device>) {
    let device = Rc::new(device());
    (Adapter::start(Rc::clone(&device), false).unwrap(), device)
}

fn frame(number: usize) -> Vec<u8> {
    let length = 60 + number * 97 % (MAX_FRAME_BYTES - 59);
    (0..length).map(|at| (at * 7 + number) as u8).collect()
}

#[test]
fn frames_keep_their_order_and_bytes_round_the_rings() {
    let (mut adapter, device) = started();
    let mut into = vec![0; MAX_FRAME_BYTES];
    let (mut sent, mut received) = (0, 0);
    for round in 0..40 {
        let batch = 1 + round * 37 % BURST;
        (sent..sent + batch).for_each(|number| assert!(adapter.transmit(&frame(number)), "frame {number}"));
        sent += batch;
        while let Some(frame) = device.send() {
            assert!(device.deliver(&frame));
        }
        while let Some(length) = adapter.receive(&mut into) {
            assert_eq!(into[..length], frame(received), "frame {received}");
            received += 1;
        }
        assert_eq!(received, sent);
    }
    assert!(received > 10 * LENGTH);
}

#[test]
fn a_full_queue_says_so_until_the_device_has_sent_something() {
    let (mut adapter, device) = started();
    let queued = (0..).take_while(|number| adapter.transmit(&frame(*number))).count();
    assert_eq!(queued, LENGTH - 1);
    assert!(adapter.transmit_room() == 0 && !adapter.transmit(&frame(0)));
    assert_eq!(device.send(), Some(frame(0)));
    assert!(adapter.transmit_room() == 1 && adapter.transmit(&frame(queued)));
    assert_eq!(adapter.transmit_room(), 0);
    for number in 1..=queued {
        assert_eq!(device.send(), Some(frame(number)));
    }
    assert_eq!(device.send(), None);
}

#[test]
fn frames_no_cable_carries_are_refused() {
    let (mut adapter, device) = started();
    assert!(!adapter.transmit(&vec![0; MAX_FRAME_BYTES + 1]) && !adapter.transmit(&[]));
    assert!(adapter.transmit(&vec![1; MAX_FRAME_BYTES]));
    assert_eq!(device.send().map(|frame| frame.len()), Some(MAX_FRAME_BYTES));
}

#[test]
fn a_burst_fills_every_descriptor_and_costs_few_tail_writes() {
    let (mut adapter, device) = started();
    let before = device.tails_written.get();
    let delivered = (0..).take_while(|number| device.deliver(&frame(*number))).count();
    assert_eq!(delivered, LENGTH - 1);
    let mut into = vec![0; MAX_FRAME_BYTES];
    let received = core::iter::from_fn(|| adapter.receive(&mut into)).count();
    assert_eq!(received, delivered);
    let written = device.tails_written.get() - before;
    assert!(written <= LENGTH / 32, "{written} tail writes for {received} frames");
    assert!((0..BURST).all(|number| device.deliver(&frame(number))));
}

#[test]
fn bad_frames_are_dropped_and_the_next_good_one_arrives() {
    let (mut adapter, device) = started();
    let long = MAX_FRAME_BYTES as u64 + 1;
    let good = frame(5);
    let mut into = vec![0; MAX_FRAME_BYTES];
    for word in [
        0xffff | DONE | END,
        long | DONE | END,
        60 | DONE | END | 1 << 40,
        60 | DONE | END | 1 << 47,
        // A frame in two descriptors.
        2048 | DONE,
    ] {
        assert!(device.deliver_as(&good, word));
        if word & END == 0 {
            assert!(device.deliver_as(&good, 100 | DONE | END));
        }
        assert!(device.deliver(&good));
        assert_eq!(adapter.receive(&mut into), Some(good.len()), "after {word:#x}");
        assert_eq!(into[..good.len()], good);
        assert_eq!(adapter.receive(&mut into), None);
    }
    // Not even a good one is given to somebody without the room.
    assert!(device.deliver(&good));
    assert_eq!(adapter.receive(&mut into[..good.len() - 1]), None);
}

#[test]
fn whatever_a_device_writes_into_its_descriptors_no_frame_is_longer_than_one() {
    let (mut adapter, device) = started();
    let mut into = vec![0; 2 * MAX_FRAME_BYTES];
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut frames = 0;
    for _ in 0..20_000 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let descriptor = device.receive_descriptor(random as u32 % LENGTH as u32);
        // Half of them are plausible.
        let mask = if random >> 40 & 1 == 0 { u64::MAX } else { !(0xff << 40 | 0xf800) };
        // SAFETY: as in `deliver_as`.
        unsafe { *descriptor = [random.rotate_left(17), random.rotate_left(31) & mask | DONE] };
        if let Some(length) = adapter.receive(&mut into) {
            assert!(length <= MAX_FRAME_BYTES);
            frames += 1;
        }
        assert!((device.get(Register::ReceiveTail) as usize) < LENGTH);
    }
    assert!(frames > 0);
}

#[test]
fn an_address_may_be_in_the_filter_or_only_in_the_eeprom() {
    let words = [0x5452, 0x3412, 0x7856];
    for narrow in [false, true] {
        let device = Device { eeprom: Some(words), narrow_eeprom: narrow, ..Device::default() };
        let device = Rc::new(device);
        let adapter = Adapter::start(Rc::clone(&device), narrow).unwrap();
        assert_eq!(adapter.mac(), [0x52, 0x54, 0x12, 0x34, 0x56, 0x78]);
        assert_eq!(device.get(Register::AddressLow), 0x3412_5452, "the device takes frames for it");
        assert_eq!(device.get(Register::AddressHigh), ADDRESS_VALID | 0x7856);
    }
    assert_eq!(started().0.mac(), MAC);
    // What the firmware left is not an interface's address.
    let device = Device { eeprom: Some(words), ..Device::default() };
    device.set(Register::AddressLow, u32::MAX);
    device.set(Register::AddressHigh, u32::MAX);
    assert_eq!(Adapter::start(Rc::new(device), false).unwrap().mac()[0], 0x52);
}

#[test]
fn a_device_without_an_address_or_stuck_in_its_reset_is_refused_and_reaches_no_memory() {
    for (device, reason) in [
        (Device::default(), AdapterError::NoAddress),
        (Device { eeprom: Some([0; 3]), ..Device::default() }, AdapterError::NoAddress),
        (Device { eeprom: Some([0xffff; 3]), ..Device::default() }, AdapterError::NoAddress),
        (Device { never_resets: true, ..device() }, AdapterError::Reset),
    ] {
        device.set(Register::ReceiveControl, receive_control::ENABLE);
        let device = Rc::new(device);
        assert_eq!(Adapter::start(Rc::clone(&device), false).err(), Some(reason));
        assert_eq!((device.get(Register::ReceiveControl), device.get(Register::TransmitControl)), (0, 0));
    }
}

#[test]
fn without_a_link_frames_are_dropped_and_with_it_they_flow_again() {
    let (mut adapter, device) = started();
    let change = |down: bool| {
        device.link_down.set(down);
        device.set(Register::InterruptCause, cause::LINK);
    };
    change(true);
    assert!(adapter.take_causes() && !adapter.link_up());
    assert!(adapter.transmit_room() > 0, "a full queue would keep the uplink from receiving");
    assert!(!adapter.transmit(&frame(1)));
    assert_eq!(device.send(), None);
    change(false);
    assert!(adapter.take_causes() && adapter.link_up());
    assert!(adapter.transmit(&frame(2)));
    assert_eq!(device.send(), Some(frame(2)), "and nothing that is out of date");
}

#[test]
fn an_interrupt_without_a_cause_of_the_device_is_somebody_elses() {
    let (mut adapter, device) = started();
    assert!(!adapter.take_causes());
    // Sent, which is not a cause that interrupts here.
    device.set(Register::InterruptCause, 1);
    assert!(!adapter.take_causes());
    device.set(Register::InterruptCause, cause::RECEIVE);
    assert!(adapter.take_causes() && !adapter.take_causes());
}
