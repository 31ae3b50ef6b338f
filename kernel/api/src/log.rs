//! A job's output, the newest part of it: bytes by their offset in everything the job ever wrote.
//!
//! Bytes lie in segments; dropping the oldest means dropping whole segments, so that memory grows with content and is given
//! back as it goes. Offsets never change: a byte's offset is the count of bytes before it, kept or not.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::types::LogInfo;

/// Which of a step's outputs bytes came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Most output bytes in a segment.
const SEGMENT: usize = 16 * 1024;
/// Most changes between streams in a segment.
const SEGMENT_RUNS: usize = 2048;
/// What a segment costs besides its two vectors' contents.
const SEGMENT_OVERHEAD: usize = 64;

/// Consecutive bytes of one stream.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// Where it ends in its segment.
    end: u32,
    stream: Stream,
}

#[derive(Debug)]
struct Segment {
    /// The offset of its first byte.
    start: u64,
    bytes: Vec<u8>,
    /// In order; the last one's end is `bytes.len()`.
    runs: Vec<Run>,
}

impl Segment {
    fn memory(&self) -> usize {
        SEGMENT_OVERHEAD + self.bytes.capacity() + self.runs.capacity() * size_of::<Run>()
    }

    fn end(&self) -> u64 {
        self.start.saturating_add(self.bytes.len() as u64)
    }

    /// Bytes it still takes, of a stream.
    fn room(&self, stream: Stream) -> usize {
        let same = self.runs.last().is_some_and(|run| run.stream == stream);
        if same || self.runs.len() < SEGMENT_RUNS { SEGMENT.saturating_sub(self.bytes.len()) } else { 0 }
    }

    fn push(&mut self, stream: Stream, bytes: &[u8]) {
        let len = self.bytes.len().saturating_add(bytes.len());
        if len > self.bytes.capacity() {
            // By doubling, as a vector grows by itself, but never beyond a segment.
            let capacity = len.checked_next_power_of_two().unwrap_or(len).clamp(64, SEGMENT);
            self.bytes.reserve_exact(capacity.saturating_sub(self.bytes.len()));
        }
        self.bytes.extend_from_slice(bytes);
        let end = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        match self.runs.last_mut() {
            Some(run) if run.stream == stream => run.end = end,
            _ => self.runs.push(Run { end, stream }),
        }
    }
}

/// What lies at an offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Output that is no longer kept; go on behind it.
    Dropped {
        /// Bytes from the offset to the first byte that is kept.
        bytes: u64,
    },
    /// Output of one stream, never empty.
    Bytes(Stream, &'a [u8]),
    /// Nothing yet.
    End,
}

/// The newest output of one job.
#[derive(Debug, Default)]
pub struct LogRing {
    segments: VecDeque<Segment>,
    end: u64,
    memory: usize,
}

