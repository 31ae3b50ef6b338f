//! Which path and method does what, and who may.

use alloc::string::String;

use subtle::ConstantTimeEq;

use crate::error::{ApiError, ErrorCode};
use crate::handlers;
use crate::http::{Head, Method, Response};
use crate::jobs::{JobId, not_found};
use crate::{Api, Clock, Limits, Node};

/// What a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    Healthz,
    Readyz,
    Version,
    OpenApi,
    Host,
    Images,
    Templates,
    ListJobs,
    CreateJob,
    GetJob(JobId),
    DeleteJob(JobId),
    JobLogs(JobId),
    JobConnections(JobId),
    PutWorkspace(JobId),
    ListArtifacts(JobId),
    AllArtifacts(JobId),
    OneArtifact(JobId),
    CancelJob(JobId),
}

impl Route {
    /// Whether whoever gets here has shown nothing.
    pub(crate) fn is_public(self) -> bool {
        matches!(self, Self::Healthz | Self::Readyz | Self::Version | Self::OpenApi)
    }

    /// Most bytes of its request's body. Only a new job has one, and a workspace, which has limits of its own.
    pub(crate) fn body_limit(self, limits: &Limits) -> usize {
        match self {
            Self::CreateJob => limits.body_bytes,
            Self::PutWorkspace(_) => usize::MAX,
            _ => 0,
        }
    }
}

/// A path of the API, as in `/openapi.json`. HEAD goes wherever GET goes.
#[derive(Debug)]
pub(crate) struct Path {
    pub(crate) template: &'static str,
    /// Methods as `Allow` names them.
    pub(crate) allow: &'static str,
    /// Whether it needs no token.
    pub(crate) public: bool,
}

const fn path(template: &'static str, allow: &'static str, public: bool) -> Path {
    Path { template, allow, public }
}

/// Every path there is.
pub(crate) const PATHS: [Path; 16] = [
    path("/healthz", "GET, HEAD", true),
    path("/readyz", "GET, HEAD", true),
    path("/version", "GET, HEAD", true),
    path("/openapi.json", "GET, HEAD", true),
    path("/v1/host", "GET, HEAD", false),
    path("/v1/images", "GET, HEAD", false),
    path("/v1/templates", "GET, HEAD", false),
    path("/v1/jobs", "GET, HEAD, POST", false),
    path("/v1/jobs/{id}", "GET, HEAD, DELETE", false),
    path("/v1/jobs/{id}/logs", "GET, HEAD", false),
    path("/v1/jobs/{id}/connections", "GET, HEAD", false),
    path("/v1/jobs/{id}/workspace", "PUT", false),
    path("/v1/jobs/{id}/artifacts", "GET, HEAD", false),
    path("/v1/jobs/{id}/artifacts.tar", "GET, HEAD", false),
    path("/v1/jobs/{id}/artifacts/{name}", "GET, HEAD", false),
    path("/v1/jobs/{id}/cancel", "POST", false),
];

/// The path a request means, and its `{id}`.
fn find(path: &str) -> Option<(&'static Path, &str)> {
    PATHS.iter().find_map(|candidate| {
        let mut id = "";
        let (mut want, mut have) = (candidate.template.split('/'), path.split('/'));
        loop {
            match (want.next(), have.next()) {
                (None, None) => return Some((candidate, id)),
                (Some("{id}"), Some(part)) if !part.is_empty() => id = part,
                // An artifact's name is all the rest, slashes included.
                (Some("{name}"), Some(part)) if !part.is_empty() => return Some((candidate, id)),
                (Some(want), Some(have)) if want == have => {}
                _ => return None,
            }
        }
    })
}

/// Decides on a request by its head alone, before any of its body is read.
///
/// Whoever has no token learns nothing but that, not even which paths there are.
pub(crate) fn admit(api: &Api, head: &Head) -> Result<Route, ApiError> {
    let found = find(&head.path);
    if !found.is_some_and(|(path, _)| path.public) {
        authorize(api, head)?;
    }
    let Some((path, id)) = found else {
        let shown: String = head.path.chars().take(128).collect();
        let message = alloc::format!("there is no {shown} here; /openapi.json lists what there is");
        return Err(ApiError::new(ErrorCode::NotFound, message));
    };
    let job = || JobId::parse(id).ok_or_else(|| not_found(&id.chars().take(64).collect::<String>()));
    let get = matches!(head.method, Method::Get | Method::Head);
    match (path.template, head.method) {
        ("/healthz", _) if get => Ok(Route::Healthz),
        ("/readyz", _) if get => Ok(Route::Readyz),
        ("/version", _) if get => Ok(Route::Version),
        ("/openapi.json", _) if get => Ok(Route::OpenApi),
        ("/v1/host", _) if get => Ok(Route::Host),
        ("/v1/images", _) if get => Ok(Route::Images),
        ("/v1/templates", _) if get => Ok(Route::Templates),
        ("/v1/jobs", _) if get => Ok(Route::ListJobs),
        ("/v1/jobs", Method::Post) => is_json(head).map(|()| Route::CreateJob),
        ("/v1/jobs/{id}", _) if get => job().map(Route::GetJob),
        ("/v1/jobs/{id}", Method::Delete) => job().map(Route::DeleteJob),
        ("/v1/jobs/{id}/logs", _) if get => job().map(Route::JobLogs),
        ("/v1/jobs/{id}/connections", _) if get => job().map(Route::JobConnections),
        ("/v1/jobs/{id}/workspace", Method::Put) => {
            is_tar(head).and_then(|()| job().map(Route::PutWorkspace))
        }
        ("/v1/jobs/{id}/artifacts", _) if get => job().map(Route::ListArtifacts),
        ("/v1/jobs/{id}/artifacts.tar", _) if get => job().map(Route::AllArtifacts),
        ("/v1/jobs/{id}/artifacts/{name}", _) if get => job().map(Route::OneArtifact),
        ("/v1/jobs/{id}/cancel", Method::Post) => job().map(Route::CancelJob),
        _ => {
            let message = alloc::format!("{} takes {}", path.template, path.allow);
            Err(ApiError::new(ErrorCode::MethodNotAllowed, message).with_header("Allow", path.allow))
        }
    }
}

