//! A request's body while it arrives, bounded by itself and together with all others.

use alloc::format;
use alloc::vec::Vec;

use super::chunked;
use super::request::{BodyLength, Head};
use crate::budget::Share;
use crate::error::{ApiError, ErrorCode};
use crate::router::Route;

/// A request whose body is arriving.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) head: Head,
    pub(super) route: Route,
    pub(super) body: Vec<u8>,
    /// When the head was read.
    pub(super) since_ns: u64,
    coding: Coding,
    share: Share,
}

/// How a body's end is found while it arrives.
#[derive(Debug)]
pub(super) enum Coding {
    /// So many bytes are still to come.
    Left(u64),
    /// After the last chunk.
    Chunked(chunked::Decoder),
}

impl Coding {
    pub(super) fn new(length: BodyLength) -> Self {
        match length {
            BodyLength::Known(len) => Self::Left(len),
            BodyLength::Chunked => Self::Chunked(chunked::Decoder::new()),
        }
    }

    /// Reads from the start of `input`: how many bytes it used up, and a slice of the body among them.
    ///
    /// Uses up something unless `input` is empty or the body is done, so call it until then.
    pub(super) fn take<'a>(&mut self, input: &'a [u8]) -> Result<(usize, &'a [u8]), ApiError> {
        match self {
            Self::Left(left) => {
                let wanted = usize::try_from(*left).unwrap_or(usize::MAX);
                let data = input.get(..wanted).unwrap_or(input);
                *left = left.saturating_sub(data.len() as u64);
                Ok((data.len(), data))
            }
            Self::Chunked(decoder) => decoder.decode(input).map_err(|error| {
                ApiError::new(ErrorCode::MalformedRequest, format!("the body is not in chunks: {}", error.0))
            }),
        }
    }

    /// Bytes that are still to come, if that is known.
    pub(super) fn left(&self) -> Option<u64> {
        match self {
            Self::Left(left) => Some(*left),
            Self::Chunked(_) => None,
        }
    }

    pub(super) fn is_done(&self) -> bool {
        match self {
            Self::Left(left) => *left == 0,
            Self::Chunked(decoder) => decoder.is_done(),
        }
    }
}

impl Incoming {
    /// The body of a request that was just admitted.
    pub(super) fn new(head: Head, route: Route, share: Share, since_ns: u64) -> Self {
        let coding = Coding::new(head.body);
        Self { head, route, body: Vec::new(), since_ns, coding, share }
    }

    /// Takes what `rest` has of the body: how many bytes of it, 0 when nothing more can be taken.
    pub(super) fn take(&mut self, rest: &[u8], limit: usize) -> Result<usize, ApiError> {
        let (used, data) = self.coding.take(rest)?;
        let len = self.body.len().saturating_add(data.len());
        if len > limit {
            return Err(too_large(limit));
        }
        if len > self.body.capacity() {
            let capacity = len.checked_next_power_of_two().unwrap_or(len).clamp(1024, limit.max(1024));
            if !self.share.grow(capacity.saturating_sub(self.body.capacity())) {
                return Err(overloaded());
            }
            self.body.reserve_exact(capacity.saturating_sub(self.body.len()));
        }
        self.body.extend_from_slice(data);
        Ok(used)
    }

    pub(super) fn is_done(&self) -> bool {
        self.coding.is_done()
    }
}

pub(super) fn too_large(limit: usize) -> ApiError {
    let message = match limit {
        0 => "this request takes no body; send it without one".into(),
        limit => format!("a request's body may have {limit} bytes at most"),
    };
    ApiError::new(ErrorCode::BodyTooLarge, message)
}

pub(super) fn overloaded() -> ApiError {
    let message =
        "more requests and answers are under way than this node has memory for; try again in a moment";
    ApiError::new(ErrorCode::Overloaded, message).with_header("Retry-After", "1")
}