impl LogRing {
    /// An empty log. Allocates nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The offset the next byte will have: all bytes ever written.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.end
    }

    /// The offset of the first byte still kept.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.segments.front().map_or(self.end, |segment| segment.start)
    }

    /// Bytes of memory in use, bookkeeping included.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.memory
    }

    /// What the API reports of it.
    #[must_use]
    pub fn info(&self) -> LogInfo {
        LogInfo { bytes: self.end, start_offset: self.start(), truncated: self.start() > 0 }
    }

    /// Adds output.
    pub fn push(&mut self, stream: Stream, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.segments.back().is_none_or(|last| last.room(stream) == 0) {
                let segment = Segment { start: self.end, bytes: Vec::new(), runs: Vec::new() };
                self.memory = self.memory.saturating_add(segment.memory());
                self.segments.push_back(segment);
            }
            let Some(last) = self.segments.back_mut() else { return };
            let (now, later) = bytes.split_at(bytes.len().min(last.room(stream)));
            let before = last.memory();
            last.push(stream, now);
            self.memory = self.memory.saturating_add(last.memory()).saturating_sub(before);
            self.end = self.end.saturating_add(now.len() as u64);
            bytes = later;
        }
    }

    /// Drops the oldest output until no more than `limit` bytes of memory are in use.
    pub fn shrink_to(&mut self, limit: usize) {
        while self.memory > limit {
            let Some(segment) = self.segments.pop_front() else { break };
            self.memory = self.memory.saturating_sub(segment.memory());
        }
        if self.segments.is_empty() {
            self.segments = VecDeque::new();
        }
    }

    /// What lies at `offset`, up to the end of what can be given as one slice.
    #[must_use]
    pub fn at(&self, offset: u64) -> Piece<'_> {
        if offset >= self.end {
            return Piece::End;
        }
        let start = self.start();
        if offset < start {
            return Piece::Dropped { bytes: start.saturating_sub(offset) };
        }
        self.piece(offset).unwrap_or(Piece::End)
    }

    fn piece(&self, offset: u64) -> Option<Piece<'_>> {
        let index = self.segments.partition_point(|segment| segment.end() <= offset);
        let segment = self.segments.get(index)?;
        let within = usize::try_from(offset.checked_sub(segment.start)?).ok()?;
        let run = segment.runs.get(segment.runs.partition_point(|run| run.end as usize <= within))?;
        Some(Piece::Bytes(run.stream, segment.bytes.get(within..run.end as usize)?))
    }

    /// Bytes of memory behind everything from `offset` on: what must not be dropped for a reader that stands there.
    #[must_use]
    pub fn memory_from(&self, offset: u64) -> usize {
        let first = self.segments.partition_point(|segment| segment.end() <= offset);
        self.segments.range(first..).map(Segment::memory).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    /// Everything from `offset`, as (stream, byte), and how much was dropped before it.
    fn read(log: &LogRing, mut offset: u64) -> (u64, Vec<(Stream, u8)>) {
        let (mut dropped, mut out) = (0, vec![]);
        loop {
            match log.at(offset) {
                Piece::End => return (dropped, out),
                Piece::Dropped { bytes } => {
                    dropped += bytes;
                    offset += bytes;
                }
                Piece::Bytes(stream, bytes) => {
                    assert!(!bytes.is_empty());
                    out.extend(bytes.iter().map(|&byte| (stream, byte)));
                    offset += bytes.len() as u64;
                }
            }
        }
    }

    #[test]
    fn an_empty_log_has_nothing_and_costs_nothing() {
        let log = LogRing::new();
        assert_eq!((log.at(0), log.at(9), log.memory()), (Piece::End, Piece::End, 0));
        assert_eq!(log.info(), LogInfo::default());
    }

    #[test]
    fn small_output_costs_little_memory() {
        let mut log = LogRing::new();
        log.push(Stream::Stdout, b"hello\n");
        assert!(log.memory() < 200, "{}", log.memory());
    }

    #[test]
    fn the_oldest_output_is_dropped_and_its_offsets_stay_taken() {
        let mut log = LogRing::new();
        for _ in 0..100 {
            log.push(Stream::Stdout, &[b'x'; 10_000]);
            log.shrink_to(100_000);
            assert!(log.memory() <= 100_000);
        }
        let info = log.info();
        assert_eq!(info.bytes, 1_000_000);
        assert!(info.truncated && info.start_offset > 900_000 && info.start_offset < 940_000, "{info:?}");
        assert_eq!(log.at(0), Piece::Dropped { bytes: info.start_offset });
    }

    #[test]
    fn shrinking_to_nothing_gives_all_memory_back() {
        let mut log = LogRing::new();
        log.push(Stream::Stderr, &[0; 50_000]);
        log.shrink_to(0);
        assert_eq!((log.memory(), log.start(), log.end()), (0, 50_000, 50_000));
        log.push(Stream::Stderr, b"on");
        assert_eq!(log.at(50_000), Piece::Bytes(Stream::Stderr, b"on"));
    }

    #[test]
    fn streams_that_alternate_stay_within_the_limit() {
        let mut log = LogRing::new();
        for index in 0..200_000_u32 {
            log.push(if index % 2 == 0 { Stream::Stdout } else { Stream::Stderr }, b"x");
            log.shrink_to(256 * 1024);
        }
        let real: usize = log.segments.iter().map(Segment::memory).sum();
        assert_eq!(log.memory(), real);
        assert!(real <= 256 * 1024);
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_plain_vector(
            pushes in prop::collection::vec((any::<bool>(), 0_usize..20_000, any::<u8>()), 0..40),
            limit in 1_usize..200_000,
            offset in 0_u64..400_000,
        ) {
            let (mut log, mut model) = (LogRing::new(), vec![]);
            for (out, len, byte) in pushes {
                let stream = if out { Stream::Stdout } else { Stream::Stderr };
                log.push(stream, &vec![byte; len]);
                log.shrink_to(limit);
                model.extend(core::iter::repeat_n((stream, byte), len));
                prop_assert!(log.memory() <= limit);
                prop_assert_eq!(log.memory(), log.memory_from(0));
            }
            prop_assert_eq!(log.end(), model.len() as u64);
            let (dropped, got) = read(&log, offset);
            let from = (offset + dropped).min(model.len() as u64);
            prop_assert_eq!(&got[..], &model[usize::try_from(from).unwrap()..]);
            if offset < log.end() {
                prop_assert_eq!(dropped, log.start().saturating_sub(offset));
            }
        }
    }
}
