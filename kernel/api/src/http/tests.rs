//! Connections from the peer's side: what is sent, what comes back, and when.

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

#[test]
fn what_is_public_needs_no_token() {
    let mut peer = Peer::new();
    for (path, content) in
        [("/healthz", "ok\n"), ("/readyz", "ok\n"), ("/version", "1.2.3"), ("/openapi.json", "\"openapi\"")]
    {
        let (answer, _) = parse(&peer.send(format!("GET {path} HTTP/1.1\r\nHost: n\r\n\r\n")), false);
        assert_eq!(answer.status, 200, "{path}");
        assert!(answer.text().contains(content), "{path}");
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
    }
    peer.node.ready = false;
    let answer = peer.get("/readyz");
    assert_eq!((answer.status, answer.code().as_str()), (503, "not_ready"));
    assert_eq!(peer.get("/healthz").status, 200);
}

#[test]
fn everything_else_needs_the_right_token() {
    let mut peer = Peer::new();
    for (authorization, code) in [
        ("", "missing_token"),
        ("Authorization: Basic abc\r\n", "missing_token"),
        ("Authorization: Bearer\r\n", "missing_token"),
        ("Authorization: Bearer x\r\n", "wrong_token"),
        ("Authorization: Bearer 0123456789abcdeF\r\n", "wrong_token"),
        ("Authorization: Bearer 0123456789abcdef0\r\n", "wrong_token"),
    ] {
        for path in ["/v1/host", "/v1/jobs", "/nothing", "/v1/jobs/x"] {
            let bytes = peer.send(format!("GET {path} HTTP/1.1\r\nHost: n\r\n{authorization}\r\n"));
            let (answer, _) = parse(&bytes, false);
            assert_eq!((answer.status, answer.code().as_str()), (401, code), "{path} {authorization}");
            assert!(answer.header("www-authenticate").unwrap().starts_with("Bearer realm="));
        }
    }
    let request = format!("GET /v1/host HTTP/1.1\r\nHost: n\r\nAuthorization: bearer  {TOKEN}\r\n\r\n");
    assert_eq!(parse(&peer.send(request), false).0.status, 200, "the scheme has no case");
}

#[test]
fn without_a_token_configured_everybody_is_let_in() {
    let mut peer = Peer::with(ApiConfig::default());
    let (answer, _) = parse(&peer.send("GET /v1/host HTTP/1.1\r\nHost: n\r\n\r\n"), false);
    assert_eq!(answer.status, 200);
}

#[test]
fn host_and_images_are_the_nodes() {
    let mut peer = Peer::new();
    assert_eq!(peer.get("/v1/host").json()["vendor"], "amd");
    let images = peer.get("/v1/images").json();
    assert_eq!((images["total_count"].as_u64(), &images["images"][0]["name"]), (Some(1), &json!("minimal")));
}

#[test]
fn paths_and_methods_that_are_not_there_are_told() {
    let mut peer = Peer::new();
    let answer = peer.get("/v2/jobs");
    assert_eq!((answer.status, answer.code().as_str()), (404, "not_found"));
    for (method, path, allow) in [
        ("POST", "/healthz", "GET, HEAD"),
        ("PUT", "/v1/jobs", "GET, HEAD, POST"),
        ("PATCH", "/v1/jobs/0123456789abcdef0123456789abcdef", "GET, HEAD, DELETE"),
        ("GET", "/v1/jobs/0123456789abcdef0123456789abcdef/cancel", "POST"),
        ("OPTIONS", "/v1/host", "GET, HEAD"),
    ] {
        let answer = peer.ask(method, path, "", "");
        assert_eq!((answer.status, answer.code().as_str()), (405, "method_not_allowed"), "{method} {path}");
        assert_eq!(answer.header("allow"), Some(allow));
    }
    for path in ["/v1/jobs/x", "/v1/jobs/0123456789abcdef0123456789abcdef"] {
        let answer = peer.get(path);
        assert_eq!((answer.status, answer.code().as_str()), (404, "job_not_found"));
    }
}

