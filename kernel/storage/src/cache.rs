//! The cache of the node's disk, which all machines share: lines of 64 KiB, fetched when they are first needed or ahead of a sequential
//! reader, and replaced by the clock algorithm.
//!
//! A line's memory is its buffer. While the disk fills it the buffer belongs to the driver, so nobody can see half a line, and a
//! device that never answers keeps what it may still write to.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::string::String;
use alloc::vec::Vec;

/// Bytes of a line.
pub const LINE_BYTES: usize = 64 << 10;
/// Sequential readers that are told apart.
const STREAMS: usize = 16;
/// The most lines fetched ahead of a sequential reader: 1 MiB.
const AHEAD_MAX: u64 = 16;

/// Memory of a line.
pub type Buffer = &'static mut [u8];

#[derive(Debug)]
enum State {
    Empty,
    /// Waits to be fetched.
    Wanted,
    /// With the driver. When stale, what it brings is out of date.
    Fetching {
        stale: bool,
    },
    Filled,
    Failed(String),
}

#[derive(Debug)]
struct Line {
    number: u64,
    state: State,
    buffer: Option<Buffer>,
    /// Read since the hand last passed.
    used: bool,
}

/// A sequential reader.
#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// The line it will read next.
    next: u64,
    /// How many lines are fetched ahead of it.
    ahead: u64,
    last_seen: u64,
}

/// What a read finds.
#[derive(Debug, PartialEq, Eq)]
pub enum Lookup<'a> {
    /// The bytes that are at hand from the asked position on, as many as were asked for or as the line has.
    Hit(&'a [u8]),
    /// They are being fetched, or will be as soon as a line is free.
    Miss,
    /// The disk could not give them, and why. The next read tries again.
    Failed(String),
}

/// A line to be filled from the disk.
#[derive(Debug)]
pub struct Fetch {
    /// To be passed to [`BlockCache::filled`].
    pub line: usize,
    /// Where on the disk, in bytes.
    pub at: u64,
    /// How many bytes: a line's, or fewer at the disk's end.
    pub bytes: usize,
    /// The place for them.
    pub buffer: Buffer,
}

/// The cache of one disk.
#[derive(Debug)]
pub struct BlockCache {
    disk_bytes: u64,
    lines: Vec<Line>,
    /// Lines by their number.
    index: BTreeMap<u64, usize>,
    wanted: VecDeque<usize>,
    /// Lines that are wanted or being fetched.
    under_way: usize,
    hand: usize,
    streams: [Stream; STREAMS],
    reads: u64,
}

impl BlockCache {
    /// A cache of a disk of `disk_bytes` in `buffers`, each of [`LINE_BYTES`]; others are left out.
    #[must_use]
    pub fn new(disk_bytes: u64, buffers: impl IntoIterator<Item = Buffer>) -> Self {
        let buffers = buffers.into_iter().filter(|buffer| buffer.len() == LINE_BYTES);
        let line = |buffer| Line { number: 0, state: State::Empty, buffer: Some(buffer), used: false };
        Self {
            disk_bytes,
            lines: buffers.map(line).collect(),
            index: BTreeMap::new(),
            wanted: VecDeque::new(),
            under_way: 0,
            hand: 0,
            streams: [Stream::default(); STREAMS],
            reads: 0,
        }
    }

    /// Bytes of disk that are in the cache.
    #[must_use]
    pub fn filled_bytes(&self) -> u64 {
        self.lines.iter().filter(|line| matches!(line.state, State::Filled)).count() as u64
            * LINE_BYTES as u64
    }

    /// Whether lines wait for the disk.
    #[must_use]
    pub const fn is_waiting(&self) -> bool {
        self.under_way > 0
    }

