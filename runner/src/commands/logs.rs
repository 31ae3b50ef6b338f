//! `nestling logs`.

use anyhow::Result;
use nestling::client::{LogFrame, Streams};

use super::follow::{self, Outputs, Sink};
use super::target;
use crate::cli::Logs;

pub(crate) fn logs(options: &Logs) -> Result<u8> {
    let target = target::require(&options.node)?;
    let id = target::job_id(&target.client, &options.id)?;
    let mut outputs = Outputs { stdout: !options.stderr, stderr: !options.stdout };
    if options.follow {
        follow::follow(&target, &id, &mut outputs)?;
        return Ok(0);
    }
    let streams = match (options.stdout, options.stderr) {
        (true, _) => Streams::Stdout,
        (_, true) => Streams::Stderr,
        _ => Streams::Both,
    };
    for frame in target.client.log_stream(&id, streams, 0, false)? {
        match frame? {
            LogFrame::Output(stream, data) => outputs.output(stream, &data)?,
            LogFrame::Dropped(bytes) => outputs.dropped(bytes)?,
        }
    }
    Ok(0)
}
