//! Errors of the API: a stable code for programs, a message for people, GitHub's shape on the wire.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::types::{ErrorBody, FieldError};

/// What went wrong. A code never changes its name, its status or its meaning; `/openapi.json` describes each one
/// under `x-error-codes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// The request is not HTTP/1 or breaks its rules.
    MalformedRequest,
    /// The body is not JSON; the message has line and column.
    InvalidJson,
    /// A query parameter is unknown or has a value it cannot have.
    InvalidQuery,
    /// There is no `Authorization: Bearer` header.
    MissingToken,
    /// The bearer token is not this node's.
    WrongToken,
    /// No such path.
    NotFound,
    /// No such job, or no longer.
    JobNotFound,
    /// The path is there, with other methods; `Allow` names them.
    MethodNotAllowed,
    /// The request did not arrive in time.
    RequestTimeout,
    /// The job is over already.
    JobCompleted,
    /// The job is not over yet.
    JobNotCompleted,
    /// The job takes no workspace, or has one already.
    WorkspaceNotExpected,
    /// The job's artifacts cannot be read yet, or another client reads them.
    ArtifactsNotReady,
    /// The job's artifacts were there, and are no longer.
    ArtifactsGone,
    /// The job has no such artifact.
    ArtifactNotFound,
    /// The body is longer than a request may be.
    BodyTooLarge,
    /// A body that is not declared as JSON.
    UnsupportedMediaType,
    /// None of the bytes asked for exist any more, or yet.
    RangeNotSatisfiable,
    /// An `Expect` that is not `100-continue`.
    ExpectationFailed,
    /// The request parses; a field of it is wrong. `errors` names each.
    ValidationFailed,
    /// The workspace could not be unpacked; the job is over.
    WorkspaceFailed,
    /// The `Idempotency-Key` was used with another request.
    IdempotencyKeyReused,
    /// Request line and headers are longer than they may be.
    HeadTooLarge,
    /// A transfer coding this node does not know.
    NotImplemented,
    /// The node has not finished starting.
    NotReady,
    /// As many jobs are queued as the node keeps.
    QueueFull,
    /// More requests or answers are under way than the node has memory for.
    Overloaded,
    /// Not HTTP/1.0 or HTTP/1.1.
    HttpVersionNotSupported,
    /// A fault of the node's own.
    Internal,
}

impl ErrorCode {
    /// Every code there is.
    pub const ALL: [Self; 29] = [
        Self::MalformedRequest,
        Self::InvalidJson,
        Self::InvalidQuery,
        Self::MissingToken,
        Self::WrongToken,
        Self::NotFound,
        Self::JobNotFound,
        Self::MethodNotAllowed,
        Self::RequestTimeout,
        Self::JobCompleted,
        Self::JobNotCompleted,
        Self::WorkspaceNotExpected,
        Self::ArtifactsNotReady,
        Self::ArtifactsGone,
        Self::ArtifactNotFound,
        Self::BodyTooLarge,
        Self::UnsupportedMediaType,
        Self::RangeNotSatisfiable,
        Self::ExpectationFailed,
        Self::ValidationFailed,
        Self::WorkspaceFailed,
        Self::IdempotencyKeyReused,
        Self::HeadTooLarge,
        Self::NotImplemented,
        Self::NotReady,
        Self::QueueFull,
        Self::Overloaded,
        Self::HttpVersionNotSupported,
        Self::Internal,
    ];