#[test]
fn a_job_goes_through_the_api_from_its_request_to_its_deletion() {
    let mut peer = Peer::new();
    let answer = peer.post(&json!({"name": "test", "steps": [{"run": "make"}]}));
    assert_eq!(answer.status, 202);
    let path = answer.header("location").unwrap().to_string();
    let job: Job = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(path, format!("/v1/jobs/{}", job.id));
    assert_eq!(job.queue_position, Some(0));

    let id = peer.api.jobs.next_queued().unwrap().id;
    peer.api.jobs.start(id, peer.now);
    assert_eq!(peer.get(&path).json()["status"], "in_progress");
    let answer = peer.ask("DELETE", &path, "", "");
    assert_eq!((answer.status, answer.code().as_str()), (409, "job_not_completed"));
    let answer = peer.ask("POST", &format!("{path}/cancel"), "", "");
    assert_eq!((answer.status, answer.json()["status"].as_str()), (202, Some("in_progress")));
    finish(&mut peer.api.jobs, id, peer.now);
    assert_eq!(peer.get(&path).json()["conclusion"], "cancelled");
    let answer = peer.ask("POST", &format!("{path}/cancel"), "", "");
    assert_eq!((answer.status, answer.code().as_str()), (409, "job_completed"));
    let answer = peer.ask("DELETE", &path, "", "");
    assert_eq!((answer.status, answer.body.len(), answer.header("content-length")), (204, 0, None));
    assert_eq!(peer.get(&path).code(), "job_not_found");
}

#[test]
fn jobs_are_listed_in_pages() {
    let mut peer = Peer::new();
    for number in 0..35 {
        assert_eq!(peer.post(&json!({"name": number.to_string(), "steps": [{"run": "a"}]})).status, 202);
    }
    let list = |peer: &mut Peer, query: &str| {
        let answer = peer.get(&format!("/v1/jobs{query}"));
        let link = answer.header("link").map(ToString::to_string);
        let list: JobList = serde_json::from_slice(&answer.body).unwrap();
        (list.total_count, list.jobs.iter().map(|job| job.name.clone()).collect::<Vec<_>>(), link)
    };
    let (total, names, link) = list(&mut peer, "");
    assert_eq!((total, names.len(), names[0].as_str()), (35, 30, "34"));
    assert_eq!(link.as_deref(), Some("</v1/jobs?page=2&per_page=30>; rel=\"next\""));
    let (total, names, link) = list(&mut peer, "?page=4&per_page=10&status=queued");
    assert_eq!((total, names), (35, vec!["4".into(), "3".into(), "2".into(), "1".into(), "0".into()]));
    assert_eq!(link.as_deref(), Some("</v1/jobs?page=3&per_page=10&status=queued>; rel=\"prev\""));
    assert_eq!(list(&mut peer, "?status=completed").0, 0);
    assert_eq!(list(&mut peer, "?page=4294967295&per_page=100").1.len(), 0);
    for query in ["?per_page=0", "?per_page=101", "?page=0", "?status=done", "?sort=asc", "?page=%zz"] {
        let answer = peer.get(&format!("/v1/jobs{query}"));
        assert_eq!((answer.status, answer.code().as_str()), (400, "invalid_query"), "{query}");
    }
}

#[test]
fn wrong_requests_are_told_what_is_wrong() {
    let mut peer = Peer::new();
    let answer = peer.ask("POST", "/v1/jobs", "Content-Type: application/json\r\n", "{\n\"steps\": x}");
    assert_eq!((answer.status, answer.code().as_str()), (400, "invalid_json"));
    assert!(answer.text().contains("line 2 column 10"), "{}", answer.text());
    let answer = peer.post(&json!({"steps": [{"run": "a"}], "step": 1}));
    assert_eq!((answer.status, answer.code().as_str()), (422, "validation_failed"));
    assert_eq!(answer.json()["errors"][0]["field"], "step");
    let answer = peer.post(&json!({"steps": [{"run": "a"}], "machine_config": {"mem_size_mib": 2048}}));
    assert_eq!(answer.json()["errors"][0]["field"], "machine_config.mem_size_mib");
    assert_eq!(peer.api.jobs.count(None), 0);
}

#[test]
fn a_job_has_to_say_that_it_is_json() {
    let mut peer = Peer::new();
    let body = json!({"steps": [{"run": "a"}]}).to_string();
    for header in ["", "Content-Type: text/plain\r\n", "Content-Type: application/x-www-form-urlencoded\r\n"]
    {
        let answer = peer.ask("POST", "/v1/jobs", header, &body);
        assert_eq!((answer.status, answer.code().as_str()), (415, "unsupported_media_type"));
        assert_eq!(answer.header("connection"), Some("close"), "its body was not read");
        peer.reconnect();
    }
    let header = "Content-Type: Application/JSON; charset=utf-8\r\n";
    assert_eq!(peer.ask("POST", "/v1/jobs", header, &body).status, 202);
}

