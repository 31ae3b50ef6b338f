//! nestling's kernel: boots as an L1 guest and runs every job in a fresh L2 machine.
//!
//! This page is the boot order, top to bottom.
#![no_std]
#![no_main]

extern crate alloc;

mod boot;
mod cpu;
mod drivers;
mod hypervisor;
mod memory;
mod service;

use boot::BootInfo;
use drivers::acpi::Firmware;
use hypervisor::Backend;
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
    let components = cpu::fpu::init().unwrap_or_else(|error| refuse(&error));
    let backend = hypervisor::Svm::enable().unwrap_or_else(|error| refuse(&error));
    let mut fleet = hypervisor::Fleet::new(
        backend,
        frames,
        alloc::boxed::Box::new(service::entropy::RandomSource::gather(&[])),
        components,
    );
    log::info!("clock {clock:?} {} kHz; {:?} frames", cpu::clock::khz(), fleet.frames());
    let (images, problems) = service::images::load(&boot.modules);
    log::info!("{problems:?} {}", images.len());
    if let Some(level) = boot.command_line.value("log").and_then(|l| l.parse().ok()) {
        log::set_max_level(level);
    }
    let image = nestling_machine::platform::linux::LinuxImage {
        kernel: images[0].kernel,
        initramfs: images[0].initramfs,
        command_line: boot.command_line.value("l2").unwrap_or("panic=-1"),
    };
    let id = fleet.create(&image, 256).unwrap_or_else(|error| refuse(&error));
    while fleet.end(id).is_none() && cpu::clock::now_ns() < 30_000_000_000 {
        fleet.run(Some(cpu::clock::now_ns() + 1_000_000_000));
        log::info!("{:?}", fleet.figures(id).map(|e| e.0.iter().collect::<alloc::vec::Vec<_>>()));
    }
    log::info!("{:?}", fleet.destroy(id));
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
