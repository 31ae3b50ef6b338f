//! What a machine last printed on its serial port.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

/// Bytes kept; older output is dropped.
pub const CONSOLE_TAIL_BYTES: usize = 16 * 1024;

/// The last [`CONSOLE_TAIL_BYTES`] of a machine's serial output, for failure reports.
#[derive(Clone, Debug, Default)]
pub struct ConsoleTail {
    bytes: VecDeque<u8>,
    total: u64,
}

impl ConsoleTail {
    /// Appends one byte and drops the oldest when full.
    pub(super) fn push(&mut self, byte: u8) {
        if self.bytes.len() >= CONSOLE_TAIL_BYTES {
            self.bytes.pop_front();
        }
        self.bytes.push_back(byte);
        self.total = self.total.saturating_add(1);
    }

    /// Bytes ever written, those dropped included.
    pub const fn total(&self) -> u64 {
        self.total
    }

    /// What is kept from byte `offset` (counted as by [`Self::total`]) on, and the offset it really starts at, which is higher
    /// when the output since has outgrown the tail.
    pub fn since(&self, offset: u64) -> (u64, Vec<u8>) {
        let oldest = self.total.saturating_sub(self.bytes.len() as u64);
        let start = offset.clamp(oldest, self.total);
        let skip = usize::try_from(start - oldest).unwrap_or(usize::MAX);
        (start, self.bytes.iter().skip(skip).copied().collect())
    }

    /// The last `count` lines, oldest first, without carriage returns. Bytes that are not UTF-8 become U+FFFD. A first line cut by
    /// the tail's limit is left out unless it is the only one; an unfinished last line counts as a line.
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        let (start, bytes) = self.since(0);
        let text = String::from_utf8_lossy(&bytes);
        let mut lines: Vec<&str> = text.lines().collect();
        if start > 0 && lines.len() > 1 {
            lines.remove(0);
        }
        let skip = lines.len().saturating_sub(count);
        lines.into_iter().skip(skip).map(|line| line.chars().filter(|&c| c != '\r').collect()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail_of(text: &[u8]) -> ConsoleTail {
        let mut tail = ConsoleTail::default();
        text.iter().for_each(|&byte| tail.push(byte));
        tail
    }

    #[test]
    fn the_last_lines_come_without_line_ends() {
        let tail = tail_of(b"one\r\ntwo\r\nthree");
        assert_eq!(tail.last_lines(2), ["two", "three"]);
        assert_eq!(tail.last_lines(9), ["one", "two", "three"]);
    }

    #[test]
    fn the_tail_is_bounded_and_a_cut_first_line_is_left_out() {
        let mut tail = ConsoleTail::default();
        for _ in 0..CONSOLE_TAIL_BYTES {
            b"a\xFFb\n".iter().for_each(|&byte| tail.push(byte));
        }
        tail.push(b'c');
        assert_eq!(tail.total(), 4 * CONSOLE_TAIL_BYTES as u64 + 1);
        let lines = tail.last_lines(usize::MAX);
        assert_eq!(lines.len(), CONSOLE_TAIL_BYTES / 4);
        assert_eq!(lines.first().map(String::as_str), Some("a\u{FFFD}b"));
        assert_eq!(lines.last().map(String::as_str), Some("c"));
    }

    #[test]
    fn output_is_read_on_from_an_offset() {
        let tail = tail_of(b"hello");
        assert_eq!(tail.since(3), (3, b"lo".to_vec()));
        assert_eq!(tail.since(5), (5, Vec::new()));
        assert_eq!(tail.since(99), (5, Vec::new()));
    }
}
