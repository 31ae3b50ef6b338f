//! nestling's kernel: boots as an L1 guest and runs every job in a fresh L2 machine.
//!
//! This page is the boot order, top to bottom.
#![no_std]
#![no_main]

extern crate alloc;

mod boot;
mod cpu;
mod drivers;
mod memory;

use boot::BootInfo;
use drivers::acpi::Firmware;
use spin::Once;

static FIRMWARE: Once<Firmware> = Once::new();

/// From the loader's words to the main loop. `entry_tsc` is the time-stamp counter at the kernel's first instruction.
fn run(boot: &BootInfo, entry_tsc: u64) -> ! {
    cpu::descriptors::init();
    let frames = memory::init(boot).unwrap_or_else(|error| refuse(&error));
    cpu::apic::init();
    match boot.rsdp.map(Firmware::read) {
        Some(Ok(firmware)) => drop(FIRMWARE.call_once(|| firmware)),
        Some(Err(error)) => log::warn!("no usable ACPI tables: {error}; one core, no power-off"),
        None => log::warn!("the boot loader gave no ACPI root pointer; one core, no power-off"),
    }
    let clock = cpu::clock::init(entry_tsc, FIRMWARE.get().and_then(|firmware| firmware.pm_timer_port));
    log::info!("nestling {} boots", env!("CARGO_PKG_VERSION"));
    log::info!(
        "clock {:?} {} kHz {:?} {:?}",
        clock,
        cpu::clock::khz(),
        frames.counts(),
        memory::heap::usage()
    );
    cpu::apic::timer_arm(Some(cpu::clock::now_ns() + 500_000_000));
    cpu::idle();
    log::info!("timer {}", cpu::interrupts::take_timer());
    power_off()
}

/// Says why the node cannot run, and powers off.
fn refuse(reason: &dyn core::fmt::Display) -> ! {
    log::error!("this node cannot run: {reason}");
    power_off()
}

/// Powers the L1 off by ACPI; where that is not possible, stops.
fn power_off() -> ! {
    if let Some(firmware) = FIRMWARE.get() {
        firmware.power_off();
    }
    cpu::halt_forever()
}