    /// The code on the wire and the status it comes with.
    const fn row(self) -> (&'static str, u16) {
        match self {
            Self::MalformedRequest => ("malformed_request", 400),
            Self::InvalidJson => ("invalid_json", 400),
            Self::InvalidQuery => ("invalid_query", 400),
            Self::MissingToken => ("missing_token", 401),
            Self::WrongToken => ("wrong_token", 401),
            Self::NotFound => ("not_found", 404),
            Self::JobNotFound => ("job_not_found", 404),
            Self::MethodNotAllowed => ("method_not_allowed", 405),
            Self::RequestTimeout => ("request_timeout", 408),
            Self::JobCompleted => ("job_completed", 409),
            Self::JobNotCompleted => ("job_not_completed", 409),
            Self::WorkspaceNotExpected => ("workspace_not_expected", 409),
            Self::ArtifactsNotReady => ("artifacts_not_ready", 409),
            Self::ArtifactsGone => ("artifacts_gone", 410),
            Self::ArtifactNotFound => ("artifact_not_found", 404),
            Self::BodyTooLarge => ("body_too_large", 413),
            Self::UnsupportedMediaType => ("unsupported_media_type", 415),
            Self::RangeNotSatisfiable => ("range_not_satisfiable", 416),
            Self::ExpectationFailed => ("expectation_failed", 417),
            Self::ValidationFailed => ("validation_failed", 422),
            Self::WorkspaceFailed => ("workspace_failed", 422),
            Self::IdempotencyKeyReused => ("idempotency_key_reused", 422),
            Self::HeadTooLarge => ("head_too_large", 431),
            Self::Internal => ("internal", 500),
            Self::NotImplemented => ("not_implemented", 501),
            Self::NotReady => ("not_ready", 503),
            Self::QueueFull => ("queue_full", 503),
            Self::Overloaded => ("overloaded", 503),
            Self::HttpVersionNotSupported => ("http_version_not_supported", 505),
        }
    }

    /// The code on the wire, in snake case.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        self.row().0
    }

    /// The HTTP status that goes with it.
    #[must_use]
    pub const fn status(self) -> u16 {
        self.row().1
    }
}

/// An answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// What went wrong.
    pub code: ErrorCode,
    /// The same for a person: what, where, what to do.
    pub message: String,
    /// Every wrong field, for [`ErrorCode::ValidationFailed`].
    pub errors: Vec<FieldError>,
    /// Headers that go with the answer, such as `Allow`.
    pub headers: Vec<(&'static str, String)>,
}

impl ApiError {
    /// An error with a message for people.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), errors: Vec::new(), headers: Vec::new() }
    }

    /// The same error, with one more header in its answer.
    #[must_use]
    pub fn with_header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// A request that parsed and has wrong fields. The message is the first of them, so that it alone helps.
    #[must_use]
    pub fn validation(errors: Vec<FieldError>) -> Self {
        let mut message = errors.first().map_or_else(String::new, |first| {
            if first.field.is_empty() {
                first.message.clone()
            } else {
                format!("{}: {}", first.field, first.message)
            }
        });
        if errors.len() > 1 {
            message = format!("{message} (and {} more, see errors)", errors.len().saturating_sub(1));
        }
        Self { errors, ..Self::new(ErrorCode::ValidationFailed, message) }
    }

    /// The body of the answer.
    #[must_use]
    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            message: self.message.clone(),
            code: self.code.as_str().to_string(),
            documentation_url: format!("/openapi.json#/x-error-codes/{}", self.code.as_str()),
            status: self.code.status().to_string(),
            errors: self.errors.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn codes_are_all_different_and_in_snake_case() {
        let mut names: Vec<_> = ErrorCode::ALL.iter().map(|code| code.as_str()).collect();
        assert!(names.iter().all(|name| name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ErrorCode::ALL.len());
    }

    #[test]
    fn a_validation_error_says_the_first_field_and_how_many_more() {
        let field = |name: &str| FieldError { field: name.into(), message: "must not be empty".into() };
        let one = ApiError::validation(vec![field("name")]);
        assert_eq!(one.message, "name: must not be empty");
        let two = ApiError::validation(vec![field("steps[0].run"), field("name")]);
        assert_eq!(two.message, "steps[0].run: must not be empty (and 1 more, see errors)");
        assert_eq!(two.body().errors.len(), 2);
    }

    #[test]
    fn the_body_has_githubs_shape() {
        let body = ApiError::new(ErrorCode::JobNotFound, "no job x").body();
        let json = serde_json::to_value(&body).unwrap();
        let expected = serde_json::json!({
            "message": "no job x", "code": "job_not_found", "status": "404",
            "documentation_url": "/openapi.json#/x-error-codes/job_not_found",
        });
        assert_eq!(json, expected);
    }
}
