//! Connections from the peer's side: what is sent, what comes back, and when.

mod artifacts;
mod limits;
mod logs;
mod messages;
mod random;
mod requests;
mod workspace;

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::jobs::JobId;
use crate::testing::*;
use crate::time::Clock;
use crate::types::{Job, JobList};
use crate::{Api, ApiConfig, Limits};

/// A node's API and one connection to it.
struct Peer {
    api: Api,
    node: FakeNode,
    connection: Connection,
    now: Clock,
}

#[derive(Debug, PartialEq)]
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn code(&self) -> String {
        self.json()["code"].as_str().unwrap_or_default().to_string()
    }

    fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }
}

impl Peer {
    fn new() -> Self {
        Self::with(config())
    }

    fn with(config: ApiConfig) -> Self {
        let now = at(0);
        Self { api: Api::new(config), node: FakeNode::new(), connection: Connection::new(now), now }
    }

    /// Another connection to the same node.
    fn reconnect(&mut self) {
        self.connection = Connection::new(self.now);
    }

    fn advance(&mut self) {
        self.connection.advance(&mut self.api, &mut self.node, self.now);
    }

    /// Lets time pass.
    fn wait(&mut self, ms: u64) {
        self.now.monotonic_ns += ms * crate::time::MILLISECOND;
        self.advance();
    }

    /// Takes all there is to send.
    fn take(&mut self) -> Vec<u8> {
        let mut out = vec![];
        loop {
            self.advance();
            let bytes = self.connection.transmit().to_vec();
            if bytes.is_empty() {
                return out;
            }
            assert!(bytes.len() <= 17 * 1024, "an answer is made in parts");
            self.connection.transmitted(bytes.len(), self.now);
            out.extend(bytes);
        }
    }

    /// Sends bytes; what came back.
    fn send(&mut self, bytes: impl AsRef<[u8]>) -> Vec<u8> {
        self.send_in_pieces(bytes, usize::MAX)
    }

    fn send_in_pieces(&mut self, bytes: impl AsRef<[u8]>, size: usize) -> Vec<u8> {
        let (mut rest, mut out) = (bytes.as_ref(), vec![]);
        while !rest.is_empty() {
            let piece = rest.len().min(size).min(self.connection.receive_capacity());
            if piece == 0 {
                break;
            }
            let taken = self.connection.receive(&rest[..piece], self.now);
            assert_eq!(taken, piece, "it takes what it says it takes");
            rest = &rest[piece..];
            out.extend(self.take());
        }
        out
    }

    /// The peer sends its FIN.
    fn close(&mut self) -> Vec<u8> {
        self.connection.receive_closed();
        self.take()
    }

    /// One request, whole; its one answer.
    #[track_caller]
    fn ask(&mut self, method: &str, path: &str, headers: &str, body: &str) -> Answer {
        let length =
            if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
        let auth = format!("Authorization: Bearer {TOKEN}\r\n");
        let request = format!("{method} {path} HTTP/1.1\r\nHost: node\r\n{auth}{headers}{length}\r\n{body}");
        let bytes = self.send(request);
        let (answer, rest) = parse(&bytes, method == "HEAD");
        assert_eq!(rest, b"", "one answer to one request");
        answer
    }

    #[track_caller]
    fn get(&mut self, path: &str) -> Answer {
        self.ask("GET", path, "", "")
    }

    #[track_caller]
    fn post(&mut self, body: &Value) -> Answer {
        self.ask("POST", "/v1/jobs", "Content-Type: application/json\r\n", &body.to_string())
    }

    /// A job in progress whose first step has started.
    fn begin(&mut self) -> JobId {
        let job = begin(&mut self.api.jobs, 200, steps(vec![step("a")]), self.now);
        self.says(job, &started(0));
        job
    }

    fn says(&mut self, job: JobId, message: &crate::agent::AgentMessage) {
        say(&mut self.api.jobs, job, message, self.now);
    }

    /// Its last step ends and its machine goes.
    fn finish(&mut self, job: JobId) {
        self.says(job, &exited(0, 0));
        finish(&mut self.api.jobs, job, self.now);
    }
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: node\r\nAuthorization: Bearer {TOKEN}\r\n\r\n")
}

fn post_head(headers: &str) -> String {
    format!(
        "POST /v1/jobs HTTP/1.1\r\nHost: node\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n{headers}\r\n\r\n"
    )
}

/// The first answer among bytes, and the rest.
#[track_caller]
fn parse(bytes: &[u8], to_head: bool) -> (Answer, Vec<u8>) {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    let status = response.parse(bytes).unwrap();
    assert!(status.is_complete(), "{}", String::from_utf8_lossy(bytes));
    let len = status.unwrap();
    let headers = response.headers.iter();
    let headers =
        headers.map(|header| (header.name.to_lowercase(), String::from_utf8(header.value.to_vec()).unwrap()));
    let mut answer = Answer { status: response.code.unwrap(), headers: headers.collect(), body: vec![] };
    let rest = &bytes[len..];
    if to_head || answer.status == 204 {
        return (answer, rest.to_vec());
    }
    let used = if let Some(length) = answer.header("content-length") {
        let length: usize = length.parse().unwrap();
        answer.body = rest[..length].to_vec();
        length
    } else if answer.header("transfer-encoding").is_some() {
        let (body, used) = chunked::decode_all(rest, usize::MAX / 2).unwrap().expect("a last chunk");
        answer.body = body;
        used
    } else {
        answer.body = rest.to_vec();
        rest.len()
    };
    (answer, rest[used..].to_vec())
}

#[track_caller]
fn parse_all(mut bytes: Vec<u8>) -> Vec<Answer> {
    let mut answers = vec![];
    while !bytes.is_empty() {
        let (answer, rest) = parse(&bytes, false);
        answers.push(answer);
        bytes = rest;
    }
    answers
}
