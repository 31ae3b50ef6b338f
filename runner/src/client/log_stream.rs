//! A job's output as it travels: frames of docker's multiplexed stream, each an 8-byte header (1 for standard output or 2 for
//! standard error, three zero bytes, the length as a big-endian `u32`) and so many bytes.

use std::fmt;
use std::io::{self, Read};

/// What the format is called in `Accept` and `Content-Type`.
pub(super) const MEDIA_TYPE: &str = "application/vnd.docker.multiplexed-stream";

/// Longest frame taken; a node's are far shorter.
const MAX_FRAME: usize = 16 << 20;
/// Most bytes of a frame handed on at once, so that a long frame needs no long buffer.
const MAX_CHUNK: usize = 64 << 10;

/// Who wrote a piece of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A step, to its standard output.
    Stdout,
    /// A step, to its standard error.
    Stderr,
    /// The node, about the log itself: that earlier output was dropped. Docker's number for this is 3.
    Node,
}

/// A piece of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Who wrote it.
    pub source: Source,
    /// What was written.
    pub data: Vec<u8>,
}

/// A job's output, piece by piece as it arrives.
pub struct LogStream {
    reader: Box<dyn Read + Send>,
    offset: u64,
    /// The frame being read and how many of its bytes are still to come.
    frame: Option<(Source, usize)>,
    finished: bool,
}

impl LogStream {
    pub(super) fn new(reader: Box<dyn Read + Send>, offset: u64) -> LogStream {
        LogStream { reader, offset, frame: None, finished: false }
    }

    /// The offset, in the job's whole output, of the byte that comes next: where to go on when the connection breaks. It
    /// counts only what was read, so it is of use only for a stream of both outputs.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next piece; none at the end of the output.
    ///
    /// # Errors
    /// When the connection breaks, or the stream is not in the format. After an error, the stream is over.
    pub fn next_chunk(&mut self) -> io::Result<Option<Chunk>> {
        if self.finished {
            return Ok(None);
        }
        let result = self.read_chunk();
        if !matches!(result, Ok(Some(_))) {
            self.finished = true;
        }
        result
    }

    fn read_chunk(&mut self) -> io::Result<Option<Chunk>> {
        let (source, left) = loop {
            match self.frame {
                Some((source, left)) if left > 0 => break (source, left),
                _ => match self.read_header()? {
                    Some(frame) => self.frame = Some(frame),
                    None => return Ok(None),
                },
            }
        };
        let mut data = vec![0; left.min(MAX_CHUNK)];
        let length = match source {
            // The node's words are read whole: they say how far the offset moved.
            Source::Node => self.reader.read_exact(&mut data).map(|()| data.len())?,
            _ => read_some(&mut self.reader, &mut data)?,
        };
        if length == 0 {
            return Err(cut("within a frame"));
        }
        data.truncate(length);
        self.frame = Some((source, left - length));
        self.offset += match source {
            Source::Node => dropped_bytes(&data).unwrap_or(0),
            _ => length as u64,
        };
        Ok(Some(Chunk { source, data }))
    }

    fn read_header(&mut self) -> io::Result<Option<(Source, usize)>> {
        let mut header = [0; 8];
        let mut filled = 0;
        while filled < header.len() {
            match read_some(&mut self.reader, &mut header[filled..])? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(cut("within a frame's header")),
                length => filled += length,
            }
        }
        let [kind, _, _, _, length @ ..] = header;
        let source = match kind {
            1 => Source::Stdout,
            2 => Source::Stderr,
            3 => Source::Node,
            other => return Err(invalid(format!("a frame of unknown kind {other}"))),
        };
        let length = u32::from_be_bytes(length) as usize;
        if length > MAX_FRAME {
            return Err(invalid(format!("a frame of {length} bytes, over the limit of {MAX_FRAME}")));
        }
        Ok(Some((source, length)))
    }
}

impl Iterator for LogStream {
    type Item = io::Result<Chunk>;

    fn next(&mut self) -> Option<io::Result<Chunk>> {
        self.next_chunk().transpose()
    }
}

impl fmt::Debug for LogStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogStream")
            .field("offset", &self.offset)
            .field("frame", &self.frame)
            .finish_non_exhaustive()
    }
}

/// The number in `[nestling: N bytes of earlier output dropped]`.
fn dropped_bytes(mark: &[u8]) -> Option<u64> {
    str::from_utf8(mark).ok()?.trim_start().strip_prefix("[nestling: ")?.split(' ').next()?.parse().ok()
}

fn read_some(reader: &mut dyn Read, into: &mut [u8]) -> io::Result<usize> {
    loop {
        match reader.read(into) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn cut(place: &str) -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, format!("the log broke off {place}"))
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
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

    fn frame(kind: u8, data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind, 0, 0, 0];
        bytes.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    fn stream(bytes: Vec<u8>, piece: usize) -> LogStream {
        LogStream::new(Box::new(Pieces(bytes, piece)), 100)
    }

    #[test]
    fn however_the_bytes_arrive_the_two_outputs_are_the_same() {
        let bytes = [frame(1, b"one\n"), frame(2, b"two\n"), frame(1, b""), frame(1, &[0xff, 0, 7])].concat();
        for piece in 1..=bytes.len() {
            let mut stream = stream(bytes.clone(), piece);
            let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
            for chunk in &mut stream {
                let chunk = chunk.unwrap();
                match chunk.source {
                    Source::Stdout => stdout.extend(chunk.data),
                    _ => stderr.extend(chunk.data),
                }
            }
            assert_eq!(stdout, b"one\n\xff\x00\x07");
            assert_eq!(stderr, b"two\n");
            assert_eq!(stream.offset(), 111);
        }
    }

    #[test]
    fn a_stream_that_ends_inside_a_frame_broke_off() {
        let bytes = frame(1, b"text");
        for length in 1..bytes.len() {
            let result: io::Result<Vec<Chunk>> = stream(bytes[..length].to_vec(), 3).collect();
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn the_nodes_words_about_dropped_output_move_the_offset_by_as_much() {
        let mark = b"[nestling: 5000 bytes of earlier output dropped]\n";
        let mut stream = stream([frame(3, mark), frame(1, b"rest")].concat(), 4);
        assert_eq!(stream.next_chunk().unwrap().unwrap().source, Source::Node);
        assert_eq!(stream.offset(), 5100);
        assert_eq!(stream.by_ref().count(), 1);
        assert_eq!(stream.offset(), 5104);
    }

    #[test]
    fn what_is_not_the_format_is_refused_and_ends_the_stream() {
        for bytes in
            [frame(9, b"x"), b"HTTP/1.1 200 OK\r\n".to_vec(), vec![1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]]
        {
            let mut stream = stream(bytes, 64);
            assert_eq!(stream.next_chunk().unwrap_err().kind(), io::ErrorKind::InvalidData);
            assert_eq!(stream.next_chunk().unwrap(), None);
        }
    }
}
