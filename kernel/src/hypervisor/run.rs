//! The vCPU loop: deliver what is due, enter the guest, handle its exit.

use super::backend::{Backend, TscOffset, VendorVcpu};
use super::config_space;
use super::disk::MachineDisk;
use super::exit::{self, Exit};
use super::machine::{End, Machine};
use super::ram::RamView;
use crate::cpu::{self, barriers, clock, fpu, guest_registers, interrupts};
use crate::memory::frames::{FramePool, PrivateFrame};
use crate::storage::Storage;
use alloc::format;
use core::ops::RangeInclusive;
use nestling_machine::address::{GuestPhysAddr, GuestTsc, MsrIndex, Vector};
use nestling_machine::layout::LAPIC_BASE;
use nestling_machine::memory::{GuestMemory, MemoryError};
use nestling_machine::platform::{Entropy, Host, Platform, VsockState};
use nestling_machine::state::{CpuState, Exception, Gpr};
use nestling_machine::vcpu::emulate::{self, Bus, Emulation, Stop};
use nestling_machine::vcpu::{Lapic, MsrEffect, Reception};

/// The CPUID leaf whose sizes follow XCR0.
const XSTATE_LEAF: u32 = 0xD;

const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_IF: u64 = 1 << 9;
const RFLAGS_RF: u64 = 1 << 16;

/// #DB; why is said in DR6.
const DEBUG: Exception = Exception { vector: Vector(1), error_code: None, cr2: None };

/// See [`Machine::take_interrupts`].
const MANY_EXCEPTIONS: u32 = 16;

/// See [`Machine::timer_slack_ns`].
const BOOT_TIMER_SLACK_NS: u64 = 20_000_000;

/// Why a vCPU stopped running.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pause {
    /// It waits for an interrupt.
    Halted,
    /// L1 has something else to do: a device interrupted, the deadline passed, or the guest sent something.
    Service,
    /// The machine has ended.
    Ended,
}

/// What the loop needs of the node.
pub struct Node<'a> {
    /// Where new frames come from.
    pub pool: &'a mut FramePool,
    /// The node's disk.
    pub storage: &'a mut Storage,
    /// Randomness for the guest's entropy device.
    pub entropy: &'a mut dyn Entropy,
    /// When to come back at the latest, in nanoseconds since boot.
    pub deadline: Option<u64>,
    /// Until when device interrupts alone are no reason to come back: a flood of packets must not keep machines from running.
    pub earliest: u64,
}

impl Node<'_> {
    /// Whether the service has something to do that cannot wait, or could be done while the guest waits.
    fn wants_service(&self, halted: bool) -> bool {
        let now = clock::now_ns();
        self.deadline.is_some_and(|deadline| now >= deadline)
            || (interrupts::device_pending() && (halted || now >= self.earliest))
    }

    /// When the physical timer has to end the guest's run for the service's sake.
    fn wake(&self) -> Option<u64> {
        let device = interrupts::device_pending().then_some(self.earliest);
        device.into_iter().chain(self.deadline).min()
    }
}

impl<B: Backend> Machine<B> {
    /// Runs the vCPU, which must be loaded on this core, until there is a reason to pause.
    pub fn run(&mut self, node: &mut Node<'_>) -> Pause {
        let seen = self.vsock_progress();
        loop {
            self.poll_devices(node);
            self.deliver_interrupts();
            if self.end().is_some() {
                return Pause::Ended;
            }
            if self.vsock_progress() != seen || node.wants_service(self.halted) {
                return Pause::Service;
            }
            if self.platform.needs_poll() {
                // A device has done a piece of its work and goes on.
                continue;
            }
            if self.halted {
                return Pause::Halted;
            }
            self.enter(node);
        }
    }

    /// What the guest changes on its vsock that the service may wait for: bytes to take, room to send, the connection's state.
    fn vsock_progress(&mut self) -> (VsockState, usize, usize) {
        let vsock = self.platform.vsock();
        (vsock.state(), vsock.readable(), vsock.unsent())
    }

    fn poll_devices(&mut self, node: &mut Node<'_>) {
        node.storage.poll();
        if self.seen_arrivals != node.storage.arrivals() {
            self.seen_arrivals = node.storage.arrivals();
            self.platform.wake_disk();
        }
        if !self.platform.needs_poll() {
            return;
        }
        let mut disk = MachineDisk { volume: self.volume.as_mut(), cache: &mut node.storage.cache };
        let mut host = Host { entropy: node.entropy, disk: &mut disk };
        self.platform.poll(&mut RamView { ram: &mut self.ram, pool: node.pool }, &mut host);
        node.storage.poll();
        if let Some(volume) = &mut self.volume {
            if volume.wants_slab() {
                volume.give_slab(node.pool.large().map(PrivateFrame::new));
                self.platform.wake_disk();
            }
            if let Some(reason) = volume.fault() {
                self.end.get_or_insert_with(|| End::Disk(reason.into()));
            }
        }
    }

