//! The two 8259A interrupt controllers, for devices that cannot signal by message.
//!
//! Intel 8259A data sheet: initialization command words, operation command words; MultiProcessor Specification
//! 1.4, 3.6.2.2 (virtual-wire mode); Intel 82371SB (PIIX3) data sheet: edge/level control registers.
//!
//! Which I/O APIC pin a PCI function's interrupt reaches is told only by AML, which nobody here runs. The line of
//! the 8259s it reaches is in the function's configuration space, written by the firmware. So the controllers run in
//! virtual-wire mode: their output goes to the boot core's LINT0. PCI's lines are level-triggered and can be shared. A
//! line that has interrupted stays in service, which keeps it quiet, until its driver has silenced the device: that
//! takes no access to the controllers but the end of interrupt.

use super::{apic, interrupts};
use core::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use x86_64::instructions::port::Port;

/// The vectors of the 16 lines, beyond those that message-signalled interrupts get.
pub const FIRST_VECTOR: u8 = 0xE0;
const LINES: u8 = 16;
/// The line that carries the second controller's output.
const CASCADE: u8 = 2;
/// Lines that PCI functions can be routed to: the others belong to the timer, the keyboard, the cascade, the clock and
/// the coprocessor.
const PCI_LINES: u16 = 0b1101_1110_1111_1000;

/// A controller's two ports; the second controller has the lines from 8 up.
#[derive(Clone, Copy)]
struct Controller {
    command: u16,
    data: u16,
}

const FIRST: Controller = Controller { command: 0x20, data: 0x21 };
const SECOND: Controller = Controller { command: 0xA0, data: 0xA1 };

/// ICW1: edge-triggered unless the edge/level registers say otherwise, two controllers, ICW4 follows.
const INITIALIZE: u8 = 0x11;
/// ICW4: 8086 mode, normal end of interrupt.
const MODE_8086: u8 = 0x01;
/// OCW2: specific end of interrupt of the line in the low three bits.
const END_OF_INTERRUPT: u8 = 0x60;
/// OCW3: the next read of the command port gives the in-service register.
const READ_IN_SERVICE: u8 = 0x0B;
/// One bit a line: level-triggered. The second controller's register is the next port.
const EDGE_LEVEL: u16 = 0x4D0;

/// Lines masked now; a copy of the controllers' registers.
static MASKED: AtomicU16 = AtomicU16::new(u16::MAX);
static INITIALIZED: AtomicBool = AtomicBool::new(false);

fn read(port: u16) -> u8 {
    // SAFETY: an 8259A's or the edge/level register's port of a PC; reading has no effect on memory.
    unsafe { Port::<u8>::new(port).read() }
}

fn write(port: u16, value: u8) {
    // SAFETY: as above; writing decides only which interrupts reach this core, and every vector has a handler.
    unsafe { Port::<u8>::new(port).write(value) }
}

/// Masks every line.
pub fn silence() {
    write_masks(u16::MAX);
}

fn write_masks(masked: u16) {
    MASKED.store(masked, Ordering::Relaxed);
    let [first, second] = masked.to_le_bytes();
    write(FIRST.data, first);
    write(SECOND.data, second);
}

fn initialize() {
    for (controller, vector, wiring) in
        [(FIRST, FIRST_VECTOR, 1 << CASCADE), (SECOND, FIRST_VECTOR + 8, CASCADE)]
    {
        write(controller.command, INITIALIZE);
        write(controller.data, vector);
        write(controller.data, wiring);
        write(controller.data, MODE_8086);
    }
    silence();
    apic::accept_legacy_interrupts();
}

/// The controller of a line, and the line's number there.
fn place(line: u8) -> (Controller, u8) {
    if line < 8 { (FIRST, line) } else { (SECOND, line - 8) }
}

fn end_of_interrupt(line: u8) {
    let (controller, input) = place(line);
    write(controller.command, END_OF_INTERRUPT | input);
    if line >= 8 {
        write(FIRST.command, END_OF_INTERRUPT | CASCADE);
    }
}

/// A PCI interrupt line of the 8259s; dropping it masks it.
#[derive(Debug)]
pub struct LegacyLine {
    line: u8,
}

impl LegacyLine {
    /// Sets line `line` up, level-triggered, and unmasks it; `None` if no PCI function can be on it.
    pub fn new(line: u8) -> Option<Self> {
        if line >= LINES || PCI_LINES & 1 << line == 0 {
            return None;
        }
        if !INITIALIZED.swap(true, Ordering::Relaxed) {
            initialize();
        }
        let register = EDGE_LEVEL + u16::from(line / 8);
        write(register, read(register) | 1 << (line % 8));
        let cascade = if line >= 8 { 1 << CASCADE } else { 0 };
        write_masks(MASKED.load(Ordering::Relaxed) & !(1 << line | cascade));
        Some(Self { line })
    }

    /// Whether the line has interrupted since the last call. It does not do so again before [`LegacyLine::rearm`].
    pub fn take_pending(&self) -> bool {
        interrupts::take_vector(FIRST_VECTOR + self.line)
    }

    /// Lets the line interrupt again, once its device has been silenced.
    pub fn rearm(&self) {
        end_of_interrupt(self.line);
    }
}

impl Drop for LegacyLine {
    fn drop(&mut self) {
        write_masks(MASKED.load(Ordering::Relaxed) | 1 << self.line);
        // It may be in service, which holds up lines of lower priority.
        end_of_interrupt(self.line);
    }
}

impl core::fmt::Display for LegacyLine {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "IRQ {}", self.line)
    }
}

/// Whether a vector is one of the 8259s'. The local APIC has nothing in service then.
pub fn is_vector(vector: u8) -> bool {
    (FIRST_VECTOR..FIRST_VECTOR + LINES).contains(&vector)
}

/// Whether the interrupt is spurious: its line was low again when the processor asked for the vector, and the
/// controller, having to say something, gave its last line, which is not in service.
pub fn is_spurious(vector: u8) -> bool {
    let line = vector.wrapping_sub(FIRST_VECTOR) % LINES;
    let (controller, input) = place(line);
    if input != 7 {
        return false;
    }
    write(controller.command, READ_IN_SERVICE);
    let spurious = read(controller.command) & 1 << input == 0;
    if spurious && line >= 8 {
        // The first controller knows nothing of the second's mistake.
        write(FIRST.command, END_OF_INTERRUPT | CASCADE);
    }
    spurious
}
