//! A 16550A serial port: output goes to the console tail, there is no input.
//!
//! Texas Instruments TL16C550C data sheet, "Principles of operation" (register map, interrupts, loop-back mode). Each access
//! costs the guest an exit, so nothing here is slower than the data sheet asks: the transmitter is always empty.

use super::console::ConsoleTail;

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMITTER_EMPTY: u8 = 1 << 1;
const IER_IMPLEMENTED: u8 = 0x0F;
const IIR_NONE: u8 = 0x01;
const IIR_TRANSMITTER_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_FIFOS_ENABLED: u8 = 0xC0;
const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;
const LCR_DIVISOR_LATCH: u8 = 1 << 7;
const MCR_IMPLEMENTED: u8 = 0x1F;
const MCR_INTERRUPT_ENABLE: u8 = 1 << 3;
const MCR_LOOP_BACK: u8 = 1 << 4;
const LSR_DATA_READY: u8 = 1 << 0;
const LSR_TRANSMITTER_IDLE: u8 = 0x60;
/// Clear to send, data set ready and carrier detect: a terminal is always there.
const MSR_CONNECTED: u8 = 0xB0;

/// The serial port's registers.
#[derive(Clone, Debug)]
pub(super) struct Serial {
    interrupt_enable: u8,
    fifos_enabled: bool,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    divisor: [u8; 2],
    /// The one byte that loop-back mode hands back.
    received: Option<u8>,
    transmitter_empty_pending: bool,
    console: ConsoleTail,
}

impl Default for Serial {
    fn default() -> Self {
        Self {
            interrupt_enable: 0,
            fifos_enabled: false,
            line_control: 0,
            modem_control: 0,
            scratch: 0,
            divisor: [1, 0],
            received: None,
            transmitter_empty_pending: false,
            console: ConsoleTail::default(),
        }
    }
}

impl Serial {
    /// What was written so far.
    pub(super) const fn console(&self) -> &ConsoleTail {
        &self.console
    }

    /// Whether the port drives its interrupt line.
    pub(super) const fn interrupt_line(&self) -> bool {
        self.modem_control & (MCR_INTERRUPT_ENABLE | MCR_LOOP_BACK) == MCR_INTERRUPT_ENABLE
            && self.interrupt_identification() != IIR_NONE
    }

    const fn interrupt_identification(&self) -> u8 {
        if self.interrupt_enable & IER_RECEIVED != 0 && self.received.is_some() {
            IIR_RECEIVED
        } else if self.interrupt_enable & IER_TRANSMITTER_EMPTY != 0 && self.transmitter_empty_pending {
            IIR_TRANSMITTER_EMPTY
        } else {
            IIR_NONE
        }
    }

    const fn divisor_latch_open(&self) -> bool {
        self.line_control & LCR_DIVISOR_LATCH != 0
    }

    /// Reads register `offset`, 0-7.
    pub(super) fn read(&mut self, offset: u16) -> u8 {
        match offset {
            0 if self.divisor_latch_open() => self.divisor[0],
            1 if self.divisor_latch_open() => self.divisor[1],
            0 => self.received.take().unwrap_or(0),
            1 => self.interrupt_enable,
            2 => {
                let identification = self.interrupt_identification();
                if identification == IIR_TRANSMITTER_EMPTY {
                    self.transmitter_empty_pending = false;
                }
                identification | if self.fifos_enabled { IIR_FIFOS_ENABLED } else { 0 }
            }
            3 => self.line_control,
            4 => self.modem_control,
            5 => LSR_TRANSMITTER_IDLE | if self.received.is_some() { LSR_DATA_READY } else { 0 },
            6 if self.modem_control & MCR_LOOP_BACK != 0 => {
                // DTR, RTS, OUT1 and OUT2 come back as DSR, CTS, RI and DCD.
                let out = self.modem_control;
                (out & 1) << 5 | (out & 2) << 3 | (out & 4) << 4 | (out & 8) << 4
            }
            6 => MSR_CONNECTED,
            7 => self.scratch,
            _ => 0xFF,
        }
    }

