//! The client against a node that misbehaves: each test plays the node's answers byte by byte.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nestling::client::types::{JobRequest, StepRequest};
use nestling::client::{Client, ClientError, JobQuery, LogFrame, Streams};
use nestling_api::log::Stream;
use nestling_api::multiplex::{MEDIA_TYPE, header};

/// A request as the node saw it.
struct Request {
    /// Method and path.
    line: String,
    idempotency_key: Option<String>,
}

/// A node that answers its connections, one request each, with these bytes in this order. A connection whose answer is in
/// chunks stays open until the client leaves.
struct Played {
    client: Client,
    node: JoinHandle<Vec<Request>>,
}

impl Played {
    fn new(answers: Vec<Vec<u8>>) -> Played {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let node = thread::spawn(move || {
            let mut open = Vec::new();
            let mut requests = Vec::new();
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                requests.push(request(&stream));
                stream.write_all(&answer).unwrap();
                if answer.windows(7).any(|word| word == b"chunked") {
                    open.push(stream);
                }
            }
            for mut stream in open {
                let _ = stream.read(&mut [0]);
            }
            requests
        });
        Played { client: Client::new(&url, None).unwrap(), node }
    }

    fn requests(self) -> Vec<Request> {
        self.node.join().unwrap()
    }
}

fn request(stream: &TcpStream) -> Request {
    let mut reader = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_lowercase());
    }
    let field = |name: &str| lines.iter().find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()));
    let length = field("content-length:").map_or(0, |value| value.parse().unwrap());
    reader.take(length).read_to_end(&mut Vec::new()).unwrap();
    Request { line: lines[0].clone(), idempotency_key: field("idempotency-key:") }
}

fn answer(status: &str, fields: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n{fields}\r\n{body}", body.len())
        .into_bytes()
}

fn job(id: char) -> serde_json::Value {
    serde_json::json!({
        "id": id.to_string().repeat(32), "name": "n", "image": "minimal", "labels": [], "status": "completed",
        "conclusion": "success", "created_at": "", "timeout_seconds": 1, "machine_config": {}, "steps": [], "timings": {},
        "exits": {}, "memory": {}, "log": {"bytes": 6, "start_offset": 0, "truncated": false},
    })
}

fn created() -> Vec<u8> {
    answer("202 Accepted", "", &job('a').to_string())
}

fn full(retry_after: &str) -> Vec<u8> {
    let body = r#"{"message":"the queue is full","code":"queue_full","documentation_url":"","status":"503"}"#;
    answer("503 Service Unavailable", &format!("retry-after: {retry_after}\r\n"), body)
}

/// A log of one frame, in chunks that never end.
fn endless_log(text: &[u8]) -> Vec<u8> {
    let frame = [&header(Stream::Stdout, false, u32::try_from(text.len()).unwrap())[..], text].concat();
    let head = format!(
        "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: {MEDIA_TYPE}\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    [head.as_bytes(), format!("{:x}\r\n", frame.len()).as_bytes(), &frame, b"\r\n"].concat()
}

fn ended_log(text: &[u8]) -> Vec<u8> {
    [&endless_log(text)[..], b"0\r\n\r\n"].concat()
}

fn script() -> JobRequest {
    let step = StepRequest { run: "true".to_owned(), ..StepRequest::default() };
    JobRequest { steps: vec![step], ..JobRequest::default() }
}

#[test]
fn a_job_whose_answer_breaks_off_is_asked_for_again_with_the_same_key() {
    let mut cut = created();
    cut.truncate(cut.len() - 10);
    let node = Played::new(vec![cut, created()]);
    assert_eq!(node.client.create_job(&script()).unwrap().id, "a".repeat(32));
    let requests = node.requests();
    assert!(requests[0].idempotency_key.is_some());
    assert_eq!(requests[0].idempotency_key, requests[1].idempotency_key);
}

#[test]
fn a_job_is_offered_again_to_a_node_that_has_no_room_for_it_now() {
    let node = Played::new(vec![full("0"), full("0"), created()]);
    node.client.create_job(&script()).unwrap();
    let requests = node.requests();
    assert!(requests.iter().all(|request| request.idempotency_key == requests[0].idempotency_key));
}

#[test]
fn a_node_that_has_no_room_for_long_is_not_waited_for() {
    let node = Played::new(vec![full("3600")]);
    assert_eq!(node.client.create_job(&script()).unwrap_err().code(), Some("queue_full"));
    let node = Played::new(vec![full("20")]);
    let error = node.client.create_job_while(&script(), || false).unwrap_err();
    assert_eq!(error.code(), Some("queue_full"), "nobody wants the job any more");
}

#[test]
fn an_answer_that_breaks_off_is_a_broken_connection_and_not_a_wrong_answer() {
    let mut cut = created();
    cut.truncate(cut.len() - 1);
    let node = Played::new(vec![cut]);
    let error = node.client.job("a").unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains("/v1/jobs/a broke off"), "{error}");
}

