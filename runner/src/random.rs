//! Random names: tokens, idempotency keys.

use std::fmt::Write as _;

/// `bytes` random bytes as lower-case hexadecimal digits, from the operating system's generator.
///
/// # Panics
/// When the operating system has no random numbers, which Linux never says after boot.
pub fn hex(bytes: usize) -> String {
    let mut raw = vec![0u8; bytes];
    getrandom::fill(&mut raw).expect("the operating system gives random bytes");
    raw.iter().fold(String::with_capacity(bytes * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_two_digits_a_byte_and_differs_every_time() {
        let token = hex(32);
        assert_eq!(token.len(), 64);
        assert!(token.bytes().all(|digit| digit.is_ascii_hexdigit()));
        assert_ne!(token, hex(32));
    }
}
