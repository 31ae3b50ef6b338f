//! The job engine's view of the hypervisor's fleet.

#![forbid(unsafe_code)]

use super::machines::{
    AgentLink, CreateError, DiskSpec, HypervisorReport, MachineSpec, Machines, NetworkLink,
};
use crate::cpu::clock;
use crate::hypervisor::{
    self, Backend, DiskSize, End, ExitCounts, Fleet, MachineId, Size, TemplateFigures, TemplateId,
};
use crate::memory::frames::SMALL_FRAME;
use crate::memory::heap;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use nestling_api::jobs::{MachineEnd, MachineReport};
use nestling_api::types::{HostMemory, Vendor, WaitingFor};
use nestling_machine::platform::linux::LinuxImage;
use nestling_machine::platform::{self, Accepts, NetworkHost, Offload, VsockHost, VsockState};

/// Memory sizes are whole large frames.
const MEMORY_STEP_MIB: u32 = 2;

const MIB: u64 = 1 << 20;

/// Unless a job asks for more, the changes on its machine's disk get one part of this many of all memory: several machines fit.
const OVERLAY_SHARE: u64 = 8;
/// Templates take at most one part of this many of all memory.
const TEMPLATES_SHARE: u64 = 2;
/// The least that is worth while.
const OVERLAY_LEAST_BYTES: u64 = 16 * MIB;

/// The disk of a machine with `memory_mib` of RAM. What it may change is bounded by its free space, a tenth more for the tables and journals of
/// file systems, so that a file system is full before the memory set aside for it is.
fn disk_size<B: Backend>(fleet: &Fleet<B>, memory_mib: u32, spec: &DiskSpec) -> Result<DiskSize, String> {
    let free_bytes = u64::from(spec.free_mib) * MIB;
    let change_bytes = free_bytes + free_bytes / 10 + OVERLAY_LEAST_BYTES;
    let has_scratch = fleet.scratch_bytes() > 0;
    let size = |overlay_bytes| DiskSize {
        base: spec.base,
        bytes: spec.base.bytes() + free_bytes,
        overlay_bytes,
        scratch_bytes: if has_scratch { change_bytes.saturating_sub(overlay_bytes) } else { 0 },
    };
    let fits = |overlay_bytes| {
        fleet.ever_fits(&Size { memory_mib, vcpu_count: 1, network: None, disk: Some(size(overlay_bytes)) })
    };
    let mut overlay_bytes = change_bytes;
    if !spec.asked_for || has_scratch {
        overlay_bytes = overlay_bytes.min(fleet.frames().1 as u64 * SMALL_FRAME / OVERLAY_SHARE);
        while overlay_bytes > OVERLAY_LEAST_BYTES && !fits(overlay_bytes) {
            overlay_bytes = (overlay_bytes / 2).max(OVERLAY_LEAST_BYTES);
        }
    }
    if fits(overlay_bytes) {
        return Ok(size(overlay_bytes));
    }
    Err(format!(
        "machine_config: {memory_mib} MiB of memory and a disk of which {} MiB can change do not fit into this node's {} MiB; ask for less in \
         machine_config.disk_size_mib or machine_config.mem_size_mib",
        overlay_bytes / MIB,
        fleet.frames().1 as u64 * SMALL_FRAME / MIB
    ))
}

fn by_kind(exits: &ExitCounts) -> BTreeMap<String, u64> {
    exits.iter().map(|(kind, count)| (kind.to_string(), count)).collect()
}

fn machine_end(end: End) -> MachineEnd {
    match end {
        End::Platform(platform::MachineEnd::PowerOff) => MachineEnd::PowerOff,
        End::Platform(platform::MachineEnd::Reset) => MachineEnd::Reset,
        End::Platform(fault @ platform::MachineEnd::DeviceFault { .. }) => {
            MachineEnd::DeviceFault(fault.to_string())
        }
        End::TripleFault => MachineEnd::TripleFault,
        End::Disk(_) | End::Halted | End::WaitsForStartUp | End::OutOfFrames | End::Unsupported(_) => {
            MachineEnd::InternalError(end.to_string())
        }
    }
}

impl<B: Backend> Machines for Fleet<B> {
    type Id = MachineId;
    type Template = TemplateId;

    fn create(&mut self, spec: &MachineSpec<'_>) -> Result<MachineId, CreateError> {
        let (count, most) = (spec.vcpu_count as usize, self.max_machine_vcpus());
        if count == 0 || count > most {
            return Err(CreateError::Impossible(format!(
                "machine_config.vcpu_count: {count} is not from 1 to {most}, the most this node can have"
            )));
        }
        let step = MEMORY_STEP_MIB;
        if !spec.mem_size_mib.is_multiple_of(step) {
            return Err(CreateError::Impossible(format!(
                "machine_config.mem_size_mib: {} is not a multiple of {step}",
                spec.mem_size_mib
            )));
        }
        let disk = spec.disk.map(|disk| disk_size(self, spec.mem_size_mib, &disk)).transpose();
        let disk = disk.map_err(CreateError::Impossible)?;
        let size =
            Size { memory_mib: spec.mem_size_mib, vcpu_count: spec.vcpu_count, network: spec.network, disk };
        if self.vcpus() + count > self.max_vcpus() {
            return Err(CreateError::Busy(WaitingFor::Cores));
        }
        if !self.fits(&size) {
            return Err(CreateError::Busy(WaitingFor::Memory));
        }
        let image =
            LinuxImage { kernel: spec.kernel, initramfs: spec.initramfs, command_line: spec.command_line };
        Self::create(self, &image, &size).map_err(|error| match error {
            hypervisor::CreateError::OutOfFrames => CreateError::Busy(WaitingFor::Memory),
            hypervisor::CreateError::Boot(_) => CreateError::Impossible(error.to_string()),
        })
    }

