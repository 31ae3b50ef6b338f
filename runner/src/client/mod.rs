//! A client of one node's HTTP API.

mod error;
mod job_pages;
mod log_stream;

use std::fmt::Write as _;
use std::io::{self, Read};
use std::thread;
use std::time::{Duration, Instant};

use nestling_api::multiplex::MEDIA_TYPE;
use nestling_api::types::{
    ArtifactList, ConnectionList, Host, ImageList, Job, JobList, JobRequest, Status, TemplateList, Version,
    Workspace,
};
use serde::de::DeserializeOwned;
use ureq::Agent;
use ureq::http;

pub use error::ClientError;
pub use job_pages::JobPages;
pub use log_stream::LogStream;
pub use nestling_api::egress::{Egress, EgressRule};
pub use nestling_api::log::Stream;
pub use nestling_api::multiplex::LogFrame;
pub use nestling_api::types;

use crate::random;

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the head of an answer, and for each further part of it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a job is offered to a node that has no room for it.
const CREATE_PATIENCE: Duration = Duration::from_secs(30);
/// How often a caller that waits is asked whether it still wants to.
const WAIT_SLICE: Duration = Duration::from_millis(50);
/// Largest answer that is no log: a page of 100 jobs of 100 steps each fits.
const MAX_BODY: u64 = 64 << 20;

/// A connection to one node. Cheap to clone; clones share their idle connections.
#[derive(Clone, Debug)]
pub struct Client {
    agent: Agent,
    url: String,
    token: Option<String>,
}

/// Which jobs to list, and which page of them.
#[derive(Clone, Copy, Debug, Default)]
pub struct JobQuery {
    /// Only jobs that stand here.
    pub status: Option<Status>,
    /// Jobs a page, 1..=100; default: the node's.
    pub per_page: Option<u32>,
    /// The page, from 1.
    pub page: Option<u32>,
}

/// Which of a job's two outputs to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Streams {
    /// Both, in the order they were written.
    #[default]
    Both,
    /// Standard output only.
    Stdout,
    /// Standard error only.
    Stderr,
}

impl JobQuery {
    fn path(&self) -> String {
        let mut path = String::from("/v1/jobs");
        let mut separator = '?';
        let parameters = [
            ("status", self.status.map(|status| status.as_str().to_owned())),
            ("per_page", self.per_page.map(|number| number.to_string())),
            ("page", self.page.map(|number| number.to_string())),
        ];
        for (name, value) in parameters {
            if let Some(value) = value {
                // Writing to a String cannot fail.
                let _ = write!(path, "{separator}{name}={value}");
                separator = '&';
            }
        }
        path
    }
}

impl Streams {
    fn as_str(self) -> &'static str {
        match self {
            Streams::Both => "both",
            Streams::Stdout => "stdout",
            Streams::Stderr => "stderr",
        }
    }
}

/// An answer as it came, for callers that look at more than the body.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The header fields, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The whole body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The first header field of this name (in lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
    }

    /// The body as text, with what is no UTF-8 replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// A job that is over, with its output.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The job as the node reports it at last.
    pub job: Job,
    /// What it wrote to its standard output, as far as the node kept it.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error.
    pub stderr: Vec<u8>,
}

impl Client {
    /// A client of the node at `url` (`http://HOST[:PORT]`), which is not contacted yet. `token` is none for a node that
    /// was started without.
    ///
    /// # Errors
    /// [`ClientError::Url`] when `url` is not such a URL.
    pub fn new(url: &str, token: Option<&str>) -> Result<Client, ClientError> {
        let url = url.trim_end_matches('/');
        let parsed = url.parse::<http::Uri>().ok().filter(|parsed| {
            parsed.scheme_str() == Some("http")
                && parsed.authority().is_some()
                && parsed.path().len() <= 1
                && parsed.query().is_none()
        });
        if parsed.is_none() {
            return Err(ClientError::Url(url.to_owned()));
        }
        let token = token.map(str::to_owned);
        Ok(Client { agent: agent(ANSWER_TIMEOUT), url: url.to_owned(), token })
    }

    /// The same client, but giving up a connection once the node has been silent on it for `silence` instead of 60 s.
    #[must_use]
    pub fn with_silence_limit(self, silence: Duration) -> Client {
        Client { agent: agent(silence), ..self }
    }

