//! What holds on every bed and every vendor: `NESTLING_BED` chooses where these tests run.
//!
//! The expectations stand here once. That each bed meets them is what makes the beds equal.

mod job;
mod smoke;
