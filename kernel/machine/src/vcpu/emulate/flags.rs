//! Results and status flags of integer arithmetic.
//!
//! Intel SDM vol. 1, 3.4.3.1 and appendix A.

pub(super) const CARRY: u64 = 1 << 0;
pub(super) const PARITY: u64 = 1 << 2;
pub(super) const ADJUST: u64 = 1 << 4;
pub(super) const ZERO: u64 = 1 << 6;
pub(super) const SIGN: u64 = 1 << 7;
pub(super) const TRAP: u64 = 1 << 8;
pub(super) const DIRECTION: u64 = 1 << 10;
pub(super) const OVERFLOW: u64 = 1 << 11;
pub(super) const RESUME: u64 = 1 << 16;

/// The flags that arithmetic sets.
pub(super) const STATUS: u64 = CARRY | PARITY | ADJUST | ZERO | SIGN | OVERFLOW;

/// The width of an operand in bytes: 1, 2, 4 or 8.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Width(u8);

impl Width {
    pub(super) fn new(bytes: usize) -> Option<Self> {
        matches!(bytes, 1 | 2 | 4 | 8).then_some(Self(bytes as u8))
    }

    pub(super) const fn bytes(self) -> u8 {
        self.0
    }

    pub(super) const fn bits(self) -> u32 {
        self.0 as u32 * 8
    }

    pub(super) const fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    pub(super) const fn sign(self) -> u64 {
        1 << (self.bits() - 1)
    }

    pub(super) const fn sign_extend(self, value: u64) -> u64 {
        let unused = 64 - self.bits();
        ((value << unused) as i64 >> unused) as u64
    }
}

/// A result and the status flags that go with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Outcome {
    pub(super) value: u64,
    pub(super) flags: u64,
}

/// Zero, sign and parity of a result.
fn shape(value: u64, width: Width) -> u64 {
    let mut flags = 0;
    if value & width.mask() == 0 {
        flags |= ZERO;
    }
    if value & width.sign() != 0 {
        flags |= SIGN;
    }
    if (value as u8).count_ones().is_multiple_of(2) {
        flags |= PARITY;
    }
    flags
}

const fn when(condition: bool, flag: u64) -> u64 {
    if condition { flag } else { 0 }
}

pub(super) fn add(a: u64, b: u64, carry: bool, width: Width) -> Outcome {
    let (a, b) = (a & width.mask(), b & width.mask());
    let wide = u128::from(a) + u128::from(b) + u128::from(carry);
    let value = wide as u64 & width.mask();
    let flags = when(wide > u128::from(width.mask()), CARRY)
        | when((a ^ b ^ value) & 0x10 != 0, ADJUST)
        | when((a ^ value) & (b ^ value) & width.sign() != 0, OVERFLOW);
    Outcome { value, flags: flags | shape(value, width) }
}

pub(super) fn sub(a: u64, b: u64, borrow: bool, width: Width) -> Outcome {
    let (a, b) = (a & width.mask(), b & width.mask());
    let value = a.wrapping_sub(b).wrapping_sub(u64::from(borrow)) & width.mask();
    let flags = when(u128::from(a) < u128::from(b) + u128::from(borrow), CARRY)
        | when((a ^ b ^ value) & 0x10 != 0, ADJUST)
        | when((a ^ b) & (a ^ value) & width.sign() != 0, OVERFLOW);
    Outcome { value, flags: flags | shape(value, width) }
}

/// AND, OR, XOR and TEST: carry and overflow are cleared.
pub(super) fn logic(value: u64, width: Width) -> Outcome {
    let value = value & width.mask();
    Outcome { value, flags: shape(value, width) }
}
