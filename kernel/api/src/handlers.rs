//! What each request does once it is admitted.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::error::{ApiError, ErrorCode};
use crate::http::{Body, Head, Query, Response, Wanted, decode};
use crate::jobs::{Created, JobId, ReadOptions, Streams, request};
use crate::log::Stream;
use crate::multiplex;
use crate::openapi::OPENAPI;
use crate::types::{FieldError, ImageList, Status, TemplateList, Version};
use crate::{Api, Clock, Node};

const TEXT: &str = "text/plain; charset=utf-8";
/// Most bytes of an `Idempotency-Key`.
const MAX_KEY: usize = 255;
const DEFAULT_PER_PAGE: u64 = 30;
const MAX_PER_PAGE: u64 = 100;
/// Bytes of jobs after which a page ends early.
const PAGE_BYTES: usize = 512 * 1024;

pub(crate) fn text(text: &'static str) -> Response {
    Response::new(200, TEXT, Body::Static(text.as_bytes()))
}

pub(crate) fn ready(node: &dyn Node) -> Result<Response, ApiError> {
    if node.ready() {
        return Ok(text("ok\n"));
    }
    let message = "the node has not finished starting, or has no image to run jobs in";
    Err(ApiError::new(ErrorCode::NotReady, message).with_header("Retry-After", "1"))
}

pub(crate) fn version(node: &dyn Node) -> Response {
    let version = Version { name: "nestling".into(), version: node.version().to_string(), api: "v1".into() };
    Response::json(200, &version)
}

pub(crate) fn openapi() -> Response {
    Response::new(200, "application/json", Body::Static(OPENAPI.as_bytes()))
}

pub(crate) fn templates(node: &dyn Node) -> Response {
    let templates = node.templates();
    Response::json(200, &TemplateList { total_count: templates.len() as u64, templates })
}

pub(crate) fn images(node: &dyn Node) -> Response {
    let images = node.images();
    let problems = node.image_problems();
    Response::json(200, &ImageList { total_count: images.len() as u64, images, problems })
}

pub(crate) fn list_jobs(api: &Api, head: &Head) -> Result<Response, ApiError> {
    let query = Query::parse(&head.query, &["status", "per_page", "page", "offset"])?;
    let words =
        [Status::Queued, Status::InProgress, Status::Completed].map(|status| (status.as_str(), status));
    let status = query.word("status", &words)?;
    let per_page = query.number("per_page", 1..=MAX_PER_PAGE)?.unwrap_or(DEFAULT_PER_PAGE);
    let page = query.number("page", 1..=u64::from(u32::MAX))?.unwrap_or(1);
    let offset = query.number("offset", 0..=u64::from(u32::MAX))?;
    let total_count = api.jobs.count(status) as u64;
    let skipped = offset.unwrap_or_else(|| page.saturating_sub(1).saturating_mul(per_page));
    let ids = api.jobs.list(status).skip(usize::try_from(skipped).unwrap_or(usize::MAX));
    // One job after the other, so that no more than the page itself is ever in memory: a `JobList`.
    let mut body = format!("{{\"total_count\":{total_count},\"jobs\":[").into_bytes();
    let mut shown = 0_u64;
    for id in ids.take(usize::try_from(per_page).unwrap_or_default()) {
        let job = serde_json::to_vec(&api.jobs.get(id)?).unwrap_or_default();
        if shown > 0 {
            if body.len().saturating_add(job.len()) > PAGE_BYTES {
                break;
            }
            body.push(b',');
        }
        body.extend_from_slice(&job);
        shown = shown.saturating_add(1);
    }
    body.extend_from_slice(b"]}\n");
    let mut response = Response::new(200, "application/json", Body::Bytes(body, None));
    let filter = status.map_or_else(String::new, |status| format!("&status={}", status.as_str()));
    let link =
        |place: String, rel: &str| format!("</v1/jobs?{place}&per_page={per_page}{filter}>; rel=\"{rel}\"");
    let mut links = Vec::new();
    if offset.is_none() && page > 1 {
        links.push(link(format!("page={}", page.saturating_sub(1)), "prev"));
    }
    let next = skipped.saturating_add(shown);
    if shown > 0 && next < total_count {
        let place = if offset.is_none() && shown == per_page {
            format!("page={}", page.saturating_add(1))
        } else {
            format!("offset={next}")
        };
        links.push(link(place, "next"));
    }
    if !links.is_empty() {
        response = response.with_header("Link", links.join(", "));
    }
    Ok(response)
}

