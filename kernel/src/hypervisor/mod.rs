//! Running machines: the fleet of a node, its cores, the vCPU loop, exits, nested paging, and the vendors behind one trait.

mod backend;
mod config_space;
mod cores;
mod disk;
mod exit;
mod figures;
mod fleet;
mod handle;
mod machine;
mod nested;
mod node;
mod pages;
mod ram;
mod refusal;
mod run;
mod schedule;
pub mod settings;
mod svm;
mod template;
mod vcpu;
mod vmx;

use crate::cpu::features::cpuid;
use nestling_machine::vcpu::HostCpuid;

pub use backend::Backend;
pub use cores::Runner;
pub use exit::ExitCounts;
pub use figures::TemplateFigures;
pub use fleet::{Fleet, MachineId, TemplateId};
pub use machine::{CreateError, DiskSize, End, Size};
pub use node::Node;
pub use svm::Svm;
pub use vmx::Vmx;

/// Whether the processor is one for [`Svm`]: it offers SVM, or is of a vendor whose processors would.
pub fn wants_svm() -> bool {
    const SVM: u32 = 1 << 2;
    let offers = cpuid(0x8000_0000, 0)[0] >= 0x8000_0001 && cpuid(0x8000_0001, 0)[2] & SVM != 0;
    offers || HostCpuid::read(cpuid).is_amd()
}
