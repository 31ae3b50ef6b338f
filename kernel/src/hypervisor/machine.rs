//! One machine: its vCPU, RAM, nested page table and devices, from creation to the return of every frame.

use super::backend::{Backend, TscOffset, VendorVcpu};
use super::config_space::ConfigSpace;
use super::exit::{Exit, ExitCounts};
use super::nested::NestedTable;
use super::ram::{Ram, RamView};
use crate::cpu::fpu::{self, XsaveArea};
use crate::cpu::guest_registers::{self, BreakpointAddresses};
use crate::cpu::{barriers, clock};
use crate::memory::frames::{FramePool, LARGE_FRAME, PrivateFrame};
use alloc::string::String;
use alloc::sync::Arc;
use core::fmt;
use nestling_machine::memory::MemoryError;
use nestling_machine::platform::linux::{self, BootError, LinuxImage};
use nestling_machine::platform::{DiskConfig, MachineEnd, Platform, PlatformConfig};
use nestling_machine::vcpu::{HostCpuid, Vcpu, VcpuConfig};
use nestling_storage::volume::{Base, Volume};

/// The context id every guest has on its own vsock.
const GUEST_CID: u64 = 3;

/// A timer this many ticks ahead (years, at any rate) never fires.
const NEVER_TICKS: u64 = 1 << 60;

/// Why a machine runs no more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum End {
    /// By its devices: power-off, reset, or a broken queue.
    Platform(MachineEnd),
    /// The vCPU shut down after a triple fault.
    TripleFault,
    /// HLT with interrupts off: nothing can wake it.
    Halted,
    /// An INIT from itself: nothing can start it again.
    WaitsForStartUp,
    /// The node ran out of frames for its RAM.
    OutOfFrames,
    /// The node could not read what the machine's disk is made from.
    Disk(String),
    /// The guest did what the hypervisor does not support; the text says what.
    Unsupported(String),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Platform(end) => end.fmt(f),
            Self::TripleFault => f.write_str("the guest's CPU shut down after a triple fault"),
            Self::Halted => f.write_str("the guest's CPU halted with interrupts off and can never wake"),
            Self::WaitsForStartUp => {
                f.write_str("the guest's CPU sent itself an INIT and no other CPU can start it again")
            }
            Self::OutOfFrames => f.write_str("the node has no free memory left for the guest"),
            Self::Disk(reason) => write!(f, "the node could not read the image's disk: {reason}"),
            Self::Unsupported(what) => write!(f, "the guest did what nestling does not support: {what}"),
        }
    }
}

/// Why a machine could not be made.
#[derive(Debug)]
pub enum CreateError {
    /// The pool cannot back the machine.
    OutOfFrames,
    /// The image does not boot.
    Boot(BootError),
}

impl fmt::Display for CreateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfFrames => f.write_str("the node has too little free memory for the machine"),
            Self::Boot(error) => error.fmt(f),
        }
    }
}

/// What a machine gets of the node.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Its RAM in MiB.
    pub memory_mib: u32,
    /// Its disk, if it has one.
    pub disk: Option<DiskSize>,
}

/// What a machine's disk is made from, and what it may grow to.
#[derive(Clone, Copy, Debug)]
pub struct DiskSize {
    /// What it holds at first.
    pub base: Base,
    /// Its size in bytes.
    pub bytes: u64,
    /// The most memory for what the machine changes, in bytes.
    pub overlay_bytes: u64,
}

/// A machine of one vCPU.
pub struct Machine<B: Backend> {
    pub(super) hardware: B::Vcpu,
    pub(super) vcpu: Vcpu,
    pub(super) platform: Platform,
    pub(super) ram: Ram,
    pub(super) volume: Option<Volume<PrivateFrame>>,
    pub(super) seen_arrivals: u64,
    pub(super) nested: NestedTable<B::Entry>,
    pub(super) config_space: ConfigSpace,
    pub(super) xsave: XsaveArea,
    pub(super) breakpoints: BreakpointAddresses,
    pub(super) offset: TscOffset,
    pub(super) halted: bool,
    pub(super) end: Option<End>,
    pub(super) end_seen: bool,
    pub(super) size: Size,
    pub(super) exits: ExitCounts,
    pub(super) last_exit: Option<Exit>,
    pub(super) exceptions_in_a_row: u32,
}