pub(crate) fn create_job(
    api: &mut Api,
    node: &mut dyn Node,
    head: &Head,
    body: &[u8],
    now: Clock,
) -> Result<Response, ApiError> {
    let key = head.idempotency_key.as_deref().map(checked_key).transpose()?;
    let request = request::parse(body)?;
    let key = key.map(|key| (key, fingerprint(&serde_json::to_vec(&request).unwrap_or_default())));
    let before = key.as_ref().map(|(key, print)| api.jobs.created_before(key, *print)).transpose()?.flatten();
    let created = match before {
        Some(id) => Created::Before(id),
        None => {
            let plan = request::plan(request, &node.images(), node.largest_machine())?;
            let mut bytes = [0; 16];
            node.random(&mut bytes);
            api.jobs.create(JobId::from_bytes(bytes), plan, key, now)?
        }
    };
    let id = created.id();
    let response = Response::json(202, &api.jobs.get(id)?).with_header("Location", format!("/v1/jobs/{id}"));
    Ok(match created {
        Created::New(_) => response,
        Created::Before(_) => response.with_header("Idempotency-Replayed", "true"),
    })
}

fn checked_key(key: &str) -> Result<String, ApiError> {
    if (1..=MAX_KEY).contains(&key.len()) && key.bytes().all(|b| b.is_ascii_graphic() || b == b' ') {
        return Ok(key.to_string());
    }
    let message = format!("must be 1 to {MAX_KEY} printable ASCII characters");
    Err(ApiError::validation(Vec::from([FieldError { field: "Idempotency-Key".into(), message }])))
}

/// FNV-1a over a request's bytes. It tells a client's own two requests apart; nobody gains by making them collide.
fn fingerprint(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

pub(crate) fn job_logs(api: &mut Api, head: &Head, id: JobId, now: Clock) -> Result<Response, ApiError> {
    let query = Query::parse(&head.query, &["follow", "stream", "offset"])?;
    let switch = [("true", true), ("1", true), ("", true), ("false", false), ("0", false)];
    let follow = query.word("follow", &switch)?.unwrap_or(false);
    let streams = [
        ("both", Streams::Both),
        ("stdout", Streams::Only(Stream::Stdout)),
        ("stderr", Streams::Only(Stream::Stderr)),
    ];
    let streams = query.word("stream", &streams)?.unwrap_or_default();
    let offset = query.number("offset", 0..=u64::MAX)?;
    let multiplexed = head.accept.as_deref().is_some_and(|accept| accept.contains(multiplex::MEDIA_TYPE));
    let info = api.jobs.log_info(id)?;
    let ranged = !follow && !multiplexed && offset.is_none() && streams == Streams::Both;
    if let Some(wanted) = head.range.as_deref().filter(|_| ranged).and_then(Wanted::parse) {
        return log_range(api, id, wanted, now);
    }
    let end = (!follow).then_some(info.bytes);
    let options = ReadOptions { start: offset.unwrap_or(0), end, streams, multiplexed, follow, exact: false };
    let content_type = if multiplexed { multiplex::MEDIA_TYPE } else { TEXT };
    let reader = api.jobs.open_log(id, options, now)?;
    Ok(Response::new(200, content_type, Body::Log(reader, None)).with_header("Accept-Ranges", "bytes"))
}

pub(crate) fn all_artifacts(api: &mut Api, id: JobId, now: Clock) -> Result<Response, ApiError> {
    let reader = api.jobs.open_artifacts(id, None, now)?;
    Ok(Response::new(200, "application/x-tar", Body::Artifacts(reader)))
}

pub(crate) fn one_artifact(api: &mut Api, head: &Head, id: JobId, now: Clock) -> Result<Response, ApiError> {
    // `/v1/jobs/{id}/artifacts/` and then the name.
    let name = head.path.splitn(6, '/').nth(5).unwrap_or_default();
    let Some(name) = decode(name, false) else {
        let message =
            "the artifact's name is not percent-encoded UTF-8; artifacts.tar has every name as it is";
        return Err(ApiError::new(ErrorCode::ArtifactNotFound, message));
    };
    let reader = api.jobs.open_artifacts(id, Some(name), now)?;
    Ok(Response::new(200, "application/octet-stream", Body::Artifacts(reader)))
}

fn log_range(api: &mut Api, id: JobId, wanted: Wanted, now: Clock) -> Result<Response, ApiError> {
    let info = api.jobs.log_info(id)?;
    let total = info.bytes;
    let Some(range) = wanted.within(info.start_offset, total) else {
        let message = format!(
            "the log has bytes {} to {total} (exclusive); none of those asked for",
            info.start_offset
        );
        let error = ApiError::new(ErrorCode::RangeNotSatisfiable, message);
        return Err(error.with_header("Content-Range", format!("bytes */{total}")));
    };
    let options =
        ReadOptions { start: range.start, end: Some(range.end), exact: true, ..ReadOptions::default() };
    let reader = api.jobs.open_log(id, options, now)?;
    let complete = match api.jobs.status(id)? {
        Status::Completed => total.to_string(),
        _ => "*".to_string(),
    };
    let shown = format!("bytes {}-{}/{complete}", range.start, range.end.saturating_sub(1));
    let body = Body::Log(reader, Some(range.end.saturating_sub(range.start)));
    Ok(Response::new(206, TEXT, body)
        .with_header("Content-Range", shown)
        .with_header("Accept-Ranges", "bytes"))
}