    fn is_idle(&self, id: MachineId) -> bool {
        Self::is_idle(self, id)
    }

    fn fits_beside_template(&self, id: MachineId) -> bool {
        Self::fits_beside_template(self, id)
    }

    fn freeze(&mut self, id: MachineId) -> Result<TemplateId, &'static str> {
        Self::freeze(self, id)
    }

    fn clone_template(&mut self, template: TemplateId) -> Result<MachineId, CreateError> {
        let Some(vcpus) = self.template_vcpus(template) else {
            return Err(CreateError::Busy(WaitingFor::Memory));
        };
        if self.vcpus() + vcpus > self.max_vcpus() {
            return Err(CreateError::Busy(WaitingFor::Cores));
        }
        if !self.fits_clone(template) {
            return Err(CreateError::Busy(WaitingFor::Memory));
        }
        Self::clone_template(self, template).map_err(|_| CreateError::Busy(WaitingFor::Memory))
    }

    fn drop_template(&mut self, template: TemplateId) {
        Self::drop_template(self, template);
    }

    fn template_figures(&self, template: TemplateId) -> Option<TemplateFigures> {
        Self::template_figures(self, template)
    }

    fn template_budget_bytes(&self) -> u64 {
        self.frames().1 as u64 * SMALL_FRAME / TEMPLATES_SHARE
    }

    fn with_agent<R>(&mut self, id: MachineId, work: impl FnOnce(&mut dyn AgentLink) -> R) -> Option<R> {
        self.with_vsock(id, |vsock| work(vsock))
    }

    fn with_network<R>(&mut self, id: MachineId, work: impl FnOnce(&mut dyn NetworkLink) -> R) -> Option<R> {
        Self::with_network(self, id, |network| work(network))
    }

    fn ended(&self, id: MachineId) -> Option<MachineEnd> {
        self.end(id).map(machine_end)
    }

    fn figures(&self, id: MachineId) -> (BTreeMap<String, u64>, Option<u64>) {
        match Self::figures(self, id) {
            Some((exits, bytes)) => (by_kind(&exits), Some(bytes / MIB)),
            None => (BTreeMap::new(), None),
        }
    }

    fn destroy(&mut self, id: MachineId) -> MachineReport {
        let Some(remains) = Self::destroy(self, id) else {
            let end = MachineEnd::InternalError(String::from("there is no such machine"));
            return MachineReport {
                end,
                console_tail: String::new(),
                exits: BTreeMap::new(),
                peak_mib: None,
                disk_problem: None,
            };
        };
        MachineReport {
            end: remains.end.map_or(MachineEnd::Destroyed, machine_end),
            console_tail: remains.console,
            exits: by_kind(&remains.exits),
            peak_mib: Some(remains.peak_bytes / MIB),
            disk_problem: remains.disk_problem,
        }
    }

    fn limit(&self) -> usize {
        self.max_vcpus()
    }

    fn max_mem_size_mib(&self) -> u32 {
        let (_, total) = self.frames();
        let mut mib =
            u32::try_from((total as u64 * SMALL_FRAME) >> 20).unwrap_or(u32::MAX) & !(MEMORY_STEP_MIB - 1);
        while mib > 0 && !self.ever_fits(&Size { memory_mib: mib, vcpu_count: 1, network: None, disk: None })
        {
            mib -= MEMORY_STEP_MIB;
        }
        mib
    }

    fn max_vcpu_count(&self) -> u32 {
        u32::try_from(self.max_machine_vcpus()).unwrap_or(u32::MAX)
    }

    fn report(&self) -> HypervisorReport {
        let (free, total) = self.frames();
        let (used, claimed) = heap::usage();
        HypervisorReport {
            vendor: if B::VENDOR == "intel" { Vendor::Intel } else { Vendor::Amd },
            features: self.features().iter().map(|(name, there)| (name.to_string(), *there)).collect(),
            cores: u32::try_from(self.cores()).unwrap_or(u32::MAX),
            memory: HostMemory {
                total_mib: crate::memory::total_bytes() / MIB,
                free_frames: free as u64,
                total_frames: total as u64,
                heap_used_bytes: used as u64,
                heap_total_bytes: claimed as u64,
            },
            exits: by_kind(&self.total_exits()),
            vmcs_accesses: (B::VENDOR == "intel").then(|| self.control_block_accesses()),
            tsc_khz: clock::khz(),
        }
    }
}

impl AgentLink for VsockHost {
    fn has_connected(&self) -> bool {
        self.state() != VsockState::Listening
    }

    fn has_finished(&self) -> bool {
        self.guest_finished()
    }

    fn readable(&self) -> usize {
        Self::readable(self)
    }

    fn receive(&mut self, into: &mut [u8]) -> usize {
        Self::receive(self, into)
    }

    fn send(&mut self, from: &[u8]) -> usize {
        Self::send(self, from)
    }
}

impl NetworkLink for NetworkHost {
    fn has_frame(&self) -> bool {
        Self::has_frame(self)
    }

    fn take_frame(&mut self, into: &mut Vec<u8>) -> Option<Offload> {
        Self::take_frame(self, into)
    }

    fn give_frame(&mut self, frame: &[u8], offload: Offload) -> bool {
        Self::give_frame(self, frame, offload)
    }

    fn accepts(&self) -> Accepts {
        Self::accepts(self)
    }
}