#[test]
fn an_idempotency_key_makes_one_job() {
    let mut peer = Peer::new();
    let mut post = |key: &str, body: &str| {
        let headers = format!("Content-Type: application/json\r\nIdempotency-Key: {key}\r\n");
        peer.ask("POST", "/v1/jobs", &headers, body)
    };
    let first = post("k", r#"{"steps": [{"run": "a"}]}"#);
    let second = post("k", r#"{ "steps":[{"run":"a"}] }"#);
    assert_eq!((first.status, second.status), (202, 202));
    assert_eq!(first.header("location"), second.header("location"));
    assert_eq!(second.header("idempotency-replayed"), Some("true"));
    let other = post("k", r#"{"steps": [{"run": "b"}]}"#);
    assert_eq!((other.status, other.code().as_str()), (422, "idempotency_key_reused"));
    assert_ne!(post("l", r#"{"steps": [{"run": "a"}]}"#).header("location"), first.header("location"));
    for key in ["", "ä", &"k".repeat(256)] {
        assert_eq!(post(key, r#"{"steps": [{"run": "a"}]}"#).json()["errors"][0]["field"], "Idempotency-Key");
    }
    assert_eq!(peer.api.jobs.count(None), 2);
}

#[test]
fn head_gets_the_head_that_get_would_get() {
    let mut peer = Peer::new();
    let job = peer.begin();
    for path in
        ["/healthz", "/v1/host", "/v1/nothing", &format!("/v1/jobs/{job}"), &format!("/v1/jobs/{job}/logs")]
    {
        let (get, head) = (peer.get(path), peer.ask("HEAD", path, "", ""));
        assert_eq!((get.status, &get.headers), (head.status, &head.headers), "{path}");
    }
}

#[test]
fn a_connection_is_kept_until_somebody_wants_it_closed() {
    let mut peer = Peer::new();
    for _ in 0..3 {
        assert_eq!(peer.get("/healthz").header("connection"), None);
        assert!(!peer.connection.wants_close());
    }
    assert_eq!(peer.ask("GET", "/healthz", "Connection: close\r\n", "").header("connection"), Some("close"));
    assert!(peer.connection.wants_close());
    assert_eq!(peer.connection.receive_capacity(), 0);
}

#[test]
fn http_1_0_is_answered_its_way() {
    let mut peer = Peer::new();
    let (answer, _) = parse(&peer.send("GET /healthz HTTP/1.0\r\n\r\n"), false);
    assert_eq!((answer.status, answer.header("connection")), (200, Some("close")));
    assert!(peer.connection.wants_close());

    peer.reconnect();
    let (answer, _) = parse(&peer.send("GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"), false);
    assert_eq!(answer.header("connection"), Some("keep-alive"));
    let job = peer.begin();
    peer.says(job, &stdout("text"));
    let auth = format!("Authorization: Bearer {TOKEN}");
    let request = format!("GET /v1/jobs/{job}/logs HTTP/1.0\r\n{auth}\r\nConnection: keep-alive\r\n\r\n");
    let (answer, _) = parse(&peer.send(request), false);
    assert_eq!((answer.text().as_str(), answer.header("transfer-encoding")), ("text", None));
    assert_eq!(answer.header("connection"), Some("close"), "its end is the connection's");
    assert!(peer.connection.wants_close());
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let mut peer = Peer::new();
    let body = r#"{"steps": [{"run": "a"}]}"#;
    let post = format!("{}{body}", post_head(&format!("Content-Length: {}", body.len())));
    let requests = [get("/healthz"), post, get("/v1/nothing"), get("/v1/jobs")].concat();
    let answers = parse_all(peer.send(requests));
    let statuses: Vec<_> = answers.iter().map(|answer| answer.status).collect();
    assert_eq!(statuses, [200, 202, 404, 200]);
    assert_eq!(answers[3].json()["total_count"], 1);
}

#[test]
fn a_peer_that_does_not_read_is_not_read_from() {
    let mut peer = Peer::new();
    let request = get("/healthz");
    let mut sent = 0;
    // Nothing that is to be sent is taken.
    while sent < 1000 {
        if peer.connection.receive(request.as_bytes(), peer.now) < request.len() {
            break;
        }
        peer.advance();
        sent += 1;
    }
    assert!(sent < 120, "{sent}");
    assert!(peer.connection.transmit().len() < 1000, "one answer at a time");
}

#[test]
fn expect_100_continue_is_met_or_refused_at_once() {
    let body = r#"{"steps": [{"run": "a"}]}"#;
    let mut peer = Peer::new();
    let head = post_head(&format!("Expect: 100-continue\r\nContent-Length: {}", body.len()));
    assert_eq!(peer.send(&head), b"HTTP/1.1 100 Continue\r\n\r\n");
    assert_eq!(parse(&peer.send(body), false).0.status, 202);
    let answer = peer.send(format!("{head}{body}"));
    assert_eq!(parse(&answer, false).0.status, 202, "nothing to ask for when the body is there");

    let head = post_head("Expect: 100-continue\r\nContent-Length: 2000000");
    let (answer, _) = parse(&peer.send(head), false);
    assert_eq!((answer.status, answer.code().as_str()), (413, "body_too_large"));
}

#[test]
fn bodies_come_in_chunks_too() {
    let mut peer = Peer::new();
    let mut request = post_head("Transfer-Encoding: chunked");
    for byte in r#"{"steps": [{"run": "a"}]}"#.chars() {
        request.push_str(&format!("1\r\n{byte}\r\n"));
    }
    request.push_str("0\r\n\r\n");
    let answers = parse_all(peer.send(request + &get("/healthz")));
    assert_eq!(answers.iter().map(|answer| answer.status).collect::<Vec<_>>(), [202, 200]);
    let (answer, _) = parse(&peer.send(post_head("Transfer-Encoding: chunked") + "x\r\n"), false);
    assert_eq!((answer.status, answer.code().as_str()), (400, "malformed_request"));
}

#[test]
fn a_body_that_is_too_large_is_refused_and_the_peer_has_time_to_read_why() {
    let mut peer = Peer::new();
    let (answer, _) = parse(&peer.send(post_head("Content-Length: 1048577")), false);
    assert_eq!((answer.status, answer.code().as_str()), (413, "body_too_large"));
    assert_eq!(answer.header("connection"), Some("close"));
    // A peer that sends all of it before it reads does not run into a reset.
    let mut left = 1_048_577;
    while left > 0 {
        assert!(!peer.connection.wants_close());
        left -= peer.connection.receive(&vec![0; left.min(5000)], peer.now);
        peer.advance();
    }
    assert!(peer.connection.wants_close());

    peer.reconnect();
    let mut request = post_head("Transfer-Encoding: chunked").into_bytes();
    for _ in 0..17 {
        request.extend(b"10000\r\n");
        request.extend([b' '; 65_536]);
        request.extend(b"\r\n");
    }
    let (answer, _) = parse(&peer.send(request), false);
    assert_eq!(answer.status, 413);
    assert!(!peer.connection.wants_close());
    assert!(peer.connection.deadline().unwrap() <= peer.now.monotonic_ns + 500_000_000);
    peer.wait(500);
    assert!(peer.connection.wants_close());
    assert_eq!(peer.api.bodies.free(), Limits::default().bodies_total_bytes);
}

#[test]
fn bodies_of_all_connections_together_are_bounded() {
    let limits = Limits { bodies_total_bytes: 100_000, ..Limits::default() };
    let mut peer = Peer::with(ApiConfig { limits, ..config() });
    assert!(peer.send(post_head("Content-Length: 70000") + &" ".repeat(60_000)).is_empty());
    let first = core::mem::replace(&mut peer.connection, Connection::new(peer.now));
    let bytes = peer.send(post_head("Content-Length: 70000") + &" ".repeat(60_000));
    let (answer, _) = parse(&bytes, false);
    assert_eq!((answer.status, answer.code().as_str()), (503, "overloaded"));
    assert_eq!(answer.header("retry-after"), Some("1"));
    drop(first);
    peer.reconnect();
    assert!(peer.send(post_head("Content-Length: 70000") + &" ".repeat(60_000)).is_empty());
}

#[test]
fn answers_of_all_connections_together_are_bounded() {
    let limits = Limits { answers_total_bytes: 40_000, ..Limits::default() };
    let mut peer = Peer::with(ApiConfig { limits, ..config() });
    for _ in 0..60 {
        assert_eq!(peer.post(&json!({"steps": [{"run": "a"}]})).status, 202);
    }
    assert_eq!(peer.get("/v1/jobs?per_page=40").status, 200);
    let request = get("/v1/jobs?per_page=40");
    peer.connection.receive(request.as_bytes(), peer.now);
    peer.advance();
    let first = core::mem::replace(&mut peer.connection, Connection::new(peer.now));
    assert_eq!(peer.get("/v1/jobs?per_page=40").code(), "overloaded");
    assert_eq!(peer.get("/v1/jobs?per_page=1").status, 200);
    drop(first);
    assert_eq!(peer.get("/v1/jobs?per_page=40").status, 200);
}

#[test]
fn a_head_that_is_too_long_is_refused() {
    let mut peer = Peer::new();
    let bytes = peer.send(format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(20_000)));
    let (answer, _) = parse(&bytes, false);
    assert_eq!((answer.status, answer.code().as_str()), (431, "head_too_large"));
    peer.wait(500);
    assert!(peer.connection.wants_close());
}

#[test]
fn rubbish_is_refused_and_what_follows_is_not_read() {
    let mut peer = Peer::new();
    let bytes = peer.send(format!("\u{1}\u{2}\r\n\r\n{}", get("/healthz")));
    let (answer, rest) = parse(&bytes, false);
    assert_eq!((answer.status, answer.code().as_str()), (400, "malformed_request"));
    assert_eq!(rest, b"");
    let (answer, _) = parse(
        &{
            peer.reconnect();
            peer.send("GET / HTTP/3.0\r\n\r\n")
        },
        false,
    );
    assert_eq!((answer.status, answer.code().as_str()), (505, "http_version_not_supported"));
}

#[test]
fn a_slow_head_is_given_30_s() {
    let mut peer = Peer::new();
    peer.wait(50_000);
    assert!(peer.send("GET /healthz HTTP/1.1\r\nHo").is_empty());
    assert_eq!(peer.connection.deadline(), Some(peer.now.monotonic_ns + 30_000_000_000));
    peer.wait(29_999);
    assert!(peer.send("s").is_empty(), "a byte now and then does not help");
    peer.wait(1);
    let (answer, _) = parse(&peer.take(), false);
    assert_eq!((answer.status, answer.code().as_str()), (408, "request_timeout"));
    peer.wait(500);
    assert!(peer.connection.wants_close());
}

#[test]
fn a_slow_body_is_given_30_s() {
    let mut peer = Peer::new();
    assert!(peer.send(post_head("Content-Length: 10") + "{").is_empty());
    peer.wait(29_999);
    assert!(peer.take().is_empty());
    peer.wait(1);
    let (answer, _) = parse(&peer.take(), false);
    assert_eq!(answer.status, 408);
}

#[test]
fn an_idle_connection_is_closed_after_60_s_without_a_word() {
    let mut peer = Peer::new();
    peer.wait(59_999);
    assert!(!peer.connection.wants_close());
    peer.get("/healthz");
    peer.wait(59_999);
    assert!(!peer.connection.wants_close());
    peer.wait(1);
    assert!(peer.connection.wants_close() && peer.connection.transmit().is_empty());
}

#[test]
fn a_peer_that_takes_nothing_for_60_s_is_cut_off() {
    let mut peer = Peer::new();
    peer.connection.receive(get("/openapi.json").as_bytes(), peer.now);
    peer.wait(0);
    assert!(!peer.connection.transmit().is_empty());
    peer.wait(59_000);
    peer.connection.transmitted(1, peer.now);
    peer.wait(59_999);
    assert!(!peer.connection.wants_abort());
    assert_eq!(peer.connection.deadline(), Some(peer.now.monotonic_ns + 1_000_000));
    peer.wait(1);
    assert!(peer.connection.wants_abort() && peer.connection.transmit().is_empty());
}

#[test]
fn a_peer_that_has_sent_all_it_will_still_gets_its_answers() {
    let mut peer = Peer::new();
    peer.connection.receive([get("/healthz"), get("/version")].concat().as_bytes(), peer.now);
    let answers = parse_all(peer.close());
    assert_eq!(answers.iter().map(|answer| answer.status).collect::<Vec<_>>(), [200, 200]);
    assert!(peer.connection.wants_close());
}

#[test]
fn a_peer_that_leaves_in_the_middle_is_told_so() {
    for (part, silent) in [
        (String::new(), true),
        ("GET / HT".to_string(), false),
        (post_head("Content-Length: 10") + "{", false),
        (post_head("Transfer-Encoding: chunked") + "5\r\nab", false),
    ] {
        let mut peer = Peer::new();
        assert!(peer.send(&part).is_empty());
        let bytes = peer.close();
        if silent {
            assert!(bytes.is_empty());
        } else {
            assert_eq!(parse(&bytes, false).0.code(), "malformed_request", "{part}");
        }
        assert!(peer.connection.wants_close(), "{part}");
    }
}

#[test]
fn an_idle_connection_has_no_buffers() {
    let mut peer = Peer::new();
    peer.get("/openapi.json");
    peer.post(&json!({"steps": [{"run": "a"}]}));
    assert_eq!(peer.connection.buffered_capacity(), 0);
    assert!(size_of::<Connection>() <= 192, "{}", size_of::<Connection>());
}

#[test]
fn a_log_is_read_whole_in_ranges_and_by_stream() {
    let mut peer = Peer::new();
    let job = peer.begin();
    peer.says(job, &stdout("0123456789\n"));
    peer.says(job, &crate::agent::AgentMessage::Stderr(b"error\n".to_vec()));
    peer.says(job, &stdout("more\n"));
    let path = format!("/v1/jobs/{job}/logs");
    let whole = "0123456789\nerror\nmore\n";
    let answer = peer.get(&path);
    assert_eq!((answer.status, answer.text().as_str()), (200, whole));
    assert_eq!(answer.header("content-type"), Some("text/plain; charset=utf-8"));
    assert_eq!(peer.get(&format!("{path}?stream=stderr")).text(), "error\n");
    assert_eq!(peer.get(&format!("{path}?stream=stdout&offset=11")).text(), "more\n");
    assert_eq!(peer.get(&format!("{path}?offset=99")).text(), "");

    let range = |peer: &mut Peer, range: &str| peer.ask("GET", &path, &format!("Range: {range}\r\n"), "");
    let answer = range(&mut peer, "bytes=8-12");
    assert_eq!((answer.status, answer.text().as_str()), (206, "89\ner"));
    assert_eq!(answer.header("content-range"), Some("bytes 8-12/*"), "more may come");
    peer.finish(job);
    let answer = range(&mut peer, "bytes=-5");
    assert_eq!((answer.status, answer.text().as_str()), (206, "more\n"));
    assert_eq!(answer.header("content-range"), Some("bytes 17-21/22"));
    let answer = range(&mut peer, "bytes=22-");
    assert_eq!((answer.status, answer.code().as_str()), (416, "range_not_satisfiable"));
    assert_eq!(answer.header("content-range"), Some("bytes */22"));
    assert_eq!(range(&mut peer, "bytes=5-1").text(), whole, "nonsense is no range");
    assert_eq!(range(&mut peer, "bytes=0-1,3-4").text(), whole);
    for query in ["?follow=maybe", "?stream=3", "?offset=-1", "?tail=5"] {
        assert_eq!(peer.get(&format!("{path}{query}")).code(), "invalid_query", "{query}");
    }
}

#[test]
fn a_log_comes_in_frames_for_those_who_ask() {
    let mut peer = Peer::new();
    let job = peer.begin();
    peer.says(job, &stdout("out"));
    peer.says(job, &crate::agent::AgentMessage::Stderr(b"err".to_vec()));
    let accept = "Accept: text/html, application/vnd.docker.multiplexed-stream\r\n";
    let answer = peer.ask("GET", &format!("/v1/jobs/{job}/logs"), accept, "");
    assert_eq!(answer.header("content-type"), Some(crate::multiplex::MEDIA_TYPE));
    assert_eq!(answer.body, b"\x01\0\0\0\0\0\0\x03out\x02\0\0\0\0\0\0\x03err");
}

#[test]
fn following_a_log_goes_on_until_the_job_is_over() {
    let mut peer = Peer::new();
    let job = create(&mut peer.api.jobs, 200, steps(vec![step("a")]), peer.now);
    let mut bytes = peer.send(get(&format!("/v1/jobs/{job}/logs?follow=true")));
    assert!(
        bytes.starts_with(b"HTTP/1.1 200 OK\r\n") && bytes.ends_with(b"\r\n\r\n"),
        "the head comes at once"
    );
    assert!(peer.connection.is_following());
    peer.api.jobs.start(job, peer.now);
    peer.says(job, &hello());
    peer.says(job, &started(0));
    peer.says(job, &stdout("first\n"));
    let more = peer.take();
    assert_eq!(more, b"0006\r\nfirst\n\r\n");
    bytes.extend(more);
    peer.wait(600_000);
    assert!(!peer.connection.wants_close() && !peer.connection.wants_abort(), "waiting is no stall");
    peer.says(job, &stdout("last\n"));
    peer.finish(job);
    bytes.extend(peer.send(get("/healthz")));
    let answers = parse_all(bytes);
    assert_eq!((answers[0].text().as_str(), answers[1].text().as_str()), ("first\nlast\n", "ok\n"));
    assert!(!peer.connection.is_following());
}

#[test]
fn a_follower_that_has_sent_all_it_will_still_follows() {
    let mut peer = Peer::new();
    let job = peer.begin();
    let mut bytes = peer.send(get(&format!("/v1/jobs/{job}/logs?follow=1")));
    bytes.extend(peer.close());
    assert!(!peer.connection.wants_close());
    peer.says(job, &stdout("text"));
    peer.finish(job);
    bytes.extend(peer.take());
    assert_eq!(parse(&bytes, false).0.text(), "text");
    assert!(peer.connection.wants_close());
}

#[test]
fn a_follower_starts_at_the_offset_it_asks_for() {
    let mut peer = Peer::new();
    let job = peer.begin();
    peer.says(job, &stdout("0123456789"));
    let mut bytes = peer.send(get(&format!("/v1/jobs/{job}/logs?follow=true&offset=12")));
    peer.says(job, &stdout("abcdef"));
    bytes.extend(peer.take());
    peer.finish(job);
    bytes.extend(peer.take());
    assert_eq!(parse(&bytes, false).0.text(), "cdef");
}

#[test]
fn a_long_log_is_made_as_fast_as_it_is_taken() {
    let mut peer = Peer::new();
    let job = peer.begin();
    let line = "0123456789abcdef".repeat(4000);
    for _ in 0..20 {
        peer.says(job, &stdout(&line));
    }
    let answer = peer.get(&format!("/v1/jobs/{job}/logs"));
    assert_eq!(answer.body.len(), 20 * 64_000);
    assert_eq!(peer.connection.buffered_capacity(), 0);
}

#[test]
fn dropped_output_is_marked() {
    let limits = Limits { log_bytes: 40_000, ..Limits::default() };
    let mut peer = Peer::with(ApiConfig { limits, ..config() });
    let job = peer.begin();
    for _ in 0..10 {
        peer.says(job, &stdout(&"x".repeat(9_999)));
    }
    let start = peer.api.jobs.log_info(job).unwrap().start_offset;
    let text = peer.get(&format!("/v1/jobs/{job}/logs")).text();
    let (mark, rest) = text.split_once('\n').unwrap();
    assert_eq!(mark, format!("[nestling: {start} bytes of earlier output dropped]"));
    assert_eq!(rest.len() as u64, 99_990 - start);
    let answer = peer.ask("GET", &format!("/v1/jobs/{job}/logs"), "Range: bytes=0-9\r\n", "");
    assert_eq!(answer.status, 416, "gone for good");
    let range = format!("Range: bytes=0-{start}\r\n");
    let answer = peer.ask("GET", &format!("/v1/jobs/{job}/logs"), &range, "");
    assert_eq!(answer.header("content-range"), Some(format!("bytes {start}-{start}/*").as_str()));
}

#[test]
fn a_log_that_is_deleted_while_it_is_read_ends_as_incomplete() {
    let mut peer = Peer::new();
    let job = peer.begin();
    peer.says(job, &stdout(&"x".repeat(60_000)));
    peer.finish(job);
    peer.connection.receive(get(&format!("/v1/jobs/{job}/logs")).as_bytes(), peer.now);
    peer.advance();
    peer.api.jobs.delete(job).unwrap();
    let bytes = peer.take();
    assert!(bytes.starts_with(b"HTTP/1.1 200") && !bytes.ends_with(b"\r\n0\r\n\r\n"));
    assert!(peer.connection.wants_close(), "without a last chunk");
}

/// Everything a peer gets for bytes that come in such pieces, when it closes after them.
fn exchange(bytes: &[u8], sizes: &[usize]) -> (Vec<u8>, bool) {
    let mut peer = Peer::new();
    peer.begin();
    let (mut out, mut rest, mut sizes) = (vec![], bytes, sizes.iter().cycle());
    while !rest.is_empty() && peer.connection.receive_capacity() > 0 {
        let (piece, later) = rest.split_at((*sizes.next().unwrap()).min(rest.len()));
        let unread = peer.connection.receive_capacity();
        out.extend(peer.send(piece));
        rest = if piece.len() > unread && peer.connection.receive_capacity() == 0 { &[] } else { later };
    }
    out.extend(peer.close());
    peer.wait(10_000);
    out.extend(peer.take());
    assert!(peer.connection.buffered_capacity() <= 64 * 1024);
    (out, peer.connection.wants_close() || peer.connection.wants_abort())
}

proptest! {
    #[test]
    fn random_bytes_end_in_an_answer_or_a_close(
        bytes in prop::collection::vec(any::<u8>(), 0..3000),
        sizes in prop::collection::vec(1_usize..200, 1..10),
    ) {
        let (out, closed) = exchange(&bytes, &sizes);
        prop_assert!(closed);
        prop_assert!(out.is_empty() || out.starts_with(b"HTTP/1.1 "));
    }

    #[test]
    fn bytes_that_look_like_requests_end_in_an_answer_or_a_close(
        parts in prop::collection::vec(prop::sample::select(vec![
            "GET ", "POST ", "HEAD ", "/v1/jobs", "/healthz", "?page=1", "?", "%", " HTTP/1.1\r\n", " HTTP/1.0\r\n",
            "Host: x\r\n", "Content-Length: 5\r\n", "Content-Length: 0\r\n", "Transfer-Encoding: chunked\r\n",
            "Authorization: Bearer 0123456789abcdef\r\n", "Content-Type: application/json\r\n", "Connection: close\r\n",
            "Expect: 100-continue\r\n", "Range: bytes=0-\r\n", "Accept: */*\r\n", "\r\n", "\n", "\r", " ", ":", "5\r\n", "hello",
            "0\r\n\r\n", "{\"steps\":[{\"run\":\"a\"}]}", "/v1/jobs/c8c8c8c8c8c8c8c8c8c8c8c8c8c8c8c8/logs",
            "/v1/jobs/c8c8c8c8c8c8c8c8c8c8c8c8c8c8c8c8/cancel", "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        ]), 0..30),
        sizes in prop::collection::vec(1_usize..50, 1..10),
    ) {
        let (out, closed) = exchange(parts.concat().as_bytes(), &sizes);
        prop_assert!(closed);
        prop_assert!(out.is_empty() || out.starts_with(b"HTTP/1.1 "));
    }

    #[test]
    fn a_pipeline_is_answered_alike_however_it_is_cut(
        which in prop::collection::vec(0_usize..8, 1..12),
        sizes in prop::collection::vec(1_usize..300, 1..10),
    ) {
        let body = r#"{"steps": [{"run": "a"}]}"#;
        let requests = [
            get("/healthz"),
            get("/openapi.json"),
            get("/v1/jobs"),
            get("/v1/nothing"),
            get("/v1/jobs/c8c8c8c8c8c8c8c8c8c8c8c8c8c8c8c8/logs"),
            format!("{}{body}", post_head(&format!("Content-Length: {}", body.len()))),
            format!("{}5\r\n{}\r\n14\r\n{}\r\n0\r\n\r\n", post_head("Transfer-Encoding: chunked"), &body[..5], &body[5..]),
            "HEAD /version HTTP/1.1\r\nHost: x\r\n\r\n".to_string(),
        ];
        let bytes: String = which.iter().map(|index| requests[*index].as_str()).collect();
        let whole = exchange(bytes.as_bytes(), &[usize::MAX]);
        prop_assert_eq!(exchange(bytes.as_bytes(), &sizes), whole);
    }
}
