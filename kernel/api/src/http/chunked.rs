//! Bodies in chunks (RFC 9112, 7.1), decoded strictly: every line ends in CR LF, sizes are bare hexadecimal digits.

/// Most bytes of chunk extensions and trailers, which are skipped, in one body.
const MAX_SKIPPED: usize = 4096;
/// Most digits of a chunk's size.
const MAX_DIGITS: u8 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Size { digits: u8 },
    Extension,
    SizeEnd,
    Data,
    DataCr,
    DataLf,
    TrailerStart,
    Trailer,
    TrailerLf,
    LastLf,
    Done,
}

/// What is wrong with a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed(pub(super) &'static str);

/// A body in chunks that is arriving.
#[derive(Debug)]
pub(super) struct Decoder {
    state: State,
    /// Bytes of the chunk that are still to come.
    left: usize,
    skipped: usize,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self { state: State::Size { digits: 0 }, left: 0, skipped: 0 }
    }

    pub(super) fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Decodes from the start of `input`: how many bytes it used up, and a slice of the body among them.
    ///
    /// Uses up something unless `input` is empty or the body is done, so call it until then.
    pub(super) fn decode<'a>(&mut self, input: &'a [u8]) -> Result<(usize, &'a [u8]), Malformed> {
        let mut used = 0_usize;
        while let Some(&byte) = input.get(used) {
            if self.state == State::Done {
                break;
            }
            if self.state == State::Data {
                let rest = input.get(used..).unwrap_or_default();
                let data = rest.get(..self.left).unwrap_or(rest);
                self.left = self.left.saturating_sub(data.len());
                if self.left == 0 {
                    self.state = State::DataCr;
                }
                return Ok((used.saturating_add(data.len()), data));
            }
            self.state = self.framing(byte)?;
            used = used.saturating_add(1);
        }
        Ok((used, &[]))
    }

    fn framing(&mut self, byte: u8) -> Result<State, Malformed> {
        let after_size = if self.left == 0 { State::TrailerStart } else { State::Data };
        match (self.state, byte) {
            (State::Size { digits }, byte) if byte.is_ascii_hexdigit() => {
                if digits >= MAX_DIGITS {
                    return Err(Malformed("a chunk's size has more than 8 digits"));
                }
                let digit = char::from(byte).to_digit(16).and_then(|digit| usize::try_from(digit).ok());
                self.left = self.left << 4 | digit.unwrap_or_default();
                Ok(State::Size { digits: digits.saturating_add(1) })
            }
            (State::Size { digits: 1.. }, b'\r') | (State::Extension, b'\r') => Ok(State::SizeEnd),
            (State::Size { digits: 1.. }, b';' | b' ' | b'\t') => Ok(State::Extension),
            (State::Size { .. }, _) => Err(Malformed("a chunk's size is not hexadecimal digits")),
            (State::Extension, b'\n') => Err(Malformed("a chunk's size line ends without CR")),
            (State::Extension, _) => self.skip(State::Extension),
            (State::SizeEnd, b'\n') => Ok(after_size),
            (State::SizeEnd, _) => Err(Malformed("a chunk's size line ends without LF")),
            (State::DataCr, b'\r') => Ok(State::DataLf),
            (State::DataLf, b'\n') => Ok(State::Size { digits: 0 }),
            (State::DataCr | State::DataLf, _) => Err(Malformed("a chunk is longer than its size says")),
            (State::TrailerStart, b'\r') => Ok(State::LastLf),
            (State::Trailer, b'\r') => Ok(State::TrailerLf),
            (State::TrailerStart | State::Trailer, b'\n') => Err(Malformed("a trailer line ends without CR")),
            (State::TrailerStart | State::Trailer, _) => self.skip(State::Trailer),
            (State::TrailerLf, b'\n') => Ok(State::TrailerStart),
            (State::LastLf, b'\n') => Ok(State::Done),
            (State::TrailerLf | State::LastLf, _) => Err(Malformed("a trailer line ends without LF")),
            (State::Data | State::Done, _) => Ok(self.state),
        }
    }

    fn skip(&mut self, next: State) -> Result<State, Malformed> {
        self.skipped = self.skipped.saturating_add(1);
        if self.skipped > MAX_SKIPPED {
            return Err(Malformed("chunk extensions and trailers are too long"));
        }
        Ok(next)
    }
}

/// All of a body in one go, for tests: the body and what follows it, or `None` when it is not all there.
#[cfg(test)]
pub(super) fn decode_all(
    input: &[u8],
    step: usize,
) -> Result<Option<(alloc::vec::Vec<u8>, usize)>, Malformed> {
    let (mut decoder, mut body, mut at) = (Decoder::new(), alloc::vec::Vec::new(), 0);
    while at < input.len() && !decoder.is_done() {
        let (used, data) = decoder.decode(&input[at..input.len().min(at + step)])?;
        assert!(used > 0);
        body.extend_from_slice(data);
        at += used;
    }
    Ok(decoder.is_done().then_some((body, at)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn chunks_make_a_body_whatever_the_split() {
        let input =
            b"4\r\nWiki\r\n006;x=\"y\"\r\npedia \r\nE \r\nin \r\n\r\nchunks.\r\n0\r\nTrailer: x\r\n\r\nGET";
        for step in 1..input.len() {
            let (body, used) = decode_all(input, step).unwrap().unwrap();
            assert_eq!(body, b"Wikipedia in \r\n\r\nchunks.");
            assert_eq!(&input[used..], b"GET");
        }
    }

    #[test]
    fn what_is_not_strictly_chunked_is_refused() {
        for input in [
            "\r\n",
            "g\r\n",
            "-1\r\n",
            "+1\r\n",
            "0x1\r\n",
            " 1\r\n",
            "1\n",
            "1\rX",
            "1;a\nb",
            "123456789\r\n",
            "1\r\nab",
            "1\r\na\n",
            "1\r\na\rb",
            "0\r\nX\n",
            "0\r\n\n",
            "0\r\n\rX",
            "0\r\nX: y\rZ",
        ] {
            assert!(decode_all(input.as_bytes(), 100).is_err(), "{input:?}");
        }
    }

    #[test]
    fn endless_extensions_and_trailers_are_refused() {
        for start in ["1;", "0\r\n"] {
            let input = [start.as_bytes(), &[b'x'; 5000]].concat();
            assert!(decode_all(&input, 64).is_err());
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(input in prop::collection::vec(any::<u8>(), 0..400), step in 1_usize..50) {
            let _ = decode_all(&input, step);
        }

        #[test]
        fn bytes_like_chunks_never_panic(input in "[0-9a-f\r\n;]{0,200}", step in 1_usize..50) {
            let whole = decode_all(input.as_bytes(), 1000);
            prop_assert_eq!(decode_all(input.as_bytes(), step), whole);
        }
    }
}
