//! The subcommands, one a file, and what several of them need.

pub(crate) mod artifacts;
pub(crate) mod cancel;
pub(crate) mod connections;
pub(crate) mod down;
mod files;
mod follow;
pub(crate) mod image;
mod interrupt;
pub(crate) mod jobs;
pub(crate) mod logs;
pub(crate) mod run;
pub(crate) mod status;
mod table;
mod target;
pub(crate) mod up;
