//! A request's head: request line and headers (RFC 9112, 2 to 6), and what they say about the body.
//!
//! Whatever could make this node and a proxy before it disagree on where a request ends is refused: two lengths, a length
//! and a transfer coding, folded lines, spaces before a colon.

use alloc::format;
use alloc::string::{String, ToString};

use crate::error::{ApiError, ErrorCode};

/// Most headers of a request.
const MAX_HEADERS: usize = 64;

/// A request's method, as far as this API tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    Get,
    Head,
    Post,
    Put,
    Delete,
    Other,
}

/// How long a request's body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BodyLength {
    /// So many bytes, most often none.
    Known(u64),
    /// In chunks until the last.
    Chunked,
}

impl BodyLength {
    /// The length, if the head says it.
    pub(super) fn known(self) -> Option<u64> {
        match self {
            Self::Known(length) => Some(length),
            Self::Chunked => None,
        }
    }
}

/// What a head says, as far as this API wants to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) method: Method,
    /// The target's path, still percent-encoded.
    pub(crate) path: String,
    /// The target's query, still percent-encoded.
    pub(crate) query: String,
    /// HTTP/1.1, not 1.0.
    pub(super) is_1_1: bool,
    /// Whether the peer wants to send another request after this one.
    pub(super) keep_alive: bool,
    pub(super) body: BodyLength,
    /// Whether the peer waits for `100 Continue` before it sends the body.
    pub(super) expects_continue: bool,
    pub(crate) authorization: Option<String>,
    pub(crate) content_type: Option<String>,
    pub(crate) content_encoding: Option<String>,
    pub(crate) idempotency_key: Option<String>,
    pub(crate) accept: Option<String>,
    pub(crate) range: Option<String>,
}

fn malformed(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::MalformedRequest, message)
}

/// Parses a head at the start of `bytes`: the head and its length, or `None` until more bytes come.
pub(super) fn parse(bytes: &[u8]) -> Result<Option<(Head, usize)>, ApiError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let len = match request.parse(bytes) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            let message = format!("the request has more than {MAX_HEADERS} headers");
            return Err(ApiError::new(ErrorCode::HeadTooLarge, message));
        }
        Err(httparse::Error::Version) => {
            let message = "this node speaks HTTP/1.1 and HTTP/1.0";
            return Err(ApiError::new(ErrorCode::HttpVersionNotSupported, message));
        }
        Err(error) => return Err(malformed(format!("the request is not HTTP/1.1: {error}"))),
    };
    let target = request.path.unwrap_or_default();
    let (path, query) = split_target(target);
    let is_1_1 = request.version == Some(1);
    let mut head = Head {
        method: match request.method.unwrap_or_default() {
            "GET" => Method::Get,
            "HEAD" => Method::Head,
            "POST" => Method::Post,
            "PUT" => Method::Put,
            "DELETE" => Method::Delete,
            _ => Method::Other,
        },
        path: path.to_string(),
        query: query.to_string(),
        is_1_1,
        keep_alive: is_1_1,
        body: BodyLength::Known(0),
        expects_continue: false,
        authorization: None,
        content_type: None,
        content_encoding: None,
        idempotency_key: None,
        accept: None,
        range: None,
    };
    read_headers(&mut head, request.headers)?;
    Ok(Some((head, len)))
}

/// Path and query of a request's target, which may be a whole URL (RFC 9112, 3.2).
fn split_target(target: &str) -> (&str, &str) {
    let path = match target.split_once("://") {
        Some((scheme, rest)) if scheme.bytes().all(|b| b.is_ascii_alphanumeric()) => {
            rest.find(['/', '?']).and_then(|start| rest.get(start..)).unwrap_or("/")
        }
        _ => target,
    };
    let path = path.split('#').next().unwrap_or_default();
    path.split_once('?').unwrap_or((path, ""))
}