    fn now(&self) -> GuestTsc {
        self.offset.guest(clock::tsc())
    }

    /// Brings the timer and the devices' messages to the local APIC, and the APIC's choice to the guest.
    fn deliver_interrupts(&mut self) {
        let now = self.now();
        self.vcpu.lapic.advance(now);
        while let Some(message) = self.platform.take_interrupt() {
            if self.vcpu.lapic.accepts(&message) {
                let reception = self.vcpu.lapic.deliver(&message);
                self.receive(reception);
            }
        }
        if self.halted && (self.vcpu.lapic.pending().is_some()) {
            self.halted = false;
        }
        if self.vcpu.lapic.take_nmi() {
            self.halted = false;
            self.hardware.inject_nmi();
        }
    }

    fn enter(&mut self, node: &mut Node<'_>) {
        self.hardware.set_task_priority(self.vcpu.lapic.tpr() >> 4);
        self.hardware.offer_interrupt(self.vcpu.lapic.pending_at_any_task_priority());
        self.accept_interrupt();
        self.vcpu.before_entry(&mut RamView { ram: &mut self.ram, pool: node.pool });
        let due = self.due(node.wake());
        self.hardware.arm(due);
        barriers::before_entry();
        let exit = self.hardware.run();
        self.take_interrupts(exit);
        self.last_exit = Some(exit);
        self.exits.count(exit.kind());
        self.vcpu.after_exit(&mut RamView { ram: &mut self.ram, pool: node.pool });
        let priority = self.hardware.task_priority();
        if priority != self.vcpu.lapic.tpr() >> 4 {
            self.vcpu.lapic.set_tpr(priority << 4);
        }
        self.accept_interrupt();
        self.handle(exit, node);
        while let Some(vector) = self.vcpu.lapic.take_eoi() {
            self.platform.end_of_interrupt(vector);
        }
        while let Some(ipi) = self.vcpu.lapic.take_ipi() {
            if self.vcpu.lapic.accepts_ipi(&ipi) {
                let reception = self.vcpu.lapic.deliver_ipi(&ipi);
                self.receive(reception);
            }
        }
    }

    /// Takes the physical interrupts that ended the run. A guest can see to it that an exception ends each of its runs before an interrupt
    /// gets its turn: many in a row are a reason to look.
    fn take_interrupts(&mut self, exit: Exit) {
        self.exceptions_in_a_row = match exit {
            Exit::Exception(_) | Exit::Int1 => self.exceptions_in_a_row + 1,
            _ => 0,
        };
        if matches!(exit, Exit::Interrupt) || self.exceptions_in_a_row >= MANY_EXCEPTIONS {
            self.exceptions_in_a_row = 0;
            cpu::take_interrupts();
        }
    }

    /// What the local APIC cannot do for the processor. A start-up interrupt means nothing to one that runs.
    fn receive(&mut self, reception: Reception) {
        if reception == Reception::Init {
            self.end = Some(End::WaitsForStartUp);
        }
    }

    /// From when to when the next run has to end: for the guest's timer, which has some slack, or for the service at `wake`.
    fn due(&mut self, wake: Option<u64>) -> Option<RangeInclusive<u64>> {
        let slack = self.timer_slack_ns();
        let timer = self.deadline_ns().map(|deadline| (deadline, deadline.saturating_add(slack)));
        let wake = wake.map(|wake| (wake, wake));
        let (earliest, latest) =
            timer.into_iter().chain(wake).reduce(|one, other| (one.0.min(other.0), one.1.min(other.1)))?;
        Some(earliest..=latest)
    }

    /// How late the timer may interrupt a guest that is running. Until the agent has connected nobody waits for anything but the end
    /// of the boot, and every tick costs two exits; Linux makes up for missed ticks by itself. A halted guest is woken in time.
    fn timer_slack_ns(&mut self) -> u64 {
        match self.platform.vsock().state() {
            VsockState::Listening => BOOT_TIMER_SLACK_NS,
            VsockState::Connected | VsockState::Closed => 0,
        }
    }

