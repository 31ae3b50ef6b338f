//! The API.
#![no_std]
#![forbid(unsafe_code)]