fn read_headers(head: &mut Head, headers: &[httparse::Header<'_>]) -> Result<(), ApiError> {
    let (mut host, mut length, mut coding) = (None, None, None);
    for header in headers {
        let name = header.name;
        let value = || {
            let text = core::str::from_utf8(header.value).map(|value| value.trim_matches([' ', '\t']));
            text.map_err(|_| malformed(format!("the {name} header is not text")))
        };
        if name.eq_ignore_ascii_case("host") {
            once(name, &mut host, value()?)?;
        } else if name.eq_ignore_ascii_case("content-length") {
            once(name, &mut length, value()?)?;
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            once(name, &mut coding, value()?)?;
        } else if name.eq_ignore_ascii_case("connection") {
            for token in value()?.split(',').map(str::trim) {
                if token.eq_ignore_ascii_case("close") {
                    head.keep_alive = false;
                } else if token.eq_ignore_ascii_case("keep-alive") && !head.is_1_1 {
                    head.keep_alive = true;
                }
            }
        } else if name.eq_ignore_ascii_case("expect") {
            if !value()?.eq_ignore_ascii_case("100-continue") {
                let message = "the only expectation this node meets is 100-continue";
                return Err(ApiError::new(ErrorCode::ExpectationFailed, message));
            }
            head.expects_continue = head.is_1_1;
        } else if name.eq_ignore_ascii_case("authorization") {
            once(name, &mut head.authorization, value()?.to_string())?;
        } else if name.eq_ignore_ascii_case("content-type") {
            once(name, &mut head.content_type, value()?.to_string())?;
        } else if name.eq_ignore_ascii_case("content-encoding") {
            once(name, &mut head.content_encoding, value()?.to_string())?;
        } else if name.eq_ignore_ascii_case("idempotency-key") {
            once(name, &mut head.idempotency_key, value()?.to_string())?;
        } else if name.eq_ignore_ascii_case("range") {
            once(name, &mut head.range, value()?.to_string())?;
        } else if name.eq_ignore_ascii_case("accept") {
            let accept = head.accept.get_or_insert_default();
            accept.push_str(value()?);
            accept.push(',');
        }
    }
    if head.is_1_1 && host.is_none() {
        return Err(malformed("an HTTP/1.1 request needs a Host header"));
    }
    head.body = body_length(length, coding, head.is_1_1)?;
    Ok(())
}

fn once<T>(name: &str, slot: &mut Option<T>, value: T) -> Result<(), ApiError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(malformed(format!("there is more than one {name} header"))),
    }
}

