//! The kernel's command line: `key=value` words separated by spaces.

/// The command line as the boot loader gave it.
#[derive(Clone, Copy, Debug, Default)]
pub struct CommandLine(&'static str);

impl CommandLine {
    /// Wraps the text.
    pub const fn new(text: &'static str) -> Self {
        Self(text)
    }

    /// The value of the last `key=value` word with this key.
    pub fn value(&self, key: &str) -> Option<&'static str> {
        self.words()
            .filter_map(|word| word.split_once('='))
            .filter(|(k, _)| *k == key)
            .map(|(_, value)| value)
            .last()
    }

    /// Where the text stands in memory.
    pub fn place(&self) -> core::ops::Range<u64> {
        let start = self.0.as_ptr() as u64;
        start..start + self.0.len() as u64
    }

    /// All words, in order.
    pub fn words(&self) -> impl Iterator<Item = &'static str> {
        self.0.split_ascii_whitespace()
    }
}
