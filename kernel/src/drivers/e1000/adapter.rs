//! The e1000 without its bus: reset, address, rings, frames, link.
//!
//! Intel 317453, 14.3 (general configuration), 14.4 (receive initialization), 14.5 (transmit initialization), 5.6
//! (EEPROM). Emulators leave parts out: in QEMU and Bochs a reset changes nothing, in Bochs the address is only in the
//! EEPROM, and neither clears a descriptor's error bits. So every register that matters is written here. QEMU's e1000
//! (not its e1000e) holds frames back for a second after RCTL was written: nodes there get their address that late.

use core::fmt;

use super::registers::{
    ADDRESS_VALID, Register, Registers, STATUS_LINK_UP, TRANSMIT_GAP, TXDCTL_ALWAYS, cause, control, eeprom,
    receive_control, transmit_control,
};
use super::ring::{LENGTH, RING_BYTES, ReceiveRing, TransmitRing};

/// Readings of a register that should change at once: a few milliseconds, and some hundred if every one exits to L0.
const PATIENCE: u32 = 20_000;
/// After a reset no register may be touched for a microsecond.
const RESET_SPINS: u32 = 200;
/// Received descriptors given back before the device is told; it has all the others meanwhile.
const ANNOUNCE_EVERY: usize = 32;

/// Why a device cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterError {
    /// It does not come out of its reset.
    Reset,
    /// Neither its registers nor its EEPROM has an address.
    NoAddress,
    /// No memory for its rings.
    NoMemory,
}

impl fmt::Display for AdapterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reset => "it does not come out of its reset",
            Self::NoAddress => "neither its registers nor its EEPROM has an Ethernet address; give it one",
            Self::NoMemory => "there is no memory for its rings",
        })
    }
}

/// A device that was set up.
#[derive(Debug)]
pub struct Adapter<R> {
    registers: R,
    mac: [u8; 6],
    receive: ReceiveRing,
    transmit: TransmitRing,
    link_up: bool,
}

impl<R: Registers> Adapter<R> {
    /// Resets the device and sets it up to send and receive, with interrupts off. `is_82574` is for the one member
    /// whose registers differ where it matters here.
    ///
    /// # Errors
    /// Why the device cannot be used; it does not reach memory then.
    pub fn start(mut registers: R, is_82574: bool) -> Result<Self, AdapterError> {
        reset(&mut registers)?;
        let mac = address(&mut registers, is_82574).ok_or(AdapterError::NoAddress)?;
        let receive = ReceiveRing::new().ok_or(AdapterError::NoMemory)?;
        let transmit = TransmitRing::new().ok_or(AdapterError::NoMemory)?;
        let mut adapter = Self { registers, mac, receive, transmit, link_up: false };
        adapter.configure(is_82574);
        adapter.link_up = adapter.read_link();
        Ok(adapter)
    }

    fn configure(&mut self, is_82574: bool) {
        let [m0, m1, m2, m3, m4, m5] = self.mac;
        let high = u32::from(u16::from_le_bytes([m4, m5]));
        let (receive, transmit) = (self.receive.physical(), self.transmit.physical());
        let (receive_tail, device) = (self.receive.tail(), &mut self.registers);
        let forced = control::LINK_RESET
            | control::INVERT_LOSS_OF_SIGNAL
            | control::FORCE
            | control::VLAN
            | control::PHY_RESET;
        let kept = device.read(Register::Control) & !forced;
        device.write(Register::Control, kept | control::SET_LINK_UP | control::DETECT_SPEED);
        // Filters for multicast and further addresses keep what they have: frames let in by them are dropped later.
        device.write(Register::AddressLow, u32::from_le_bytes([m0, m1, m2, m3]));
        device.write(Register::AddressHigh, high | ADDRESS_VALID);

        device.write(Register::ReceiveBaseLow, receive as u32);
        device.write(Register::ReceiveBaseHigh, (receive >> 32) as u32);
        device.write(Register::ReceiveLength, RING_BYTES);
        device.write(Register::ReceiveDelay, 0);
        device.write(Register::InterruptThrottle, 0);
        device.write(Register::ReceiveHead, 0);
        device.write(Register::ReceiveTail, 0);

        device.write(Register::TransmitBaseLow, transmit as u32);
        device.write(Register::TransmitBaseHigh, (transmit >> 32) as u32);
        device.write(Register::TransmitLength, RING_BYTES);
        device.write(Register::TransmitHead, 0);
        device.write(Register::TransmitTail, 0);
        device.write(Register::TransmitGap, TRANSMIT_GAP);
        if is_82574 {
            let value = device.read(Register::TransmitDescriptorControl);
            device.write(Register::TransmitDescriptorControl, value | TXDCTL_ALWAYS);
        }
        let kept = device.read(Register::TransmitControl) & transmit_control::KEPT;
        let wanted = transmit_control::ENABLE
            | transmit_control::PAD
            | transmit_control::TRIES
            | transmit_control::DISTANCE;
        device.write(Register::TransmitControl, kept | wanted);

        let wanted = receive_control::ENABLE | receive_control::BROADCAST | receive_control::STRIP_CHECKSUM;
        device.write(Register::ReceiveControl, wanted);
        device.write(Register::ReceiveTail, receive_tail);
    }

