//! HTTP/1.1 without sockets, by RFC 9110 (semantics) and RFC 9112 (messages).
//!
//! [`Connection`] is one TCP connection: bytes go in, answers come out. Everything a peer can make it keep is bounded: a head
//! by [`MAX_HEAD`], a body by the API's limits, and an answer is made no faster than the peer takes it.

mod body;
mod chunked;
mod connection;
mod query;
mod range;
mod request;
mod response;
#[cfg(test)]
mod tests;
mod upload;

pub use connection::{Connection, MAX_HEAD};

pub(crate) use query::{Query, decode};
pub(crate) use range::Wanted;
pub(crate) use request::{Head, Method};
pub(crate) use response::{Body, Response};
