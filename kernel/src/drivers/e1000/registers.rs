//! The e1000 family's registers, as far as they are used.
//!
//! Intel 317453 (PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual), 13.4 and 13.5; Intel
//! 317694 (82574L data sheet), 10.2. All registers are 32 bits wide and read and written whole.

use core::ptr::NonNull;

use super::super::pci::Region;

/// How much of the first region the registers used here take, in bytes.
const BYTES: u64 = 0x6000;

/// A register's offset in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Register {
    /// CTRL, device control.
    Control = 0x0000,
    /// STATUS, device status.
    Status = 0x0008,
    /// EERD, EEPROM read.
    EepromRead = 0x0014,
    /// ICR, interrupt cause; reading clears it.
    InterruptCause = 0x00c0,
    /// ITR, least time between two interrupts.
    InterruptThrottle = 0x00c4,
    /// ICS, interrupt cause set.
    InterruptCauseSet = 0x00c8,
    /// IMS, interrupt mask set.
    InterruptMaskSet = 0x00d0,
    /// IMC, interrupt mask clear.
    InterruptMaskClear = 0x00d8,
    /// RCTL, receive control.
    ReceiveControl = 0x0100,
    /// TCTL, transmit control.
    TransmitControl = 0x0400,
    /// TIPG, gaps between frames.
    TransmitGap = 0x0410,
    /// RDBAL, receive ring's address, low half.
    ReceiveBaseLow = 0x2800,
    /// RDBAH, its high half.
    ReceiveBaseHigh = 0x2804,
    /// RDLEN, the ring's length in bytes.
    ReceiveLength = 0x2808,
    /// RDH, the next descriptor the device uses.
    ReceiveHead = 0x2810,
    /// RDT, the first descriptor the device may not use.
    ReceiveTail = 0x2818,
    /// RDTR, how long a receive interrupt may be delayed.
    ReceiveDelay = 0x2820,
    /// TDBAL, transmit ring's address, low half.
    TransmitBaseLow = 0x3800,
    /// TDBAH, its high half.
    TransmitBaseHigh = 0x3804,
    /// TDLEN, the ring's length in bytes.
    TransmitLength = 0x3808,
    /// TDH, the next descriptor the device sends.
    TransmitHead = 0x3810,
    /// TDT, the first descriptor the device may not send.
    TransmitTail = 0x3818,
    /// TXDCTL, when transmit descriptors are fetched and written back.
    TransmitDescriptorControl = 0x3828,
    /// RAL of the first address filter: the address's first four bytes.
    AddressLow = 0x5400,
    /// RAH of the first address filter: its last two bytes.
    AddressHigh = 0x5404,
}

/// CTRL, 13.4.1.
pub mod control {
    /// LRST, link reset.
    pub const LINK_RESET: u32 = 1 << 3;
    /// ASDE, the speed is what the link negotiates.
    pub const DETECT_SPEED: u32 = 1 << 5;
    /// SLU, set link up.
    pub const SET_LINK_UP: u32 = 1 << 6;
    /// ILOS, loss of signal is inverted.
    pub const INVERT_LOSS_OF_SIGNAL: u32 = 1 << 7;
    /// FRCSPD and FRCDPX, speed and duplex are forced.
    pub const FORCE: u32 = 1 << 11 | 1 << 12;
    /// RST, device reset; clears itself.
    pub const RESET: u32 = 1 << 26;
    /// VME, VLAN tags are stripped.
    pub const VLAN: u32 = 1 << 30;
    /// PHY_RST.
    pub const PHY_RESET: u32 = 1 << 31;
}

/// STATUS, 13.4.2: LU, the link is up.
pub const STATUS_LINK_UP: u32 = 1 << 1;

/// EERD, 13.4.4. The 82540's fields and those of the 82541, 82547 and 82574 lie apart.
pub mod eeprom {
    /// START.
    pub const START: u32 = 1;
    /// DONE and the shift of the word's number, in the 82540's form.
    pub const WIDE: (u32, u32) = (1 << 4, 8);
    /// The same in the later form.
    pub const NARROW: (u32, u32) = (1 << 1, 2);
    /// Shift of the word read.
    pub const DATA_SHIFT: u32 = 16;
}

/// Interrupt causes, 13.4.17.
pub mod cause {
    /// LSC, the link came or went.
    pub const LINK: u32 = 1 << 2;
    /// RXO, a frame came and there was no descriptor.
    pub const RECEIVE_OVERRUN: u32 = 1 << 6;
    /// RXT0, a frame came.
    pub const RECEIVE: u32 = 1 << 7;
    /// The causes that interrupt.
    pub const USED: u32 = LINK | RECEIVE_OVERRUN | RECEIVE;
    /// Every cause.
    pub const ALL: u32 = u32::MAX;
}

/// RCTL, 13.4.22. Buffers of 2048 bytes (BSIZE 0), no long frames, neither promiscuous mode.
pub mod receive_control {
    /// EN.
    pub const ENABLE: u32 = 1 << 1;
    /// BAM, broadcasts are taken.
    pub const BROADCAST: u32 = 1 << 15;
    /// SECRC, the frame's checksum is not stored.
    pub const STRIP_CHECKSUM: u32 = 1 << 26;
}

/// TCTL, 13.4.33.
pub mod transmit_control {
    /// EN.
    pub const ENABLE: u32 = 1 << 1;
    /// PSP, short frames are padded.
    pub const PAD: u32 = 1 << 3;
    /// CT, tries after collisions: 15.
    pub const TRIES: u32 = 0x0f << 4;
    /// COLD, the collision distance at full duplex: 64 bytes.
    pub const DISTANCE: u32 = 0x40 << 12;
    /// Bits that later members define, which keep their reset values.
    pub const KEPT: u32 = 0xf << 28;
}

/// TIPG, 13.4.34: the gaps for copper, IPGT 8, IPGR1 8, IPGR2 6.
pub const TRANSMIT_GAP: u32 = 8 | 8 << 10 | 6 << 20;

/// TXDCTL bit 22, which the 82574 wants set.
pub const TXDCTL_ALWAYS: u32 = 1 << 22;

/// RAH, 13.5.3: AV, the filter is valid.
pub const ADDRESS_VALID: u32 = 1 << 31;

/// A device's registers.
pub trait Registers {
    /// Reads a register.
    fn read(&self, register: Register) -> u32;

    /// Writes a register.
    fn write(&mut self, register: Register, value: u32);
}

/// Registers in memory space.
#[derive(Debug)]
pub struct Mmio {
    base: NonNull<u8>,
}

impl Mmio {
    /// Maps the registers at the start of a function's region; `None` if the region is too small for them.
    pub fn map(region: Region) -> Option<Self> {
        let region = region.part(0, BYTES)?;
        let base = NonNull::new(crate::memory::map_mmio(region.address, BYTES as usize))?;
        base.cast::<u32>().is_aligned().then_some(Self { base })
    }

    fn pointer(&self, register: Register) -> *mut u32 {
        self.base.as_ptr().wrapping_add(register as usize).cast()
    }
}

impl Registers for Mmio {
    fn read(&self, register: Register) -> u32 {
        // SAFETY: every register lies within the mapped region and is aligned.
        unsafe { self.pointer(register).read_volatile() }
    }

    fn write(&mut self, register: Register, value: u32) {
        // SAFETY: as in `read`. What the device does to memory is bounded by the rings' addresses and lengths, which
        // only the adapter sets.
        unsafe { self.pointer(register).write_volatile(value) }
    }
}