    fn accept_interrupt(&mut self) {
        if let Some(vector) = self.hardware.take_accepted() {
            self.vcpu.lapic.accept(vector);
        }
    }

    fn handle(&mut self, exit: Exit, node: &mut Node<'_>) {
        log::trace!("{exit:x?} rip {:#x}", self.hardware.rip());
        match exit {
            Exit::Interrupt | Exit::Timer | Exit::InterruptWindow | Exit::ControlRegister => {}
            Exit::Nmi => log::warn!("non-maskable interrupt while a guest ran; going on"),
            Exit::Cpuid => self.cpuid(node),
            Exit::Hlt => self.halt(node),
            Exit::ReadMsr => self.read_msr(node),
            Exit::WriteMsr => self.write_msr(node),
            Exit::Pio { port, width, input, next_rip } => self.pio(port, width, input, next_rip),
            Exit::StringPio => self.emulate(node),
            Exit::NestedFault { address, .. } if self.ram.contains(address) => self.back(address, node),
            Exit::NestedFault { by_instruction: true, .. } => self.emulate(node),
            Exit::NestedFault { address, .. } => {
                let what = "a page table, descriptor table or stack in a device's memory";
                self.end = Some(End::Unsupported(format!("{what}, at {:#x}", address.0)));
            }
            Exit::TaskPriority { register, write } => self.task_priority(register, write, node),
            Exit::TaskPriorityWrite => self.task_priority_write(node),
            Exit::Int1 => {
                self.skip(node);
                self.hardware.inject(DEBUG);
            }
            Exit::Xsetbv => self.xsetbv(node),
            Exit::CacheFlush => self.skip(node),
            Exit::Faulting(exception) | Exit::Exception(exception) => self.raise(exception),
            Exit::MachineCheck => {
                panic!("machine check while a guest ran: the hardware reports an error that may be anywhere")
            }
            Exit::Shutdown => self.end = Some(End::TripleFault),
            Exit::Unexpected { code, info1, info2 } => {
                self.hardware.dump();
                self.end = Some(End::Unsupported(format!("exit {code:#x} ({info1:#x}, {info2:#x})")));
            }
        }
    }

    fn halt(&mut self, node: &mut Node<'_>) {
        let rflags = self.hardware.rflags();
        self.skip(node);
        if rflags & RFLAGS_TF != 0 {
            // The trap that follows the instruction ends the wait at once.
        } else if rflags & RFLAGS_IF != 0 {
            self.halted = true;
        } else {
            // Without interrupts nothing ever wakes the only vCPU.
            self.end = Some(End::Halted);
        }
    }

    /// Goes past the instruction that exited.
    fn skip(&mut self, node: &mut Node<'_>) {
        match self.hardware.next_rip() {
            Some(next) => self.complete(next),
            None => match self.decode_length(node) {
                Ok(length) => self.complete(self.hardware.rip().wrapping_add(u64::from(length))),
                Err(stop) => self.stop(stop),
            },
        }
    }

    /// The exited instruction's length, by decoding it. What cannot be fetched any more has the length of its shortest form.
    fn decode_length(&mut self, node: &mut Node<'_>) -> Result<u8, Stop> {
        match emulate::instruction_length(
            &self.hardware,
            &mut RamView { ram: &mut self.ram, pool: node.pool },
        ) {
            Err(Stop::Unsupported { length: 0, .. }) => Ok(match self.last_exit {
                Some(Exit::Hlt) => 1,
                Some(Exit::Xsetbv) => 3,
                _ => 2,
            }),
            length => length,
        }
    }

    /// The exited instruction is done: the next one is at `next`.
    fn complete(&mut self, next: u64) {
        // Beyond 4 GiB code that is not 64-bit starts over.
        let crosses = (self.hardware.rip() ^ next) >> 32 != 0;
        let next = if crosses { emulate::wrap_instruction_pointer(&self.hardware, next) } else { next };
        self.hardware.set_rip(next);
        self.hardware.clear_interrupt_shadow();
        let rflags = self.hardware.rflags();
        if rflags & RFLAGS_RF != 0 {
            self.hardware.set_rflags(rflags & !RFLAGS_RF);
        }
        if rflags & RFLAGS_TF != 0 {
            self.hardware.note_single_step();
            self.hardware.inject(DEBUG);
        }
    }

    /// Delivers an exception. Faults push RF set, so that a breakpoint on the instruction does not strike twice (SDM vol. 3, 18.3.1.1).
    fn raise(&mut self, exception: Exception) {
        if exception.vector != DEBUG.vector {
            self.hardware.set_rflags(self.hardware.rflags() | RFLAGS_RF);
        }
        self.hardware.inject(exception);
    }

