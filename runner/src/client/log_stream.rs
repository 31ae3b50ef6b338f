//! A job's output as it travels: a body of `nestling_api::multiplex` frames, read as it arrives.

use std::fmt;
use std::io::{self, Read};

use nestling_api::multiplex::{Decoder, LogFrame};

/// Most bytes read at once.
const READ: usize = 16 << 10;

/// A job's output, frame by frame as it arrives.
pub struct LogStream {
    reader: Box<dyn Read + Send>,
    decoder: Decoder,
    buffer: Vec<u8>,
    offset: u64,
    finished: bool,
}

impl LogStream {
    pub(super) fn new(reader: Box<dyn Read + Send>, offset: u64) -> LogStream {
        LogStream { reader, decoder: Decoder::new(), buffer: vec![0; READ], offset, finished: false }
    }

    /// The offset, in the job's whole output, of the byte that comes next: where to go on when the connection breaks. It
    /// counts what was read here, so it is of use only for a stream of both outputs.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next frame; none at the end of the output.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] when nothing came for long; else the connection broke, or the body is no such frames.
    /// After an error, the stream is over.
    pub fn next_frame(&mut self) -> io::Result<Option<LogFrame>> {
        if self.finished {
            return Ok(None);
        }
        let result = self.read_frame();
        match &result {
            Ok(Some(LogFrame::Output(_, data))) => self.offset += data.len() as u64,
            Ok(Some(LogFrame::Dropped(bytes))) => self.offset = self.offset.saturating_add(*bytes),
            Ok(None) | Err(_) => self.finished = true,
        }
        result
    }

    fn read_frame(&mut self) -> io::Result<Option<LogFrame>> {
        loop {
            match self.decoder.next_frame() {
                Ok(Some(frame)) => return Ok(Some(frame)),
                Ok(None) => {}
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            }
            match self.reader.read(&mut self.buffer) {
                Ok(0) => return Ok(None),
                Ok(length) => self.decoder.push(&self.buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(with_timeout_told(error)),
            }
        }
    }
}

/// Tells a timeout of the HTTP client, which is an error of no kind, as one.
fn with_timeout_told(error: io::Error) -> io::Error {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<ureq::Error>()) {
        Some(ureq::Error::Timeout(_)) => io::Error::new(io::ErrorKind::TimedOut, "nothing came for long"),
        _ => error,
    }
}

impl Iterator for LogStream {
    type Item = io::Result<LogFrame>;

    fn next(&mut self) -> Option<io::Result<LogFrame>> {
        self.next_frame().transpose()
    }
}

impl fmt::Debug for LogStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogStream")
            .field("offset", &self.offset)
            .field("finished", &self.finished)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use nestling_api::log::Stream;
    use nestling_api::multiplex::{dropped_mark, header};

    use super::*;

    /// Gives its bytes in pieces of one size.
    struct Pieces(Vec<u8>, usize);

    impl Read for Pieces {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let length = self.1.min(into.len()).min(self.0.len());
            into[..length].copy_from_slice(&self.0[..length]);
            self.0.drain(..length);
            Ok(length)
        }
    }

    fn frame(stream: Stream, mark: bool, data: &[u8]) -> Vec<u8> {
        let mut bytes = header(stream, mark, u32::try_from(data.len()).unwrap()).to_vec();
        bytes.extend_from_slice(data);
        bytes
    }

    #[test]
    fn the_offset_counts_output_and_what_was_dropped_of_it() {
        let bytes = [
            frame(Stream::Stderr, true, dropped_mark(5000).as_bytes()),
            frame(Stream::Stdout, false, b"\xff\0"),
            frame(Stream::Stderr, false, b"two\n"),
        ]
        .concat();
        for piece in 1..=bytes.len() {
            let mut stream = LogStream::new(Box::new(Pieces(bytes.clone(), piece)), 100);
            let frames: io::Result<Vec<LogFrame>> = stream.by_ref().collect();
            let expected = [
                LogFrame::Dropped(5000),
                LogFrame::Output(Stream::Stdout, b"\xff\0".to_vec()),
                LogFrame::Output(Stream::Stderr, b"two\n".to_vec()),
            ];
            assert_eq!(frames.unwrap(), expected);
            assert_eq!(stream.offset(), 5106);
        }
    }

    #[test]
    fn what_is_not_frames_is_refused_and_ends_the_stream() {
        let mut stream = LogStream::new(Box::new(Pieces(b"HTTP/1.1 200 OK\r\n".to_vec(), 4)), 0);
        assert_eq!(stream.next_frame().unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(stream.next_frame().unwrap(), None);
    }
}
