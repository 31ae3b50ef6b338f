//! Virtio over PCI with one MSI-X interrupt and cheap notifications.
//!
//! Virtual I/O Device specification 1.2: 4.1.4.3 (common configuration), 4.1.4.4 (notification), 4.1.5.1.2
//! (MSI-X vectors).
//!
//! The virtio-drivers crate's transport knows no MSI-X and looks a queue's doorbell up at every notification,
//! two exits to L0 more than needed. This one wraps it: queue 0 (what the device fills) raises the interrupt,
//! other queues none, and doorbells are found once.

use alloc::sync::Arc;
use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use virtio_drivers::transport::pci::bus::{ConfigurationAccess, DeviceFunction, PciRoot};
use virtio_drivers::transport::pci::{
    PciTransport, VIRTIO_PCI_CAP_COMMON_CFG, VIRTIO_PCI_CAP_NOTIFY_CFG, VirtioPciError,
};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{Error, PhysAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::dma::IdentityDma;
use super::pci::{ConfigSpace, Region};
use crate::cpu::interrupts::IrqLine;

const CAPABILITY_VENDOR: u8 = 0x09;
const COMMON_BYTES: u64 = 0x38;
const COMMON_QUEUE_SELECT: usize = 0x16;
const COMMON_QUEUE_VECTOR: usize = 0x1a;
const COMMON_QUEUE_NOTIFY_OFFSET: usize = 0x1e;
const NO_VECTOR: u16 = 0xffff;
/// The queue whose used buffers interrupt: a network device's first receive queue.
const INTERRUPTING_QUEUE: u16 = 0;
const QUEUES: usize = 2;
/// Notifications by index (2.7.10). The crate compares the indices without their wrap, so that every 65,536 buffers it notifies the device of up to
/// a queue's length too few: the flags of 2.7.7 are used instead.
const FEATURE_EVENT_INDEX: u64 = 1 << 29;

/// Why a device's PCI transport cannot be used.
#[derive(Debug)]
pub enum TransportError {
    /// A structure is missing or malformed.
    Pci(VirtioPciError),
    /// The common configuration lies outside its region.
    NoCommonConfiguration,
    /// The notification structure lies outside its region.
    NoNotifications,
}

impl fmt::Display for TransportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(error) => write!(f, "not a usable virtio 1.x device ({error})"),
            Self::NoCommonConfiguration => write!(f, "its common configuration lies outside its memory"),
            Self::NoNotifications => write!(f, "its notification registers lie outside its memory"),
        }
    }
}

/// A queue's doorbell that its driver rings itself, once for many buffers.
pub struct Doorbell {
    queue: u16,
    register: AtomicPtr<u16>,
    is_owed: AtomicBool,
}

impl Doorbell {
    /// Notifies the device, if a buffer was queued of which it wants to know.
    pub fn ring(&self) {
        let register = self.register.load(Ordering::Relaxed);
        if self.is_owed.swap(false, Ordering::Relaxed) && !register.is_null() {
            // SAFETY: the transport mapped the register within the device's notification structure and checked its alignment.
            unsafe { register.write_volatile(self.queue) };
        }
    }
}

/// The transport of one virtio device.
pub struct MsixTransport {
    inner: PciTransport,
    common: NonNull<u8>,
    notify: Region,
    notify_multiplier: u32,
    doorbells: [Option<NonNull<u16>>; QUEUES],
    /// MSI-X is enabled with its entry 0 as the device's interrupt.
    msix: bool,
    interrupting: Arc<AtomicBool>,
    /// The doorbell that is not this transport's to ring.
    given_away: Option<Arc<Doorbell>>,
}

// SAFETY: its pointers lead to the device's registers, which any core reaches, and which one at a time uses through it.
unsafe impl Send for MsixTransport {}

impl MsixTransport {
    /// Prepares the device and points its interrupt at `line`, if there is one.
    ///
    /// # Errors
    /// When the device's structures are missing or lie outside its memory.
    pub fn new(
        space: ConfigSpace,
        function: DeviceFunction,
        line: Option<&IrqLine>,
    ) -> Result<Self, TransportError> {
        space.disable(function);
        let common = structure(space, function, VIRTIO_PCI_CAP_COMMON_CFG)
            .and_then(|(common, _)| common.part(0, COMMON_BYTES));
        let common = common.ok_or(TransportError::NoCommonConfiguration)?;
        let (notify, capability) =
            structure(space, function, VIRTIO_PCI_CAP_NOTIFY_CFG).ok_or(TransportError::NoNotifications)?;
        let notify_multiplier = space.read_word(function, capability.wrapping_add(16));
        let msix = line.zip(space.msix(function));
        // From here on, dropping it resets the device by its registers, which must answer.
        let inner = PciTransport::new::<IdentityDma, _>(&mut PciRoot::new(space), function)
            .map_err(TransportError::Pci)?;
        space.enable(function);
        let common = NonNull::new(crate::memory::map_mmio(common.address, COMMON_BYTES as usize));
        let common = common
            .filter(|common| common.cast::<u64>().is_aligned())
            .ok_or(TransportError::NoCommonConfiguration)?;
        if let Some((line, msix)) = msix {
            space.enable_msix(function, msix, line.message_address(), line.message_data());
        }
        Ok(Self {
            inner,
            common,
            notify,
            notify_multiplier,
            doorbells: [None; QUEUES],
            msix: msix.is_some(),
            interrupting: Arc::default(),
            given_away: None,
        })
    }

