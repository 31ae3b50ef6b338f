//! The first serial port as L1's log.
//!
//! National Semiconductor PC16550D data sheet, section 8 "Registers".

use core::fmt::{self, Write};
use log::{Level, LevelFilter, Log, Metadata, Record};
use spin::{Mutex, MutexGuard};
use x86_64::instructions::port::Port;

const BASE: u16 = 0x3F8;
/// Line status bit 5: the transmit FIFO is empty.
const FIFO_EMPTY: u8 = 1 << 5;
/// Line status bit 6: and the last bit is on the line.
const LINE_IDLE: u8 = 1 << 6;
const FIFO_DEPTH: usize = 16;
/// How often the status is read before a port is taken for stuck: 16 bytes take 1.4 ms, a read 0.1 us at least.
const MOST_READS: usize = 1_000_000;

/// The port as a text sink.
struct Serial;

/// Held for a line at a time.
static PORT: Mutex<Serial> = Mutex::new(Serial);
/// How often the lock is tried: a line takes 10 ms, and a try some nanoseconds.
const MOST_TRIES: usize = 10_000_000;

/// The port, from whichever core. It is not waited for without end: an NMI, or a core that died, may have it.
fn lock() -> Option<MutexGuard<'static, Serial>> {
    (0..MOST_TRIES).find_map(|_| {
        core::hint::spin_loop();
        PORT.try_lock()
    })
}

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut data = Port::<u8>::new(BASE);
        for chunk in text.as_bytes().chunks(FIFO_DEPTH) {
            wait_for(FIFO_EMPTY);
            for &byte in chunk {
                // SAFETY: the transmit FIFO was empty and takes 16 bytes.
                unsafe { data.write(byte) };
            }
        }
        Ok(())
    }
}

/// Waits for a bit of the line status. A port that is not there reads as all ones.
fn wait_for(status: u8) {
    for _ in 0..MOST_READS {
        // SAFETY: the line status register; reading it has no effect on memory.
        if unsafe { Port::<u8>::new(BASE + 5).read() } & status != 0 {
            break;
        }
        core::hint::spin_loop();
    }
}

struct Logger;

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Libraries' everyday news are of use only to who asks for all of it.
        let own = metadata.target().starts_with("nestling");
        let floor =
            if own || log::max_level() > LevelFilter::Info { log::max_level() } else { LevelFilter::Warn };
        metadata.level() <= floor
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let now = crate::cpu::clock::now_ns() / 1000;
        let (seconds, micros) = (now / 1_000_000, now % 1_000_000);
        let _lock = lock();
        // The port cannot fail.
        let _ = match record.level() {
            Level::Error => write!(Serial, "[{seconds:5}.{micros:06}] error: {}\r\n", record.args()),
            Level::Warn => write!(Serial, "[{seconds:5}.{micros:06}] warning: {}\r\n", record.args()),
            Level::Info => write!(Serial, "[{seconds:5}.{micros:06}] {}\r\n", record.args()),
            level => {
                write!(Serial, "[{seconds:5}.{micros:06}] {level} {}: {}\r\n", record.target(), record.args())
            }
        };
    }

    fn flush(&self) {
        wait_for(LINE_IDLE);
    }
}

/// Sets the port to 115200 8N1 with FIFOs and makes it the log, at level info.
pub fn init() {
    for (offset, value) in [(1, 0x00), (3, 0x80), (0, 0x01), (1, 0x00), (3, 0x03), (2, 0xC7), (4, 0x03)] {
        // SAFETY: the UART's own registers: interrupts off, divisor 1, 8N1, FIFOs on, DTR and RTS.
        unsafe { Port::<u8>::new(BASE + offset).write(value) };
    }
    // Only the first call can succeed, and there is only one.
    let _ = log::set_logger(&Logger);
    log::set_max_level(LevelFilter::Info);
}

/// Sets the log's level from the command line's `log=`.
pub fn set_level(value: Option<&str>) {
    let Some(value) = value else { return };
    match value.parse() {
        Ok(level) => log::set_max_level(level),
        Err(_) => log::warn!("log={value} is unknown: give error, warn, info, debug or trace"),
    }
}

/// Writes past the log's level and format: for dumps of a dying kernel.
pub fn write_raw(arguments: fmt::Arguments<'_>) {
    let _lock = lock();
    // The port cannot fail.
    let _ = Serial.write_fmt(arguments);
}
