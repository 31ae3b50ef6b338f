//! An answer: its status line and headers, and where its body comes from.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use serde::Serialize;

use crate::budget::Share;
use crate::error::ApiError;
use crate::jobs::{ArtifactReader, LogReader};
use crate::time::{Clock, http_date};

/// An answer that has yet to be sent.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Body,
}

/// Where an answer's body comes from.
#[derive(Debug)]
pub(crate) enum Body {
    /// There is none (204).
    None,
    /// Bytes of the program itself.
    Static(&'static [u8]),
    /// Bytes made for this answer, and their share of the memory for answers.
    Bytes(Vec<u8>, Option<Share>),
    /// A log, or as much of it as was promised.
    Log(LogReader, Option<u64>),
    /// What a machine sends of its files.
    Artifacts(ArtifactReader),
}

/// How a body's end is told (RFC 9112, 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// By its length.
    Length,
    /// By its last chunk.
    Chunked,
    /// By the connection's end: HTTP/1.0 has nothing else.
    UntilClose,
}

impl Response {
    pub(crate) fn new(status: u16, content_type: &'static str, body: Body) -> Self {
        Self { status, headers: Vec::from([("Content-Type", content_type.to_string())]), body }
    }

    pub(crate) fn empty(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Body::None }
    }

    pub(crate) fn json<T: Serialize>(status: u16, value: &T) -> Self {
        // Nothing here can fail to be JSON: no map has keys that are not strings.
        let mut bytes = serde_json::to_vec(value).unwrap_or_default();
        bytes.push(b'\n');
        Self::new(status, "application/json", Body::Bytes(bytes, None))
    }

    pub(crate) fn error(error: &ApiError) -> Self {
        let mut response = Self::json(error.code.status(), &error.body());
        response.headers.extend(error.headers.iter().cloned());
        response
    }

    pub(crate) fn with_header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(super) fn framing(&self, is_1_1: bool) -> Framing {
        match self.body {
            Body::Log(_, None) | Body::Artifacts(_) if is_1_1 => Framing::Chunked,
            Body::Log(_, None) | Body::Artifacts(_) => Framing::UntilClose,
            _ => Framing::Length,
        }
    }

    /// Appends the status line and all headers.
    pub(super) fn write_head(&self, out: &mut Vec<u8>, is_1_1: bool, keep_alive: bool, now: Clock) {
        let mut line = |text: &str| {
            out.extend_from_slice(text.as_bytes());
            out.extend_from_slice(b"\r\n");
        };
        line(&format!("HTTP/1.1 {} {}", self.status, reason(self.status)));
        line(&format!("Date: {}", http_date(now.unix_ns)));
        for (name, value) in &self.headers {
            line(&format!("{name}: {value}"));
        }
        match &self.body {
            Body::None => {}
            Body::Static(bytes) => line(&format!("Content-Length: {}", bytes.len())),
            Body::Bytes(bytes, _) => line(&format!("Content-Length: {}", bytes.len())),
            Body::Log(_, Some(len)) => line(&format!("Content-Length: {len}")),
            Body::Log(_, None) | Body::Artifacts(_) if is_1_1 => line("Transfer-Encoding: chunked"),
            Body::Log(_, None) | Body::Artifacts(_) => {}
        }
        // A log is whatever a job wrote; no browser shall take it for a page.
        line("X-Content-Type-Options: nosniff");
        line("Cache-Control: no-store");
        if !keep_alive {
            line("Connection: close");
        } else if !is_1_1 {
            line("Connection: keep-alive");
        }
        line("");
    }
}

/// The reason phrase of a status this API uses.
fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        202 => "Accepted",
        204 => "No Content",
        206 => "Partial Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        413 => "Content Too Large",
        415 => "Unsupported Media Type",
        416 => "Range Not Satisfiable",
        417 => "Expectation Failed",
        422 => "Unprocessable Content",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorCode;

    #[test]
    fn every_error_has_a_reason_phrase() {
        for code in ErrorCode::ALL {
            assert!(!reason(code.status()).is_empty(), "{code:?}");
        }
    }

    #[test]
    fn a_head_has_a_length_a_date_and_no_room_for_guessing() {
        let mut out = Vec::new();
        let response = Response::json(200, &1).with_header("Allow", "GET");
        response.write_head(&mut out, true, true, Clock::default());
        assert_eq!(
            core::str::from_utf8(&out).unwrap(),
            "HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\nContent-Type: application/json\r\n\
             Allow: GET\r\nContent-Length: 2\r\nX-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n\r\n"
        );
    }
}
