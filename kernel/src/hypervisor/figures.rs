//! What templates cost and bring, in numbers.

/// What a template costs and has brought.
#[derive(Clone, Copy, Debug, Default)]
pub struct TemplateFigures {
    /// The template's number.
    pub number: u64,
    /// Bytes of memory that its clones share.
    pub shared_bytes: u64,
    /// Clones that exist.
    pub clones_alive: u64,
    /// Clones ever made.
    pub clones_made: u64,
    /// Pages that are copied before a clone runs.
    pub working_set_pages: u64,
    /// Pages that the first clone copied, each with an exit.
    pub first_faults: u64,
    /// Pages that all later clones that have ended copied so, together.
    pub later_faults: u64,
}