    fn stop(&mut self, stop: Stop) {
        match stop {
            Stop::Exception(exception) => self.raise(exception),
            Stop::Memory(MemoryError::OutOfFrames) => self.end = Some(End::OutOfFrames),
            Stop::Memory(error @ MemoryError::NotRam { .. }) => {
                self.end = Some(End::Unsupported(format!("{error}")))
            }
            Stop::Unsupported { bytes, length } => self.unsupported(&bytes, length),
        }
    }

    fn unsupported(&mut self, bytes: &[u8; 15], length: u8) {
        self.hardware.dump();
        let bytes = bytes.get(..usize::from(length)).unwrap_or(bytes);
        let rip = self.hardware.rip();
        let exit = self.last_exit;
        self.end = Some(End::Unsupported(match bytes {
            [] => format!("code where no memory is, at {rip:#x}"),
            bytes => format!("the instruction {bytes:02x?} at {rip:#x} after {exit:x?}"),
        }));
    }

    fn cpuid(&mut self, node: &mut Node<'_>) {
        let (leaf, subleaf) = (self.hardware.gpr(Gpr::Rax) as u32, self.hardware.gpr(Gpr::Rcx) as u32);
        if leaf == XSTATE_LEAF {
            self.vcpu.observe_xcr0(fpu::xcr0());
        }
        let [eax, ebx, ecx, edx] = self.vcpu.cpuid(leaf, subleaf, &self.hardware);
        for (register, value) in [(Gpr::Rax, eax), (Gpr::Rbx, ebx), (Gpr::Rcx, ecx), (Gpr::Rdx, edx)] {
            self.hardware.set_gpr(register, u64::from(value));
        }
        self.skip(node);
    }

    fn read_msr(&mut self, node: &mut Node<'_>) {
        let now = self.now();
        let index = MsrIndex(self.hardware.gpr(Gpr::Rcx) as u32);
        match self.vcpu.read_msr(index, now, &self.hardware) {
            Ok(value) => {
                self.hardware.set_gpr(Gpr::Rax, value & 0xFFFF_FFFF);
                self.hardware.set_gpr(Gpr::Rdx, value >> 32);
                self.skip(node);
            }
            Err(exception) => {
                log::debug!("rdmsr {index:?} refused");
                self.raise(exception);
            }
        }
    }

    fn write_msr(&mut self, node: &mut Node<'_>) {
        let now = self.now();
        let index = MsrIndex(self.hardware.gpr(Gpr::Rcx) as u32);
        let value = self.edx_eax();
        let mut memory = RamView { ram: &mut self.ram, pool: node.pool };
        match self.vcpu.write_msr(index, value, now, &self.hardware, clock::unix_ns(), &mut memory) {
            Ok(effect) => {
                self.carry_out(effect);
                self.skip(node);
            }
            Err(exception) => {
                log::debug!("wrmsr {index:?} {value:#x} refused");
                self.raise(exception);
            }
        }
    }

    /// The value in EDX and EAX, as WRMSR and XSETBV take it.
    fn edx_eax(&self) -> u64 {
        self.hardware.gpr(Gpr::Rdx) << 32 | self.hardware.gpr(Gpr::Rax) & 0xFFFF_FFFF
    }

    /// MOV from or to CR8.
    fn task_priority(&mut self, register: Gpr, write: bool, node: &mut Node<'_>) {
        if !write {
            self.hardware.set_gpr(register, u64::from(self.vcpu.lapic.tpr() >> 4));
        } else {
            match u8::try_from(self.hardware.gpr(register)) {
                Ok(priority @ 0..=15) => self.vcpu.lapic.set_tpr(priority << 4),
                _ => return self.raise(Exception::GENERAL_PROTECTION),
            }
        }
        self.skip(node);
    }

    fn task_priority_write(&mut self, node: &mut Node<'_>) {
        let mut memory = RamView { ram: &mut self.ram, pool: node.pool };
        match emulate::source_register(&self.hardware, &mut memory) {
            Ok(register) => self.task_priority(register, true, node),
            Err(stop) => self.stop(stop),
        }
    }

    fn carry_out(&mut self, effect: MsrEffect) {
        match effect {
            // Guest-physical memory is write-back whatever PAT says, so the guest's PAT is kept by the policy and not loaded.
            MsrEffect::None | MsrEffect::Pat(_) => {}
            MsrEffect::Efer(value) => self.hardware.set_efer(value),
            MsrEffect::TscAux(value) => guest_registers::load_tsc_aux(value),
            MsrEffect::TscOffsetDelta(delta) => {
                self.offset = TscOffset(self.offset.0.wrapping_add_signed(delta));
                self.hardware.set_tsc_offset(self.offset.0);
            }
        }
    }