/// RFC 9112, 6.3, with every doubtful case refused.
fn body_length(length: Option<&str>, coding: Option<&str>, is_1_1: bool) -> Result<BodyLength, ApiError> {
    match (length, coding) {
        (None, None) => Ok(BodyLength::Known(0)),
        (Some(_), Some(_)) => {
            Err(malformed("there are both a Content-Length and a Transfer-Encoding header; send one of them"))
        }
        (None, Some(_)) if !is_1_1 => Err(malformed("HTTP/1.0 has no Transfer-Encoding")),
        (None, Some(coding)) if coding.eq_ignore_ascii_case("chunked") => Ok(BodyLength::Chunked),
        (None, Some(_)) => {
            let message = "the only transfer coding this node knows is chunked";
            Err(ApiError::new(ErrorCode::NotImplemented, message))
        }
        (Some(length), None) => {
            let digits = !length.is_empty() && length.bytes().all(|b| b.is_ascii_digit());
            let length = length.parse().ok().filter(|_| digits);
            let message = "Content-Length is not a number of bytes in decimal digits";
            length.map(BodyLength::Known).ok_or_else(|| malformed(message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Head {
        let (head, len) = parse(text.as_bytes()).unwrap().unwrap();
        assert_eq!(len, text.len());
        head
    }

    #[track_caller]
    fn refused(text: &str, code: ErrorCode) {
        assert_eq!(parse(text.as_bytes()).unwrap_err().code, code, "{text}");
    }

    #[test]
    fn a_request_is_read_with_its_headers() {
        let head = head(
            "POST /v1/jobs?a=b HTTP/1.1\r\nhOsT: x\r\nAuthorization: Bearer t \r\nContent-Length: 12\r\n\
             Idempotency-Key: k\r\nExpect: 100-Continue\r\nAccept: a/b\r\nAccept: c/d\r\nRange: bytes=1-\r\n\r\n",
        );
        assert_eq!((head.method, head.path.as_str(), head.query.as_str()), (Method::Post, "/v1/jobs", "a=b"));
        assert_eq!(head.body, BodyLength::Known(12));
        assert!(head.keep_alive && head.expects_continue);
        assert_eq!(head.authorization.as_deref(), Some("Bearer t"));
        assert_eq!(head.idempotency_key.as_deref(), Some("k"));
        assert_eq!(head.accept.as_deref(), Some("a/b,c/d,"));
        assert_eq!(head.range.as_deref(), Some("bytes=1-"));
    }

    #[test]
    fn a_head_is_awaited_until_its_empty_line() {
        let text = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
        for len in 0..text.len() {
            assert_eq!(parse(&text.as_bytes()[..len]), Ok(None));
        }
    }

    #[test]
    fn a_target_may_be_a_whole_url() {
        assert_eq!(split_target("/a?b#c"), ("/a", "b"));
        assert_eq!(split_target("http://h:1/a?b=c"), ("/a", "b=c"));
        assert_eq!(split_target("http://h"), ("/", ""));
        assert_eq!(split_target("http://h?x=1"), ("", "x=1"));
        assert_eq!(split_target("/a?u=http://h/"), ("/a", "u=http://h/"));
    }

    #[test]
    fn connections_are_kept_by_the_rules_of_each_version() {
        assert!(head("GET / HTTP/1.1\r\nHost: x\r\n\r\n").keep_alive);
        assert!(!head("GET / HTTP/1.1\r\nHost: x\r\nConnection: foo, Close\r\n\r\n").keep_alive);
        assert!(!head("GET / HTTP/1.0\r\n\r\n").keep_alive);
        assert!(head("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").keep_alive);
    }

    #[test]
    fn whatever_could_smuggle_a_request_is_refused() {
        for headers in [
            "Content-Length: 1\r\nTransfer-Encoding: chunked",
            "Content-Length: 1\r\nContent-Length: 1",
            "Content-Length: 1\r\ncontent-length: 2",
            "Content-Length: 1, 1",
            "Content-Length: +1",
            "Content-Length: -1",
            "Content-Length: 0x1",
            "Content-Length: ",
            "Content-Length: 99999999999999999999999",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            "Content-Length : 1",
            "X: a\r\n folded",
            "X: a\r\n\tfolded",
            "X: a\0b",
            "Host: y",
            "X y: z",
            ": z",
        ] {
            refused(&format!("POST / HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n"), ErrorCode::MalformedRequest);
        }
        refused("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", ErrorCode::MalformedRequest);
    }

    #[test]
    fn other_refusals_have_their_own_codes() {
        refused("GET / HTTP/1.1\r\n\r\n", ErrorCode::MalformedRequest);
        refused("GET / HTTP/2.0\r\n\r\n", ErrorCode::HttpVersionNotSupported);
        refused("PRI * HTTP/2.0\r\n\r\n", ErrorCode::HttpVersionNotSupported);
        refused("\x16\x03\x01\x02\x00\x01", ErrorCode::MalformedRequest);
        refused(
            "GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            ErrorCode::NotImplemented,
        );
        refused("GET / HTTP/1.1\r\nHost: x\r\nExpect: tea\r\n\r\n", ErrorCode::ExpectationFailed);
        let many = "X: y\r\n".repeat(65);
        refused(&format!("GET / HTTP/1.1\r\n{many}\r\n"), ErrorCode::HeadTooLarge);
    }
}
