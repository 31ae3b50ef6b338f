//! Random bytes for identifiers, TCP's sequence numbers and guests' virtio-rng: ChaCha20, seeded at boot.
//!
//! The seed mixes RDRAND, the jitter of the time-stamp counter, the wall clock and the network interface's
//! address. Without RDRAND the jitter has to do; the log then says so.

#![forbid(unsafe_code)]

use alloc::vec::Vec;

use nestling_machine::platform::Entropy;
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use x86_64::instructions::random::RdRand;

use crate::cpu::clock;

type Seed = <ChaCha20Rng as SeedableRng>::Seed;

/// Readings of the time-stamp counter that go into the seed, each some microseconds after the one before.
const READINGS_BESIDE_HARDWARE: usize = 16;
const READINGS_ALONE: usize = 1024;
/// Random words of the processor's that go into the seed: 256 bits. Emulators take 0.15 ms for each.
const HARDWARE_WORDS: usize = 4;

/// The node's source of random bytes.
pub struct RandomSource {
    generator: ChaCha20Rng,
}

impl RandomSource {
    /// Gathers a seed. `extra` is anything that differs between nodes, such as a network interface's address.
    #[must_use]
    pub fn gather(extra: &[u8]) -> Self {
        let hardware = RdRand::new();
        let mut seed = Seed::default();
        absorb(&mut seed, &clock::unix_ns().to_le_bytes());
        extra.chunks(seed.len()).for_each(|chunk| absorb(&mut seed, chunk));
        // Each absorption takes a while that depends on caches, interrupts of L0 and other guests of the
        // host.
        let readings = if hardware.is_some() { READINGS_BESIDE_HARDWARE } else { READINGS_ALONE };
        for _ in 0..readings {
            absorb(&mut seed, &clock::tsc().to_le_bytes());
        }
        match hardware {
            Some(hardware) => {
                // A single failure is permitted by the manual (Intel SDM vol. 1, 7.3.17.1) and made up for by
                // the next words.
                let words = (0..HARDWARE_WORDS * 4).filter_map(|_| hardware.get_u64()).take(HARDWARE_WORDS);
                let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
                bytes.chunks(seed.len()).for_each(|chunk| absorb(&mut seed, chunk));
            }
            None => log::warn!(
                "the processor has no RDRAND: random numbers rest on timing alone. Expose it to the VM"
            ),
        }
        Self { generator: ChaCha20Rng::from_seed(seed) }
    }

    /// A source of its own for another user, seeded from this one.
    pub fn fork(&mut self) -> Self {
        Self { generator: ChaCha20Rng::from_seed(self.seed()) }
    }

    /// A seed for a source of another user's own.
    pub fn seed(&mut self) -> [u8; 32] {
        let mut seed = Seed::default();
        self.generator.fill_bytes(&mut seed);
        seed
    }

    /// A random number.
    pub fn number(&mut self) -> u64 {
        self.generator.next_u64()
    }
}

impl Entropy for RandomSource {
    fn fill(&mut self, into: &mut [u8]) {
        self.generator.fill_bytes(into);
    }
}

/// Mixes up to 32 bytes into a seed: added by exclusive or, then spread by ChaCha20 itself.
fn absorb(seed: &mut Seed, bytes: &[u8]) {
    seed.iter_mut().zip(bytes).for_each(|(seed, byte)| *seed ^= byte);
    ChaCha20Rng::from_seed(*seed).fill_bytes(seed);
}
