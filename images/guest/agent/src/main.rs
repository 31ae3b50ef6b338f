//! `nestling-agent`: takes a job's workspace and steps from the node, runs them, streams their output and sends artifacts.
//!
//! In an image it is PID 1: it mounts what Linux programs expect, loads the image's modules, changes to the root file system on a
//! disk where there is one, and calls the node over vsock. In a full distribution it runs as a service and does only the latter. Started with `--stdin` it speaks the same
//! protocol over the socket it was given as standard input.

mod artifacts;
mod connection;
mod files;
mod network;
mod root;
mod serve;
mod settings;
mod signals;
mod step;
mod system;
mod tree;
mod unpack;

use std::os::fd::AsFd;
use std::process::ExitCode;

use connection::Connection;
use settings::{Settings, Transport};
use signals::Signals;

fn main() -> ExitCode {
    let init = std::process::id() == 1;
    match run(init) {
        Ok(()) if !init => ExitCode::SUCCESS,
        Ok(()) => system::power_off(),
        Err(message) => {
            eprintln!("nestling-agent: {message}");
            if init {
                system::power_off()
            }
            ExitCode::FAILURE
        }
    }
}

/// From start to the end of the conversation with the node.
fn run(init: bool) -> Result<(), String> {
    // The kernel hands words of its command line that it does not know to PID 1 as arguments; they mean nothing here.
    let arguments = std::env::args().skip(1).filter(|_| !init);
    let mut settings = Settings::from_arguments(arguments)?;
    if init {
        system::start(&mut settings)?;
    } else {
        system::adopt_orphans();
    }
    system::protect_from_the_oom_killer();
    let signals = Signals::new(init).map_err(|error| format!("cannot receive signals: {error}"))?;
    let mut connection = match &settings.transport {
        Transport::Vsock => connection::call_the_node()?,
        Transport::Device(path) => connection::open_device(path)?,
        Transport::Stdin => {
            let socket = std::io::stdin().as_fd().try_clone_to_owned();
            Connection::new(socket.map_err(|error| format!("cannot use standard input: {error}"))?)?
        }
    };
    serve::serve(&mut connection, &signals, &settings).inspect_err(|message| connection.say_failure(message))
}
