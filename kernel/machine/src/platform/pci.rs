//! A PCI function's configuration space.
//!
//! PCI Local Bus 3.0, 6.1-6.2 (type 0 header), 6.2.5 (base address registers), 6.7 (capabilities). All of it is a table of bytes and
//! a table of which of their bits can be written: sizing a BAR, for one, then needs no code.

use super::outbox::Outbox;

/// Bytes of conventional configuration space; there is no extended one.
pub(super) const CONFIG_BYTES: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BARS: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const COMMAND_IO: u8 = 1 << 0;
const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
/// Interrupt disable, in the upper byte of the command register.
const COMMAND_NO_INTX: u8 = 1 << 2;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const BAR_IO: u32 = 1 << 0;

/// A function as the buses see it.
pub(super) trait Function {
    /// Reads `width` (1, 2 or 4) bytes of configuration space.
    fn config_read(&mut self, register: usize, width: u8) -> u32;

    /// Writes `width` (1, 2 or 4) bytes of configuration space.
    fn config_write(&mut self, register: usize, width: u8, value: u32, out: &mut Outbox);

    /// Configuration space as reads find it; `None` while a read of some register does more than that.
    fn config_bytes(&self) -> Option<&[u8; CONFIG_BYTES]>;

    /// The BAR that decodes `address`, and the offset in it.
    fn decode(&self, space: Space, address: u32) -> Option<(usize, u32)>;

    /// Reads `width` (1, 2, 4 or 8) bytes at `offset` of a BAR.
    fn bar_read(&mut self, bar: usize, offset: u32, width: u8) -> u64;

    /// Writes `width` (1, 2, 4 or 8) bytes at `offset` of a BAR.
    fn bar_write(&mut self, bar: usize, offset: u32, width: u8, value: u64, out: &mut Outbox);

    /// What the guest did wrong, once it has; the device has stopped then. With the device's name.
    fn fault(&self) -> Option<(&'static str, &str)>;
}

/// What a function says it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    /// Vendor and device id.
    pub(super) id: (u16, u16),
    /// Subsystem vendor and subsystem id.
    pub(super) subsystem: (u16, u16),
    /// Revision.
    pub(super) revision: u8,
    /// Base class, subclass and programming interface.
    pub(super) class: [u8; 3],
}

/// One of the two kinds of address space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Space {
    /// I/O ports.
    Io,
    /// Memory, 32-bit and not prefetchable.
    Memory,
}

/// A base address register's kind and size.
#[derive(Clone, Copy, Debug)]
struct Bar {
    space: Space,
    size: u32,
}

/// A function's configuration space.
#[derive(Clone, Debug)]
pub(super) struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    bars: [Option<Bar>; 6],
    next_capability: usize,
    /// Where the offset of the next capability goes.
    link: usize,
}