    /// Gives the doorbell of `queue`, which is not set up yet, to the caller: the transport notes what it owes the device and rings it no more.
    pub fn give_away_doorbell(&mut self, queue: u16) -> Arc<Doorbell> {
        let doorbell = Doorbell {
            queue,
            register: AtomicPtr::new(core::ptr::null_mut()),
            is_owed: AtomicBool::new(false),
        };
        let doorbell = Arc::new(doorbell);
        self.given_away = Some(Arc::clone(&doorbell));
        doorbell
    }

    /// Becomes true when the interrupting queue got its vector, that is, once the queues are set up.
    pub fn interrupting(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.interrupting)
    }

    fn read(&self, register: usize) -> u16 {
        // SAFETY: `common` points at the mapped common configuration, all of whose 16-bit registers used here
        // lie within it and are aligned.
        unsafe { self.common.add(register).cast::<u16>().read_volatile() }
    }

    fn write(&mut self, register: usize, value: u16) {
        // SAFETY: as in `read`; the registers written only select a queue and its interrupt vector.
        unsafe { self.common.add(register).cast::<u16>().write_volatile(value) }
    }

    /// The doorbell of the selected queue.
    fn doorbell(&self) -> Option<NonNull<u16>> {
        let offset = u64::from(self.read(COMMON_QUEUE_NOTIFY_OFFSET)) * u64::from(self.notify_multiplier);
        let register = self.notify.part(offset, 2).filter(|register| register.address.is_multiple_of(2))?;
        NonNull::new(crate::memory::map_mmio(register.address, 2).cast())
    }
}

/// The memory of the first structure of a kind (4.1.4), and its capability's offset.
fn structure(space: ConfigSpace, function: DeviceFunction, kind: u8) -> Option<(Region, u8)> {
    space.capabilities(function, CAPABILITY_VENDOR).into_iter().find_map(|capability| {
        let [_, _, _, found] = space.read_word(function, capability).to_le_bytes();
        let [bar, ..] = space.read_word(function, capability.wrapping_add(4)).to_le_bytes();
        let offset = space.read_word(function, capability.wrapping_add(8));
        let bytes = space.read_word(function, capability.wrapping_add(12));
        if found != kind {
            return None;
        }
        space
            .memory_region(function, bar)?
            .part(u64::from(offset), u64::from(bytes))
            .map(|region| (region, capability))
    })
}

impl Transport for MsixTransport {
    fn device_type(&self) -> DeviceType {
        self.inner.device_type()
    }

    fn read_device_features(&mut self) -> u64 {
        self.inner.read_device_features() & !FEATURE_EVENT_INDEX
    }

    fn write_driver_features(&mut self, driver_features: u64) {
        self.inner.write_driver_features(driver_features);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.inner.max_queue_size(queue)
    }

    fn notify(&mut self, queue: u16) {
        if let Some(given_away) = self.given_away.as_ref().filter(|doorbell| doorbell.queue == queue) {
            given_away.is_owed.store(true, Ordering::Relaxed);
            return;
        }
        if let Some(doorbell) = self.doorbells.get(usize::from(queue)).copied().flatten() {
            // SAFETY: `doorbell` mapped the register within the device's notification structure and checked
            // its alignment.
            unsafe { doorbell.write_volatile(queue) };
        }
    }

    fn get_status(&self) -> DeviceStatus {
        self.inner.get_status()
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.inner.set_status(status);
    }

    fn set_guest_page_size(&mut self, guest_page_size: u32) {
        self.inner.set_guest_page_size(guest_page_size);
    }

    fn requires_legacy_layout(&self) -> bool {
        self.inner.requires_legacy_layout()
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        self.write(COMMON_QUEUE_SELECT, queue);
        if self.msix {
            let vector = if queue == INTERRUPTING_QUEUE { 0 } else { NO_VECTOR };
            self.write(COMMON_QUEUE_VECTOR, vector);
            if queue == INTERRUPTING_QUEUE {
                // A device that has no resources for the vector answers NO_VECTOR.
                self.interrupting.store(self.read(COMMON_QUEUE_VECTOR) == vector, Ordering::Relaxed);
            }
        }
        let doorbell = self.doorbell();
        if let Some(given_away) = self.given_away.as_ref().filter(|doorbell| doorbell.queue == queue) {
            let register = doorbell.map_or(core::ptr::null_mut(), NonNull::as_ptr);
            given_away.register.store(register, Ordering::Relaxed);
        }
        if let Some(place) = self.doorbells.get_mut(usize::from(queue)) {
            *place = doorbell;
        }
        self.inner.queue_set(queue, size, descriptors, driver_area, device_area);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.inner.queue_unset(queue);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.inner.queue_used(queue)
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        self.inner.ack_interrupt()
    }

    fn read_config_generation(&self) -> u32 {
        self.inner.read_config_generation()
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T, Error> {
        self.inner.read_config_space(offset)
    }

    fn write_config_space<T: IntoBytes + Immutable>(&mut self, offset: usize, value: T) -> Result<(), Error> {
        self.inner.write_config_space(offset, value)
    }
}
