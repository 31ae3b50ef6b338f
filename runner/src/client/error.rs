//! What can go wrong between a client and a node.

use std::error::Error;
use std::fmt;
use std::time::Duration;

use nestling_api::types::ErrorBody;

use super::Answer;

/// When to ask again if a node that cannot answer now does not say.
const DEFAULT_RETRY_AFTER: Duration = Duration::from_secs(1);

/// Why a call had no result.
#[derive(Debug)]
pub enum ClientError {
    /// The text is not a node's URL.
    Url(String),
    /// No connection, or it broke.
    Unreachable {
        /// The node's URL.
        url: String,
        /// What broke.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The node refused.
    Refused {
        /// The HTTP status.
        status: u16,
        /// What the node says is wrong.
        body: Box<ErrorBody>,
        /// When to ask again, if the node says so.
        retry_after: Option<Duration>,
    },
    /// The node answered what cannot be understood.
    Answer {
        /// What was asked for.
        path: String,
        /// What is wrong with the answer.
        reason: String,
    },
}

impl ClientError {
    /// The stable code of a refusal.
    pub fn code(&self) -> Option<&str> {
        match self {
            ClientError::Refused { body, .. } => Some(&body.code),
            _ => None,
        }
    }

    /// The HTTP status of a refusal.
    pub fn status(&self) -> Option<u16> {
        match self {
            ClientError::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// How long to wait before asking again, when the node could not do now what it may do later (status 503).
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            ClientError::Refused { status: 503, retry_after, .. } => {
                Some(retry_after.unwrap_or(DEFAULT_RETRY_AFTER))
            }
            _ => None,
        }
    }

    pub(super) fn unreachable(url: &str, source: impl Into<Box<dyn Error + Send + Sync>>) -> ClientError {
        ClientError::Unreachable { url: url.to_owned(), source: source.into() }
    }

    pub(super) fn refused(path: &str, answer: &Answer) -> ClientError {
        match serde_json::from_slice::<ErrorBody>(&answer.body) {
            Ok(body) => {
                // The other form, a date, is not a node's.
                let seconds = answer.header("retry-after").and_then(|value| value.parse().ok());
                let retry_after = seconds.map(Duration::from_secs);
                ClientError::Refused { status: answer.status, body: Box::new(body), retry_after }
            }
            Err(_) => ClientError::Answer {
                path: path.to_owned(),
                reason: format!("status {} without a node's error; is this a nestling node?", answer.status),
            },
        }
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClientError::Url(url) => {
                write!(f, "{url:?} is not the URL of a node; give one such as http://127.0.0.1:8080")
            }
            ClientError::Unreachable { url, source } => {
                write!(f, "cannot reach the node at {url}: {source}")
            }
            ClientError::Refused { status, body, .. } => {
                write!(f, "{}", body.message)?;
                // The message has the first one already.
                for error in body.errors.iter().skip(1) {
                    write!(f, "\n{}: {}", error.field, error.message)?;
                }
                match status {
                    401 => f.write_str("\ngive the node's token with --token or in NESTLING_TOKEN"),
                    _ => Ok(()),
                }
            }
            ClientError::Answer { path, reason } => {
                write!(f, "the node's answer to {path} cannot be understood: {reason}")
            }
        }
    }
}

impl Error for ClientError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &str) -> Answer {
        Answer { status, headers: Vec::new(), body: body.as_bytes().to_vec() }
    }

    #[test]
    fn a_refusal_is_told_with_every_wrong_field() {
        let body = r#"{"message":"steps[0].run: must not be empty (and 1 more, see errors)","code":"validation_failed",
                       "documentation_url":"","status":"422","errors":[{"field":"steps[0].run","message":"must not be empty"},
                       {"field":"name","message":"is too long"}]}"#;
        let error = ClientError::refused("/v1/jobs", &answer(422, body));
        assert_eq!(error.code(), Some("validation_failed"));
        assert_eq!(error.status(), Some(422));
        let expected = "steps[0].run: must not be empty (and 1 more, see errors)\nname: is too long";
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn only_what_may_pass_is_worth_another_try_and_the_node_says_when() {
        let body = r#"{"message":"m","code":"queue_full","documentation_url":"","status":"503"}"#;
        let told = |status, value: &str| {
            let headers = vec![("retry-after".to_owned(), value.to_owned())];
            let answer = Answer { headers, ..answer(status, body) };
            ClientError::refused("/v1/jobs", &answer).retry_after()
        };
        assert_eq!(told(503, "5"), Some(Duration::from_secs(5)));
        assert_eq!(told(503, "Mon, 23 Nov 2026 12:00:00 GMT"), Some(DEFAULT_RETRY_AFTER));
        assert_eq!(told(409, "5"), None);
    }

    #[test]
    fn a_missing_token_comes_with_what_to_do() {
        let body =
            r#"{"message":"A token is needed","code":"unauthorized","documentation_url":"","status":"401"}"#;
        assert!(ClientError::refused("/v1/host", &answer(401, body)).to_string().contains("NESTLING_TOKEN"));
    }

    #[test]
    fn an_error_that_is_no_nodes_is_doubted() {
        let error = ClientError::refused("/v1/host", &answer(502, "<html>bad gateway</html>"));
        assert!(error.to_string().contains("is this a nestling node?"), "{error}");
    }
}