impl ConfigSpace {
    /// A type 0 function without BARs or capabilities; its address decoders are off.
    pub(super) fn new(identity: &Identity) -> Self {
        let mut config = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            bars: [None; 6],
            next_capability: FIRST_CAPABILITY,
            link: CAPABILITIES,
        };
        let [base, subclass, interface] = identity.class;
        config.put(0x00, &identity.id.0.to_le_bytes());
        config.put(0x02, &identity.id.1.to_le_bytes());
        config.put(0x08, &[identity.revision, interface, subclass, base]);
        config.put(0x2C, &identity.subsystem.0.to_le_bytes());
        config.put(0x2E, &identity.subsystem.1.to_le_bytes());
        config.allow(COMMAND, &[COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER, COMMAND_NO_INTX]);
        // Interrupt line: a scratch register of the firmware.
        config.allow(0x3C, &[0xFF]);
        config
    }

    /// Adds BAR `index` of `size` bytes, a power of two, already placed at `address`.
    pub(super) fn add_bar(&mut self, index: usize, space: Space, size: u32, address: u32) {
        let flag = if space == Space::Io { BAR_IO } else { 0 };
        self.put(BARS + 4 * index, &(address | flag).to_le_bytes());
        self.allow(BARS + 4 * index, &size.wrapping_neg().to_le_bytes());
        if let Some(bar) = self.bars.get_mut(index) {
            *bar = Some(Bar { space, size });
        }
    }

    /// Adds a capability; `body` follows its id and link. Returns its offset.
    pub(super) fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next_capability;
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.put(self.link, &[at as u8]);
        self.put(STATUS, &[STATUS_CAPABILITIES]);
        self.link = at + 1;
        self.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Sets bytes, whether writable or not.
    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(to) = self.bytes.get_mut(at..).and_then(|rest| rest.get_mut(..bytes.len())) {
            to.copy_from_slice(bytes);
        }
    }

    /// Makes bits writable.
    pub(super) fn allow(&mut self, at: usize, mask: &[u8]) {
        if let Some(to) = self.writable.get_mut(at..).and_then(|rest| rest.get_mut(..mask.len())) {
            to.copy_from_slice(mask);
        }
    }

    /// Reads `width` (1-8) bytes; what lies beyond the space reads zero.
    pub(super) fn read(&self, register: usize, width: u8) -> u32 {
        (0..usize::from(width.min(4))).fold(0, |value, index| {
            let byte = self.bytes.get(register + index).copied().unwrap_or(0);
            value | u32::from(byte) << (8 * index)
        })
    }

    /// All of it.
    pub(super) const fn bytes(&self) -> &[u8; CONFIG_BYTES] {
        &self.bytes
    }

    /// Writes those of `width` (1-4) bytes' bits that are writable.
    pub(super) fn write(&mut self, register: usize, width: u8, value: u32) {
        for (index, new) in value.to_le_bytes().into_iter().take(usize::from(width)).enumerate() {
            let at = register + index;
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = (*byte & !mask) | (new & mask);
            }
        }
    }

    /// The BAR of this space that holds `address`, and the offset in it. None while the space's decoder is off.
    pub(super) fn find_bar(&self, space: Space, address: u32) -> Option<(usize, u32)> {
        let enable = if space == Space::Io { COMMAND_IO } else { COMMAND_MEMORY };
        if self.read(COMMAND, 1) & u32::from(enable) == 0 {
            return None;
        }
        self.bars.iter().enumerate().find_map(|(index, bar)| {
            let bar = bar.filter(|bar| bar.space == space)?;
            let base = self.read(BARS + 4 * index, 4) & bar.size.wrapping_neg();
            let offset = address.checked_sub(base)?;
            (offset < bar.size).then_some((index, offset))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function() -> ConfigSpace {
        let mut config = ConfigSpace::new(&Identity {
            id: (0x1AF4, 0x1053),
            subsystem: (0x1AF4, 0x40),
            revision: 1,
            class: [0x07, 0x80, 0x00],
        });
        config.add_bar(0, Space::Io, 256, 0xC100);
        config.add_bar(1, Space::Memory, 4096, 0xE010_1000);
        config
    }

    #[test]
    fn identity_is_read_only() {
        let mut config = function();
        config.write(0, 4, 0);
        config.write(8, 4, 0);
        assert_eq!(config.read(0, 4), 0x1053_1AF4);
        assert_eq!(config.read(8, 4), 0x0780_0001);
        assert_eq!(config.read(0x0E, 1), 0, "one function, type 0");
        assert_eq!(config.read(0x3D, 1), 0, "no interrupt pin");
    }

    #[test]
    fn bars_are_sized_by_writing_ones() {
        let mut config = function();
        for (index, placed, size) in [(0, 0xC101, 0xFFFF_FF01), (1, 0xE010_1000, 0xFFFF_F000), (2, 0, 0)] {
            let register = 0x10 + 4 * index;
            assert_eq!(config.read(register, 4), placed);
            config.write(register, 4, u32::MAX);
            assert_eq!(config.read(register, 4), size);
        }
    }

    #[test]
    fn bars_decode_only_when_the_command_register_says_so_and_where_they_were_moved() {
        let mut config = function();
        assert_eq!(config.find_bar(Space::Io, 0xC110), None);
        config.write(4, 2, 1);
        assert_eq!(config.find_bar(Space::Io, 0xC110), Some((0, 0x10)));
        assert_eq!(config.find_bar(Space::Io, 0xC200), None);
        assert_eq!(config.find_bar(Space::Memory, 0xE010_1004), None);
        config.write(4, 2, 3);
        assert_eq!(config.find_bar(Space::Memory, 0xE010_1004), Some((1, 4)));
        config.write(0x14, 4, 0xE020_0000);
        assert_eq!(config.find_bar(Space::Memory, 0xE010_1004), None);
        assert_eq!(config.find_bar(Space::Memory, 0xE020_0FFF), Some((1, 0xFFF)));
    }

    #[test]
    fn capabilities_are_linked_in_order() {
        let mut config = function();
        assert_eq!(config.read(STATUS, 1), 0);
        let first = config.add_capability(9, &[1, 2, 3]);
        let second = config.add_capability(0x11, &[4]);
        assert_eq!(config.read(STATUS, 1) as u8, STATUS_CAPABILITIES);
        assert_eq!(config.read(CAPABILITIES, 1) as usize, first);
        assert_eq!(config.read(first, 4), u32::from_le_bytes([9, second as u8, 1, 2]));
        assert_eq!(config.read(second, 2), 0x11);
        assert_eq!(second % 4, 0);
    }

    #[test]
    fn accesses_past_the_end_read_zero() {
        let mut config = function();
        config.write(0xFE, 4, u32::MAX);
        assert_eq!(config.read(0xFE, 4), 0);
        assert_eq!(config.read(0xFFF, 4), 0);
    }
}