#[test]
fn a_node_that_falls_silent_is_given_up() {
    let silence = Duration::from_millis(700);
    let half = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n".to_vec();
    let node = Played::new(vec![half]);
    let error = node.client.clone().with_silence_limit(silence).job("a").unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error:?}");
    node.requests();

    let node = Played::new(vec![endless_log(b"one\n")]);
    let client = node.client.clone().with_silence_limit(silence);
    let mut log = client.log_stream("a", Streams::Both, 7, true).unwrap();
    let frame = log.next_frame().unwrap();
    assert_eq!(frame, Some(LogFrame::Output(Stream::Stdout, b"one\n".to_vec())));
    assert_eq!(log.next_frame().unwrap_err().kind(), ErrorKind::TimedOut);
    assert_eq!(log.offset(), 11);
}

#[test]
fn a_quiet_job_is_read_to_its_end_over_another_connection() {
    let answers = vec![created(), endless_log(b"one"), ended_log(b"two"), created()];
    let node = Played::new(answers);
    let client = node.client.clone().with_silence_limit(Duration::from_millis(500));
    assert_eq!(client.run(&script()).unwrap().stdout, b"onetwo");
    let requests = node.requests();
    assert!(requests[2].line.contains("&offset=3 "), "{}", requests[2].line);
}

#[test]
fn pages_that_end_early_are_followed_by_their_links() {
    let page = |ids: &str, link: &str| {
        let jobs: Vec<_> = ids.chars().map(job).collect();
        let body = serde_json::json!({"total_count": 3, "jobs": jobs}).to_string();
        answer("200 OK", link, &body)
    };
    let node = Played::new(vec![
        page("a", "Link: </v1/jobs?page=2&per_page=100>; rel=\"next\"\r\n"),
        page("bc", "Link: </v1/jobs?page=1&per_page=100>; rel=\"prev\"\r\n"),
    ]);
    let query = JobQuery { per_page: Some(100), ..JobQuery::default() };
    let lengths: Vec<usize> = node.client.job_pages(&query).map(|page| page.unwrap().jobs.len()).collect();
    assert_eq!(lengths, [1, 2]);
    let lines: Vec<String> = node.requests().into_iter().map(|request| request.line).collect();
    assert_eq!(
        lines,
        ["get /v1/jobs?per_page=100 http/1.1", "get /v1/jobs?page=2&per_page=100 http/1.1"],
        "the link is taken as it is"
    );
}

#[test]
fn a_node_that_links_empty_pages_to_themselves_is_not_followed_for_ever() {
    let body = r#"{"total_count":0,"jobs":[]}"#;
    let node = Played::new(vec![answer("200 OK", "Link: </v1/jobs>; rel=\"next\"\r\n", body)]);
    assert_eq!(node.client.job_pages(&JobQuery::default()).count(), 1);
}
