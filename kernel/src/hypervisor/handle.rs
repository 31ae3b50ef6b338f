//! What a vCPU's exits do.

use super::backend::{Backend, TscOffset, VendorVcpu};
use super::config_space;
use super::exit::{self, Exit};
use super::machine::{Devices, End, MachineMemory};
use super::node::Call;
use super::run::Run;
use super::vcpu::Activity;
use crate::cpu::{clock, fpu, guest_registers};
use alloc::format;
use nestling_machine::address::{GuestPhysAddr, GuestTsc, MsrIndex, Vector};
use nestling_machine::layout::LAPIC_BASE;
use nestling_machine::memory::{GuestMemory, MemoryError};
use nestling_machine::platform::Platform;
use nestling_machine::state::{CpuState, Exception, Gpr};
use nestling_machine::vcpu::emulate::{self, Bus, Emulation, Stop};
use nestling_machine::vcpu::{Lapic, MsrEffect};

/// The CPUID leaf whose sizes follow XCR0.
const XSTATE_LEAF: u32 = 0xD;

const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_IF: u64 = 1 << 9;
const RFLAGS_RF: u64 = 1 << 16;

/// #DB; why is said in DR6.
const DEBUG: Exception = Exception { vector: Vector(1), error_code: None, cr2: None };

impl<B: Backend> Run<'_, B> {
    /// Uses the machine's devices, and settles what comes of it.
    pub(super) fn with_devices<R>(&mut self, work: impl FnOnce(&mut Devices) -> R) -> R {
        let (result, has_news) = self.machine.with_devices(self.node, work);
        self.note_news(has_news);
        result
    }

    fn note_news(&mut self, has_news: bool) {
        if has_news {
            self.node.want_service(Call::News);
        }
        self.has_news |= has_news;
    }

    pub(super) fn handle(&mut self, exit: Exit) {
        log::trace!("{exit:x?} rip {:#x}", self.own.hardware.rip());
        match exit {
            Exit::Interrupt | Exit::Timer | Exit::InterruptWindow | Exit::ControlRegister => {}
            Exit::PauseLoop => self.yields = true,
            Exit::Nmi => log::warn!("non-maskable interrupt while a guest ran; going on"),
            Exit::Cpuid => self.cpuid(),
            Exit::Hlt => self.halt(),
            Exit::ReadMsr => self.read_msr(),
            Exit::WriteMsr => self.write_msr(),
            Exit::Pio { port, width, input, next_rip } => self.pio(port, width, input, next_rip),
            Exit::StringPio => self.emulate(),
            Exit::NestedFault { address, .. } if self.machine.pages.contains(address) => self.back(address),
            Exit::NestedFault { by_instruction: true, .. } => self.emulate(),
            Exit::NestedFault { address, .. } => {
                let what = "a page table, descriptor table or stack in a device's memory";
                self.end(End::Unsupported(format!("{what}, at {:#x}", address.0)));
            }
            Exit::TaskPriority { register, write } => self.task_priority(register, write),
            Exit::TaskPriorityWrite => self.task_priority_write(),
            Exit::Int1 => {
                self.skip();
                self.own.hardware.inject(DEBUG);
            }
            Exit::Xsetbv => self.xsetbv(),
            Exit::CacheFlush => self.skip(),
            Exit::Faulting(exception) | Exit::Exception(exception) => self.raise(exception),
            Exit::MachineCheck => {
                panic!("machine check while a guest ran: the hardware reports an error that may be anywhere")
            }
            Exit::Shutdown => self.end(End::TripleFault),
            Exit::Unexpected { code, info1, info2 } => {
                self.own.hardware.dump();
                self.end(End::Unsupported(format!("exit {code:#x} ({info1:#x}, {info2:#x})")));
            }
        }
    }

    fn halt(&mut self) {
        let rflags = self.own.hardware.rflags();
        self.skip();
        if rflags & RFLAGS_TF != 0 {
            // The trap that follows the instruction ends the wait at once.
        } else if rflags & RFLAGS_IF != 0 {
            self.own.activity = Activity::Halted;
        } else {
            self.own.activity = Activity::HaltedForGood;
        }
    }

    /// Goes past the instruction that exited.
    fn skip(&mut self) {
        match self.own.hardware.next_rip() {
            Some(next) => self.complete(next),
            None => match self.decode_length() {
                Ok(length) => self.complete(self.own.hardware.rip().wrapping_add(u64::from(length))),
                Err(stop) => self.stop(stop),
            },
        }
    }

    /// The exited instruction's length, by decoding it. What cannot be fetched any more has the length of its shortest form.
    fn decode_length(&mut self) -> Result<u8, Stop> {
        match emulate::instruction_length(&self.own.hardware, &mut self.memory()) {
            Err(Stop::Unsupported { length: 0, .. }) => Ok(match self.own.last_exit {
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
        let crosses = (self.own.hardware.rip() ^ next) >> 32 != 0;
        let next = if crosses { emulate::wrap_instruction_pointer(&self.own.hardware, next) } else { next };
        self.own.hardware.set_rip(next);
        self.own.hardware.clear_interrupt_shadow();
        let rflags = self.own.hardware.rflags();
        if rflags & RFLAGS_RF != 0 {
            self.own.hardware.set_rflags(rflags & !RFLAGS_RF);
        }
        if rflags & RFLAGS_TF != 0 {
            self.own.hardware.note_single_step();
            self.own.hardware.inject(DEBUG);
        }
    }

    /// Delivers an exception. Faults push RF set, so that a breakpoint on the instruction does not strike twice (SDM vol. 3, 18.3.1.1).
    fn raise(&mut self, exception: Exception) {
        if exception.vector != DEBUG.vector {
            self.own.hardware.set_rflags(self.own.hardware.rflags() | RFLAGS_RF);
        }
        self.own.hardware.inject(exception);
    }

    fn stop(&mut self, stop: Stop) {
        match stop {
            Stop::Exception(exception) => self.raise(exception),
            Stop::Memory(MemoryError::OutOfFrames) => self.end(End::OutOfFrames),
            Stop::Memory(error @ MemoryError::NotRam { .. }) => {
                self.end(End::Unsupported(format!("{error}")))
            }
            Stop::Unsupported { bytes, length } => self.unsupported(&bytes, length),
        }
    }

    fn unsupported(&mut self, bytes: &[u8; 15], length: u8) {
        self.own.hardware.dump();
        let bytes = bytes.get(..usize::from(length)).unwrap_or(bytes);
        let rip = self.own.hardware.rip();
        let exit = self.own.last_exit;
        self.end(End::Unsupported(match bytes {
            [] => format!("code where no memory is, at {rip:#x}"),
            bytes => format!("the instruction {bytes:02x?} at {rip:#x} after {exit:x?}"),
        }));
    }

    fn cpuid(&mut self) {
        let (leaf, subleaf) =
            (self.own.hardware.gpr(Gpr::Rax) as u32, self.own.hardware.gpr(Gpr::Rcx) as u32);
        if leaf == XSTATE_LEAF {
            self.own.vcpu.observe_xcr0(fpu::xcr0());
        }
        let [eax, ebx, ecx, edx] = self.own.vcpu.cpuid(leaf, subleaf, &self.own.hardware);
        for (register, value) in [(Gpr::Rax, eax), (Gpr::Rbx, ebx), (Gpr::Rcx, ecx), (Gpr::Rdx, edx)] {
            self.own.hardware.set_gpr(register, u64::from(value));
        }
        self.skip();
    }

    fn read_msr(&mut self) {
        let now = self.now();
        let index = MsrIndex(self.own.hardware.gpr(Gpr::Rcx) as u32);
        match self.own.vcpu.read_msr(index, now, &self.own.hardware) {
            Ok(value) => {
                self.own.hardware.set_gpr(Gpr::Rax, value & 0xFFFF_FFFF);
                self.own.hardware.set_gpr(Gpr::Rdx, value >> 32);
                self.skip();
            }
            Err(exception) => {
                log::debug!("rdmsr {index:?} refused");
                self.raise(exception);
            }
        }
    }

    fn write_msr(&mut self) {
        let now = self.now();
        let index = MsrIndex(self.own.hardware.gpr(Gpr::Rcx) as u32);
        let value = self.edx_eax();
        let mut memory = self.memory();
        match self.own.vcpu.write_msr(index, value, now, &self.own.hardware, clock::unix_ns(), &mut memory) {
            Ok(effect) => {
                self.carry_out(effect);
                self.skip();
            }
            Err(exception) => {
                log::debug!("wrmsr {index:?} {value:#x} refused");
                self.raise(exception);
            }
        }
    }

    /// The value in EDX and EAX, as WRMSR and XSETBV take it.
    fn edx_eax(&self) -> u64 {
        self.own.hardware.gpr(Gpr::Rdx) << 32 | self.own.hardware.gpr(Gpr::Rax) & 0xFFFF_FFFF
    }

    /// MOV from or to CR8.
    fn task_priority(&mut self, register: Gpr, write: bool) {
        if !write {
            self.own.hardware.set_gpr(register, u64::from(self.own.vcpu.lapic.tpr() >> 4));
        } else {
            match u8::try_from(self.own.hardware.gpr(register)) {
                Ok(priority @ 0..=15) => self.own.vcpu.lapic.set_tpr(priority << 4),
                _ => return self.raise(Exception::GENERAL_PROTECTION),
            }
        }
        self.skip();
    }

    fn task_priority_write(&mut self) {
        let mut memory = self.memory();
        match emulate::source_register(&self.own.hardware, &mut memory) {
            Ok(register) => self.task_priority(register, true),
            Err(stop) => self.stop(stop),
        }
    }

    fn carry_out(&mut self, effect: MsrEffect) {
        match effect {
            // Guest-physical memory is write-back whatever PAT says, so the guest's PAT is kept by the policy and not loaded.
            MsrEffect::None | MsrEffect::Pat(_) => {}
            MsrEffect::Efer(value) => self.own.hardware.set_efer(value),
            MsrEffect::TscAux(value) => guest_registers::load_tsc_aux(value),
            MsrEffect::TscOffsetDelta(delta) => {
                self.own.offset = TscOffset(self.own.offset.0.wrapping_add_signed(delta));
                self.own.hardware.set_tsc_offset(self.own.offset.0);
            }
        }
    }

    fn xsetbv(&mut self) {
        let (index, value) = (self.own.hardware.gpr(Gpr::Rcx) as u32, self.edx_eax());
        match self.own.vcpu.xsetbv(index, value, &self.own.hardware) {
            Ok(xcr0) => {
                fpu::load_xcr0(xcr0);
                self.skip();
            }
            Err(exception) => self.raise(exception),
        }
    }

    fn pio(&mut self, port: u16, width: u8, input: bool, next_rip: u64) {
        let rax = self.own.hardware.gpr(Gpr::Rax);
        if input {
            let value = u64::from(self.with_devices(|devices| devices.platform.pio_read(port, width)));
            // A 32-bit result clears the upper half; narrower ones leave the rest alone.
            self.own.hardware.set_gpr(
                Gpr::Rax,
                match width {
                    1 => rax & !0xFF | value & 0xFF,
                    2 => rax & !0xFFFF | value & 0xFFFF,
                    _ => value,
                },
            );
        } else {
            let mask = if width >= 4 { u32::MAX } else { (1 << (u32::from(width) * 8)) - 1 };
            self.with_devices(|devices| devices.platform.pio_write(port, width, rax as u32 & mask));
        }
        self.complete(next_rip);
    }

    /// Gives the machine a page of its own where it touched RAM.
    fn back(&mut self, address: GuestPhysAddr) {
        self.cell.exits.recount(exit::MMIO, exit::RAM_FAULT);
        if !self.machine.back(self.node, address) {
            self.end(End::OutOfFrames);
        }
    }

    fn emulate(&mut self) {
        let now = self.now();
        let (machine, node) = (self.machine, self.node);
        let memory = self.memory();
        let own = &mut *self.own;
        let (emulation, has_news) = machine.with_devices(node, |devices| {
            let mut bus = MachineBus::<B> {
                memory,
                platform: &mut devices.platform,
                lapic: &mut own.vcpu.lapic,
                now,
                wrote_config_space: false,
            };
            let emulation = emulate::emulate(&mut own.hardware, &mut bus);
            if bus.wrote_config_space {
                machine.update_config_space(node, devices);
            }
            emulation
        });
        self.note_news(has_news);
        match emulation {
            Emulation::Done => self.own.hardware.clear_interrupt_shadow(),
            Emulation::Partial => {}
            Emulation::Fault(exception) => {
                if exception == DEBUG {
                    // The single step's trap: the instruction is done.
                    self.own.hardware.clear_interrupt_shadow();
                }
                self.raise(exception);
            }
            Emulation::Unsupported { bytes, length } => self.unsupported(&bytes, length),
            Emulation::Memory(error) => self.stop(Stop::Memory(error)),
        }
    }
}

/// What an emulated instruction reaches: RAM, devices and the local APIC's page.
struct MachineBus<'a, B: Backend> {
    memory: MachineMemory<'a, B>,
    platform: &'a mut Platform,
    lapic: &'a mut Lapic,
    now: GuestTsc,
    wrote_config_space: bool,
}

/// Offset in the local APIC's page, if the address lies there.
fn lapic_offset(at: GuestPhysAddr) -> Option<u64> {
    at.0.checked_sub(LAPIC_BASE).filter(|offset| *offset < 0x1000)
}

impl<B: Backend> Bus for MachineBus<'_, B> {
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
