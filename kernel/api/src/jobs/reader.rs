//! Reading a job's log from outside, once or as it grows.
//!
//! A reader that follows holds the job back when it cannot keep up, but only while it makes progress: one that has read
//! nothing for [`PATIENCE_NS`] loses output instead.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use super::id::JobId;
use crate::log::{LogRing, Piece, Stream};
use crate::multiplex;
use crate::time::{Clock, SECOND};

/// How long a reader that follows may read nothing before the log goes on without it.
pub(super) const PATIENCE_NS: u64 = 10 * SECOND;
/// The least room a reader writes into: a mark with its frame's header always fits.
pub const MIN_ROOM: usize = 128;

/// Where a reader that follows stands. The job knows of it as long as the reader lives.
#[derive(Debug)]
pub(super) struct Follower {
    cursor: AtomicU64,
    progress_ns: AtomicU64,
}

impl Follower {
    pub(super) fn cursor(&self) -> u64 {
        self.cursor.load(Ordering::Relaxed)
    }

    /// When its progress is too long ago to hold the job back any more.
    pub(super) fn patience_ends(&self) -> u64 {
        self.progress_ns.load(Ordering::Relaxed).saturating_add(PATIENCE_NS)
    }

    pub(super) fn made_progress(&self, now: Clock) {
        self.progress_ns.store(now.monotonic_ns, Ordering::Relaxed);
    }
}

/// Which output a reader wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Streams {
    /// All of it.
    #[default]
    Both,
    /// One stream only.
    Only(Stream),
}

/// What a reader wants of a log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadOptions {
    /// The offset to start at.
    pub start: u64,
    /// The offset to end before; none: wherever the log ends.
    pub end: Option<u64>,
    /// Which output.
    pub streams: Streams,
    /// In frames that tell the streams apart.
    pub multiplexed: bool,
    /// Whether to wait for more until the job is over.
    pub follow: bool,
    /// Whether missing output is an error, not a mark: for an answer whose length has been promised.
    pub exact: bool,
}

/// A place in a job's log.
#[derive(Debug)]
pub struct LogReader {
    pub(super) id: JobId,
    pub(super) options: ReadOptions,
    cursor: u64,
    at_line_start: bool,
    pub(super) follower: Option<Arc<Follower>>,
}

/// How far a reader got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadState {
    /// There is more, for more room.
    More,
    /// There will be more once the job goes on.
    Waiting,
    /// That was everything.
    Done,
    /// The rest cannot be had: the job was deleted, or bytes of an exact range are no longer kept.
    Lost,
}

impl LogReader {
    pub(super) fn new(id: JobId, options: ReadOptions, now: Clock) -> Self {
        let follower = options.follow.then(|| {
            Arc::new(Follower {
                cursor: AtomicU64::new(options.start),
                progress_ns: AtomicU64::new(now.monotonic_ns),
            })
        });
        Self { id, options, cursor: options.start, at_line_start: true, follower }
    }

    /// The job it reads of.
    #[must_use]
    pub fn job(&self) -> JobId {
        self.id
    }

    /// Whether it waits for output that is yet to come.
    #[must_use]
    pub fn follows(&self) -> bool {
        self.options.follow
    }

    /// Appends what there is, at most `room` bytes.
    pub(super) fn read(
        &mut self,
        log: &LogRing,
        completed: bool,
        out: &mut Vec<u8>,
        room: usize,
        now: Clock,
    ) -> ReadState {
        let (before, limit) = (self.cursor, out.len().saturating_add(room));
        let state = loop {
            if self.options.end.is_some_and(|end| self.cursor >= end) {
                break ReadState::Done;
            }
            if limit.saturating_sub(out.len()) < MIN_ROOM && !self.options.exact {
                break ReadState::More;
            }
            match log.at(self.cursor) {
                Piece::End if self.options.exact => break ReadState::Lost,
                Piece::End if completed || !self.options.follow => break ReadState::Done,
                Piece::End => break ReadState::Waiting,
                Piece::Dropped { .. } if self.options.exact => break ReadState::Lost,
                Piece::Dropped { bytes } => {
                    self.cursor = self.cursor.saturating_add(bytes);
                    self.mark(bytes, out);
                }
                Piece::Bytes(stream, bytes) => {
                    if !self.take(stream, bytes, out, limit) {
                        break ReadState::More;
                    }
                }
            }
        };
        if let Some(follower) = &self.follower
            && (self.cursor != before || state == ReadState::Waiting)
        {
            follower.cursor.store(self.cursor, Ordering::Relaxed);
            follower.made_progress(now);
        }
        state
    }

    fn mark(&mut self, dropped: u64, out: &mut Vec<u8>) {
        let mark = multiplex::dropped_mark(dropped);
        if self.options.multiplexed {
            let len = u32::try_from(mark.len()).unwrap_or(u32::MAX);
            out.extend_from_slice(&multiplex::header(Stream::Stderr, true, len));
        } else if !self.at_line_start {
            out.push(b'\n');
        }
        out.extend_from_slice(mark.as_bytes());
        self.at_line_start = true;
    }

