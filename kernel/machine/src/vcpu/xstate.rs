//! The extended state that a guest may enable, and how large it is.
//!
//! Intel SDM vol. 1, 13.2-13.4 (feature bitmap, CPUID leaf 0xD, XSAVE area formats) and 13.3 (XSETBV's checks).

use super::ControlRegisters;
use super::cpuid::{HostCpuid, Registers};
use crate::state::Exception;

const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
const AVX512: u64 = 1 << 5 | 1 << 6 | 1 << 7;
const PKRU: u64 = 1 << 9;

/// Features a guest may have at all. MPX is gone, AMX needs permission requests, supervisor state needs XSAVES.
const ALLOWED: u64 = X87 | SSE | AVX | AVX512 | PKRU;

/// Legacy region and XSAVE header.
const HEADER_END: u32 = 576;

/// XSAVEOPT, XSAVEC and XGETBV with ECX = 1; not XSAVES.
const INSTRUCTIONS: u32 = 0b111;

/// Number of state components with a subleaf that matter: up to PKRU.
const COMPONENTS: usize = 10;

const CR4_OSXSAVE: u64 = 1 << 18;

/// Where one state component stands in the XSAVE area.
#[derive(Clone, Copy, Default, Debug)]
struct Component {
    size: u32,
    offset: u32,
    /// Starts at a multiple of 64 bytes in the compacted format.
    aligned: bool,
}

/// What of XSAVE a guest sees.
#[derive(Clone, Debug)]
pub(super) struct ExtendedState {
    supported: u64,
    instructions: u32,
    components: [Component; COMPONENTS],
    xcr0: u64,
}

impl ExtendedState {
    pub(super) fn new(host: &HostCpuid) -> Self {
        let [low, _, _, high] = host.leaf(0xD, 0);
        let mut supported =
            if host.has_xsave() { (u64::from(high) << 32 | u64::from(low)) & ALLOWED } else { 0 };
        // A component that says no size has no place in the XSAVE area: what uses it cannot be kept (Bochs' PKRU).
        for index in (2..COMPONENTS).filter(|index| host.leaf(0xD, *index as u32)[0] == 0) {
            supported &= !(1 << index);
        }
        if supported & AVX512 != AVX512 || supported & AVX == 0 {
            supported &= !AVX512;
        }
        let mut components = [Component::default(); COMPONENTS];
        for (index, component) in components.iter_mut().enumerate().skip(2) {
            if supported & 1 << index != 0 {
                let [size, offset, flags, _] = host.leaf(0xD, index as u32);
                *component = Component { size, offset, aligned: flags & 2 != 0 };
            }
        }
        let instructions = host.leaf(0xD, 1)[0] & INSTRUCTIONS;
        Self { supported, instructions, components, xcr0: X87 }
    }

    pub(super) const fn xcr0(&self) -> u64 {
        self.xcr0
    }

    /// Takes a value that the processor has accepted.
    pub(super) const fn observe(&mut self, value: u64) {
        self.xcr0 = value | X87;
    }

    pub(super) const fn is_supported(&self) -> bool {
        self.supported & X87 != 0
    }

    pub(super) const fn has_avx(&self) -> bool {
        self.supported & AVX != 0
    }

    pub(super) const fn has_avx512(&self) -> bool {
        self.supported & AVX512 == AVX512
    }

    pub(super) const fn has_pkru(&self) -> bool {
        self.supported & PKRU != 0
    }

    /// XSETBV: checks and takes a new XCR0.
    pub(super) fn xsetbv(
        &mut self,
        index: u32,
        value: u64,
        context: &dyn ControlRegisters,
    ) -> Result<u64, Exception> {
        if !self.is_supported() || context.cr4() & CR4_OSXSAVE == 0 {
            return Err(Exception::UNDEFINED);
        }
        let has = |feature: u64| value & feature != 0;
        let consistent = has(X87)
            && (has(SSE) || !has(AVX))
            && (has(AVX) || !has(AVX512))
            && (value & AVX512 == 0 || value & AVX512 == AVX512);
        if context.cpl() != 0 || index != 0 || value & !self.supported != 0 || !consistent {
            return Err(Exception::GENERAL_PROTECTION);
        }
        self.xcr0 = value;
        Ok(value)
    }

    /// CPUID leaf 0xD.
    pub(super) fn cpuid(&self, subleaf: u32) -> Registers {
        if !self.is_supported() {
            return [0; 4];
        }
        match subleaf {
            0 => {
                let (low, high) = (self.supported as u32, (self.supported >> 32) as u32);
                [low, self.standard_size(self.xcr0), self.standard_size(self.supported), high]
            }
            1 => [self.instructions, self.compacted_size(self.xcr0), 0, 0],
            _ => match self.component(subleaf as usize) {
                Some(component) => [component.size, component.offset, u32::from(component.aligned) << 1, 0],
                None => [0; 4],
            },
        }
    }

    fn component(&self, index: usize) -> Option<&Component> {
        self.components.get(index).filter(|component| component.size != 0)
    }

    fn enabled(&self, features: u64) -> impl Iterator<Item = &Component> {
        self.components
            .iter()
            .enumerate()
            .filter(move |(index, _)| features & 1 << index != 0)
            .map(|(_, c)| c)
    }

    fn standard_size(&self, features: u64) -> u32 {
        self.enabled(features).fold(HEADER_END, |end, c| end.max(c.offset.saturating_add(c.size)))
    }

    fn compacted_size(&self, features: u64) -> u32 {
        if self.instructions & 0b10 == 0 {
            return 0;
        }
        self.enabled(features).fold(HEADER_END, |end, component| {
            let start = if component.aligned { end.checked_next_multiple_of(64).unwrap_or(end) } else { end };
            start.saturating_add(component.size)
        })
    }
}
