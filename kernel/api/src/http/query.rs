//! A target's query: `name=value` pairs, percent-encoded.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::error::{ApiError, ErrorCode};

/// Parameters of a request, each at most once and each one that its path knows.
#[derive(Debug)]
pub(crate) struct Query {
    pairs: Vec<(String, String)>,
}

fn invalid(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::InvalidQuery, message)
}

impl Query {
    /// Parses a query that may have these parameters.
    pub(crate) fn parse(query: &str, known: &[&str]) -> Result<Self, ApiError> {
        let mut pairs = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (Some(name), Some(value)) = (decode(name, true), decode(value, true)) else {
                return Err(invalid("the query is not percent-encoded UTF-8"));
            };
            if !known.contains(&name.as_str()) {
                let shown: String = name.chars().take(64).filter(|c| !c.is_control()).collect();
                return Err(invalid(format!(
                    "unknown query parameter '{shown}'; known are: {}",
                    known.join(", ")
                )));
            }
            if pairs.iter().any(|(other, _)| *other == name) {
                return Err(invalid(format!("query parameter '{name}' is there more than once")));
            }
            pairs.push((name, value));
        }
        Ok(Self { pairs })
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.pairs.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    /// A number within a range.
    pub(crate) fn number(
        &self,
        name: &str,
        range: core::ops::RangeInclusive<u64>,
    ) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let digits = value.bytes().all(|b| b.is_ascii_digit());
        match value.parse().ok().filter(|number| digits && range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(invalid(format!("{name}: give a number from {} to {}", range.start(), range.end()))),
        }
    }

    /// One of a few words.
    pub(crate) fn word<T: Copy>(&self, name: &str, words: &[(&str, T)]) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match words.iter().find(|(word, _)| *word == value) {
            Some((_, meaning)) => Ok(Some(*meaning)),
            None => {
                let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
                Err(invalid(format!("{name}: give one of {}", words.join(", "))))
            }
        }
    }
}

/// Percent-decoded text; none when it is not that or not UTF-8.
pub(crate) fn decode(text: &str, plus_is_space: bool) -> Option<String> {
    if !text.contains(['%', '+']) {
        return Some(text.to_string());
    }
    let mut bytes = text.bytes();
    let mut out = Vec::new();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
                let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
                u8::try_from(high << 4 | low).ok()?
            }
            b'+' if plus_is_space => b' ',
            other => other,
        });
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_percent_decoded() {
        assert_eq!(decode("a%20b%C3%A4+c", true).as_deref(), Some("a bä c"));
        assert_eq!(decode("a+b", false).as_deref(), Some("a+b"));
        for text in ["%", "%4", "%4g", "%ff", "%+1"] {
            assert_eq!(decode(text, false), None, "{text}");
        }
    }

    #[test]
    fn parameters_are_known_single_and_typed() {
        let query = Query::parse("page=2&status=queued&", &["page", "status"]).unwrap();
        assert_eq!(query.number("page", 1..=9), Ok(Some(2)));
        assert_eq!(query.number("other", 1..=9), Ok(None));
        assert_eq!(query.word("status", &[("queued", 1)]), Ok(Some(1)));
        for (text, words) in [
            ("foo=1", "unknown query parameter 'foo'; known are: page"),
            ("page=1&page=1", "more than once"),
            ("page=%", "percent-encoded"),
        ] {
            let error = Query::parse(text, &["page"]).unwrap_err();
            assert!(error.message.contains(words), "{}", error.message);
        }
        for text in ["page=0", "page=10", "page=", "page=x", "page=%2B1", "page=99999999999999999999999"] {
            let query = Query::parse(text, &["page"]).unwrap();
            assert!(query.number("page", 1..=9).is_err(), "{text}");
        }
        assert!(query.word("status", &[("completed", 1)]).unwrap_err().message.contains("one of completed"));
    }
}