    /// Appends one piece or as much of it as fits; false when there is no room.
    fn take(&mut self, stream: Stream, bytes: &[u8], out: &mut Vec<u8>, limit: usize) -> bool {
        let wanted = match self.options.end {
            Some(end) => usize::try_from(end.saturating_sub(self.cursor)).unwrap_or(usize::MAX),
            None => usize::MAX,
        };
        let bytes = bytes.get(..wanted).unwrap_or(bytes);
        if let Streams::Only(only) = self.options.streams
            && only != stream
        {
            self.cursor = self.cursor.saturating_add(bytes.len() as u64);
            return true;
        }
        let header = if self.options.multiplexed { multiplex::HEADER_LEN } else { 0 };
        let room = limit.saturating_sub(out.len()).saturating_sub(header);
        let bytes = bytes.get(..room).unwrap_or(bytes);
        let Some(last) = bytes.last() else { return false };
        if self.options.multiplexed {
            let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            out.extend_from_slice(&multiplex::header(stream, false, len));
        }
        out.extend_from_slice(bytes);
        self.at_line_start = *last == b'\n';
        self.cursor = self.cursor.saturating_add(bytes.len() as u64);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn log(pieces: &[(Stream, &[u8])]) -> LogRing {
        let mut log = LogRing::new();
        for (stream, bytes) in pieces {
            log.push(*stream, bytes);
        }
        log
    }

    fn reader(options: ReadOptions) -> LogReader {
        LogReader::new(JobId::from_bytes([0; 16]), options, Clock::default())
    }

    /// All a reader gives, in pieces of `room` bytes.
    fn read_all(log: &LogRing, options: ReadOptions, room: usize) -> (Vec<u8>, ReadState) {
        let (mut reader, mut all) = (reader(options), vec![]);
        loop {
            let mut out = vec![];
            let state = reader.read(log, true, &mut out, room, Clock::default());
            assert!(out.len() <= room);
            assert!(!out.is_empty() || state != ReadState::More);
            all.extend(out);
            if state != ReadState::More {
                return (all, state);
            }
        }
    }

    #[test]
    fn a_plain_reader_gets_everything_whatever_the_room() {
        let log =
            log(&[(Stream::Stdout, b"one\n"), (Stream::Stderr, b"two\n"), (Stream::Stdout, &[b'x'; 500])]);
        for room in [MIN_ROOM, 200, 1000] {
            let (all, state) = read_all(&log, ReadOptions::default(), room);
            assert_eq!((all.len(), state), (508, ReadState::Done));
            assert!(all.starts_with(b"one\ntwo\nxxx"));
        }
    }

    #[test]
    fn one_stream_can_be_had_alone() {
        let log = log(&[(Stream::Stdout, b"out"), (Stream::Stderr, b"err"), (Stream::Stdout, b"put")]);
        let only = |stream| ReadOptions { streams: Streams::Only(stream), ..ReadOptions::default() };
        assert_eq!(read_all(&log, only(Stream::Stdout), 200).0, b"output");
        assert_eq!(read_all(&log, only(Stream::Stderr), 200).0, b"err");
    }

    #[test]
    fn frames_tell_the_streams_apart() {
        let log = log(&[(Stream::Stdout, b"out"), (Stream::Stderr, b"err")]);
        let options = ReadOptions { multiplexed: true, start: 1, ..ReadOptions::default() };
        let (all, _) = read_all(&log, options, 200);
        assert_eq!(all, b"\x01\0\0\0\0\0\0\x02ut\x02\0\0\0\0\0\0\x03err");
    }

    #[test]
    fn dropped_output_leaves_a_mark_on_a_line_of_its_own() {
        let mut log = log(&[(Stream::Stdout, b"unfinished")]);
        let mut reader = reader(ReadOptions { follow: true, ..ReadOptions::default() });
        let mut out = vec![];
        assert_eq!(reader.read(&log, false, &mut out, 200, Clock::default()), ReadState::Waiting);
        log.push(Stream::Stdout, b" line\n");
        log.shrink_to(0);
        log.push(Stream::Stdout, b"later\n");
        assert_eq!(reader.read(&log, true, &mut out, 200, Clock::default()), ReadState::Done);
        assert_eq!(out, b"unfinished\n[nestling: 6 bytes of earlier output dropped]\nlater\n");
    }

    #[test]
    fn a_range_is_exact_or_lost() {
        let mut log = log(&[(Stream::Stdout, b"0123456789"), (Stream::Stderr, b"abc")]);
        let options = ReadOptions { start: 8, end: Some(12), exact: true, ..ReadOptions::default() };
        assert_eq!(read_all(&log, options, 1), (b"89ab".to_vec(), ReadState::Done));
        log.shrink_to(0);
        assert_eq!(read_all(&log, options, 1), (vec![], ReadState::Lost));
    }
}