    /// The device's Ethernet address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Whether the link was up when it was last looked at.
    pub fn link_up(&self) -> bool {
        self.link_up
    }

    fn read_link(&self) -> bool {
        self.registers.read(Register::Status) & STATUS_LINK_UP != 0
    }

    /// Copies the oldest received frame to the front of `into` and returns its length. Frames that are damaged or do
    /// not fit are dropped.
    pub fn receive(&mut self, into: &mut [u8]) -> Option<usize> {
        // A device that never runs out of bad frames must not keep the caller.
        for _ in 0..LENGTH {
            let taken = self.receive.take(into);
            if let Some(tail) = self.receive.announce(ANNOUNCE_EVERY) {
                self.registers.write(Register::ReceiveTail, tail);
            }
            match taken {
                Some(Ok(length)) => return Some(length),
                Some(Err(reason)) => log::debug!("e1000: a received frame was dropped: {reason:?}"),
                None => return None,
            }
        }
        None
    }

    /// How many frames [`Adapter::transmit`] finds room for in its queue. Without a link nothing is queued, so it is never full.
    pub fn transmit_room(&mut self) -> usize {
        if self.link_up { self.transmit.room() } else { LENGTH - 1 }
    }

    /// Queues a frame for sending; false if it was dropped.
    pub fn transmit(&mut self, frame: &[u8]) -> bool {
        // Without a link frames would wait in the queue and be sent when they are out of date.
        let tail = if self.link_up { self.transmit.push(frame) } else { None };
        if let Some(tail) = tail {
            self.registers.write(Register::TransmitTail, tail);
        }
        tail.is_some()
    }

    /// Lets the device interrupt when a frame comes or the link changes.
    pub fn enable_interrupts(&mut self) {
        self.registers.write(Register::InterruptMaskSet, cause::USED);
    }

    /// Makes the device interrupt now, to see whether that arrives.
    pub fn provoke_interrupt(&mut self) {
        self.registers.write(Register::InterruptCauseSet, cause::LINK);
    }

    /// Keeps the device from interrupting.
    pub fn disable_interrupts(&mut self) {
        self.registers.write(Register::InterruptMaskClear, cause::ALL);
        self.registers.read(Register::InterruptCause);
    }

    /// Takes the interrupt causes, which silences the device, and follows the link. False if it had not interrupted.
    pub fn take_causes(&mut self) -> bool {
        let causes = self.registers.read(Register::InterruptCause);
        if causes & cause::LINK != 0 {
            let up = self.read_link();
            if up != self.link_up {
                log::info!("e1000: the link is {}", if up { "up" } else { "down" });
                self.link_up = up;
            }
        }
        causes & cause::USED != 0
    }
}

fn reset(registers: &mut impl Registers) -> Result<(), AdapterError> {
    registers.write(Register::InterruptMaskClear, cause::ALL);
    registers.write(Register::ReceiveControl, 0);
    registers.write(Register::TransmitControl, 0);
    let value = registers.read(Register::Control);
    registers.write(Register::Control, value | control::RESET);
    (0..RESET_SPINS).for_each(|_| core::hint::spin_loop());
    let ready = (0..PATIENCE).any(|_| registers.read(Register::Control) & control::RESET == 0);
    registers.write(Register::InterruptMaskClear, cause::ALL);
    registers.read(Register::InterruptCause);
    if ready { Ok(()) } else { Err(AdapterError::Reset) }
}

/// The address in the first filter, where a reset puts the EEPROM's, or the EEPROM's own.
fn address(registers: &mut impl Registers, is_82574: bool) -> Option<[u8; 6]> {
    let (low, high) = (registers.read(Register::AddressLow), registers.read(Register::AddressHigh));
    let [m0, m1, m2, m3] = low.to_le_bytes();
    let [m4, m5, ..] = high.to_le_bytes();
    let filter = [m0, m1, m2, m3, m4, m5];
    if high & ADDRESS_VALID != 0 && is_station(filter) {
        return Some(filter);
    }
    let mut mac = [0; 6];
    for (index, bytes) in (0_u32..).zip(mac.chunks_exact_mut(2)) {
        bytes.copy_from_slice(&eeprom_word(registers, index, is_82574)?.to_le_bytes());
    }
    is_station(mac).then_some(mac)
}

/// Whether an address can be one interface's: not a group's, and not missing.
fn is_station(mac: [u8; 6]) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}

fn eeprom_word(registers: &mut impl Registers, index: u32, is_82574: bool) -> Option<u16> {
    let (done, shift) = if is_82574 { eeprom::NARROW } else { eeprom::WIDE };
    registers.write(Register::EepromRead, index << shift | eeprom::START);
    let answer =
        (0..PATIENCE).map(|_| registers.read(Register::EepromRead)).find(|answer| answer & done != 0)?;
    Some((answer >> eeprom::DATA_SHIFT) as u16)
}
