//! The virtual machine that an L2 guest sees.
//!
//! Everything here is a pure state machine: no hardware is touched, nothing knows which vendor's processor runs the guest, and
//! every input may come from a hostile guest. [`vcpu`] is what belongs to one virtual processor (CPUID and MSR policy, local
//! APIC, clock); [`platform`] is what the machine's processors share (buses, interrupt routing, devices, firmware tables).
//! The hypervisor in `nestling-kernel` owns both, feeds them exits and carries out their effects.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod address;
pub mod interrupt;
pub mod layout;
pub mod memory;
pub mod platform;
pub mod state;
#[cfg(test)]
mod testing;
pub mod vcpu;
