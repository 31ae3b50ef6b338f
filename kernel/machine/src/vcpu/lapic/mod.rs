//! The local APIC: which interrupt a processor takes next.
//!
//! Intel SDM vol. 3, 11.4-11.9 and 11.12 (x2APIC). One model with two faces, see `registers`. Interrupts are delivered by the
//! hypervisor: it asks [`Lapic::pending_at_any_task_priority`] and, once delivered, [`Lapic::accept`]s.
//!
//! What a real one has and this one leaves out: the id is read-only in xAPIC mode, the register page cannot be moved, and the
//! LINT pins are not wired to anything.

mod addressing;
mod registers;
#[cfg(test)]
mod tests;
mod timer;
mod vectors;

use super::VcpuConfig;
use crate::address::{GuestTsc, Vector};
use crate::interrupt::{DeliveryMode, Destination, Ipi};
use crate::layout;
use crate::state::Exception;
pub use addressing::Addressing;
use timer::{Mode, Timer};
use vectors::VectorSet;

const BASE_BSP: u64 = 1 << 8;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLE: u64 = 1 << 11;

const SPURIOUS_ENABLE: u32 = 1 << 8;
const SPURIOUS_RESET: u32 = 0xFF;
const LVT_MASKED: u32 = 1 << 16;

const ERROR_SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
const ERROR_RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;

/// The local vector table's entries, in register order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum LvtEntry {
    Timer,
    Thermal,
    Performance,
    Lint0,
    Lint1,
    Error,
}

impl LvtEntry {
    const fn from_register(offset: u32) -> Self {
        match offset {
            0 => Self::Timer,
            1 => Self::Thermal,
            2 => Self::Performance,
            3 => Self::Lint0,
            4 => Self::Lint1,
            _ => Self::Error,
        }
    }

    const fn writable(self) -> u32 {
        match self {
            Self::Timer => 0x7_00FF,
            Self::Thermal | Self::Performance => 0x1_07FF,
            Self::Lint0 | Self::Lint1 => 0x1_A7FF,
            Self::Error => 0x1_00FF,
        }
    }

    /// Delivery status and, for the pins, remote IRR.
    const fn read_only(self) -> u32 {
        match self {
            Self::Lint0 | Self::Lint1 => 0x5000,
            _ => 0x1000,
        }
    }
}

/// A local APIC.
#[derive(Clone, Debug)]
pub struct Lapic {
    id: u32,
    /// No other processor exists: what is not for this one is for nobody.
    alone: bool,
    base: u64,
    task_priority: u8,
    logical_destination: u32,
    destination_format: u32,
    spurious: u32,
    requested: VectorSet,
    in_service: VectorSet,
    level: VectorSet,
    error_status: u32,
    errors: u32,
    icr: u64,
    lvt: [u32; 6],
    timer: Timer,
    nmi: bool,
    ended: Option<Vector>,
    sent: Option<Ipi>,
}

impl Lapic {
    /// An APIC after reset, with x2APIC mode enabled as firmware would leave it.
    pub fn new(config: &VcpuConfig) -> Self {
        let bsp = if config.id == 0 { BASE_BSP } else { 0 };
        let mut lapic = Self {
            id: config.id,
            alone: config.vcpu_count <= 1,
            base: layout::LAPIC_BASE | BASE_ENABLE | BASE_X2APIC | bsp,
            task_priority: 0,
            logical_destination: 0,
            destination_format: u32::MAX,
            spurious: SPURIOUS_RESET,
            requested: VectorSet::default(),
            in_service: VectorSet::default(),
            level: VectorSet::default(),
            error_status: 0,
            errors: 0,
            icr: 0,
            lvt: [LVT_MASKED; 6],
            timer: Timer::new(config.tsc_khz),
            nmi: false,
            ended: None,
            sent: None,
        };
        lapic.reset();
        lapic
    }

    /// Puts every register but the base and the id to its value after INIT.
    pub fn reset(&mut self) {
        self.task_priority = 0;
        self.logical_destination = 0;
        self.destination_format = u32::MAX;
        self.spurious = SPURIOUS_RESET;
        self.requested = VectorSet::default();
        self.in_service = VectorSet::default();
        self.level = VectorSet::default();
        self.error_status = 0;
        self.errors = 0;
        self.icr = 0;
        self.lvt = [LVT_MASKED; 6];
        self.timer.set_divide_configuration(0, Mode::Reserved, GuestTsc(0));
        self.timer.stop();
        self.nmi = false;
        self.ended = None;
        self.sent = None;
    }

    /// Reads IA32_APIC_BASE.
    pub const fn base(&self) -> u64 {
        self.base
    }