    fn xsetbv(&mut self, node: &mut Node<'_>) {
        let (index, value) = (self.hardware.gpr(Gpr::Rcx) as u32, self.edx_eax());
        match self.vcpu.xsetbv(index, value, &self.hardware) {
            Ok(xcr0) => {
                fpu::load_xcr0(xcr0);
                self.skip(node);
            }
            Err(exception) => self.raise(exception),
        }
    }

    fn pio(&mut self, port: u16, width: u8, input: bool, next_rip: u64) {
        let rax = self.hardware.gpr(Gpr::Rax);
        if input {
            let value = u64::from(self.platform.pio_read(port, width));
            // A 32-bit result clears the upper half; narrower ones leave the rest alone.
            self.hardware.set_gpr(
                Gpr::Rax,
                match width {
                    1 => rax & !0xFF | value & 0xFF,
                    2 => rax & !0xFFFF | value & 0xFFFF,
                    _ => value,
                },
            );
        } else {
            let mask = if width >= 4 { u32::MAX } else { (1 << (u32::from(width) * 8)) - 1 };
            self.platform.pio_write(port, width, rax as u32 & mask);
        }
        self.complete(next_rip);
    }

    /// Backs a touched page of RAM and maps it.
    fn back(&mut self, address: GuestPhysAddr, node: &mut Node<'_>) {
        self.exits.recount(exit::MMIO, exit::RAM_FAULT);
        let mapped = match self.ram.back(address, node.pool) {
            Ok(frame) => self.nested.map(address, frame, node.pool),
            Err(_) => false,
        };
        if !mapped {
            self.end = Some(End::OutOfFrames);
        }
    }

    fn emulate(&mut self, node: &mut Node<'_>) {
        let now = self.now();
        let mut bus = MachineBus {
            memory: RamView { ram: &mut self.ram, pool: node.pool },
            platform: &mut self.platform,
            lapic: &mut self.vcpu.lapic,
            now,
            wrote_config_space: false,
        };
        let emulation = emulate::emulate(&mut self.hardware, &mut bus);
        if bus.wrote_config_space {
            self.config_space.update::<B>(&self.platform, &mut self.nested, &mut self.hardware, node.pool);
        }
        match emulation {
            Emulation::Done => self.hardware.clear_interrupt_shadow(),
            Emulation::Partial => {}
            Emulation::Fault(exception) => {
                if exception == DEBUG {
                    // The single step's trap: the instruction is done.
                    self.hardware.clear_interrupt_shadow();
                }
                self.raise(exception);
            }
            Emulation::Unsupported { bytes, length } => self.unsupported(&bytes, length),
            Emulation::Memory(error) => self.stop(Stop::Memory(error)),
        }
    }
}

/// What an emulated instruction reaches: RAM, devices and the local APIC's page.
struct MachineBus<'a> {
    memory: RamView<'a>,
    platform: &'a mut Platform,
    lapic: &'a mut Lapic,
    now: GuestTsc,
    wrote_config_space: bool,
}

/// Offset in the local APIC's page, if the address lies there.
fn lapic_offset(at: GuestPhysAddr) -> Option<u64> {
    at.0.checked_sub(LAPIC_BASE).filter(|offset| *offset < 0x1000)
}

impl Bus for MachineBus<'_> {
    fn memory(&mut self) -> &mut dyn GuestMemory {
        &mut self.memory
    }

    fn mmio_read(&mut self, at: GuestPhysAddr, width: u8) -> u64 {
        match lapic_offset(at) {
            Some(offset) => u64::from(self.lapic.mmio_read(offset, self.now)),
            None => self.platform.mmio_read(at, width),
        }
    }

    fn mmio_write(&mut self, at: GuestPhysAddr, width: u8, value: u64) {
        match lapic_offset(at) {
            Some(offset) => self.lapic.mmio_write(offset, value as u32, self.now),
            None => {
                self.platform.mmio_write(at, width, value);
                self.wrote_config_space |= config_space::contains(at);
            }
        }
    }

    fn pio_read(&mut self, port: u16, width: u8) -> u32 {
        self.platform.pio_read(port, width)
    }

    fn pio_write(&mut self, port: u16, width: u8, value: u32) {
        self.platform.pio_write(port, width, value);
    }
}
