//! Running machines: the fleet of a node, the vCPU loop, exits, nested paging, and the vendors behind one trait.

mod backend;
mod exit;
mod fleet;
mod machine;
mod nested;
mod ram;
mod refusal;
mod run;
mod svm;

pub use backend::Backend;
pub use exit::ExitCounts;
pub use fleet::{Fleet, MachineId};
pub use machine::{CreateError, End};
pub use svm::Svm;