    /// Looks for `length` bytes at byte `at` of the disk.
    pub fn read(&mut self, at: u64, length: u64) -> Lookup<'_> {
        if at >= self.disk_bytes {
            return Lookup::Failed("it lies behind the disk's end".into());
        }
        let number = at / LINE_BYTES as u64;
        self.notice(number);
        let Some(index) = self.index.get(&number).copied() else {
            self.want(number);
            return Lookup::Miss;
        };
        let bytes = self.line_bytes(number);
        if let Some(State::Failed(reason)) = self.lines.get_mut(index).map(|line| &mut line.state) {
            let reason = core::mem::take(reason);
            self.drop_line(index);
            return Lookup::Failed(reason);
        }
        let Some(line) = self.lines.get_mut(index) else { return Lookup::Miss };
        if !matches!(line.state, State::Filled) {
            return Lookup::Miss;
        }
        line.used = true;
        let start = (at % LINE_BYTES as u64) as usize;
        let end = bytes.min(start.saturating_add(usize::try_from(length).unwrap_or(usize::MAX)));
        match line.buffer.as_ref().and_then(|buffer| buffer.get(start..end)) {
            Some(bytes) => Lookup::Hit(bytes),
            None => Lookup::Miss,
        }
    }

    /// Bytes of a line: the disk's last one may be shorter.
    fn line_bytes(&self, number: u64) -> usize {
        let left = self.disk_bytes.saturating_sub(number.saturating_mul(LINE_BYTES as u64));
        usize::try_from(left).unwrap_or(usize::MAX).min(LINE_BYTES)
    }

    /// Fetches ahead of a reader that goes on where it was.
    fn notice(&mut self, number: u64) {
        self.reads += 1;
        if let Some(stream) = self.streams.iter_mut().find(|stream| stream.next == number + 1) {
            stream.last_seen = self.reads;
            return;
        }
        let Some(stream) = self.streams.iter_mut().find(|stream| stream.next == number && number > 0) else {
            if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.last_seen) {
                *oldest = Stream { next: number + 1, ahead: 0, last_seen: self.reads };
            }
            return;
        };
        stream.ahead = (stream.ahead * 2).clamp(2, AHEAD_MAX);
        (stream.next, stream.last_seen) = (number + 1, self.reads);
        let ahead = stream.ahead;
        // What is needed now comes first.
        if !self.index.contains_key(&number) {
            self.want(number);
        }
        for next in number + 1..=number + ahead {
            // Readers that need a line now must find one to replace.
            let may = self.under_way < self.lines.len() / 4 && self.line_bytes(next) > 0;
            if !may {
                break;
            }
            if !self.index.contains_key(&next) {
                self.want(next);
            }
        }
    }

    /// Makes a line wanted, in place of one that was not read for long. Nothing when all lines are under way.
    fn want(&mut self, number: u64) {
        let Some(index) = self.replaceable() else { return };
        self.drop_line(index);
        if let Some(line) = self.lines.get_mut(index) {
            (line.number, line.state, line.used) = (number, State::Wanted, true);
            self.index.insert(number, index);
            self.wanted.push_back(index);
            self.under_way += 1;
        }
    }

    fn drop_line(&mut self, index: usize) {
        if let Some(line) = self.lines.get_mut(index) {
            if !matches!(line.state, State::Empty) {
                self.index.remove(&line.number);
            }
            line.state = State::Empty;
        }
    }

    /// The next line that can be replaced and was not read since the hand last passed it.
    fn replaceable(&mut self) -> Option<usize> {
        for _ in 0..2 * self.lines.len() {
            let index = self.hand;
            self.hand = if index + 1 < self.lines.len() { index + 1 } else { 0 };
            let line = self.lines.get_mut(index)?;
            match line.state {
                State::Wanted | State::Fetching { .. } => {}
                // Its buffer is lost to a device that never answered.
                _ if line.buffer.is_none() => {}
                State::Empty => return Some(index),
                State::Filled | State::Failed(_) => {
                    if !core::mem::take(&mut line.used) {
                        return Some(index);
                    }
                }
            }
        }
        None
    }

    /// The next line to fetch, oldest wish first.
    pub fn next_fetch(&mut self) -> Option<Fetch> {
        let index = self.wanted.pop_front()?;
        let number = self.lines.get(index)?.number;
        let bytes = self.line_bytes(number);
        let line = self.lines.get_mut(index)?;
        line.state = State::Fetching { stale: false };
        let buffer = line.buffer.take()?;
        Some(Fetch { line: index, at: number.saturating_mul(LINE_BYTES as u64), bytes, buffer })
    }

    /// The driver could not take a fetch now: it will be the next one again.
    pub fn put_back(&mut self, fetch: Fetch) {
        if let Some(line) = self.lines.get_mut(fetch.line) {
            line.buffer = Some(fetch.buffer);
            line.state = State::Wanted;
            self.wanted.push_front(fetch.line);
        }
    }

    /// A fetch has ended. Without its buffer, which the device may still write to, the line is never used again.
    pub fn filled(&mut self, index: usize, buffer: Option<Buffer>, outcome: Result<(), String>) {
        let Some(line) = self.lines.get_mut(index) else { return };
        let State::Fetching { stale } = line.state else { return };
        line.buffer = buffer;
        self.under_way = self.under_way.saturating_sub(1);
        match outcome {
            Err(reason) => line.state = State::Failed(reason),
            Ok(()) if !stale && line.buffer.is_some() => line.state = State::Filled,
            Ok(()) => self.drop_line(index),
        }
    }

    /// The disk is being written to: what the cache has of the range is out of date.
    pub fn invalidate(&mut self, at: u64, length: u64) {
        let first = at / LINE_BYTES as u64;
        let last = at.saturating_add(length.saturating_sub(1)) / LINE_BYTES as u64;
        let lines: Vec<usize> = self.index.range(first..=last).map(|(_, index)| *index).collect();
        for index in lines {
            match self.lines.get_mut(index).map(|line| &mut line.state) {
                Some(State::Fetching { stale }) => *stale = true,
                Some(State::Filled) => self.drop_line(index),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests;
