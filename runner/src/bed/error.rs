//! Why a node could not be started in a bed.

use std::fmt;
use std::io;

use super::{BedKind, qemu};
use crate::image;
use crate::ready::NotReady;

/// Why a node could not be started in a bed.
#[derive(Debug)]
pub enum BedError {
    /// No bundle of images.
    Image(image::NotFound),
    /// The kernel's command line cannot be handed over.
    CommandLine(String),
    /// A file or a socket.
    Files(io::Error),
    /// QEMU is not installed.
    NoQemu,
    /// A part of Bochs or of what makes its boot disk is not installed: which.
    NoBochs(String),
    /// Bochs knows no such CPU model.
    Model {
        /// The one asked for.
        given: String,
        /// Those there are.
        known: Vec<String>,
    },
    /// The bed cannot do what was asked for, and what can be done.
    Unsupported(BedKind, String),
    /// Another program has this port.
    PortTaken(u16),
    /// A program's own complaint: its name and its words.
    Refused(&'static str, String),
    /// The node did not come up.
    NotReady(NotReady),
}

/// How to get Bochs and what makes its boot disk, for messages.
const BOCHS_HINT: &str = "install it with `apt-get install --no-install-recommends bochs bochs-term bochsbios vgabios grub-pc-bin \
                          grub-common xorriso` (Debian, Ubuntu)";

impl fmt::Display for BedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BedError::Image(error) => error.fmt(f),
            BedError::CommandLine(why) => write!(f, "the kernel's command line {why}"),
            BedError::Files(error) => write!(f, "cannot prepare the node's files: {error}"),
            BedError::NoQemu => write!(f, "{} is not installed; {}", qemu::PROGRAM, qemu::INSTALL_HINT),
            BedError::NoBochs(what) => write!(f, "{what} is not installed; {BOCHS_HINT}"),
            BedError::Model { given, known } => {
                write!(f, "Bochs has no CPU model {given}; give bochs:MODEL with one of {}", known.join(", "))
            }
            BedError::Unsupported(bed, what) => write!(f, "not in {bed}: {what}"),
            BedError::PortTaken(port) => {
                write!(f, "port {port} of 127.0.0.1 cannot be had; leave out --port to get any that is free")
            }
            BedError::Refused(program, words) => write!(f, "{program} did not start: {words}"),
            BedError::NotReady(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for BedError {}
