//! Docker's framing of two output streams in one body, `application/vnd.docker.multiplexed-stream`.
//!
//! A frame is eight bytes and a payload: the stream (1 for standard output, 2 for standard error), three bytes Docker leaves
//! zero, and the payload's length as a big-endian `u32`. The second byte is 1 on a frame that is not the job's output but this
//! node's word that earlier output was dropped; its payload starts with [`dropped_mark`]'s line.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::log::Stream;

/// The media type of a body of such frames.
pub const MEDIA_TYPE: &str = "application/vnd.docker.multiplexed-stream";
/// Bytes before a payload.
pub const HEADER_LEN: usize = 8;
/// The longest payload a [`Decoder`] takes, in bytes.
pub const MAX_PAYLOAD: usize = 1024 * 1024;

/// The line that stands in a log for output that is no longer kept.
#[must_use]
pub fn dropped_mark(bytes: u64) -> String {
    format!("[nestling: {bytes} bytes of earlier output dropped]\n")
}

fn parse_mark(payload: &[u8]) -> Option<u64> {
    let text = core::str::from_utf8(payload).ok()?.trim();
    text.strip_prefix("[nestling: ")?.strip_suffix(" bytes of earlier output dropped]")?.parse().ok()
}

/// The header of a frame of `len` payload bytes.
#[must_use]
pub fn header(stream: Stream, is_mark: bool, len: u32) -> [u8; HEADER_LEN] {
    let [a, b, c, d] = len.to_be_bytes();
    let stream = match stream {
        Stream::Stdout => 1,
        Stream::Stderr => 2,
    };
    [stream, u8::from(is_mark), 0, 0, a, b, c, d]
}

/// One frame of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogFrame {
    /// Output of the job. It takes `payload.len()` of the log's offsets.
    Output(Stream, Vec<u8>),
    /// So many bytes of output, and offsets, are missing here.
    Dropped(u64),
}

/// Why a body is not such frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotMultiplexed;

impl core::fmt::Display for NotMultiplexed {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("the log is not a multiplexed stream: a frame's header is not one")
    }
}

impl core::error::Error for NotMultiplexed {}

/// Frames out of a body, however it was cut up.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
}

impl Decoder {
    /// An empty decoder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes of the body.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame, or `None` until more bytes come.
    ///
    /// # Errors
    /// [`NotMultiplexed`] when a header has an unknown stream or an absurd length.
    pub fn next_frame(&mut self) -> Result<Option<LogFrame>, NotMultiplexed> {
        let Some((&[stream, mark, _, _, a, b, c, d], rest)) = self.bytes.split_first_chunk::<HEADER_LEN>()
        else {
            return Ok(None);
        };
        let len = usize::try_from(u32::from_be_bytes([a, b, c, d])).map_err(|_| NotMultiplexed)?;
        let stream = match stream {
            1 => Stream::Stdout,
            2 => Stream::Stderr,
            _ => return Err(NotMultiplexed),
        };
        if len > MAX_PAYLOAD {
            return Err(NotMultiplexed);
        }
        let Some(payload) = rest.get(..len) else { return Ok(None) };
        let frame = match mark {
            0 => LogFrame::Output(stream, payload.to_vec()),
            _ => LogFrame::Dropped(parse_mark(payload).ok_or(NotMultiplexed)?),
        };
        self.bytes.drain(..HEADER_LEN.saturating_add(len));
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn frames_survive_any_split() {
        let mut body = vec![];
        body.extend(header(Stream::Stderr, false, 3));
        body.extend(b"err");
        let mark = dropped_mark(12);
        body.extend(header(Stream::Stderr, true, u32::try_from(mark.len()).unwrap()));
        body.extend(mark.as_bytes());
        body.extend(header(Stream::Stdout, false, 2));
        body.extend(b"ok");
        let expected = vec![
            LogFrame::Output(Stream::Stderr, b"err".to_vec()),
            LogFrame::Dropped(12),
            LogFrame::Output(Stream::Stdout, b"ok".to_vec()),
        ];
        for size in 1..body.len() {
            let (mut decoder, mut frames) = (Decoder::new(), vec![]);
            for chunk in body.chunks(size) {
                decoder.push(chunk);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    frames.push(frame);
                }
            }
            assert_eq!(frames, expected);
        }
    }

    #[test]
    fn what_is_no_frame_is_an_error() {
        for bytes in [[3, 0, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 255, 0, 0, 0], [2, 1, 0, 0, 0, 0, 0, 0]] {
            let mut decoder = Decoder::new();
            decoder.push(&bytes);
            assert_eq!(decoder.next_frame(), Err(NotMultiplexed));
        }
    }
}
