//! Interrupt lines of L1's own devices. A handler marks its line and acknowledges; the main loop does the work.

use super::{apic, pic};
use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// The APIC timer's vector.
pub const TIMER: u8 = 0x20;
/// Another core has something for this one: it only ends a halt or a guest's run.
pub const WAKE: u8 = 0x21;
const FIRST_DEVICE: u8 = 0x30;
const LAST_DEVICE: u8 = pic::FIRST_VECTOR - 1;
/// The local APIC's spurious-interrupt vector, which takes no acknowledgement.
pub const SPURIOUS: u8 = 0xFF;

static PENDING: [AtomicBool; 256] = [const { AtomicBool::new(false) }; 256];
static ANY_DEVICE: AtomicBool = AtomicBool::new(false);
static NEXT: AtomicU8 = AtomicU8::new(FIRST_DEVICE);

/// A message-signalled interrupt of one device.
#[derive(Debug)]
pub struct IrqLine {
    vector: u8,
}

/// A free vector for a device's message-signalled interrupt; `None` when all are taken.
pub fn allocate(name: &'static str) -> Option<IrqLine> {
    let vector = NEXT
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| (next <= LAST_DEVICE).then(|| next + 1))
        .ok()?;
    log::debug!("vector {vector:#x} is {name}");
    Some(IrqLine { vector })
}

impl IrqLine {
    /// The address a device writes to, for the core that booted. Intel SDM vol. 3, 11.11.1.
    pub fn message_address(&self) -> u64 {
        0xFEE0_0000 | u64::from(apic::boot_id() & 0xFF) << 12
    }

    /// The data it writes: fixed delivery, edge-triggered. Intel SDM vol. 3, 11.11.2.
    pub fn message_data(&self) -> u32 {
        u32::from(self.vector)
    }

    /// Whether the device has interrupted since the last call.
    pub fn take_pending(&self) -> bool {
        take_vector(self.vector)
    }
}

/// Whether a vector has arrived since the last call.
pub(super) fn take_vector(vector: u8) -> bool {
    PENDING[usize::from(vector)].swap(false, Ordering::Relaxed)
}

/// Called by the trap entry for every vector from 32 up.
pub fn arrived(vector: u8) {
    if vector == SPURIOUS {
        return;
    }
    let legacy = pic::is_vector(vector);
    if legacy && pic::is_spurious(vector) {
        return;
    }
    if vector == TIMER {
        apic::timer_fired();
    }
    // Devices interrupt the core that booted alone.
    if vector >= FIRST_DEVICE {
        PENDING[usize::from(vector)].store(true, Ordering::Relaxed);
        ANY_DEVICE.store(true, Ordering::Relaxed);
    }
    if !legacy {
        apic::end_of_interrupt();
    }
}

/// Whether any device has interrupted since [`take_device`].
pub fn device_pending() -> bool {
    ANY_DEVICE.load(Ordering::Relaxed)
}

/// Whether any device has interrupted since the last call: the main loop then looks at its drivers.
pub fn take_device() -> bool {
    ANY_DEVICE.swap(false, Ordering::Relaxed)
}