    /// Writes register `offset`, 0-7.
    pub(super) fn write(&mut self, offset: u16, value: u8) {
        match offset {
            0 if self.divisor_latch_open() => self.divisor[0] = value,
            1 if self.divisor_latch_open() => self.divisor[1] = value,
            0 => {
                if self.modem_control & MCR_LOOP_BACK != 0 {
                    self.received = Some(value);
                } else {
                    self.console.push(value);
                }
                self.transmitter_empty_pending = true;
            }
            1 => {
                let enabled = value & IER_IMPLEMENTED & !self.interrupt_enable;
                self.interrupt_enable = value & IER_IMPLEMENTED;
                if enabled & IER_TRANSMITTER_EMPTY != 0 {
                    self.transmitter_empty_pending = true;
                }
            }
            2 => {
                self.fifos_enabled = value & FCR_ENABLE != 0;
                if value & FCR_CLEAR_RECEIVER != 0 {
                    self.received = None;
                }
            }
            3 => self.line_control = value,
            4 => self.modem_control = value & MCR_IMPLEMENTED,
            7 => self.scratch = value,
            // Line and modem status are read-only.
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_bytes_reach_the_console() {
        let mut serial = Serial::default();
        b"nest\n".iter().for_each(|&byte| serial.write(0, byte));
        assert_eq!(serial.console().last_lines(1), ["nest"]);
        assert_eq!(serial.read(5), LSR_TRANSMITTER_IDLE);
    }

    #[test]
    fn the_divisor_latch_hides_data_and_interrupt_enable() {
        let mut serial = Serial::default();
        serial.write(3, LCR_DIVISOR_LATCH | 3);
        serial.write(0, 0x0C);
        serial.write(1, 0x01);
        assert_eq!((serial.read(0), serial.read(1)), (0x0C, 0x01));
        serial.write(3, 3);
        assert_eq!(serial.read(1), 0);
        assert_eq!(serial.console().total(), 0);
    }

    #[test]
    fn linux_detects_a_16550a() {
        let mut serial = Serial::default();
        serial.write(1, 0xFF);
        assert_eq!(serial.read(1), 0x0F, "only four interrupt enables exist");
        serial.write(1, 0);
        serial.write(4, MCR_LOOP_BACK | 0x0A);
        assert_eq!(serial.read(6) & 0xF0, 0x90, "loop-back wires modem outputs to inputs");
        serial.write(4, 0);
        assert_eq!(serial.read(2) & 0xC0, 0);
        serial.write(2, FCR_ENABLE);
        assert_eq!(serial.read(2) & 0xC0, 0xC0, "the FIFOs are there");
        serial.write(7, 0x5A);
        assert_eq!(serial.read(7), 0x5A);
    }

    #[test]
    fn the_transmitter_interrupt_is_raised_and_cleared_by_its_identification() {
        let mut serial = Serial::default();
        serial.write(4, MCR_INTERRUPT_ENABLE);
        assert!(!serial.interrupt_line());
        serial.write(1, IER_TRANSMITTER_EMPTY);
        assert!(serial.interrupt_line());
        assert_eq!(serial.read(2), IIR_TRANSMITTER_EMPTY);
        assert!(!serial.interrupt_line());
        assert_eq!(serial.read(2), IIR_NONE);
        serial.write(0, b'x');
        assert!(serial.interrupt_line());
        serial.write(4, 0);
        assert!(!serial.interrupt_line(), "OUT2 gates the line");
    }

    #[test]
    fn loop_back_returns_the_byte_and_prints_nothing() {
        let mut serial = Serial::default();
        serial.write(4, MCR_LOOP_BACK);
        serial.write(0, 0xA5);
        assert_eq!(serial.read(5) & LSR_DATA_READY, LSR_DATA_READY);
        assert_eq!(serial.read(0), 0xA5);
        assert_eq!(serial.console().total(), 0);
    }
}
