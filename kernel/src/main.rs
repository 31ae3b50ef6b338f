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
mod storage;

use alloc::boxed::Box;
use alloc::vec::Vec;
use boot::BootInfo;
use drivers::acpi::Firmware;
use hypervisor::settings::Settings;
use hypervisor::{Backend, Fleet, Node, Runner, Svm, Vmx};
use memory::frames::FramePool;
use service::Service;
use service::entropy::RandomSource;
use spin::Once;
use storage::Storage;

static FIRMWARE: Once<Firmware> = Once::new();

/// From the loader's words to the main loop. `entry_tsc` is the time-stamp counter at the kernel's first instruction.
fn run(boot: &BootInfo, entry_tsc: u64) -> ! {
    cpu::local::init(0);
    cpu::descriptors::init();
    let frames = memory::init(boot).unwrap_or_else(|error| {
        // Only to power off by; the boot heap may be too small for a large machine's tables, but such a machine has memory.
        find_firmware(boot);
        refuse(&error)
    });
    cpu::apic::init();
    let firmware = find_firmware(boot);
    let clock = cpu::clock::init(entry_tsc, firmware.pm_timer_port);
    drivers::serial::set_level(boot.command_line.value("log"));
    log::info!("nestling {}", env!("CARGO_PKG_VERSION"));
    match drivers::rtc::unix_seconds() {
        Some(seconds) => cpu::clock::set_unix_ns(seconds * 1_000_000_000),
        None => log::warn!("no clock tells the date: times in answers start in 1970"),
    }
    let components = cpu::fpu::init();
    // The one place that knows of vendors: everything from here on exists once for each.
    if hypervisor::wants_svm() {
        run_on::<Svm>(boot, frames, clock, components)
    } else {
        run_on::<Vmx>(boot, frames, clock, components)
    }
}

/// The rest of the boot order, on one vendor's virtualization.
fn run_on<B: Backend>(
    boot: &BootInfo,
    mut frames: FramePool,
    clock: cpu::clock::Source,
    components: u64,
) -> ! {
    let firmware = find_firmware(boot);
    cpu::barriers::init();
    let settings = Settings::read(&boot.command_line).unwrap_or_else(|error| refuse(&error));
    let backend: &B = Box::leak(Box::new(B::enable().unwrap_or_else(|refusal| refuse(&refusal))));
    let cores = start_cores(boot, firmware, &frames, settings.cores, components, backend);
    report(firmware, clock, &frames, backend, cores.len());
    let bus = drivers::pci::Bus::find(firmware);
    let nic = drivers::nic::find(bus.as_ref()).unwrap_or_else(|error| refuse(&error));
    let disk = drivers::disk::find(bus.as_ref()).unwrap_or_else(|error| {
        log::error!("{error}: the node goes on without a disk");
        None
    });
    let mut storage = Storage::new(disk, &mut frames);
    storage.find_scratch(&mut frames);
    let catalog = service::find_images(&boot.modules, &mut storage, &mut frames);
    let mut random = RandomSource::gather(&nic.mac());
    let entropy = Box::new(random.fork());
    let node: &Node<B> = Box::leak(Box::new(Node::new(backend, frames, storage, entropy, &cores)));
    cpu::cores::release(Box::leak(Box::new(|core| Runner::new(node, core).run_forever())));
    let fleet = Fleet::new(node, components, &settings);
    let service = Service::new(boot, nic, random, catalog).unwrap_or_else(|error| refuse(&error));
    serve(service, fleet)
}

/// Starts the other cores, as many as the operator wants. The APIC ids of those in use, this one first.
fn start_cores<B: Backend>(
    boot: &BootInfo,
    firmware: &Firmware,
    frames: &FramePool,
    limit: usize,
    components: u64,
    backend: &'static B,
) -> Vec<u32> {
    let mut cores = Vec::from([cpu::apic::boot_id()]);
    let others = firmware.apic_ids.iter().copied().filter(|id| *id != cpu::apic::boot_id());
    let others: Vec<u32> = others.take(limit.saturating_sub(1)).collect();
    if others.is_empty() {
        return cores;
    }
    let Some(page) = memory::real_mode_page(boot) else {
        log::warn!("no free memory below 1 MiB, where the other cores would start: one core in use");
        return cores;
    };
    let prepare = Box::leak(Box::new(move || {
        if cpu::fpu::init() != components {
            log::warn!("a core's vector state is not like the first core's");
            return false;
        }
        backend.enable_here().inspect_err(|refusal| log::warn!("{refusal}")).is_ok()
    }));
    let mut stacks = memory::Stacks::new(frames);
    let stack = || stacks.another(cpu::cores::STACK_BYTES);
    cores.extend(cpu::cores::start(&others, page, stack, prepare));
    cores
}

/// The main loop: what came in is handled, then machines run until something else comes.
fn serve<B: Backend>(
    mut service: Service<hypervisor::MachineId, hypervisor::TemplateId>,
    mut fleet: Fleet<B>,
) -> ! {
    let mut has_news = true;
    loop {
        // Before the poll: what interrupts during it is for the next one.
        cpu::interrupts::take_device();
        let deadline = service.poll(&mut fleet, has_news);
        has_news = fleet.run(deadline);
    }
}

fn find_firmware(boot: &BootInfo) -> &'static Firmware {
    FIRMWARE.call_once(|| match boot.rsdp.map(Firmware::read) {
        Some(Ok(firmware)) => firmware,
        Some(Err(error)) => {
            log::warn!("{error}: one core, no power-off");
            Firmware::default()
        }
        None => {
            log::warn!("the boot loader gave no ACPI root pointer: one core, no power-off");
            Firmware::default()
        }
    })
}

fn report<B: Backend>(
    firmware: &Firmware,
    clock: cpu::clock::Source,
    frames: &FramePool,
    backend: &B,
    in_use: usize,
) {
    let (free, _) = frames.counts();
    let total = memory::total_bytes() >> 20;
    log::info!("memory: {total} MiB, {} MiB for machines", (free as u64 * memory::frames::SMALL_FRAME) >> 20);
    let apic = if cpu::apic::is_x2apic() { "x2APIC" } else { "xAPIC" };
    let (cores, khz) = (firmware.apic_ids.len().max(1), cpu::clock::khz());
    log::info!(
        "cores: {cores}, {in_use} in use, {apic}, TSC {}.{:03} MHz by {clock}",
        khz / 1000,
        khz % 1000
    );
    let names = |there| {
        backend.features().iter().filter(move |f| f.1 == there).map(|f| f.0).collect::<Vec<_>>().join(" ")
    };
    log::info!("{}: {}; missing: {}", B::VENDOR, names(true), names(false));
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