    /// The node's URL, without a slash at its end.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Whether the node takes jobs now.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn ready(&self) -> Result<bool, ClientError> {
        self.ready_within(ANSWER_TIMEOUT)
    }

    /// As [`ready`](Self::ready), given up after `timeout`.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub fn ready_within(&self, timeout: Duration) -> Result<bool, ClientError> {
        let result = self
            .agent
            .get(format!("{}/readyz", self.url))
            .config()
            .timeout_global(Some(timeout))
            .build()
            .call();
        let response = result.map_err(|error| ClientError::unreachable(&self.url, error))?;
        Ok(response.status() == 200)
    }

    /// `GET /version`.
    ///
    /// # Errors
    /// As every call: the node cannot be reached, refuses, or answers what is no answer.
    pub fn version(&self) -> Result<Version, ClientError> {
        self.get("/version")
    }

    /// `GET /v1/host`.
    ///
    /// # Errors
    /// As [`version`](Self::version).
    pub fn host(&self) -> Result<Host, ClientError> {
        self.get("/v1/host")
    }

    /// `GET /v1/images`.
    ///
    /// # Errors
    /// As [`version`](Self::version).
    pub fn images(&self) -> Result<ImageList, ClientError> {
        self.get("/v1/images")
    }

    /// `GET /v1/templates`.
    ///
    /// # Errors
    /// As [`version`](Self::version).
    pub fn templates(&self) -> Result<TemplateList, ClientError> {
        self.get("/v1/templates")
    }

    /// `POST /v1/jobs` with a random idempotency key. Tried again once when the connection breaks, and for up to 30 s while
    /// the node has no room for the job, as often as the node says (`Retry-After`).
    ///
    /// # Errors
    /// As [`version`](Self::version).
    pub fn create_job(&self, request: &JobRequest) -> Result<Job, ClientError> {
        self.create_job_while(request, || true)
    }

    /// As [`create_job`](Self::create_job), but waits for room only as long as `wanted` says so.
    ///
    /// # Errors
    /// As [`version`](Self::version).
    pub fn create_job_while(
        &self,
        request: &JobRequest,
        wanted: impl Fn() -> bool,
    ) -> Result<Job, ClientError> {
        // The key makes another try safe: if an earlier one arrived, this names the same job.
        let key = random::hex(16);
        let start = Instant::now();
        let mut broke = false;
        loop {
            let error = match self.create_job_with_key(request, &key) {
                Ok(job) => return Ok(job),
                Err(error) => error,
            };
            match error.retry_after() {
                Some(pause) if start.elapsed().saturating_add(pause) <= CREATE_PATIENCE => {
                    let began = Instant::now();
                    while began.elapsed() < pause {
                        if !wanted() {
                            return Err(error);
                        }
                        thread::sleep(WAIT_SLICE.min(pause));
                    }
                }
                None if matches!(error, ClientError::Unreachable { .. }) && !broke => broke = true,
                _ => return Err(error),
            }
        }
    }

    /// `POST /v1/jobs` with the `Idempotency-Key` given: the same key again answers with the same job.
    ///
    /// # Errors
    /// As [`version`](Self::version).
    pub fn create_job_with_key(&self, request: &JobRequest, key: &str) -> Result<Job, ClientError> {
        let body = serde_json::to_vec(request).map_err(|error| ClientError::Answer {
            path: "/v1/jobs".to_owned(),
            reason: format!("the request cannot be written as JSON: {error}"),
        })?;
        let headers = [("content-type", "application/json"), ("idempotency-key", key)];
        self.decode("/v1/jobs", self.request("POST", "/v1/jobs", &headers, Some(&body))?)
    }

    /// `GET /v1/jobs`, newest first: one page.
    ///
    /// # Errors
    /// As [`version`](Self::version).
    pub fn jobs(&self, query: &JobQuery) -> Result<JobList, ClientError> {
        self.get(&query.path())
    }

    /// `GET /v1/jobs`, newest first: the page of the query and all that come after it, each asked for when it is wanted.
    pub fn job_pages(&self, query: &JobQuery) -> JobPages<'_> {
        JobPages::new(self, query.path())
    }

    /// `GET /v1/jobs/{id}`.
    ///
    /// # Errors
    /// As [`version`](Self::version).
    pub fn job(&self, id: &str) -> Result<Job, ClientError> {
        self.get(&format!("/v1/jobs/{id}"))
    }

    /// `PUT /v1/jobs/{id}/workspace`: sends a tar of `length` bytes, as it is read, and returns once it is unpacked in the job's
    /// machine. Send it when the job's workspace is [`types::WorkspaceStatus::Awaited`]: until then the node reads nothing.
    ///
    /// # Errors
    /// As [`version`](Self::version). When the node refuses in the middle or `tar` fails, the connection may break before the
    /// reason is read; the job has it then.
    pub fn put_workspace(
        &self,
        id: &str,
        tar: impl Read + Send + 'static,
        length: u64,
    ) -> Result<Workspace, ClientError> {
        let path = format!("/v1/jobs/{id}/workspace");
        let length = length.to_string();
        let headers = [("content-type", "application/x-tar"), ("content-length", length.as_str())];
        let request = self.head("PUT", &path, &headers).body(ureq::SendBody::from_owned_reader(tar));
        let response = request.map_err(ureq::Error::from).and_then(|request| self.agent.run(request));
        let response = response.map_err(|error| ClientError::unreachable(&self.url, error))?;
        let answer = self.read_whole(&path, response)?;
        self.decode(&path, answer)
    }

    /// `GET /v1/jobs/{id}/artifacts`: the files that the job's machine keeps.
    ///
    /// # Errors
    /// As [`version`](Self::version).
    pub fn artifacts(&self, id: &str) -> Result<ArtifactList, ClientError> {
        self.get(&format!("/v1/jobs/{id}/artifacts"))
    }

    /// `GET /v1/jobs/{id}/artifacts.tar`: all of those files, as they come. Once they are read to the end, the job is over.
    ///
    /// # Errors
    /// As [`version`](Self::version).
    pub fn artifacts_tar(&self, id: &str) -> Result<impl Read + use<>, ClientError> {
        let path = format!("/v1/jobs/{id}/artifacts.tar");
        let response = self.send("GET", &path, &[], None)?;
        if !response.status().is_success() {
            let answer = self.read_whole(&path, response)?;
            return Err(ClientError::refused(&path, &answer));
        }
        Ok(response.into_body().into_reader())
    }

    /// `GET /v1/jobs/{id}/connections`: whom the job's machine connected to, or tried to.
    ///
    /// # Errors
    /// As [`version`](Self::version).
    pub fn connections(&self, id: &str) -> Result<ConnectionList, ClientError> {
        self.get(&format!("/v1/jobs/{id}/connections"))
    }

    /// `POST /v1/jobs/{id}/cancel`: the job ends soon after.
    ///
    /// # Errors
    /// As [`version`](Self::version); the code `job_completed` when it is over already.
    pub fn cancel(&self, id: &str) -> Result<(), ClientError> {
        let path = format!("/v1/jobs/{id}/cancel");
        self.succeeded(&path, self.request("POST", &path, &[], Some(b""))?).map(drop)
    }

    /// `DELETE /v1/jobs/{id}`: forgets a completed job and its log.
    ///
    /// # Errors
    /// As [`version`](Self::version).
    pub fn delete(&self, id: &str) -> Result<(), ClientError> {
        let path = format!("/v1/jobs/{id}");
        self.succeeded(&path, self.request("DELETE", &path, &[], None)?).map(drop)
    }

    /// `GET /v1/jobs/{id}/logs`: what there is of the job's output now.
    ///
    /// # Errors
    /// As [`version`](Self::version).
    pub fn log(&self, id: &str, streams: Streams) -> Result<Vec<u8>, ClientError> {
        let path = format!("/v1/jobs/{id}/logs?stream={}", streams.as_str());
        Ok(self.succeeded(&path, self.request("GET", &path, &[], None)?)?.body)
    }

    /// The job's output from byte `offset` of both streams together, followed until the job is over when `follow` says so. A
    /// stream on which nothing came for 60 s ends with [`io::ErrorKind::TimedOut`]: the job may be quiet, or the node gone;
    /// ask again from [`LogStream::offset`].
    ///
    /// # Errors
    /// As [`version`](Self::version).
    pub fn log_stream(
        &self,
        id: &str,
        streams: Streams,
        offset: u64,
        follow: bool,
    ) -> Result<LogStream, ClientError> {
        let mut path = format!("/v1/jobs/{id}/logs?stream={}", streams.as_str());
        if follow {
            path.push_str("&follow=true");
        }
        if offset > 0 {
            let _ = write!(path, "&offset={offset}");
        }
        let headers = [("accept", MEDIA_TYPE)];
        let response = self.send("GET", &path, &headers, None)?;
        if !response.status().is_success() {
            let answer = self.read_whole(&path, response)?;
            return Err(ClientError::refused(&path, &answer));
        }
        let kind =
            response.headers().get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
        if kind != MEDIA_TYPE {
            let reason = format!("expected {}, got {kind:?}", MEDIA_TYPE);
            return Err(ClientError::Answer { path, reason });
        }
        Ok(LogStream::new(Box::new(response.into_body().into_reader()), offset))
    }

    /// Waits until the job is over, asking every `50 ms`; none when `timeout` passes first.
    ///
    /// # Errors
    /// As [`version`](Self::version).
    pub fn wait(&self, id: &str, timeout: Duration) -> Result<Option<Job>, ClientError> {
        let start = Instant::now();
        loop {
            let job = self.job(id)?;
            if job.status == Status::Completed {
                return Ok(Some(job));
            }
            if start.elapsed() >= timeout {
                return Ok(None);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Creates a job, follows its output, and returns both once it is over.
    ///
    /// # Errors
    /// As [`version`](Self::version), or the output breaks off.
    pub fn run(&self, request: &JobRequest) -> Result<Finished, ClientError> {
        let id = self.create_job(request)?.id;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let mut log = self.log_stream(&id, Streams::Both, 0, true)?;
        loop {
            match log.next_frame() {
                Ok(Some(LogFrame::Output(Stream::Stdout, data))) => stdout.extend_from_slice(&data),
                Ok(Some(LogFrame::Output(Stream::Stderr, data))) => stderr.extend_from_slice(&data),
                Ok(Some(LogFrame::Dropped(_))) => {}
                Ok(None) => break,
                // The job may just be quiet, which a new connection tells from a node that is gone.
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    log = self.log_stream(&id, Streams::Both, log.offset(), true)?;
                }
                Err(error) => return Err(ClientError::unreachable(&self.url, error)),
            }
        }
        Ok(Finished { job: self.job(&id)?, stdout, stderr })
    }

    /// Sends any request and returns the answer, whatever its status. `path` starts with a slash.
    ///
    /// # Errors
    /// When the node cannot be reached or the answer breaks off.
    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&[u8]>,
    ) -> Result<Answer, ClientError> {
        let response = self.send(method, path, headers, body)?;
        self.read_whole(path, response)
    }

    fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&[u8]>,
    ) -> Result<http::Response<ureq::Body>, ClientError> {
        let request = self.head(method, path, headers);
        let result = match body {
            Some(body) => {
                request.body(body).map_err(ureq::Error::from).and_then(|request| self.agent.run(request))
            }
            None => request.body(()).map_err(ureq::Error::from).and_then(|request| self.agent.run(request)),
        };
        result.map_err(|error| ClientError::unreachable(&self.url, error))
    }

    fn head(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> http::request::Builder {
        let mut request = http::Request::builder().method(method).uri(format!("{}{path}", self.url));
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request
    }

    fn read_whole(&self, path: &str, response: http::Response<ureq::Body>) -> Result<Answer, ClientError> {
        let (head, body) = response.into_parts();
        let mut bytes = Vec::new();
        body.into_reader().take(MAX_BODY).read_to_end(&mut bytes).map_err(|error| {
            ClientError::unreachable(&self.url, format!("its answer to {path} broke off: {error}"))
        })?;
        let headers = head
            .headers
            .iter()
            .map(|(name, value)| {
                (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned())
            })
            .collect();
        Ok(Answer { status: head.status.as_u16(), headers, body: bytes })
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.decode(path, self.request("GET", path, &[], None)?)
    }

    fn succeeded(&self, path: &str, answer: Answer) -> Result<Answer, ClientError> {
        if (200..300).contains(&answer.status) {
            Ok(answer)
        } else {
            Err(ClientError::refused(path, &answer))
        }
    }

    fn decode<T: DeserializeOwned>(&self, path: &str, answer: Answer) -> Result<T, ClientError> {
        let answer = self.succeeded(path, answer)?;
        serde_json::from_slice(&answer.body)
            .map_err(|error| ClientError::Answer { path: path.to_owned(), reason: error.to_string() })
    }
}

fn agent(silence: Duration) -> Agent {
    Agent::config_builder()
        .http_status_as_error(false)
        .user_agent(concat!("nestling/", env!("CARGO_PKG_VERSION")))
        // A node is addressed directly; a proxy for the world outside would not find it.
        .proxy(None)
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_recv_response(Some(ANSWER_TIMEOUT))
        .timeout_per_read(Some(silence))
        .timeout_per_write(Some(silence))
        .build()
        .new_agent()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_that_is_no_nodes_is_refused_with_an_example() {
        for url in
            ["", "localhost:8080", "https://node", "http://", "http://node/v1", "http://no de", "ftp://x"]
        {
            let error = Client::new(url, None).unwrap_err();
            assert!(error.to_string().contains("http://127.0.0.1:8080"), "{url}: {error}");
        }
        assert_eq!(Client::new("http://127.0.0.1:8080/", None).unwrap().url(), "http://127.0.0.1:8080");
    }

    #[test]
    fn a_node_that_is_not_there_is_said_to_be_unreachable() {
        // A port that was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let client = Client::new(&format!("http://127.0.0.1:{port}"), None).unwrap();
        assert!(matches!(client.host(), Err(ClientError::Unreachable { .. })));
    }
}