    /// Writes IA32_APIC_BASE.
    ///
    /// # Errors
    /// #GP for a reserved bit, another base address, or a change of mode that the architecture does not allow (SDM vol. 3, 11.12.5).
    pub fn set_base(&mut self, value: u64) -> Result<(), Exception> {
        const MODE: u64 = BASE_ENABLE | BASE_X2APIC;
        let (from, to) = (self.base & MODE, value & MODE);
        let moved = value & !(MODE | BASE_BSP) != layout::LAPIC_BASE;
        let allowed = match (from, to) {
            (_, BASE_X2APIC) => false,
            (from, to) if from == to => true,
            (_, 0) => true,
            (0, BASE_ENABLE) => true,
            (BASE_ENABLE, MODE) => true,
            _ => false,
        };
        if moved || !allowed {
            return Err(Exception::GENERAL_PROTECTION);
        }
        if to == 0 && from != 0 {
            self.reset();
        }
        self.base = self.base & !MODE | to;
        Ok(())
    }

    /// True unless the guest turned the APIC off in IA32_APIC_BASE.
    pub const fn is_enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }

    const fn is_x2apic(&self) -> bool {
        self.base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE | BASE_X2APIC
    }

    const fn is_xapic(&self) -> bool {
        self.base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE
    }

    const fn is_software_enabled(&self) -> bool {
        self.is_enabled() && self.spurious & SPURIOUS_ENABLE != 0
    }

    /// The highest pending vector above the processor priority.
    pub fn pending(&self) -> Option<Vector> {
        self.requested().filter(|vector| vector.0 >> 4 > self.processor_priority() >> 4)
    }

    /// The highest requested vector, deliverable now or not.
    pub fn requested(&self) -> Option<Vector> {
        if self.is_software_enabled() { self.requested.highest() } else { None }
    }

    /// The highest requested vector above what is in service, whatever the task priority: for a processor that compares it with
    /// CR8 by itself.
    pub fn pending_at_any_task_priority(&self) -> Option<Vector> {
        let in_service = self.in_service.highest().map_or(0, |vector| vector.0 >> 4);
        self.requested().filter(|vector| vector.0 >> 4 > in_service)
    }

    /// Moves what [`Self::pending`] says from requested to in service: offer and delivery in one, as tests drive it.
    #[cfg(test)]
    pub(crate) fn acknowledge(&mut self) -> Option<Vector> {
        let vector = self.pending()?;
        self.accept(vector);
        Some(vector)
    }

    /// The processor has delivered `vector`, which was pending when it was offered: it is in service now, whatever the
    /// task priority has become since.
    pub fn accept(&mut self, vector: Vector) {
        self.requested.remove(vector);
        self.in_service.insert(vector);
    }

    /// Requests `vector`; while the APIC is disabled it is dropped.
    pub fn raise(&mut self, vector: Vector, level: bool) {
        if !self.is_software_enabled() {
            return;
        }
        if vector.0 < 16 {
            self.error(ERROR_RECEIVE_ILLEGAL_VECTOR);
            return;
        }
        if level {
            self.level.insert(vector);
        } else {
            self.level.remove(vector);
        }
        self.requested.insert(vector);
    }

    /// What others need to know to send to this APIC.
    pub const fn addressing(&self) -> Addressing {
        Addressing::new(
            self.id,
            self.is_enabled(),
            self.is_software_enabled(),
            self.is_x2apic(),
            (self.logical_destination >> 24) as u8,
            self.destination_format >> 28 == 0xF,
        )
    }

    /// A non-maskable interrupt has arrived; while the APIC is disabled it is dropped.
    pub fn raise_nmi(&mut self) {
        self.nmi |= self.is_enabled();
    }

    /// When [`Self::advance`] is next to be called, if the timer is running and may interrupt.
    pub fn next_deadline(&self) -> Option<GuestTsc> {
        if self.lvt(LvtEntry::Timer) & LVT_MASKED != 0 { None } else { self.timer.deadline() }
    }

    /// Lets the timer catch up with `now`.
    pub fn advance(&mut self, now: GuestTsc) {
        let lvt = self.lvt(LvtEntry::Timer);
        if self.timer.expire(self.timer_mode(), now) && lvt & LVT_MASKED == 0 {
            self.raise(Vector(lvt as u8), false);
        }
    }

    /// Reads IA32_TSC_DEADLINE.
    pub fn tsc_deadline(&mut self, now: GuestTsc) -> u64 {
        self.advance(now);
        self.timer.tsc_deadline(self.timer_mode())
    }

    /// Writes IA32_TSC_DEADLINE; a deadline that has passed fires at once.
    pub fn set_tsc_deadline(&mut self, value: u64, now: GuestTsc) {
        self.timer.set_tsc_deadline(value, self.timer_mode());
        self.advance(now);
    }

    /// The guest's time-stamp counter jumps by `delta`.
    pub fn shift_time(&mut self, delta: i64) {
        let mode = self.timer_mode();
        self.timer.shift(delta, mode);
    }

    /// The interprocessor interrupt that the last register write sent to others, or an INIT or start-up interrupt to itself.
    pub fn take_ipi(&mut self) -> Option<Ipi> {
        self.sent.take()
    }

    /// The level-triggered vector whose end the last register write signalled.
    pub fn take_eoi(&mut self) -> Option<Vector> {
        self.ended.take()
    }

    /// A non-maskable interrupt that awaits delivery; asking takes it.
    pub fn take_nmi(&mut self) -> bool {
        core::mem::take(&mut self.nmi)
    }

    /// True when a non-maskable interrupt awaits delivery.
    pub const fn has_nmi(&self) -> bool {
        self.nmi
    }

    /// The task priority register; CR8 is its upper four bits.
    pub const fn tpr(&self) -> u8 {
        self.task_priority
    }

    /// Sets the task priority, as a write of CR8 does (`value` = CR8 << 4). The lower half is kept while the class stays.
    pub fn set_tpr(&mut self, value: u8) {
        if value >> 4 != self.task_priority >> 4 {
            self.task_priority = value;
        }
    }

    /// Ends the interrupt in service with the highest priority.
    pub(super) fn end_of_interrupt(&mut self) {
        let Some(vector) = self.in_service.highest() else { return };
        self.in_service.remove(vector);
        if self.level.contains(vector) {
            self.ended = Some(vector);
        }
    }

    /// True when the guest may end its interrupt without telling us at once: one edge-triggered interrupt is in service, and no
    /// other waits for its end.
    pub(super) fn may_defer_end(&self) -> bool {
        self.requested.is_empty()
            && self.in_service.is_single()
            && self.in_service.highest().is_some_and(|vector| !self.level.contains(vector))
    }

    fn processor_priority(&self) -> u8 {
        let service = self.in_service.highest().map_or(0, |vector| vector.0);
        if self.task_priority >> 4 >= service >> 4 { self.task_priority } else { service & 0xF0 }
    }

    /// Carries out a write of the interrupt command register's low half.
    fn send(&mut self, command: u32, destination: u32) {
        let vector = Vector(command as u8);
        let Some(delivery) = DeliveryMode::from_bits(command >> 8) else { return };
        let level_deassert =
            delivery == DeliveryMode::Init && command & 1 << 15 != 0 && command & 1 << 14 == 0;
        if level_deassert {
            return;
        }
        let vectored = matches!(delivery, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        if vectored && vector.0 < 16 {
            self.error(ERROR_SEND_ILLEGAL_VECTOR);
            return;
        }
        let broadcast = addressing::broadcast(self.is_x2apic());
        let destination = match command >> 18 & 3 {
            1 => Destination::Physical(self.id),
            2 => Destination::All,
            3 => Destination::AllExcept(self.id),
            _ if command & 1 << 11 != 0 => Destination::Logical(destination),
            _ if destination == broadcast => Destination::All,
            _ => Destination::Physical(destination),
        };
        let ipi = Ipi { destination, delivery, vector };
        let for_self = self.addressing().accepts_ipi(&ipi);
        match delivery {
            // What resets or starts this very processor is more than its APIC can do.
            DeliveryMode::Init | DeliveryMode::StartUp if for_self => {
                self.sent = Some(ipi);
                return;
            }
            DeliveryMode::Fixed if for_self => self.raise(vector, false),
            // One of the destinations is to take it, and this one is at hand.
            DeliveryMode::LowestPriority if for_self && self.is_software_enabled() => {
                return self.raise(vector, false);
            }
            DeliveryMode::Nmi if for_self => self.raise_nmi(),
            _ => {}
        }
        if self.alone {
            return;
        }
        self.sent = match destination {
            Destination::Physical(id) if id == self.id => None,
            Destination::All => Some(Ipi { destination: Destination::AllExcept(self.id), ..ipi }),
            _ => Some(ipi),
        };
    }

    fn send_self(&mut self, vector: u32) {
        self.send(1 << 18 | vector & 0xFF, 0);
    }

    /// Notes an error and raises the error interrupt if it is wanted.
    fn error(&mut self, error: u32) {
        let new = self.errors & error == 0;
        self.errors |= error;
        let lvt = self.lvt(LvtEntry::Error);
        let vector = Vector(lvt as u8);
        if new && lvt & LVT_MASKED == 0 && vector.0 >= 16 {
            self.raise(vector, false);
        }
    }

    /// A write of the error status register: shows the errors since the last one.
    fn latch_errors(&mut self) {
        self.error_status = core::mem::take(&mut self.errors);
    }

    fn set_spurious(&mut self, value: u32) {
        self.spurious = value;
        if value & SPURIOUS_ENABLE == 0 {
            for entry in &mut self.lvt {
                *entry |= LVT_MASKED;
            }
        }
    }

    fn lvt(&self, entry: LvtEntry) -> u32 {
        self.lvt.get(entry as usize).copied().unwrap_or(LVT_MASKED)
    }

    fn set_lvt(&mut self, entry: LvtEntry, value: u32) {
        let before = self.timer_mode();
        let masked = if self.is_software_enabled() { 0 } else { LVT_MASKED };
        if let Some(slot) = self.lvt.get_mut(entry as usize) {
            *slot = value & entry.writable() | masked;
        }
        let counts = |mode| matches!(mode, Mode::OneShot | Mode::Periodic);
        let after = self.timer_mode();
        if before != after && !(counts(before) && counts(after)) {
            self.timer.stop();
        }
    }

    fn timer_mode(&self) -> Mode {
        Mode::from_lvt(self.lvt(LvtEntry::Timer))
    }
}