impl<B: Backend> Machine<B> {
    /// Makes a machine and loads its kernel. `components` are the XSAVE components of the node.
    ///
    /// # Errors
    /// [`CreateError`]; nothing is kept then.
    pub fn new(
        backend: &mut B,
        pool: &mut FramePool,
        host: &Arc<HostCpuid>,
        components: u64,
        image: &LinuxImage<'_>,
        size: &Size,
    ) -> Result<Self, CreateError> {
        let ram_bytes = u64::from(size.memory_mib) << 20;
        let Some(nested) = NestedTable::new(pool) else { return Err(CreateError::OutOfFrames) };
        let mut ram = Ram::new(ram_bytes);
        let loaded = linux::load(&mut RamView { ram: &mut ram, pool }, image, ram_bytes, 1);
        let state = match loaded {
            Ok(state) => state,
            Err(error) => {
                ram.free(pool);
                nested.free(pool);
                return Err(match error {
                    BootError::Memory(MemoryError::OutOfFrames) => CreateError::OutOfFrames,
                    other => CreateError::Boot(other),
                });
            }
        };
        let offset = TscOffset(clock::tsc().wrapping_neg());
        let mut hardware = backend.vcpu(nested.root(), &state);
        hardware.set_tsc_offset(offset.0);
        let tsc_khz = u32::try_from(clock::khz()).unwrap_or(u32::MAX);
        let mut machine = Self {
            hardware,
            vcpu: Vcpu::new(&VcpuConfig { id: 0, vcpu_count: 1, tsc_khz }, host),
            platform: Platform::new(PlatformConfig {
                guest_cid: GUEST_CID,
                disk: size.disk.map(|disk| DiskConfig { bytes: disk.bytes, queues: 1 }),
            }),
            ram,
            volume: size.disk.map(|disk| Volume::new(disk.base, disk.bytes, disk.overlay_bytes)),
            seen_arrivals: 0,
            nested,
            config_space: ConfigSpace::new(),
            xsave: XsaveArea::new(components),
            breakpoints: BreakpointAddresses::default(),
            offset,
            halted: false,
            end: None,
            end_seen: false,
            size: *size,
            exits: ExitCounts::default(),
            last_exit: None,
            exceptions_in_a_row: 0,
        };
        if machine.map_backed(pool) && machine.map_config_space(pool) {
            Ok(machine)
        } else {
            machine.free(pool);
            Err(CreateError::OutOfFrames)
        }
    }

    /// Maps what loading has already touched, so that it does not fault.
    fn map_backed(&mut self, pool: &mut FramePool) -> bool {
        self.ram.backed().all(|(at, frame)| self.nested.map(at, frame, pool))
    }

    fn map_config_space(&mut self, pool: &mut FramePool) -> bool {
        self.config_space.map::<B>(&self.platform, &mut self.nested, pool)
    }

    /// Gives every frame back. The machine must not be loaded on a core.
    pub fn free(self, pool: &mut FramePool) {
        drop(self.hardware);
        self.nested.free(pool);
        self.config_space.free(pool);
        self.ram.free(pool);
        for slab in self.volume.into_iter().flat_map(Volume::into_slabs) {
            pool.free_large(slab.into_frame());
        }
    }

    /// Bytes of memory behind its RAM and the changes on its disk.
    pub fn memory_bytes(&self) -> u64 {
        let slabs = self.volume.as_ref().map_or(0, Volume::slabs);
        self.ram.backed_bytes() + slabs as u64 * LARGE_FRAME
    }

    /// Why it ended, once it has.
    pub fn end(&self) -> Option<End> {
        self.end.clone().or_else(|| self.platform.end().cloned().map(End::Platform))
    }

    /// When its timer next needs the core, in nanoseconds since boot.
    pub fn deadline_ns(&self) -> Option<u64> {
        let deadline = self.vcpu.lapic.next_deadline()?;
        // A guest may ask for a time that lies centuries ahead and, on the host's counter, beyond its end.
        let left = deadline.0.saturating_sub(self.offset.guest(clock::tsc()).0);
        (left < NEVER_TICKS).then(|| clock::ns_at_tsc(self.offset.host(deadline)))
    }

    /// Takes the machine's state off the core.
    pub fn unload(&mut self) {
        self.hardware.unload();
        self.breakpoints.save();
        self.vcpu.observe_xcr0(fpu::xcr0());
        self.xsave.save();
    }

    /// Puts the machine's state on the core.
    pub fn load(&mut self) {
        barriers::between_machines();
        self.xsave.restore();
        fpu::load_xcr0(self.vcpu.xcr0());
        self.breakpoints.load();
        guest_registers::load_tsc_aux(self.vcpu.tsc_aux());
        self.hardware.load();
    }
}