fn authorize(api: &Api, head: &Head) -> Result<(), ApiError> {
    const REALM: &str = "Bearer realm=\"nestling\"";
    let Some(token) = &api.config.token else { return Ok(()) };
    let given = head.authorization.as_deref().and_then(|value| {
        let (scheme, token) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
    });
    match given {
        None => {
            let message = "this needs the node's token, as a header: Authorization: Bearer TOKEN";
            Err(ApiError::new(ErrorCode::MissingToken, message).with_header("WWW-Authenticate", REALM))
        }
        // The time this takes tells how long the token is and nothing else of it.
        Some(given) if bool::from(given.as_bytes().ct_eq(token.as_bytes())) => Ok(()),
        Some(_) => {
            let challenge = alloc::format!("{REALM}, error=\"invalid_token\"");
            let message = "this is not the node's token";
            Err(ApiError::new(ErrorCode::WrongToken, message).with_header("WWW-Authenticate", challenge))
        }
    }
}

/// A web page in a browser can send a form to any address without asking, but not JSON.
fn is_json(head: &Head) -> Result<(), ApiError> {
    if has_type(head, "application/json") {
        return Ok(());
    }
    let message = "a job is JSON; send it with the header Content-Type: application/json";
    Err(ApiError::new(ErrorCode::UnsupportedMediaType, message))
}

fn is_tar(head: &Head) -> Result<(), ApiError> {
    let plain = head.content_encoding.as_deref().is_none_or(|coding| coding.eq_ignore_ascii_case("identity"));
    if plain && has_type(head, "application/x-tar") {
        return Ok(());
    }
    let message = "a workspace is a tar that is not compressed; send it with the header Content-Type: application/x-tar \
                   and without Content-Encoding";
    Err(ApiError::new(ErrorCode::UnsupportedMediaType, message))
}

fn has_type(head: &Head, wanted: &str) -> bool {
    let given = head.content_type.as_deref().and_then(|value| value.split(';').next()).map(str::trim);
    given.is_some_and(|given| given.eq_ignore_ascii_case(wanted))
}

/// Does what an admitted request asks for.
pub(crate) fn handle(
    api: &mut Api,
    node: &mut dyn Node,
    head: &Head,
    route: &Route,
    body: &[u8],
    now: Clock,
) -> Result<Response, ApiError> {
    match *route {
        Route::Healthz => Ok(handlers::text("ok\n")),
        Route::Readyz => handlers::ready(node),
        Route::Version => Ok(handlers::version(node)),
        Route::OpenApi => Ok(handlers::openapi()),
        Route::Host => Ok(Response::json(200, &node.host())),
        Route::Images => Ok(handlers::images(node)),
        Route::Templates => Ok(handlers::templates(node)),
        Route::ListJobs => handlers::list_jobs(api, head),
        Route::CreateJob => handlers::create_job(api, node, head, body, now),
        Route::GetJob(id) => Ok(Response::json(200, &api.jobs.get(id)?)),
        Route::DeleteJob(id) => api.jobs.delete(id).map(|()| Response::empty(204)),
        Route::JobLogs(id) => handlers::job_logs(api, head, id, now),
        Route::JobConnections(id) => Ok(Response::json(200, &api.jobs.connections(id)?)),
        // Its connection passes it on as it arrives and does not come here.
        Route::PutWorkspace(_) => {
            Err(ApiError::new(ErrorCode::Internal, "a workspace is not a request like the others"))
        }
        Route::ListArtifacts(id) => Ok(Response::json(200, &api.jobs.artifacts(id)?)),
        Route::AllArtifacts(id) => handlers::all_artifacts(api, id, now),
        Route::OneArtifact(id) => handlers::one_artifact(api, head, id, now),
        Route::CancelJob(id) => {
            api.jobs.cancel(id, now)?;
            Ok(Response::json(202, &api.jobs.get(id)?))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_matched_part_by_part() {
        let found = |path| find(path).map(|(path, id)| (path.template, id));
        assert_eq!(found("/v1/jobs"), Some(("/v1/jobs", "")));
        assert_eq!(found("/v1/jobs/a"), Some(("/v1/jobs/{id}", "a")));
        assert_eq!(found("/v1/jobs/a/logs"), Some(("/v1/jobs/{id}/logs", "a")));
        for name in ["b", "b/c", "b//c/", "artifacts.tar", "%2e%2e/x"] {
            let path = alloc::format!("/v1/jobs/a/artifacts/{name}");
            assert_eq!(
                find(&path).map(|(path, id)| (path.template, id)),
                Some(("/v1/jobs/{id}/artifacts/{name}", "a"))
            );
        }
        assert_eq!(found("/v1/jobs/a/artifacts.tar"), Some(("/v1/jobs/{id}/artifacts.tar", "a")));
        for path in [
            "",
            "/",
            "*",
            "/v1",
            "/v1/jobs/",
            "/v1/jobs//logs",
            "/v1/jobs/a/b",
            "/v1/jobs/a/logs/",
            "/v1/jobs/a/artifacts/",
            "x/v1/jobs",
        ] {
            assert_eq!(found(path), None, "{path}");
        }
    }
}
