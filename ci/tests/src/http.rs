//! HTTP byte by byte, for requests that no client would send.

use nestling::bed::RunningBed;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

/// Longest wait for bytes, in QEMU. The node itself gives a slow client up sooner.
const LIMIT: Duration = Duration::from_secs(120);

/// One TCP connection to a node.
pub struct Connection {
    stream: TcpStream,
    received: Vec<u8>,
}

/// An answer as it came.
#[derive(Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// Header fields, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body, chunks put together.
    pub body: Vec<u8>,
}

impl Answer {
    /// The first header field of this name (in lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The stable code in an error's body; empty if there is none.
    pub fn code(&self) -> String {
        let body: serde_json::Value = serde_json::from_slice(&self.body).unwrap_or_default();
        body["code"].as_str().unwrap_or_default().to_owned()
    }
}

impl Connection {
    /// Connects to the node.
    ///
    /// # Panics
    /// When that fails.
    pub fn open(node: &RunningBed) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", node.port())).expect("connecting to the node");
        let limit = Some(node.patience(LIMIT));
        stream.set_read_timeout(limit).expect("a read timeout can be set");
        stream.set_write_timeout(limit).expect("a write timeout can be set");
        Self { stream, received: Vec::new() }
    }

    /// Sends bytes; false if the node has closed the connection.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.stream.write_all(bytes.as_ref()).is_ok()
    }

    /// Says that nothing more will be sent.
    pub fn finish(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// The next answer to a request that was not HEAD; none if the connection ends without one.
    ///
    /// # Panics
    /// When nothing arrives for two minutes (in QEMU), or what arrives is no answer.
    pub fn answer(&mut self) -> Option<Answer> {
        loop {
            if let Some((answer, length)) = parse(&self.received) {
                self.received.drain(..length);
                return Some(answer);
            }
            if !self.receive() {
                let rest = String::from_utf8_lossy(&self.received);
                assert!(self.received.is_empty(), "the connection ended inside an answer: {rest}");
                return None;
            }
        }
    }

    /// Everything until the node closes the connection.
    ///
    /// # Panics
    /// When nothing arrives for two minutes (in QEMU).
    pub fn rest(&mut self) -> Vec<u8> {
        while self.receive() {}
        std::mem::take(&mut self.received)
    }

    /// Reads some bytes; false at the end, however it came.
    fn receive(&mut self) -> bool {
        let mut buffer = [0; 16 << 10];
        match self.stream.read(&mut buffer) {
            Ok(0) => false,
            Ok(length) => {
                self.received.extend_from_slice(&buffer[..length]);
                true
            }
            Err(error)
                if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) =>
            {
                panic!("the node was silent for {:?}", self.stream.read_timeout())
            }
            Err(_) => false,
        }
    }
}

/// Sends one request on a connection of its own and returns the answer.
///
/// # Panics
/// When there is none.
pub fn exchange(node: &RunningBed, request: impl AsRef<[u8]>) -> Answer {
    let mut connection = Connection::open(node);
    connection.send(request);
    connection.answer().expect("the node answers")
}

/// A request with the node's token and a body (none if empty).
pub fn request(node: &RunningBed, method: &str, path: &str, body: &str) -> String {
    let token = node.token().map_or_else(String::new, |token| format!("Authorization: Bearer {token}\r\n"));
    let length = if body.is_empty() {
        String::new()
    } else {
        format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len())
    };
    format!("{method} {path} HTTP/1.1\r\nHost: node\r\n{token}{length}\r\n{body}")
}

/// One whole answer at the start of `bytes`, and its length; none while it is incomplete.
fn parse(bytes: &[u8]) -> Option<(Answer, usize)> {
    let mut fields = [httparse::EMPTY_HEADER; 64];
    let mut head = httparse::Response::new(&mut fields);
    let httparse::Status::Complete(start) = head.parse(bytes).expect("an answer begins with a head") else {
        return None;
    };
    let status = head.code.expect("a complete head has a status");
    let headers: Vec<(String, String)> = head
        .headers
        .iter()
        .map(|field| (field.name.to_lowercase(), String::from_utf8_lossy(field.value).into_owned()))
        .collect();
    let mut answer = Answer { status, headers, body: Vec::new() };
    let rest = &bytes[start..];
    if answer.header("transfer-encoding") == Some("chunked") {
        let (body, length) = chunks(rest)?;
        answer.body = body;
        return Some((answer, start + length));
    }
    let length =
        answer.header("content-length").map_or(0, |length| length.parse().expect("a length is a number"));
    answer.body = rest.get(..length)?.to_vec();
    Some((answer, start + length))
}

/// A chunked body at the start of `bytes`, and its encoded length.
fn chunks(bytes: &[u8]) -> Option<(Vec<u8>, usize)> {
    let (mut body, mut at) = (Vec::new(), 0);
    loop {
        let rest = &bytes[at..];
        let httparse::Status::Complete((head, size)) =
            httparse::parse_chunk_size(rest).expect("a chunk has a size")
        else {
            return None;
        };
        let size = usize::try_from(size).expect("a chunk's size fits");
        body.extend_from_slice(rest.get(head..head + size)?);
        at += head + size + 2;
        if at > bytes.len() {
            return None;
        }
        if size == 0 {
            return Some((body, at));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_parsed_once_it_is_whole() {
        let bytes = b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nabcHTTP";
        for length in 0..bytes.len() - 4 {
            assert!(parse(&bytes[..length]).is_none());
        }
        let (answer, length) = parse(bytes).unwrap();
        assert_eq!((answer.status, answer.text().as_str(), length), (404, "abc", bytes.len() - 4));
    }

    #[test]
    fn chunks_are_put_together() {
        let bytes = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n";
        for length in 0..bytes.len() {
            assert!(parse(&bytes[..length]).is_none());
        }
        let (answer, length) = parse(bytes).unwrap();
        assert_eq!((answer.text().as_str(), length), ("abc", bytes.len()));
    }
}
